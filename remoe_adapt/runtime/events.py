"""What happened to a dial: swaps and samples, kept, handed to callbacks, and written as JSON lines.

Callbacks and the file have a thread of their own: the decoding thread, which makes the swaps, only puts them in a
queue. The thread keeps nobody alive: callbacks may hold the model, and the file is its controller's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from remoe_adapt.errors import ConfigError
from remoe_adapt.runtime.timings import rounded

_log = logging.getLogger("remoe_adapt")
_KEPT = 1000


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap. time_s: when, since the epoch; before, after: strengths; pressure: that `after` answers, None where a
    strength was set by hand; by: "hand" or "sensors"; reason: in words; swap_ms: what it took of the decoding thread.
    """

    time_s: float
    before: float
    after: float
    pressure: float | None
    by: str
    reason: str
    swap_ms: float


# What to hand on; an event to set when all before was handed on; None: the end.
_Queue = queue.SimpleQueue[Swap | dict[str, Any] | threading.Event | None]


class Events:
    """The last swaps of one dial, and who hears of them. Any thread may call anything."""

    def __init__(self) -> None:
        self._swaps: deque[Swap] = deque(maxlen=_KEPT)
        self._callbacks: list[Callable[[Swap], object]] = []
        self._file: IO[str] | None = None
        self._start_afresh()

    @property
    def swaps(self) -> list[Swap]:
        """The last thousand, oldest first."""
        return list(self._swaps)

    @property
    def recording(self) -> bool:
        """Samples are wanted: they go to a file."""
        return self._file is not None

    def swap(self, swap: Swap) -> None:
        """A swap was made."""
        self._swaps.append(swap)
        if self._callbacks or self._file is not None:
            self._put(swap)

    def sample(self, values: dict[str, Any]) -> None:
        """What the sensors say at one moment; it goes to the file alone."""
        if self._file is not None:
            self._put({"event": "sample", "time_s": time.time(), **values})

    def subscribe(self, callback: Callable[[Swap], object]) -> Callable[[], None]:
        """Call `callback` after every swap, in order, in a thread of the log's own; returns what ends it.

        An exception in it is logged. Raises ConfigError when it cannot be called.
        """
        if not callable(callback):
            raise ConfigError(f"on_swap {callback!r}: give something that takes a Swap, as a function.")
        self._callbacks.append(callback)

        def remove() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return remove

    def write_to(self, path: str | os.PathLike[str] | None) -> None:
        """Append swaps and samples to this file from now on, one JSON object a line; None ends that.

        Raises ConfigError when the file cannot be written.
        """
        try:
            opened = None if path is None else Path(path).open("a", encoding="utf-8")  # noqa: SIM115 kept open
        except (OSError, ValueError, TypeError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError(f"log {str(path)!r} cannot be written ({why}): give another file.") from error
        self.flush()
        before, self._file = self._file, opened
        if before is not None:
            before.close()

    def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all that has happened was written and handed to callbacks. Not from a callback."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            done = threading.Event()
            self._queue.put(done)
            done.wait(timeout_s)

    def close(self) -> None:
        """No more callbacks and no file; swaps stay readable. From a callback: what is behind it is written first."""
        if self._thread is threading.current_thread():
            self._callbacks.clear()
            self._write_rest()
        self.flush()
        self._callbacks.clear()
        self.write_to(None)
        self._queue.put(None)

    def after_fork(self) -> None:
        """In the child: its copy goes on without the parent's thread, callbacks and file."""
        self._callbacks, self._file = [], None
        self._start_afresh()

    def __del__(self) -> None:
        """Let go of without `close`, as with a model that nobody needs."""
        self._queue.put(None)
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _start_afresh(self) -> None:
        self._queue: _Queue = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def _put(self, item: Swap | dict[str, Any]) -> None:
        self._queue.put(item)
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=_deliver, args=(weakref.ref(self), self._queue), name="remoe-events", daemon=True
                    )
                    self._thread.start()

    def _write_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._queue.get_nowait()
                if isinstance(item, threading.Event):
                    item.set()
                elif item is not None:
                    self._write(item)

    def _hand_on(self, item: Swap | dict[str, Any]) -> None:
        self._write(item)
        if isinstance(item, Swap):
            for callback in list(self._callbacks):
                try:
                    callback(item)
                except Exception:
                    _log.exception("on_swap callback %r failed", callback)

    def _write(self, item: Swap | dict[str, Any]) -> None:
        file = self._file
        if file is None:
            return
        line = {"event": "swap", **asdict(item)} if isinstance(item, Swap) else item
        try:
            file.write(json.dumps(rounded(line)) + "\n")
            file.flush()
        except (OSError, ValueError) as error:  # full disk; closed meanwhile
            _log.warning("log %s: %s; nothing more is written to it", file.name, error)
            self._file = None
            with contextlib.suppress(OSError, ValueError):  # what it could not write
                file.close()

    def _has_ended(self) -> None:
        with self._lock:
            self._thread = None


def _deliver(events: weakref.ref[Events], items: _Queue) -> None:
    while (item := items.get()) is not None:
        if isinstance(item, threading.Event):
            item.set()
            continue
        log = events()
        if log is None:
            return
        log._hand_on(item)
        del log
    log = events()
    if log is not None:
        log._has_ended()
