"""This process: what it tells a user once, objects made whole in the child of a fork, and leaving in order.

A forked child has one thread, and the locks as they were. At the end of the interpreter daemon threads stop outside of
torch before it goes.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Protocol


def usable_cores() -> int:
    """How many processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def disk_reads() -> tuple[int | None, int | None]:
    """(bytes that the kernel read from storage for this process, its major faults), so far; None where nobody tells."""
    try:
        io, stat = (Path(f"/proc/self/{name}").read_text(encoding="ascii", errors="replace") for name in ("io", "stat"))
        # proc(5): majflt is the twelfth field; the second may hold spaces and ends with the last parenthesis.
        faults = int(stat.rpartition(")")[2].split()[9])
        return next(int(line.split()[1]) for line in io.splitlines() if line.startswith("read_bytes:")), faults
    except (OSError, ValueError, IndexError, StopIteration):
        return None, None


class Forkable(Protocol):
    """Holds locks or threads."""

    def after_fork(self) -> None:
        """In the child: new locks, no threads, and nothing that the parent's other threads were doing."""
        ...


_KEPT: weakref.WeakSet[Forkable] = weakref.WeakSet()


def mend_after_fork(thing: Forkable) -> None:
    """Call its `after_fork` in every child, as long as it lives."""
    _KEPT.add(thing)


def _mend() -> None:
    for thing in list(_KEPT):
        thing.after_fork()


if hasattr(os, "register_at_fork"):
    # In the child only: the parent's threads and locks are as they were.
    os.register_at_fork(after_in_child=_mend)


# How long an exit waits for the threads inside, and how long one of them stays: a later exit hook may wait for it.
WAIT_S, STAY_S = 1.0, 10.0
_LOOK_S = 0.002


class Exit:
    """The exit of this process: who is inside torch, who sleeps at a boundary. Any thread may call anything.

    until_s: how long threads stay at boundaries, by the monotonic clock; 0 before there is an exit.
    """

    def __init__(self) -> None:
        self.until_s, self._leaver = 0.0, 0
        self._lock = threading.Lock()
        self._depths: dict[int, int] = {}  # by thread
        self._loops: dict[int, threading.Thread] = {}
        self._asleep: set[int] = set()

    @property
    def begun(self) -> bool:
        """The calling thread has to stay where it is."""
        # No clock is asked before there is an exit: this runs at every step.
        return bool(self.until_s) and time.monotonic() < self.until_s and threading.get_ident() != self._leaver

    def wait_if_leaving(self) -> None:
        """A boundary: returns at once, unless the exit has begun."""
        if self.begun:
            me = threading.get_ident()
            self._asleep.add(me)
            time.sleep(max(0.0, self.until_s - time.monotonic()))
            self._asleep.discard(me)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Around work in torch, with or without boundaries within; may be nested."""
        self.wait_if_leaving()
        me = threading.get_ident()
        self._count(me, 1)
        try:
            yield
        finally:
            self._count(me, -1)  # whichever thread leaves
            self.wait_if_leaving()

    def register_loop(self) -> None:
        """The calling thread will pass boundaries, and may be inside torch between any two of them."""
        thread = threading.current_thread()
        # Other threads are waited for by the interpreter itself before it ends.
        if thread.daemon and self._loops.get(threading.get_ident()) is not thread:
            self._loops = {me: other for me, other in self._loops.items() if other.is_alive()}
            self._loops[threading.get_ident()] = thread

    def begin(self) -> None:
        """The exit begins, in the calling thread, which goes wherever it likes. Waits WAIT_S at most until all others
        sleep or are outside."""
        self._leaver, begin_s = threading.get_ident(), time.monotonic()
        self.until_s = begin_s + STAY_S
        while self._at_work() - self._asleep and time.monotonic() < begin_s + WAIT_S:
            time.sleep(_LOOK_S)

    def after_fork(self) -> None:
        """In the child: nobody else is inside."""
        me, self._lock = threading.get_ident(), threading.Lock()
        self._depths = {me: self._depths[me]} if me in self._depths else {}
        self._loops, self._asleep = {}, set()

    def _count(self, me: int, more: int) -> None:
        with self._lock:
            self._depths[me] = self._depths.get(me, 0) + more
            if self._depths[me] <= 0:
                del self._depths[me]

    def _at_work(self) -> set[int]:
        loops = {me for me, thread in list(self._loops.items()) if thread.is_alive()}
        return {*list(self._depths), *loops} - {self._leaver}


EXIT = Exit()
mend_after_fork(EXIT)


_logger = logging.getLogger("remoe_adapt")


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Log a warning, the first time it comes."""
    _logger.warning(message)


def size_text(size_bytes: float) -> str:
    """Bytes in the largest of B, KiB, MiB and GiB that is not more than they are."""
    for unit, digits, unit_bytes in (("GiB", 2, 1 << 30), ("MiB", 1, 1 << 20), ("KiB", 1, 1 << 10)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"
