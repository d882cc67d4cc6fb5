"""The arms of a comparison: base, control, every point of a family, and recency priors on the base, for one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remoe_adapt.errors import AdapterConflictError, ConfigError
from remoe_adapt.family import Family, FamilyPoint, original_weights
from remoe_adapt.gating.install import InstalledPrior
from remoe_adapt.gating.prior import DECAY, check_prior
from remoe_adapt.notices import say_once
from remoe_adapt.routers.discover import survey_routers
from remoe_adapt.tuner.layer import remoe_layers


@dataclass(frozen=True, slots=True)
class Prior:
    """A training-free recency prior: mode ("last", "ema"), gain, and the decay of "ema"."""

    mode: str
    gain: float
    decay: float = DECAY


@dataclass(frozen=True, eq=False)
class Arm:
    """Router weights to run the model with: `strength` 0 is the base, None the control; live weights in model order.

    gains: recency gains of all routers, None without a prior. prior: set where this arm is a prior on the base.
    """

    strength: float | None
    live: tuple[Tensor, ...]
    gains: tuple[float, ...] | None = None
    prior: Prior | None = None


def check_priors(family: Family | None, priors: Sequence[Prior]) -> set[tuple[str, float]]:
    """The one (mode, decay) of the points and priors of an evaluation; empty without any.

    Raises ConfigError when they differ in mode or decay, when a mode, gain or decay cannot be, and for `resident` on
    the base, which prefers what an expert cache holds: an evaluation has none, so it would do nothing.
    """
    for prior in priors:
        check_prior(prior.mode, prior.gain, prior.decay)
        if prior.mode == "resident":
            raise ConfigError(
                "recency 'resident' acts on an expert cache, and an evaluation has none: use ema or last."
            )
    points = () if family is None else family.points
    kinds = {(prior.mode, 0.0 if prior.mode == "last" else prior.decay) for prior in priors}
    kinds |= {(p.recency.mode, p.recency.decay) for p in points if p.recency and p.recency.mode != "none"}
    if any(mode == "resident" for mode, _ in kinds):
        say_once("The points' recency prior is `resident`: without an expert cache, as here, it does nothing.")
    if len(kinds) > 1:
        listed = ", ".join(f"{mode} (decay {decay:g})" for mode, decay in sorted(kinds))
        raise ConfigError(f"recency priors of one evaluation must be of one kind, not {listed}.")
    return kinds


class Arms:
    """The base, the control (when the family has one), every stored point of a family, and `priors` on the base.

    `use(arm)` writes an arm's weights into the model's own router weights, whose storage never moves, and sets its
    recency gains. Without a family the model as it is counts as the base.
    """

    def __init__(
        self, model: nn.Module, family: Family | None, *, priors: Sequence[Prior] = (), force: bool = False
    ) -> None:
        """Raises FingerprintMismatchError for another base (unless `force`), AdapterConflictError when the model's
        routers run adapters already, ConfigError when priors and points differ in mode or decay."""
        self._installed: InstalledPrior | None = None
        self._weights = [weight_ED.detach() for weight_ED in survey_routers(model).weights.values()]
        self._found = tuple(weight_ED.clone() for weight_ED in self._weights)
        self.base = Arm(0.0, self._found)
        self.control: Arm | None = None
        self.points: tuple[Arm, ...] = ()
        self.priors: tuple[Arm, ...] = ()
        self._use_family(model, family, force)
        kinds = check_priors(family, priors)
        if kinds:
            self._installed = InstalledPrior(model, *kinds.pop())
            count = self._installed.num_routers
            self.priors = tuple(Arm(0.0, self.base.live, (prior.gain,) * count, prior) for prior in priors)

    def _use_family(self, model: nn.Module, family: Family | None, force: bool) -> None:
        if family is None:
            return
        for name, layer in remoe_layers(model).items():
            if layer.active_adapters and not layer.disable_adapters:
                raise AdapterConflictError(
                    f"router {name} runs the adapter {', '.join(layer.active_adapters)} already: evaluate a family on "
                    "its base (unload or disable the adapter first)"
                )
        family.check(model, force=force)
        original = original_weights(model)
        self.base = Arm(0.0, tuple(weight_ED.detach().clone() for weight_ED in original.values()))
        self.points = tuple(
            Arm(
                point.strength,
                _live(family, point.strength, original),
                point.recency.gain_per_layer if point.recency and point.recency.mode != "none" else None,
            )
            for point in family.points
        )
        if family.control is not None:
            # As a family of one point, so that `live` stays the only place where weights are made.
            whole = FamilyPoint(1.0, family.control.adapter, family.control.deltas)
            alone = Family(family.path, family.base_id, family.fingerprint, (whole,))
            self.control = Arm(None, _live(alone, 1.0, original))

    def __iter__(self) -> Iterator[Arm]:
        """The base first: what it scored is what the others are compared with."""
        yield from (self.base, *(() if self.control is None else (self.control,)), *self.points, *self.priors)

    def use(self, arm: Arm) -> None:
        """Runs the model with this arm's weights and gains from now on."""
        with torch.no_grad():
            torch._foreach_copy_(self._weights, list(arm.live))
        if self._installed is not None:
            self._installed.enable(arm.gains is not None)
            if arm.gains is not None:
                self._installed.set_gains(arm.gains)

    def recency_of(self, arm: Arm) -> dict[str, str | float]:
        """Keys `recency` (mode) and `recency_gain` (mean over the routers that have it) of an arm with a prior."""
        if self._installed is None or arm.gains is None:
            return {}
        gains = [arm.gains[place] for place in self._installed.layers]
        return {"recency": self._installed.prior.mode, "recency_gain": sum(gains) / max(1, len(gains))}

    def restore(self) -> None:
        """Brings back the weights that were found, bit for bit, and takes a prior out."""
        if self._installed is not None:
            self._installed.remove()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, list(self._found))


def _live(family: Family, strength: float, original: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Weights of all routers in model order; those that the family leaves alone are the base's."""
    live = family.live(strength, original)
    return tuple(live.get(name, weight_ED.detach()) for name, weight_ED in original.items())


@contextmanager
def arms_of(
    model: nn.Module, family: Family | None, *, priors: Sequence[Prior] = (), force: bool = False
) -> Iterator[Arms]:
    """The arms of a family; whatever happens, the model is as before afterwards. Raises as `Arms`."""
    arms = Arms(model, family, priors=priors, force=force)
    try:
        yield arms
    finally:
        arms.restore()
