"""Slots on a GPU: for each size of slot one tensor, filled by copies of whole slots of the RAM tier.

A slot is free again when nobody has its `TakenSlot` any more: the cache has dropped it, and no lease holds it. Its
number is then taken by the next expert, while kernels may still read the last one: copies wait for all kernels that
were queued before them. Kernels find slots by a table on the device, expert to number, or by numbers of their own.
"""

from __future__ import annotations

import gc
import heapq
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from remoe_adapt._support import size_text
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.places import Places
from remoe_adapt.expert_cache.pool import Parts, PoolSlot
from remoe_adapt.expert_cache.streams import Event, Stream, Streams
from remoe_adapt.expert_cache.types import Fitted, Key, Slot
from remoe_adapt.triton_kernels.slots import DONE

# What is in the table for an expert without a slot: kernels skip it.
ABSENT = -1
# A slot that the cache has dropped is held a moment longer by a thread that is about to let it go, or by the traceback
# of an error.
_PATIENCE_S, _PAUSE_S = 1.0, 0.001
# Where the device has no memory for all slots, so much of them is tried next.
_TRIED = 15 / 16


class DeviceSlot(Mapping[str, Tensor]):
    """The parts of one expert in a slot, by name: views that are valid while the expert is leased.

    pool: all slots of its size.
    number: of the slot in it.
    """

    __slots__ = ("_parts", "number", "pool")

    def __init__(self, pool: DevicePool, number: int, parts: Parts) -> None:
        self.pool, self.number, self._parts = pool, number, parts

    def __getitem__(self, name: str) -> Tensor:
        return part_of(self.pool.memory, self.number, self._parts[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._parts)

    def __len__(self) -> int:
        return len(self._parts)


class TakenSlot(Mapping[str, Tensor]):
    """A slot that is taken as long as anybody has this: the cache, and leases. Whoever computes gets `slot` alone, or
    each variable that still names a slot would keep it from the next expert.

    event: after it the expert is there; `order` counts such events.
    """

    __slots__ = ("_dead", "event", "key", "order", "slot")

    def __init__(self, slot: DeviceSlot, key: Key, dead: list[tuple[DeviceSlot, Key]]) -> None:
        self.slot, self.key, self._dead = slot, key, dead
        self.event: Event | None = None
        self.order = 0

    def __del__(self) -> None:
        # No lock: a finalizer runs wherever the last reference goes. `append` is one step of the interpreter.
        self._dead.append((self.slot, self.key))

    def __getitem__(self, name: str) -> Tensor:
        return self.slot[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.slot)

    def __len__(self) -> int:
        return len(self.slot)


def part_of(memory: Tensor, number: int, place: tuple[int, tuple[int, ...], torch.dtype]) -> Tensor:
    """A part of a slot, as a view."""
    offset, shape, dtype = place
    size = torch.Size(shape).numel() * dtype.itemsize
    # By `data`, so that filling a slot is no change of the views of others in the eyes of autograd.
    return memory.data[number, offset : offset + size].view(dtype).view(shape)


class DevicePool:
    """Slots of one size: `memory` is uint8 [slots, slot_bytes]. Guarded by the lock of its DevicePools.

    table: of DevicePools.
    """

    def __init__(self, slot_bytes: int, table: Tensor, streams: Streams) -> None:
        self.slot_bytes, self.memory = slot_bytes, streams.memory(0, slot_bytes)
        self._table, self._streams = table, streams
        self.free: list[int] = []
        # What kernels take of this memory, by layer; gone with it. A thread takes the dict before the memory, and so
        # never puts old memory among what is of the new.
        self.matrices: dict[object, object] = {}

    @property
    def slots(self) -> int:
        return len(self.memory)

    def renew(self, memory: Tensor) -> None:
        """Other memory, which already holds what is leased."""
        self.memory = memory
        self.matrices = {}

    def column(self, place: tuple[int, tuple[int, ...], torch.dtype]) -> Tensor:
        """A part of all slots, [slots, ...], as a view."""
        offset, shape, dtype = place
        size = torch.Size(shape).numel() * dtype.itemsize
        return self.memory.data[:, offset : offset + size].view(dtype).view(self.slots, *shape)

    def numbers(
        self,
        layer: int,
        ids_TK: Tensor,
        rows: Sequence[Sequence[int]],
        slots: Mapping[int, Slot] | None,
        done: Collection[int] = (),
    ) -> Tensor:
        """The slots of experts, int32 [T, K] on the device.

        ids_TK: on the device.
        rows: the same on the host.
        slots: those that count, others are ABSENT; None: all, and the calling thread has leased every one of them.
        done: experts whose outputs an earlier call of the kernels has left.
        """
        if slots is None:
            return torch.take(self._table[layer], ids_TK.long())
        number = {expert: slot.number for expert, slot in slots.items() if isinstance(slot, DeviceSlot)}
        number |= dict.fromkeys(done, DONE)
        return self._streams.on_device([[number.get(expert, ABSENT) for expert in row] for row in rows])


class DevicePools:
    """The slots of a tier on a device, by their size; any number of threads at once.

    `table` is int32 [L, E] on the device: the number of each expert's slot, or ABSENT. It is right for experts that the
    calling thread has leased.

    places: where parts lie in a slot, here and in the RAM tier.
    num_experts: by layer.
    streams: of the device.
    """

    def __init__(self, places: Places, num_experts: Sequence[int], streams: Streams) -> None:
        self.places, self.streams = places, streams
        with torch.inference_mode(False):
            numbers = torch.full((len(num_experts), max(num_experts)), ABSENT, dtype=torch.int32)
            self._shown = streams.pinned(numbers)
            self.table = numbers.to(streams.device, copy=True)
            sizes = sorted(set(places.slot_bytes))
            self.pools = {size: DevicePool(size, self.table, streams) for size in sizes}
        # The device reads these numbers while they are written: what is leased does not change, and nobody asks for
        # anything else.
        self._numbers = self._shown.numpy()
        self._of_layer = [self.pools[size] for size in places.slot_bytes]
        self._lock = threading.Lock()
        self._dead: list[tuple[DeviceSlot, Key]] = []
        # RAM slots that copies under way read, until the event.
        self._held: list[tuple[Event, list[Slot]]] = []
        self._orders = 0
        # Streams that have computed with slots, and the order of the last event that each has waited for.
        self._streams: dict[int, Stream] = {}
        self._waited: dict[int, int] = {}

    @property
    def held(self) -> int:
        """Copies under way, as far as anybody has looked."""
        return len(self._held)

    def fill(self, layer: int, below: Mapping[int, Slot]) -> dict[int, TakenSlot]:
        """Slots that these experts of a layer are copied into, all in one go; never waits for the device.

        What is copied from is held until the copies have ended.

        Raises ConfigError when no slot is free though the budget has room: somebody keeps slots.
        """
        pool, started = self._of_layer[layer], time.monotonic()
        has_collected = False
        while True:
            with self._lock:
                self._collect()
                self.settle_locked()
                if len(pool.free) >= len(below):
                    return self._fill(pool, layer, below)
            if not has_collected:
                gc.collect()
                has_collected = True
            elif time.monotonic() - started > _PATIENCE_S:
                raise ConfigError(
                    f"no slot of {pool.slots} of {size_text(pool.slot_bytes)} on {self.streams.device} is free: "
                    "somebody keeps slots that the expert cache has given up. Drop the traceback of the last error, if "
                    "any."
                )
            else:
                time.sleep(_PAUSE_S)

    def _fill(self, pool: DevicePool, layer: int, below: Mapping[int, Slot]) -> dict[int, TakenSlot]:
        parts, found = self.places.layers[layer], dict[int, TakenSlot]()
        pairs: list[tuple[Tensor, Tensor]] = []
        for expert, source in below.items():
            slot = DeviceSlot(pool, heapq.heappop(pool.free), parts)
            found[expert] = TakenSlot(slot, (layer, expert), self._dead)
            self._numbers[layer, expert] = slot.number
            if isinstance(source, PoolSlot) and source.parts == parts:
                pairs.append((pool.memory[slot.number], source.bytes_B[: pool.slot_bytes]))
            else:
                pairs += [(slot[name], source[name]) for name in parts]
        # Last, and in the same queue: who waits for the experts finds their numbers.
        pairs.append((self.table, self._shown))
        event = self.streams.copy(pairs, list(self._streams.values()))
        self._orders += 1
        for taken in found.values():
            taken.event, taken.order = event, self._orders
        self._held.append((event, list(below.values())))
        return found

    def leased(self, slots: Mapping[int, Slot]) -> dict[int, Slot]:
        """From now on copies into these slots wait for the calling thread's stream; see TierSource."""
        stream = self.streams.current()
        self._streams[stream.key] = stream
        found = dict[int, Slot]()
        for expert, taken in slots.items():
            assert isinstance(taken, TakenSlot)
            found[expert] = taken.slot
        return found

    def late(self, slots: Mapping[int, Slot]) -> frozenset[int]:
        """Those whose copies have not ended, and that the calling thread's stream does not wait for; see TierSource."""
        waited, found = self._waited.get(self.streams.current().key, 0), set[int]()
        for expert, taken in slots.items():
            assert isinstance(taken, TakenSlot) and taken.event is not None
            if taken.order > waited and not taken.event.query():
                found.add(expert)
        return frozenset(found)

    def wait_for(self, slots: Mapping[int, Slot]) -> None:
        """The calling thread's stream waits for the copies into these slots."""
        stream, newest = self.streams.current(), None
        for taken in slots.values():
            assert isinstance(taken, TakenSlot)
            if newest is None or taken.order > newest.order:
                newest = taken
        # Copies end in their order, so that the newest one stands for all.
        if newest is not None and newest.order > self._waited.get(stream.key, 0):
            assert newest.event is not None
            self.streams.wait(stream, newest.event)
            self._waited[stream.key] = newest.order

    def settle(self) -> None:
        """Wait for all that is queued, and let go what it reads."""
        if self._held:
            self.streams.synchronize()
        with self._lock:
            self.settle_locked()

    def settle_locked(self) -> None:
        """Let go of what copies have been made of, without waiting for any."""
        self._held = [held for held in self._held if not held[0].query()]

    def fit(self, slots: Mapping[int, int], movable: Mapping[Key, Slot]) -> Fitted:
        """Have so many slots of each size; see TierSource. Waits for the device where anything changes."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            self._collect()
            whole, lost, found = True, list[Key](), dict(slots)
            # Those that shrink first: their memory is then there for the others.
            changing = [size for size in slots if slots[size] != self.pools[size].slots]
            for size in sorted(changing, key=lambda size: slots[size] - self.pools[size].slots):
                pool = self.pools[size]
                mine = [s for s in movable.values() if isinstance(s, TakenSlot) and s.slot.pool is pool]
                gone = self._resize(pool, slots[size], mine)
                if gone is not None:
                    lost += gone
                elif slots[size] < pool.slots:
                    whole = False
                found[size] = min(slots[size], pool.slots)
            if changing:
                self.streams.copy([(self.table, self._shown)], list(self._streams.values()))
                self.streams.synchronize()
                self.settle_locked()
                self.streams.give_back()
        return Fitted(whole, found, tuple(lost))

    def _resize(self, pool: DevicePool, slots: int, movable: Sequence[TakenSlot]) -> list[Key] | None:
        """Memory for so many slots, or for as many as there is; returns the experts that were lost over it.

        None: all stays as it is, because of slots that may not move: they have numbers that there would not be, or old
        and new memory do not fit beside one another.
        """
        stuck = set(range(pool.slots)).difference(pool.free, (taken.slot.number for taken in movable))
        if any(number >= slots for number in stuck):
            return None
        # What has a number that stays keeps it; the others fill the gaps, as far as there are any.
        staying = [taken for taken in movable if taken.slot.number < slots]
        moving = [taken for taken in movable if taken.slot.number >= slots]
        gaps = sorted(set(range(min(slots, pool.slots))).difference(stuck, (taken.slot.number for taken in staying)))
        places = [(taken, taken.slot.number) for taken in staying] + list(zip(moving, gaps, strict=False))
        lost = moving[len(gaps) :]
        try:
            memory = self.streams.memory(slots, pool.slot_bytes)
        except torch.OutOfMemoryError:
            if stuck:
                return None
            places, lost = [], list(movable)
            memory = self._rest(pool, slots)
        pairs = [(memory[to], pool.memory[taken.slot.number]) for taken, to in places]
        pairs += [(memory[number], pool.memory[number]) for number in stuck]
        self.streams.copy(pairs, list(self._streams.values()))
        # Threads that compute with leased slots read the new memory from its first moment on.
        self.streams.synchronize()
        self.streams.retire(pool.memory, list(self._streams.values()))
        pool.renew(memory)
        # The lost die with their entries in the cache, and must not give back numbers of the new memory.
        for taken, to in [*places, *((taken, ABSENT) for taken in lost)]:
            self._numbers[taken.key] = taken.slot.number = to
        used = stuck.union(to for _, to in places)
        pool.free = [number for number in range(len(memory)) if number not in used]
        return [taken.key for taken in lost]

    def _rest(self, pool: DevicePool, slots: int) -> Tensor:
        """Memory for as many slots as there is, at most `slots`, when nothing of the old is needed any more."""
        self.streams.synchronize()
        pool.renew(self.streams.memory(0, pool.slot_bytes))
        self.streams.give_back()
        while True:
            try:
                return self.streams.memory(slots, pool.slot_bytes)
            except torch.OutOfMemoryError:
                if slots == 0:
                    raise
                slots = min(int(slots * _TRIED), self.streams.free_bytes() // pool.slot_bytes)

    def _collect(self) -> None:
        """Slots that nobody has any more are free."""
        while self._dead:
            slot, key = self._dead.pop()
            if slot.number != ABSENT:
                if self._numbers[key] == slot.number:
                    self._numbers[key] = ABSENT
                heapq.heappush(slot.pool.free, slot.number)
