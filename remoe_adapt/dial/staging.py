"""A strength on its way into the routers of a model in this process: posted, staged, copied between two forwards.

    IDLE --post--> STAGED --take--> SWAPPING --commit--> IDLE          CLOSED: from anywhere, for ever

Any thread may post; the latest post wins. Weights are computed in the thread that posts; they are copied by the step
lock, in the thread that comes to a boundary.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from enum import Enum
from typing import Any

from remoe_adapt._support import EXIT, say_once
from remoe_adapt.dial.events import HAND, SENSORS, Events, Swap, Target, unit
from remoe_adapt.dial.steps import StepLock
from remoe_adapt.dial.swap import ResidentRouters, Staged
from remoe_adapt.errors import DialError

# So many of the last swaps count for the medians of their times.
_KEPT = 1000


class State(Enum):
    """SWAPPING, found at another moment than during a copy, is a copy that an error cut short: it is made again."""

    IDLE = "idle"
    STAGED = "staged"
    SWAPPING = "swapping"
    CLOSED = "closed"


class Staging:
    """What is asked of the routers, and what waits for them; an `Engine`, and the `Writer` of its step lock.

    routers: whose weights are swapped.
    events: is told of every swap.
    """

    # The engine is this process, which is met once and never restarts.
    name = "transformers"
    met = 1
    takes_effect = "at the next step of generate or of controller.step(); at once where no forward is announced"

    def __init__(self, routers: ResidentRouters, events: Events) -> None:
        self._routers, self._events = routers, events
        self.steps = StepLock(self)
        self.state = State.IDLE
        self.asked = Target(0.0, None, "", SENSORS)
        # While somebody holds the strength: what it was asked for before, then what is asked meanwhile.
        self._set_aside: Target | None = None
        # Counts posts, so that a staging which a later post has overtaken knows it.
        self._posts = self.swaps = 0
        self._staged: tuple[Staged, Target] | None = None
        # Freeing weights takes as long as copying them, so the swap leaves that to the next staging.
        self._retired: tuple[Staged, Target] | None = None
        self._stage_lock = threading.RLock()
        self._swap_ms: deque[float] = deque(maxlen=_KEPT)
        self._stage_ms: deque[float] = deque(maxlen=_KEPT)

    @property
    def points(self) -> tuple[float, ...]:
        """Strengths that were trained, rising; those between are mixed of their neighbours."""
        return self._routers.family.strengths

    @property
    def strength(self) -> float:
        """The one that is live now."""
        return self._routers.strength

    @property
    def target(self) -> float:
        """The strength asked for last: live, or waiting for the next step."""
        return self.asked.strength

    @property
    def pinned(self) -> bool:
        """A hand holds the dial."""
        return self.asked.by == HAND

    @property
    def closed(self) -> bool:
        """The routers were let go."""
        return self.state is State.CLOSED

    @property
    def waiting(self) -> bool:
        """A swap is posted."""
        return self._staged is not None

    def hold(self, target: Target) -> None:
        """Post a target, which stays until `let_go`: whatever others post meanwhile is set aside, the latest wins.

        Raises DialError while another hold is open, and as `post`; nothing is held then.
        """
        with self.steps.lock:
            self.check_open()
            if self._set_aside is not None:
                raise DialError("the strength is held already: one hold at a time, so end the other one first.")
            self._set_aside = self.asked
        try:
            self.post(target, of_hold=True)
        except BaseException:
            self._set_aside = None
            raise

    def let_go(self) -> Target | None:
        """End of a hold: what was set aside, to be posted by the caller. None: the dial was closed meanwhile."""
        with self.steps.lock:
            wanted, self._set_aside = self._set_aside, None
            return None if self.closed else wanted

    def post(self, target: Target, *, unpin: bool = False, of_hold: bool = False) -> None:
        """Stage a target, in the calling thread; what cannot be staged changes nothing.

        target: one by hand pins the dial, and is live at once where no forward is announced. One by the sensors is
            dropped while a hand holds the dial or the dial is closed, and waits for a boundary: the monitor's thread
            cannot know of a plain forward.
        unpin: the hand lets go: this target of the sensors counts as one by hand otherwise.
        of_hold: `hold` posts it; any other one waits for `let_go` while the strength is held.

        Raises ConfigError for a strength outside [0, 1], DialError after `close`, and as `ResidentRouters.stage`.
        """
        # Refused before any state changes, whoever posts.
        unit("strength", target.strength)
        gives_way = target.by == SENSORS and not unpin
        if gives_way and self._changes_nothing(target):
            return
        # Staging runs torch in a thread that may be the sensors', and the exit of the interpreter has to wait for it.
        with EXIT.working():
            with self.steps.lock:
                # Asked again under the lock: a hand may have pinned the dial since the first look.
                if gives_way and (self.pinned or self.closed):
                    return
                self.check_open()
                if self._set_aside is not None and not of_hold:
                    self._set_aside = target
                    return
                before, self.asked = self.asked, target
                # A later post makes an earlier one that is still being staged void.
                self._posts += 1
                post = self._posts
            with self._stage_lock:
                if post == self._posts:  # else a later target is on its way
                    try:
                        self._stage(target, post)
                    except BaseException as error:
                        self._fall_back(post, before, error)
                        raise
            # The monitor's thread never swaps by itself, since it cannot see a plain forward of another thread.
            if not gives_way:
                self.steps.swap_if_idle()

    def sync(self) -> bool:
        """Make what is posted live, where no forward is announced; True when nothing waits any more."""
        self.steps.swap_if_idle()
        return not self.waiting

    def take(self) -> tuple[Staged, Target] | None:
        """What is staged, and for which target; None where nothing is. Under the lock of the steps.

        Its copy has begun, and counts as cut short until `commit`.
        """
        if self._staged is None:
            return None
        # If the copy fails half-way, SWAPPING stays, and the same strength is staged again though it seems to be live.
        self.state = State.SWAPPING
        return self._staged

    def commit(self) -> None:
        """What was taken is live. Under the lock of the steps."""
        self._retired, self._staged, self.state = self._staged, None, State.IDLE

    def swap(self, *, alone: bool) -> None:
        """Copy what is staged, see `Writer.swap`."""
        before, begin_s = self.strength, time.perf_counter()
        taken = self.take()
        assert taken is not None
        staged, target = taken
        try:
            self._routers.commit(staged, alone=alone)
        except DialError as error:  # the model was changed since staging
            self._staged, self.state = None, State.IDLE
            reason = f"strength {target.strength:g} is not live: {error}"
            if (self.asked.strength, self.asked.by) == (target.strength, target.by):  # else another one is on its way
                self.asked = Target(before, None, reason, target.by)
            say_once(reason)
            return
        self.commit()
        swap_ms = (time.perf_counter() - begin_s) * 1e3
        self._swap_ms.append(swap_ms)
        self.swaps += 1
        self._events.swap(
            Swap(time.time(), before, target.strength, target.pressure, target.by, target.reason, swap_ms)
        )

    def status(self) -> dict[str, Any]:
        """JSON-ready; see `Engine.status`, and of this engine pressure, pinned, reason, waiting, stage_ms, the medians
        of both times, tpot_ms (median of the last steps) and running (generate calls)."""
        with self.steps.lock:
            asked, waiting = self.asked, self.waiting
            late = f"; strength {self.strength:.2f} is live, and the target waits for the next step" if waiting else ""
            return {
                "engine": self.name,
                "strength": self.strength,
                "target": asked.strength,
                "pressure": asked.pressure,
                "pinned": self.pinned,
                "reason": asked.reason + late,
                "ready": not self.closed,
                "met": self.met,
                "waiting": waiting,
                "swaps": self.swaps,
                **_last_and_median("swap_ms", self._swap_ms),
                **_last_and_median("stage_ms", self._stage_ms),
                "tpot_ms": self.steps.tpot_ms,
                "running": self.steps.sessions,
                "points": list(self.points),
                "closed": self.closed,
            }

    def close(self, keep: bool = False) -> float:
        """Let go of the routers, see `Engine.close`; waits for forwards in flight. Raises DialError inside one of the
        same thread."""
        with self.steps.closed_for_good():
            if not self.closed:
                # Weights that are on their way would be written into routers that somebody else has by then.
                self._staged = self._retired = None
                self.state = State.CLOSED
                self._posts += 1
                self._routers.release(keep_live=keep)
                self.asked = Target(self.strength, None, "closed", self.asked.by)
        return self.strength

    def check_open(self) -> None:
        """Raises DialError after `close`."""
        if self.closed:
            raise DialError("this controller is closed: call get_remoe_model again.")

    def after_fork(self) -> None:
        """In the child: locks that threads of the parent held, and those threads, are not there."""
        self._stage_lock = threading.RLock()
        self.steps.after_fork()

    def _changes_nothing(self, target: Target) -> bool:
        """A target of the sensors is dropped, or is the same strength for another reason."""
        with self.steps.lock:
            if self.pinned or self.closed:
                return True
            same = self.asked.strength == target.strength
            if same:
                self.asked = target
            # Most samples ask for the strength of the one before, and cost this look alone.
            return same

    def _stage(self, target: Target, post: int) -> None:
        with self.steps.lock:
            self.check_open()
            if target.strength == self.strength and self.state is not State.SWAPPING and not self._routers.moved:
                self._staged, self.state = None, State.IDLE
                return
            self._retired = None
        # Without the lock: staging takes as long as tens of steps.
        begin_s = time.perf_counter()
        staged = self._routers.stage(target.strength)
        # A later post may have been staged meanwhile; what was computed here is dropped then.
        stage_ms = (time.perf_counter() - begin_s) * 1e3
        with self.steps.lock:
            self._stage_ms.append(stage_ms)
            if post == self._posts:
                self._staged = staged, target
                if self.state is State.IDLE:  # a copy that was cut short stays one, whatever is staged
                    self.state = State.STAGED

    def _fall_back(self, post: int, before: Target, error: BaseException) -> None:
        """To what waits, or is live: else the sensors would never ask again for what could not be staged."""
        with self.steps.lock:
            if post == self._posts and not self.closed:
                reason = f"strength {self.target:g} could not be staged ({type(error).__name__}: {error})"
                live = Target(self.strength, None, reason, before.by)
                self.asked = live if self._staged is None else self._staged[1]


def _last_and_median(key: str, kept: deque[float]) -> dict[str, float | None]:
    values = list(kept)
    return {key: values[-1] if values else None, f"{key}_median": statistics.median(values) if values else None}
