"""The dial: sensors, pressure or strength in, swaps between forwards out.

A monitor thread samples the sensors and posts targets; a user's hand pins them. Any thread may post a target; the
latest wins. Posting stages the weights in the calling thread (`staging`); the swap itself is made by the step lock
(`steps`): between the steps of `generate` or at `controller.step()`.
"""

from __future__ import annotations

import atexit
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

from peft import PeftModel

from remoe_adapt._support import EXIT, mend_after_fork
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.dial.engine import turn
from remoe_adapt.dial.events import SENSORS, Events, Swap, Target, rounded, unit
from remoe_adapt.dial.guards import Guards
from remoe_adapt.dial.monitor import Monitor, what_sensors_say
from remoe_adapt.dial.recency import DialPrior
from remoe_adapt.dial.staging import Staging
from remoe_adapt.dial.steps import wrap_steps
from remoe_adapt.dial.swap import ResidentRouters
from remoe_adapt.errors import DialError
from remoe_adapt.expert_cache import expert_cache_of
from remoe_adapt.family import Family
from remoe_adapt.libraries import Patches, put_on
from remoe_adapt.pressure import Decision
from remoe_adapt.tuner import RemoeModel

# Weak, so that a model which somebody drops without `close` takes its controller along.
_OPEN: weakref.WeakSet[Controller] = weakref.WeakSet()
# A callback that hangs must not keep the interpreter from ending for longer than this.
EXIT_FLUSH_S = 0.5
# Of a status: what may be given back to `set_strength` and `set_pressure`, and what is compared with the family's.
_AS_THEY_ARE = ("strength", "target", "pressure", "points")
_SAMPLED = ("hits", "misses", "bytes", "stall_s", "budget_bytes", "resident_bytes")


class Controller:
    """Holds one model's routers at a strength. `get_remoe_model` makes it; it is `model.controller`.

    peft_model: a PeftModel of type REMOE whose adapter is zero. From here on its routers are in resident mode and its
        `generate` has step boundaries.
    family: whose strengths the routers take.
    profile: maps pressure to strength.
    prior: the recency prior on the model, whose gains are swapped with the weights.
    monitored: a daemon thread samples the sensors `profile.controller.sample_hz` times a second, asks for a strength
        unless a hand pins it, and moves the budget of an expert cache.

    A copy or pickle of the model is refused while the controller is open, and so is `save_pretrained`: the weights in
    memory are those of a strength, not those of the base. A child made by fork has its own dial, without the thread
    until `resume`.

    Not seen by the dial: `generate_batch`, and plain forwards of one thread while another one generates or sets a
    target by hand. Call `step()` between the forwards of a hand-written loop, or what the sensors ask for never comes;
    with several threads, `with controller.step(): model(...)`.
    """

    def __init__(
        self,
        peft_model: PeftModel,
        family: Family,
        profile: DeviceProfile,
        prior: DialPrior | None = None,
        *,
        monitored: bool = True,
    ) -> None:
        tuner = peft_model.base_model
        assert isinstance(tuner, RemoeModel)
        self.family, self.profile, self._prior = family, profile, prior
        self._model, self._base, self._tuner = peft_model, peft_model.get_base_model(), tuner
        self._routers = ResidentRouters(self._base, family, prior)
        self._events = Events()
        self._staging = Staging(self._routers, self._events)
        self._steps = self._staging.steps
        self._monitor = Monitor(self._base, profile, self.tick)
        self._guards = Guards(self._model, self._routers, prior)
        # PEFT's own ways out (unload, merge_and_unload) would else leave the routers in resident mode, under a dial
        # that goes on writing into them.
        tuner.before_unload = self.release
        self._patches = Patches(wrap_steps(self._base, self._steps))
        # A forked child inherits locks in whatever state other threads of the parent held them.
        mend_after_fork(self)
        _OPEN.add(self)
        # A status that is asked for before the first sample has a reason to show.
        self.set_pressure(None)
        # Last of all, since whoever finds the attribute takes the dial for a whole one.
        self._patches.add(*(put_on(owner, "controller", self) for owner in (peft_model, self._base)))
        if monitored:
            self._monitor.resume()

    # What a user turns

    @property
    def strength(self) -> float:
        """The strength that is live now."""
        return self._staging.strength

    @property
    def target(self) -> float:
        """The strength asked for last: live, or waiting for the next step."""
        return self._staging.target

    @property
    def pinned(self) -> bool:
        """A hand holds the dial."""
        return self._staging.pinned

    def set_pressure(self, pressure: float | None) -> None:
        """Pin the pressure, from 0 (plenty of memory) to 1 (thrashing); the profile's curve says which strength it is.

        It is live at once where no forward is announced. None hands control back to the sensors, at the strength of
        the pressure that counts by their last word; where they are silent that is pressure 0. Raises ConfigError for
        anything but None or a number in [0, 1]; DialError after `close`.
        """
        if pressure is None:
            said = self._monitor.decision
            # Silent sensors are no reason to degrade: pressure 0 until one of them speaks.
            counts = 0.0 if said is None else said.pressure
            strength = self.profile.strength_at(counts)
            words = "no sensor has spoken yet" if said is None else what_sensors_say(said)
            reason = f"{words}; profile {self.profile.name} maps pressure {counts:.2f} to strength {strength:g}"
            self._staging.post(Target(strength, counts, reason, SENSORS), unpin=True)
            return
        pressure = unit("pressure", pressure)
        strength = self.profile.strength_at(pressure)
        reason = f"pressure {pressure:g} was set by hand; profile {self.profile.name} maps it to strength {strength:g}"
        self._staging.post(Target(strength, pressure, reason))

    def set_strength(self, strength: float) -> None:
        """Pin the strength itself, from 0 (the base, bit for bit) to 1; the profile's curve and maximum are not asked.

        Raises ConfigError for anything but a number in [0, 1]; DialError after `close`.
        """
        strength = unit("strength", strength)
        self._staging.post(Target(strength, None, f"strength {strength:g} was set by hand"))

    @contextmanager
    def hold(self, strength: float, reason: str = "") -> Iterator[None]:
        """Every forward that begins within the block is at this strength, whoever asks for another one; what sensors
        or hands asked for last counts after it.

        reason: in words, for the status. Raises ConfigError for anything but a number in [0, 1]; DialError after
        `close`, and while another block is open.
        """
        strength = unit("strength", strength)
        self._staging.hold(Target(strength, None, reason or f"strength {strength:g} is held"))
        try:
            yield
        finally:
            wanted = self._staging.let_go()
            if wanted is not None and wanted.by == SENSORS:
                # What they say now, and not what they said when the block began.
                self.set_pressure(None)
            elif wanted is not None:
                self._staging.post(wanted)

    def pause(self) -> AbstractContextManager[object]:
        """Sample no more: strength and cache budget stay where they are, until `resume`, or until the end of a
        `with` block of it, where it was sampled before and no other pause is open.

        Targets set by hand still count.
        """
        return self._monitor.pause()

    def resume(self) -> None:
        """Sample again, whatever pauses are open. Raises DialError after `close`."""
        if self._staging.closed or not self._monitor.resume():
            self._staging.check_open()

    def on_swap(self, callback: Callable[[Swap], object]) -> Callable[[], None]:
        """Call `callback` with every Swap, in order, in a thread of its own; returns what ends that. An exception in it
        is logged. Raises ConfigError when it cannot be called, DialError after `close`."""
        self._staging.check_open()
        return self._events.subscribe(callback)

    def log_to(self, path: str | os.PathLike[str] | None) -> None:
        """Append swaps and samples to a file, one JSON object a line; None ends that.

        `{"event": "swap", ...}` has the fields of a Swap; `{"event": "sample", ...}` time_s, pressure, strength,
        tpot_ms, the cache's counters, and what each sensor says. Raises ConfigError when it cannot be written, and
        DialError after `close`.
        """
        self._staging.check_open()
        # The file is opened before the sample is taken, which then is its first line.
        self._events.write_to(path)
        self._sample_now()

    @property
    def swaps(self) -> list[Swap]:
        """The last thousand swaps, oldest first."""
        return self._events.swaps

    def step(self) -> AbstractContextManager[None]:
        """Between two forwards of a hand-written loop: make the posted swap.

        As `with controller.step(): model(...)`, no swap of any thread falls into that forward. After the first call,
        targets set by other threads wait for the next one. Inside `generate` it is not needed.
        """
        # The swap is made here and not when the block is entered, so that a loop that never uses `with` gets it too.
        self._steps.step()
        return self._steps.forward()

    def status(self) -> dict[str, Any]:
        """What holds now, JSON-ready; times in ms, None before the first.

        strength (live), target, pressure (that `target` answers; None where a strength was set by hand), pinned (by
        hand), monitored (its thread samples), reason (in words), waiting (a swap is posted), swaps, swap_ms and
        stage_ms (last) with swap_ms_median and stage_ms_median, tpot_ms (median of the last steps; of all threads),
        running (generate calls), sensors (None, or pressure, present, cause, reason, signals, measures, unusable,
        age_s), recency (None, or mode, decay, routers that have it, and mean live gain), hit_rate and bytes_read of the
        expert cache with expert_cache (its settings and counters, `layers` for each layer; all None without one),
        profile, family, base, points, closed; engine, ready and met as in `Engine.status`.
        """
        # All of these have locks of their own; asked under the steps' lock they could lock up with who holds them.
        cache = expert_cache_of(self._base)
        experts = None if cache is None else cache.stats()
        sensors, monitored = self._monitor.status(), self._monitor.running
        but = "" if self._staging.closed else self._guards.but()
        found = self._staging.status()
        found |= {
            "reason": found["reason"] + but,
            "monitored": monitored,
            "sensors": sensors,
            "recency": None if self._prior is None else self._prior.status(),
            "hit_rate": experts and experts["hit_rate"],
            "bytes_read": experts and experts["bytes"],
            "expert_cache": experts,
            "profile": self.profile.name,
            "family": str(self.family.path),
            "base": self.family.base_id,
        }
        return {**found, **rounded({key: found[key] for key in found if key not in _AS_THEY_ARE})}

    def close(self) -> None:
        """Restore the base router weights bit for bit and let go of the model; waits for forwards in flight.

        The model stays wrapped (`remoe_adapt.release(model)` gives the base model back). Closing twice is fine. Raises
        DialError inside a forward of the same thread.
        """
        self.release(False)

    def release(self, keep_live: bool) -> None:
        """`close`, or with `keep_live` leave the routers at the present strength, as `merge_and_unload` does.

        Raises MergeStateError with `keep_live` while a recency prior acts: it is in no weight, and would be lost.
        """
        if self._staging.closed:
            return
        # Whatever cannot be given back refuses before anything is undone.
        self._guards.check_leaving(keep_live)
        # Before the lock is taken, for forwards would wait with it until a sample under way has ended.
        self._sample_now()
        # Under the lock to the end: a second close returns when the model is free, and not while it is being freed.
        with self._steps.closed_for_good():
            if self._staging.closed:  # by another thread meanwhile
                return
            self._staging.close(keep_live)
            # From here on PEFT's unload is not to come back to a dial that is gone.
            self._tuner.before_unload = None
            self._patches.remove()
            self._guards.remove()
        # Outside of the lock, for both wait for threads of ours, and those may want it.
        _OPEN.discard(self)
        self._monitor.close()
        self._events.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise DialError(
            "a model with an open controller cannot be copied or pickled: its routers are at a strength, and two "
            "models cannot share one dial. Call model.controller.close() first."
        )

    def after_fork(self) -> None:
        """In the child: locks that threads of the parent held, and those threads, are not there."""
        self._staging.after_fork()
        self._monitor.after_fork()
        self._events.after_fork()

    # What the sensors turn

    def tick(self, now_s: float | None = None) -> Decision:
        """One sample of the sensors (at `now_s`, None: now), and the target that follows unless it is pinned."""
        # The target and not the live strength: a swap that waits for a step is decided already.
        decision = self._monitor.sample(now_s, self.target, pinned=self.pinned)
        turn(self._staging, decision)
        if self._events.recording:
            self._events.sample(self._sample(decision))
        return decision

    def _sample_now(self) -> None:
        """A log begins and ends with a sample, however short the run."""
        if self._events.recording and self._monitor.running:
            self.tick()

    def _sample(self, decision: Decision) -> dict[str, Any]:
        cache = expert_cache_of(self._base)
        experts = {} if cache is None else cache.stats(layers=False)
        return {
            "pressure": self._staging.asked.pressure,
            "strength": self.strength,
            "tpot_ms": self._steps.tpot_ms,
            "reason": decision.reason,
            "signals": dict(decision.signals),
            **{key: experts.get(key) for key in _SAMPLED},
        }


@atexit.register
def _leave_in_order() -> None:
    """No thread of ours, and none that decodes, is inside torch when the interpreter goes; logs are written."""
    found = list(_OPEN)
    for controller in found:
        controller._monitor.stop()
    # Monitors are stopped first, for a sample that is under way may be inside torch.
    EXIT.begin()
    for controller in found:
        controller._events.flush(EXIT_FLUSH_S)
