"""The loop's body: read the sensors and ask the policy. No thread, no clock, no engine: its owner has them,
calls `tick` and acts on the decision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from remoe_adapt._support import say_once
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.errors import ConfigError
from remoe_adapt.pressure.decide import Decision, DecisionState, decide
from remoe_adapt.pressure.reading import Reading
from remoe_adapt.pressure.sensors import Sensors

# In calm a full sample is taken this often; a longer pause would notice stalls too late.
_FULL_SAMPLE_S = 0.5


class Governor:
    """Sensors and what the policy remembers of them. Not for several threads at once.

    sensors: what is sampled.
    profile: whose curve, ranges and times the policy uses.
    resize: sets a tier ("cache", "below") of the expert cache to a budget in bytes; None: budgets are not moved.
    share: the part of lacking memory that this model gives back (1/2 for each of two models).
    """

    def __init__(
        self,
        sensors: Sensors,
        profile: DeviceProfile,
        *,
        resize: Callable[[str, int], None] | None = None,
        share: float = 1.0,
    ) -> None:
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"share {share!r} is out of range: give a part of the memory, above 0 up to 1.")
        self.sensors, self.profile = sensors, profile
        self._resize, self.share = resize, share
        self.state = DecisionState()
        self.reading: Reading | None = None
        self._calm: Decision | None = None  # the one that holds as long as memory stays free
        self._noted: set[str] = set()

    def warn(self) -> None:
        """Log what of the profile cannot hold here, before the first sample does; nothing is remembered."""
        self._log_notes(decide(DecisionState(), self.sensors.read(self.sensors.now()), self.profile)[1])

    def _log_notes(self, decision: Decision) -> None:
        for key, note in decision.notes.items():
            if key not in self._noted:  # its numbers change from sample to sample
                self._noted.add(key)
                say_once(f"{note}.")

    def tick(self, now_s: float | None, strength: float, *, pinned: bool = False) -> Decision:
        """One sample and what follows from it for a dial; budgets are moved here, the dial by whoever asked.

        now_s: the time of the sample, None: the sensors' clock.
        strength: that the dial has or is on its way to.
        pinned: a hand holds the dial, so the decision leaves it alone, and counts as no swap.

        A budget that the cache refuses is said in the decision's reason; so is what of the profile's memory section
        cannot hold on this machine, and once in the log. While nothing presses anywhere, samples within half a second
        of the last reading see only whether enough memory is still free, and the decision is the same one: the others
        cost the model more than they could tell it.
        """
        if now_s is None:
            now_s = self.sensors.now()
        if (calm := self._still_calm(now_s, strength)) is not None:
            return calm
        reading = self.sensors.read(now_s)
        # A hand's swap is none of the policy's, and must not start its pause between swaps.
        swapped_at_s = self.state.swapped_at_s
        self.state, decision = decide(self.state._replace(strength=strength), reading, self.profile, share=self.share)
        self.reading = reading
        self._log_notes(decision)
        # Without floors a glance would look at nothing, and find it free.
        self._calm = decision if decision.calm and decision.floors else None
        if pinned:
            self.state = self.state._replace(swapped_at_s=swapped_at_s)
            decision = replace(decision, strength=strength, changed=False)
        # Nobody was asked to move, so the decision says nothing of moves.
        if self._resize is None:
            return replace(decision, budgets={}, moves=())
        for tier, budget_bytes in decision.budgets.items():
            try:
                self._resize(tier, budget_bytes)
            except ConfigError as error:
                decision = replace(decision, moves=(*decision.moves, f"refused: {error}"))
        return decision

    def _still_calm(self, now_s: float, strength: float) -> Decision | None:
        """The last decision, where a glance shows that it holds."""
        calm = self._calm
        if calm is None or self.reading is None or not 0 <= now_s - self.reading.time_s < _FULL_SAMPLE_S:
            return None
        return calm if strength == calm.strength and self.sensors.is_free(calm.floors, now_s) else None
