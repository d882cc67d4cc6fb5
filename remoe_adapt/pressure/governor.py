"""The loop's body: read the sensors, ask the policy, turn the dial. No thread, and no engine: whoever has a clock calls
`tick`; what has a dial is an `Actuator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.errors import ConfigError
from remoe_adapt.notices import say_once
from remoe_adapt.pressure.policy import Decision, PolicyState, decide
from remoe_adapt.pressure.reading import Reading
from remoe_adapt.pressure.sensors import Sensors

# At rest, all sensors are asked after so long.
_LOOK_S = 0.5


class Actuator(Protocol):
    """A dial. Neither call waits for a model."""

    def apply(self, strength: float) -> None:
        """Take this strength, 0 to 1, as soon as it can be; the latest call wins."""
        ...

    def current(self) -> float:
        """The strength applied last, live or still on its way."""
        ...


class Governor:
    """Policy state, sensors and a dial. Not for several threads at once.

    resize: sets a tier ("cache", "below") of the expert cache to a budget in bytes; None: budgets are not moved. share:
    the part of lacking memory that this model gives back (1/2 for each of two models).
    """

    def __init__(
        self,
        actuator: Actuator,
        sensors: Sensors,
        profile: DeviceProfile,
        *,
        resize: Callable[[str, int], None] | None = None,
        share: float = 1.0,
    ) -> None:
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"share {share!r} is out of range: give a part of the memory, above 0 up to 1.")
        self.actuator, self.sensors, self.profile = actuator, sensors, profile
        self._resize, self.share = resize, share
        self.state = PolicyState()
        self.reading: Reading | None = None
        self._rest: Decision | None = None  # that of a reading at rest
        self._noted: set[str] = set()

    def look(self) -> None:
        """Say what of the profile cannot hold here, before the first sample does; nothing is turned or remembered."""
        self._say(decide(PolicyState(), self.sensors.read(self.sensors.now()), self.profile)[1])

    def _say(self, decision: Decision) -> None:
        for key, note in decision.notes.items():
            if key not in self._noted:  # its numbers change from sample to sample
                self._noted.add(key)
                say_once(f"{note}.")

    def tick(self, now_s: float | None = None, *, turn: bool = True) -> Decision:
        """One sample and what follows from it. now_s: its time, None: the sensors' clock. turn: False leaves the dial
        alone (it is pinned), budgets move all the same.

        A budget that the cache refuses is said in the decision's reason; so is what of the profile's memory section
        cannot hold on this machine, and once in the log. While nothing presses anywhere, samples within half a second
        of the last reading see only whether memory is still at ease, and the decision is the same one: the others cost
        the model more than they could tell it.
        """
        if now_s is None:
            now_s = self.sensors.now()
        if (rest := self._resting(now_s)) is not None:
            return rest
        reading = self.sensors.read(now_s)
        state = self.state._replace(strength=self.actuator.current())
        self.state, decision = decide(state, reading, self.profile, share=self.share)
        self.reading = reading
        self._say(decision)
        self._rest = decision if decision.at_rest and decision.floors else None
        if not turn:
            self.state = self.state._replace(swapped_at_s=state.swapped_at_s)
            decision = replace(decision, strength=state.strength, changed=False)
        elif decision.changed:
            self.actuator.apply(decision.strength)
        if self._resize is None:
            return replace(decision, budgets={}, moves=())
        for tier, budget_bytes in decision.budgets.items():
            try:
                self._resize(tier, budget_bytes)
            except ConfigError as error:
                decision = replace(decision, moves=(*decision.moves, f"refused: {error}"))
        return decision

    def _resting(self, now_s: float) -> Decision | None:
        """The last decision, where a glance shows that it holds."""
        rest = self._rest
        if rest is None or self.reading is None or not 0 <= now_s - self.reading.time_s < _LOOK_S:
            return None
        holds = self.actuator.current() == rest.strength and self.sensors.is_free(rest.floors, now_s)
        return rest if holds else None
