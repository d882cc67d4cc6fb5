"""The cache policies once more, as slowly and literally as they are defined, to check the real ones against."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache
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
    ahead = [token for token, keys in enumerate(future) if key in keys]
    return (-ahead[0] if ahead else -(10**9), *recency)


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
