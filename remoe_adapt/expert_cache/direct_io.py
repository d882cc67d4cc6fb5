"""Byte ranges of files read into memory of the caller: directly past the page cache or through it, with retries.

Neighbours in a file come in one read. A direct read moves whole blocks of the file; those that lie within one extent
go straight to its memory where device and addresses allow that, the others by way of a little memory of the reader.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from remoe_adapt._support import say_once
from remoe_adapt.checkpoints import Extent
from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.memory import map_pages

# As os.preadv: (file descriptor, buffers, offset) -> bytes read.
Reader = Callable[[int, Sequence[memoryview], int], int]
# An extent and the bytes it goes to.
_Part = tuple[Extent, np.ndarray]

# O_DIRECT wants offsets and lengths in multiples of the device's block; no device has larger ones.
BLOCK = 4096
# What does not go straight to its place is read in pieces of at most so many bytes.
CHUNK = 2 << 20
# Network disks fail now and then, and the next attempt succeeds; a bad sector fails each time.
ATTEMPTS = 4
# So long after the first failure, and n times as long after the n-th: 30 ms in all.
_PAUSE_S = 0.005


class ExtentReader:
    """Reads extents of these files, any number of threads at once; never by mapping them.

    direct_io: with O_DIRECT, where the file system has it (`direct_io` says so afterwards); else through the page
    cache, which is logged once. Files stay open, so that one that is deleted can still be read, until `close`.
    """

    def __init__(self, paths: Iterable[Path], *, direct_io: bool = False, reader: Reader = os.preadv) -> None:
        self._reader = reader
        # Memory for what does not go straight to its place: as many pieces as threads have read at a time. A list's
        # pop and append are atomic.
        self._scratch: list[np.ndarray] = []
        files = sorted(set(paths))
        self.direct_io = direct_io and all(_reads_directly(path) for path in files)
        if direct_io and not self.direct_io:
            say_once(
                f"the file system of {files[0].parent} has no direct I/O: experts are read through the page cache."
            )
        self._steps = {path: _memory_step(path) for path in files} if self.direct_io else {}
        self._fds: dict[Path, int] = {}
        # A reader that nobody closes is closed when it is collected: its files must not stay open.
        self.close = weakref.finalize(self, _close, self._fds)
        for path in files:
            try:
                self._fds[path] = os.open(path, os.O_RDONLY | (os.O_DIRECT if self.direct_io else 0))
            except OSError as error:
                self.close()
                raise ExpertReadError(f"{path} cannot be opened: {error.strerror}.") from error

    def fill(self, parts: Iterable[tuple[Extent, Tensor]]) -> None:
        """Read each extent into its contiguous CPU tensor of as many bytes.

        Raises ExpertReadError after ATTEMPTS failed or short reads; the tensors' contents are undefined then.
        """
        for run in _runs([(extent, _bytes_of(whole)) for extent, whole in parts]):
            start, last = run[0][0].offset, run[-1][0]
            if self.direct_io:
                try:
                    scratch = self._scratch.pop()
                except IndexError:
                    scratch = map_pages(CHUNK)
                self._read_blocks(run, last.offset + last.size, scratch)
                self._scratch.append(scratch)
            else:
                self._read(run, [place.data for _, place in run], start, last.offset + last.size - start)

    def _read_blocks(self, run: Sequence[_Part], end: int, scratch: np.ndarray) -> None:
        at = run[0][0].offset // BLOCK * BLOCK
        buffers: list[memoryview] = []
        aside: list[tuple[int, np.ndarray]] = []
        begun, used, blocks = at, 0, -(-(end - at) // BLOCK)
        # Pieces of equal size: a short last one would cost a request of its own.
        most = -(-blocks // -(-blocks * BLOCK // CHUNK)) * BLOCK
        for stop, place in _segments(run, at, end, self._steps[run[0][0].path]):
            while at < stop:
                size = stop - at
                if place is None:
                    size = min(size, most - used)
                    aside.append((at, scratch[used : used + size]))
                    used += size
                buffers.append((aside[-1][1] if place is None else place).data)
                at += size
                if used == most or at >= end:
                    self._read(run, buffers, begun, min(at, end) - begun)
                    _distribute(run, aside)
                    buffers, aside, begun, used = [], [], at, 0

    def _read(self, run: Sequence[_Part], buffers: Sequence[memoryview], offset: int, needed: int) -> None:
        """Fill the first `needed` bytes of `buffers`; more may be read."""
        done = attempts = 0
        fd = self._fds.get(run[0][0].path)
        # The number of a closed file may be another file's by now.
        if fd is None:
            raise ExpertReadError(f"{_where(run, offset)} at byte {offset}: the store is closed.")
        while done < needed:
            reason = "the file ends there"
            try:
                got = self._reader(fd, list(_rest(buffers, done)), offset + done)
            except OSError as error:
                got, reason = 0, os.strerror(error.errno) if error.errno else str(error)
            # A direct read that was cut short goes on at a block's start; the rest of the last block is read again.
            if self.direct_io and done + got < needed:
                got -= got % BLOCK
            if got <= 0:
                attempts += 1
                if attempts == ATTEMPTS:
                    at = max(offset + done, run[0][0].offset)
                    raise ExpertReadError(
                        f"{_where(run, at)} cannot be read at byte {at} ({reason}; {ATTEMPTS} attempts): check the "
                        "disk, or fetch the file again."
                    )
                time.sleep(_PAUSE_S * attempts)
            done += got


def _runs(parts: list[_Part]) -> Iterator[list[_Part]]:
    """Parts in the order of the files, those together that lie there without a gap."""
    run: list[_Part] = []
    for part in sorted(parts, key=lambda part: (part[0].path, part[0].offset)):
        if run and (run[-1][0].path, run[-1][0].offset + run[-1][0].size) != (part[0].path, part[0].offset):
            yield run
            run = []
        run.append(part)
    if run:
        yield run


def _segments(run: Sequence[_Part], at: int, end: int, step: int) -> Iterator[tuple[int, np.ndarray | None]]:
    """The blocks from `at` on, cut where their memory changes: (end, their place, or None where they have none)."""
    for extent, place in run:
        first, stop = -(-extent.offset // BLOCK) * BLOCK, (extent.offset + extent.size) // BLOCK * BLOCK
        skipped = first - extent.offset
        # The device writes to such addresses alone; other places get their bytes by way of the scratch memory.
        if first < stop and (place.ctypes.data + skipped) % step == 0:
            if at < first:
                yield first, None
            yield stop, place[skipped : skipped + stop - first]
            at = stop
    if at < end:
        yield -(-end // BLOCK) * BLOCK, None


def _distribute(run: Sequence[_Part], aside: Sequence[tuple[int, np.ndarray]]) -> None:
    """Copy what was read aside (file offset, bytes) to its places."""
    for start, memory in aside:
        for extent, place in run:
            first, stop = max(start, extent.offset), min(start + len(memory), extent.offset + extent.size)
            if first < stop:
                # numpy copies while other threads run, slices of memoryviews do not.
                np.copyto(place[first - extent.offset : stop - extent.offset], memory[first - start : stop - start])


def _rest(buffers: Sequence[memoryview], done: int) -> Iterator[memoryview]:
    for buffer in buffers:
        if done < len(buffer):
            yield buffer[done:]
        done = max(0, done - len(buffer))


def _where(run: Sequence[_Part], offset: int) -> str:
    extent = next((extent for extent, _ in reversed(run) if extent.offset <= offset), run[0][0])
    return f"{extent.path}: tensor {extent.tensor}"


def _bytes_of(tensor: Tensor) -> np.ndarray:
    flat: np.ndarray = tensor.reshape(-1).view(torch.uint8).numpy()
    return flat


def _reads_directly(path: Path) -> bool:
    """Whether the file system of `path` takes O_DIRECT."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            # Some file systems take the flag, and refuse only the read.
            os.preadv(fd, [map_pages(BLOCK).data], 0)
        finally:
            os.close(fd)
    except (OSError, AttributeError):  # AttributeError: a system without the flag
        return False
    return True


def _memory_step(path: Path) -> int:
    """What addresses of direct reads of `path` must be multiples of, as statx(2) tells since Linux 6.1; else BLOCK."""
    # Python 3.11 has no statx, so the struct is read by its offsets in the kernel's interface.
    at_fdcwd, dioalign, mask_bytes, mem_align_at, struct_bytes = -100, 0x2000, 4, 152, 256
    statx = getattr(ctypes.CDLL(None), "statx", None) if sys.platform == "linux" else None
    found = ctypes.create_string_buffer(struct_bytes)
    if statx is None or statx(at_fdcwd, os.fsencode(path), 0, dioalign, found):
        return BLOCK
    known = int.from_bytes(found.raw[:mask_bytes], sys.byteorder) & dioalign
    step = int.from_bytes(found.raw[mem_align_at : mem_align_at + mask_bytes], sys.byteorder)
    return step if known and step else BLOCK


def _close(fds: dict[Path, int]) -> None:
    # Out of the dict before it is closed: a later look-up must not find a number that is another file's by now.
    while fds:
        os.close(fds.popitem()[1])
