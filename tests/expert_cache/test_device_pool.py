"""The slots of a device, on one that is none: the order of copies, what is used again and when, and other budgets."""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_support import EXPERTS, LAYERS, Source
from fake_streams import FakeStreams, tier_over, two_tiers
from tiny_checkpoints import save_tiny, skeleton
from waiting import HANGS_S, in_thread, until

from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache import device_pool
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore
from remoe_adapt.expert_cache.device_pool import ABSENT, DevicePools, DeviceSlot, TakenSlot


class Sized(Source):
    """Experts of these sizes, by layer."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        self.expert_bytes = sizes


def pools_of(cache: ExpertCache) -> DevicePools:
    source: Any = cache.source
    found: DevicePools = source.pools
    return found


def streams_of(cache: ExpertCache) -> FakeStreams:
    found: Any = pools_of(cache).streams
    assert isinstance(found, FakeStreams)
    return found


def values(cache: ExpertCache, layer: int, experts: list[int]) -> list[float]:
    with cache.lease(layer, experts) as lease:
        return [float(lease.slots[expert]["w"][0]) - 10 * layer for expert in experts if expert in lease.slots]


def in_other_thread(call: Callable[[], object]) -> int:
    """The stream that it computed on, once it has ended."""
    keys: list[int] = []

    def run() -> None:
        call()
        keys.append(threading.get_ident())

    thread = in_thread(run)
    thread.join(HANGS_S)
    assert not thread.is_alive() and keys
    return keys[0]


def check(cache: ExpertCache) -> None:
    """The table, the slots and the policy say the same, and every number is free or in use once."""
    pools = pools_of(cache)
    streams_of(cache).synchronize()
    with pools._lock:
        pools._collect()
    expected = torch.full_like(pools.table, ABSENT)
    taken: dict[int, list[int]] = {size: list(pool.free) for size, pool in pools.pools.items()}
    for (layer, expert), slot in cache._slots.items():
        assert isinstance(slot, TakenSlot)
        expected[layer, expert] = slot.slot.number
        taken[slot.slot.pool.slot_bytes].append(slot.slot.number)
        assert float(slot["w"][0]) == 10 * layer + expert
    assert torch.equal(pools._shown, expected)
    for size, numbers in taken.items():
        assert sorted(numbers) == list(range(pools.pools[size].slots))
    assert cache.resident_bytes <= cache.budget_bytes


def test_what_a_look_up_misses_is_copied_together_and_its_stream_waits() -> None:
    source = Source()
    cache = two_tiers(source, source.total, source.total)
    streams, mine = streams_of(cache), threading.get_ident()
    assert values(cache, 1, [3, 1, 6]) == [3, 1, 6]
    # One event for all; the numbers of the slots go the same way, behind the experts.
    assert [(key, event) for key, event in streams.waits] == [(mine, streams.copies[-1])]
    fitting = len(streams.copies) - 1
    assert values(cache, 1, [1, 2, 3, 4]) == [1, 2, 3, 4] and len(streams.copies) == fitting + 2
    assert streams.copies[-1].queued == 2 + 1
    assert values(cache, 1, [1, 2]) == [1, 2] and len(streams.copies) == fitting + 2
    assert len(streams.waits) == 2, "hits wait for nothing that was waited for"
    numbers = pools_of(cache).table[1].tolist()
    assert sorted(number for number in numbers if number != ABSENT) == [0, 1, 2, 3, 4] and numbers[0] == ABSENT
    check(cache)


def test_a_copy_under_way_is_waited_for_by_each_stream_and_holds_its_ram() -> None:
    source = Source()
    cache = two_tiers(source, source.total, source.expert_bytes[0] * 2)
    streams, pools, below = streams_of(cache), pools_of(cache), cache.below
    assert below is not None
    values(cache, 0, [0])  # memory is there from now on
    cache.prefetch(0, [5, 6])
    until(lambda: not cache._loading)
    assert pools.held == 2 and len(streams.queue) == 2
    below.clear()
    assert below.resident() == [] and values(cache, 1, [2]) == [2], "another expert comes meanwhile"
    other = in_other_thread(lambda: values(cache, 0, [6]))
    assert [key for key, _ in streams.waits].count(other) == 1
    assert values(cache, 0, [5, 6]) == [5, 6]
    cache.source.give_back()
    assert pools.held == 0
    check(cache)


def test_copies_into_used_slots_wait_for_all_streams_that_computed() -> None:
    source = Source()
    cache = two_tiers(source, 2 * source.expert_bytes[0], source.total, policy="lru")
    streams, mine = streams_of(cache), threading.get_ident()
    values(cache, 0, [0, 1])
    other = in_other_thread(lambda: values(cache, 0, [1]))
    cache.prefetch(0, [2])  # from a thread that computes nothing
    until(lambda: not cache._loading)
    assert {mine, other} <= set(streams.copies[-1].after)
    assert values(cache, 0, [2]) == [2]
    check(cache)


def test_a_slot_is_one_copy_of_the_ram_slot(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    store = ExpertStore(folder, skeleton(folder))
    cache = two_tiers(store, store.total_bytes, store.total_bytes)
    with cache.lease(0, [3, 4]) as lease:
        assert streams_of(cache).copies[-1].queued == 2 + 1
        expected = ExpertStore(folder, skeleton(folder)).read(0, 4)
        assert set(lease.slots[4]) == set(expected)
        assert all(torch.equal(lease.slots[4][name], value) for name, value in expected.items())
    held = store.layout.places
    assert held is not None and sum(pool.free_bytes for pool in held.pools.pools.values()) == 0
    cache.clear()
    assert all(pool.memory.nbytes == 0 for pool in pools_of(cache).pools.values()), "all of it went to the device"
    assert sum(pool.free_bytes for pool in held.pools.pools.values()) == 0, "and that of RAM to the system"
    assert cache.below is not None and cache.below.resident() == []


def test_other_budgets_move_slots_and_keep_what_is_in_them() -> None:
    source = Sized(64, 64, 64)
    cache, chance = two_tiers(source, source.total, source.total), random.Random(0)
    (pool,) = pools_of(cache).pools.values()
    for layer in range(LAYERS):
        values(cache, layer, list(range(EXPERTS)))
    assert pool.slots == LAYERS * EXPERTS
    for count in (20, 7, 12, 3, 24, 1, 2):
        before = set(cache.resident())
        cache.resize(count * 64)
        assert pool.slots == count and len(pool.memory) == count
        kept = set(cache.resident())
        assert kept == before if len(before) <= count else len(kept) == count, "no more goes than must"
        reads = len(source.reads)
        check(cache)
        for _ in range(10):
            layer, experts = chance.randrange(LAYERS), chance.sample(range(EXPERTS), min(3, count))
            assert values(cache, layer, experts) == experts
        check(cache)
        assert len(source.reads) == reads, "the rest came from RAM"


def test_leased_slots_delay_a_smaller_memory() -> None:
    source = Sized(64, 64, 64)
    cache = two_tiers(source, 8 * 64, source.total)
    (pool,) = pools_of(cache).pools.values()
    values(cache, 0, list(range(8)))
    number = pools_of(cache).table[0].tolist()
    last = number.index(7)
    with cache.lease(0, [last]) as lease:
        view, address = lease.slots[last]["w"], pool.memory.data_ptr()
        cache.resize(2 * 64, wait=False)
        assert pool.slots == 8 and pool.memory.data_ptr() == address and float(view[0]) == last
        assert values(cache, 1, [0]) == [0], "others go on meanwhile"
    assert pool.slots == 2
    check(cache)
    # More memory takes nothing from a lease, and its slot keeps its number.
    with cache.lease(0, [last]) as lease:
        number_before = lease.slots[last].number  # type: ignore[attr-defined]
        cache.resize(6 * 64, wait=False)
        assert pool.slots == 6 and lease.slots[last].number == number_before  # type: ignore[attr-defined]
        assert float(lease.slots[last]["w"][0]) == last
        assert values(cache, 0, [0, 1, 2, 3]) == [0, 1, 2, 3]
    check(cache)


class Held(Sized):
    """Reads that wait until they are let go on."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.begun, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        self.begun.set()
        assert self.go_on.wait(HANGS_S)
        return super().read(layer, expert)


@pytest.mark.parametrize("shrink", [lambda cache: cache.resize(2 * 64, wait=False), ExpertCache.clear])
def test_what_is_being_read_has_its_slot_whatever_the_budget_becomes(shrink: Callable[[ExpertCache], None]) -> None:
    source = Held(64, 64, 64)
    cache = two_tiers(source, 4 * 64, source.total)
    with cache.lease(0, [0, 1]):
        source.begun.clear()
        source.go_on.clear()
        found: list[list[float]] = []
        thread = in_thread(lambda: found.append(values(cache, 1, [2, 3])))
        assert source.begun.wait(HANGS_S)
        # Four are leased and two of them are still on their way: none of their slots may go.
        shrink(cache)
        source.go_on.set()
        thread.join(HANGS_S)
        assert found == [[2, 3]]
    (pool,) = pools_of(cache).pools.values()
    assert values(cache, 2, [5, 6]) == [5, 6]
    assert pool.slots == cache.budget_bytes // 64
    check(cache)


def test_leased_slots_are_never_seen_in_memory_that_they_are_not_in_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Sized(64, 64, 64)
    cache = two_tiers(source, 4 * 64, source.total)
    (pool,) = pools_of(cache).pools.values()
    streams, seen, before_copies = streams_of(cache), list[float](), FakeStreams.synchronize

    def synchronize(streams: FakeStreams) -> None:
        # What a thread that computes with its lease reads before the copies are made, and after.
        seen.append(float(lease.slots[3]["w"][0]))
        before_copies(streams)
        seen.append(float(lease.slots[3]["w"][0]))

    with cache.lease(0, [3]) as lease:
        old = pool.matrices
        monkeypatch.setattr(FakeStreams, "synchronize", synchronize)
        cache.resize(8 * 64)
        assert streams.copies and seen and set(seen) == {3.0}
    # Views that a thread has made of the old memory, and comes to note down now, are not found again.
    old[0] = "of the old memory"
    assert pool.slots == 8 and 0 not in pool.matrices
    monkeypatch.undo()
    check(cache)


def test_each_size_of_slot_has_its_share() -> None:
    source = Sized(64, 256, 1024)
    cache, chance = two_tiers(source, source.total // 2, source.total), random.Random(0)
    values(cache, 0, [0])
    assert {size: pool.slots for size, pool in pools_of(cache).pools.items()} == {64: 4, 256: 4, 1024: 4}
    for _ in range(200):
        layer, experts = chance.randrange(LAYERS), chance.sample(range(EXPERTS), chance.randint(1, 6))
        assert values(cache, layer, experts) == experts[:4]
    check(cache)
    cache.resize(source.total // 4)
    check(cache)
    with pytest.raises(ConfigError, match="cannot hold one expert"):
        cache.resize(1100)


def test_without_memory_for_the_budget_it_falls_to_what_there_is(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="remoe_adapt")
    source = Sized(64, 64, 64)
    streams = FakeStreams(free=10 * 64)
    cache = tier_over(ExpertCache(source, source.total), 20 * 64, streams)
    for layer in range(LAYERS):
        assert values(cache, layer, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert cache.budget_bytes == cache.stats()["asked_bytes"] == 10 * 64 and len(cache.resident()) == 10
    assert "the device has no memory for 1.2 KiB of experts" in caplog.text
    check(cache)
    # Old and new memory do not fit beside one another: contents go, and come back from RAM.
    streams.free = 5 * 64
    cache.resize(14 * 64)
    (pool,) = pools_of(cache).pools.values()
    assert pool.slots == 14 and cache.resident() == [] and cache.budget_bytes == 14 * 64
    reads = len(source.reads)
    assert values(cache, 2, [1, 2, 3, 4]) == [1, 2, 3, 4] and len(source.reads) == reads
    check(cache)
    # A lease keeps its slots: then all stays as it is.
    with cache.lease(2, [1]) as lease:
        cache.resize(18 * 64, wait=False)
        assert pool.slots == 14 and cache.stats()["asked_bytes"] == 14 * 64 and float(lease.slots[1]["w"][0]) == 21
    check(cache)
    cache.clear()
    assert pool.slots == 0
    streams.free = 32
    for _ in range(2):
        with pytest.raises(ConfigError, match="cannot hold one expert"):
            cache.lease(0, [0])
    streams.free = 4 * 64
    assert values(cache, 0, [0, 1, 2]) == [0, 1, 2] and cache.budget_bytes == 4 * 64


def test_a_lease_that_lost_its_room_keeps_what_is_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_pool, "_PATIENCE_S", 0.01)
    source = Sized(64, 64, 64)
    cache = two_tiers(source, 2 * 64, source.total)
    lease = cache.lease(0, [0, 1])
    kept = lease.slots[1]
    # Leases of this thread make room for its next one, as on a CPU; but what is in a slot is not written over.
    with pytest.raises(ConfigError, match=r"somebody keeps slots .* Drop the traceback"):
        values(cache, 0, [2, 3])
    assert float(kept["w"][0]) == 1.0
    lease.release()
    assert values(cache, 0, [2, 3]) == [2, 3], "a slot that is only named is filled anew"
    check(cache)


def test_a_failed_read_frees_its_slots() -> None:
    source = Sized(64, 64, 64)
    cache = two_tiers(source, 4 * 64, source.total)
    source.broken = {(0, 2)}
    for _ in range(5):
        with pytest.raises(ExpertReadError, match="expert 2 of layer 0"):
            cache.lease(0, [0, 1, 2, 3])
    source.broken = set()
    assert values(cache, 0, [4, 5, 6, 7]) == [4, 5, 6, 7] and values(cache, 0, [0, 1, 2, 3]) == [0, 1, 2, 3]
    check(cache)


def test_threads_with_streams_of_their_own_always_find_their_experts() -> None:
    source = Sized(64, 128, 128)
    cache = two_tiers(source, source.total // 2, source.total // 2)
    wrong: list[object] = []
    ended: list[int] = []

    def run(seed: int) -> None:
        chance = random.Random(seed)
        for step in range(150):
            layer, experts = step % LAYERS, sorted(chance.sample(range(EXPERTS), 2))
            with cache.lease(layer, experts) as lease:
                table = pools_of(cache).table[layer].tolist()
                for expert, slot in lease.slots.items():
                    assert isinstance(slot, DeviceSlot)
                    if float(slot["w"][0]) != 10 * layer + expert or table[expert] != slot.number:
                        wrong.append((layer, expert))
            cache.prefetch((layer + 1) % LAYERS, chance.sample(range(EXPERTS), 2))
        ended.append(seed)

    threads = [in_thread(lambda seed=seed: run(seed)) for seed in range(3)]  # type: ignore[misc]
    for count in range(12):
        cache.resize(source.total // (2 + count % 2))
        assert cache.below is not None
        cache.below.resize(source.total // (2 + count % 3))
    for thread in threads:
        thread.join(HANGS_S)
        assert not thread.is_alive()
    until(lambda: not cache._loading)
    assert not wrong and len(ended) == len(threads) and not cache._shares.pins
    check(cache)
