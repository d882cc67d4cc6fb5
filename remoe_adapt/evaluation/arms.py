"""The arms of a comparison: base, control, every point of a family, and recency priors on the base, for one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from remoe_adapt._support import say_once
from remoe_adapt.errors import AdapterConflictError, ConfigError
from remoe_adapt.expert_cache import expert_cache_of
from remoe_adapt.family import Family, FamilyPoint, FamilyRecovery
from remoe_adapt.recency import InstalledPrior
from remoe_adapt.recency_settings import MODES, Recency
from remoe_adapt.routers import Routers, survey_routers
from remoe_adapt.tuner import remoe_layers

Row = TypeVar("Row")


@dataclass(frozen=True, eq=False)
class Arm:
    """Router weights to run the model with: `strength` 0 is the base, None the control; live weights in model order.

    recency: the prior that it runs under, with a gain of each router; None: without a prior. has_recovery: it is a
    point of the family, and runs with the recovery LoRA of its strength where the family has one.
    """

    strength: float | None
    live: tuple[Tensor, ...]
    recency: Recency | None = None
    has_recovery: bool = False


def check_priors(family: Family | None, priors: Sequence[Recency]) -> Recency | None:
    """One of the points' priors and `priors`, which all are of its kind; None without any.

    Raises ConfigError when they differ in mode, decay or share, and for a prior on the base that prefers what an expert
    cache holds: an evaluation has none, or does not show it to priors, so it would do nothing.
    """
    for prior in priors:
        if prior.kind.needs_expert_cache:
            others = " or ".join(sorted(name for name, mode in MODES.items() if not mode.needs_expert_cache))
            raise ConfigError(
                f"recency {prior.mode!r} prefers what an expert cache holds, on which an evaluation does not depend: "
                f"use {others}."
            )
    kind = one_kind(family, priors)
    if kind is not None and kind.kind.needs_expert_cache:
        say_once(f"The points' recency prior is `{kind.mode}`: it follows an expert cache, and here does nothing.")
    return kind


def one_kind(family: Family | None, priors: Sequence[Recency] = ()) -> Recency | None:
    """One of the points' priors and `priors`; None without any.

    Raises ConfigError when they differ in mode, decay or share.
    """
    found = [*priors, *(point.recency for point in (family.points if family else ()) if point.recency)]
    kinds = {(recency.mode, recency.decay, recency.share or 0.0) for recency in found}
    if len(kinds) > 1:
        listed = ", ".join(
            f"{mode} (decay {decay:g}{f', share {share:g}' if share else ''})" for mode, decay, share in sorted(kinds)
        )
        raise ConfigError(f"recency priors of one evaluation must be of one kind, not {listed}.")
    return found[0] if found else None


class Arms:
    """The base, the control (when the family has one), every stored point of a family, and `priors` on the base.

    `use(arm)` writes an arm's weights into the model's own router weights, whose storage never moves, and sets its
    recency gains. Without a family the model as it is counts as the base.
    """

    def __init__(
        self, model: nn.Module, family: Family | None, *, priors: Sequence[Recency] = (), force: bool = False
    ) -> None:
        """Raises FingerprintMismatchError for another base (unless `force`), AdapterConflictError when the model's
        routers run adapters already, ConfigError when priors and points are not of one kind."""
        self._installed: InstalledPrior | None = None
        self._recovery: FamilyRecovery | None = None
        self._cache = expert_cache_of(model)
        routers = survey_routers(model)
        self._weights = [weight_ED.detach() for weight_ED in routers.weights.values()]
        # Copies, because the live weights are overwritten in place while arms take turns.
        self._found = tuple(weight_ED.clone() for weight_ED in self._weights)
        self.base = Arm(0.0, self._found)
        self.control: Arm | None = None
        self.points: tuple[Arm, ...] = ()
        self.priors: tuple[Arm, ...] = ()
        kind = check_priors(family, priors)
        self._use_family(model, family, force, routers)
        if kind is not None:
            self._installed = InstalledPrior(model, kind.mode, kind.decay, share=kind.share)
            self.priors = tuple(Arm(0.0, self.base.live, prior) for prior in priors)

    def _use_family(self, model: nn.Module, family: Family | None, force: bool, routers: Routers) -> None:
        if family is None:
            return
        for name, layer in remoe_layers(model).items():
            if layer.active_adapters and not layer.disable_adapters:
                raise AdapterConflictError(
                    f"router {name} runs the adapter {', '.join(layer.active_adapters)} already: evaluate a family on "
                    "its base (unload or disable the adapter first)"
                )
        family.check(model, force=force, routers=routers)
        original = routers.original_weights
        self.base = Arm(0.0, tuple(weight_ED.detach().clone() for weight_ED in original.values()))
        self.points = tuple(
            Arm(point.strength, _live(family, point.strength, original), point.recency, has_recovery=True)
            for point in family.points
        )
        if any(point.recovery for point in family.points):
            self._recovery = FamilyRecovery(model, family)
        if family.control is not None:
            # As a family of one point, so that `live` stays the only place where weights are made.
            whole = FamilyPoint(1.0, family.control.adapter, family.control.deltas)
            alone = Family(family.path, family.base_id, family.fingerprint, (whole,))
            self.control = Arm(None, _live(alone, 1.0, original))

    def __iter__(self) -> Iterator[Arm]:
        """The base first: what it scored is what the others are compared with."""
        yield from (self.base, *(() if self.control is None else (self.control,)), *self.points, *self.priors)

    def by_kind(self, rows: Mapping[Arm, Row]) -> dict[str, Any]:
        """What was found of each arm as `base`, `control` (None without one) and `points`."""
        control = None if self.control is None else rows[self.control]
        return {"base": rows[self.base], "control": control, "points": [rows[arm] for arm in self.points]}

    def use(self, arm: Arm) -> None:
        """Runs the model with this arm's weights and gains from now on."""
        with torch.no_grad():
            # In place: a compiled model and CUDA graphs hold the addresses of the weights.
            torch._foreach_copy_(self._weights, list(arm.live))
        if self._recovery is not None:
            self._recovery.use(arm.strength or 0.0 if arm.has_recovery else 0.0)
        if self._installed is not None:
            self._installed.enable(arm.recency is not None)
            if arm.recency is not None:
                self._installed.set_gains(arm.recency.gain)
            if self._cache is not None:
                self._cache.follow(None if arm.recency is None else arm.recency.cache_decay)

    def recency_of(self, arm: Arm) -> dict[str, str | float]:
        """Keys `recency` (mode) and `recency_gain` (mean over the routers that have it) of an arm with a prior."""
        if self._installed is None or arm.recency is None:
            return {}
        per_router = arm.recency.gains(self._installed.num_routers)
        gains = [per_router[place] for place in self._installed.layers]
        return {"recency": arm.recency.mode, "recency_gain": sum(gains) / max(1, len(gains))}

    def restore(self) -> None:
        """Brings back the weights that were found, bit for bit, and takes a prior out."""
        if self._installed is not None:
            self._installed.remove()
            if self._cache is not None:
                self._cache.follow(None)
        if self._recovery is not None:
            self._recovery.remove()
        with torch.no_grad():
            torch._foreach_copy_(self._weights, list(self._found))


def _live(family: Family, strength: float, original: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Weights of all routers in model order; those that the family leaves alone are the base's."""
    live = family.live(strength, original)
    return tuple(live.get(name, weight_ED.detach()) for name, weight_ED in original.items())


@contextmanager
def arms_of(
    model: nn.Module, family: Family | None, *, priors: Sequence[Recency] = (), force: bool = False
) -> Iterator[Arms]:
    """The arms of a family; whatever happens, the model is as before afterwards. Raises as `Arms`."""
    arms = Arms(model, family, priors=priors, force=force)
    try:
        yield arms
    finally:
        arms.restore()
