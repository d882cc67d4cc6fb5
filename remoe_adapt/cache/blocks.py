"""Memory of experts: anonymous mappings, so that what the cache gives up is neither held back nor split by malloc.

A block that its tensor no longer needs serves the next tensor of its size, which saves its page faults.
"""

from __future__ import annotations

import mmap
import weakref

import numpy as np
import torch
from torch import Tensor


class Blocks:
    """Page-aligned CPU memory for tensors; any number of threads at once.

    Free blocks are kept while tensors of their sizes follow: whenever none fits, all go to the system first.
    """

    def __init__(self) -> None:
        # Appended to and popped from without a lock: finalizers run wherever a tensor dies.
        self._free: dict[int, list[mmap.mmap]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, with arbitrary contents."""
        count = torch.Size(shape).numel()
        return torch.frombuffer(self.take(max(1, count * dtype.itemsize)), dtype=dtype, count=count).view(shape)

    def take(self, size: int) -> np.ndarray:
        """`size` bytes, kept while a tensor made of them (torch.frombuffer) is."""
        try:
            block = self._free.get(size, []).pop()
        except IndexError:
            self.give_back()
            block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        owner = np.frombuffer(block, dtype=np.uint8)
        # The tensor's storage holds `owner`; who holds that storage, autograd for one, holds the block.
        weakref.finalize(owner, self._keep, block).atexit = False
        return owner

    def _keep(self, block: mmap.mmap) -> None:
        self._free.setdefault(len(block), []).append(block)

    def give_back(self) -> None:
        """Free blocks go to the system."""
        self._free = {}
