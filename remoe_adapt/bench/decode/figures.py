"""From the steps of every arm to the figures of `remoe bench decode`: rows, the limit, and the bars."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from remoe_adapt.bench.harness import bar

# A step is known by its document and its place in it.
Steps = Mapping[tuple[int, int], Mapping[str, Any]]
Row = dict[str, Any]

_ANON_SLACK_BYTES = 32 << 20
# How names of arms begin that differ in their strength, or in their gain.
_FAMILY, _PRIORS = "cache25_s", "cache25_prior"
_TIGHT, _TIGHT_RESIDENT = "llamacpp_q4_tight", "llamacpp_q4_tight_resident"


def arm_row(steps: Steps, facts: Mapping[str, Any]) -> Row:
    """One arm's figures over all its steps. tpot_ms: median over turns (documents) of the mean time of a step, because
    a capped device serves reads in bursts of several steps."""
    times_ms = [1e3 * step["s"] for step in steps.values()]
    cached = "hits" in next(iter(steps.values()))
    seconds = sum(step["s"] for step in steps.values())
    row: Row = {
        "tpot_ms": statistics.median(1e3 * statistics.fmean(turn.values()) for turn in _turns(steps).values()),
        "tpot_median_step_ms": statistics.median(times_ms),
        "tpot_p95_ms": float(np.percentile(times_ms, 95)),
        "tpot_mean_ms": statistics.fmean(times_ms),
        "hit_rate": None,
        "bytes_per_token": _mean(steps, "bytes" if cached else "io_bytes"),
        "io_bytes_per_token": _mean(steps, "io_bytes"),
        "major_faults_per_token": _mean(steps, "major_faults"),
        "stall_share": None,
        "anon_growth_bytes": facts["anon_growth_bytes"],
        "steps": len(steps),
    }
    if cached:
        # Counted over all steps and divided once: steps without a look-up have no rate of their own.
        misses = sum(sum(step["misses"]) for step in steps.values())
        hits = sum(step["hits"] for step in steps.values())
        row["hit_rate"] = hits / (hits + misses)
        row["stall_share"] = sum(step["stall_s"] for step in steps.values()) / seconds
        row["bytes_per_token_median"] = statistics.median(step["bytes"] for step in steps.values())
    return row


def ppl_ratio(nll: Mapping[tuple[int, int], float], base: Mapping[tuple[int, int], float]) -> float:
    """exp of the mean difference of negative log-likelihoods over the steps that both have."""
    return math.exp(statistics.fmean(nll[key] - base[key] for key in nll.keys() & base.keys()))


def times_faster(arm: Steps, baseline: Steps) -> float:
    """Median over turns of the baseline's time over the arm's, each over the steps of the turn that both have."""
    ratios = []
    ours, theirs = _turns(arm), _turns(baseline)
    for turn in ours.keys() & theirs.keys():
        if both := ours[turn].keys() & theirs[turn].keys():
            ratios.append(sum(theirs[turn][place] for place in both) / sum(ours[turn][place] for place in both))
    return statistics.median(ratios)


def _turns(steps: Steps) -> dict[int, dict[int, float]]:
    """Seconds of each step by its place, by document."""
    turns: dict[int, dict[int, float]] = {}
    for (document, place), step in steps.items():
        turns.setdefault(document, {})[place] = float(step["s"])
    return turns


def miss_bursts(steps: Sequence[Mapping[str, Any]]) -> list[int]:
    """How many experts were read at a time: the misses of each layer at each token."""
    return [count for step in steps for count in step["misses"] if count]


def limit_ms(bytes_per_token: float, bytes_per_s: float, resident_tpot_ms: float) -> float:
    """What a token would take if its misses came at the raw bandwidth, and nothing else were lost."""
    return 1e3 * bytes_per_token / bytes_per_s + resident_tpot_ms


def bars(steps: Mapping[str, Steps], rows: Mapping[str, Row], limit: float, facts: Mapping[str, Row]) -> list[Row]:
    """Each bar: `{bar, value, target, at_most, met, arm}`; value and met are None without arms for it."""
    # Both rows below are of the same cache, so that only the routing differs.
    base = steps["cache25_s0"]
    found = [
        bar("budget 100 %: TPOT / stock's", 1 / times_faster(steps["cache100_s0"], steps["stock"]), 1.10),
        *(
            bar(f"budget 25 %: times faster than {what}", _over(steps, name), target, at_most=False)
            for what, name, target in (
                ("accelerate's disk offload", "accelerate_disk", 5.0),
                ("memory-mapped weights", "mmap_cgroup", 1.2),
                ("transformers' disk", "transformers_disk", 1.2),
            )
        ),
        bar("budget 25 %: TPOT / the limit", rows["cache25_s0"]["tpot_ms"] / limit, 1.25),
    ]
    for title, prefix, ratio, times in (
        ("family, ppl ratio <= 1.05: times faster than strength 0", _FAMILY, 1.05, 1.25),
        ("resident prior, ppl ratio <= 1.02: times faster than strength 0", _PRIORS, 1.02, 1.6),
    ):
        arms = {
            name: times_faster(steps[name], base)
            for name, row in rows.items()
            if name.startswith(prefix) and name != "cache25_s0" and _is_near(row, ratio)
        }
        best = max(arms, key=arms.__getitem__, default=None)
        found.append(bar(title, arms.get(best or ""), times, at_most=False) | {"arm": best})
    for name, fact in facts.items():
        if "budget_bytes" in fact:
            allowed = 1.1 * (fact["dense_bytes"] + fact["budget_bytes"]) + _ANON_SLACK_BYTES
            title = f"{name}: anonymous memory grown / (dense part + budget + 10 % + 32 MiB)"
            found.append(bar(title, fact["anon_growth_bytes"] / allowed, 1.0))
    return found


def coded_bars(steps: Mapping[str, Steps], *, is_bf16: bool) -> list[Row]:
    """The bars of experts in 4 bits, which are of bf16 slots: not measured where the other arms hold another type."""
    base = steps["cache25_s0"]
    found = []
    for title, name, target in (
        ("4 bits in 25 % of the bf16 bytes: TPOT / bf16 slots'", "cache25_q4_s0", 0.35),
        ("4 bits in 25 % of their own bytes: TPOT / bf16 slots'", "cache7_q4_s0", 0.55),
        ("the same with the resident prior: TPOT / bf16 slots'", "cache7_q4_prior20", 0.35),
    ):
        ratio = 1 / times_faster(steps[name], base) if is_bf16 and name in steps else None
        found.append(bar(title, ratio, target) | {"arm": name})
    return found


def llama_bars(steps: Mapping[str, Steps], rows: Mapping[str, Row], *, is_bf16: bool) -> list[Row]:
    """What a user would pick instead, in the same memory: our best arm whose perplexity ratio is at most 1.02 against
    stock llama.cpp with as many bits. Its F16 is half of float32, so that bar is of bf16 slots alone."""
    found = []
    for title, prefixes, stock in (
        ("bf16 slots: TPOT of the best arm / llama.cpp's in F16", (_FAMILY, _PRIORS), "llamacpp_f16"),
        ("4 bits in 25 % of the bf16 bytes: TPOT / llama.cpp's in q4_1", ("cache25_q4",), "llamacpp_q4"),
        ("4 bits in 25 % of their own bytes: TPOT of the best arm / llama.cpp's in q4_1", ("cache7_q4",), _TIGHT),
    ):
        arms = {
            name: 1 / times_faster(steps[name], steps[stock])
            for name, row in rows.items()
            if stock in steps and is_bf16 and name.startswith(prefixes) and _is_near(row, 1.02)
        }
        best = min(arms, key=arms.__getitem__, default=None)
        found.append(bar(f"ppl ratio <= 1.02, {title}", arms.get(best or ""), 1.0) | {"arm": best})
    # Of the prior alone: both are compared with F16, and quantisation costs them the same.
    base = rows.get(_TIGHT, {}).get("ppl_ratio")
    arms = {
        name: times_faster(steps[name], steps[_TIGHT])
        for name, row in rows.items()
        if base is not None and name.startswith(_TIGHT_RESIDENT) and _is_near(row, 1.02 * base)
    }
    best = max(arms, key=arms.__getitem__, default=None)
    title = "resident prior in llama.cpp, 4 bits in 25 % of their own bytes, ppl ratio to stock <= 1.02: times faster"
    return [*found, bar(title, arms.get(best or ""), 2.0, at_most=False) | {"arm": best}]


def _is_near(row: Row, ratio: float) -> bool:
    # None: what it would be compared with was not decoded.
    found = row.get("ppl_ratio")
    return found is not None and found <= ratio


def _over(steps: Mapping[str, Steps], baseline: str) -> float | None:
    return times_faster(steps["cache25_s0"], steps[baseline]) if baseline in steps else None


def _mean(steps: Steps, key: str) -> float:
    return statistics.fmean(step[key] for step in steps.values())
