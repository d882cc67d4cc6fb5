"""From measured points to curves, and from curves to what an arm gives at a quality budget.

A point is a dict: `curve`, `label`, `seed`, `ppl_ratio` and `misses` (both relative to the base under LRU on the same
text), `ppl_se` (standard error of the ratio, paired by row), `kl`, `agree`, `eor`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from remoe_adapt.bench.harness import bar

BUDGETS = (1.005, 1.02, 1.05)
# The same in nats of KL to the base, whose noise is far smaller than that of a ratio of perplexities.
KL_BUDGETS = (0.005, 0.02, 0.05)
# Of which curves an arm is made. An arm is its best mixture: the Pareto front of all of its points.
ARMS: dict[str, tuple[str, ...]] = {
    "ours": ("ours",),
    "published": ("published",),
    "prior": ("cache_prior", "max_rank", "cumulative"),
    "cecar": ("cecar",),
    "tuned": ("tuned",),
    "uniform": ("cost_uniform",),
}
RIVALS = ("published", "prior", "cecar")
Point = Mapping[str, Any]


def front(points: Iterable[Point], cost: str = "ppl_ratio") -> list[tuple[float, float]]:
    """(cost, misses) of the points that no other one beats in both, by rising cost and falling misses."""
    found: list[tuple[float, float]] = []
    for spent, misses in sorted((point[cost], point["misses"]) for point in points):
        if not found or misses < found[-1][1]:
            found.append((spent, misses))
    return found


def misses_at(points: Iterable[Point], budget: float, cost: str = "ppl_ratio") -> float | None:
    """Misses that these points reach at this perplexity ratio, or other cost; None where all cost more.

    log(misses) is interpolated over the cost along the front. Nothing is extrapolated: where the strongest point costs
    less than the budget allows, its misses are the answer.
    """
    line = front(points, cost)
    below = [at for at in line if at[0] <= budget]
    if not below:
        return None
    above = line[len(below) :]
    if not above:
        return below[-1][1]
    (low, more), (high, fewer) = below[-1], above[0]
    part = (budget - low) / (high - low)
    # A point without a miss has no logarithm.
    return math.exp((1 - part) * math.log(max(more, 1e-6)) + part * math.log(max(fewer, 1e-6)))


def budgets(points: Sequence[Point], cost: str = "ppl_ratio") -> list[dict[str, Any]]:
    """For each budget the misses of every arm, mean over its seeds, and their spread (standard deviation)."""
    rows = []
    for budget in BUDGETS if cost == "ppl_ratio" else KL_BUDGETS:
        row: dict[str, Any] = {cost: budget}
        spread: dict[str, float] = {}
        for arm, curves in ARMS.items():
            own = [point for point in points if point["curve"] in curves]
            by_seed = [
                misses_at([point for point in own if point["seed"] == seed], budget, cost)
                for seed in sorted({point["seed"] for point in own})
            ]
            values = [value for value in by_seed if value is not None]
            row[arm] = fmean(values) if values and len(values) == len(by_seed) else None
            spread[arm] = stdev(values) if len(values) > 1 else 0.0
        rows.append({**row, "spread": spread})
    return rows


def bars(rows: Sequence[Mapping[str, Any]], points: Sequence[Point]) -> list[dict[str, Any]]:
    """What the issue asks for, as far as it was measured."""
    found = []
    for row in rows:
        best = min((row[arm] for arm in RIVALS if row[arm] is not None), default=None)
        title = f"misses at ppl ratio <= {row['ppl_ratio']:g}"
        found.append(bar(f"{title}: ours / the best other arm", _over(row["ours"], best), 0.80))
        found.append(bar(f"{title}: training-free / one uniform gain", _over(row["tuned"], row["uniform"]), 0.90))
        found.append(
            bar(f"{title}: training-free / one uniform Cache-Prior gain", _over(row["tuned"], row["prior"]), 0.90)
        )
    for share in (0.125, 0.25):
        native = [point for point in points if point["curve"] == "native" and point.get("share", 0.25) == share]
        best_native = min((point["misses"] for point in native), default=None)
        found.append(bar(f"misses of the native top-k / LRU at {share:g}", best_native, 0.90))
    reused = [point["eor"] for point in points if point["curve"] == "stateless" and point["ppl_ratio"] <= 1.005]
    found.append(
        bar(
            "EOR of stateless adapters at ppl ratio <= 1.005 / the base's",
            max(reused, default=None),
            1.26,
            at_most=False,
        )
    )
    return found


def _over(value: float | None, other: float | None) -> float | None:
    return None if value is None or not other else value / other
