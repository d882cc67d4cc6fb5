"""What the two engines of `remoe watch` have in common: any thread wants a strength, one thread brings it about."""

from __future__ import annotations

import abc
import threading
from collections.abc import Sequence
from typing import Any

from remoe_adapt.dial import HAND, SENSORS, Target, unit
from remoe_adapt.engines.llamacpp.process import WatchedProcess
from remoe_adapt.errors import DialError

CHECK_S = 2.0
# Four digits are finer than any sensor and coarse enough that noise in the last one sets no scales.
_STEP_DIGITS = 4


class OutsideEngine(abc.ABC):
    """An `Engine` that somebody else's process runs.

    process: who is watched, through its restarts.
    points: the family's strengths, rising.
    wanted: the strength that it was found at, None: it is found when the engine is met.
    dry_run: nothing is ever set.
    """

    name: str
    swap_ms: float | None = None

    def __init__(
        self, process: WatchedProcess, points: Sequence[float], wanted: float | None = None, *, dry_run: bool = False
    ) -> None:
        self.process, self.points, self.dry_run = process, tuple(points), dry_run
        self.met = self.swaps = 0
        # A hand posts and asks for the status in threads of its own, while `sync` waits for a slow server without it.
        self._lock = threading.Lock()
        self._wanted, self._closed = wanted, False
        self._left_at: float | None = None

    def post(self, target: Target) -> None:
        """Want this strength, in steps of 0.0001; `sync` brings it about. See `Engine.post`."""
        strength = unit("strength", target.strength)
        if self._closed and target.by == HAND:
            raise DialError("this engine is closed, and was left as it is: start `remoe watch` again.")
        # Sensors that stay where the engine was found must not round it: that would be a swap for nothing.
        if not self._closed and (target.by != SENSORS or strength != self.target):
            with self._lock:
                self._wanted = round(strength, _STEP_DIGITS)

    @property
    def target(self) -> float:
        """The strength wanted last; before the first, what the engine was found at (0 where that is no strength)."""
        with self._lock:
            return self._wanted or 0.0

    @abc.abstractmethod
    def sync(self) -> bool:
        """See `Engine.sync`."""

    def status(self) -> dict[str, Any]:
        """See `Engine.status`; strength: that requests get, as far as it is known."""
        strength, ready = self._live_and_ready()
        return {
            "engine": self.name,
            "strength": strength,
            "target": self.target,
            "ready": ready and not self._closed,
            "met": self.met,
            "swaps": self.swaps,
            "swap_ms": self.swap_ms,
            "points": list(self.points),
            "closed": self._closed,
        }

    def close(self, keep: bool = False) -> float | None:
        """Back to the base, unless `keep` or nothing was ever set. See `Engine.close`."""
        if not self._closed:
            self._left_at = self._leave(keep)
            # Only now: a disk or server that refuses raises above, and closing can be tried again.
            self._closed = True
        return self._left_at

    @abc.abstractmethod
    def _live_and_ready(self) -> tuple[float | None, bool]:
        """The live strength, None where it is not known, and whether it can be turned now."""

    @abc.abstractmethod
    def _leave(self, keep: bool) -> float | None:
        """Let go; the strength that is left, None where it could not be asked."""
