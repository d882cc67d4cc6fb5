"""What a device gives when it is asked as a cache's misses ask: reads of one expert, a layer's misses at a time."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

from remoe_adapt.cache.blocks import map_pages
from remoe_adapt.cache.reading import BLOCK


class RawReads:
    """Reads of `read_bytes` (in whole blocks) at random places of a file, with O_DIRECT where it can be had.

    A burst of n is n such reads, at most `threads` at a time, into huge pages that are there already; the next one
    follows when all have ended. Sums run over all `replay` calls. A context manager.
    """

    def __init__(self, path: Path, read_bytes: int, threads: int) -> None:
        self.read_bytes = -(-read_bytes // BLOCK) * BLOCK
        self.bytes, self.seconds = 0, 0.0
        flag = getattr(os, "O_DIRECT", 0)
        try:
            self._fd, self.direct = os.open(path, os.O_RDONLY | flag), flag != 0
        except OSError:
            self._fd, self.direct = os.open(path, os.O_RDONLY), False
        self._places = max(1, path.stat().st_size // self.read_bytes)
        self._free = [map_pages(self.read_bytes) for _ in range(threads)]
        for buffer in self._free:
            buffer[:] = 0  # its pages are taken now
        self._random = random.Random(0)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> RawReads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    def replay(self, bursts: Iterable[int]) -> None:
        """Times these bursts."""
        for count in bursts:
            places = [self._random.randrange(self._places) * self.read_bytes for _ in range(count)]
            begin_s = time.perf_counter()
            self.bytes += sum(self._pool.map(self._read, places))
            self.seconds += time.perf_counter() - begin_s

    def _read(self, place: int) -> int:
        buffer = self._free.pop()  # as many as threads
        got = os.preadv(self._fd, [buffer.data], place)
        self._free.append(buffer)
        return got

    @property
    def bytes_per_s(self) -> float:
        """Over all bursts so far; nan before the first."""
        return self.bytes / self.seconds if self.seconds else float("nan")
