"""Eviction by predicted next use, as the live cache drives it, against its plain definition and on text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction.markov import MAX_WIDTH, Markov
from remoe_adapt.eviction.policy import make_policy
from remoe_adapt.eviction.replay import count_misses
from remoe_adapt.traces.trace import Trace

_spec = importlib.util.spec_from_file_location(
    "cache_reference", Path(__file__).parents[1] / "support" / "cache_reference.py"
)
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def chain(rng: np.random.Generator, tokens: int, num_experts: int, top_k: int) -> list[list[int]]:
    """Each expert leads to another one, most of the time; all are used about as often, and none twice in a row."""
    at, found = rng.permutation(num_experts)[:top_k], []
    for _ in range(tokens):
        jump = rng.random(top_k) < 0.1
        at = np.where(jump, rng.integers(0, num_experts, top_k), (at * 5 + 1) % num_experts)
        found.append(list(dict.fromkeys(at.tolist())))
    return found


@pytest.mark.parametrize("layers", [1, 3])
def test_a_live_cache_makes_the_same_decisions(layers: int) -> None:
    """Layers that share a budget in bytes, which moves; failed reads, reads ahead, pinned keys of other layers."""
    rng = np.random.default_rng(layers)
    tokens_of = [chain(rng, 50, 12, 3) for _ in range(layers)]
    size_of = {(layer, expert): int(rng.integers(1, 6)) for layer in range(layers) for expert in range(12)}
    cache: Markov[tuple[int, int]] = Markov(40)
    there: set[tuple[int, int]] = set()
    history: list[list[tuple[int, ...]]] = [[] for _ in range(layers)]
    last: dict[tuple[int, int], int] = {}

    def shrunk(limit: int, protected: Any) -> list[tuple[int, int]]:
        def rank(key: tuple[int, int]) -> tuple[Any, ...]:
            past = history[key[0]]
            return (reference.next_use(tuple(past), 0.9).get(key[1], 0) if past else 0), last[key]

        ranked = [key for key in sorted(there, key=rank) if key not in protected]
        dropped = []
        while sum(size_of[key] for key in there) > limit:
            dropped.append(ranked.pop(0))
            there.remove(dropped[-1])
        return dropped

    for token in range(50):
        if token % 5 == 4:
            budget = int(rng.integers(32, 80))
            assert cache.resize(budget) == shrunk(budget, ())
        for layer in range(layers):
            chosen = tokens_of[layer][token]
            keys = [(layer, expert) for expert in chosen]
            cache.touch(keys, token)
            history[layer].append(tuple(chosen))
            last |= {key: len(keys) * (token * layers + layer) + slot for slot, key in enumerate(keys)}
            pins = {*keys, *list(cache)[:2]} if token % 3 == 0 else set(keys)
            for key in [key for key in keys if key not in cache]:
                assert cache.make_room(size_of[key], pins) == shrunk(cache.capacity - size_of[key], pins)
                cache.admit(key, size_of[key])
                there.add(key)
            if rng.random() < 0.1:
                cache.discard(keys[0])
                there.discard(keys[0])
            assert set(cache) == there and cache.used == sum(size_of[key] for key in there)
    with pytest.raises(ConfigError, match=f"all {len(there)} keys are protected"):
        cache.evict(there)
    assert sorted(cache.evict() for _ in range(len(there))) == sorted(there)
    with pytest.raises(ConfigError, match="nothing can be evicted"):
        cache.evict()


def test_a_prompt_teaches_no_succession() -> None:
    """After calls of more experts than tokens choose, values are frequencies alone."""
    wide = list(range(MAX_WIDTH + 1))
    cache, plain = Markov[int](99), Markov[int](99)
    for token in range(20):
        cache.touch([1] if token % 2 else wide)
        plain.touch([1] if token % 2 else [0, 1])
    # A prompt chose 0 with 1 each time, and 1 follows it: of both nothing is known but how often they were used.
    assert cache._value(0) == cache._value(2) < cache._value(1)
    assert plain._value(0) > cache._value(0)


def test_groups_of_one_token_are_one_token() -> None:
    """A budget too small for a token serves it in groups, which do not follow one another."""
    whole, parts = Markov[int](9), Markov[int](9)
    for token in range(6):
        whole.touch([0, 1, 2], token)
        parts.touch([0, 1], token)
        parts.touch([2, 1], token)
    for cache in (whole, parts):
        for key in range(3):
            cache.admit(key)
    # The second group is what nothing was seen to lead to.
    assert whole._value(0) == pytest.approx(parts._value(0)) and parts._value(2) < whole._value(2)


def test_what_was_read_ahead_is_worth_what_is_predicted() -> None:
    cache = Markov[tuple[int, int]](3)
    for token, expert in enumerate([0, 1, 2, 3] * 4):
        cache.touch([(0, expert)], token)
        cache.touch([(1, 0)], token)
    for expert in (0, 1, 2):
        cache.admit((0, expert))
    # 3 was used last; 0 and 1 come within the next two tokens, 2 after them.
    assert cache.evict() == (0, 2)
    cache.admit((1, 0))
    assert cache.evict() != (1, 0)


def test_bad_decays() -> None:
    for decay in (0.49, 1.0, float("nan")):
        with pytest.raises(ConfigError, match=r"markov decay .* is outside"):
            make_policy("markov", 4, decay=decay)


def test_misses_on_real_routing(shared_dir: Path) -> None:
    """The bar of the native mode: 10 % below LRU, where LRFU is above it (Qwen3-30B-A3B, six layers, code)."""
    trace = Trace.load(shared_dir / "traces" / "qwen3-30b-a3b" / "routing-lab_code.npz")
    part = Trace(trace.experts[::8, :1500], {"num_experts": trace.num_experts})
    misses = {policy: count_misses(part, policy, [16, 32]).sum(axis=1) for policy in ("lru", "lrfu", "markov")}
    assert (misses["markov"] <= 0.9 * misses["lru"]).all(), misses
    assert (misses["markov"] < misses["lrfu"]).all(), misses
