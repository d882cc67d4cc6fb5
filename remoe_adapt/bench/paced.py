"""A slower device than there is, for every read of its own: no slices of time, in which a token has all or nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence


class PacedReads:
    """Reads as a slower device gives them: one after the other at `bytes_per_s`, whoever asks; a `Reader`.

    A read that the device behind takes longer for ends when that has it.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock, self._free_s = threading.Lock(), 0.0

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        wanted = sum(len(buffer) for buffer in buffers)
        with self._lock:
            ends_s = self._free_s = max(self._free_s, time.perf_counter()) + wanted / self._bytes_per_s
        got = os.preadv(fd, buffers, offset)
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        return got
