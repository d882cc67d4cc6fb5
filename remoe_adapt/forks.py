"""This process: the cores it may use, and objects with locks and threads made whole in the child of a fork.

The child has one thread, and the locks as they were.
"""

from __future__ import annotations

import os
import weakref
from typing import Protocol


def usable_cores() -> int:
    """How many processor cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    os.register_at_fork(after_in_child=_mend)
