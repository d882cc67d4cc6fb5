"""Replays traces through expert caches: hit rates of any policy at any size.

Hit rate, `policy@share`: the share of all look-ups that find their expert in a per-layer cache of
`max(K, floor(share * E))` experts, emptied where a document begins. Token-atomic: all K look-ups of a token see the
cache as the previous token left it; then all K experts are let in, and the cache is cut back to its size. That is what
a layer does, which asks for its K experts at once.

Hit rate by look-up, `policy@share/lookup`, which others publish: the same cache, but each look-up sees it as the
look-up before it left it (token by token, in slot order), and a miss is let in, and another expert dropped, at once.
LRFU's decay of 0.9 per token is spread evenly over the token's look-ups.

`replay` drives one policy object over one layer and is the definition of both. `count_misses` gives the same integers
for all layers and sizes at once: LRU from reuse distances, policies in `replay_scored.SCORES` by their scores, others
by `replay`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction.policy import LRFU_DECAY, LRU, check_policy, make_policy
from remoe_adapt.eviction.replay_scored import SCORES, count_scored_misses
from remoe_adapt.traces import (
    Trace,
    eor,
    eor_L,
    load_entropy,
    load_entropy_L,
    reuse_distance,
    switch_rate,
    switch_rate_L,
)

# Behind the key of a hit rate that is counted by look-up.
BY_LOOKUP = "/lookup"


def cache_capacity(cache: float, num_experts: int, top_k: int) -> int:
    """Experts that a per-layer cache of the fraction `cache` holds: `max(K, floor(cache * E))`.

    Raises:
        ConfigError: `cache` is not a number in (0, 1].
    """
    if isinstance(cache, bool) or not isinstance(cache, (int, float)) or not 0 < cache <= 1:
        raise ConfigError(f"cache must be a fraction of the experts in (0, 1], got {cache!r}: 0.25 is a quarter")
    # A cache below K could not hold what one token computes with.
    return max(top_k, math.floor(cache * num_experts))


def check_replay(policies: Sequence[str], caches: Sequence[float]) -> None:
    """For callers whose trace takes long to record: raises ConfigError as `simulate` will."""
    for name in policies:
        check_policy(name)
    # The model's numbers are not known yet, but whether a fraction is one does not depend on them.
    for cache in caches:
        cache_capacity(cache, 1, 1)


def replay(
    experts_TK: NDArray[np.int16],
    policy: str,
    capacity: int,
    document_starts: Sequence[int] = (0,),
    sizes_E: Sequence[int] | None = None,
    decay: float = LRFU_DECAY,
) -> int:
    """Misses of one layer under a policy object, emptied at each document start; token-atomic.

    By look-up it is the replay of `one_lookup_each`.

    Args:
        experts_TK: chosen experts, int16 [T, K], distinct within a token.
        policy: a name in `policy.POLICIES`.
        capacity: what the cache holds: experts, or the unit of `sizes_E` (bytes).
        document_starts: index of each document's first token, rising, the first 0.
        sizes_E: size of each expert; 1 when not given.
        decay: of lrfu and markov, per token.

    Raises:
        ConfigError: unknown policy, bad capacity, or an expert larger than the capacity.
    """
    tokens = experts_TK.tolist()
    misses = 0
    for begin, end in zip(document_starts, [*document_starts[1:], len(tokens)], strict=True):
        document = tokens[begin:end]
        cache = make_policy(policy, capacity, document, decay)
        for keys in document:
            misses += len(cache.step(keys, None if sizes_E is None else [sizes_E[key] for key in keys]))
    return misses


def count_misses(trace: Trace, policy: str, capacities: Sequence[int], decay: float = LRFU_DECAY) -> NDArray[np.int64]:
    """Misses per cache size and layer, int64 [len(capacities), L]; `replay` of every layer gives the same integers.

    Raises:
        ConfigError: unknown policy, or a capacity that is not a positive int.
    """
    check_policy(policy)
    # The quick ways below make no policy object, so bad capacities are refused by making one.
    for capacity in capacities:
        make_policy(policy, capacity)
    if policy in SCORES:
        return count_scored_misses(trace, policy, capacities, decay)
    # An expert is in an LRU cache of every size above its reuse distance, so that one pass counts for all sizes.
    if policy == LRU.name:
        distances = reuse_distance(trace)
        misses = [distances.lru_misses_L(capacity) for capacity in capacities]
    else:
        starts = trace.document_starts
        misses = [
            np.array([replay(experts_TK, policy, capacity, starts, decay=decay) for experts_TK in trace.experts])
            for capacity in capacities
        ]
    return np.array(misses, dtype=np.int64).reshape(len(capacities), trace.num_layers)


def one_lookup_each(trace: Trace) -> Trace:
    """The same look-ups as tokens of one expert each, in slot order: its token-atomic replay is that by look-up."""
    top_k = trace.top_k
    meta = {"num_experts": trace.num_experts, "document_starts": [start * top_k for start in trace.document_starts]}
    return Trace(trace.experts.reshape(trace.num_layers, -1, 1), meta)


def simulate(trace: Trace, policies: Sequence[str] = ("lru",), caches: Sequence[float] = (0.25,)) -> dict[str, float]:
    """`eor`, `switch_rate`, and the hit rate of each policy at each cache fraction under the key `policy@fraction`.

    Hit rates are means over all look-ups of all layers; caches are per layer and emptied at document starts.

    Raises:
        ConfigError: unknown policy or bad cache fraction.
        TraceError: no document has a second token.
    """
    rates = {key: _rate(trace, misses_L) for key, (_, misses_L) in _replays(trace, policies, caches).items()}
    return {"eor": eor(trace), "switch_rate": switch_rate(trace), **rates}


def hit_rates(trace: Trace, policies: Sequence[str], caches: Sequence[float]) -> dict[str, float]:
    """Hit rate of each policy at each cache fraction, beside each the one by look-up: `policy@fraction` and
    `policy@fraction/lookup`. Raises as `simulate`."""
    return {key: _rate(trace, misses_L) for key, misses_L in _both(trace, policies, caches).items()}


def layer_rows(trace: Trace, policies: Sequence[str], caches: Sequence[float]) -> list[dict[str, float]]:
    """A row a layer, in order: `layer` (its place), `eor`, `switch_rate`, the keys of `hit_rates`, `load_entropy`.

    Raises as `simulate`.
    """
    lookups = trace.num_tokens * trace.top_k
    columns = {
        "eor": eor_L(trace),
        "switch_rate": switch_rate_L(trace),
        **{key: 1 - misses_L / lookups for key, misses_L in _both(trace, policies, caches).items()},
        "load_entropy": load_entropy_L(trace),
    }
    return [
        {"layer": layer} | {key: float(values_L[layer]) for key, values_L in columns.items()}
        for layer in range(trace.num_layers)
    ]


def summarise(trace: Trace, policies: Sequence[str] = ("lru",), caches: Sequence[float] = (0.25,)) -> dict[str, Any]:
    """What `remoe simulate --json` prints: the trace's shape, its figures, and the integers behind them.

    Keys, in order: `model`, `phase` (null where unknown), `layers`, `tokens`, `documents`, `num_experts`, `top_k`;
    `eor`, `switch_rate`, the keys of `hit_rates`; `load_entropy`, `reuse_distance_median` (distinct experts, see
    `metrics.ReuseDistance`), `lookups`, `capacity` and `misses` (both by `policy@fraction`, token-atomic).
    Raises as `simulate`.
    """
    replays = _replays(trace, policies, caches)
    return {
        "model": trace.meta.get("model"),
        "phase": trace.meta.get("phase"),
        "layers": trace.num_layers,
        "tokens": trace.num_tokens,
        "documents": len(trace.document_starts),
        "num_experts": trace.num_experts,
        "top_k": trace.top_k,
        "eor": eor(trace),
        "switch_rate": switch_rate(trace),
        **hit_rates(trace, policies, caches),
        "load_entropy": load_entropy(trace),
        "reuse_distance_median": reuse_distance(trace).median,
        "lookups": trace.experts.size,
        "capacity": {key: capacity for key, (capacity, _) in replays.items()},
        "misses": {key: int(misses_L.sum()) for key, (_, misses_L) in replays.items()},
    }


def _rate(trace: Trace, misses_L: NDArray[np.int64]) -> float:
    return 1 - int(misses_L.sum()) / trace.experts.size


def _both(trace: Trace, policies: Sequence[str], caches: Sequence[float]) -> dict[str, NDArray[np.int64]]:
    """Misses per layer, token-atomic and by look-up side by side."""
    by_token, by_lookup = _replays(trace, policies, caches), _replays(trace, policies, caches, by_lookup=True)
    return {
        name: misses_L
        for key in by_token
        for name, misses_L in ((key, by_token[key][1]), (key + BY_LOOKUP, by_lookup[key][1]))
    }


def _replays(
    trace: Trace, policies: Sequence[str], caches: Sequence[float], *, by_lookup: bool = False
) -> dict[str, tuple[int, NDArray[np.int64]]]:
    """(capacity, misses int64 [L]) by `policy@fraction`."""
    for name in policies:
        check_policy(name)
    sizes = [(cache_capacity(cache, trace.num_experts, trace.top_k), cache) for cache in caches]
    capacities = {repr(float(cache)): capacity for capacity, cache in sizes}
    replayed = one_lookup_each(trace) if by_lookup else trace
    # By look-up, each is a token of its own: K of them must decay weights as one token does.
    decay = LRFU_DECAY ** (replayed.top_k / trace.top_k)
    found = {}
    for name in dict.fromkeys(policies):
        misses_SL = count_misses(replayed, name, list(capacities.values()), decay)
        for (fraction, capacity), misses_L in zip(capacities.items(), misses_SL, strict=True):
            found[f"{name}@{fraction}"] = capacity, misses_L
    return found
