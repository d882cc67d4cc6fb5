"""Slots of one size in one mapping: slot n lies at `address + n * slot_bytes`, all that a kernel needs to know.

Kernels that compute on chosen experts take slot numbers, and find each matrix at a constant distance from the next. One
mapping for all slots also keeps a model of thousands of experts far from the system's limit of mappings.

The address range is as large as if every expert had its slot, but only slots that were written take memory. What is
free is used again, lowest number first, so that the slots in use stay together; `give_back` returns its memory.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import heapq
import itertools
import mmap
import sys
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remoe_adapt._support import say_once, size_text
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.memory import HUGE_PAGE

# Offset in the slot (bytes), shape and dtype of each of its tensors, by name.
Parts = Mapping[str, tuple[int, tuple[int, ...], torch.dtype]]
# Direct reads fill whole pages, and a GPU registers whole pages.
PAGE = 4096
# Without it the system may refuse an address range larger than its memory, though only a part will ever be touched.
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
# Slots per expert in the address range: autograd may hold a slot while its expert is read again into another one.
_RESERVED = 2


class PoolSlot(dict[str, Tensor]):
    """One slot, which is taken as long as this object or a tensor over its memory lives; its tensors by name.

    number: of the slot in its pool.
    memory: its bytes, page aligned, uint8 [slot_bytes].
    parts: what `lay_out` was given.
    """

    __slots__ = ("memory", "number", "parts")

    def __init__(self, number: int, memory: np.ndarray) -> None:
        super().__init__()
        self.number, self.memory = number, memory
        self.parts: Parts = {}

    @property
    def bytes_B(self) -> Tensor:
        """All of its memory, uint8 [slot_bytes]."""
        return torch.frombuffer(self.memory, dtype=torch.uint8)

    def lay_out(self, parts: Parts) -> PoolSlot:
        """Have a tensor over each of these parts of the memory; returns itself. Nothing is written.

        Raises ConfigError for a part that does not lie in the slot.
        """
        self.update(views(self.memory, parts))
        self.parts = parts
        return self


def views(memory: np.ndarray, parts: Parts) -> dict[str, Tensor]:
    """A tensor over each of these parts of the memory of a slot, by name.

    Raises ConfigError for a part that does not lie in it.
    """
    size, found = memory.nbytes, {}
    for name, (offset, shape, dtype) in parts.items():
        count = 1
        for length in shape:
            count *= length
        if offset < 0 or offset + count * dtype.itemsize > size:
            raise ConfigError(f"{name} {shape} of {dtype} at byte {offset} does not lie in a slot of {size} bytes.")
        # A storage for each tensor, so that a saved tensor's storage tells which parameter it is.
        found[name] = (
            torch.frombuffer(memory, dtype=dtype, count=count, offset=offset).view(shape)
            if count
            else torch.empty(shape, dtype=dtype)
        )
    return found


class Pins:
    """Registers memory for a GPU, which copies from registered memory by itself, beside its kernels.

    Where the system refuses (its limit of locked memory), memory stays pageable from then on, and that is said once:
    copies are then made through the driver's own buffers, and the calling thread waits for them.

    device: whose copies they are for.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.refused = False

    def pin(self, address: int, size: int) -> bool:
        """Whether these bytes are registered now."""
        if self.refused:
            return False
        with torch.cuda.device(self._device):
            failed = int(torch.cuda.cudart().cudaHostRegister(address, size, 0))
        if failed:
            self.refused = True
            say_once(
                f"no more RAM can be pinned for {self._device} (CUDA error {failed}): experts beyond what is pinned "
                "lie in pageable memory, from which each copy to the GPU takes longer. Raise the limit of locked "
                "memory (ulimit -l), or lower ram_budget."
            )
        return not failed

    def unpin(self, address: int) -> None:
        """Undo a `pin` that returned True; before the memory is given back."""
        # At the end of the process CUDA may be gone, with all that was registered.
        if not sys.is_finalizing():
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(address)


class SlotPool:
    """CPU memory for slots of one size; any number of threads at once.

    `address` is where slot 0 begins, `slot_bytes` from one slot to the next, `slots` how many the range has.

    slot_bytes: of one slot, rounded up to whole pages.
    slots: how many there may be at a time.
    pins: registers each slot when it is first used; None: pageable memory.
    on_growth: called before a slot takes memory that the pool does not have yet.

    Raises ConfigError where the system has no such range of addresses.
    """

    def __init__(
        self,
        slot_bytes: int,
        slots: int,
        *,
        pins: Pins | None = None,
        on_growth: Callable[[], None] = lambda: None,
    ) -> None:
        if slot_bytes < 1 or slots < 1:
            raise ConfigError(f"a pool of {slots} slots of {slot_bytes} bytes: give at least one of each.")
        self.slot_bytes = -(-slot_bytes // PAGE) * PAGE
        self._pins, self._on_growth = pins, on_growth
        self._pinned: set[int] = set()
        self._memory, self._start, self.slots = _reserve(self.slot_bytes, slots)
        self.address: int = np.frombuffer(self._memory, dtype=np.uint8).ctypes.data + self._start
        # No lock guards these: a finalizer runs wherever a tensor dies, perhaps in a thread that holds the lock. Each
        # operation of theirs is one step of the interpreter. Written slots have memory, clean ones gave it back.
        self._written: list[int] = []
        self._clean: list[int] = []
        self._fresh = itertools.count()
        # Registering two slots at once, or one while another is given back, is the only thing that needs an order.
        self._pinning = threading.Lock()

    def __del__(self) -> None:
        # Memory must be unregistered before it is unmapped; the mapping goes after this object.
        pins = getattr(self, "_pins", None)
        if pins is not None:
            for number in self._pinned:
                pins.unpin(self.address + number * self.slot_bytes)

    @property
    def free_bytes(self) -> int:
        """Memory of free slots, kept for the next ones."""
        return len(self._written) * self.slot_bytes

    def take(self) -> PoolSlot:
        """A slot with arbitrary contents, the lowest that is free.

        Raises ConfigError when all are taken.
        """
        try:
            number = heapq.heappop(self._written)
        except IndexError:
            self._on_growth()
            number = self._grow()
        memory = np.frombuffer(
            self._memory, dtype=np.uint8, count=self.slot_bytes, offset=self._start + number * self.slot_bytes
        )
        # Every tensor's storage holds `memory`: the slot is taken until the last user of a storage, as autograd, ends.
        # The finalizer holds the pool, so that the pool outlives its slots.
        weakref.finalize(memory, self._keep, number).atexit = False
        return PoolSlot(number, memory)

    def slot(self, parts: Parts) -> PoolSlot:
        """A slot with these tensors; raises as `take` and `lay_out`."""
        return self.take().lay_out(parts)

    def is_pinned(self, number: int) -> bool:
        """Whether a GPU copies from this slot by itself."""
        return number in self._pinned

    def give_back(self) -> None:
        """Memory of free slots goes to the system."""
        freed: list[int] = []
        with contextlib.suppress(IndexError):
            while True:
                freed.append(heapq.heappop(self._written))
        if self._pins is not None:
            with self._pinning:
                for number in self._pinned.intersection(freed):
                    self._pins.unpin(self.address + number * self.slot_bytes)
                    self._pinned.discard(number)
        # Neighbours in one call, so that a huge page over both of them goes as a whole.
        for first, count in _runs(freed):
            with contextlib.suppress(AttributeError, OSError):  # a system that cannot take memory back from a mapping
                self._memory.madvise(mmap.MADV_DONTNEED, self._start + first * self.slot_bytes, count * self.slot_bytes)
        for number in freed:
            heapq.heappush(self._clean, number)

    def _grow(self) -> int:
        """The lowest number that has no memory yet; of a written one when there is no such number left."""
        try:
            number = heapq.heappop(self._clean)
        except IndexError:
            number = next(self._fresh)
            if number >= self.slots:
                return self._found_again()
        if self._pins is not None:
            try:
                with self._pinning:
                    if self._pins.pin(self.address + number * self.slot_bytes, self.slot_bytes):
                        self._pinned.add(number)
            except BaseException:
                heapq.heappush(self._clean, number)
                raise
        return number

    def _found_again(self) -> int:
        # Tensors in reference cycles hold their slots until Python looks for such cycles.
        gc.collect()
        for free in (self._written, self._clean):
            with contextlib.suppress(IndexError):
                return heapq.heappop(free)
        raise ConfigError(
            f"all {self.slots} slots of {size_text(self.slot_bytes)} are taken: the process may have no more addresses "
            "(ulimit -v, vm.overcommit_memory), or tensors of experts are kept. Give the expert cache a smaller budget "
            "(its resize)."
        )

    def _keep(self, number: int) -> None:
        heapq.heappush(self._written, number)


class Pools:
    """A pool for each size of slot that a model has.

    A free slot of one size serves nobody who needs another: whenever a pool takes more memory, the free slots of the
    others give theirs back first, or both together would exceed the budget.

    slot_bytes: by layer, of one slot.
    num_experts: by layer.
    device: of the GPU that copies from them; None: of none, the memory is not pinned.
    """

    def __init__(
        self, slot_bytes: Sequence[int], num_experts: Sequence[int], *, device: torch.device | None = None
    ) -> None:
        sizes = [-(-size // PAGE) * PAGE for size in slot_bytes]
        counts: dict[int, int] = {}
        for size, count in zip(sizes, num_experts, strict=True):
            counts[size] = counts.get(size, 0) + count
        pins = None if device is None else Pins(device)
        self.pools = {
            size: SlotPool(size, _RESERVED * count, pins=pins, on_growth=_GiveBackOthers(self, size))
            for size, count in counts.items()
        }
        self._of_layer = [self.pools[size] for size in sizes]

    def of(self, layer: int) -> SlotPool:
        """The pool of a layer's slots."""
        return self._of_layer[layer]

    def give_back(self) -> None:
        """Memory of free slots goes to the system."""
        for pool in self.pools.values():
            pool.give_back()


class _GiveBackOthers:
    """Before one pool grows, the others give their free memory back. It does not keep the pools alive."""

    def __init__(self, pools: Pools, size: int) -> None:
        self._pools, self._size = weakref.ref(pools), size

    def __call__(self) -> None:
        pools = self._pools()
        for size, pool in pools.pools.items() if pools is not None else ():
            if size != self._size and pool.free_bytes:
                pool.give_back()


def _reserve(slot_bytes: int, slots: int) -> tuple[mmap.mmap, int, int]:
    """A range of addresses for as many of these slots as the system gives, at least one: it, where the first slot
    begins in it, and how many there are. It takes no memory yet."""
    huge = slot_bytes >= HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE")
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    while True:
        try:
            memory = mmap.mmap(-1, slot_bytes * slots + huge * HUGE_PAGE, flags=flags)
            break
        except (OSError, OverflowError, ValueError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENOMEM, errno.EAGAIN):
                raise
            # A process may have a limit of addresses (ulimit -v) that its budget keeps to.
            if slots == 1:
                raise ConfigError(
                    f"no range of {size_text(slot_bytes)} for a slot can be had: the process has a limit of addresses "
                    "(ulimit -v), or the system has no more memory (vm.overcommit_memory)."
                ) from error
            slots //= 2
    start = 0
    if huge:
        start = -np.frombuffer(memory, dtype=np.uint8).ctypes.data % HUGE_PAGE
        with contextlib.suppress(OSError):  # a system without them
            # For the whole mapping: advice for a part would split it.
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory, start, slots


def _runs(numbers: Sequence[int]) -> list[tuple[int, int]]:
    """Rising numbers as runs: (first, count)."""
    found: list[tuple[int, int]] = []
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        members: list[Any] = list(run)
        found.append((members[0][1], len(members)))
    return found
