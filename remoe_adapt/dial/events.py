"""What is asked of a dial, and what happened to it: swaps and samples, kept, handed to callbacks, written as JSON.

Callbacks and the file have a thread of their own: the decoding thread, which makes the swaps, only puts them in a
queue. The thread keeps nobody alive: callbacks may hold the model, and the file is its controller's.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import numbers
import os
import queue
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from remoe_adapt.errors import ConfigError

_log = logging.getLogger("remoe_adapt")
_KEPT = 1000
# Who asks: Target.by and Swap.by.
HAND, SENSORS = "hand", "sensors"
_SHOWN_DIGITS, _LEAST_PLACES = 6, 3


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of a dial.

    strength: from 0 (the base) to 1.
    pressure: that the strength answers, None where a strength was set by hand.
    reason: in words.
    by: HAND or SENSORS.
    """

    strength: float
    pressure: float | None = None
    reason: str = ""
    by: str = HAND


def unit(what: str, value: object) -> float:
    """A pressure or strength given by hand. Raises ConfigError for anything but a number in [0, 1]."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not 0.0 <= number <= 1.0:  # NaN fails too
        meaning = "0 (plenty) to 1 (thrashing)" if what == "pressure" else "0 (the base) to 1 (the strongest point)"
        raise ConfigError(f"{what} {value!r} is out of range: give a number from {meaning}.")
    return number


@dataclass(frozen=True, slots=True)
class Swap:
    """One swap.

    time_s: when, since the epoch.
    before, after: strengths.
    pressure: that `after` answers, None where a strength was set by hand.
    by: "hand" or "sensors".
    reason: in words.
    swap_ms: what it took of the decoding thread.
    """

    time_s: float
    before: float
    after: float
    pressure: float | None
    by: str
    reason: str
    swap_ms: float


class Event(NamedTuple):
    """One thing for the delivering thread to do.

    swap: to be written, and handed to the callbacks.
    sample: to be written.
    done: to be set when all before it was delivered.
    last: the thread ends after it.
    """

    swap: Swap | None = None
    sample: dict[str, Any] | None = None
    done: threading.Event | None = None
    last: bool = False


def rounded(value: Any) -> Any:
    """JSON-ready values with their floats to six digits, and to three decimals at least: for people and logs."""
    if isinstance(value, float) and math.isfinite(value) and value:
        return round(value, max(_LEAST_PLACES, _SHOWN_DIGITS - 1 - math.floor(math.log10(abs(value)))))
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


class Events:
    """The last swaps of one dial, and who is told of them. Any thread may call anything."""

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
        # This runs in the decoding thread between two steps: one append, one put, no I/O.
        self._swaps.append(swap)
        if self._callbacks or self._file is not None:
            self._put(Event(swap=swap))

    def sample(self, values: dict[str, Any]) -> None:
        """What the sensors say at one moment; it goes to the file alone."""
        if self._file is not None:
            self._put(Event(sample={"event": "sample", "time_s": time.time(), **values}))

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
        # What was queued for the old file is written to it before it is closed.
        self.flush()
        before, self._file = self._file, opened
        if before is not None:
            before.close()

    def flush(self, timeout_s: float = 5.0) -> None:
        """Wait until all that has happened was written and handed to callbacks. Not from a callback."""
        with self._lock:
            thread = self._thread
        if thread is not None and thread.is_alive() and thread is not threading.current_thread():
            # A marker in the queue: when it comes out, everything before it has been delivered.
            done = threading.Event()
            self._queue.put(Event(done=done))
            done.wait(timeout_s)

    def close(self) -> None:
        """No more callbacks and no file; swaps stay readable. From a callback: what is behind it is written first."""
        if self._thread is threading.current_thread():
            self._callbacks.clear()
            self._write_rest()
        self.flush()
        self._callbacks.clear()
        self.write_to(None)
        # The thread ends by a message, since it may be blocked in `get` for ever otherwise.
        self._queue.put(Event(last=True))

    def after_fork(self) -> None:
        """In the child: its copy goes on without the parent's thread, callbacks and file."""
        self._callbacks, self._file = [], None
        self._start_afresh()

    def __del__(self) -> None:
        """Let go of without `close`, as with a model that nobody needs."""
        self._queue.put(Event(last=True))
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()

    def _start_afresh(self) -> None:
        self._queue: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    def _put(self, event: Event) -> None:
        self._queue.put(event)
        if self._thread is None:
            # Two swaps of two threads must not start two deliverers, which would mix up the order.
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(
                        target=_run, args=(weakref.ref(self), self._queue), name="remoe-events", daemon=True
                    )
                    self._thread.start()

    def _write_rest(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                event = self._queue.get_nowait()
                self._write(event)
                if event.done is not None:
                    event.done.set()

    def _deliver(self, event: Event) -> None:
        self._write(event)
        if event.swap is not None:
            # A copy, for a callback may remove itself.
            for callback in list(self._callbacks):
                try:
                    callback(event.swap)
                except Exception:
                    _log.exception("on_swap callback %r failed", callback)
        if event.last:
            with self._lock:
                self._thread = None

    def _write(self, event: Event) -> None:
        file, line = self._file, event.sample
        if event.swap is not None:
            line = {"event": "swap", **asdict(event.swap)}
        if file is None or line is None:
            return
        try:
            file.write(json.dumps(rounded(line)) + "\n")
            file.flush()
        except (OSError, ValueError) as error:  # full disk; closed meanwhile
            _log.warning("log %s: %s; nothing more is written to it", file.name, error)
            self._file = None
            with contextlib.suppress(OSError, ValueError):  # what it could not write
                file.close()


def _run(log_ref: weakref.ref[Events], queued: queue.SimpleQueue[Event]) -> None:
    """The delivering thread; it holds the log only while it delivers, so that a model nobody needs can go."""
    while True:
        event = queued.get()
        # Only now, after the wait: a reference held while waiting would keep every dropped model alive.
        log = log_ref()
        if log is not None:
            log._deliver(event)
        if event.done is not None:
            event.done.set()
        if event.last or log is None:
            return
        del log, event
