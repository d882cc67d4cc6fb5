"""`remoe plan` against measurement: the widened shipped model in six set-ups, each predicted before it is decoded.

Every set-up is a process of its own, which decodes the same held-out documents one token at a time; experts are read
as from a device of `read_mib_per_s` (`harness.PacedReads`). The plan sees configuration and headers, a trace of other
text, and what `measured_compute` finds on this machine right after each set-up. Other work on the machine slows both;
what of it changes between the two is noise.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from remoe_adapt.bench import harness
from remoe_adapt.bench.decode.bench import PROMPT_TOKENS, DecodeOptions, documents_of
from remoe_adapt.checkpoints import load_with_tokenizer
from remoe_adapt.dial import profile_of
from remoe_adapt.evaluation import record_prefill
from remoe_adapt.evaluation.planning import PlanOptions, plan_model
from remoe_adapt.expert_cache import READ_THREADS, pack_experts

_LEAST_MEMORY = "64GiB"
_REHEARSAL = 12


@dataclass(frozen=True)
class PlannedOptions:
    """tokens: timed in each set-up. trace_tokens: of other text, for the hit rates. rounds: how often set-ups take
    turns. bits: of the pack of the set-ups with codes."""

    data: Sequence[str | Path] = ()
    work: Path | None = None
    keep: bool = False
    tokens: int = 260
    trace_tokens: int = 1500
    threads: int = 1
    dtype: str = "float32"
    read_mib_per_s: float = 300.0
    share: float = 0.25
    bits: int = 4
    expert_bytes: int = harness.EXPERT_BYTES


@dataclass(frozen=True)
class _Setup:
    """regime, options: of its process. format, way: of the plan's row."""

    name: str
    regime: str
    options: Mapping[str, Any]
    format: str
    way: str
    share: float
    strength: float = 0.0


def run_planned(options: PlannedOptions) -> dict[str, Any]:
    """`rows`, one for each set-up: `setup`, `tpot_ms`, `planned_tpot_ms`, `tpot_off` (planned over measured, less 1),
    the same of `memory_bytes` and `hit_rate`; `tokens`, `load_average` (over a minute) and the settings.

    Raises as `run_decode`.
    """
    dtype = getattr(torch, options.dtype)
    model, work = harness.chosen_model(None), harness.work_folder(options.work)
    # More than are decoded: what is left of them is the text of the trace.
    wanted = DecodeOptions(data=options.data, tokens=options.tokens, quality_tokens=options.trace_tokens)
    timed, others = documents_of(model, wanted)
    torch.set_num_threads(options.threads)
    wide_model = harness.wide_copy(model, work, dtype=dtype, expert_bytes=options.expert_bytes, keep=options.keep)
    with wide_model as (wide, _), ExitStack() as undo:
        trace = Path(undo.enter_context(tempfile.TemporaryDirectory())) / "trace.npz"
        base, _ = load_with_tokenizer(model, device="cpu", dtype="float32")
        record_prefill(base, others, model_id="widened", text="other held-out text").save(trace)
        del base
        pack = wide.with_name(f"{wide.name}.q{options.bits}.pack")
        if not pack.exists():
            pack_experts(wide, pack, bits=options.bits)
        setups = _setups(options, pack)
        planned = _Plans(options, wide, pack, trace)
        rows = [_row(setup, planned, _measured(setup, wide, timed, options)) for setup in setups]
    settings = {name: getattr(options, name) for name in ("threads", "dtype", "read_mib_per_s")}
    return {"rows": rows, "tokens": options.tokens, "load_average": os.getloadavg()[0], **settings}


def _setups(options: PlannedOptions, pack: Path) -> list[_Setup]:
    pace: dict[str, Any] = {"pace_mib_per_s": options.read_mib_per_s}
    cache: dict[str, Any] = {"direct_io": True, "threads": READ_THREADS}
    floats = {"cache": cache, "family": None, "gain": 0.0, "dial": False, **pace}
    codes = {**floats, "cache": {**cache, "storage": str(pack), "arithmetic": "fast"}}
    quarter = options.share
    packed = f"pack {pack.name}"
    return [
        _Setup("all in RAM", "cached", {**floats, "budget": 1.0}, "as stored", "strength 0", 1.0),
        _Setup("cache", "cached", {**floats, "budget": quarter}, "as stored", "strength 0", quarter),
        *(
            _Setup(
                f"cache, resident {gain:g}", "cached", {**floats, "budget": quarter, "gain": gain, "dial": True},
                "as stored", f"resident {gain:g}", quarter, 1.0,
            )
            for gain in (0.1, 0.2)
        ),
        _Setup("codes, all in RAM", "cached", {**codes, "budget": 1.0}, packed, "all in RAM", 1.0),
        _Setup("codes, cache", "cached", {**codes, "budget": quarter}, packed, "strength 0", quarter),
    ]  # fmt: skip


class _Plans:
    """Plans of the widened model, measured anew for each set-up: the machine is another one a minute later."""

    def __init__(self, options: PlannedOptions, wide: Path, pack: Path, trace: Path) -> None:
        self._options = PlanOptions(
            wide, profile_of(None), trace=trace, storage=pack, storage_mib=options.read_mib_per_s, memory=_LEAST_MEMORY
        )

    def row(self, setup: _Setup) -> dict[str, Any]:
        plan = plan_model(replace(self._options, share=setup.share))
        ways = (setup.way, "all in RAM") if setup.share == 1.0 else (setup.way,)
        found: dict[str, Any] = next(
            row for row in plan["rows"] if row["format"] == setup.format and row["way"] in ways
        )
        if setup.share == 1.0 and setup.format == "as stored":
            # transformers' own layers are planned for; here all experts are in the cache.
            machine = plan["machine"]
            more_ms = plan["parameters"]["layers"] * (machine["cached_layer_ms"] - machine["layer_ms"])
            found = {**found, "tpot_ms": found["tpot_ms"] + more_ms}
        return found


def _measured(setup: _Setup, wide: Path, documents: Sequence[Sequence[int]], options: PlannedOptions) -> dict[str, Any]:
    process = harness.WorkerProcess(setup.name)
    try:
        facts = process.ask(
            "load", regime=setup.regime, folder=str(wide), threads=options.threads, options=dict(setup.options)
        )
        arm = {"strength": setup.strength}
        steps: list[dict[str, Any]] = []
        most = facts["anon_growth_bytes"]
        rehearsal = list(documents[0][: PROMPT_TOKENS + _REHEARSAL])
        process.ask("decode", arm=arm, ids=rehearsal, prompt=PROMPT_TOKENS, max_seconds=60.0)
        turns = []
        for ids in documents:
            answer = process.ask("decode", arm=arm, ids=list(ids), prompt=PROMPT_TOKENS, max_seconds=60.0)
            steps += answer["steps"]
            turns.append(fmean(1e3 * step["s"] for step in answer["steps"]))
            most = max(most, answer["anon_growth_bytes"])
    finally:
        process.close()
    hits, misses = sum(step["hits"] for step in steps), sum(sum(step["misses"]) for step in steps)
    return {
        "tpot_ms": median(turns),
        "memory_bytes": most,
        "hit_rate": hits / (hits + misses),
        "bytes_per_token": fmean(step["bytes"] for step in steps),
    }


def _row(setup: _Setup, plans: _Plans, measured: Mapping[str, Any]) -> dict[str, Any]:
    planned = plans.row(setup)
    found: dict[str, Any] = {"setup": setup.name}
    for name in ("tpot_ms", "memory_bytes", "hit_rate", "bytes_per_token"):
        found |= {name: measured[name], f"planned_{name}": planned[name]}
    found["tpot_off"] = planned["tpot_ms"] / measured["tpot_ms"] - 1
    found["memory_off"] = planned["memory_bytes"] / measured["memory_bytes"] - 1
    return found
