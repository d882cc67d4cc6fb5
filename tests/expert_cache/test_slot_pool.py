"""Slots of one size in one mapping: their places, their lives, the memory they take, and what a GPU needs of them."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from waiting import in_thread

from remoe_adapt._support import process
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.memory import HUGE_PAGE
from remoe_adapt.expert_cache.pool import PAGE, Parts, Pools, SlotPool

PARTS: Parts = {
    "up": (0, (3, 5), torch.uint8),
    "scales": (64, (4,), torch.bfloat16),
    "bias": (128, (2, 2), torch.float32),
    "none": (128, (0, 7), torch.float32),
}
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's /proc")


def resident_bytes(pool: SlotPool, slots: int = 40) -> int:
    """What the kernel says that a pool's first slots take."""
    pages = slots * pool.slot_bytes // PAGE
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(pool.address // PAGE * 8)
        entries = np.frombuffer(file.read(8 * pages), dtype=np.uint64)
    return int((entries >> np.uint64(63)).sum()) * PAGE


def test_slots_lie_at_one_distance_and_their_tensors_where_they_are_laid() -> None:
    pool = SlotPool(5000, 8)
    slots = [pool.slot(PARTS) for _ in range(3)]
    assert pool.slot_bytes == 2 * PAGE and pool.slots == 8 and pool.address % PAGE == 0
    for number, slot in enumerate(slots):
        assert slot.number == number and slot.memory.ctypes.data == pool.address + number * pool.slot_bytes
        assert list(slot) == list(PARTS)
        for name, (offset, shape, dtype) in PARTS.items():
            tensor = slot[name]
            assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype) and tensor.is_contiguous()
            if tensor.numel():
                assert tensor.untyped_storage().data_ptr() == slot.memory.ctypes.data + offset, "a storage of its own"
        slot["up"].fill_(number)
        slot["bias"].fill_(-number)
        assert slot.bytes_B.shape == (pool.slot_bytes,) and int(slot.bytes_B[7]) == number
    assert [int(slot["up"].sum()) for slot in slots] == [0, 15, 30]
    for part in ((0, (5000, 2), torch.uint8), (-1, (1,), torch.uint8), (8190, (1,), torch.float32)):
        with pytest.raises(ConfigError, match="does not lie in a slot of 8192 bytes"):
            pool.slot({"w": part})
    with pytest.raises(ConfigError, match="give at least one of each"):
        SlotPool(0, 4)


def test_a_slot_is_free_once_nothing_uses_it_and_the_lowest_is_taken_first() -> None:
    pool = SlotPool(PAGE, 8)
    slots = [pool.slot(PARTS) for _ in range(4)]
    view = slots[1]["up"][1:].t()
    slots[1] = slots[3]
    assert pool.take().number == 4, "a view is a use"
    del slots[3], slots[1]
    assert [pool.take().number for _ in range(2)] == [3, 3]
    del view
    assert pool.take().number == 1
    kept = slots[0]["up"]
    kept.fill_(9)
    del slots
    taken = [pool.take() for _ in range(4)]
    assert [slot.number for slot in taken] == [1, 2, 3, 4]
    taken[0].memory[:] = 1
    assert bool((kept == 9).all()), "the pool is not used up by what others hold"
    del pool, taken
    gc.collect()
    assert bool((kept == 9).all()), "the mapping lives as long as a tensor over it"


def test_slots_come_to_an_end_and_back() -> None:
    pool = SlotPool(PAGE, 3)
    held = [pool.take() for _ in range(3)]
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"all 3 slots of 4\.0 KiB are taken: .* smaller budget"):
            pool.take()
    ring: list[object] = [held.pop(1)]
    ring.append(ring)  # only the garbage collector frees it
    del ring
    assert pool.take().number == 1
    held.pop()
    pool.give_back()
    assert [slot.number for slot in (pool.take(), pool.take())] == [1, 2]


@linux
@pytest.mark.parametrize("size", [3 * PAGE, HUGE_PAGE + 5 * PAGE])
def test_memory_is_that_of_the_slots_in_use(size: int) -> None:
    pool = SlotPool(size, 4000)
    assert resident_bytes(pool) == 0, "a range of addresses takes none"
    slots = [pool.slot({"w": (0, (size,), torch.uint8)}) for _ in range(20)]
    for slot in slots:
        slot["w"].fill_(slot.number)
    assert 20 * size <= resident_bytes(pool) <= 20 * size + 2 * HUGE_PAGE
    del slots[10:], slot
    assert resident_bytes(pool) >= 20 * size and pool.free_bytes == 10 * pool.slot_bytes
    pool.give_back()
    # A huge page may reach beyond the last slot that was ever used.
    assert pool.free_bytes == 0 and resident_bytes(pool) <= 10 * size + (HUGE_PAGE if size > HUGE_PAGE else 0)
    again = [pool.take() for _ in range(11)]
    assert [slot.number for slot in again] == list(range(10, 21))
    assert not any(slot.memory.any() for slot in again), "fresh pages are zeros"
    assert all(bool((slot["w"] == slot.number).all()) for slot in slots)


@linux
def test_thousands_of_experts_of_many_parts_are_a_handful_of_mappings() -> None:
    def mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    # Smaller than huge pages, which a single byte would take as a whole.
    sizes = [2_000_000] * 24 + [1_500_000] * 24
    before = mappings()
    pools = Pools(sizes, [128] * 48)
    parts: Parts = {f"part{number}": (number * 64, (4, 4), torch.float32) for number in range(3)}
    held = []
    for layer in range(48):
        for _ in range(128):
            slot = pools.of(layer).slot(parts)
            slot["part0"].fill_(layer)
            held.append(slot)
    assert mappings() - before <= 12
    assert len({slot["part0"].data_ptr() for slot in held}) == 6144
    del held[::3]
    pools.give_back()
    assert mappings() - before <= 12


def test_a_growing_pool_takes_the_free_memory_of_the_others_first() -> None:
    pools = Pools([PAGE, 100, 2 * PAGE], [4, 4, 4])
    small, large = pools.of(0), pools.of(2)
    assert pools.of(1) is small and small.slots >= 8 and large.slots >= 4
    slots = [large.take() for _ in range(3)]
    del slots
    assert large.free_bytes == 3 * 2 * PAGE
    first = small.take()
    assert large.free_bytes == 0 and small.free_bytes == 0
    del first
    other = large.take()
    assert other.number == 0 and small.free_bytes == 0
    held = small.take()
    del held, other
    assert small.free_bytes == PAGE and large.free_bytes == 2 * PAGE
    held = small.take()
    assert held.number == 0 and large.free_bytes == 2 * PAGE, "nothing grew"


def test_threads_never_share_a_slot() -> None:
    pool, wrong = SlotPool(PAGE, 64), []

    def use(mark: int) -> None:
        for step in range(300):
            slots = [pool.slot({"w": (0, (64,), torch.int64)}) for _ in range(1 + step % 5)]
            for slot in slots:
                slot["w"].fill_(mark)
            if step % 50 == 0:
                pool.give_back()
            if not all(bool((slot["w"] == mark).all()) for slot in slots):
                wrong.append(mark)

    threads = [in_thread(lambda mark=mark: use(mark)) for mark in range(4)]  # type: ignore[misc]
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert not wrong and max(pool.take().number, *(slot.number for slot in [pool.take()])) < 24


_LIMITED = """
import resource, torch
from remoe_adapt.expert_cache.pool import SlotPool
from remoe_adapt.errors import ConfigError
used = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), resource.RLIM_INFINITY))
pool = SlotPool(1 << 20, 60_000)
assert 64 <= pool.slots < 1024, pool.slots
held = [pool.slot({"w": (0, (8,), torch.uint8)}) for _ in range(pool.slots)]
try:
    pool.take()
except ConfigError as error:
    print(error)
try:
    SlotPool(4 << 30, 100)
except ConfigError as error:
    print(error)
"""


@linux
def test_a_limit_of_addresses_makes_the_range_shorter() -> None:
    done = subprocess.run([sys.executable, "-c", _LIMITED], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert "slots of 1.0 MiB are taken" in first and "ulimit -v" in first
    assert "no range of 4.00 GiB for a slot" in second and "ulimit -v" in second


class _Cuda:
    """Stands for the CUDA runtime: notes what is registered, and refuses beyond a limit."""

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.limit = 100

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if len(self.held) == self.limit:
            return 2
        assert not any(start < address + size and address < start + length for start, length in self.held.items())
        self.held[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        ranges = [line.split()[0].split("-") for line in Path("/proc/self/maps").read_text().splitlines()]
        assert any(int(start, 16) <= address < int(end, 16) for start, end in ranges)
        # What was written is there still: its memory goes after it is unregistered.
        assert ctypes.string_at(address, 1) == b"\x07"
        del self.held[address]
        return 0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Cuda]:
    runtime = _Cuda()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    yield runtime
    gc.collect()


@linux
def test_slots_are_registered_when_they_are_first_used_until_their_memory_goes(cuda: _Cuda) -> None:
    pools = Pools([3 * PAGE], [8], device=torch.device("cuda", 0))
    pool = pools.of(0)
    slots = [pool.take() for _ in range(3)]
    for slot in slots:
        slot.memory[:] = 7
    at = [pool.address + number * pool.slot_bytes for number in range(3)]
    assert list(cuda.held.items()) == [(address, pool.slot_bytes) for address in at]
    assert all(pool.is_pinned(number) for number in range(3)) and not pool.is_pinned(3)
    del slots[1:], slot
    assert pool.take().number == 1 and len(cuda.held) == 3, "kept for the next"
    pools.give_back()
    assert list(cuda.held) == at[:1] and pool.is_pinned(0) and not pool.is_pinned(1)
    del pools, pool
    gc.collect()
    assert list(cuda.held) == at[:1], "the slot that is held keeps the pool"
    slots.clear()
    gc.collect()
    assert not cuda.held


@linux
def test_ram_that_cannot_be_pinned_is_pageable_and_that_is_said_once(
    cuda: _Cuda, caplog: pytest.LogCaptureFixture
) -> None:
    process.say_once.cache_clear()
    cuda.limit = 2
    pools = Pools([PAGE, 2 * PAGE], [8, 8], device=torch.device("cuda", 0))
    slots = [pools.of(0).take() for _ in range(4)] + [pools.of(1).take()]
    for slot in slots:
        slot.memory[:] = 7
    assert [pools.of(0).is_pinned(number) for number in range(4)] == [True, True, False, False]
    assert not pools.of(1).is_pinned(0)
    assert len(caplog.messages) == 1
    assert "no more RAM can be pinned for cuda:0 (CUDA error 2)" in caplog.text and "ulimit -l" in caplog.text
    del slots[1:4], slot
    pools.give_back()
    assert len(cuda.held) == 1
    slots.clear()


def test_a_slot_is_made_quickly() -> None:
    # What a miss pays beside its read: it was 7 us when this was written, and would be milliseconds if it looked
    # through all slots.
    pool = SlotPool(PAGE, 12288)
    held = [pool.take() for _ in range(6144)]
    best = float("inf")
    del held[::2]
    for _ in range(20):
        started = time.perf_counter()
        for _ in range(50):
            pool.slot(PARTS)
        best = min(best, (time.perf_counter() - started) / 50)
    assert best < 200e-6
