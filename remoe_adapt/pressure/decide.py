"""The dial's policy: `decide(state, reading, profile) -> (state, decision)`, a pure function. Time enters only inside a
reading.

Pressure now is that of the worst sensor (`pressure.signals`). It counts as far as it is (1) sustained: three quarters
of the samples of the last `rise_s` have reached it, and (2) present: it is there now; and it raises nothing while it is
(3) already recovering: below its own moving average. These are the conditions of Meta's oomd. What counts is held for
half of `fall_s` of calm and falls in the other half, so that shorter breaks in the pressure move nothing. The profile's
curve maps it to strength, which moves by `deadband` at least, falls `dwell_s` after a swap at the soonest, and swaps
`max_swaps_per_s` times at most.

Strength itself lowers misses and stalls, so calm there proves nothing. Pressure on the word of stalls alone, with
memory in order, has to last longer, is then held for `fall_s`, and each time that it comes back soon after, for twice
as long: looking whether it is over gets ever rarer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.pressure.budget import TierState, budgets, is_whole, notes
from remoe_adapt.pressure.reading import Reading
from remoe_adapt.pressure.signals import Signal, ease_floors, losses, weigh

# Two pressures closer than this count as equal, else noise in a sensor would restart every hold.
SAME_PRESSURE = 0.02
# Pressure that has fallen to no less than this share of the held one still holds it, so that the fall does not begin.
HOLDING_SHARE = 0.85
# Half of fall_s is so many time constants, after which less than SAME_PRESSURE is left.
FALL_CONSTANTS = 4.0
# This share of the samples of a window may be lower and the pressure still counts as sustained.
DROPOUT_SHARE = 0.25
# Stalls must last this many times rise_s before they count, because one slow read is no thrashing,
STALL_PATIENCE = 4.0
# and never less than this many seconds, however short rise_s is.
LEAST_PATIENCE_S = 2.0
# A hold of stalls doubles up to this many times fall_s; without a bound the dial would never look again.
LONGEST_HOLD = 64
_CALM = Signal("", 0.0, "no sensor reports pressure")


class DecisionState(NamedTuple):  # a decision changes it several times: tuples cost the least
    """Everything the policy remembers. Times are on its own clock, which a long gap or a clock that goes back cannot
    move far: what was not seen did not happen."""

    strength: float = 0.0
    time_s: float | None = None
    clock_s: float = 0.0
    samples: tuple[tuple[float, float, float], ...] = ()  # (clock_s, pressure, pressure of stalls), oldest first
    average: float = 0.0
    held: float = 0.0
    held_at_s: float = 0.0
    swapped_at_s: float = -math.inf
    cause: str = ""
    stall_held: float = 0.0
    stall_until_s: float = -math.inf
    stall_released_s: float = -math.inf
    stall_hold: int = 1
    tiers: Mapping[str, TierState] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """What the policy wants, and why.

    strength: to hold from now on.
    changed: it is another than before.
    pressure: what counts.
    present: what the worst sensor says now.
    cause: the sensor that `pressure` came from ("" in calm).
    why: what holds for the strength, in words.
    moves: what becomes of the cache, in words.
    budgets: of the cache's tiers ("cache", "below") to set, in bytes.
    signals: every sensor's pressure.
    unusable: measures that said nothing, and why.
    calm: no pressure anywhere, none remembered, a whole cache: more of that changes nothing, as long as each sensor of
        `floors` sees so many bytes free.
    floors: those bytes by sensor; empty without calm.
    notes: what of the profile's memory section cannot hold here, in words, by place and key.
    """

    strength: float
    changed: bool
    pressure: float
    present: float
    cause: str
    why: str
    moves: tuple[str, ...]
    budgets: Mapping[str, int]
    signals: Mapping[str, float]
    unusable: Mapping[str, str]
    calm: bool
    floors: Mapping[str, float]
    notes: Mapping[str, str]

    @property
    def reason(self) -> str:
        """All of it in words."""
        return "; ".join([self.why, *self.moves, *self.notes.values()])

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self) | {"reason": self.reason}


def decide(
    state: DecisionState, reading: Reading, profile: DeviceProfile, *, share: float = 1.0
) -> tuple[DecisionState, Decision]:
    """What a reading means for the dial and the cache's budget, and what to remember.

    state: what the last call remembered, with the strength that the dial has now.
    reading: one sample of the sensors.
    profile: its curve, ranges and times.
    share: the part of lacking memory that this model gives back, where several models share one budget.
    """
    weighed = weigh(reading, profile)
    state, step_s = _tick(state, reading, profile)
    # Budgets come first, since what they take from the cache is pressure of this very sample.
    tiers, wanted, moves = budgets(state.tiers, weighed, state.clock_s, step_s, profile, share)
    memory = (*weighed.memory, *losses(weighed, wanted, profile))
    worst = max(memory, key=lambda signal: signal.pressure, default=_CALM)
    state = state._replace(tiers=MappingProxyType(tiers))
    stalled = 0.0 if weighed.stall is None else weighed.stall.pressure
    state = _weigh_stalls(state, stalled, worst.pressure, profile)
    if weighed.stall is not None and state.stall_held > worst.pressure:
        worst = Signal("stall", state.stall_held, weighed.stall.words)
    if worst.pressure == 0.0:
        worst = worst._replace(name="")
    state, why_not = _hold(state, worst, stalled, step_s, profile)
    strength, why = _strength(state, worst, why_not, profile)
    changed = strength != state.strength
    signals = {signal.name: signal.pressure for signal in (*memory, *([weighed.stall] if weighed.stall else []))}
    calm = not (changed or wanted or state.held or state.stall_held or any(signals.values())) and is_whole(weighed)
    # A strength that still has to fall needs samples, however calm they are.
    calm = calm and strength == profile.strength_at(0.0)
    decision = Decision(
        strength=strength,
        changed=changed,
        pressure=state.held,
        present=worst.pressure,
        cause=state.cause,
        why=why,
        moves=tuple(moves),
        budgets=wanted,
        signals=signals,
        unusable=weighed.unusable,
        calm=calm,
        floors=ease_floors(weighed) if calm else {},
        notes=notes(weighed, profile),
    )
    if changed:
        state = state._replace(strength=strength, swapped_at_s=state.clock_s)
    return state, decision


def _tick(state: DecisionState, reading: Reading, profile: DeviceProfile) -> tuple[DecisionState, float]:
    longest = max(1.0, 2 / profile.controller.sample_hz)
    if not math.isfinite(reading.time_s):
        return state._replace(samples=state.samples[:-1]), 0.0
    # A machine that slept for an hour has not seen an hour of calm.
    step_s = 0.0 if state.time_s is None else min(longest, max(0.0, reading.time_s - state.time_s))
    # Two samples at one time are one: the later counts.
    samples = state.samples if step_s > 0 else state.samples[:-1]
    return state._replace(time_s=reading.time_s, clock_s=state.clock_s + step_s, samples=samples), step_s


def _toward(average: float, value: float, step_s: float, constant_s: float) -> float:
    kept = math.exp(-step_s / constant_s) if constant_s > 0 else 0.0
    return min(1.0, max(0.0, value + (average - value) * kept))


def _weigh_stalls(state: DecisionState, present: float, memory: float, profile: DeviceProfile) -> DecisionState:
    """Pressure on the word of stalls alone: taken up late, held long."""
    controller, now_s = profile.controller, state.clock_s
    samples = (*state.samples, (now_s, memory, present))
    sustained = min(present, _sustained(samples, 2, _patience_s(profile)))
    # The hold that doubles is what makes looks rarer.
    hold_s = state.stall_hold * controller.fall_s
    if sustained > max(memory, state.stall_held + SAME_PRESSURE):
        again = now_s - state.stall_released_s < 2 * hold_s + controller.fall_s
        doubled = min(LONGEST_HOLD, 2 * state.stall_hold) if again else 1
        hold = state.stall_hold if state.stall_held > 0 else doubled
        until_s = now_s + hold * controller.fall_s
        return state._replace(stall_held=sustained, stall_hold=hold, stall_until_s=until_s)
    if state.stall_held > 0 and sustained >= state.stall_held - SAME_PRESSURE:  # raised strength has not helped
        return state._replace(stall_until_s=now_s + hold_s)
    if state.stall_held > 0 and now_s >= state.stall_until_s:
        return state._replace(stall_held=0.0, stall_released_s=now_s)
    return state


def _patience_s(profile: DeviceProfile) -> float:
    return max(LEAST_PATIENCE_S, STALL_PATIENCE * profile.controller.rise_s)


def _kept(samples: tuple[tuple[float, float, float], ...], window_s: float) -> tuple[tuple[float, float, float], ...]:
    """The samples of the last `window_s`, and the one before them: what held when the window began."""
    begin_s = samples[-1][0] - window_s + 1e-9
    first = next((place for place, sample in enumerate(samples) if sample[0] > begin_s), len(samples) - 1)
    return samples[max(0, first - 1) :]


def _sustained(samples: tuple[tuple[float, float, float], ...], column: int, window_s: float) -> float:
    """What three quarters of the samples of a window have reached; 0 while less than the window has been seen."""
    if window_s == 0:
        return samples[-1][column]
    within = _kept(samples, window_s)
    if within[0][0] > samples[-1][0] - window_s + 1e-9:
        return 0.0
    return sorted(sample[column] for sample in within)[int(DROPOUT_SHARE * len(within))]


def _hold(
    state: DecisionState, worst: Signal, stalled: float, step_s: float, profile: DeviceProfile
) -> tuple[DecisionState, str]:
    """The pressure that counts, and why it is not more."""
    controller, now_s, present = profile.controller, state.clock_s, worst.pressure
    average = _toward(state.average, present, step_s, controller.rise_s)
    samples = _kept((*state.samples, (now_s, present, stalled)), max(controller.rise_s, _patience_s(profile)))
    state = state._replace(average=average, samples=samples)
    recovering = present < average - SAME_PRESSURE
    sustained = _sustained(samples, 1, controller.rise_s)
    level = state.held if recovering else min(present, sustained)
    waits = "it is already recovering" if recovering else f"the rest has not lasted {controller.rise_s:g} s"
    waits = waits if present > max(level, state.held) + SAME_PRESSURE else ""
    if level > state.held:
        return state._replace(held=level, held_at_s=now_s, cause=worst.name), waits
    if present == 0.0 and state.held <= SAME_PRESSURE:  # what is left is nothing, and must not count for ever
        return state._replace(held=0.0, cause=""), ""
    # Pressure that is nearly as high as before is the same trouble, and the hold starts anew.
    if present >= HOLDING_SHARE * state.held:
        return state._replace(held_at_s=now_s), waits
    calm_s = now_s - state.held_at_s
    if calm_s < controller.fall_s / 2:
        return state, f"calmer for {calm_s:.1f} s, held until {controller.fall_s / 2:g} s"
    held = _toward(state.held, present, step_s, controller.fall_s / 2 / FALL_CONSTANTS)
    if present == 0.0 and held <= SAME_PRESSURE:
        held = 0.0
    return state._replace(held=held, cause=state.cause if held > 0 else ""), ""


def _strength(state: DecisionState, worst: Signal, why_not: str, profile: DeviceProfile) -> tuple[float, str]:
    controller, now = profile.controller, state.strength
    target = profile.strength_at(min(1.0, max(0.0, state.held)))
    what = f"{worst.name}: {worst.words}: pressure {worst.pressure:.2f}" if worst.name else "all sensors are calm"
    if abs(worst.pressure - state.held) > SAME_PRESSURE:
        what += f", {state.held:.2f} {'still ' if state.held > worst.pressure else ''}counts"
    what += f" ({why_not})" if why_not else ""
    ends = (profile.strength_at(0.0), profile.strength_at(1.0))
    if target == now or (abs(target - now) < controller.deadband and target not in ends):
        return now, f"{what}; strength stays {now:.2f}"
    # Rising waits for the limit of swaps alone: memory that runs out does not wait.
    pause_s = 1 / controller.max_swaps_per_s
    if target < now:
        pause_s = max(pause_s, controller.dwell_s)
    since_s = state.clock_s - state.swapped_at_s
    if since_s < pause_s - 1e-9:
        limit = "swaps are limited" if target > now else "it falls slowly"
        return now, f"{what}; strength stays {now:.2f} for {pause_s - since_s:.1f} s more, then {target:.2f} ({limit})"
    return target, f"{what}; strength {'rises' if target > now else 'falls'} from {now:.2f} to {target:.2f}"
