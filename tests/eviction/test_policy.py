"""Policy objects as the live cache drives them: victims one by one, protected keys, budgets in bytes that move."""

from __future__ import annotations

import importlib.util
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction.policy import LFU, LRFU, LRU, POLICIES, Belady, Policy, make_policy
from remoe_adapt.eviction.replay import replay

_spec = importlib.util.spec_from_file_location(
    "cache_reference", Path(__file__).parents[1] / "support" / "cache_reference.py"
)
assert _spec is not None and _spec.loader is not None
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)


def filled(policy: Policy[Any], tokens: list[list[Any]]) -> Policy[Any]:
    for keys in tokens:
        policy.step(keys)
    return policy


def test_what_each_policy_drops() -> None:
    tokens = [[0, 1], [1, 0], [0, 2], [3]]
    assert filled(LRU(4), tokens).evict() == 1
    # 2 and 3 were used once, 2 longer ago.
    assert filled(LFU(4), tokens).evict() == 2
    # Ages 3 and 2 of 1 weigh .729 + .81, age 1 of 2 weighs .9, age 0 of 3 weighs 1.
    assert filled(LRFU(4), tokens).evict() == 2
    future = [*tokens, [1], [0], [3], [2]]
    assert filled(Belady(4, future), tokens).evict() == 2


def test_all_victims_in_order() -> None:
    tokens = [["a", "b"], ["b", "a"], ["a", "c"], ["d"]]
    # What has followed itself is a and b; of c and d, used once, d is the newer.
    order = {"lru": "bacd", "lfu": "cdba", "lrfu": "cdba", "markov": "cdba"}
    for name, victims in order.items():
        cache = filled(make_policy(name, 4), tokens)
        assert [cache.evict() for _ in range(4)] == list(victims), name
        assert (len(cache), cache.used) == (0, 0)
        with pytest.raises(ConfigError, match="nothing can be evicted"):
            cache.evict()


def test_lrfu_between_lru_and_lfu() -> None:
    tokens = [[0], [0], [0], [1], [2], [3], [1]]
    assert filled(LRFU(4, decay=1.0), tokens).evict() == filled(LFU(4), tokens).evict() == 2
    assert filled(LRFU(4, decay=0.5), tokens).evict() == filled(LRU(4), tokens).evict() == 0
    for decay in (0.49, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="outside"):
            LRFU(4, decay=decay)


def test_another_decay_keeps_what_is_there_and_weighs_uses_from_then_on() -> None:
    policy: LRFU[str] = LRFU(2, 0.5)
    for key in "aaabb":
        policy.touch([key])
        if key not in policy:
            policy.admit(key)
    # a weighs 1/4 + 1/8 + 1/16, b 1 + 1/2; by another decay from the start b would be worth less.
    policy.set_decay(1.0)
    assert set(policy) == {"a", "b"}
    policy.touch(["a"])
    policy.touch([])
    assert policy.evict() == "a", "1.4375 of a, 1.5 of b, which nothing fades any more"
    policy.set_decay(0.9)
    for _ in range(3000):  # past where weights are scaled back
        policy.touch(["b"])
    assert set(policy) == {"b"}
    for wrong in (0.4, 1.1, True, "0.9"):
        with pytest.raises(ConfigError, match="decay"):
            policy.set_decay(wrong)  # type: ignore[arg-type]
    assert set(policy) == {"b"}


def test_token_atomic() -> None:
    """The second key is looked up before the first has pushed anything out, and both stay."""
    cache = LRU[int](2)
    assert cache.step([0, 1]) == [0, 1]
    assert cache.step([2, 0]) == [2]
    assert sorted(cache) == [0, 2]
    assert cache.step([1, 2]) == [1]


def test_belady_may_drop_a_key_of_the_current_token() -> None:
    future = [[0, 1], [2, 3], [0, 1]]
    cache = Belady(2, future)
    assert cache.step([0, 1]) == [0, 1]
    assert cache.step([2, 3]) == [2, 3]
    assert sorted(cache) == [0, 1]
    assert cache.step([0, 1]) == []


@pytest.mark.parametrize("seed", range(40))
def test_belady_is_optimal(seed: int) -> None:
    rng = np.random.default_rng(seed)
    num_experts, top_k = int(rng.integers(3, 6)), int(rng.integers(1, 3))
    tokens = rng.random((8, num_experts)).argsort(axis=1)[:, :top_k].astype(np.int16)
    for capacity in range(1, num_experts + 1):
        assert replay(tokens, "belady", capacity) == reference.fewest_misses(tokens.tolist(), capacity)


def test_belady_refuses_another_future() -> None:
    cache = Belady(2, [[0, 1], [2]])
    cache.step([0, 1])
    with pytest.raises(ConfigError, match="does not use 3 at token 1"):
        cache.step([3])
    assert cache.step([2]) == [2]
    with pytest.raises(ConfigError, match="does not use 0 at token 2"):
        cache.step([0])


def test_protected_keys_stay() -> None:
    cache = filled(LRU[int](4), [[0, 1], [2, 3]])
    assert cache.make_room(2, protected=[0, 9]) == [1, 2]
    assert sorted(cache) == [0, 3]
    assert cache.evict(protected={3}) == 0
    with pytest.raises(ConfigError, match="1 of 1 keys are protected"):
        cache.evict(protected={3})
    assert cache.evict() == 3


def test_resize() -> None:
    cache = filled(LRU[int](6), [[0, 1, 2], [3, 4, 5]])
    assert cache.resize(4) == [0, 1]
    assert (cache.capacity, cache.used) == (4, 4)
    assert cache.resize(2, protected=[2]) == [3, 4]
    assert cache.resize(10) == []
    cache.step([7, 8, 9])
    assert sorted(cache) == [2, 5, 7, 8, 9]
    with pytest.raises(ConfigError, match="protected keys take 3, only 2 may stay"):
        cache.resize(2, protected=[7, 8, 9])
    with pytest.raises(ConfigError, match="positive int"):
        cache.resize(0)
    assert (cache.capacity, sorted(cache)) == (10, [2, 5, 7, 8, 9])


def test_refusals_change_nothing() -> None:
    cache = LRU[str](10)
    cache.touch(["a", "b"])
    cache.admit("a", 6)
    cache.admit("b", 4)
    for attempt, message in (
        (lambda: cache.admit("a", 1), "in the cache already"),
        (lambda: cache.admit("c", 11), "'c' of size 11 does not fit a cache of 10"),
        (lambda: cache.admit("c", 0), "size 0"),
        (lambda: cache.make_room(5, protected=["a"]), "protected keys take 6, only 5 may stay"),
        (lambda: cache.make_room(11), "nothing|only"),
        (lambda: cache.step(["c", "d"], [1, 11]), "size 11"),
        (lambda: cache.touch(["b"], token=-1), "cannot follow"),
    ):
        with pytest.raises(ConfigError, match=message):
            attempt()
        assert (sorted(cache), cache.used) == (["a", "b"], 10)
    assert cache.evict() == "a"
    for capacity in (0, 1.5, True, None):
        with pytest.raises(ConfigError, match="positive int"):
            LRU[str](capacity)  # type: ignore[arg-type]


def test_discard_after_a_failed_read() -> None:
    cache = filled(LFU[int](3), [[0, 1], [1, 2]])
    cache.discard(0)
    cache.discard(0)
    assert (sorted(cache), cache.used) == ([1, 2], 2)
    assert cache.evict() == 2
    # Its uses still count: 0 was used once before, so it now outranks 3.
    cache.step([3, 0])
    assert cache.evict() == 3


def test_read_ahead_keys_are_as_new_as_their_arrival() -> None:
    cache = filled(LRU[int](3), [[0, 1]])
    cache.admit(2)
    assert [cache.evict(), cache.evict(), cache.evict()] == [0, 1, 2]


def test_reset_forgets_everything() -> None:
    tokens = [[0, 1], [1, 2], [3, 1], [0, 3], [2, 1]]
    for name in POLICIES:
        cache = make_policy(name, 2, tokens)
        first = [cache.step(keys) for keys in tokens]
        cache.reset()
        assert (len(cache), cache.used, cache.capacity) == (0, 0, 2)
        assert [cache.step(keys) for keys in tokens] == first, name


def test_layers_of_one_token_share_its_age() -> None:
    """With global keys the clock is the token's, not the call's: two uses two tokens ago weigh less than one now."""
    cache = LRFU[tuple[int, int]](4, decay=0.6)
    for token, expert in ((0, 0), (1, 0), (5, 1)):
        for layer in range(2):
            cache.touch([(layer, expert)], token=token)
            if (layer, expert) not in cache:
                cache.admit((layer, expert))
    assert [cache.evict() for _ in range(4)] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    with pytest.raises(ConfigError, match="token 4 cannot follow token 5"):
        cache.touch([(0, 0)], token=4)


class Model:
    """The live cache's view of a policy, by sorting everything each time."""

    def __init__(self, policy: str) -> None:
        self.policy = policy
        self.size: dict[Any, int] = {}
        self.uses: dict[Any, list[int]] = {}
        self.last: dict[Any, int] = {}
        self.now = -1
        self.count = 0

    def touch(self, keys: list[Any]) -> None:
        self.now += 1
        for key in keys:
            self.uses.setdefault(key, []).append(self.now)
            self.last[key] = self.count
            self.count += 1

    def worth(self, key: Any) -> tuple[Any, int]:
        uses = self.uses[key]
        if self.policy == "lru":
            return 0, self.last[key]
        if self.policy == "lfu":
            return len(uses), self.last[key]
        return sum((Fraction(9, 10) ** (self.now - use) for use in uses), Fraction(0)), self.last[key]

    def shrink(self, limit: int, protected: list[Any]) -> list[Any]:
        dropped = []
        while sum(self.size.values()) > limit:
            victim = min((key for key in self.size if key not in protected), key=self.worth)
            del self.size[victim]
            dropped.append(victim)
        return dropped


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu"])
def test_a_live_cache_makes_the_same_decisions(policy: str) -> None:
    """Random look-ups of keys of unequal size under a hard budget that moves, with failed reads and read-ahead."""
    rng = np.random.default_rng(7)
    keys_all = [(layer, expert) for layer in range(3) for expert in range(12)]
    size_of = {key: int(rng.integers(1, 6)) for key in keys_all}
    cache: Policy[Any] = make_policy(policy, 60)
    model = Model(policy)
    for _ in range(400 if policy == "lrfu" else 3000):
        if rng.random() < 0.1:
            budget = int(rng.integers(25, 110))
            assert cache.resize(budget) == model.shrink(budget, [])
        layer = int(rng.integers(3))
        keys = [(layer, int(e)) for e in np.argsort(rng.random(12) * np.arange(1, 13))[:4]]
        missing = [key for key in keys if key not in cache]
        assert missing == [key for key in keys if key not in model.size]
        cache.touch(keys)
        model.touch(keys)
        for key in missing:
            size = size_of[key]
            assert cache.make_room(size, keys) == model.shrink(cache.capacity - size, keys)
            cache.admit(key, size)
            model.size[key] = size
            assert cache.used <= cache.capacity
        if rng.random() < 0.05:
            failed = keys[int(rng.integers(4))]
            cache.discard(failed)
            del model.size[failed]
        assert set(cache) == set(model.size)
        assert cache.used == sum(model.size.values())


def test_the_heap_stays_small() -> None:
    cache = filled(LRU[int](4), [[0, 1, 2, 3]])
    for _ in range(5000):
        cache.touch([0, 1])
    assert len(cache._heap) <= 2 * len(cache) + 65
    assert cache.evict() == 2
