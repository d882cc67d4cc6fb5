"""The policy as a function: bounded, monotone, steady, and back in order after whatever a sensor may say."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from squeezed_cache import MIB, reversals

from remoe_adapt.device_profile.profile import DeviceProfile, PressureProfile, list_profiles, load_profile
from remoe_adapt.pressure.decide import Decision, DecisionState, decide
from remoe_adapt.pressure.reading import Measure, Reading
from remoe_adapt.pressure.signals import weigh

GIB = 1 << 30
RECORDED = Path(__file__).parents[1] / "data" / "readings-squeeze.jsonl"
# Measure: its value in calm, the worst there is, its unit. Pressure grows from the first to the second.
SENSORS = {
    "memory.available": (16.0 * GIB, 0.0, "B"),
    "cgroup.headroom": (8.0 * GIB, 0.0, "B"),
    "gpu.free": (8.0 * GIB, 0.0, "B"),
    "process.private": (0.0, 30.0 * GIB, "B"),
    "psi.memory.some": (0.0, 1.0, "share"),
    "psi.memory.full": (0.0, 1.0, "share"),
    "psi.cgroup.memory.some": (0.0, 1.0, "share"),
    "psi.io.full": (0.0, 1.0, "share"),
    "process.faults": (0.0, 1500.0, "1/s"),
    "swap.in": (0.0, 5e7, "B/s"),
    "swap.out": (0.0, 5e7, "B/s"),
    "cache.budget": (1.0 * GIB, 0.0, "B"),
    "cache.stall_share": (0.0, 1.0, "share"),
    "cache.miss_rate": (0.0, 1.0, "share"),
}
FIXED = {
    "memory.total": (24.0 * GIB, "B"),
    "gpu.total": (16.0 * GIB, "B"),
    "gpu.reusable": (0.0, "B"),
    "cache.allowed": (1.0 * GIB, "B"),
    "cache.resident": (0.95 * GIB, "B"),
}


def reading(time_s: float, **changed: float | None) -> Reading:
    """Calm but for what is named, dots written as double underscores; None leaves a measure out."""
    found = {name: (calm, unit) for name, (calm, _, unit) in SENSORS.items()} | FIXED
    for key, value in changed.items():
        name = key.replace("__", ".")
        if value is None:
            del found[name]
        else:
            found[name] = (value, found.get(name, (0.0, "1/s"))[1])
    return Reading(time_s, {name: Measure(value, unit, time_s) for name, (value, unit) in found.items()})


def follow(
    readings: Iterable[Reading], profile: DeviceProfile, state: DecisionState | None = None
) -> tuple[DecisionState, list[Decision]]:
    state, decisions = state or DecisionState(), []
    for one in readings:
        state, decision = decide(state, one, profile)
        decisions.append(decision)
    return state, decisions


def stalls(pressures: Sequence[float], hz: float = 5.0, start_s: float = 0.0) -> list[Reading]:
    """Readings in which tasks stall on memory so much that the pressure is as given."""
    return [
        reading(start_s + place / hz, psi__cgroup__memory__some=0.07 + 0.43 * pressure if pressure else 0.0)
        for place, pressure in enumerate(pressures)
    ]


@pytest.fixture(scope="module")
def profile() -> DeviceProfile:
    found = load_profile("orin-8gb")
    memory = replace(found.memory, budget_bytes=6 * GIB, reserve_bytes=GIB)
    limits = replace(PressureProfile(), psi_io=(0.2, 0.9))
    return replace(found, memory=memory, pressure=limits)


def anything(random: np.random.Generator, time_s: float, calm_part: float = 0.0) -> Reading:
    """A reading in which every value may be missing, absurd or in order; so much of them is calm."""
    found = {name: (calm, worst, unit) for name, (calm, worst, unit) in SENSORS.items()}
    found |= {name: (value, value, unit) for name, (value, unit) in FIXED.items()}
    measures = {}
    for name, (calm, worst, unit) in found.items():
        kind = random.integers(8)
        if random.random() < calm_part:
            measures[name] = Measure(calm, unit, time_s)
            continue
        if kind == 0:
            continue
        absurd = random.choice([math.nan, math.inf, -math.inf, -1.0, 1e30, 0.0, -1e30])
        value = float(absurd) if kind == 1 else calm + float(random.random()) * (worst - calm)
        measures[name] = Measure(
            value, unit, time_s - float(random.choice([0.0, 0.1, 100.0, math.nan], p=[0.9, 0.08, 0.01, 0.01]))
        )
    return Reading(time_s, measures)


# What each sensor means


@pytest.mark.parametrize(
    ("changed", "signal", "pressure"),
    [
        ({}, "host headroom", 0.0),
        ({"memory__available": 1.0 * GIB}, "host headroom", 0.0),
        ({"memory__available": 0.75 * GIB}, "host headroom", 0.5),
        ({"cgroup__headroom": 0.75 * GIB}, "host headroom", 0.5),
        ({"cgroup__headroom": 0.0}, "host headroom", 1.0),
        ({"process__private": 6.25 * GIB, "gpu__free": None}, "host headroom", 0.5),
        ({"gpu__free": 0.25 * GIB, "gpu__reusable": 0.5 * GIB}, "device headroom", 0.5),
        ({"cache__budget": 0.95 * GIB}, "cache loss", 0.0),
        ({"cache__budget": 0.775 * GIB}, "cache loss", 0.5),
        ({"cache__budget": 0.5 * GIB}, "cache loss", 1.0),
        ({"psi__cgroup__memory__some": 0.285}, "psi memory", 0.5),
        ({"psi__memory__some": 1.0}, "psi memory", 0.0),
        ({"psi__memory__some": 0.285, "psi__cgroup__memory__some": None}, "psi memory", 0.5),
        ({"psi__memory__full": 0.1425, "psi__cgroup__memory__some": None}, "psi memory", 0.5),
        ({"psi__io__full": 0.275}, "psi io", 0.5),
        ({"process__faults": 525.0}, "faults", 0.5),
        ({"process__faults": 525.0, "process__refaults": 9000.0}, "faults", 0.5),
        ({"process__faults": 9000.0, "process__refaults": 525.0}, "faults", 0.5),
        ({"process__faults": 9000.0, "process__refaults": 0.0}, "faults", 0.0),
        ({"swap__in": 16.5 * MIB}, "swap", 0.5),
        ({"cache__stall_share": 0.95, "cache__miss_rate": 0.3}, "stall", 0.5),
        ({"cache__stall_share": 0.95, "cache__miss_rate": 0.025}, "stall", 0.25),
        ({"cache__stall_share": 1.0, "cache__miss_rate": 0.9, "cache__resident": 0.5 * GIB}, "stall", 0.0),
    ],
)  # fmt: skip
def test_the_stated_mapping(
    profile: DeviceProfile, changed: dict[str, float | None], signal: str, pressure: float
) -> None:
    _, decision = decide(DecisionState(), reading(1.0, **changed), profile)
    assert decision.signals[signal] == pytest.approx(pressure, abs=1e-9)
    # What memory lacks, the cache is about to give back.
    implied = "cache loss" if decision.budgets else ""
    others = {name: value for name, value in decision.signals.items() if name not in (signal, implied)}
    assert not any(others.values()), others


def test_what_the_cache_gives_back_counts_in_the_sample_that_takes_it(profile: DeviceProfile) -> None:
    _, decision = decide(DecisionState(), reading(1.0, memory__available=0.9 * GIB), profile)
    lost = 1 - decision.budgets["cache"] / GIB
    limits = profile.pressure.cache_loss
    assert limits is not None and limits[0] < lost < limits[1]
    assert decision.signals["cache loss"] == pytest.approx((lost - limits[0]) / (limits[1] - limits[0]))


@pytest.mark.parametrize("absurd", [1e30, 17.0 * 4 * GIB])
def test_more_memory_than_there_is_is_no_word(profile: DeviceProfile, absurd: float) -> None:
    """And does not look as if somebody took it all at once in the next sample."""
    samples = [reading(place / 5, memory__available=1.6 * GIB) for place in range(12)]
    samples[6] = reading(6 / 5, memory__available=absurd)
    _, decisions = follow(samples, profile)
    assert "more than there can be" in decisions[6].unusable["memory.available"]
    assert not any(decision.budgets or decision.pressure for decision in decisions)


def test_memory_that_cpu_and_gpu_share_counts_once(profile: DeviceProfile) -> None:
    jetson = reading(1.0, gpu__free=0.1 * GIB, memory__available=3.0 * GIB, process__private=2.0 * GIB)
    more = {"gpu.unified": Measure(1.0, "flag", 1.0), "gpu.allocated": Measure(4.5 * GIB, "B", 1.0)}
    weighed = weigh(Reading(1.0, {**jetson.measures, **more}), profile)
    assert set(weighed.places) == {"host"}
    assert weighed.places["host"].lacking == 0.5 * GIB, "2 GiB and 4.5 GiB of tensors, of a budget of 6 GiB"


def test_a_reserve_larger_than_the_machine_is_cut(profile: DeviceProfile) -> None:
    small = {"memory__total": 2.0 * GIB, "memory__available": 0.6 * GIB}
    place = weigh(reading(1.0, **small), profile).places["host"]
    assert place.reserve == 0.5 * GIB and place.lacking < 0


def test_what_is_no_word_is_named(profile: DeviceProfile) -> None:
    strange = reading(9.0, process__faults=math.nan, swap__in=-1.0)
    old = {"psi.memory.some": Measure(1.0, "share", 1.0)}
    _, decision = decide(DecisionState(), Reading(9.0, {**strange.measures, **old}, {"cgroup": "none"}), profile)
    assert decision.unusable["process.faults"] == "nan is not finite"
    assert decision.unusable["swap.in"] == "-1 is negative" and decision.unusable["cgroup"] == "none"
    assert decision.unusable["psi.memory.some"] == "it is 8.0 s old"
    json.dumps(decision.as_dict(), allow_nan=False)


# Properties


@pytest.mark.parametrize("seed", range(12))
def test_bounded_whatever_comes_and_in_order_again_afterwards(seed: int) -> None:
    random = np.random.default_rng(seed)
    profile = load_profile(list(list_profiles())[seed % len(list_profiles())])
    state, time_s = DecisionState(), 1000.0
    for _ in range(250):
        time_s += float(random.choice([0.2, 0.0, -5.0, 3600.0, 1e-9], p=[0.9, 0.03, 0.03, 0.02, 0.02]))
        at_s = math.nan if random.random() < 0.02 else time_s
        state, decision = decide(state, anything(random, at_s), profile)
        assert 0.0 <= decision.pressure <= 1.0 and 0.0 <= decision.present <= 1.0
        assert 0.0 <= decision.strength <= profile.strength.max
        for budget in decision.budgets.values():
            assert 0 <= budget <= 1e30
        assert all(math.isfinite(x) for x in (state.clock_s, state.average, state.held, state.stall_held))
    controller = profile.controller
    hold_s = (state.stall_hold + 1) * controller.fall_s + profile.recovery_s
    calm = [reading(time_s + step / controller.sample_hz) for step in range(int(hold_s * controller.sample_hz) + 2)]
    state, decisions = follow(calm, replace(profile, memory=replace(profile.memory, budget_bytes=None)), state)
    assert decisions[-1].strength == 0.0 and decisions[-1].pressure == 0.0 and not decisions[-1].budgets


@pytest.mark.parametrize("name", SENSORS)
def test_more_pressure_on_a_sensor_is_never_less_strength(profile: DeviceProfile, name: str) -> None:
    random = np.random.default_rng(list(SENSORS).index(name))
    calm, worst, unit = SENSORS[name]
    seen = 0
    for _ in range(60):
        history = [anything(random, place / 5, 0.97) for place in range(int(random.integers(0, 40)))]
        state, _ = follow(history, profile)
        base = anything(random, len(history) / 5, 0.9)
        hides = {"process.private": "gpu.free", "psi.memory.some": "psi.cgroup.memory.some"}
        hides["psi.memory.full"] = hides["psi.memory.some"]
        base = Reading(base.time_s, {key: m for key, m in base.measures.items() if key != hides.get(name)})
        other = {"cache.miss_rate": "cache.stall_share", "cache.stall_share": "cache.miss_rate"}.get(name)
        if other is not None:  # one says nothing without the other
            base = Reading(base.time_s, {**base.measures, other: Measure(1.0, "share", base.time_s)})
        low, high = sorted(random.random(2))
        readings = [
            Reading(base.time_s, {**base.measures, name: Measure(calm + x * (worst - calm), unit, base.time_s)})
            for x in (low, high)
        ]
        (_, less), (_, more) = (decide(state, one, profile) for one in readings)
        assert more.present >= less.present - 1e-12 and more.pressure >= less.pressure - 1e-12
        assert more.strength >= less.strength - 1e-12
        budget = base.value("cache.budget")
        if name != "cache.budget" and budget is not None and budget >= 0:  # of a smaller one there is less to take
            budgets = [one.budgets.get("cache", budget) for one in (less, more)]
            assert budgets[1] <= budgets[0] + 1
        seen += more.signals != less.signals
    assert seen > 5, "the sweep must reach where the sensor rules"


@pytest.mark.parametrize("device", ["orin-8gb", "rtx-8gb", "laptop-16gb", "server", "rpi5-8gb"])
def test_constant_pressure_raises_once_for_all_and_more_never_less(device: str) -> None:
    profile = load_profile(device)
    profile = replace(
        profile, pressure=PressureProfile(), memory=replace(profile.memory, budget_bytes=None, reserve_bytes=GIB)
    )
    ends = []
    for level in np.linspace(0.0, 1.0, 21):
        hz = profile.controller.sample_hz
        state, decisions = follow(stalls([float(level)] * int(40 * hz), hz), profile)
        swaps = [(0.0, d.strength) for d in decisions if d.changed]
        assert reversals(swaps) == 0 and len(swaps) <= 2, swaps
        ends.append(state.strength)
        assert abs(ends[-1] - profile.strength_at(float(level))) <= profile.controller.deadband + 1e-9
    assert ends == sorted(ends) and ends[0] == 0.0


@pytest.mark.parametrize("break_s", [0.4, 1.0, 3.0, 4.8])
def test_breaks_shorter_than_half_of_fall_s_move_nothing(profile: DeviceProfile, break_s: float) -> None:
    wave = ([1.0] * 8 + [0.0] * round(break_s * 5)) * 20
    _, decisions = follow(stalls(wave), profile)
    swaps = [d.strength for d in decisions if d.changed]
    assert swaps == [1.0]


def test_a_slow_square_wave_is_followed_without_overshoot(profile: DeviceProfile) -> None:
    wave = ([0.6] * 100 + [0.0] * 100) * 4
    _, decisions = follow(stalls(wave), profile)
    swaps = [(0.0, d.strength) for d in decisions if d.changed]
    assert reversals(swaps) == 2 * 4 - 1
    assert max(strength for _, strength in swaps) == pytest.approx(profile.strength_at(0.6))
    assert decisions[-1].strength == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_noise_around_a_level_does_not_turn_the_dial_to_and_fro(profile: DeviceProfile, seed: int) -> None:
    noise = np.random.default_rng(seed).normal(0.5, 0.05, 1500)
    _, decisions = follow(stalls([float(x) for x in noise.clip(0.01, 1.0)]), profile)
    swaps = [(0.0, d.strength) for d in decisions if d.changed]
    assert len(swaps) <= 5 and reversals(swaps) == 0, swaps  # in five minutes


# Rising and falling


def test_a_rise_needs_pressure_that_lasts(profile: DeviceProfile) -> None:
    for samples in (1, 2):
        _, decisions = follow(stalls([0.0] * 10 + [1.0] * samples + [0.0] * 20), profile)
        assert not any(d.changed for d in decisions), samples
    assert "has not lasted 0.5 s" in follow(stalls([0.0] * 10 + [1.0]), profile)[1][-1].reason
    _, decisions = follow(stalls([0.0] * 10 + [1.0] * 5), profile)
    rise = next(place for place, d in enumerate(decisions) if d.changed)
    assert (rise - 10) / 5 <= 0.6 and decisions[rise].strength == 1.0
    assert "stalled on memory 50% of the time" in decisions[rise].reason and "rises from 0.00" in decisions[rise].reason


def test_a_rise_needs_pressure_that_is_there_and_not_recovering(profile: DeviceProfile) -> None:
    slow = replace(profile, controller=replace(profile.controller, rise_s=2.0, max_swaps_per_s=0.1))
    _, steady = follow(stalls([0.0] * 20 + [0.4] * 9), slow)
    assert steady[-1].pressure == pytest.approx(0.4)
    _, falling = follow(stalls([0.0] * 20 + [1.0] * 7 + [0.4] * 2), slow)
    assert falling[-1].pressure == 0.0 and "already recovering" in falling[-1].reason
    _, over = follow(stalls([0.0] * 20 + [1.0] * 7 + [0.0] * 2), slow)
    assert over[-1].pressure == 0.0 and "calm" in over[-1].reason


def test_one_high_reading_after_a_gap_is_not_sustained(profile: DeviceProfile) -> None:
    state, _ = follow(stalls([0.0] * 10), profile)
    state, decision = decide(state, stalls([1.0], start_s=5000.0)[0], profile)
    assert decision.pressure == 0.0 and not decision.changed
    _, decisions = follow(stalls([1.0] * 4, start_s=5000.2), profile, state)
    assert decisions[-1].strength == 1.0


def test_one_calm_reading_after_a_gap_is_not_calm(profile: DeviceProfile) -> None:
    state, _ = follow(stalls([1.0] * 20), profile)
    state, decision = decide(state, stalls([0.0], start_s=5000.0)[0], profile)
    assert decision.strength == 1.0 and "held until 5 s" in decision.reason


@pytest.mark.parametrize("device", list(list_profiles()))
def test_after_the_stated_time_of_calm_the_strength_is_that_of_no_pressure(device: str) -> None:
    profile = load_profile(device)
    profile = replace(
        profile, pressure=PressureProfile(), memory=replace(profile.memory, budget_bytes=None, reserve_bytes=GIB)
    )
    controller = profile.controller
    state, decisions = follow(stalls([1.0] * int(20 * controller.sample_hz), controller.sample_hz), profile)
    assert decisions[-1].strength == profile.strength_at(1.0)
    within_s = controller.fall_s + controller.dwell_s + 5 / controller.sample_hz
    count = int(within_s * controller.sample_hz) + 1
    calm = stalls([0.0] * count, controller.sample_hz, start_s=20.0)
    _, decisions = follow(calm, profile, state)
    strengths = [d.strength for d in decisions]
    assert strengths[-1] == 0.0 and strengths == sorted(strengths, reverse=True)
    falls = [place / controller.sample_hz for place, d in enumerate(decisions) if d.changed]
    assert falls[0] + 1 / controller.sample_hz >= controller.fall_s / 2, "slow down"
    assert all(after - before >= controller.dwell_s - 1e-6 for before, after in pairwise(falls))


def test_swaps_per_second_are_limited(profile: DeviceProfile) -> None:
    limited = replace(profile, controller=replace(profile.controller, max_swaps_per_s=0.5, deadband=0.0, rise_s=0.0))
    _, decisions = follow(stalls([place / 100 for place in range(100)]), limited)
    times = [place / 5 for place, d in enumerate(decisions) if d.changed]
    assert len(times) > 4 and min(np.diff(times)) >= 2.0 - 1e-6
    assert any("swaps are limited" in d.reason for d in decisions)


def test_small_changes_stay_inside_the_deadband_but_the_ends_are_reached(profile: DeviceProfile) -> None:
    state, _ = follow(stalls([0.5] * 20), profile)
    assert state.strength == pytest.approx(0.25)
    _, decisions = follow(stalls([0.52] * 20, start_s=4.0), profile, state)
    assert not any(d.changed for d in decisions)
    _, decisions = follow(stalls([0.89] * 20 + [0.91] * 20, start_s=4.0), profile, state)
    assert [d.strength for d in decisions if d.changed][-1] == 1.0


def test_a_real_squeeze_replayed(profile: DeviceProfile) -> None:
    small = replace(profile, memory=replace(profile.memory, budget_bytes=None, reserve_bytes=64 * MIB))
    readings = [Reading.from_json(line) for line in RECORDED.read_text(encoding="utf-8").splitlines()]
    _, decisions = follow(readings, small)
    first = next(place for place, one in enumerate(readings) if (one.value("psi.cgroup.memory.some") or 0) > 0.1)
    assert not any(d.changed for d in decisions[:first]), "an idle machine beside file cache is calm"
    assert decisions[first + 3].strength == 1.0 and decisions[first + 3].cause == "psi memory"
