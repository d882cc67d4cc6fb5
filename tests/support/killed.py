"""A process that is killed in the middle of writing, for tests of what it leaves behind."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def killed_at_write(number: int, work: Callable[[], object]) -> bool:
    """Runs `work` in a fork of this process that gets SIGKILL in its os.pwrite of this number (from 0 on), half of it
    written. False when `work` ended before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a fork beside other threads, which the child does not need
        child = os.fork()
    if child == 0:
        real, left = os.pwrite, [number]

        def write(fd: int, data: Any, offset: int) -> int:
            if not left[0]:
                real(fd, bytes(data)[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return real(fd, data, offset)

        os.pwrite = write
        try:
            work()
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL


@contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Bytes by which the memory of this process grew at most inside the block, as Linux counts it."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    yield lambda: status("VmHWM") - before
