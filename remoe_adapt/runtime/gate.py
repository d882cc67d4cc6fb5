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

    def __init__(self, stack: list[Session]) -> None:
        self.stack = stack
        stack.append(self)


class Gate:
    """Decides when a swap may be made; `waiting()` tells whether one is posted, `swap(alone)` makes it.

    `alone` is False where forwards of other threads may still be queued on an accelerator. Every entry point may be
    called from any thread. A thread at a step boundary makes the posted swap when no forward is in flight; else it
    waits for one swap at most, so neither swaps nor forwards starve. A thread whose outer forward is in flight (a
    generate inside a forward) neither waits nor swaps. When the interpreter exits, threads stay at their boundaries.
    """

    def __init__(self, waiting: Callable[[], bool], swap: Callable[[bool], None]) -> None:
        self.lock = threading.Condition()  # re-entrant
        self._waiting, self._swap = waiting, swap
        self._in_flight: set[Session] = set()
        self._slow: set[Session] = set()
        self._sessions: set[Session] = set()
        self._swaps = 0
        self._stack = threading.local()
        self._loop_thread: threading.Thread | None = None
        self._closing = self._closed = False

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
        stack = self._own_stack()
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
        if owns and self._loop_thread is not (me := threading.current_thread()):
            EXIT.loops()
            self._loop_thread = me
        # The common case is worth a shortcut: what is posted right after it waits for the next step anyway.
        if self._closing or EXIT.begun or self._waiting():
            self._come_by(None)

    def forward(self) -> AbstractContextManager[None]:
        """Around one forward of a hand-written loop: no swap of any thread while it is open."""
        return _Forward(self)

    # Swaps

    def swap_if_idle(self) -> None:
        """Make the posted swap now if nobody runs a session or a stepped loop; else it waits for their next step."""
        with self.lock:
            loop = self._loop_thread
            foreign_loop = loop is not None and loop is not threading.current_thread() and loop.is_alive()
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
                    self.lock.wait()
                yield
                self._closed = True
            finally:
                self._closing = False
                self.lock.notify_all()

    def after_fork(self) -> None:
        """In the child: the calling thread alone is left, and the lock may have been another one's."""
        self.lock = threading.Condition()
        own = self._own_stack()
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
        session = Session(self._own_stack())
        with self.lock:
            self._sessions.add(session)
            try:
                while self._closing and not self._own_forward_in_flight():
                    self.lock.wait()
            except BaseException:
                self._leave(session)
                raise
            self._in_flight.add(session)
        return session

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
            self.lock.wait(remaining if remaining > 0 else None)
        if self._swaps == swaps_seen:
            self._try_swap(alone=self._sessions <= set(self._own_stack()))

    def _must_wait(self) -> bool:
        return bool(self._in_flight) and not self._slow & self._in_flight and not self._closed and self._waiting()

    def _try_swap(self, *, alone: bool) -> None:
        if self._in_flight or self._closed or not self._waiting():
            return
        self._swaps += 1
        try:
            self._swap(alone)
        finally:
            self.lock.notify_all()

    def _enter(self) -> Session:
        session = Session(self._own_stack())
        with self.lock:
            self._sessions.add(session)
        return session

    def _leave(self, session: Session) -> None:
        session.stack.remove(session)  # of the thread that entered, whichever leaves
        with self.lock:
            self._sessions.discard(session)
            self._close_forward(session)
            self.swap_if_idle()  # a target that came during the last step

    def _close_forward(self, session: Session) -> None:
        if session in self._in_flight:
            self._in_flight.discard(session)
            self._slow.discard(session)
            self.lock.notify_all()

    def _own_stack(self) -> list[Session]:
        if not hasattr(self._stack, "sessions"):
            self._stack.sessions = []
        sessions: list[Session] = self._stack.sessions
        return sessions

    def _own_forward_in_flight(self) -> bool:
        return any(session in self._in_flight for session in self._own_stack())


class _Forward(AbstractContextManager[None]):
    """A class, for a generator would cost a decode step twice as much."""

    __slots__ = ("_gate", "_me", "_session")

    def __init__(self, gate: Gate) -> None:
        self._gate = gate

    def __enter__(self) -> None:
        self._me = threading.get_ident()
        EXIT.enter()
        try:
            self._session = self._gate._begin()
        except BaseException:
            EXIT.leave_torch(self._me)
            raise

    def __exit__(self, *error: object) -> None:
        try:
            self._gate._leave(self._session)
        finally:
            EXIT.leave_torch(self._me)
