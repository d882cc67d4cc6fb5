"""A readers-writer gate between forwards and swaps, built around the steps of `generate`.

Forwards of several threads run side by side (readers); a swap (writer) is made only while none of them is in flight.
The boundary between two forwards is known without touching the forward itself: a forward opens at
`prepare_inputs_for_generation` and closes at `_update_model_kwargs_for_generation`, both called by every decoding loop
of transformers, or at the end of `generate`. Nothing here runs inside traced code.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from remoe_adapt.errors import MergeStateError
from remoe_adapt.runtime.leaving import EXIT

# No forward waits longer than this for another one to end, so no chain of waiting threads can lock up.
PATIENCE_S = 1.0


class Session:
    """One `generate` call, or one announced forward; `Gate` keeps whether its forward is in flight.

    stack: the sessions of its thread, innermost last.
    """

    __slots__ = ("stack",)

    def __init__(self, stack: list[Session]) -> None:
        self.stack = stack
        stack.append(self)


class _Here(threading.local):
    """Of a thread. steps: it runs a hand-written loop, and its exit knows."""

    def __init__(self) -> None:
        self.thread, self.steps = threading.current_thread(), False
        self.sessions: list[Session] = []


class Gate:
    """Decides when a swap may be made; `waiting()` tells whether one is posted, `swap(alone)` makes it.

    `alone` is False where forwards of other threads may still be queued on an accelerator. Every entry point may be
    called from any thread. A thread at a step boundary makes the posted swap when no forward is in flight; else it
    waits for one swap at most, so neither swaps nor forwards starve. A thread whose outer forward is in flight (a
    generate inside a forward) neither waits nor swaps. When the interpreter exits, threads stay at their boundaries.
    """

    def __init__(self, waiting: Callable[[], bool], swap: Callable[[bool], None]) -> None:
        self._new_lock()
        self._waiting, self._swap = waiting, swap
        self._in_flight: set[Session] = set()
        self._slow: set[Session] = set()
        self._sessions: set[Session] = set()
        self._swaps = 0
        self._here = _Here()
        self._loop_thread: threading.Thread | None = None
        self._closing = self._closed = False

    def _new_lock(self) -> None:
        # Not the condition's own `with`, which costs a step several times as much; so does telling nobody.
        self.lock = threading.RLock()
        self._moved, self._waiters = threading.Condition(self.lock), 0

    @property
    def sessions(self) -> int:
        """How many generate calls and announced forwards are running."""
        return len(self._sessions)

    # Generate

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around a whole generate call. What it runs before its first step (an encoder) counts as a forward."""
        with EXIT.inside():
            session = self._enter()
            try:
                self.boundary(opens=True)
                yield
            finally:
                self._leave(session)

    def boundary(self, *, opens: bool) -> None:
        """The forward of this thread's innermost session has ended; `opens`: make or await a swap, begin the next one.

        Outside a session it is a plain `step`.
        """
        stack = self._here.sessions
        if not stack:
            if opens:
                self.step(owns=False)
            return
        with self.lock:
            self._close_forward(stack[-1])
        if opens:
            self._come_by(stack[-1])
        else:
            EXIT.stay_out()

    # Hand-written loops

    def step(self, *, owns: bool = True) -> None:
        """Between two forwards of a hand-written loop. With `owns`, other threads' targets wait for its next step."""
        if owns and self._loop_thread is not self._here.thread:
            self._announce()
            self._loop_thread = self._here.thread
        # The common case is worth a shortcut: what is posted right after it waits for the next step anyway.
        if self._closing or EXIT.until_s or self._waiting():
            self._come_by(None)

    def forward(self) -> AbstractContextManager[None]:
        """Around one forward of a hand-written loop: no swap of any thread while it is open."""
        return _Forward(self)

    # Swaps

    def swap_if_idle(self) -> None:
        """Make the posted swap now if nobody runs a session or a stepped loop; else it waits for their next step."""
        with self.lock:
            loop = self._loop_thread
            foreign_loop = loop is not None and loop is not self._here.thread and loop.is_alive()
            if not self._sessions and not foreign_loop:
                self._try_swap(alone=False)

    @contextmanager
    def closed_for_good(self) -> Iterator[None]:
        """Wait until no forward is in flight, hold all of them off meanwhile, and stay open for ever after.

        Raises MergeStateError inside a forward of this very thread.
        """
        with self.lock:
            if self._own_forward_in_flight():
                raise MergeStateError("the dial cannot be closed inside a forward of its model: close it afterwards.")
            self._closing = True
            try:
                while self._in_flight and not self._closed:  # another thread may have closed it meanwhile
                    self._wait(None)
                yield
                self._closed = True
            finally:
                self._closing = False
                self._tell()

    def after_fork(self) -> None:
        """In the child: the calling thread alone is left, and the lock may have been another one's."""
        self._new_lock()
        own = self._here.sessions
        self._in_flight &= set(own)
        self._slow &= set(own)
        self._sessions &= set(own)
        self._closing = False
        self._loop_thread = None

    def _come_by(self, session: Session | None) -> None:
        """Make or await a swap, then begin the forward of `session`, if any."""
        while True:
            EXIT.stay_out()
            with self.lock:
                self._swap_or_wait()
                if EXIT.begun:  # while it waited
                    continue
                if session is not None:
                    self._in_flight.add(session)
                return

    def _begin(self) -> Session:
        """A forward of its own session is in flight from now on."""
        self._announce()
        session = Session(self._here.sessions)
        with self.lock:
            self._sessions.add(session)
            if self._closing:
                self._await_opening(session)
            self._in_flight.add(session)
        return session

    def _announce(self) -> None:
        if not self._here.steps:
            EXIT.loops()
            self._here.steps = True

    # Under the lock

    def _swap_or_wait(self) -> None:
        if self._own_forward_in_flight():
            return
        swaps_seen, deadline = self._swaps, time.monotonic() + PATIENCE_S
        while self._closing or (self._must_wait() and self._swaps == swaps_seen):
            remaining = deadline - time.monotonic()
            if remaining <= 0 and not self._closing:
                self._slow |= self._in_flight  # do not wait for these again
                break
            self._wait(remaining if remaining > 0 else None)
        if self._swaps == swaps_seen:
            self._try_swap(alone=self._sessions <= set(self._here.sessions))

    def _await_opening(self, session: Session) -> None:
        try:
            while self._closing and not self._own_forward_in_flight():
                self._wait(None)
        except BaseException:
            self._leave(session)
            raise

    def _must_wait(self) -> bool:
        return bool(self._in_flight) and not self._slow & self._in_flight and not self._closed and self._waiting()

    def _try_swap(self, *, alone: bool) -> None:
        if self._in_flight or self._closed or not self._waiting():
            return
        self._swaps += 1
        try:
            self._swap(alone)
        finally:
            self._tell()

    def _enter(self) -> Session:
        session = Session(self._here.sessions)
        with self.lock:
            self._sessions.add(session)
        return session

    def _leave(self, session: Session) -> None:
        session.stack.remove(session)  # of the thread that entered, whichever leaves
        with self.lock:
            self._sessions.discard(session)
            self._close_forward(session)
            if self._waiting():  # a target that came during the last step
                self.swap_if_idle()

    def _close_forward(self, session: Session) -> None:
        if session in self._in_flight:
            self._in_flight.discard(session)
            self._slow.discard(session)
            self._tell()

    def _wait(self, timeout_s: float | None) -> None:
        self._waiters += 1
        try:
            self._moved.wait(timeout_s)
        finally:
            self._waiters -= 1

    def _tell(self) -> None:
        if self._waiters:
            self._moved.notify_all()

    def _own_forward_in_flight(self) -> bool:
        return any(session in self._in_flight for session in self._here.sessions)


class _Forward(AbstractContextManager[None]):
    """A class, for a generator would cost a decode step twice as much."""

    __slots__ = ("_gate", "_session")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        if EXIT.until_s:
            EXIT.stay_out()
        self._session = self._gate._begin()

    def __exit__(self, *error: object) -> None:
        self._gate._leave(self._session)
        if EXIT.until_s:
            EXIT.stay_out()
