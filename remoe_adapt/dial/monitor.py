"""The thread that samples the sensors and asks the policy; it moves cache budgets, and never touches the model."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn

from remoe_adapt._support import say_once
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.dial.sensors import CacheUse, model_sensors
from remoe_adapt.expert_cache import expert_cache_of
from remoe_adapt.pressure import Decision, Governor

_log = logging.getLogger("remoe_adapt")
# Monitors of models with an expert cache: they give memory back in equal parts.
# They are weak, so that a monitor which somebody forgets counts no more.
_SHARING: weakref.WeakSet[Monitor] = weakref.WeakSet()
_RUNNING: weakref.WeakSet[Monitor] = weakref.WeakSet()
# A sample that hangs in a driver must not hang whoever pauses: the thread is a daemon and is left to itself.
_STOP_S = 2.0


class Monitor:
    """A governor, and a thread that has it sampled `sample_hz` times a second; any thread may call anything, in any
    order. The thread runs once `resume` was called, while nobody's pause is open and until `close`.

    model: whose device and expert cache are watched, and whose cache's budget is moved.
    profile: what the governor goes by.
    tick: what the thread calls; it calls `sample` and acts on the decision. None: there is no dial, budgets move alone.
    """

    def __init__(self, model: nn.Module, profile: DeviceProfile, tick: Callable[[], object] | None = None) -> None:
        cache = expert_cache_of(model)
        use = None if cache is None else CacheUse(cache)
        sensors = model_sensors(model, cache_use=use)
        self._governor = Governor(sensors, profile, resize=None if use is None else use.resize)
        self.tick = tick or partial(self.sample, None, 0.0, pinned=True)
        self._period_s = 1.0 / profile.controller.sample_hz
        self._lock = threading.Lock()
        self._new_switch()
        self._closed = False
        self._decided: tuple[Decision, float] | None = None
        if use is not None:
            _SHARING.add(self)

    def _new_switch(self) -> None:
        # Held only for moments, and never while something is waited for: a sample under way may ask for a pause.
        self._switch = threading.Lock()
        self._wanted, self._pauses = False, set[ExitStack]()
        self._stop: threading.Event | None = None
        self._threads: list[threading.Thread] = []

    @property
    def running(self) -> bool:
        """Its thread samples."""
        stop, threads = self._stop, self._threads
        return stop is not None and not stop.is_set() and bool(threads) and threads[-1].is_alive()

    @property
    def decision(self) -> Decision | None:
        """The last one."""
        return None if self._decided is None else self._decided[0]

    def sample(self, now_s: float | None, strength: float, *, pinned: bool) -> Decision:
        """One sample and the decision, for a dial at `strength`, in the calling thread; see `Governor.tick`."""
        # Samples of the thread and of `log_to` would else interleave in the policy's state.
        with self._lock:
            self._governor.share = 1.0 / max(1, len(_SHARING)) if self in _SHARING else 1.0
            decision = self._governor.tick(now_s, strength, pinned=pinned)
            if pinned:  # the policy's words are of what it would do
                held = f"strength is held at {decision.strength:.2f} by hand"
                decision = replace(decision, why=f"{held}; {what_sensors_say(decision)}")
            self._decided = (decision, time.monotonic())
        return decision

    def status(self) -> dict[str, Any] | None:
        """JSON-ready, None before the first sample: pressure, present, cause, reason, notes (what of the profile
        cannot hold here), signals (pressure of every sensor), measures, unusable (why), age_s."""
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
            "notes": list(decision.notes.values()),
            "signals": dict(decision.signals),
            "measures": {name: measure.value for name, measure in reading.measures.items()},
            "unusable": dict(decision.unusable),
            "age_s": time.monotonic() - at_s,
        }

    def resume(self) -> bool:
        """Sample from now on, whatever pauses are open; False after `close`."""
        # Before the switch, since reading the sensors takes milliseconds and logs.
        self._warn()
        with self._switch:
            self._pauses.clear()
            self._wanted = not self._closed
            self._start_if_wanted()
            return self._wanted

    def pause(self) -> ExitStack:
        """Sample no more, until the pause is closed (and every other one) or `resume`; waits for a sample under way,
        unless called by it."""
        pause = ExitStack()
        pause.callback(self._end_pause, pause)
        with self._switch:
            self._pauses.add(pause)
            threads = self._end()
        _join(threads)
        return pause

    def stop(self) -> None:
        """Sample no more; waits for a sample under way, unless called by it."""
        with self._switch:
            self._wanted = False
            threads = self._end()
        _join(threads)

    def close(self) -> None:
        """For good."""
        # First, so that a pause which ends meanwhile starts no new thread.
        self._closed = True
        self.stop()
        _SHARING.discard(self)
        with self._lock:
            # Under the lock of samples: one that outlived `_STOP_S` would open its files again, for nobody.
            self._governor.sensors.close()

    def after_fork(self) -> None:
        """In the child, which has no such thread: it does not sample until `resume`."""
        self._lock = threading.Lock()
        self._new_switch()
        _RUNNING.discard(self)

    def _start_if_wanted(self) -> None:
        if not self._wanted or self._closed or self._pauses or self.running:
            return
        stop = threading.Event()
        # The thread knows the monitor only while it ticks: a model that nobody needs takes its thread along.
        thread = threading.Thread(
            target=_run, args=(weakref.ref(self), stop, self._period_s), name="remoe-monitor", daemon=True
        )
        thread.start()
        # Only a thread that was started can be joined, and the last sample of one that ends may still be under way.
        self._threads = [*(one for one in self._threads if one.is_alive()), thread]
        self._stop = stop
        _RUNNING.add(self)

    def _end_pause(self, pause: ExitStack) -> None:
        with self._switch:
            if pause in self._pauses:  # else `resume` has ended it, and what was asked for since counts
                self._pauses.discard(pause)
                self._start_if_wanted()

    def _end(self) -> list[threading.Thread]:
        if self._stop is not None:
            self._stop.set()
        return self._threads

    def _warn(self) -> None:
        try:
            with self._lock:
                self._governor.warn()
        except Exception as error:  # as in a sample, which comes all the same
            _say_failed(error)


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        if thread is not threading.current_thread():
            thread.join(_STOP_S)


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
    # Waiting first gives the caller of `resume` time to go on before its model is sampled.
    while not stop.wait(period_s):
        found = monitor()
        if found is None:
            return
        try:
            found.tick()
        except Exception as error:  # a monitor that dies silently would leave the dial where it is for ever
            if stop.is_set():  # the dial was closed meanwhile
                return
            _say_failed(error)
        # Else the loop's variable would keep the model alive through the next wait.
        del found


def _say_failed(error: Exception) -> None:
    say_once(f"the monitor could not sample ({type(error).__name__}: {error}); it goes on")
    _log.debug("monitor", exc_info=True)


@atexit.register
def _stop_all() -> None:
    """No thread may be inside torch when the interpreter goes."""
    for monitor in list(_RUNNING):
        monitor.stop()
