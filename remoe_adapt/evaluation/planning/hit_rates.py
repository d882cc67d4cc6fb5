"""Which part of a token's experts a cache will hold: from a trace, from a family's certificates, or by default.

The defaults stand here alone, with the commands that measured them.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction import hit_rates
from remoe_adapt.family import Family
from remoe_adapt.traces import Trace

# Gains of the resident prior that are planned for.
GAINS = (0.1, 0.2)
# Share of the experts in the cache -> hit rate of LRFU without any lever: Qwen3-30B-A3B over general text, the lower of
# its two traces. `remoe simulate ../shared/traces/qwen3-30b-a3b/routing-lab_general.npz --policy lrfu --tokens 4000
# --cache 0.0625 --cache 0.125 --cache 0.25 --cache 0.5 --cache 0.75`
BASE_RATES = {0.0625: 0.423, 0.125: 0.596, 0.25: 0.789, 0.5: 0.949, 0.75: 0.991}
BASE_SOURCE = "default: LRFU over the trace of a model with 128 experts, 8 of a token (general text)"
# Gain of the resident prior -> share -> its misses over those without it; the shipped model, 64 experts, 6 of a token.
# `python benchmarks/run.py reuse tokens=1200` (benchmarks/results/reuse_cpu.csv)
MISS_RATIOS: Mapping[float, Mapping[float, float]] = {
    0.1: {0.05: 0.93, 0.125: 0.76, 0.25: 0.55, 0.5: 0.34, 0.75: 0.4},
    0.2: {0.05: 0.86, 0.125: 0.54, 0.25: 0.28, 0.5: 0.12, 0.75: 0.23},
}
GAIN_SOURCE = "the prior's effect as measured on the shipped model"
_POLICY = "lrfu"


@dataclass(frozen=True, slots=True)
class HitRates:
    """Hit rates by the share of experts in a cache. source: where those without a lever are from."""

    base: Mapping[float, float]
    source: str
    strengths: Mapping[float, Mapping[float, float]]

    def rate(self, share: float, gain: float = 0.0) -> float:
        """Without adapters; gain: of the resident prior, one of GAINS."""
        found = between(self.base, share)
        if not gain:
            return found
        ratios = MISS_RATIOS[gain]
        nearest = min(max(share, min(ratios)), max(ratios))
        return 1 - (1 - found) * between(ratios, nearest)

    def at_strength(self, strength: float, share: float) -> float:
        """Of a family's point, by its certificate."""
        return between(self.strengths[strength], share)


def known_rates(
    trace: str | os.PathLike[str] | None,
    family: str | None,
    shares: Sequence[float],
) -> HitRates:
    """What is known of a model's hit rates.

    trace: of its routing, replayed at these shares; None: the certificates or the defaults.
    family: folder or hub id, whose certificates say what LRU hits at each of its points.

    Raises TraceError and FamilyError for damaged ones, ConfigError for a trace too short to replay.
    """
    strengths = {} if family is None else _certified(Family.load(family))
    if trace is not None:
        replayed = _replayed(Trace.load(trace), shares)
        return HitRates(replayed, f"the trace {os.fspath(trace)}, replayed under LRFU", strengths)
    return HitRates(BASE_RATES, BASE_SOURCE, strengths)


def _replayed(trace: Trace, shares: Sequence[float]) -> dict[float, float]:
    if trace.num_tokens < 2:
        raise ConfigError("the trace has a single token: record more (remoe trace --max-tokens).")
    # A cache holds at least one token's experts; shares between these are interpolated.
    least = trace.top_k / trace.num_experts
    caches = sorted({min(1.0, max(least, share)) for share in (*shares, 0.125, 0.25, 0.5, 0.75)})
    found = hit_rates(trace, [_POLICY], caches)
    return {cache: found[f"{_POLICY}@{cache!r}"] for cache in caches}


def _certified(family: Family) -> dict[float, dict[float, float]]:
    found: dict[float, dict[float, float]] = {}
    for point in family.points:
        certificate: Mapping[str, Any] = point.certificate or {}
        rates = {share: certificate.get(f"lru@{share:g}") for share in (0.25, 0.5)}
        numbers = {share: rate for share, rate in rates.items() if isinstance(rate, float) and 0 <= rate <= 1}
        if numbers:
            found[point.strength] = numbers
    return found


def between(known: Mapping[float, float], share: float) -> float:
    """Linear between known shares; nothing is hit at 0, everything at 1, unless the entries say otherwise."""
    points = sorted({0.0: 0.0, 1.0: 1.0, **known}.items())
    after = bisect_right(points, share, key=lambda point: point[0])
    if after == len(points):
        return points[-1][1]
    (low, at_low), (high, at_high) = points[max(0, after - 1)], points[after]
    return at_low + (at_high - at_low) * (share - low) / (high - low)
