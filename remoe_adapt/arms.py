"""The arms of a comparison: base, control and every point of a family, as weights ready to be run by one model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remoe_adapt.errors import AdapterConflictError
from remoe_adapt.family import Family, FamilyPoint, original_weights
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.tuner.layer import remoe_layers


@dataclass(frozen=True, eq=False)
class Arm:
    """Router weights to run the model with: `strength` 0 is the base, None the control; live weights in model order."""

    strength: float | None
    live: tuple[Tensor, ...]


class Arms:
    """The base, the control (when the family has one) and every stored point of a family, ready to be run.

    `use(arm)` writes an arm's weights into the model's own router weights, whose storage never moves. Without a family
    the model as it is counts as the base.
    """

    def __init__(self, model: nn.Module, family: Family | None, *, force: bool = False) -> None:
        """Raises FingerprintMismatchError for another base (unless `force`), AdapterConflictError when the model's
        routers run adapters already."""
        self._weights = [ref.weight_ED.detach() for ref in discover_routers(model)]
        self._found = tuple(weight_ED.clone() for weight_ED in self._weights)
        self.base = Arm(0.0, self._found)
        self.control: Arm | None = None
        self.points: tuple[Arm, ...] = ()
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
        self.points = tuple(Arm(point.strength, _live(family, point.strength, original)) for point in family.points)
        if family.control is not None:
            # As a family of one point, so that `live` stays the only place where weights are made.
            whole = FamilyPoint(1.0, family.control.adapter, family.control.deltas)
            alone = Family(family.path, family.base_id, family.fingerprint, (whole,))
            self.control = Arm(None, _live(alone, 1.0, original))

    def __iter__(self) -> Iterator[Arm]:
        """The base first: what it scored is what the others are compared with."""
        yield from (self.base, *(() if self.control is None else (self.control,)), *self.points)

    def use(self, arm: Arm) -> None:
        """Runs the model with this arm's weights from now on."""
        with torch.no_grad():
            torch._foreach_copy_(self._weights, list(arm.live))

    def restore(self) -> None:
        """Brings back the weights that were found, bit for bit."""
        with torch.no_grad():
            torch._foreach_copy_(self._weights, list(self._found))


def _live(family: Family, strength: float, original: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Weights of all routers in model order; those that the family leaves alone are the base's."""
    live = family.live(strength, original)
    return tuple(live.get(name, weight_ED.detach()) for name, weight_ED in original.items())


@contextmanager
def arms_of(model: nn.Module, family: Family | None, *, force: bool = False) -> Iterator[Arms]:
    """The arms of a family; whatever happens, the weights are as before afterwards. Raises as `Arms`."""
    arms = Arms(model, family, force=force)
    try:
        yield arms
    finally:
        arms.restore()
