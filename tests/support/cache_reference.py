"""The cache policies once more, as slowly and literally as they are defined, to check the real ones against."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any

DECAY = Fraction(9, 10)


def rank(policy: str, key: Any, history: Sequence[Sequence[Any]], future: Sequence[Sequence[Any]]) -> tuple[Any, ...]:
    """What keeping `key` is worth after the tokens `history`; exact, from the whole history each time."""
    uses = [(token, keys.index(key)) for token, keys in enumerate(history) if key in keys]
    recency = uses[-1] if uses else (-1, -1)
    now = len(history) - 1
    if policy == "lru":
        return recency
    if policy == "lfu":
        return (len(uses), *recency)
    if policy == "lrfu":
        return (sum((DECAY ** (now - token) for token, _ in uses), Fraction(0)), *recency)
    if policy == "markov":
        return (next_use(tuple(map(tuple, history)), float(DECAY)).get(key, 0), *recency)
    ahead = [token for token, keys in enumerate(future) if key in keys]
    return (-ahead[0] if ahead else -(10**9), *recency)


@lru_cache(maxsize=4)
def next_use(history: Sequence[Sequence[Any]], decay: float) -> dict[Any, int]:
    """What `markov` thinks each key is worth after these tokens, in steps of 2**-40 (floats err by far less)."""
    now, last = len(history) - 1, history[-1]
    seen: dict[Any, int] = {}
    follows: dict[Any, dict[Any, int]] = {}
    for token in range(len(history)):
        for lag in (1, 2):
            for before in history[token - lag] if token >= lag else ():
                if seen.get(before, 0) >= 128:
                    seen[before] //= 2
                    follows[before] = {key: count // 2 for key, count in follows[before].items()}
                seen[before] = seen.get(before, 0) + 1
                row = follows.setdefault(before, {})
                for key in history[token]:
                    row[key] = row.get(key, 0) + 1
    found = {}
    for key in {key for keys in history for key in keys}:
        ages = [now - token for token, keys in enumerate(history) if key in keys]
        fast, slow = ((1 - rate) * math.fsum(rate**age for age in ages) for rate in (decay**3.0, decay**0.2))
        follow = sum(follows.get(chosen, {}).get(key, 0) + 2 * slow for chosen in last)
        total = sum(seen.get(chosen, 0) + 2 for chosen in last)
        found[key] = round((follow / total + fast / 4) * (1 << 40))
    return found


def misses(tokens: Sequence[Sequence[int]], policy: str, capacity: int, starts: Sequence[int] = (0,)) -> int:
    """Misses of one layer: all look-ups of a token before any change, then the cut; empty at each start."""
    total = 0
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        document = tokens[begin:end]
        cache: set[int] = set()
        for now, keys in enumerate(document):
            total += len([key for key in keys if key not in cache])
            history, future = document[: now + 1], document[now + 1 :]
            order = sorted(cache | set(keys), key=lambda key: rank(policy, key, history, future))
            cache = set(order[-capacity:])
    return total


def misses_by_lookup(tokens: Sequence[Sequence[int]], policy: str, capacity: int, starts: Sequence[int] = (0,)) -> int:
    """Misses of one layer, event by event: a miss is let in at once, and at once the least worth having is dropped.

    LRFU ages by look-ups, so that a whole token ages it by DECAY.
    """
    decay = Fraction(float(DECAY) ** (1 / len(tokens[0])))
    total = 0
    for begin, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
        events = [key for keys in tokens[begin:end] for key in keys]
        cache: set[int] = set()
        for now, wanted in enumerate(events):
            total += wanted not in cache
            cache.add(wanted)
            if len(cache) > capacity:
                cache.remove(min(cache, key=lambda key: worth(policy, key, events, now, decay)))
    return total


def worth(policy: str, key: int, events: Sequence[int], now: int, decay: Fraction) -> tuple[Any, ...]:
    """What keeping `key` is worth after the look-ups `events[: now + 1]`; of equals the latest used is worth more."""
    uses = [time for time in range(now + 1) if events[time] == key]
    if policy == "lru":
        return (uses[-1],)
    if policy == "lfu":
        return len(uses), uses[-1]
    if policy == "lrfu":
        return sum((decay ** (now - time) for time in uses), Fraction(0)), uses[-1]
    if policy == "markov":
        return next_use(tuple((event,) for event in events[: now + 1]), float(decay))[key], uses[-1]
    ahead = [time for time in range(now + 1, len(events)) if events[time] == key]
    return -ahead[0] if ahead else -(10**9), uses[-1]


def fewest_misses(tokens: Sequence[Sequence[int]], capacity: int) -> int:
    """The least number of misses that any choice of victims can reach, by trying all of them."""

    @cache
    def best(now: int, cache: frozenset[int]) -> int:
        if now == len(tokens):
            return 0
        keys = frozenset(tokens[now])
        union = cache | keys
        return len(keys - cache) + min(best(now + 1, kept) for kept in subsets(union, capacity))

    return best(0, frozenset())


def subsets(keys: frozenset[int], largest: int) -> list[frozenset[int]]:
    found = [frozenset[int]()]
    for key in keys:
        found += [kept | {key} for kept in found if len(kept) < largest]
    return found
