"""From the recorded phases of every arm to the figures of `remoe bench controller`: rows, bars, whether it counts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from remoe_adapt.bench.harness import bar

# In a cycle: before, while and after another process holds the memory.
CALM_BEFORE, SQUEEZE, CALM_AFTER = range(3)
# Less than this between the weakest and the strongest point, and noise could decide every bar.
_VOID_BELOW = 1.3

Row = dict[str, Any]


@dataclass(frozen=True)
class Phase:
    """One phase of one arm. steps: lists of one length by name, see `worker.COLUMNS`; `at_s` of the turn."""

    cycle: int
    kind: int
    steps: Mapping[str, Sequence[float]]

    @property
    def places(self) -> range:
        """Places of all its steps."""
        return range(len(self.steps["s"]))


Phases = Sequence[Phase]


def arm_row(phases: Phases, *, died: bool) -> Row:
    """One arm's times in ms, with the median budget in a squeeze, None where it died; KL and counts are added.

    calm_tpot_ms: of the first calm phases, the mean over the turns of a turn's median step.
    """
    squeezed = [s for phase in phases if phase.kind == SQUEEZE for s in phase.steps["s"]]
    budgets = [size for phase in phases if phase.kind == SQUEEZE for size in phase.steps["budget_bytes"]]
    misses = [count for phase in phases if phase.kind == SQUEEZE for count in phase.steps["misses"]]
    calm = [statistics.median(turn) for phase in phases if phase.kind == CALM_BEFORE for turn in _turns(phase)]
    alive = bool(squeezed) and not died
    return {
        "squeeze_p95_ms": 1e3 * float(np.percentile(squeezed, 95)) if alive else None,
        "squeeze_tpot_ms": 1e3 * statistics.median(squeezed) if alive else None,
        "calm_tpot_ms": 1e3 * statistics.fmean(calm) if calm else None,
        "squeeze_budget_bytes": statistics.median(budgets) if alive else None,
        "squeeze_misses": statistics.fmean(misses) if alive else None,
        "mean_strength": statistics.fmean(strengths(phases)) if phases else None,
    }


def strengths(phases: Phases) -> list[float]:
    """The strength of every token, in the order of the text."""
    return [strength for phase in phases for strength in phase.steps["strength"]]


def calm_ratio(compared: Mapping[str, Sequence[float]]) -> float:
    """Time per token with the dial at rest over that without (`Worker.do_compare`): the mean one without, and beside it
    the median difference of tokens that missed as often in both. Two processes would not do: the same work takes some
    4 % more or less in another."""
    # A miss takes many times what the dial costs, so tokens that missed differently would hide it.
    columns = (compared[key] for key in ("dial_s", "dial_misses", "bare_s", "bare_misses"))
    alike = [dial_s - bare_s for dial_s, one, bare_s, other in zip(*columns, strict=True) if one == other]
    return float(1.0 + statistics.median(alike) / statistics.fmean(compared["bare_s"]))


def return_s(phases: Phases) -> float | None:
    """Longest time from the end of a squeeze until strength was 0 for the rest of the phase; None if it never was."""
    longest = 0.0
    for phase in phases:
        if phase.kind != CALM_AFTER:
            continue
        live = [place for place in phase.places if phase.steps["strength"][place] > 0]
        # The last step above 0 counts: strength may fall, rise again and fall for good.
        after = live[-1] + 1 if live else 0
        if after == len(phase.places):
            return None
        longest = max(longest, phase.steps["at_s"][after] if live else 0.0)
    return longest


def rise_s(phases: Phases, share: float = 0.9) -> float | None:
    """Median time from the beginning of a squeeze until strength reached this part of its highest there."""
    times = []
    for phase in phases:
        if phase.kind == SQUEEZE and (top := max(phase.steps["strength"], default=0.0)) > 0:
            first = next(place for place in phase.places if phase.steps["strength"][place] >= share * top)
            times.append(phase.steps["at_s"][first])
    return statistics.median(times) if times else None


def monitoring(turns: Sequence[Mapping[str, Any]], sample_hz: float) -> Row:
    """What sampling costs, from steps of known begin in some of which the monitor ran (`Worker.do_watch`).

    `tpot_ratio`: time per token over what it would be without, where the steps half a period after each sample tell
    what a step takes into which a given moment falls. That needs no second run, whose speed differs by more.
    """
    at_samples, between, total_s, cpu_s, passed_s = list[float](), list[float](), 0.0, 0.0, 0.0
    for turn in turns:
        # A step into which a sample fell is set beside the step that runs half a period later, where none can fall.
        begins, times = np.asarray(turn["at_s"]), np.asarray(turn["s"])
        places = np.flatnonzero(turn["ran"])
        at_samples += times[places].tolist()
        later = np.searchsorted(begins, begins[places] + 0.5 / sample_hz, side="right") - 1
        between += times[later[later < len(times) - 1]].tolist()
        total_s, cpu_s, passed_s = total_s + times.sum(), cpu_s + turn["monitor_cpu_s"], passed_s + turn["seconds"]
    excess_s = statistics.fmean(at_samples) - statistics.fmean(between)
    spread_s = (np.var(at_samples) / len(at_samples) + np.var(between) / len(between)) ** 0.5
    return {
        "tpot_ratio": float(total_s / (total_s - len(at_samples) * excess_s)),
        "tpot_ratio_error": float(len(at_samples) * spread_s / total_s),
        "monitor_cpu_share": cpu_s / passed_s,
        "samples": len(at_samples),
    }


def why_void(rows: Mapping[str, Row], strongest: str) -> str | None:
    """Why this run proves nothing; None when it counts."""
    weak, strong = rows["fixed_0"]["squeeze_p95_ms"], rows[strongest]["squeeze_p95_ms"]
    if weak is None or strong is None:
        return "fixed_0 or the strongest point died in a squeeze"
    if weak / strong < _VOID_BELOW:
        return (
            f"fixed_0 took {weak / strong:.2f} times as long as {strongest} in the squeeze (95 %), at least "
            f"{_VOID_BELOW} are needed: strength has too little to win here"
        )
    return None


def bars(
    rows: Mapping[str, Row],
    phases: Mapping[str, Phases],
    compared: Mapping[str, Sequence[float]],
    overhead: Row,
    squeezes: Mapping[str, Row],
    recovery_s: float,
) -> list[Row]:
    """Each bar of the benchmark: `{bar, value, target, met}`; value and met are None where it was not measured."""
    fixed = [name for name in rows if name.startswith("fixed_") and name != "fixed_budget"]
    strongest, adaptive = fixed[-1], rows["adaptive"]
    p95 = adaptive["squeeze_p95_ms"]
    rival = next((name for name in fixed if p95 is not None and (rows[name]["squeeze_p95_ms"] or 1e9) <= p95), None)
    # Where every fixed point is slower, the strongest comes nearest.
    rival = rival or strongest
    back_s = return_s(phases["adaptive"])
    ratio = calm_ratio(compared) if compared else None
    killed = {arm: (squeezes.get(arm) or {}).get("oom_kills") for arm in ("adaptive", "fixed_budget")}
    return [
        bar(f"squeeze p95 TPOT, adaptive / {strongest}", _over(p95, rows[strongest]["squeeze_p95_ms"]), 1.10),
        bar(f"mean KL, adaptive / {rival}", _over(adaptive["kl"], rows[rival]["kl"]), 0.6, failed=rival == "fixed_0"),
        bar("calm: seconds until strength is 0", back_s, recovery_s, failed=back_s is None),
        bar("calm TPOT, with / without the controller", ratio, 1.02),
        bar("monitoring: share of one core", overhead.get("monitor_cpu_share"), 0.005),
        bar("monitoring: TPOT with / without", overhead.get("tpot_ratio"), 1.005),
        bar("kills in the squeezes, adaptive", killed["adaptive"], 0),
        # Were there none, the squeezes would be too mild to say anything of the adaptive arm.
        bar("kills in the squeezes, fixed_budget", killed["fixed_budget"], 1, at_most=False),
    ]


def _over(value: float | None, baseline: float | None) -> float | None:
    return value / baseline if value is not None and baseline else None


def _turns(phase: Phase) -> list[np.ndarray[Any, Any]]:
    """The times of its steps, by turn: in each of them `at_s` begins anew."""
    begins = np.flatnonzero(np.diff(phase.steps["at_s"]) < 0) + 1
    return [turn for turn in np.split(np.asarray(phase.steps["s"]), begins) if len(turn)]
