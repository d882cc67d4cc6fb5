"""An expert cache whose users are in each other's way: shrinks against leases, interrupts against shared reads, and a
process that can have no more memory mappings."""

from __future__ import annotations

import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_support import EXPERTS, Source, leased_soon
from tiny_checkpoints import save_tiny, stock
from torch import Tensor
from waiting import HANGS_S, in_thread, until

from remoe_adapt import get_remoe_model
from remoe_adapt.device_profile.profile import MemoryProfile
from remoe_adapt.dial.sensors import CacheUse
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.memory import HUGE_PAGE, Blocks

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def test_status_within_a_forward_while_the_monitor_shrinks_the_cache(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    with torch.no_grad():
        expected = stock(folder)(input_ids=IDS).logits
    model: Any = get_remoe_model(folder, "orin-8gb", expert_cache=1.0, monitor=False)
    controller, base = model.controller, model.get_base_model()
    cache: ExpertCache = base.expert_cache
    with torch.no_grad():
        model(input_ids=IDS)
    whole, before = cache.budget_bytes, len(cache.resident())
    # This process takes more than a byte: memory is lacking, and the cache is to shrink to a tenth.
    governor = controller._monitor._governor
    governor.profile = replace(governor.profile, memory=MemoryProfile(budget_bytes=1, reserve_bytes=1))
    said: list[dict[str, Any]] = []
    ticks: list[threading.Thread] = []

    def hook(*_: object) -> None:
        if not ticks:
            ticks.append(in_thread(controller.tick))
            until(lambda: len(cache.resident()) < before)
            said.extend([controller.status(), controller.status()])

    experts = base.get_submodule(cache.source.layers[0])
    handle = experts.act_fn.register_forward_hook(hook)
    logits: list[Tensor] = []

    def forward() -> None:
        with torch.no_grad():
            logits.append(model(input_ids=IDS).logits)

    thread = in_thread(forward)
    thread.join(HANGS_S)
    assert not thread.is_alive(), "status() waits for the shrink, the shrink for the lease, the lease for status()"
    handle.remove()
    ticks[0].join(HANGS_S)
    assert not ticks[0].is_alive() and torch.equal(logits[0], expected)
    shown = said[0]["expert_cache"]
    assert shown["budget_bytes"] == whole and shown["asked_bytes"] == cache.budget_bytes < whole / 2, "still on its way"
    assert cache.resident_bytes <= cache.budget_bytes and not cache._shares.pins
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected)
    controller.close()


def test_a_shrink_that_does_not_wait_is_brought_into_force_by_the_last_lease() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    use = CacheUse(cache)
    cache.lease(1, range(EXPERTS)).release()
    small = source.expert_bytes[2]
    with cache.lease(0, [0, 1, 2]):
        with cache.lease(0, [3, 4]):
            use.read(1.0)
            use.resize("cache", small)
            assert cache.resident() == [(0, expert) for expert in range(5)], "at once, what nobody holds"
            stats = cache.stats()
            assert (stats["budget_bytes"], stats["asked_bytes"]) == (source.total, small)
        assert cache.budget_bytes == source.total and cache.resident() == [(0, 0), (0, 1), (0, 2)]
        assert use.read(2.0).value("cache.allowed") == source.total
    assert cache.budget_bytes == small >= cache.resident_bytes
    found = use.read(3.0)
    assert found.value("cache.budget") == small and found.value("cache.allowed") == source.total, "no hand set it"
    assert leased_soon(cache, [5])


def test_a_later_budget_ends_the_wait_for_an_earlier_one() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    with cache.lease(0, range(EXPERTS)):
        waiting = in_thread(lambda: cache.resize(source.expert_bytes[2]))
        until(lambda: cache.stats()["asked_bytes"] < source.total)
        cache.resize(source.total)
        waiting.join(HANGS_S)
        assert not waiting.is_alive() and cache.budget_bytes == source.total
    cache.lease(1, range(EXPERTS)).release()
    assert len(cache.resident()) == 2 * EXPERTS, "all of the room is there again"


class Interrupted(Source):
    """Its first read of expert 0 of layer 0 waits for `go` and is then interrupted, as by Ctrl-C."""

    def __init__(self, interrupt: type[BaseException]) -> None:
        super().__init__()
        self.begun, self.go, self.interrupt = threading.Event(), threading.Event(), interrupt

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        first = not self.begun.is_set() and (layer, expert) == (0, 0)
        if first:
            self.begun.set()
            assert self.go.wait(HANGS_S)
        slot = super().read(layer, expert)
        if first:
            raise self.interrupt
        return slot


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_stays_in_the_thread_that_reads(interrupt: type[BaseException]) -> None:
    source = Interrupted(interrupt)
    cache = ExpertCache(source, source.total, threads=1)
    raised: list[BaseException] = []
    values: list[list[float]] = []

    def lease(experts: list[int]) -> None:
        try:
            with cache.lease(0, experts) as found:
                values.append([float(found.slots[expert]["w"][0]) for expert in experts])
        except BaseException as error:
            raised.append(error)

    reader = in_thread(lambda: lease([0, 1, 2]))
    assert source.begun.wait(HANGS_S)
    waiters = [in_thread(lambda experts=experts: lease(experts)) for experts in ([0], [1, 0, 2], [0, 3])]  # type: ignore[misc]
    until(lambda: cache._waiting == 1 + len(waiters))
    source.go.set()
    for thread in [reader, *waiters]:
        thread.join(HANGS_S)
        assert not thread.is_alive()
    assert [type(error) for error in raised] == [interrupt]
    assert sorted(values) == [[0.0], [0.0, 3.0], [1.0, 0.0, 2.0]]
    assert not cache._shares.pins and not cache._loading and cache.resident() == [(0, expert) for expert in range(4)]
    assert cache.resident_bytes == 4 * source.expert_bytes[0] and source.reads.count((0, 0)) == 2
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["bytes"]) == (5, 4, 4 * source.expert_bytes[0])
    cache.resize(source.expert_bytes[2])
    assert leased_soon(cache, [0]), "nothing is left leased"


def mappings() -> int:
    return len(Path("/proc/self/maps").read_text().splitlines())


@pytest.mark.skipif(sys.platform != "linux", reason="counts the mappings of /proc")
@pytest.mark.parametrize("size", [HUGE_PAGE + 4096, 2 * HUGE_PAGE - 4096])
def test_a_slot_takes_one_mapping(size: int) -> None:
    before, blocks = mappings(), Blocks()
    held = [blocks.take(size) for _ in range(200)]
    assert mappings() - before <= len(held) + 20


_FULL = """
import mmap, torch
from remoe_adapt.expert_cache.memory import Blocks
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.errors import ConfigError

SIZE, COUNT = (2 << 20) + 4096, 400

class Source:
    layers, num_experts, expert_bytes = ("experts",), (COUNT,), (SIZE,)
    def __init__(self): self.blocks = Blocks()
    def read(self, layer, expert):
        slot = self.blocks.empty((SIZE,), torch.uint8)
        slot[0] = expert % 256
        return {"w": slot}
    def give_back(self): self.blocks.give_back()

def value(expert):
    with cache.lease(0, [expert]) as lease:
        return int(lease.slots[expert]["w"][0])

cache = ExpertCache(Source(), SIZE * COUNT, threads=1)
assert value(0) == 0
taken = []
try:
    while True:  # neighbours of unlike protection stay mappings of their own
        taken.append(mmap.mmap(-1, 4096, prot=mmap.PROT_READ | (mmap.PROT_WRITE if len(taken) % 2 else 0)))
except OSError:
    del taken[::400]
refused = ""
for expert in range(1, COUNT):
    try:
        value(expert)
    except ConfigError as error:
        refused = refused or str(error)
        break
there = [expert for _, expert in cache.resident()]
assert 1 < len(there) < COUNT, there
assert [value(expert) for expert in there] == [expert % 256 for expert in there]
cache.resize(cache.resident_bytes)
assert [value(expert) for expert in range(COUNT)] == [expert % 256 for expert in range(COUNT)]
del taken
print(refused)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="vm.max_map_count is Linux's")
def test_without_another_mapping_the_cache_says_so_and_works_on() -> None:
    limit = int(Path("/proc/sys/vm/max_map_count").read_text())
    if limit > 300_000:
        pytest.skip(f"vm.max_map_count is {limit}: filling it takes too long")
    done = subprocess.run([sys.executable, "-c", _FULL], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    for words in (f"vm.max_map_count is {limit}", "sysctl -w vm.max_map_count=", "smaller budget"):
        assert words in done.stdout
