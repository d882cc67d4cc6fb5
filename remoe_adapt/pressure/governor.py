"""The loop's body: read the sensors, ask the policy, turn the dial. No thread, and no engine: whoever has a clock calls
`tick`; what has a dial is an `Actuator`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.errors import ConfigError
from remoe_adapt.pressure.policy import Decision, PolicyState, decide
from remoe_adapt.pressure.reading import Reading
from remoe_adapt.pressure.sensors import Sensors


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

    def tick(self, now_s: float | None = None, *, turn: bool = True) -> Decision:
        """One sample and what follows from it. now_s: its time, None: the sensors' clock. turn: False leaves the dial
        alone (it is pinned), budgets move all the same.

        A budget that the cache refuses is said in the decision's reason.
        """
        reading = self.sensors.read(now_s)
        state = replace(self.state, strength=self.actuator.current())
        self.state, decision = decide(state, reading, self.profile, share=self.share)
        self.reading = reading
        if not turn:
            decision = replace(decision, strength=state.strength, changed=False)
        elif decision.changed:
            self.actuator.apply(decision.strength)
        if self._resize is None:
            return replace(decision, budgets={})
        for tier, budget_bytes in decision.budgets.items():
            try:
                self._resize(tier, budget_bytes)
            except ConfigError as error:
                decision = replace(decision, reason=f"{decision.reason}; refused: {error}")
        return decision
