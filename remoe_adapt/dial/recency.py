"""Which recency prior a dial has: from the family's points, the profile, the caller, or training-free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from remoe_adapt._support import printable, say_once
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.errors import ConfigError, FamilyError
from remoe_adapt.expert_cache import cached_layer, expert_cache_of
from remoe_adapt.family import Family, FamilyPoint
from remoe_adapt.recency import InstalledPrior
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers import Routers

# At full strength without training, mode `cost`, in units of the mean weight of a chosen expert, 1 / K: on the shipped
# model that costs 1.3 % of perplexity and saves three of four misses.
TRAINING_FREE_GAIN = 0.6
DEFAULT_GAIN = 0.2
TRAINING_FREE = "training-free"


class AskedRecency(NamedTuple):
    """What a caller of `get_remoe_model` said about the recency prior; None: nothing, so it is left to others."""

    mode: str | None = None
    gain: float | None = None
    decay: float | None = None
    share: float | None = None


class RecencyPlan(NamedTuple):
    """Where the gains of a dial come from, beside the family's points; all are of one kind.

    always: with the gain that the caller asked for, which holds at every strength.
    at_full: with the profile's gain, which is that of strength 1.
    """

    always: Recency
    at_full: Recency

    def gains(self, strength: float, family: Family, routers: int) -> list[float]:
        """The gain of each router: the caller's + strength * the profile's + that of the family at this strength."""
        point = family.recency(strength)
        of_point = (0.0,) * routers if point is None else point.gains(routers)
        parts = zip(self.always.gains(routers), self.at_full.gains(routers), of_point, strict=True)
        return [caller + strength * profile + of_router for caller, profile, of_router in parts]


def plan_recency(family: Family, profile: DeviceProfile, asked: AskedRecency) -> RecencyPlan | None:
    """Whose mode, decay and share the prior has: the family's, else the caller's, else the profile's; None without any.

    Raises ConfigError for values out of range, or for a mode, decay or share other than that of the family's points.
    """
    # What cannot be is refused, whether it is used below or not.
    # Settings that the family overrides are checked all the same, or a typo would be silent.
    Recency.of(asked.mode, 0.0 if asked.gain is None else asked.gain, asked.decay, asked.share)
    of_points = next((point.recency for point in family.points if point.recency), None)
    # A profile whose gains are all 0 says nothing; a prior of gain 0 would cost its state for no effect.
    of_profile = profile.recency if profile.recency and any(profile.recency.gains()) else None
    if of_points is not None:
        for what in ("mode", "decay", "share"):
            wanted, has = getattr(asked, what), getattr(of_points, what)
            if wanted is not None and wanted != has:
                raise ConfigError(
                    f"recency {what} {wanted!r}: the points of {family.path} have {has!r}, and a model has one prior."
                )
        # A model has one prior, so the profile's adds nothing where its mode is another one.
        adds = of_profile.gain if of_profile and of_profile.mode == of_points.mode else 0.0
        return RecencyPlan(replace(of_points, gain=asked.gain or 0.0), replace(of_points, gain=adds))
    if asked != AskedRecency():
        mode = asked.mode or (of_profile.mode if of_profile else None)
        share = of_profile.share if asked.share is None and of_profile and of_profile.mode == mode else asked.share
        always = Recency.of(mode, DEFAULT_GAIN if asked.gain is None else asked.gain, asked.decay, share)
        return RecencyPlan(always, replace(always, gain=0.0))
    return None if of_profile is None else RecencyPlan(replace(of_profile, gain=0.0), of_profile)


def training_free_family(routers: Routers, base_id: str, *, own_gain: bool = True) -> Family:
    """A family in memory whose one point, strength 1, has no deltas but the recency prior, which is logged once.

    routers: those of the base.
    Without `own_gain` its gains are left to the caller's, which hold at every strength.
    """
    if not own_gain:
        return Family(Path(TRAINING_FREE), base_id, routers.fingerprint, (FamilyPoint(1.0, None, {}),))
    gains = tuple(TRAINING_FREE_GAIN / ref.spec.top_k for ref in routers.usable())
    point = FamilyPoint(1.0, None, {}, Recency.of("cost", gains))
    say_once(
        f"no adapter family is known for {base_id!r}: the dial is training-free (recency prior only, cost, gain "
        f"{max(gains):.2g} at strength 1). `remoe tune {printable(base_id)} --data FILE --out FAMILY` finds the "
        f"gains of each layer in minutes, `remoe train {printable(base_id)} --data FILE --out FAMILY` trains adapters "
        "and tunes; pass family='FAMILY'."
    )
    return Family(Path(TRAINING_FREE), base_id, routers.fingerprint, (point,))


class DialPrior:
    """The prior on a model, with its gains at any strength of a family."""

    def __init__(self, model: nn.Module, family: Family, plan: RecencyPlan, routers: Routers) -> None:
        """routers: those of `model`.

        Raises as InstalledPrior, and ConfigError when a point has gains for another number of routers.
        """
        count = len(routers.usable())
        for point in family.points:
            if point.recency is not None and len(point.recency.gains()) != count:
                raise ConfigError(
                    f"{family.path}: point {point.name} has {len(point.recency.gains())} recency gains, this "
                    f"model has {count} routers."
                )
        self.plan, self._family = plan, family
        self.installed = InstalledPrior(model, plan.always.mode, plan.always.decay, routers, plan.always.share)
        # Only now is it known which routers can have the prior: it depends on their forwards.
        if not self.installed.layers and not family.has_adapters:
            self.installed.remove()
            reason = next(iter(self.installed.own_forward.values()))
            lacks = "no family is given" if family.path == Path(TRAINING_FREE) else "a family without adapters is given"
            raise FamilyError(
                f"{lacks} for {family.base_id!r}, so the dial has only the recency prior, which its routers cannot "
                f"have ({reason}). Train one with `remoe train {printable(family.base_id)} --data FILE --out FAMILY "
                "--no-tune` and pass family='FAMILY'."
            )
        self._on = True
        needs_cache = plan.always.kind.needs_expert_cache
        self._cache = cache = expert_cache_of(model)
        if cache is not None:
            # What an LRFU cache of this decay holds is what the prior prefers; one of another holds something else.
            cache.follow(plan.always.cache_decay)
        if cache is not None and needs_cache:
            # Masks of the cache are by its own layers, the prior's by the routers that have it.
            layers = {layer: cached_layer(routers.refs[at].block) for layer, at in enumerate(self.installed.layers)}
            self.installed.prior.read_residency(
                {layer: cache.resident_masks[at] for layer, at in layers.items() if at is not None}
            )
        elif needs_cache:
            say_once(f"the {plan.always.mode} prior has no effect until an expert cache writes what it holds.")

    def place(self) -> None:
        """Bring what the prior keeps to where the routers are now."""
        self.installed.place_prior()

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
        # Reading a gain from a GPU would wait for the device in the midst of decoding.
        self.installed.prior.know(self._values(strength))

    def _values(self, strength: float) -> list[float]:
        per_router = self.plan.gains(strength, self._family, self.installed.num_routers)
        return [per_router[place] for place in self.installed.layers]

    def status(self) -> dict[str, float | int | str]:
        """JSON-ready; the gain is the mean over the routers that have the prior."""
        gains = [float(gain) for gain in self.live]
        mean = sum(gains) / len(gains) if gains else 0.0
        prior = self.plan.always
        share = {"share": prior.share} if prior.share else {}
        return {"mode": prior.mode, "decay": prior.decay, **share, "routers": len(gains), "gain": mean}

    def remove(self) -> None:
        """The routers run their own forwards again."""
        self.installed.remove()
        if self._cache is not None and self.plan.always.kind.is_priced:
            self._cache.follow(None)
