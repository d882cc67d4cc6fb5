"""Ctrl-C held back while shared state is half changed, and let through where nothing is.

Python runs signal handlers between any two bytecodes of the main thread. One that raises (KeyboardInterrupt, a time
limit) can leave a lock taken even inside `threading.Condition`, or bookkeeping torn before any `try` has begun. So
between `hold` and `release` every handler that was set in Python is replaced by one that remembers the signal. It is
handled at the end, or earlier where code says that it may be: in `let_through`, and in `handle_pending`.

Other threads never run handlers; for them all of this does nothing.
"""

from __future__ import annotations

import importlib
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from remoe_adapt._support.process import mend_after_fork

# The functions below `signal`'s own, which turn numbers into enums and back: that costs 20 times as much.
_signals: Any = importlib.import_module("_signal")
# The first is the one that matters most: what comes while handlers are being replaced is handled as before.
_NAMES = ("SIGINT", "SIGTERM", "SIGALRM", "SIGVTALRM", "SIGPROF", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
_NUMBERS = tuple(int(getattr(signal, name)) for name in _NAMES if hasattr(signal, name))
# While a thread waits, signals that came are looked for so often.
POLL_S = 0.05


class _MainThread:
    """Touched by the main thread alone. levels: for each `hold` that is not over, whether signals were held before."""

    def __init__(self) -> None:
        self.ident = threading.main_thread().ident
        self.levels: list[bool] = []
        self.held = False
        # The handlers that stand replaced, or did lately: `_note` may be found set where a replacement was interrupted.
        self.replaced: dict[int, Any] = {}
        self.pending: dict[int, FrameType | None] = {}

    def after_fork(self) -> None:
        """The child's only thread is its main thread; a hold of another thread is never released there."""
        ident = threading.main_thread().ident
        if ident != self.ident:
            self.ident, self.levels, self.held = ident, [], False
            _restore()


_main = _MainThread()
mend_after_fork(_main)


def _note(number: int, frame: FrameType | None) -> None:
    if _main.held:
        _main.pending[number] = frame
    else:
        _handle({number: frame})


def _handle(came: dict[int, FrameType | None]) -> None:
    # A handler may raise: what cleans up then is not disturbed by the next signal, if a hold is around it.
    before, _main.held = _main.held, bool(_main.levels)
    for number, frame in came.items():
        _main.replaced[number](number, frame)
    _main.held = before


def _restore() -> None:
    for number, handler in _main.replaced.items():
        if _signals.getsignal(number) is _note:  # else somebody has set another one meanwhile
            _signals.signal(number, handler)


def hold() -> None:
    """From now on signals wait for `release`. May be nested."""
    if threading.get_ident() != _main.ident:
        return
    if _main.levels:
        before, _main.held = _main.held, True
        _main.levels.append(before)
        return
    try:
        for number in _NUMBERS:
            handler = _signals.getsignal(number)
            if callable(handler) and handler is not _note:
                _main.replaced[number] = handler
                _signals.signal(number, _note)
        _main.pending = {}
        _main.held = True
        _main.levels.append(False)
    except BaseException:  # a handler has raised meanwhile: nobody will release what is replaced by then
        _restore()
        raise


def release() -> None:
    """The end of a `hold`; signals that came are handled when it is the outermost, or one in `let_through`."""
    if threading.get_ident() != _main.ident or not _main.levels:
        return
    before = _main.levels.pop()
    if _main.levels:
        _main.held = before
        if not before:
            handle_pending()
        return
    _main.held = False
    try:
        _restore()
    finally:
        came, _main.pending = _main.pending, {}
        _handle(came)


def handle_pending() -> None:
    """Handle the signals that came since they are held back: it may raise here, and here only."""
    if _main.pending and threading.get_ident() == _main.ident:
        came, _main.pending = _main.pending, {}
        _handle(came)


class held_back:
    """A block in which signals wait."""

    __slots__ = ()

    def __enter__(self) -> None:
        hold()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        release()


class let_through:
    """A part of a block in which signals wait where they do not; left by an exception or not, they wait again."""

    __slots__ = ()

    def __enter__(self) -> None:
        if threading.get_ident() == _main.ident:
            _main.held = False
            handle_pending()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if threading.get_ident() == _main.ident:
            _main.held = bool(_main.levels)


class HeldCondition(threading.Condition):
    """A condition in whose lock signals wait, so that it is never left taken, and nothing under it half done."""

    def __init__(self) -> None:
        self._held_lock = threading.RLock()
        super().__init__(self._held_lock)

    def __enter__(self) -> bool:
        hold()
        return self._held_lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._held_lock.release()
        release()

    def wait(self, timeout: float | None = None) -> bool:
        """Condition's wait, but it ends now and then for nothing, and signals that came are handled: it may raise."""
        notified = super().wait(POLL_S if timeout is None else min(timeout, POLL_S))
        handle_pending()
        return notified
