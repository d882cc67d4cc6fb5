"""One squeeze, twice: with the dial, and with the same expert cache and no dial. The data of docs/pictures/squeeze.svg.

As `remoe bench controller`, but for a single squeeze, and recorded over time: the widened model decodes in a memory
group, a second process takes memory, holds it, and gives it back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch

from remoe_adapt.bench.controller.arms import PRIOR_GAIN, bench_profile, kinds
from remoe_adapt.bench.controller.process import ArmProcess, Setup
from remoe_adapt.bench.harness.memory_group import MemoryGroup
from remoe_adapt.bench.harness.results import checked_family, chosen_model, work_folder
from remoe_adapt.bench.harness.widen import widened
from remoe_adapt.checkpoints.load import load_tokenizer
from remoe_adapt.evaluation.shipped import held_out
from remoe_adapt.expert_cache.cache import READ_THREADS
from remoe_adapt.expert_cache.load import pack_experts

ARMS = ("adaptive", "no_controller")
_MIB = 1 << 20
_SQUEEZED, _TAKE_MIB_PER_S, _READ_MIB_PER_S = 0.25, 50, 300


@dataclass(frozen=True, kw_only=True)
class Options:
    """calm_s, squeeze_s, after_s: how long each phase lasts; bin_s: what one row covers; rounds: the arms take turns so
    often, and a row is the median of its rounds."""

    calm_s: float = 4.0
    squeeze_s: float = 12.0
    after_s: float = 10.0
    bin_s: float = 0.25
    rounds: int = 5


def run(options: Options) -> list[dict[str, Any]]:
    """Rows by arm and time.

    Keys: `arm`, `time_s` (from the first calm second), `phase`, `available_mib` of the group's limit,
    `budget_mib` of the expert cache, `strength`, `ms_per_token`, `misses_per_token`, `rounds`.
    """
    setup, found = _setup(), dict[tuple[str, float, str], list[dict[str, float]]]()
    for number in range(options.rounds):
        for name in ARMS if number % 2 == 0 else reversed(ARMS):
            for time_s, phase, figures in _round(name, setup, options):
                found.setdefault((name, time_s, phase), []).append(figures)
    return [
        {"arm": arm, "time_s": time_s, "phase": phase}
        | {key: median(figures[key] for figures in rounds) for key in rounds[0]}
        | {"rounds": len(rounds)}
        for (arm, time_s, phase), rounds in sorted(found.items(), key=lambda entry: (ARMS.index(entry[0][0]), entry[0]))
    ]


def _setup() -> Setup:
    model, work = chosen_model(None), work_folder(None)
    family = checked_family(model, None)
    wide = widened(model, work, dtype=torch.float32, expert_bytes=_MIB)
    pack = work / f"{wide.name}.pack"
    if not pack.is_dir():
        pack_experts(wide, pack, dtype=torch.float32)
    documents = held_out(Path(model), load_tokenizer(str(model)), 3000).documents
    arm = {"family": family, "gain": PRIOR_GAIN, "share": bench_profile().expert_cache.share, "pack": str(pack)}
    arm |= {"read_threads": READ_THREADS, "read_bytes_per_s": _READ_MIB_PER_S * _MIB}
    return Setup(wide, documents, 64, 1, _SQUEEZED, _TAKE_MIB_PER_S * _MIB, arm)


def _round(name: str, setup: Setup, options: Options) -> Iterator[tuple[float, str, dict[str, float]]]:
    """Times, phases and figures of one squeeze of one arm: means over `bin_s` seconds of decoding."""
    with ExitStack() as undo:
        arm = ArmProcess(name, kinds(())[name], setup, undo)
        arm.start()
        arm.ask("resume")
        arm.ask("decode", seconds=options.calm_s)  # the first documents after a start are slower
        begin_s = 0.0
        for phase, seconds in (("calm", options.calm_s), ("squeeze", options.squeeze_s), ("after", options.after_s)):
            if phase == "squeeze":
                arm.squeeze()
            elif phase == "after":
                arm.relax()
            for bin_s, figures in _recorded(arm, seconds, options.bin_s):
                yield round(begin_s + bin_s, 3), phase, figures
            begin_s += seconds


def _recorded(arm: ArmProcess, seconds: float, bin_s: float) -> Iterator[tuple[float, dict[str, float]]]:
    began_s, limit_bytes = time.monotonic(), arm.limit_bytes or 0
    with _memory(arm.group, bin_s / 2) as used:
        steps = arm.ask("decode", seconds=seconds)["steps"]
    bins: dict[float, list[tuple[float, ...]]] = {}
    for step in zip(*(steps[key] for key in ("at_s", "s", "strength", "budget_bytes", "misses")), strict=True):
        bins.setdefault((step[0] // bin_s + 0.5) * bin_s, []).append(step)
    for middle_s, found in sorted(bins.items()):
        if middle_s > seconds:
            break
        in_use = min(used, key=lambda sample: abs(sample[0] - began_s - middle_s))[1]
        _, s, strength, budget_bytes, misses = (fmean(column) for column in zip(*found, strict=True))
        yield (
            middle_s,
            {
                "available_mib": (limit_bytes - in_use) / _MIB,
                "budget_mib": budget_bytes / _MIB,
                "strength": strength,
                "ms_per_token": 1e3 * s,
                "misses_per_token": misses,
            },
        )


@contextmanager
def _memory(group: MemoryGroup, pause_s: float) -> Iterator[list[tuple[float, int]]]:
    """Moments and bytes charged to the group, sampled while the block runs."""
    found, over = [(time.monotonic(), group.used_bytes())], threading.Event()

    def sample() -> None:
        while not over.wait(pause_s):
            found.append((time.monotonic(), group.used_bytes()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        over.set()
        thread.join()
