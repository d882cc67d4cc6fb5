"""Which recency prior a dial has: from the family's points, the profile, the caller, or training-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from remoe_adapt.cache.experts import cached_layer, expert_cache_of
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.errors import ConfigError, FamilyError
from remoe_adapt.family import Family, FamilyPoint, Recency
from remoe_adapt.gating.install import InstalledPrior
from remoe_adapt.gating.prior import DECAY, check_prior
from remoe_adapt.notices import say_once
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.routers.fingerprint import fingerprint
from remoe_adapt.untrusted import printable

# At full strength without training; on the shipped model it costs under 1 % perplexity and doubles the overlap.
TRAINING_FREE_GAIN = 0.3
DEFAULT_GAIN = 0.2
TRAINING_FREE = "training-free"


@dataclass(frozen=True, slots=True)
class RecencyPlan:
    """The gain of router l at strength s is `constant + s * per_strength` + what the family's point says for l."""

    mode: str
    decay: float
    constant: float = 0.0
    per_strength: float = 0.0


def plan_recency(
    family: Family, profile: DeviceProfile, mode: str | None, gain: float | None, decay: float | None
) -> RecencyPlan | None:
    """None without any prior. `gain` given by the caller holds at every strength.

    Raises ConfigError for values out of range, or for a mode or decay other than that of the family's points.
    """
    check_prior("ema" if mode is None else mode, 0.0 if gain is None else gain, DECAY if decay is None else decay)
    own = next((point.recency for point in family.points if point.recency and point.recency.mode != "none"), None)
    from_profile = profile.recency if profile.recency.mode != "none" and profile.recency.gain > 0 else None
    asked = mode is not None or gain is not None or decay is not None
    if own is not None:
        for what, wanted, has in (("mode", mode, own.mode), ("decay", decay, own.decay)):
            if wanted is not None and wanted != has:
                raise ConfigError(
                    f"recency {what} {wanted!r}: the points of {family.path} have {has!r}, and a model has one prior."
                )
        same = from_profile is not None and from_profile.mode == own.mode
        extra = from_profile.gain if same and from_profile is not None else 0.0
        return RecencyPlan(own.mode, own.decay, gain or 0.0, extra)
    if asked:
        chosen = mode or (from_profile.mode if from_profile else "ema")
        constant = DEFAULT_GAIN if gain is None else gain
        return RecencyPlan(chosen, 0.0 if chosen == "last" else DECAY if decay is None else decay, constant)
    if from_profile is not None:
        return RecencyPlan(from_profile.mode, DECAY, per_strength=from_profile.gain)
    return None


def training_free_family(model: nn.Module, base_id: str, *, own_gain: bool = True) -> Family:
    """A family in memory whose one point, strength 1, has no deltas but the recency prior, which is logged once.

    Without `own_gain` its gains are left to the caller's, which hold at every strength.
    """
    count = len(discover_routers(model))
    if not own_gain:
        return Family(Path(TRAINING_FREE), base_id, fingerprint(model), (FamilyPoint(1.0, TRAINING_FREE, {}),))
    point = FamilyPoint(1.0, TRAINING_FREE, {}, Recency("ema", DECAY, (TRAINING_FREE_GAIN,) * count))
    say_once(
        f"no adapter family is known for {base_id!r}: the dial is training-free (recency prior only, ema, gain "
        f"{TRAINING_FREE_GAIN:g} at strength 1). `remoe train {printable(base_id)} --data FILE --strengths "
        "0.25,0.5,1.0 --out FAMILY` trains one; pass family='FAMILY'."
    )
    return Family(Path(TRAINING_FREE), base_id, fingerprint(model), (point,))


class DialPrior:
    """The prior on a model, with its gains at any strength of a family."""

    def __init__(self, model: nn.Module, family: Family, plan: RecencyPlan) -> None:
        """Raises as InstalledPrior, and ConfigError when a point has gains for another number of routers."""
        count = len(discover_routers(model))
        for point in family.points:
            if point.recency is not None and len(point.recency.gain_per_layer) != count:
                raise ConfigError(
                    f"{family.path}: point {point.adapter} has {len(point.recency.gain_per_layer)} recency gains, this "
                    f"model has {count} routers."
                )
        self.plan, self._family = plan, family
        self.installed = InstalledPrior(model, plan.mode, plan.decay)
        if not self.installed.layers and not family.points[0].deltas:
            self.installed.remove()
            reason = next(iter(self.installed.own_forward.values()))
            raise FamilyError(
                f"no family is given for {family.base_id!r}, and without one the dial has only the recency prior, "
                f"which its routers cannot have ({reason}). Train one with `remoe train "
                f"{printable(family.base_id)} --data FILE --strengths 0.25,0.5,1.0 --out FAMILY` and pass "
                "family='FAMILY'."
            )
        self._on = True
        cache = expert_cache_of(model) if plan.mode == "resident" else None
        if cache is not None:
            refs, places = discover_routers(model), enumerate(self.installed.layers)
            layers = {layer: cached_layer(refs[place].block) for layer, place in places}
            self.installed.prior.read_residency(
                {layer: cache.resident_masks[at] for layer, at in layers.items() if at is not None}
            )
        elif plan.mode == "resident":
            say_once("the resident prior has no effect until an expert cache writes what it holds.")

    def switch(self, on: bool) -> None:
        """Off: the routers run their own forwards, until it is on again. Nothing where it is so already."""
        if on != self._on:
            self._on = on
            self.installed.enable(on)

    @property
    def acts(self) -> bool:
        """Some router's gain is live."""
        return any(float(gain) > 0 for gain in self.live)

    @property
    def live(self) -> list[Tensor]:
        """The live gains, fp32 scalars of the routers that have the prior; their storage never moves by itself."""
        return self.installed.prior.gains

    def gains(self, strength: float) -> list[Tensor]:
        """New tensors like `live`, with the gains of this strength."""
        return [torch.full_like(live, value) for live, value in zip(self.live, self._values(strength), strict=True)]

    def committed(self, strength: float) -> None:
        """`live` was written with the gains of this strength: so much is known without asking a device."""
        self.installed.prior.know(self._values(strength))

    def _values(self, strength: float) -> list[float]:
        own = self._family.recency(strength)
        common = self.plan.constant + strength * self.plan.per_strength
        return [common + (own.gain_per_layer[place] if own else 0.0) for place in self.installed.layers]

    def status(self) -> dict[str, float | int | str]:
        """JSON-ready; the gain is the mean over the routers that have the prior."""
        gains = [float(gain) for gain in self.live]
        mean = sum(gains) / len(gains) if gains else 0.0
        return {"mode": self.plan.mode, "decay": self.plan.decay, "routers": len(gains), "gain": mean}

    def remove(self) -> None:
        """The routers run their own forwards again."""
        self.installed.remove()
