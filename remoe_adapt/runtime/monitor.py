"""The thread that samples the sensors and asks the policy; it posts targets and moves cache budgets, and never touches
the model.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from dataclasses import replace
from typing import Any, Protocol

from torch import nn

from remoe_adapt.cache.experts import expert_cache_of
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.notices import say_once
from remoe_adapt.pressure.governor import Governor
from remoe_adapt.pressure.policy import Decision
from remoe_adapt.runtime.sensors import CacheUse, model_sensors

_log = logging.getLogger("remoe_adapt")
# Monitors of models with an expert cache: they give memory back in equal parts.
_SHARING: weakref.WeakSet[Monitor] = weakref.WeakSet()
_RUNNING: weakref.WeakSet[Monitor] = weakref.WeakSet()
_STOP_S = 2.0


class Dial(Protocol):
    """What is monitored: a controller."""

    @property
    def target(self) -> float: ...

    @property
    def pinned(self) -> bool: ...

    def hear(self, decision: Decision) -> None:
        """Every decision, in the thread that ticked."""
        ...


class _Actuator:
    """A dial as a governor turns it: by the decision as a whole, see `Dial.hear`. Keeps nobody alive."""

    def __init__(self, dial: Dial) -> None:
        self.dial = weakref.ref(dial)

    def apply(self, strength: float) -> None:
        """Nothing: the decision goes to the dial."""

    def current(self) -> float:
        dial = self.dial()
        return 0.0 if dial is None else dial.target


class Monitor:
    """Ticks a governor `sample_hz` times a second while it runs; any thread may call anything.

    model: whose device and expert cache are watched, and whose cache's budget is moved.
    """

    def __init__(self, model: nn.Module, profile: DeviceProfile, dial: Dial) -> None:
        cache = expert_cache_of(model)
        use = None if cache is None else CacheUse(cache)
        sensors = model_sensors(model, cache_use=use)
        self._actuator = _Actuator(dial)
        self._governor = Governor(self._actuator, sensors, profile, resize=None if use is None else use.resize)
        self._period_s = 1.0 / profile.controller.sample_hz
        self._lock = threading.Lock()
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None
        self._decided: tuple[Decision, float] | None = None
        if use is not None:
            _SHARING.add(self)

    @property
    def running(self) -> bool:
        """Its thread samples."""
        thread = self._thread
        return thread is not None and thread.is_alive() and self._stop is not None and not self._stop.is_set()

    @property
    def decision(self) -> Decision | None:
        """The last one."""
        return None if self._decided is None else self._decided[0]

    def tick(self, now_s: float | None = None) -> Decision:
        """One sample and what follows from it, in the calling thread; see `Governor.tick`."""
        with self._lock:
            dial = self._actuator.dial()
            self._governor.share = 1.0 / max(1, len(_SHARING)) if self in _SHARING else 1.0
            pinned = dial is None or dial.pinned
            decision = self._governor.tick(now_s, turn=not pinned)
            if pinned:  # the policy's words are of what it would do
                held = f"strength is held at {decision.strength:.2f} by hand"
                decision = replace(decision, why=f"{held}; {what_sensors_say(decision)}")
            self._decided = (decision, time.monotonic())
        if dial is not None:
            dial.hear(decision)
        return decision

    def status(self) -> dict[str, Any] | None:
        """JSON-ready, None before the first sample: pressure, present, cause, reason, signals (pressure of every
        sensor), measures, unusable (why), age_s."""
        with self._lock:
            decided, reading = self._decided, self._governor.reading
        if decided is None or reading is None:
            return None
        decision, at_s = decided
        return {
            "pressure": decision.pressure,
            "present": decision.present,
            "cause": decision.cause,
            "reason": decision.reason,
            "signals": dict(decision.signals),
            "measures": {name: measure.value for name, measure in reading.measures.items()},
            "unusable": dict(decision.unusable),
            "age_s": time.monotonic() - at_s,
        }

    def start(self) -> None:
        """Sample from now on; nothing if it does already."""
        with self._lock:
            if self.running:
                return
            self._stop = threading.Event()
            # The thread knows the monitor only while it ticks: a model that nobody needs takes its thread along.
            self._thread = threading.Thread(
                target=_run, args=(weakref.ref(self), self._stop, self._period_s), name="remoe-monitor", daemon=True
            )
            self._thread.start()
        _RUNNING.add(self)

    def stop(self) -> None:
        """Sample no more; waits for a sample under way, unless called by it."""
        thread, stop = self._thread, self._stop
        if stop is not None:
            stop.set()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_STOP_S)

    def close(self) -> None:
        """For good."""
        self.stop()
        _SHARING.discard(self)
        with self._lock:
            self._governor.sensors.close()

    def after_fork(self) -> None:
        """In the child, which has no such thread: it does not sample until `start`."""
        self._lock, self._thread, self._stop = threading.Lock(), None, None
        _RUNNING.discard(self)


def what_sensors_say(decision: Decision) -> str:
    """In words, and nothing of what follows."""
    present, counts = decision.present, decision.pressure
    words = "all sensors are calm"
    if present > 0 or counts > 0:
        words = f"the sensors report pressure {present:.2f}"
        words += f", {counts:.2f} counts" if f"{counts:.2f}" != f"{present:.2f}" else ""
        words += f" ({decision.cause})" if decision.cause else ""
    return words


def _run(monitor: weakref.ref[Monitor], stop: threading.Event, period_s: float) -> None:
    while not stop.wait(period_s):
        found = monitor()
        if found is None:
            return
        try:
            found.tick()
        except Exception as error:  # a monitor that dies silently would leave the dial where it is for ever
            if stop.is_set():  # the dial was closed meanwhile
                return
            say_once(f"the monitor could not sample ({type(error).__name__}: {error}); it goes on")
            _log.debug("monitor", exc_info=True)
        del found


@atexit.register
def _stop_all() -> None:
    """No thread may be inside torch when the interpreter goes."""
    for monitor in list(_RUNNING):
        monitor.stop()
