"""A source that brings all that a look-up misses in one call."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest
import torch
from expert_support import EXPERTS, LAYERS, Source, leased_soon
from torch import Tensor
from waiting import HANGS_S, in_thread, until

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.cache import ExpertCache


class Batches(Source):
    """Notes what is asked for in one call, and where; `go` lets a call end, `raises` is raised by the next."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[int, list[int]]] = []
        self.threads: set[int] = set()
        self.begun, self.go, self.raises = threading.Event(), threading.Event(), list[BaseException]()
        self.go.set()

    def read_many(self, layer: int, experts: Sequence[int]) -> dict[int, dict[str, Tensor]]:
        self.calls.append((layer, list(experts)))
        self.threads.add(threading.get_ident())
        raised = self.raises.pop() if self.raises else None
        self.begun.set()
        assert self.go.wait(HANGS_S)
        if raised is not None:
            raise raised
        return {expert: self.read(layer, expert) for expert in experts}


def values(cache: ExpertCache, layer: int, experts: list[int]) -> list[float]:
    with cache.lease(layer, experts) as lease:
        return [float(lease.slots[expert]["w"][0]) - 10 * layer for expert in experts]


def test_what_a_lease_misses_is_read_in_one_call_of_its_thread() -> None:
    source = Batches()
    cache = ExpertCache(source, source.total)
    assert values(cache, 1, [3, 1, 6]) == [3, 1, 6]
    assert values(cache, 1, [1, 2, 3, 4]) == [1, 2, 3, 4]
    assert values(cache, 1, [1, 2]) == [1, 2]
    assert source.calls == [(1, [3, 1, 6]), (1, [2, 4])] and source.threads == {threading.get_ident()}
    stats = cache.stats()
    assert (stats["hits"], stats["misses"], stats["bytes"]) == (4, 5, 5 * source.expert_bytes[1])
    assert cache.resident() == [(1, expert) for expert in (1, 2, 3, 4, 6)] and not cache._loading
    # As many at a time as the budget holds, as without batches.
    cache.resize(2 * source.expert_bytes[2])
    source.calls.clear()
    with cache.lease(2, [0, 1, 2]) as lease:
        assert sorted(lease.slots) == [0, 1]
    assert source.calls == [(2, [0, 1])]


def test_each_failure_of_a_batch_is_that_of_its_expert() -> None:
    source = Batches()
    cache = ExpertCache(source, source.total)
    source.broken = {(0, 2), (0, 5)}
    for _ in range(2):
        with pytest.raises(ExpertReadError, match="expert 2 of layer 0"):
            cache.lease(0, [1, 2, 5, 3])
        assert cache.resident() == [(0, 1), (0, 3)] and not cache._loading and not cache._shares.pins
        assert cache.resident_bytes == 2 * source.expert_bytes[0]
    source.broken = set()
    assert values(cache, 0, [1, 2, 3, 5]) == [1, 2, 3, 5]


def test_a_failure_that_is_no_expert_s_is_raised_by_the_look_up() -> None:
    class TimeLimitError(Exception):
        pass

    source = Batches()
    cache = ExpertCache(source, source.total)
    source.raises.append(TimeLimitError())
    with pytest.raises(TimeLimitError):
        cache.lease(0, [1, 2])
    assert cache.resident() == [(0, 1), (0, 2)] and not cache._loading and not cache._shares.pins
    assert values(cache, 0, [1, 2]) == [1, 2] and len(source.calls) == 1


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_in_a_batch_stays_in_its_thread(interrupt: type[BaseException]) -> None:
    source = Batches()
    cache = ExpertCache(source, source.total)
    source.go.clear()
    source.raises.append(interrupt())
    raised: list[BaseException] = []
    found: list[list[float]] = []

    def read(experts: list[int]) -> None:
        try:
            found.append(values(cache, 0, experts))
        except BaseException as error:
            raised.append(error)

    first = in_thread(lambda: read([0, 1, 2]))
    assert source.begun.wait(HANGS_S)
    others = [in_thread(lambda experts=experts: read(experts)) for experts in ([0, 1], [2, 0], [1, 3])]  # type: ignore[misc]
    until(lambda: cache._waiting == 1 + len(others))
    source.go.set()
    for thread in [first, *others]:
        thread.join(HANGS_S)
        assert not thread.is_alive()
    assert [type(error) for error in raised] == [interrupt]
    assert sorted(found) == [[0.0, 1.0], [1.0, 3.0], [2.0, 0.0]]
    assert not cache._shares.pins and not cache._loading and cache._waiting == 0
    assert sorted(source.reads) == [(0, expert) for expert in range(4)], "each came once"
    assert leased_soon(cache, [7])


def test_threads_share_batches_and_keep_the_budget() -> None:
    source = Batches()
    source.delay_s = 0.0002
    source.cache = cache = ExpertCache(source, source.total // 3)
    wrong: list[object] = []

    def run(seed: int) -> None:
        chance = torch.Generator().manual_seed(seed)
        for step in range(150):
            experts = torch.randperm(EXPERTS, generator=chance)[:2].tolist()
            if values(cache, step % LAYERS, experts) != experts:
                wrong.append((step, experts))
            if step % 3 == seed:
                cache.prefetch((step + 1) % LAYERS, experts)
            if step % 40 == 0:
                cache.resize(source.total // (3 + step % 2))

    threads = [in_thread(lambda seed=seed: run(seed)) for seed in range(3)]  # type: ignore[misc]
    for thread in threads:
        thread.join(HANGS_S)
        assert not thread.is_alive()
    until(lambda: not cache._loading)  # read-aheads
    assert not wrong and not cache._shares.pins
    assert cache.stats()["bytes"] == sum(source.expert_bytes[layer] for layer, _ in source.reads)
