"""Waiting for what other threads and processes do: a test that hangs fails instead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

# No measure of speed: whatever has not happened by then never will.
HANGS_S = 60.0


def until(condition: Callable[[], object], seconds: float = HANGS_S) -> None:
    """Returns once the condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    """A started thread that no hanging test waits for."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def run_all(clients: Sequence[threading.Thread], beside: threading.Thread, over: threading.Event) -> None:
    """Clients to their end, and a thread beside them that ends when `over` is set."""
    for thread in (beside, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    over.set()
    beside.join()
