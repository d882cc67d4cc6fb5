"""The dial's policy: `decide(state, reading, profile) -> (state, decision)`, a pure function. Time enters only inside a
reading.

Pressure now is that of the worst sensor (`pressure.signals`). It counts as far as it is (1) sustained: an average over
`rise_s` has reached it, and (2) present: it is there now; and it raises nothing while it is (3) already recovering:
below its own average. These are the conditions of Meta's oomd. What counts is held for half of `fall_s` of calm and
falls in the other half, so that shorter breaks in the pressure move nothing. The profile's curve maps it to strength,
which moves by `deadband` at least, falls `dwell_s` after a swap at the soonest, and swaps `max_swaps_per_s` times at
most.

Strength itself lowers misses and stalls, so calm there proves nothing. Pressure on the word of stalls alone, with
memory in order, has to last longer, is then held for `fall_s`, and each time that it comes back soon after, for twice
as long: looking whether it is over gets ever rarer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from types import MappingProxyType
from typing import Any

from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.pressure.budget import TierState, budgets
from remoe_adapt.pressure.reading import Reading
from remoe_adapt.pressure.signals import Signal, weigh

# An average that follows a step has this part of it after its time constant.
_REACHED = 1.0 - math.exp(-1.0)
# Half of fall_s is so many time constants, after which nothing is left.
_CONSTANTS = 4.0
_NOTHING = math.exp(-_CONSTANTS)
# Pressures closer than this are the same.
_SAME = 0.02
# Stalls must last this many times rise_s, and at least so many seconds.
_STALL_PATIENCE, _LEAST_PATIENCE_S = 4.0, 2.0
_LONGEST_HOLD = 64
_CALM = Signal("", 0.0, "no sensor reports pressure")


@dataclass(frozen=True, slots=True)
class PolicyState:
    """Everything the policy remembers. Times are on its own clock, which a long gap or a clock that goes back cannot
    move far: what was not seen did not happen."""

    strength: float = 0.0
    time_s: float | None = None
    clock_s: float = 0.0
    average: float = 0.0
    held: float = 0.0
    held_at_s: float = 0.0
    swapped_at_s: float = -math.inf
    cause: str = ""
    stall_average: float = 0.0
    stall_held: float = 0.0
    stall_until_s: float = -math.inf
    stall_released_s: float = -math.inf
    stall_hold: int = 1
    tiers: Mapping[str, TierState] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Decision:
    """strength: to hold from now on; changed: it is another than before; pressure: what counts; present: what the worst
    sensor says now; cause: the sensor that `pressure` came from ("" in calm); reason: in words; budgets: expert-cache
    budgets to set, in bytes, by tier ("cache", "below"); signals: every sensor's pressure; unusable: measures that said
    nothing, and why."""

    strength: float
    changed: bool
    pressure: float
    present: float
    cause: str
    reason: str
    budgets: Mapping[str, int]
    signals: Mapping[str, float]
    unusable: Mapping[str, str]

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


def decide(
    state: PolicyState, reading: Reading, profile: DeviceProfile, *, share: float = 1.0
) -> tuple[PolicyState, Decision]:
    """What a reading means for the dial and the cache's budget, and what to remember.

    share: the part of lacking memory that this model gives back, where several models share one budget.
    """
    weighed = weigh(reading, profile)
    state, step_s = _tick(state, reading, profile)
    tiers, wanted, moves = budgets(state.tiers, weighed, state.clock_s, step_s, profile, share)
    worst = max(weighed.memory, key=lambda signal: signal.pressure, default=_CALM)
    state = replace(state, tiers=MappingProxyType(tiers))
    state = _weigh_stalls(state, weighed.stall, worst.pressure, step_s, profile)
    if weighed.stall is not None and state.stall_held > worst.pressure:
        worst = Signal("stall", state.stall_held, weighed.stall.words)
    if worst.pressure == 0.0:
        worst = replace(worst, name="")
    state, why_not = _hold(state, worst, step_s, profile)
    strength, why = _strength(state, worst, why_not, profile)
    changed = strength != state.strength
    decision = Decision(
        strength,
        changed,
        state.held,
        worst.pressure,
        state.cause,
        "; ".join([why, *moves]),
        wanted,
        {signal.name: signal.pressure for signal in (*weighed.memory, *([weighed.stall] if weighed.stall else []))},
        weighed.unusable,
    )
    if changed:
        state = replace(state, strength=strength, swapped_at_s=state.clock_s)
    return state, decision


def _tick(state: PolicyState, reading: Reading, profile: DeviceProfile) -> tuple[PolicyState, float]:
    longest = max(1.0, 2 / profile.controller.sample_hz)
    if not math.isfinite(reading.time_s):
        return state, 0.0
    step_s = 0.0 if state.time_s is None else min(longest, max(0.0, reading.time_s - state.time_s))
    return replace(state, time_s=reading.time_s, clock_s=state.clock_s + step_s), step_s


def _toward(average: float, value: float, step_s: float, constant_s: float) -> float:
    kept = math.exp(-step_s / constant_s) if constant_s > 0 else 0.0
    return min(1.0, max(0.0, value + (average - value) * kept))


def _weigh_stalls(
    state: PolicyState, stall: Signal | None, memory: float, step_s: float, profile: DeviceProfile
) -> PolicyState:
    """Pressure on the word of stalls alone: taken up late, held long."""
    controller, now_s = profile.controller, state.clock_s
    present = 0.0 if stall is None else stall.pressure
    patience_s = max(_LEAST_PATIENCE_S, _STALL_PATIENCE * controller.rise_s)
    average = _toward(state.stall_average, present, step_s, patience_s)
    state = replace(state, stall_average=average)
    sustained = min(present, average / _REACHED)
    hold_s = state.stall_hold * controller.fall_s
    if sustained > max(memory, state.stall_held + _SAME):
        again = now_s - state.stall_released_s < 2 * hold_s + controller.fall_s
        doubled = min(_LONGEST_HOLD, 2 * state.stall_hold) if again else 1
        hold = state.stall_hold if state.stall_held > 0 else doubled
        until_s = now_s + hold * controller.fall_s
        return replace(state, stall_held=sustained, stall_hold=hold, stall_until_s=until_s)
    if state.stall_held > 0 and sustained >= state.stall_held - _SAME:  # raised strength has not helped
        return replace(state, stall_until_s=now_s + hold_s)
    if state.stall_held > 0 and now_s >= state.stall_until_s:
        return replace(state, stall_held=0.0, stall_released_s=now_s)
    return state


def _hold(state: PolicyState, worst: Signal, step_s: float, profile: DeviceProfile) -> tuple[PolicyState, str]:
    """The pressure that counts, and why it is not more."""
    controller, now_s, present = profile.controller, state.clock_s, worst.pressure
    average = _toward(state.average, present, step_s, controller.rise_s)
    state = replace(state, average=average)
    recovering = present < average - _SAME
    sustained = min(1.0, average / _REACHED)
    level = state.held if recovering else min(present, sustained)
    if level > state.held:
        waits = "" if sustained >= present - _SAME else f"as far as it has lasted (less than {controller.rise_s:g} s)"
        return replace(state, held=level, held_at_s=now_s, cause=worst.name), waits
    if present >= state.held - _SAME:
        waits = "it is already recovering" if recovering and present > state.held else ""
        return replace(state, held_at_s=now_s), waits
    calm_s = now_s - state.held_at_s
    if calm_s < controller.fall_s / 2:
        return state, f"calmer for {calm_s:.1f} s, held until {controller.fall_s / 2:g} s"
    held = _toward(state.held, present, step_s, controller.fall_s / 2 / _CONSTANTS)
    if present == 0.0 and held < _NOTHING:
        held = 0.0
    return replace(state, held=held, cause=state.cause if held > 0 else ""), ""


def _strength(state: PolicyState, worst: Signal, why_not: str, profile: DeviceProfile) -> tuple[float, str]:
    controller, now = profile.controller, state.strength
    target = profile.strength_at(min(1.0, max(0.0, state.held)))
    what = f"{worst.name}: {worst.words}: pressure {worst.pressure:.2f}" if worst.name else "all sensors are calm"
    if abs(worst.pressure - state.held) > _SAME:
        what += f", {state.held:.2f} counts"
    what += f" ({why_not})" if why_not else ""
    ends = (profile.strength_at(0.0), profile.strength_at(1.0))
    if target == now or (abs(target - now) < controller.deadband and target not in ends):
        return now, f"{what}; strength stays {now:.2f}"
    pause_s = 1 / controller.max_swaps_per_s
    if target < now:
        pause_s = max(pause_s, controller.dwell_s)
    since_s = state.clock_s - state.swapped_at_s
    if since_s < pause_s - 1e-9:
        limit = "swaps are limited" if target > now else "it falls slowly"
        return now, f"{what}; strength stays {now:.2f} for {pause_s - since_s:.1f} s more, then {target:.2f} ({limit})"
    return target, f"{what}; strength {'rises' if target > now else 'falls'} from {now:.2f} to {target:.2f}"
