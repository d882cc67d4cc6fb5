"""The cache of experts against a plain model of its policy; its budget, leases, failures and counters."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from expert_support import EXPERTS, LAYERS, Key, Source, leased_soon
from tiny_checkpoints import save_tiny, skeleton

from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.eviction.policy import LRFU_DECAY
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore
from remoe_adapt.expert_cache.types import ExpertSource


class Reference:
    """LRU, LFU and LRFU as they are defined, by looking at every resident key."""

    def __init__(self, policy: str, scope: str, sizes: tuple[int, ...], budget: int) -> None:
        self.policy, self.sizes = policy, sizes
        self.domain = [0 if scope == "global" else layer for layer in range(LAYERS)]
        self.resident: set[Key] = set()
        self.uses: dict[Key, int] = {}
        self.weight: dict[Key, tuple[int, float]] = {}
        self.last: dict[Key, int] = {}
        self.clock = 0
        self.token, self.layer = [0] * LAYERS, [-1] * LAYERS
        self.resize(budget)

    def resize(self, budget: int) -> None:
        total = sum(EXPERTS * size for size in self.sizes)
        share = [budget * EXPERTS * size // total for size in self.sizes]
        self.limit = [budget] * LAYERS if len(set(self.domain)) == 1 else share
        for domain in set(self.domain):
            self.cut(domain, 0, set())

    def worth(self, key: Key) -> tuple[float, int]:
        if self.policy == "lru":
            return 0.0, self.last[key]
        if self.policy == "lfu":
            return self.uses[key], self.last[key]
        token, weight = self.weight[key]
        return weight * LRFU_DECAY ** (self.token[self.domain[key[0]]] - token), self.last[key]

    def cut(self, domain: int, more: int, protected: set[Key]) -> None:
        own = [key for key in self.resident if self.domain[key[0]] == domain]
        used = sum(self.sizes[layer] for layer, _ in own)
        for key in sorted(set(own) - protected, key=self.worth):
            if used + more <= self.limit[domain]:
                break
            self.resident.remove(key)
            used -= self.sizes[key[0]]

    def use(self, layer: int, experts: list[int]) -> list[Key]:
        """The keys that were missing."""
        domain, keys = self.domain[layer], [(layer, expert) for expert in experts]
        self.token[domain] += layer <= self.layer[domain]
        self.layer[domain] = layer
        now = self.token[domain]
        missing = [key for key in keys if key not in self.resident]
        for key in keys:
            self.clock += 1
            self.last[key], self.uses[key] = self.clock, self.uses.get(key, 0) + 1
            then, weight = self.weight.get(key, (now, 0.0))
            self.weight[key] = now, weight * LRFU_DECAY ** (now - then) + 1.0
        for key in missing:
            self.cut(domain, self.sizes[layer], set(keys))
            self.resident.add(key)
        return missing


def agree(policy: str, scope: str, look_ups: int, seed: int) -> None:
    random_of = random.Random(seed)
    source = Source()
    cache = source.cache = ExpertCache(source, source.total // 3, policy=policy, scope=scope, threads=2)
    reference = Reference(policy, scope, source.expert_bytes, source.total // 3)
    popular = [random_of.sample(range(EXPERTS), EXPERTS) for _ in range(LAYERS)]
    done, layer = 0, 0
    while done < look_ups:
        if random_of.random() < 0.01:
            budget = random_of.randrange(source.total // 3, source.total + 50)
            cache.resize(budget)
            reference.resize(budget)
            assert cache.resident() == sorted(reference.resident)
        if random_of.random() < 0.003:
            random_of.shuffle(popular[layer])
        room = reference.limit[reference.domain[layer]] // source.expert_bytes[layer]
        count = min(random_of.choice((1, 2, 2, 2, 3)), room)
        experts = random_of.sample(popular[layer][:5] if random_of.random() < 0.8 else range(EXPERTS), count)
        source.reads.clear()
        with cache.lease(layer, experts) as lease:
            assert set(lease.slots) == set(experts)
        assert sorted(source.reads) == sorted(reference.use(layer, experts))
        assert cache.resident_bytes <= cache.budget_bytes
        done, layer = done + count, (layer + 1) % LAYERS
    assert cache.resident() == sorted(reference.resident)
    stats = cache.stats()
    assert 0 < stats["misses"] < stats["hits"] + stats["misses"] == done


CASES = [(policy, scope) for policy in ("lru", "lfu", "lrfu") for scope in ("global", "layer")]


@pytest.mark.parametrize(("policy", "scope"), CASES)
def test_decisions_are_those_of_the_reference_under_changing_budgets(policy: str, scope: str) -> None:
    agree(policy, scope, 20_000, seed=1)


@pytest.mark.slow
def test_a_million_look_ups_agree() -> None:
    for number, (policy, scope) in enumerate(CASES):
        agree(policy, scope, 1_000_000 // len(CASES) + 1, seed=100 + number)


def test_what_is_leased_stays_and_the_lease_takes_what_fits() -> None:
    source = Source()
    cache = ExpertCache(source, 3 * source.expert_bytes[0], policy="lru")
    with cache.lease(0, [5, 1, 7, 2]) as lease:
        assert list(lease.slots) == [5, 1, 7]
        # No room is left until that lease ends: a second thread waits.
        entered = threading.Event()

        def other() -> None:
            with cache.lease(0, [2]):
                entered.set()

        thread = threading.Thread(target=other)
        thread.start()
        assert not entered.wait(0.05)
        assert cache.resident() == [(0, 1), (0, 5), (0, 7)]
        assert {expert: float(slot["w"][0]) for expert, slot in lease.slots.items()} == {5: 5.0, 1: 1.0, 7: 7.0}
    thread.join(10)
    assert entered.is_set() and cache.resident() == [(0, 1), (0, 2), (0, 7)]


def test_shrinking_evicts_at_once_what_is_not_leased_and_the_rest_when_it_is_given_back() -> None:
    source = Source()
    cache = ExpertCache(source, source.total, policy="lru")
    for expert in range(EXPERTS):
        cache.lease(0, [expert]).release()
    with cache.lease(0, [0, 1, 2]):
        thread = threading.Thread(target=cache.resize, args=(source.expert_bytes[2],))
        thread.start()
        deadline = time.monotonic() + 10
        while len(cache.resident()) > 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        assert cache.resident() == [(0, 0), (0, 1), (0, 2)]
    thread.join(10)
    assert not thread.is_alive() and cache.resident() == [(0, 1), (0, 2)]
    cache.resize(source.total)
    cache.lease(0, range(EXPERTS)).release()
    assert len(cache.resident()) == EXPERTS


def test_a_failed_read_leaves_the_cache_consistent() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    source.broken = {(1, 3)}
    for _ in range(2):
        with pytest.raises(ExpertReadError, match="expert 3 of layer 1"):
            cache.lease(1, [2, 3, 4])
    assert cache.resident() == [(1, 2), (1, 4)]
    assert cache.resident_masks[1].tolist() == [[0, 0, 1, 0, 1, 0, 0, 0]]
    assert cache.resident_bytes == 2 * source.expert_bytes[1]
    source.broken = set()
    with cache.lease(1, [2, 3, 4]) as lease:
        assert float(lease.slots[3]["w"][0]) == 13.0
    cache.resize(source.expert_bytes[2])  # nothing is left leased
    assert len(cache.resident()) <= 1


def test_threads_share_reads_and_never_exceed_the_budget() -> None:
    source = Source(delay_s=0.0005)
    cache = source.cache = ExpertCache(source, 6 * max(source.expert_bytes), threads=3)
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        random_of = random.Random(seed)
        try:
            for step in range(60):
                layer, experts = step % LAYERS, random_of.sample(range(EXPERTS), 3)
                with cache.lease(layer, experts) as lease:
                    for expert, slot in lease.slots.items():
                        assert float(slot["w"][0]) == 10 * layer + expert
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for number in range(20):
        cache.resize((4 + number % 5) * max(source.expert_bytes))
        time.sleep(0.002)
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not failures, failures
    stats = cache.stats()
    assert stats["hits"] + stats["misses"] == 4 * 60 * 3 and len(source.reads) == stats["misses"]


def test_counters_tell_each_layer_apart() -> None:
    source = Source(delay_s=0.002)
    cache = ExpertCache(source, source.total)
    for layer, experts in ((0, [1, 2]), (1, [3]), (0, [2, 4]), (1, [3])):
        cache.lease(layer, experts).release()
    stats = cache.stats()
    assert [(layer["hits"], layer["misses"]) for layer in stats["layers"]] == [(1, 3), (1, 1), (0, 0)]
    assert [layer["bytes"] for layer in stats["layers"]] == [3 * 8, 12, 0]
    assert stats["stall_s"] >= 0.006 and stats["layers"][2]["stall_s"] == 0.0 and stats["hit_rate"] == 2 / 6
    assert stats["resident_bytes"] == 3 * 8 + 12
    cache.reset_stats()
    assert cache.stats()["hits"] == cache.stats()["misses"] == 0 and len(cache.resident()) == 4


@pytest.mark.parametrize(
    ("budget", "options", "words"),
    [
        (15, {}, "cannot hold one expert: give at least 16"),
        (20, {"scope": "layer"}, "cannot hold one expert: give at least"),
        (0.5, {}, "give a number of bytes"),
        (True, {}, "give a number of bytes"),
        (1000, {"policy": "belady"}, "policy 'belady' is not one of lru, lfu, lrfu"),
        (1000, {"scope": "token"}, "scope 'token' is not one of global, layer"),
        (1000, {"threads": 0}, "threads 0"),
        (1000, {"policy": "lru", "decay": 0.9}, "'lru' has none"),
        (1000, {"decay": 0.3}, "decay 0.3"),
    ],
)
def test_options_that_cannot_work_are_refused(budget: Any, options: dict[str, Any], words: str) -> None:
    source = Source()
    with pytest.raises(ConfigError, match=words):
        ExpertCache(source, budget, **options)
    cache = ExpertCache(source, source.total)
    with pytest.raises(ConfigError):
        cache.resize(3)
    assert cache.budget_bytes == source.total


def test_a_decay_is_the_prior_s_unless_one_was_given() -> None:
    """An expert of two early uses against one of a single late use."""

    def left(decay: float | None, followed: float | None) -> set[tuple[int, int]]:
        source = Source()
        cache = ExpertCache(source, 2 * source.expert_bytes[0], decay=decay)
        for expert in (0, 0, 1):
            cache.lease(0, [expert]).release()
        cache.follow(followed)
        for _ in range(8):
            cache.lease(0, [0]).release()
        for _ in range(5):
            cache.lease(0, [1]).release()
        cache.lease(0, [2]).release()
        return set(cache.resident())

    # The last five of eight uses weigh more at a decay of 0.5, all count the same at 1.
    assert left(None, 0.5) == left(0.5, None) == left(0.5, 1.0) == {(0, 1), (0, 2)}
    assert left(None, 1.0) == left(1.0, None) == left(1.0, 0.5) == {(0, 0), (0, 2)}


def test_a_budget_is_resized_to_a_size_bytes_or_a_share() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    for budget, in_bytes in (
        ("0.1KiB", 102),
        (0.5, source.total // 2),
        (100, 100),
        ("1GiB", 1 << 30),
        (1.0, source.total),
    ):
        cache.resize(budget)  # type: ignore[arg-type]
        assert cache.budget_bytes == cache.stats()["asked_bytes"] == in_bytes
    wrong: list[Any] = [
        "5 apples",
        "much",
        "",
        0.0,
        1.5,
        -0.1,
        float("nan"),
        float("inf"),
        True,
        None,
        [1],
        0,
        -5,
        "1B",
        0.001,
    ]
    for budget in wrong:
        with pytest.raises(ConfigError, match="expert cache budget"):
            cache.resize(budget)
        assert cache.budget_bytes == cache.stats()["asked_bytes"] == source.total


def test_a_store_is_such_a_source(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    store: ExpertSource = ExpertStore(folder, skeleton(folder))
    cache = ExpertCache(store, store.expert_bytes[0])
    with cache.lease(0, [3, 4]) as lease:
        assert {name: list(value.shape) for name, value in lease.slots[3].items()} == {
            "gate_up_proj": [32, 32],
            "down_proj": [32, 16],
        }


def test_a_process_that_can_have_no_more_threads_still_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    cache = ExpertCache(source, source.total, threads=2)
    begin = cache._pool.submit

    def submit(*work: Any) -> Any:
        begin(*work)
        raise RuntimeError("can't start new thread")  # as the pool does: after the work was queued

    monkeypatch.setattr(cache._pool, "submit", submit)
    monkeypatch.setattr(cache._ahead_pool, "submit", submit)
    cache.prefetch(0, [6, 7])
    with cache.lease(0, range(6)) as lease:
        assert [float(lease.slots[expert]["w"][0]) for expert in range(6)] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert sorted(source.reads) == [(0, expert) for expert in range(6)], "each is read once"
    assert leased_soon(cache, [6, 7]) and not cache._shares.pins and not cache._loading


def test_an_interrupt_while_reads_are_begun_leaves_nothing_to_wait_for(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source()
    cache = ExpertCache(source, source.total)

    def submit(*work: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(cache._pool, "submit", submit)
        cache.lease(0, [0, 1, 2])
    assert leased_soon(cache, [0, 1, 2]) and len(cache.resident()) == 3 and not cache._shares.pins


def test_a_child_of_a_fork_in_the_midst_of_a_change_is_consistent() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    cache.lease(0, range(4)).release()
    policy = cache._shares.policies[0]
    # As another thread may leave it: dropped by the policy alone, its slot gone but counted, admitted but not begun.
    policy.discard((0, 1))
    del cache._slots[0, 2]
    policy.admit((1, 0), source.expert_bytes[1])
    cache.after_fork()
    assert cache.resident() == [(0, 0), (0, 3)] and cache.resident_bytes == 2 * source.expert_bytes[0]
    assert leased_soon(cache, list(range(EXPERTS))) and cache.is_whole(0) and not cache.is_whole(1)
