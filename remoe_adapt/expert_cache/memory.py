"""Memory of experts: anonymous mappings, so that what the cache gives up is neither held back nor split by malloc.

A block that its tensor no longer needs serves the next tensor of its size, which saves its page faults. Large ones are
of huge pages where the system has them: devices read those in fewer requests, measured 2.5 times as fast.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError

HUGE_PAGE = 2 << 20
# From this part of the allowed mappings on, a refusal is put down to their number: one request may need more than one
# (the system splits others for it), and other threads may unmap some before the count is read.
_NEARLY_ALL = 0.95


def map_pages(size: int) -> np.ndarray:
    """`size` bytes of anonymous memory, page aligned, of huge pages as far as whole ones fit into it.

    Raises ConfigError when the system has no more, of memory or of mappings.
    """
    try:
        return _map(size)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise _no_room(size) from error


def _map(size: int) -> np.ndarray:
    flags, huge = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, size // HUGE_PAGE * HUGE_PAGE
    if not huge or not hasattr(mmap, "MADV_HUGEPAGE"):
        return np.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=np.uint8)
    memory = mmap.mmap(-1, size + HUGE_PAGE, flags=flags)
    start = -np.frombuffer(memory, dtype=np.uint8).ctypes.data % HUGE_PAGE
    # The mapping ends where the memory ends, or a last huge page would reach beyond it. The bytes before `start` take
    # no memory, since nobody touches them.
    memory.resize(start + size)
    with contextlib.suppress(OSError):  # a system without them
        # Advice for a part would split the mapping in two, and a process may have only so many. The parts at both ends
        # are too short for a huge page.
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, dtype=np.uint8, offset=start)


def _no_room(size: int) -> ConfigError:
    what = f"{size} more bytes for experts cannot be had"
    try:
        limit = int(Path("/proc/sys/vm/max_map_count").read_text())
        with Path("/proc/self/maps").open("rb") as maps:
            used = sum(1 for _ in maps)
    except (OSError, ValueError):  # no such system, or nothing left to ask with
        limit = used = 0
    if limit and used >= _NEARLY_ALL * limit:
        return ConfigError(
            f"{what}: the process has {used} memory mappings, and vm.max_map_count is {limit}. Raise it (sysctl -w "
            f"vm.max_map_count={4 * limit}), or give the expert cache a smaller budget (its resize)."
        )
    return ConfigError(
        f"{what}: the system has no more memory for this process. Give the expert cache a smaller budget (its resize)."
    )


class Block:
    """`size` bytes of memory, lent to one user after another."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.memory: Any = map_pages(size)

    def lend(self) -> Any:
        """An object over these bytes that is the user's alone, so that its end is the end of the use."""
        # `memory` itself outlives its users, so a finalizer on it would never run.
        return np.frombuffer(self.memory.data, dtype=np.uint8)


class Blocks:
    """Page-aligned CPU memory for tensors; any number of threads at once. new: makes its blocks.

    Free blocks are kept while tensors of their sizes follow: whenever none fits, all go to the system first.
    """

    def __init__(self, new: Callable[[int], Block] = Block) -> None:
        self._new = new
        # No lock guards these lists: a finalizer runs wherever a tensor dies, perhaps in a thread that holds the lock.
        self._free: dict[int, list[Block]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, with arbitrary contents."""
        count = torch.Size(shape).numel()
        # At least one byte, because nothing can be mapped in length 0.
        return torch.frombuffer(self.take(max(1, count * dtype.itemsize)), dtype=dtype, count=count).view(shape)

    def take(self, size: int) -> Any:
        """`size` bytes, kept while a tensor made of them (torch.frombuffer) is."""
        try:
            block = self._free.get(size, []).pop()
        except IndexError:
            # Free blocks of other sizes serve nobody now, and would add to the budget.
            self.give_back()
            block = self._new(size)
        owner = block.lend()
        # The tensor's storage holds `owner`: the block is lent until the last user of the storage, as autograd, ends.
        weakref.finalize(owner, self._keep, block).atexit = False
        return owner

    def _keep(self, block: Block) -> None:
        self._free.setdefault(block.size, []).append(block)

    def give_back(self) -> None:
        """Free blocks go to the system."""
        self._free = {}
