"""The loop closed over a model of a cache: up a second or so after a squeeze, back in calm, never to and fro."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from squeezed_cache import MIB, SqueezedCache, reversals

from remoe_adapt.device_profile.profile import DeviceProfile, MemoryProfile, PressureProfile, load_profile
from remoe_adapt.errors import ConfigError
from remoe_adapt.pressure import sensors
from remoe_adapt.pressure.decide import Decision
from remoe_adapt.pressure.governor import Governor
from remoe_adapt.pressure.reading import Measure, Reading
from remoe_adapt.pressure.sensors import Sensors

SQUEEZES_S = (20.0, 100.0, 180.0)
LASTS_S = 40.0


@pytest.fixture(scope="module")
def profile() -> DeviceProfile:
    found = load_profile("orin-8gb")
    memory = replace(found.memory, budget_bytes=None, reserve_bytes=400 * MIB)
    cache = replace(found.expert_cache, regrow_s=10.0)
    return replace(found, memory=memory, expert_cache=cache, pressure=PressureProfile())


def neighbour(grows_s: float, mib: float = 1500.0) -> Callable[[float], float]:
    """A process that takes memory for a while, three times; grows_s: until it has it all."""

    def taken(time_s: float) -> float:
        begun = max((begin for begin in SQUEEZES_S if begin <= time_s), default=-1e9)
        return min(1.0, (time_s - begun) / grows_s) * mib * MIB if time_s < begun + LASTS_S else 0.0

    return taken


def run(plant: SqueezedCache, profile: DeviceProfile, until_s: float, hz: float = 5.0) -> list[Decision]:
    governor = Governor(Sensors([plant]), profile, resize=plant.resize)
    decisions = []
    while plant.time_s < until_s:
        plant.pass_time(1 / hz)
        decisions.append(plant.tick(governor))
    return decisions


def test_three_squeezes(profile: DeviceProfile) -> None:
    plant = SqueezedCache(taken=neighbour(grows_s=1.5))
    decisions = run(plant, profile, 260.0)
    assert plant.killed_at_s is None
    assert all(d.strength == 0.0 for d in decisions[: 20 * 5]), "calm is left alone"
    for begin in SQUEEZES_S:
        first_lacking = next(at for at, _ in plant.budgets if at > begin)
        full = next(at for at, strength in plant.swaps if at > begin and strength == 1.0)
        assert full - first_lacking <= 1.3, "up at once"
        end = begin + LASTS_S
        held = [d.strength for d in decisions[round(full * 5) : round(end * 5)]]
        assert set(held) == {1.0}, "raised strength hides the misses, and must not fall for it"
        after = decisions[round((end + profile.recovery_s) * 5) - 1]
        assert after.strength == 0.0 and after.signals["cache loss"] == 0.0
    assert reversals(plant.swaps) == 5 and len(plant.swaps) <= 3 * 8


def test_a_cache_of_fixed_size_is_killed_where_the_moved_one_lives(profile: DeviceProfile) -> None:
    for grows_s in (0.5, 2.0, 8.0):
        fixed = SqueezedCache(taken=neighbour(grows_s))
        governor = Governor(Sensors([fixed]), profile)
        while fixed.time_s < 30.0:
            fixed.pass_time(0.2)
            assert not fixed.tick(governor).budgets
        assert fixed.killed_at_s is not None
        moved = SqueezedCache(taken=neighbour(grows_s, mib=1400.0 if grows_s == 0.5 else 1500.0))
        run(moved, replace(profile, memory=replace(profile.memory, reserve_bytes=900 * MIB)), 70.0)
        assert moved.killed_at_s is None, grows_s
        assert moved.budget >= profile.expert_cache.floor * moved.allowed


@pytest.mark.parametrize("mib", [700.0, 1000.0, 1150.0, 1300.0])
@pytest.mark.parametrize("relief", [0.0, 0.5, 0.9])
def test_a_lasting_squeeze_of_any_size_is_answered_once(profile: DeviceProfile, mib: float, relief: float) -> None:
    plant = SqueezedCache(taken=lambda time_s: mib * MIB if time_s > 10 else 0.0, relief=relief)
    run(plant, profile, 300.0)
    assert reversals(plant.swaps) <= 1, plant.swaps
    assert len(plant.budgets) <= 30 and plant.killed_at_s is None
    late = [budget for at, budget in plant.budgets if at > 60]
    assert not late, "the budget comes to rest"


@pytest.mark.parametrize("calm_wait", [0.1, 1.0, 5.0])
def test_calm_that_stalls_as_always_is_left_alone(profile: DeviceProfile, calm_wait: float) -> None:
    plant = SqueezedCache(calm_wait=calm_wait)
    run(plant, profile, 120.0)
    assert plant.swaps == [] and plant.budgets == []


@pytest.mark.parametrize("relief", [0.3, 0.8, 0.95])
def test_stalls_that_strength_relieves_are_tried_ever_more_rarely(profile: DeviceProfile, relief: float) -> None:
    slow = SqueezedCache(storage_slowdown=lambda time_s: 100.0 if time_s > 10 else 1.0, relief=relief)
    run(slow, profile, 2000.0)
    assert slow.swaps and slow.swaps[0][0] < 15.0
    up = [at for (_, before), (at, now) in pairwise([(0.0, 0.0), *slow.swaps]) if now > before]
    assert len([at for at in up if at > 1000]) <= 3


def test_storage_that_is_slow_for_a_while(profile: DeviceProfile) -> None:
    plant = SqueezedCache(storage_slowdown=lambda time_s: 100.0 if 10 < time_s < 40 else 1.0)
    run(plant, profile, 120.0)
    assert plant.strength == 0.0 and any(strength > 0.3 for _, strength in plant.swaps)


def test_a_pinned_dial_is_not_turned_but_budgets_move(profile: DeviceProfile) -> None:
    plant = SqueezedCache(taken=neighbour(1.0))
    plant.apply(0.3)
    governor = Governor(Sensors([plant]), profile, resize=plant.resize)
    while plant.time_s < 40.0:
        plant.pass_time(0.2)
        decision = governor.tick(plant.time_s, plant.strength, pinned=True)
        assert decision.strength == 0.3 and not decision.changed
    assert plant.strength == 0.3 and len(plant.swaps) == 1 and plant.budgets
    assert governor.tick(plant.time_s + 0.2, plant.strength).strength == 1.0, (
        "whom the hand has let go, no swap of before holds back"
    )


def test_two_models_give_back_their_share(profile: DeviceProfile) -> None:
    plant = SqueezedCache(taken=lambda time_s: 1400.0 * MIB, name="one")
    given: list[int] = []
    for share in (0.5, 1.0):
        Governor(Sensors([plant]), profile, resize=lambda _, size: given.append(size), share=share).tick(1.0, 0.0)
    assert plant.allowed - given[0] == pytest.approx((plant.allowed - given[1]) / 2, rel=0.01)
    with pytest.raises(ConfigError, match="share 0"):
        Governor(Sensors([plant]), profile, share=0.0)


def test_a_refused_budget_is_said(profile: DeviceProfile) -> None:
    def refuse(tier: str, budget_bytes: int) -> None:
        raise ConfigError("cannot hold one expert")

    plant = SqueezedCache(taken=lambda time_s: 1400.0 * MIB)
    assert "refused: cannot hold one expert" in Governor(Sensors([plant]), profile, resize=refuse).tick(1.0, 0.0).reason


def test_a_recorded_run_replays_to_the_same_decisions(profile: DeviceProfile) -> None:
    plant = SqueezedCache(taken=neighbour(1.5))
    governor = Governor(Sensors([plant]), profile, resize=plant.resize)
    lines, decisions = [], []
    while plant.time_s < 90.0:
        plant.pass_time(0.2)
        decisions.append(plant.tick(governor))
        assert governor.reading is not None
        lines.append(governor.reading.to_json())

    class Recorded:
        name, strength = "recorded", 0.0
        readings = iter([Reading.from_json(line) for line in lines])

        def read(self, now_s: float) -> Reading:
            return next(self.readings)

        def close(self) -> None: ...

    recorded = Recorded()
    again = Governor(Sensors([recorded]), profile, resize=lambda tier, budget_bytes: None)
    for place in range(len(lines)):
        recorded.strength = again.tick(place / 5 + 0.2, recorded.strength).strength
    assert recorded.strength == decisions[-1].strength


class Watched:
    """A machine's memory and, as a sensor of its own, what else presses; counts how often each is asked."""

    def __init__(self) -> None:
        self.available, self.stalled, self.strength = 9000.0 * MIB, 0.0, 0.0
        self.asked = {"memory": 0, "glance": 0, "psi": 0}

    def sensors(self) -> Sensors:
        asked = self.asked

        class Memory:
            name = "memory"

            def read(_, now_s: float) -> Reading:  # noqa: N805
                asked["memory"] += 1
                found = {"memory.available": self.available, "memory.total": 24000.0 * MIB}
                return Reading(now_s, {name: Measure(value, "B", now_s) for name, value in found.items()})

            def free_bytes(_, now_s: float) -> float:  # noqa: N805
                asked["glance"] += 1
                return self.available

            def close(self) -> None: ...

        class Stalls:
            name = "psi"

            def read(_, now_s: float) -> Reading:  # noqa: N805
                asked["psi"] += 1
                return Reading(now_s, {"psi.memory.some": Measure(self.stalled, "share", now_s)})

            def close(self) -> None: ...

        return Sensors([Memory(), Stalls()])

    def tick(self, governor: Governor, now_s: float) -> Decision:
        decision = governor.tick(now_s, self.strength)
        self.strength = decision.strength
        return decision


def test_where_nothing_presses_most_samples_are_glances(profile: DeviceProfile) -> None:
    watched = Watched()
    governor = Governor(watched.sensors(), profile)
    decisions = [watched.tick(governor, place / 5) for place in range(31)]
    assert watched.asked == {"memory": 11, "psi": 11, "glance": 20}
    assert all(decision == decisions[0] for decision in decisions) and decisions[0].calm
    watched.stalled = 1.0
    times = [place / 5 for place in range(31, 41)]
    raised = next(now_s for now_s in times if watched.tick(governor, now_s).strength > 0)
    assert raised <= times[0] + 0.6 + 2 * profile.controller.rise_s
    before = dict(watched.asked)
    for place in range(41, 61):
        watched.tick(governor, place / 5)
    assert watched.asked["psi"] == before["psi"] + 20 and watched.asked["glance"] == before["glance"], (
        "pressed: no rest"
    )


def test_memory_that_goes_is_seen_in_the_next_sample(profile: DeviceProfile) -> None:
    watched = Watched()
    governor = Governor(watched.sensors(), profile)
    assert watched.tick(governor, 1.0).calm
    watched.available = 590.0 * MIB  # the reserve is 400
    assert watched.tick(governor, 1.2).calm and watched.asked["psi"] == 2, "no ease, but nothing is lacking either"
    watched.available = 200.0 * MIB
    assert watched.tick(governor, 1.4).present == 1.0 and watched.asked["psi"] == 3


def test_a_dial_that_a_hand_turned_is_not_taken_for_one_at_rest(profile: DeviceProfile) -> None:
    watched = Watched()
    governor = Governor(watched.sensors(), profile)
    watched.tick(governor, 1.0)
    watched.strength = 0.7
    assert governor.tick(1.2, watched.strength, pinned=True).strength == 0.7
    assert [watched.tick(governor, place / 5) for place in range(7, 30)][-1].strength == 0.0, "the hand has let go"


class Heat:
    """A sensor of a test's own: throttling, as a share of the time."""

    name, throttled = "heat", 0.0

    def __init__(self, *where: object) -> None:
        """It needs no file."""

    def read(self, now_s: float) -> Reading:
        return Reading(now_s, {"heat.pressure": Measure(self.throttled, "share", now_s)})

    def close(self) -> None:
        """It holds nothing."""


def test_a_new_sensor_is_a_class_and_its_name_in_a_list(
    monkeypatch: pytest.MonkeyPatch, profile: DeviceProfile
) -> None:
    monkeypatch.setattr(sensors, "OS_SENSORS", [sensors.MachineMemory, Heat])
    calm = replace(profile, memory=MemoryProfile(budget_bytes=None, reserve_bytes=1))
    governor, strength = Governor(Sensors(sensors.os_sensors()), calm), 0.0
    for step in range(10):
        strength = governor.tick(step / 5, strength).strength
    assert strength == 0.0 and governor.reading is not None and governor.reading.value("memory.available")
    monkeypatch.setattr(Heat, "throttled", 0.9)
    for step in range(10, 20):
        decision = governor.tick(step / 5, strength)
        strength = decision.strength
    assert strength > 0.0 and decision.cause == "heat" and decision.signals["heat"] == 0.9
    assert "heat says 0.90: pressure 0.90" in decision.reason
