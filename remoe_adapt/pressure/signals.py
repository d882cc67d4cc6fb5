"""What each sensor's reading means as pressure, from 0 to 1, by the ranges of a profile. More is never less pressure.

| signal | 0 | 1 |
|---|---|---|
| headroom | free memory at the reserve, own use within the budget | half a reserve beyond either |
| cache loss | the expert cache keeps its budget | `pressure.cache_loss` of it is given back |
| psi memory, psi io, swap | `from` of the profile's range | its `full` |
| faults | the same: major faults, as far as pages are read again that had been dropped | |
| any other sensor | its measure `<name>.pressure` is 0 | it is 1 |
| stall | tokens wait `from` of the time for experts | `full` of it, with at least 1 in 20 look-ups missed |

Headroom is that of the tightest place: the machine, the cgroup, and a GPU of its own. Memory that CPU and GPU share
counts once. A value that is not finite, negative or too old is no word at all.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from remoe_adapt._support import size_text
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.pressure.reading import Measure, Reading

# A reserve larger than this part of the memory there is cannot be kept (a profile of another machine).
_LARGEST_RESERVE = 0.25
# Below this share of look-ups missed, stalls are the storage's fault and no routing helps.
_MISSES_THAT_EXPLAIN = 0.05
# Below this part of its budget a cache is still filling: whatever is asked for is missing.
_FILLED = 0.8
# No machine has so much; a part may seem larger than its whole by what moved between the two being read.
_MOST_BYTES, _SKEW = float(1 << 60), 0.05
_PART_OF = {"memory.available": "memory.total", "cgroup.headroom": "cgroup.limit", "gpu.free": "gpu.total"}
# A measure whose name ends so is a pressure already.
_PRESSURE = ".pressure"
# Part of the reserve that is to spare where nothing needs a closer look.
_EASE = 0.5
# Readings older than this many samples say nothing.
_STALE_SAMPLES = 5


class Signal(NamedTuple):
    """One sensor's pressure, 0 to 1, and what it is in words."""

    name: str
    pressure: float
    words: str


class Place(NamedTuple):
    """Memory that something takes: bytes free, bytes that must stay free, and bytes lacking (negative: to spare).
    seen: how many sensors say what is free; total: all there is; used: what the model takes, None: not known, or no
    matter; name: of this memory, in words."""

    free: float
    reserve: float
    lacking: float
    seen: int
    total: float
    used: float | None
    name: str


@dataclass(frozen=True, slots=True)
class Weighed:
    """Signals of memory (`memory`) and of the cache's stalls (`stall`, None without one), places "host" and "device",
    values by measure name, and measures that could not be used with the reason."""

    memory: tuple[Signal, ...]
    stall: Signal | None
    places: Mapping[str, Place]
    values: Mapping[str, float]
    unusable: Mapping[str, str]


def weigh(reading: Reading, profile: DeviceProfile) -> Weighed:
    """The pressure of every sensor in a reading."""
    # Everything below sees finite, fresh and possible values alone, so that no sensor can make pressure out of an
    # error.
    values, unusable = _usable(reading, _STALE_SAMPLES / profile.controller.sample_hz)
    places = _places(values, profile)
    signals = [_headroom(place, where, values, profile) for where, place in places.items()]
    signals += _rates(values, profile)
    signals += [
        Signal(name, min(1.0, value), f"{name} says {value:.2f}")
        for measure, value in values.items()
        if (name := measure.removesuffix(_PRESSURE)) != measure
    ]
    return Weighed(tuple(signals), _stall(values, profile), places, values, unusable)


def ease_floors(weighed: Weighed) -> dict[str, float]:
    """By sensor, the bytes that have to be free for its memory to be at ease: the reserve and half of it."""
    floors = {where: (1 + _EASE) * place.reserve for where, place in weighed.places.items()}
    sensors = {"memory.available": ("memory", "host"), "cgroup.headroom": ("cgroup", "host")}
    # A GPU that shares the host's memory is no place of its own.
    sensors |= {"gpu.free": ("gpu", "device")} if "device" in floors else {}
    return {sensor: floors[where] for measure, (sensor, where) in sensors.items() if measure in weighed.values}


def losses(weighed: Weighed, budgets: Mapping[str, float], profile: DeviceProfile) -> list[Signal]:
    """The pressure of what the cache's tiers ("cache", "below") do without; budgets: of those that are about to change,
    so that strength rises with the loss and not one sample after it."""
    signals = []
    for tier, name in (("cache", "cache loss"), ("below", "RAM tier loss")):
        now, allowed = weighed.values.get(f"{tier}.budget"), weighed.values.get(f"{tier}.allowed")
        if now is not None and allowed:
            # The budget that is about to be set, so that strength follows in the same sample.
            budget = budgets.get(tier, now)
            pressure = ramp(max(0.0, 1.0 - budget / allowed), profile.pressure.cache_loss)
            signals.append(
                Signal(name, pressure, f"the expert cache keeps {size_text(budget)} of its {size_text(allowed)}")
            )
    return signals


def ramp(value: float, limits: tuple[float, float] | None) -> float:
    """0 up to the first limit, 1 from the second, linear between; 0 without limits."""
    if limits is None:
        return 0.0
    return min(1.0, max(0.0, (value - limits[0]) / (limits[1] - limits[0])))


def _usable(reading: Reading, stale_s: float) -> tuple[dict[str, float], dict[str, str]]:
    values: dict[str, float] = {}
    unusable = dict(reading.missing)
    for name, measure in reading.measures.items():
        age_s = reading.time_s - measure.time_s
        value = _as_float(measure.value)
        if not math.isfinite(value):
            unusable[name] = f"{value} is not finite"
        elif value < 0:
            unusable[name] = f"{value:g} is negative"
        elif measure.unit == "B" and value > _most(name, reading.measures):
            unusable[name] = f"{value:g} bytes are more than there can be"
        elif not age_s <= max(1.0, stale_s):
            unusable[name] = f"it is {age_s:.1f} s old"
        else:
            values[name] = value
    return values, unusable


def _as_float(value: float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer of anybody's sensor
        return math.inf


def _most(name: str, measures: Mapping[str, Measure]) -> float:
    whole = measures.get(_PART_OF.get(name, ""))
    size_bytes = 0.0 if whole is None else _as_float(whole.value)
    return (1 + _SKEW) * size_bytes if 0 < size_bytes < _MOST_BYTES else _MOST_BYTES


def _places(values: Mapping[str, float], profile: DeviceProfile) -> dict[str, Place]:
    shared = values.get("gpu.unified", 0.0) > 0
    used = values.get("process.private")
    gpu_used = values.get("gpu.allocated")
    if used is not None and shared:
        # What the GPU holds is not in the process's own pages, though it is the same memory.
        used += gpu_used or 0.0
    free = [values[name] for name in ("memory.available", "cgroup.headroom") if name in values]
    total = [values[name] for name in ("memory.total", "cgroup.limit") if values.get(name)]
    # A Jetson's memory would else count twice, with one reserve each.
    has_card = not shared and "gpu.free" in values
    places: dict[str, Place] = {}
    if free:
        # The budget of a profile is that of the memory where the model is.
        places["host"] = _place(free, min(total, default=math.inf), None if has_card else used, profile, "memory")
    if has_card:
        card_free = values["gpu.free"] + values.get("gpu.reusable", 0.0)
        places["device"] = _place([card_free], values.get("gpu.total") or math.inf, gpu_used, profile, "GPU memory")
    return places


def _place(seen: list[float], total: float, used: float | None, profile: DeviceProfile, name: str) -> Place:
    free = min(seen)
    reserve = min(float(profile.memory.reserve_bytes), _LARGEST_RESERVE * total)
    budget = profile.memory.budget_bytes
    # Without a budget only what is free can be lacking.
    over = -math.inf if used is None or budget is None else used - budget
    return Place(free, reserve, max(reserve - free, over), len(seen), total, used, name)


def notes_of(places: Mapping[str, Place], profile: DeviceProfile) -> dict[str, str]:
    """What of the profile's memory section cannot hold in the memory there is, in words, by place and key."""
    notes: dict[str, str] = {}
    for where, place in places.items():
        notes |= {
            f"{where} {key}": f"{words} of profile {profile.name} {why}"
            for key, words, why in _beyond(place.total, place.name, place.used is not None, profile)
        }
    return notes


def unfit(profile: DeviceProfile, total_bytes: float) -> list[str]:
    """What of the profile's memory section cannot hold on a device of so much memory, in words."""
    return [f"{words} {why}" for _, words, why in _beyond(total_bytes, "memory", True, profile)]


def _beyond(total: float, name: str, has_budget: bool, profile: DeviceProfile) -> Iterator[tuple[str, str, str]]:
    memory, most = profile.memory, _LARGEST_RESERVE * total
    if memory.reserve_bytes > most:
        why = f"is more than a quarter of the {size_text(total)} of {name} here: {size_text(most)} is kept free instead"
        yield "reserve", f"memory.reserve {size_text(memory.reserve_bytes)}", why
    if has_budget and memory.budget_bytes is not None and memory.budget_bytes > total:
        why = f"is more than the {size_text(total)} of {name} here, so that it never binds: only what is free counts"
        yield "budget", f"memory.budget {size_text(memory.budget_bytes)}", why


def _headroom(place: Place, where: str, values: Mapping[str, float], profile: DeviceProfile) -> Signal:
    # Full pressure comes half a reserve beyond, so that the strongest setting is live before memory is gone.
    pressure = min(1.0, max(0.0, place.lacking / max(place.reserve / 2, 1.0)))
    if place.lacking > place.reserve - place.free:
        words = f"the model takes {size_text(place.used or 0)} of {place.name}, its budget is "
        return Signal(f"{where} headroom", pressure, words + size_text(profile.memory.budget_bytes or 0))
    in_group = where == "host" and values.get("cgroup.headroom") == place.free
    words = f"{size_text(place.free)} of {place.name} {'of this cgroup ' if in_group else ''}free"
    words += f", reserve {size_text(place.reserve)}"
    return Signal(f"{where} headroom", pressure, words)


def _rates(values: Mapping[str, float], profile: DeviceProfile) -> list[Signal]:
    ranges, signals = profile.pressure, []
    for kind, limits in (("memory", ranges.psi_memory), ("io", ranges.psi_io)):
        # The own group's stalls are ours; the machine's may be those of a neighbour in a group of its own.
        whose = "psi.cgroup" if f"psi.cgroup.{kind}.some" in values else "psi"
        some, full = (values.get(f"{whose}.{kind}.{part}") for part in ("some", "full"))
        if some is not None or full is not None:
            # When all tasks stall nothing is done at all, which weighs twice as much as when some do.
            stalled = max(some or 0.0, 2 * (full or 0.0))
            words = f"tasks stalled on {kind} {some or 0.0:.0%} of the time, all of them {full or 0.0:.0%}"
            signals.append(Signal(f"psi {kind}", ramp(stalled, limits), words))
    if (faults := values.get("process.faults")) is not None:
        again = values.get("process.refaults")
        words = f"{faults:.0f} major faults per second"
        words += "" if again is None else f", {again:.0f} pages per second read again"
        signals.append(Signal("faults", ramp(faults if again is None else min(faults, again), ranges.faults), words))
    swapped = [values[name] for name in ("swap.in", "swap.out") if name in values]
    if swapped:
        words = f"{size_text(sum(swapped))} per second swapped"
        signals.append(Signal("swap", ramp(sum(swapped), ranges.swap), words))
    return signals


def _stall(values: Mapping[str, float], profile: DeviceProfile) -> Signal | None:
    share = values.get("cache.stall_share")
    if share is None:
        return None
    missed = values.get("cache.miss_rate", 1.0)
    # Strength can only turn misses into hits, so stalls without misses are not its business.
    pressure = ramp(share, profile.pressure.stall) * min(1.0, missed / _MISSES_THAT_EXPLAIN)
    words = f"tokens wait {share:.0%} of the time for experts, {missed:.0%} of look-ups miss"
    if values.get("cache.resident", math.inf) < _FILLED * values.get("cache.budget", 0.0):
        return Signal("stall", 0.0, f"{words}, but the cache is still filling")
    return Signal("stall", pressure, words)
