"""Replays traces through expert caches: hit rates of any policy at any size, exactly as if token by token.

`replay` drives one policy object over one layer and is the definition. `count_misses` gives the same integers for all
layers and sizes at once: LRU from reuse distances, the others by scores, in `streams`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.cache.policy import LFU, LRFU, LRU, Belady, Policy
from remoe_adapt.cache.streams import count_scored_misses
from remoe_adapt.errors import ConfigError
from remoe_adapt.metrics import eor, load_entropy, reuse_distance, switch_rate
from remoe_adapt.trace import Trace

POLICIES = ("lru", "lfu", "lrfu", "belady")


def cache_capacity(cache: float, num_experts: int, top_k: int) -> int:
    """Experts that a per-layer cache of the fraction `cache` holds: `max(K, floor(cache * E))`.

    Raises:
        ConfigError: `cache` is not a number in (0, 1].
    """
    if isinstance(cache, bool) or not isinstance(cache, (int, float)) or not 0 < cache <= 1:
        raise ConfigError(f"cache must be a fraction of the experts in (0, 1], got {cache!r}: 0.25 is a quarter")
    return max(top_k, math.floor(cache * num_experts))


def check_replay(policies: Sequence[str], caches: Sequence[float]) -> None:
    """For callers whose trace takes long to record: raises ConfigError as `simulate` will."""
    for name in policies:
        _checked_policy(name)
    for cache in caches:
        cache_capacity(cache, 1, 1)


def make_policy(name: str, capacity: int, future: Sequence[Iterable[Any]] = ()) -> Policy[Any]:
    """A new policy object by name; `future` (the keys of every token to come) is what belady knows.

    Raises:
        ConfigError: the name is unknown, or the capacity is not a positive int.
    """
    match _checked_policy(name):
        case "lru":
            return LRU(capacity)
        case "lfu":
            return LFU(capacity)
        case "lrfu":
            return LRFU(capacity)
        case _:
            return Belady(capacity, future)


def replay(
    experts_TK: NDArray[np.int16],
    policy: str,
    capacity: int,
    document_starts: Sequence[int] = (0,),
    sizes_E: Sequence[int] | None = None,
) -> int:
    """Misses of one layer under a policy object, emptied at each document start.

    Args:
        experts_TK: chosen experts, int16 [T, K], distinct within a token.
        policy: one of `POLICIES`.
        capacity: what the cache holds: experts, or the unit of `sizes_E` (bytes).
        document_starts: index of each document's first token, rising, the first 0.
        sizes_E: size of each expert; 1 when not given.

    Raises:
        ConfigError: unknown policy, bad capacity, or an expert larger than the capacity.
    """
    tokens = experts_TK.tolist()
    misses = 0
    for begin, end in zip(document_starts, [*document_starts[1:], len(tokens)], strict=True):
        document = tokens[begin:end]
        cache = make_policy(policy, capacity, document)
        for keys in document:
            misses += len(cache.step(keys, None if sizes_E is None else [sizes_E[key] for key in keys]))
    return misses


def count_misses(trace: Trace, policy: str, capacities: Sequence[int]) -> NDArray[np.int64]:
    """Misses per cache size and layer, int64 [len(capacities), L]; `replay` of every layer gives the same integers.

    Raises:
        ConfigError: unknown policy, or a capacity that is not a positive int.
    """
    _checked_policy(policy)
    for capacity in capacities:
        make_policy(policy, capacity)
    if policy == "lru":
        distances = reuse_distance(trace)
        misses = [distances.lru_misses_L(capacity) for capacity in capacities]
        return np.array(misses, dtype=np.int64).reshape(len(capacities), trace.num_layers)
    return count_scored_misses(trace, policy, capacities)


def simulate(trace: Trace, policies: Sequence[str] = ("lru",), caches: Sequence[float] = (0.25,)) -> dict[str, float]:
    """`eor`, `switch_rate`, and the hit rate of each policy at each cache fraction under the key `policy@fraction`.

    Hit rates are means over all look-ups of all layers; caches are per layer and emptied at document starts.

    Raises:
        ConfigError: unknown policy or bad cache fraction.
        TraceError: no document has a second token.
    """
    return _figures(trace, policies, caches)[0]


def summarise(trace: Trace, policies: Sequence[str] = ("lru",), caches: Sequence[float] = (0.25,)) -> dict[str, Any]:
    """What `remoe simulate --json` prints: the trace's shape, the figures of `simulate`, and the integers behind them.

    Keys, in order: `model`, `phase` (null where unknown), `layers`, `tokens`, `documents`, `num_experts`, `top_k`;
    `eor`, `switch_rate`, `policy@fraction` ...; `load_entropy`, `reuse_distance_median` (distinct experts, see
    `metrics.ReuseDistance`), `lookups`, `capacity` and `misses` (both by the keys of the figures).
    Raises as `simulate`.
    """
    figures, capacity, misses = _figures(trace, policies, caches)
    return {
        "model": trace.meta.get("model"),
        "phase": trace.meta.get("phase"),
        "layers": trace.num_layers,
        "tokens": trace.num_tokens,
        "documents": len(trace.document_starts),
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        **figures,
        "load_entropy": load_entropy(trace),
        "reuse_distance_median": reuse_distance(trace).median,
        "lookups": trace.experts.size,
        "capacity": capacity,
        "misses": misses,
    }


def _figures(
    trace: Trace, policies: Sequence[str], caches: Sequence[float]
) -> tuple[dict[str, float], dict[str, int], dict[str, int]]:
    names = [_checked_policy(name) for name in dict.fromkeys(policies)]
    sizes = [(cache_capacity(cache, trace.num_experts, trace.top_k), cache) for cache in caches]
    capacities = {repr(float(cache)): capacity for capacity, cache in sizes}
    figures = {"eor": eor(trace), "switch_rate": switch_rate(trace)}
    held: dict[str, int] = {}
    misses: dict[str, int] = {}
    for name in names:
        misses_SL = count_misses(trace, name, list(capacities.values()))
        for (fraction, capacity), misses_L in zip(capacities.items(), misses_SL, strict=True):
            key = f"{name}@{fraction}"
            held[key] = capacity
            misses[key] = int(misses_L.sum())
            figures[key] = 1 - misses[key] / trace.experts.size
    return figures, held, misses


def _checked_policy(name: str) -> str:
    if name not in POLICIES:
        raise ConfigError(f"unknown cache policy {name!r}: choose from {', '.join(POLICIES)}")
    return name
