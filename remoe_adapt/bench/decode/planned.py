"""`remoe plan` against measurement: the widened shipped model in several set-ups, each predicted while it is decoded.

Every set-up is a process of its own, which decodes the same held-out documents one token at a time; a second process
plans it, and measures the machine behind each document, so that other work slows both alike. Both read from a disk of
`read_mib_per_s` (`harness.slow_disk`), which the plan measures; where there can be none, the decoding process paces its
reads (`harness.PacedReads`), and the plan is given the rate. The plan sees configuration and headers, a trace of other
text, and what it measures.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from remoe_adapt.bench import harness
from remoe_adapt.bench.decode.bench import PROMPT_TOKENS, DecodeOptions, documents_of
from remoe_adapt.checkpoints import load_with_tokenizer
from remoe_adapt.evaluation import record_prefill
from remoe_adapt.expert_cache import READ_THREADS, pack_experts

_LEAST_MEMORY = "64GiB"
_REHEARSAL = 12
# Steps whose mean is a turn, of which the median counts; rounds of measurement behind each document.
_TURN_STEPS, _ROUNDS = 8, 4
_MIB = 1 << 20
_SETTINGS = ("tokens", "threads", "dtype", "read_mib_per_s")


@dataclass(frozen=True)
class PlannedOptions:
    """tokens: timed in each set-up. trace_tokens: of other text, for the hit rates. share: of the experts, in the
    set-ups with a cache. bits: of packs. expert_bytes: in `dtype`, one model each; the first one has all set-ups.
    set_ups: their names; None: all."""

    data: Sequence[str | Path] = ()
    work: Path | None = None
    keep: bool = False
    tokens: int = 260
    trace_tokens: int = 1500
    threads: int = 1
    dtype: str = "float32"
    read_mib_per_s: float = 300.0
    share: float = 0.25
    bits: Sequence[int] = (4, 8)
    expert_bytes: Sequence[int] = (harness.EXPERT_BYTES, harness.EXPERT_BYTES // 4)
    set_ups: Sequence[str] | None = None


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
    pack: Path | None = None


def run_planned(
    options: PlannedOptions, *, on_row: Callable[[dict[str, Any]], object] = lambda row: None
) -> list[dict[str, Any]]:
    """A row for each set-up: `setup`, `expert_bytes`, `tpot_ms`, `planned_tpot_ms`, `tpot_off` (planned over measured,
    less 1), the same of `memory_bytes`, `hit_rate` and `bytes_per_token`; `storage` (what all was read from),
    `load_average` (over a minute) and the settings. on_row: called with each as it is found.

    Raises as `run_decode`.
    """
    model, work = harness.chosen_model(None), harness.work_folder(options.work)
    # More than are decoded: what is left of them is the text of the trace.
    wanted = DecodeOptions(data=options.data, tokens=options.tokens, quality_tokens=options.trace_tokens)
    timed, others = documents_of(model, wanted)
    rows: list[dict[str, Any]] = []
    for number, expert_bytes in enumerate(options.expert_bytes):
        wide_model = harness.wide_copy(
            model, work, dtype=getattr(torch, options.dtype), expert_bytes=expert_bytes, keep=options.keep
        )
        with wide_model as (wide, _), ExitStack() as undo:
            run = _Run(options, wide, work, undo, expert_bytes)
            run.record(model, others)
            for setup in run.setups(is_first=number == 0):
                found = run.row(setup, timed) | {name: getattr(options, name) for name in _SETTINGS}
                rows.append(found | {"storage": run.storage["kind"], "load_average": os.getloadavg()[0]})
                on_row(rows[-1])
    return rows


class _Run:
    """One widened model: its disk, packs and trace, and the process that plans."""

    def __init__(self, options: PlannedOptions, wide: Path, work: Path, undo: ExitStack, expert_bytes: int) -> None:
        self._options, self._expert_bytes = options, expert_bytes
        # The model, and what packs of 8 bits or fewer may take beside it.
        size = 2 * sum(path.stat().st_size for path in wide.iterdir()) + (128 << 20)
        disk, self._cap, self.storage = undo.enter_context(harness.slow_disk(work, size, options.read_mib_per_s))
        self._folder = wide
        if disk is not None:
            self._folder = disk.folder / wide.name
            shutil.copytree(wide, self._folder)
        self._packs = {bits: self._folder.with_name(f"{wide.name}.q{bits}.pack") for bits in options.bits}
        for bits, pack in self._packs.items():
            if not pack.exists():
                pack_experts(self._folder, pack, bits=bits)
        if disk is not None:
            disk.forget()
        self._trace = self._folder.with_name(f"{wide.name}.trace.npz")
        undo.callback(self._trace.unlink, missing_ok=True)
        if self._cap is not None:
            self._cap.hold(options.read_mib_per_s * _MIB)

    def record(self, model: Path | str, documents: Sequence[Sequence[int]]) -> None:
        """The trace that plans take their hit rates from."""
        base, _ = load_with_tokenizer(model, device="cpu", dtype="float32")
        record_prefill(base, documents, model_id="widened", text="other held-out text").save(self._trace)

    def setups(self, *, is_first: bool) -> list[_Setup]:
        """Of the first model also those under the prior."""
        options, stored = self._options, "as stored"
        quarter = options.share
        cache: dict[str, Any] = {"direct_io": True, "threads": READ_THREADS}
        floats: dict[str, Any] = {"cache": cache, "family": None, "gain": 0.0, "dial": False}
        if self._cap is None and options.read_mib_per_s:
            floats["pace_mib_per_s"] = options.read_mib_per_s
        found = [
            _Setup("all in RAM", "whole", {}, stored, "all in RAM", 1.0),
            _Setup("cache", "cached", {**floats, "budget": quarter}, stored, "strength 0", quarter),
        ]
        if is_first:
            found += [
                _Setup(
                    f"cache, resident {gain:g}", "cached", {**floats, "budget": quarter, "gain": gain, "dial": True},
                    stored, f"resident {gain:g}", quarter, 1.0,
                )
                for gain in (0.1, 0.2)
            ]  # fmt: skip
        for bits, pack in self._packs.items():
            codes = {**floats, "cache": {**cache, "storage": str(pack), "arithmetic": "fast"}}
            found += [
                _Setup(
                    f"{bits} bits, all in RAM", "cached", {**codes, "budget": 1.0},
                    f"pack {pack.name}", "all in RAM", 1.0, pack=pack,
                ),
                _Setup(
                    f"{bits} bits, cache", "cached", {**codes, "budget": quarter},
                    f"pack {pack.name}", "strength 0", quarter, pack=pack,
                ),
            ]  # fmt: skip
        return [setup for setup in found if options.set_ups is None or setup.name in options.set_ups]

    def row(self, setup: _Setup, documents: Sequence[Sequence[int]]) -> dict[str, Any]:
        """What was planned for a set-up beside what was measured."""
        options = self._options
        decoding, planning = (harness.WorkerProcess(f"{setup.name}{what}", cap=self._cap) for what in ("", ", plan"))
        arm = {"strength": setup.strength} if setup.regime == "cached" else {}
        turns, steps, rows = list[float](), list[dict[str, Any]](), list[dict[str, Any]]()
        try:
            facts = decoding.ask(
                "load", regime=setup.regime, folder=str(self._folder), threads=options.threads,
                options=dict(setup.options),
            )  # fmt: skip
            self._begin_plan(planning, setup)
            most = facts["anon_growth_bytes"]
            rehearsal = list(documents[0][: PROMPT_TOKENS + _REHEARSAL])
            decoding.ask("decode", arm=arm, ids=rehearsal, prompt=PROMPT_TOKENS, max_seconds=60.0)
            for ids in documents:
                answer = decoding.ask("decode", arm=arm, ids=list(ids), prompt=PROMPT_TOKENS, max_seconds=60.0)
                steps += answer["steps"]
                turns += [
                    fmean(1e3 * step["s"] for step in answer["steps"][at : at + _TURN_STEPS])
                    for at in range(0, len(answer["steps"]) - _TURN_STEPS + 1, _TURN_STEPS)
                ]
                most = max(most, answer["anon_growth_bytes"])
                rows = planning.ask("measure", rounds=_ROUNDS)["rows"]
        finally:
            decoding.close()
            planning.close()
        planned = next(row for row in rows if (row["format"], row["way"]) == (setup.format, setup.way))
        hits, misses = sum(step.get("hits", 0) for step in steps), sum(sum(step.get("misses", ())) for step in steps)
        measured = {
            "tpot_ms": median(turns),
            "memory_bytes": most,
            "hit_rate": hits / (hits + misses) if hits else 1.0,
            "bytes_per_token": fmean(step.get("bytes", 0) for step in steps),
        }
        found: dict[str, Any] = {"setup": setup.name, "expert_bytes": self._expert_bytes}
        for name, value in measured.items():
            found |= {name: value, f"planned_{name}": planned[name]}
        found["tpot_off"] = planned["tpot_ms"] / measured["tpot_ms"] - 1
        found["memory_off"] = planned["memory_bytes"] / measured["memory_bytes"] - 1
        return found

    def _begin_plan(self, process: harness.WorkerProcess, setup: _Setup) -> None:
        given = self._options.read_mib_per_s if self._cap is None and self._options.read_mib_per_s else None
        process.ask(
            "plan", model=str(self._folder), trace=str(self._trace), memory=_LEAST_MEMORY, share=setup.share,
            storage=None if setup.pack is None else str(setup.pack), storage_mib=given, threads=self._options.threads,
        )  # fmt: skip
