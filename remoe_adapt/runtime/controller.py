"""The dial: sensors, pressure or strength in, swaps between forwards out.

A monitor thread samples the sensors and posts targets; a user's hand pins them. Any thread may post a target; the
latest wins. Posting stages the weights in the calling thread; the swap itself is made by the gate: between the steps of
`generate`, at `controller.step()`, or at once when nothing runs.
"""

from __future__ import annotations

import functools
import math
import numbers
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, NoReturn

from peft import PeftModel

from remoe_adapt.cache.experts import expert_cache_of
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.errors import ConfigError, MergeStateError
from remoe_adapt.family import Family
from remoe_adapt.forks import mend_after_fork
from remoe_adapt.pressure.policy import Decision
from remoe_adapt.runtime.events import Events, Swap
from remoe_adapt.runtime.gate import Gate
from remoe_adapt.runtime.monitor import Monitor
from remoe_adapt.runtime.recency import DialPrior
from remoe_adapt.runtime.swap import ResidentRouters, Staged
from remoe_adapt.runtime.timings import Timings
from remoe_adapt.tuner.model import RemoeModel

_SAMPLED = ("hits", "misses", "bytes", "stall_s", "budget_bytes", "resident_bytes")


class Controller:
    """Holds one model's routers at a strength. `get_remoe_model` makes it; it is `model.controller`.

    peft_model: a PeftModel of type REMOE whose adapter is zero. From here on its routers are in resident mode and its
    `generate` has step boundaries. monitored: a daemon thread samples the sensors `profile.controller.sample_hz` times
    a second, sets the strength unless a hand pins it, and moves the budget of an expert cache. A copy or pickle of the
    model is refused while the controller is open, and so is `save_pretrained`: the weights in memory are those of a
    strength, not those of the base. A child made by fork has its own dial, without the thread until `resume`.

    Not under the gate's eye: `generate_batch`, and plain forwards of one thread while another one sets a target. Call
    `step()` between the forwards of a hand-written loop; with several threads, `with controller.step(): model(...)`.
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
        self._gate = Gate(lambda: self._staged is not None, self._swap)
        self._stage_lock = threading.RLock()
        self._staged: Staged | None = None
        self._retired: Staged | None = None
        self._ticket = 0
        self._target, self._reason = 0.0, ""
        self._pressure: float | None = None
        self._pinned = False
        self._timings, self._swaps = Timings(), 0
        self._closed = False
        self._hooked: list[tuple[Any, str, Callable[..., Any]]] = []
        self._events = Events()
        self._monitor = Monitor(self._base, profile, self)
        tuner.dial = self
        self._install()
        mend_after_fork(self)
        self.set_pressure(None)
        if monitored:
            self._monitor.start()

    # What a user turns

    @property
    def strength(self) -> float:
        """The strength that is live now."""
        return self._routers.strength

    @property
    def target(self) -> float:
        """The strength asked for last: live, or waiting for the next step."""
        return self._target

    @property
    def pinned(self) -> bool:
        """A hand holds the dial."""
        return self._pinned

    def set_pressure(self, pressure: float | None) -> None:
        """Pin the pressure, from 0 (plenty of memory) to 1 (thrashing); the profile's curve says which strength it is.

        None hands control back to the sensors, at the strength of the pressure that counts by their last word; where
        they are silent that is pressure 0. Raises ConfigError for anything but None or a number in [0, 1];
        MergeStateError after `close`.
        """
        if pressure is None:
            counts = self._monitor.pressure
            strength = self.profile.strength_at(counts)
            said = self._monitor.decision
            reason = f"profile {self.profile.name}: " + ("no sensor has spoken yet" if said is None else said.reason)
            self._post(strength, counts, reason, pinned=False)
            return
        pressure = _unit("pressure", pressure)
        strength = self.profile.strength_at(pressure)
        reason = f"pressure {pressure:g} was set by hand; profile {self.profile.name} maps it to strength {strength:g}"
        self._post(strength, pressure, reason, pinned=True)

    def set_strength(self, strength: float) -> None:
        """Pin the strength itself, from 0 (the base, bit for bit) to 1; the profile's curve and maximum are not asked.

        Raises ConfigError for anything but a number in [0, 1]; MergeStateError after `close`.
        """
        strength = _unit("strength", strength)
        self._post(strength, None, f"strength {strength:g} was set by hand", pinned=True)

    def pause(self) -> AbstractContextManager[None]:
        """Sample no more: strength and cache budget stay where they are, until `resume`, or the end of a `with` block
        that found the monitor running.

        Targets set by hand still count.
        """
        resumes = self._monitor.running
        self._monitor.stop()
        return _Paused(self, resumes)

    def resume(self) -> None:
        """Sample again. Raises MergeStateError after `close`."""
        self._check_open()
        self._monitor.start()

    def on_swap(self, callback: Callable[[Swap], object]) -> Callable[[], None]:
        """Call `callback` with every Swap, in order, in a thread of its own; returns what ends that. An exception in it
        is logged. Raises ConfigError when it cannot be called."""
        return self._events.subscribe(callback)

    def log_to(self, path: str | os.PathLike[str] | None) -> None:
        """Append swaps and samples to a file, one JSON object a line; None ends that.

        `{"event": "swap", ...}` has the fields of a Swap; `{"event": "sample", ...}` time_s, pressure, strength,
        tpot_ms, the cache's counters, and what each sensor says. Raises ConfigError when it cannot be written, and
        MergeStateError after `close`.
        """
        self._check_open()
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
        self._timings.step_begins()
        self._gate.step()
        return self._gate.forward()

    def status(self) -> dict[str, Any]:
        """What holds now, JSON-ready; times in ms, None before the first.

        strength (live), target, pressure (that `target` answers; None where a strength was set by hand), pinned (by
        hand), monitored (its thread samples), reason (in words), waiting (a swap is posted), swaps, swap_ms and
        stage_ms (last) with swap_ms_median and stage_ms_median, tpot_ms (median of the last steps; of all threads),
        running (generate calls), sensors (None, or pressure, present, cause, reason, signals, measures, unusable,
        age_s), recency (None, or mode, decay, routers that have it, and mean live gain), hit_rate and bytes_read of the
        expert cache with expert_cache (its settings and counters, `layers` for each layer; all None without one),
        profile, family, base, points, closed.
        """
        cache = expert_cache_of(self._base)
        experts = None if cache is None else cache.stats()
        sensors, monitored = self._monitor.status(), self._monitor.running
        with self._gate.lock:
            waiting = self._staged is not None
            return {
                "strength": self.strength,
                "target": self._target,
                "pressure": self._pressure,
                "pinned": self._pinned,
                "monitored": monitored,
                "reason": self._reason + ("; it waits for the next step" if waiting else ""),
                "waiting": waiting,
                "swaps": self._swaps,
                **self._timings.status(),
                "running": self._gate.sessions,
                "sensors": sensors,
                "recency": None if self._prior is None else self._prior.status(),
                "hit_rate": experts and experts["hit_rate"],
                "bytes_read": experts and experts["bytes"],
                "expert_cache": experts,
                "profile": self.profile.name,
                "family": str(self.family.path),
                "base": self.family.base_id,
                "points": list(self.family.strengths),
                "closed": self._closed,
            }

    def close(self) -> None:
        """Restore the base router weights bit for bit and let go of the model; waits for forwards in flight.

        The model stays wrapped (`model.unload()` gives the base model back). Closing twice is fine. Raises
        MergeStateError inside a forward of the same thread.
        """
        self.release(keep_live=False)

    def release(self, *, keep_live: bool) -> None:
        """`close`, or with `keep_live` leave the routers at the present strength, as `merge_and_unload` does."""
        if self._closed:
            return
        self._sample_now()
        with self._gate.closed_for_good():
            self._staged = self._retired = None
            self._closed = True
            self._ticket += 1
            self._routers.release(keep_live=keep_live)
            self._target, self._pressure, self._reason = self.strength, None, "closed"
            self._tuner.dial = None
            for owner, name, hook in self._hooked:
                if owner.__dict__.get(name) is hook:
                    del owner.__dict__[name]
            for owner in (self._model, self._base):
                if owner.__dict__.get("controller") is self:
                    del owner.__dict__["controller"]
        self._monitor.close()
        self._events.close()

    def __enter__(self) -> Controller:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise MergeStateError(
            "a model with an open controller cannot be copied or pickled: its routers are at a strength, and two "
            "models cannot share one dial. Call model.controller.close() first."
        )

    def after_fork(self) -> None:
        """In the child: locks that threads of the parent held, and those threads, are not there."""
        self._stage_lock = threading.RLock()
        self._gate.after_fork()
        self._monitor.after_fork()
        self._events.after_fork()

    # Target -> staged -> live

    def hear(self, decision: Decision) -> None:
        """What the monitor decided; nothing while a hand pins the dial."""
        with self._gate.lock:
            if not self._pinned and not decision.changed:
                self._pressure, self._reason = decision.pressure, decision.reason
        if decision.changed:
            self._post(decision.strength, decision.pressure, decision.reason, pinned=None)
        if self._events.recording:
            self._events.sample(self._sample(decision))

    def _sample_now(self) -> None:
        """A log begins and ends with a sample, however short the run."""
        if self._events.recording and self._monitor.running:
            self._monitor.tick()

    def _sample(self, decision: Decision) -> dict[str, Any]:
        cache = expert_cache_of(self._base)
        experts = {} if cache is None else cache.stats(layers=False)
        return {
            "pressure": self._pressure,
            "strength": self.strength,
            "tpot_ms": self._timings.tpot_ms,
            "reason": decision.reason,
            "signals": dict(decision.signals),
            **{key: experts.get(key) for key in _SAMPLED},
        }

    def _post(self, strength: float, pressure: float | None, reason: str, *, pinned: bool | None) -> None:
        """pinned: whether a hand holds the dial from now on; None: the sensors speak, unless a hand holds it."""
        with self._gate.lock:
            if pinned is None and (self._pinned or self._closed):
                return
            self._check_open()
            self._pinned = bool(pinned)
            self._target, self._pressure, self._reason = strength, pressure, reason
            self._ticket += 1
            ticket = self._ticket
        with self._stage_lock:
            if ticket == self._ticket:  # else a later target is on its way
                self._stage(strength, ticket)
        self._gate.swap_if_idle()

    def _stage(self, strength: float, ticket: int) -> None:
        with self._gate.lock:
            self._check_open()
            if strength == self.strength:
                self._staged = None
                return
            self._retired = None
        begin = time.perf_counter()
        staged = self._routers.stage(strength)
        stage_ms = (time.perf_counter() - begin) * 1e3
        with self._gate.lock:
            self._timings.stage_ms.append(stage_ms)
            if ticket == self._ticket:
                self._staged = staged

    def _swap(self, alone: bool) -> None:
        """Called by the gate, under its lock, while no forward is in flight."""
        staged, self._staged = self._staged, None
        assert staged is not None
        before = self.strength
        begin = time.perf_counter()
        self._routers.commit(staged, alone=alone)
        self._retired = staged  # freeing it takes as long as the copy: the next staging does it
        self._timings.swap_ms.append((time.perf_counter() - begin) * 1e3)
        self._swaps += 1
        by = "hand" if self._pinned else "sensors"
        self._events.swap(
            Swap(time.time(), before, staged.strength, self._pressure, by, self._reason, self._timings.swap_ms[-1])
        )

    def _check_open(self) -> None:
        if self._closed:
            raise MergeStateError("this controller is closed: call get_remoe_model again.")

    # Step boundaries on the instance; classes and forwards stay untouched

    def _install(self) -> None:
        self._hook(self._base, "generate", self._around_generate)
        self._hook(self._base, "prepare_inputs_for_generation", self._before_forward)
        self._hook(self._base, "_update_model_kwargs_for_generation", self._after_forward)
        for owner in (self._base, self._model):
            self._hook(owner, "save_pretrained", self._refuse_to_save)

    def _hook(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        original = getattr(owner, name, None)
        if original is None:  # a model without generate
            return
        # transformers reads the signature of prepare_inputs_for_generation, which `wraps` keeps.
        hook = functools.wraps(original)(functools.partial(around, original))
        owner.__dict__[name] = hook
        self._hooked.append((owner, name, hook))

    def _around_generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._timings.steps_end()
        with self._gate.generating():
            try:
                return original(*args, **kwargs)
            finally:
                self._timings.steps_end()

    def _before_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._timings.step_begins()
        self._gate.boundary(opens=True)
        return original(*args, **kwargs)

    def _after_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._gate.boundary(opens=False)
        return original(*args, **kwargs)

    def _refuse_to_save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        raise MergeStateError(
            f"the router weights in memory are those of strength {self.strength:g}, so nothing is saved. The adapters "
            f"are in {self.family.path}; for a checkpoint of this strength call model.merge_and_unload() and save its "
            "result, for the base model.unload()."
        )


class _Paused(AbstractContextManager[None]):
    """Resumes what was paused, and nothing else: not a dial without monitor, nor within an outer block."""

    def __init__(self, controller: Controller, resumes: bool) -> None:
        self._controller, self._resumes = controller, resumes

    def __exit__(self, *error: object) -> None:
        if self._resumes and not self._controller._closed:
            self._controller.resume()


def _unit(what: str, value: object) -> float:
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not 0.0 <= number <= 1.0:  # NaN fails too
        meaning = "0 (plenty) to 1 (thrashing)" if what == "pressure" else "0 (the base) to 1 (the strongest point)"
        raise ConfigError(f"{what} {value!r} is out of range: give a number from {meaning}.")
    return number
