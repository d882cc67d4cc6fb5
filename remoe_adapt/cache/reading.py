"""Byte ranges of files read into memory of the caller: directly past the page cache or through it, with retries."""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from remoe_adapt.cache.shards import Extent
from remoe_adapt.errors import ExpertReadError
from remoe_adapt.notices import say_once

# As os.preadv: (file descriptor, buffers, offset) -> bytes read.
Reader = Callable[[int, Sequence[memoryview], int], int]

# O_DIRECT wants addresses, offsets and lengths in multiples of the device's block; no device has larger ones.
BLOCK = 4096
# Direct reads go through as much memory of each thread.
CHUNK = 2 << 20
ATTEMPTS = 4
_PAUSE_S = 0.005


class ExtentReader:
    """Reads extents of these files, any number of threads at once; never by mapping them.

    direct_io: with O_DIRECT, where the file system has it (`direct_io` says so afterwards); else through the page
    cache, which is logged once. Files stay open, so that one that is deleted can still be read, until `close`.
    """

    def __init__(self, paths: Iterable[Path], *, direct_io: bool = False, reader: Reader = os.preadv) -> None:
        self._reader, self._scratch = reader, threading.local()
        files = sorted(set(paths))
        self.direct_io = direct_io and all(_reads_directly(path) for path in files)
        if direct_io and not self.direct_io:
            say_once(
                f"the file system of {files[0].parent} has no direct I/O: experts are read through the page cache."
            )
        self._fds: dict[Path, int] = {}
        # At the latest when nothing needs the reader any more.
        self.close = weakref.finalize(self, _close, self._fds)
        for path in files:
            self._fds[path] = os.open(path, os.O_RDONLY | (os.O_DIRECT if self.direct_io else 0))

    def fill(self, extents: Sequence[Extent], whole: Tensor) -> None:
        """Read `extents`, one after another, into a contiguous CPU tensor of as many bytes.

        Raises ExpertReadError after ATTEMPTS failed or short reads; the tensor's contents are undefined then.
        """
        view = _bytes_of(whole)
        start = 0
        for extent in extents:
            part = view[start : start + extent.size]
            start += extent.size
            if not self.direct_io:
                self._read(extent, part, extent.offset, extent.size)
                continue
            done = 0
            while done < extent.size:
                head = (extent.offset + done) % BLOCK
                size = min(extent.size - done, CHUNK - head)
                block = self._blocks(head + size)
                self._read(extent, block, extent.offset + done - head, head + size)
                part[done : done + size] = block[head : head + size]
                done += size

    def _blocks(self, size: int) -> memoryview:
        """This thread's aligned memory of at least `size` bytes, in whole blocks."""
        size = -(-size // BLOCK) * BLOCK
        kept: memoryview | None = getattr(self._scratch, "view", None)
        if kept is None or len(kept) < size:
            kept = self._scratch.view = _aligned(size)
        return kept[:size]

    def _read(self, extent: Extent, buffer: memoryview, offset: int, needed: int) -> None:
        """Fill the first `needed` bytes of `buffer`; more may be read."""
        done = attempts = 0
        fd = self._fds.get(extent.path)
        if fd is None:
            raise ExpertReadError(f"{extent.path}: tensor {extent.tensor} at byte {offset}: the store is closed.")
        while done < needed:
            reason = "the file ends there"
            try:
                got = self._reader(fd, [buffer[done:]], offset + done)
            except OSError as error:
                got, reason = 0, os.strerror(error.errno) if error.errno else str(error)
            if self.direct_io and done + got < needed:
                got -= got % BLOCK
            if got <= 0:
                attempts += 1
                if attempts == ATTEMPTS:
                    raise ExpertReadError(
                        f"{extent.path}: tensor {extent.tensor} cannot be read at byte {offset + done} ({reason}; "
                        f"{ATTEMPTS} attempts): check the disk, or fetch the file again."
                    )
                time.sleep(_PAUSE_S * attempts)
            done += got


def _bytes_of(tensor: Tensor) -> memoryview:
    flat: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return flat


def _aligned(size: int) -> memoryview:
    memory = torch.empty(size + BLOCK, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % BLOCK
    return _bytes_of(memory[start : start + size])


def _reads_directly(path: Path) -> bool:
    """Whether the file system of `path` takes O_DIRECT."""
    flag = getattr(os, "O_DIRECT", 0)
    try:
        fd = os.open(path, os.O_RDONLY | flag)
    except OSError:
        return False
    try:
        os.preadv(fd, [_aligned(BLOCK)], 0)
    except OSError:
        return False
    finally:
        os.close(fd)
    return flag != 0


def _close(fds: dict[Path, int]) -> None:
    while fds:
        os.close(fds.popitem()[1])
