"""`remoe bench scale`: a 30B model's shape at 4 bits, as it loads, as it decodes, and what a look-up costs.

A GGUF of random codes is written (checkpoint.py) and loaded in a fresh process behind the expert cache, its dense part
in codes too. First tokens come as in text, few of them often: what misses in the budget is read past the page cache.
Then one token comes again and again, whose experts all hit. Of those look-ups, the cost without arithmetic is taken.
Two small models of other shapes follow, with all experts in RAM: 4 bits against transformers' bf16 (in_ram.py).
"""

from __future__ import annotations

import shutil
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from remoe_adapt._support import usable_cores
from remoe_adapt.bench import harness
from remoe_adapt.bench.scale.checkpoint import Shape, write_checkpoint
from remoe_adapt.bench.scale.in_ram import INNERS, run_in_ram
from remoe_adapt.errors import ConfigError

_WORKER = (sys.executable, "-m", "remoe_adapt.bench.scale.worker")
_GIB = 1 << 30
# Of the whole model; of fewer layers as much less.
BUDGET_BYTES = 4 * _GIB
_SLACK_BYTES = 64 << 20
# What the libraries and a context take beside the model.
_PROCESS_BYTES = 2 * _GIB
_WARM_HITS, _ROUNDS = 4, 9


@dataclass(frozen=True)
class ScaleOptions:
    """What to make and how to decode. layers: of 48; tokens: that are timed, behind as many that fill the slots; work:
    folder of the files; keep: leave them there; in_ram: measure the small models too."""

    layers: int = Shape().layers
    tokens: int = 24
    threads: int | None = None
    arithmetic: str = "auto"
    direct_io: bool = True
    work: Path | None = None
    keep: bool = False
    seed: int = 0
    in_ram: bool = True


def run_scale(
    options: ScaleOptions,
    *,
    shape: Shape | None = None,
    on_start: Callable[[int], object] = lambda total_bytes: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Figures (see `_figures`), `bars`, and the settings.

    shape: another model than Qwen3-30B-A3B's first `layers` layers.

    Raises ConfigError when the disk or the memory is too small, and what loading raises. Processes and files are gone
    afterwards, whatever happens; the files stay with `keep`.
    """
    shape = shape or Shape(layers=options.layers)
    threads = options.threads or usable_cores()
    budget_bytes = min(BUDGET_BYTES * shape.layers // Shape().layers, shape.num_experts * shape.expert_bytes)
    _check_memory(shape, budget_bytes)
    name = f"scale-{shape.layers}x{shape.experts}x{shape.hidden}x{shape.inner}-{options.seed}"
    folder = harness.work_folder(options.work) / name
    path = folder / "model.gguf"
    with harness.terminated_as_interrupted():
        worker = None
        try:
            write_checkpoint(path, shape, seed=options.seed, on_start=on_start, on_bytes=on_bytes)
            harness.evict(folder)
            worker = harness.WorkerProcess("scale", command=_WORKER)
            facts = _measured(worker, path, shape, options, budget_bytes, threads)
        finally:
            if worker is not None:
                worker.close()
            if not options.keep:
                shutil.rmtree(folder, ignore_errors=True)
        rows = [
            run_in_ram(inner, work=harness.work_folder(options.work), keep=options.keep, threads=threads)
            for inner in (INNERS if options.in_ram else ())
        ]
    return {
        "layers": shape.layers,
        "tokens": options.tokens,
        "threads": threads,
        "direct_io": options.direct_io,
        **facts,
        "in_ram": rows,
        "bars": bars(facts, rows),
    }


def _measured(
    worker: harness.WorkerProcess, path: Path, shape: Shape, options: ScaleOptions, budget_bytes: int, threads: int
) -> dict[str, Any]:
    opened = worker.ask("open", path=str(path))
    loaded = worker.ask(
        "load", path=str(path), threads=threads, expert_cache=budget_bytes, arithmetic=options.arithmetic,
        direct_io=options.direct_io,
    )  # fmt: skip
    text = _text(shape, 2 * options.tokens, options.seed)
    within = worker.ask("decode", ids=text, warm=options.tokens)
    same = [text[-1]] * (_WARM_HITS + options.tokens)
    all_hits = worker.ask("decode", ids=same, warm=_WARM_HITS)
    looked_up = worker.ask("look_ups", ids=same[: _WARM_HITS + 8], warm=_WARM_HITS, rounds=_ROUNDS)
    return _figures(opened, loaded, within, all_hits, looked_up)


def _text(shape: Shape, tokens: int, seed: int) -> list[int]:
    """Token ids whose frequencies fall as their ranks rise, as words of a text do (Zipf's law)."""
    ranks = 1 / np.arange(1, min(shape.vocabulary, 50_000) + 1)
    ids: list[int] = np.random.default_rng(seed).choice(len(ranks), tokens, p=ranks / ranks.sum()).tolist()
    return ids


def _figures(
    opened: dict[str, Any],
    loaded: dict[str, Any],
    within: dict[str, Any],
    all_hits: dict[str, Any],
    looked_up: dict[str, Any],
) -> dict[str, Any]:
    """Figures by name. tpot_ms and hit_rate: with the budget; hits_tpot_ms: where all look-ups hit."""
    steps = len(within["times_ms"])
    return {
        **opened,
        **loaded,
        "anon_growth_bytes": max(all_hits["anon_growth_bytes"], within["anon_growth_bytes"]),
        "maps": max(within["maps"], all_hits["maps"]),
        "max_map_count": _max_map_count(),
        "arithmetic": within["arithmetic"],
        "tpot_ms": statistics.median(within["times_ms"]),
        "hit_rate": within["hits"] / (within["hits"] + within["misses"]),
        "bytes_per_token": within["bytes"] / steps,
        "stall_share": 1e3 * within["stall_s"] / sum(within["times_ms"]),
        "hits_tpot_ms": statistics.median(all_hits["times_ms"]),
        "hits_hit_rate": all_hits["hits"] / (all_hits["hits"] + all_hits["misses"]),
        "look_up_us": statistics.median(looked_up["us"]),
        "look_up_misses": looked_up["misses"],
        "look_ups_per_token": (all_hits["hits"] + all_hits["misses"]) / len(all_hits["times_ms"]),
    }


def bars(facts: dict[str, Any], in_ram: Sequence[dict[str, Any]] = ()) -> list[dict[str, Any]]:
    """Each bar: `{bar, value, target, at_most, met}`."""
    allowed = 1.1 * (facts["dense_bytes"] + facts["budget_bytes"]) + _SLACK_BYTES
    missed = bool(facts["look_up_misses"]) or facts["hits_hit_rate"] < 1
    return [
        harness.bar("seconds to load", facts["load_s"], 20.0),
        harness.bar("anonymous memory / (dense + budget + 10 % + 64 MiB)", facts["anon_growth_bytes"] / allowed, 1.0),
        # A look-up that misses is another thing than what this bar is for.
        harness.bar("microseconds of the cache for each look-up that hits", facts["look_up_us"], 8.0, failed=missed),
        harness.bar("memory mappings / vm.max_map_count", facts["maps"] / facts["max_map_count"], 0.1),
        *(
            harness.bar(f"all hits, {row['inner']} x {row['hidden']}: 4 bits / stock bf16, TPOT", row["ratio"], 0.75)
            for row in in_ram
        ),
    ]


def _max_map_count() -> int:
    return int(Path("/proc/sys/vm/max_map_count").read_text(encoding="ascii"))


def _check_memory(shape: Shape, budget_bytes: int) -> None:
    """Raises ConfigError when the machine has too little memory left for the model: the kernel would kill somebody."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
    needed = shape.dense_bytes + budget_bytes + _PROCESS_BYTES
    if needed > available:
        raise ConfigError(
            f"{shape.layers} layers take {needed >> 20} MiB of memory, {available >> 20} MiB are available: give "
            "--layers of a smaller number."
        )
