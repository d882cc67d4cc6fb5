"""A device that is none: its copies are queued and made when somebody waits for them, or a test says so."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.device_pool import DevicePools
from remoe_adapt.expert_cache.gpu import DeviceSource
from remoe_adapt.expert_cache.places import Places


@dataclass(frozen=True)
class FakeStream:
    key: int


@dataclass(eq=False)
class FakeEvent:
    """pairs: the copies before it, until they are made; queued: how many; after: the streams that they waited for."""

    pairs: list[tuple[Tensor, Tensor]]
    after: list[int]
    done: bool = False
    queued: int = 0

    def __post_init__(self) -> None:
        self.queued = len(self.pairs)

    def query(self) -> bool:
        return self.done


@dataclass(eq=False)
class FakeStreams:
    """Each thread has a stream of its own. Copies are made in their order, but only up to an event that somebody waits
    for: what is read without waiting is the NaN that all memory is made of.

    free: bytes of memory that there is.
    copies: all that were ever queued.
    """

    free: float = float("inf")
    device: torch.device = torch.device("cpu")
    copies: list[FakeEvent] = field(default_factory=list)
    waits: list[tuple[int, FakeEvent]] = field(default_factory=list)
    queue: deque[FakeEvent] = field(default_factory=deque)
    lock: Any = field(default_factory=threading.RLock)

    def current(self) -> FakeStream:
        return FakeStream(threading.get_ident())

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Any]) -> FakeEvent:
        event = FakeEvent(list(pairs), [stream.key for stream in after])
        with self.lock:
            self.copies.append(event)
            self.queue.append(event)
        return event

    def wait(self, stream: Any, event: Any) -> None:
        with self.lock:
            self.waits.append((stream.key, event))
            while not event.done:
                self.advance()

    def advance(self) -> None:
        """The oldest copies that are queued are made."""
        with self.lock, torch.inference_mode(False), torch.no_grad():
            event = self.queue.popleft()
            for to, source in event.pairs:
                to.copy_(source)
            event.pairs = []
            event.done = True

    def synchronize(self) -> None:
        with self.lock:
            while self.queue:
                self.advance()

    def memory(self, slots: int, slot_bytes: int) -> Tensor:
        size = slots * slot_bytes
        with self.lock:
            if size > self.free:
                raise torch.OutOfMemoryError(f"{size} bytes")
            self.free -= size
        found = torch.full((slots, slot_bytes), 255, dtype=torch.uint8)
        weakref.finalize(found, self._freed, size)
        return found

    def _freed(self, size: int) -> None:
        self.free += size

    def retire(self, memory: Tensor, streams: Iterable[Any]) -> None:
        pass

    def give_back(self) -> None:
        pass

    def free_bytes(self) -> int:
        return int(min(self.free, 1 << 40))

    def pinned(self, numbers: Tensor) -> Tensor:
        return numbers.clone()

    def on_device(self, rows: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(rows, dtype=torch.int32)


def tier_over(below: ExpertCache, budget: int, streams: FakeStreams | None = None, **options: Any) -> ExpertCache:
    """A cache of slots on a device that is none, over one in RAM."""
    source: Any = below.source
    places: Places | None = source.layout.places if hasattr(source, "layout") else None
    if places is None:
        places = Places([source.like(layer) for layer in range(len(source.layers))], source.num_experts)
        if hasattr(source, "layout"):
            source.layout.places = places
    pools = DevicePools(places, source.num_experts, streams or FakeStreams())
    return ExpertCache(DeviceSource(below, pools), budget, below=below, **options)


def two_tiers(source: Any, budget: int, below_budget: int, **options: Any) -> ExpertCache:
    return tier_over(ExpertCache(source, below_budget, threads=2), budget, threads=2, **options)
