"""A readers-writer lock whose readers are forwards and whose writer is a swap, taken at the steps of `generate`.

Forwards of several threads run side by side (readers); a swap (writer) is made only while none of them is in flight.
The boundary between two forwards is known without touching the forward itself: a forward begins at
`prepare_inputs_for_generation` and ends at `_update_model_kwargs_for_generation`, both called by every decoding loop
of transformers, or at the end of `generate`. Nothing here runs inside traced code.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from remoe_adapt._support import EXIT
from remoe_adapt.errors import DialError
from remoe_adapt.libraries import Handle, Patches, override

# No forward waits longer than this for another one to end, so no chain of waiting threads can lock up.
PATIENCE_S = 1.0
# So many of the last steps count for their median.
_KEPT_STEPS = 64


class Writer(Protocol):
    """Who swaps: asked and called by the thread that has come to a boundary, under the lock."""

    @property
    def waiting(self) -> bool:
        """A swap is posted."""
        ...

    def swap(self, *, alone: bool) -> None:
        """Make it; no forward is in flight. alone: none of other threads is queued on an accelerator either."""
        ...


class Session:
    """One `generate` call, or one announced forward; `StepLock` keeps whether its forward is in flight.

    stack: the sessions of its thread, innermost last.
    """

    __slots__ = ("stack",)

    def __init__(self, stack: list[Session]) -> None:
        self.stack = stack
        stack.append(self)


class _PerThread(threading.local):
    """exit_knows: EXIT was told that this thread runs a hand-written loop; step_began_s: None between loops."""

    def __init__(self) -> None:
        self.thread, self.exit_knows = threading.current_thread(), False
        self.sessions: list[Session] = []
        self.step_began_s: float | None = None


class StepLock:
    """Decides when a posted swap is made. Every method may be called from any thread.

    writer: who swaps.

    A thread at a boundary makes the posted swap when no forward is in flight; else it waits for one swap at most, so
    neither swaps nor forwards starve. A thread whose outer forward is in flight (a generate inside a forward) neither
    waits nor swaps. When the interpreter exits, threads stay at their boundaries.
    """

    def __init__(self, writer: Writer) -> None:
        self._new_lock()
        self._writer = writer
        self._in_flight: set[Session] = set()
        self._slow: set[Session] = set()
        self._sessions: set[Session] = set()
        self._swaps = 0
        self._local = _PerThread()
        self._loop_thread: threading.Thread | None = None
        self._closing = self._closed = False
        self._step_ms: deque[float] = deque(maxlen=_KEPT_STEPS)

    def _new_lock(self) -> None:
        # A step takes the lock itself: the condition's own `with`, and notifying nobody, cost several times as much.
        self.lock = threading.RLock()
        self._changed, self._waiters = threading.Condition(self.lock), 0

    @property
    def sessions(self) -> int:
        """How many generate calls and announced forwards are running."""
        return len(self._sessions)

    @property
    def tpot_ms(self) -> float | None:
        """Median duration of the last steps of all threads; None before the second."""
        steps = list(self._step_ms)
        return statistics.median(steps) if steps else None

    # Generate

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Around a whole generate call. What it runs before its first step (an encoder) counts as a forward."""
        self._local.step_began_s = None  # what lies between two calls is no step
        with EXIT.inside():
            session = self._enter()
            try:
                self._next_forward(session)
                yield
            finally:
                self._local.step_began_s = None
                self._leave(session)

    def begin_step(self) -> None:
        """A forward of this thread's innermost session begins: make or await a swap first. Outside a session, the
        posted swap is made as at `step`, and no loop is claimed."""
        local = self._local
        self._time_step(local)
        if local.sessions:
            self._next_forward(local.sessions[-1])
        elif self._closing or EXIT.until_s or self._writer.waiting:
            self._pass_boundary(None)

    def end_step(self) -> None:
        """The forward of this thread's innermost session has ended."""
        stack = self._local.sessions
        if stack:
            with self.lock:
                self._end_forward(stack[-1])
            EXIT.stay_out()

    # Hand-written loops

    def step(self) -> None:
        """Between two forwards of a hand-written loop, which is this thread's from now on: targets of other threads
        wait for its next step."""
        local = self._local
        self._time_step(local)
        if self._loop_thread is not local.thread:
            self._notify_exit()
            self._loop_thread = local.thread
        # A look without the lock is enough: what is posted right after it waits for the next step anyway.
        if self._closing or EXIT.until_s or self._writer.waiting:
            self._pass_boundary(None)

    def forward(self) -> AbstractContextManager[None]:
        """Around one forward of a hand-written loop: no swap of any thread while it is open."""
        return _Forward(self)

    # Swaps

    def swap_if_idle(self) -> None:
        """Make the posted swap now if nobody runs a session or a stepped loop; else it waits for their next step."""
        with self.lock:
            loop = self._loop_thread
            foreign_loop = loop is not None and loop is not self._local.thread and loop.is_alive()
            if not self._sessions and not foreign_loop:
                self._try_swap(alone=False)

    @contextmanager
    def closed_for_good(self) -> Iterator[None]:
        """Wait until no forward is in flight, hold all of them off meanwhile, and stay open for ever after.

        Raises DialError inside a forward of this very thread.
        """
        with self.lock:
            if self._inside_a_forward():
                raise DialError("the dial cannot be closed inside a forward of its model: close it afterwards.")
            self._closing = True
            try:
                while self._in_flight and not self._closed:  # another thread may have closed it meanwhile
                    self._wait(None)
                yield
                self._closed = True
            finally:
                self._closing = False
                self._notify()

    def after_fork(self) -> None:
        """In the child: the calling thread alone is left, and the lock may have been another one's."""
        self._new_lock()
        mine = set(self._local.sessions)
        self._in_flight &= mine
        self._slow &= mine
        self._sessions &= mine
        self._closing = False
        self._loop_thread = None

    def _time_step(self, local: _PerThread) -> None:
        now_s, began_s = time.perf_counter(), local.step_began_s
        if began_s is not None:
            self._step_ms.append((now_s - began_s) * 1e3)
        local.step_began_s = now_s

    def _next_forward(self, session: Session) -> None:
        with self.lock:
            self._end_forward(session)
        self._pass_boundary(session)

    def _pass_boundary(self, session: Session | None) -> None:
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
        """A forward of a session of its own is in flight from now on."""
        self._notify_exit()
        session = Session(self._local.sessions)
        with self.lock:
            self._sessions.add(session)
            if self._closing:
                self._wait_until_closed(session)
            self._in_flight.add(session)
        return session

    def _notify_exit(self) -> None:
        if not self._local.exit_knows:
            EXIT.loops()
            self._local.exit_knows = True

    # All below is called under the lock, but for `_enter` and `_leave`, which take it.

    def _swap_or_wait(self) -> None:
        if self._inside_a_forward():
            return
        swaps_seen, deadline = self._swaps, time.monotonic() + PATIENCE_S
        while self._closing or (self._must_wait() and self._swaps == swaps_seen):
            remaining = deadline - time.monotonic()
            if remaining <= 0 and not self._closing:
                self._slow |= self._in_flight  # else every step would wait for these again
                break
            self._wait(remaining if remaining > 0 else None)
        if self._swaps == swaps_seen:
            self._try_swap(alone=self._sessions <= set(self._local.sessions))

    def _wait_until_closed(self, session: Session) -> None:
        try:
            while self._closing and not self._inside_a_forward():
                self._wait(None)
        except BaseException:
            self._leave(session)
            raise

    def _must_wait(self) -> bool:
        return bool(self._in_flight) and not self._slow & self._in_flight and not self._closed and self._writer.waiting

    def _try_swap(self, *, alone: bool) -> None:
        if self._in_flight or self._closed or not self._writer.waiting:
            return
        self._swaps += 1
        try:
            self._writer.swap(alone=alone)
        finally:
            self._notify()

    def _enter(self) -> Session:
        session = Session(self._local.sessions)
        with self.lock:
            self._sessions.add(session)
        return session

    def _leave(self, session: Session) -> None:
        session.stack.remove(session)  # of the thread that entered, whichever leaves
        with self.lock:
            self._sessions.discard(session)
            self._end_forward(session)
            if self._writer.waiting:  # a target that came during the last step
                self.swap_if_idle()

    def _end_forward(self, session: Session) -> None:
        if session in self._in_flight:
            self._in_flight.discard(session)
            self._slow.discard(session)
            self._notify()

    def _wait(self, timeout_s: float | None) -> None:
        self._waiters += 1
        try:
            self._changed.wait(timeout_s)
        finally:
            self._waiters -= 1

    def _notify(self) -> None:
        if self._waiters:
            self._changed.notify_all()

    def _inside_a_forward(self) -> bool:
        return any(session in self._in_flight for session in self._local.sessions)


class _Forward(AbstractContextManager[None]):
    """A class, for a generator would cost a decode step twice as much."""

    __slots__ = ("_lock", "_session")

    def __init__(self, lock: StepLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        if EXIT.until_s:
            EXIT.stay_out()
        self._session = self._lock._begin()

    def __exit__(self, *error: object) -> None:
        self._lock._leave(self._session)
        if EXIT.until_s:
            EXIT.stay_out()


def wrap_steps(model: Any, lock: StepLock) -> Handle:
    """Every decoding loop of `model.generate` passes the lock before and after each of its forwards.

    Only this object is changed, no class and no forward.
    """

    def around_generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with lock.generating():
            return original(*args, **kwargs)

    def before_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        lock.begin_step()
        return original(*args, **kwargs)

    def after_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        lock.end_step()
        return original(*args, **kwargs)

    return Patches(
        override(model, "generate", around_generate),
        override(model, "prepare_inputs_for_generation", before_forward),
        override(model, "_update_model_kwargs_for_generation", after_forward),
    )
