"""Live router weights at any strength of a family, in place: the only writer of strength.

The live weights are the base routers' own tensors; their storage never moves, so compiled graphs and captured pointers
stay valid. `stage` does the arithmetic, off the hot path; `commit` is one `torch._foreach_copy_`.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from remoe_adapt._support import say_once
from remoe_adapt.dial.recency import DialPrior
from remoe_adapt.errors import DialError, RouterNotFoundError
from remoe_adapt.family import Family, FamilyRecovery
from remoe_adapt.tuner import RemoeLayer, remoe_layers

Placement = tuple[tuple[torch.device, torch.dtype], ...]


@dataclass(frozen=True, eq=False)
class Staged:
    """Router weights (and recency gains) of one strength, ready to be copied; `placement`: where the live ones were."""

    strength: float
    values: tuple[Tensor, ...]
    placement: Placement


class ResidentRouters:
    """The wrapped routers of one model under one family. Not thread-safe: the controller decides who calls when.

    model: its routers are RemoeLayers without merged adapters; they enter resident mode.
    family: its points and the base are kept precomputed in the dtype and on the device of the model, which may be moved
        or cast later.
    prior: the recency prior on the model, whose gains are swapped together with the weights.

    Raises RouterNotFoundError when nothing is wrapped, MergeStateError when adapters are merged or another dial is on,
    DialError when the live weights are not those that the forward reads, FamilyError when the family has routers that
    the model lacks.
    The model is unchanged then.
    """

    def __init__(self, model: nn.Module, family: Family, prior: DialPrior | None = None) -> None:
        layers = remoe_layers(model)
        self._model = model
        if not layers:
            raise RouterNotFoundError(f"{type(model).__name__} has no wrapped router: use get_remoe_model.")
        self.family, self._prior = family, prior
        # Points that are recency priors alone leave the weights as they are: a swap writes the gains and no more.
        self._turns_weights = family.has_adapters or prior is None
        # In model order, by their name inside the base model.
        self.layers: dict[str, RemoeLayer] = layers
        self._placement: Placement = ()
        # Strengths that were trained are computed once: staging one of them copies nothing.
        self._points: dict[float, tuple[Tensor, ...]] = {}
        self._addresses: list[int] = []
        self._reach: _Reach | None = None
        # LoRAs of points, which are switched together with the weights.
        self._recovery: FamilyRecovery | None = None
        self._check_reached()
        # Those that have entered resident mode leave it when a later one refuses, so that a failed dial changes
        # nothing.
        held: list[RemoeLayer] = []
        try:
            with _writing(False):
                for layer in layers.values():
                    layer.hold()
                    held.append(layer)
            self._precompute()
            if any(point.recovery for point in family.points):
                self._recovery = FamilyRecovery(model, family)
            if prior is not None and prior.live:
                with _writing(False):
                    torch._foreach_copy_(prior.live, prior.gains(0.0))
                prior.committed(0.0)
        except BaseException:
            for layer in held:
                layer.release()
            if self._recovery is not None:
                self._recovery.remove()
            raise
        self.strength = 0.0
        self._addresses = [weight.data_ptr() for weight in self.weights]

    @property
    def has_recovery(self) -> bool:
        """Whether a recovery adapter acts now."""
        return self._recovery is not None and self._recovery.acts

    @property
    def moved(self) -> bool:
        """The live tensors are others than those written last: the model was moved or cast, or they were replaced."""
        if self.fault() is not None or self._reach is None:
            return True
        return self._addresses != self._reach.addresses()

    @property
    def weights(self) -> list[Tensor]:
        """The live weights [E, D], in model order."""
        return [layer.base_weight_ED for layer in self.layers.values()]

    def stage(self, strength: float) -> Staged:
        """Weights of `strength`, computed (or looked up, for the base and the stored points) but not yet live.

        Raises FamilyError for a strength outside [0, 1], DialError when the routers were let go, or when a swap
        would not reach what the forward of the model reads.
        """
        self._check_reached()
        with _writing(False):
            # The model was moved or cast since: kept points are of the old device or dtype.
            if self._placement != _placement(self._live()):
                self._precompute()
            values = self._points.get(strength)
            if values is None:
                values = self._values(strength)
                _finish_queued_work(self._placement)
        return Staged(strength, values, self._placement)

    def commit(self, staged: Staged, *, alone: bool = True) -> None:
        """Make staged weights live, in place. No forward of the model may be in flight.

        alone: all forwards queued on an accelerator were queued by this thread; else the device is waited for.
        """
        live = self._live()
        # Copying onto another device in the decoding thread would stall it for a transfer over the bus, or fail.
        if staged.placement != _placement(live):  # the model was moved or cast after staging
            staged = self.stage(staged.strength)
        if not alone:
            _finish_queued_work(staged.placement)
        with _writing(live[0].is_inference()):
            # One call for all routers: a launch for each would cost more than the copies.
            torch._foreach_copy_(self._written(live), list(staged.values))
        if self._prior is not None:
            self._prior.committed(staged.strength)
        if self._recovery is not None:
            self._recovery.use(staged.strength)
        if live[0].is_cuda:
            for value in staged.values:  # their memory may be reused only after the copy
                if value.is_cuda:
                    value.record_stream(torch.cuda.current_stream(value.device))
        if not alone:
            _finish_queued_work(staged.placement)
        self.strength, self._addresses = staged.strength, [weight.data_ptr() for weight in live[: len(self.layers)]]

    def release(self, *, keep_live: bool = False) -> None:
        """Leave resident mode: with the base weights bit for bit, or with the live ones as the new base."""
        with _writing(self.weights[0].is_inference()):
            for layer in self.layers.values():
                layer.release(keep_live=keep_live)
        if self._prior is not None:
            self._prior.remove()
        if self._recovery is not None:
            self._recovery.remove()
        self._points, self._placement = {}, ()
        self.strength = self.strength if keep_live else 0.0

    def _check_reached(self) -> None:
        """What is written must be what the model's forward reads: a swap into anything else has no effect.

        Raises DialError that names the router and who came between.
        """
        config = sys.modules.get("torch._inductor.config")
        if config is not None and getattr(config, "freezing", False):
            say_once(
                "torch._inductor.config.freezing is on: a model that is compiled under it keeps the router weights of "
                "that moment, and no swap reaches it. Turn it off and compile again."
            )
        if fault := self.fault():
            raise DialError(
                f"{fault}, so a swap would have no effect. Undo that, or make the dial (get_remoe_model) after it."
            )

    def fault(self) -> str | None:
        """Which router the dial does not reach, and why."""
        if self._reach is not None and self._reach.holds():
            return None
        # A layer that is wrapped but no longer part of the model would be written, and nobody would read it.
        inside = set(self._model.modules())
        for name, layer in self.layers.items():
            fault = _unreached(layer) or (None if layer in inside else "another module is in its place")
            if fault is not None:
                self._reach = None
                return f"router {name} cannot be turned: {fault}"
        self._reach = _Reach(self._model, list(self.layers.values()))
        return None

    def check_restorable(self) -> None:
        """Raises DialError when the base's weights cannot be written back into every router."""
        for name, layer in self.layers.items():
            if self.strength and (fault := _unreached(layer)) is not None:
                raise DialError(
                    f"router {name} cannot be given its base weight back: {fault}. Undo that first: as by "
                    "accelerate.hooks.remove_hook_from_submodules, or parametrize.remove_parametrizations."
                )

    def _base(self) -> dict[str, Tensor]:
        return {name: layer.original_weight_ED for name, layer in self.layers.items()}

    def _precompute(self) -> None:
        if self._prior is not None:
            self._prior.place()
        # The kept originals themselves.
        self._points = {0.0: (*(self._base().values() if self._turns_weights else ()), *self._gains(0.0))}
        self._points |= {s: self._values(s) for s in self.family.strengths}
        self._placement = _placement(self._live())
        # What is staged is read by another thread's stream, which does not wait for the kernels of this one.
        _finish_queued_work(self._placement)

    def _values(self, strength: float) -> tuple[Tensor, ...]:
        weights = self.family.live(strength, self._base()).values() if self._turns_weights else ()
        return (*weights, *self._gains(strength))

    def _gains(self, strength: float) -> list[Tensor]:
        return [] if self._prior is None else self._prior.gains(strength)

    def _written(self, live: list[Tensor]) -> list[Tensor]:
        """Of the live tensors those that a swap writes."""
        return live if self._turns_weights else live[len(self.layers) :]

    def _live(self) -> list[Tensor]:
        if not all(layer.resident for layer in self.layers.values()):
            raise DialError("the dial has let go of these routers: call get_remoe_model again.")
        return self.weights if self._prior is None else [*self.weights, *self._prior.live]


def _unreached(layer: RemoeLayer) -> str | None:
    """Why the router's forward does not read its live weight."""
    owner_name, _, leaf = layer.spec.weight_name.rpartition(".")
    try:
        owner = layer.base_layer.get_submodule(owner_name)
        weight: Any = getattr(owner, leaf)
        kept: Any = layer.original_weight_ED
    except AttributeError:
        return f"its {layer.spec.weight_name} is gone"
    # Before the tensor is looked at: a parametrization makes a new one at every access, all of them plausible.
    if parametrize.is_parametrized(owner, leaf):
        return f"its {leaf} is computed by a parametrization"
    if not isinstance(weight, Tensor) or weight.shape != kept.shape:
        return f"its {leaf} is no tensor {list(kept.shape)} any more"
    if weight.is_meta:
        return f"its {leaf} is offloaded and has no values between forwards (accelerate's hooks do that)"
    # Identity and not equality: a property that returns a copy has the same values and takes no writes.
    if not any(weight is held.get(leaf) for held in (owner._parameters, owner._buffers)):
        return f"its {leaf} is made anew for each forward"
    return None


class _Reach:
    """The way from a model to the live weights of its routers, as it was found whole: a glance tells that it still is.

    A look at every router costs more than computing a strength.
    """

    def __init__(self, model: nn.Module, layers: list[RemoeLayer]) -> None:
        # Routers share most of the way from the model's root, and each link needs one look alone.
        links: dict[tuple[int, str], tuple[dict[str, Any], str, object]] = {}
        names = {module: name for name, module in model.named_modules() if isinstance(module, RemoeLayer)}
        for layer in layers:
            parent = model
            for part in names[layer].split("."):
                modules: dict[str, Any] = parent._modules
                links[id(parent), part] = modules, part, modules[part]
                parent = modules[part]
        self._links = list(links.values())
        self._weights: list[tuple[dict[str, Any], str, Tensor, torch.Size]] = []
        for layer in layers:
            owner_name, _, leaf = layer.spec.weight_name.rpartition(".")
            owner: Any = layer.base_layer.get_submodule(owner_name)
            held = owner._parameters if leaf in owner._parameters else owner._buffers
            self._weights.append((held, leaf, held[leaf], held[leaf].shape))

    def holds(self) -> bool:
        """Every module and weight is where it was, and has values."""
        return all(modules.get(part) is child for modules, part, child in self._links) and all(
            held.get(leaf) is weight and not weight.is_meta and weight.shape == shape
            for held, leaf, weight, shape in self._weights
        )

    def addresses(self) -> list[int]:
        """Where the weights are in memory."""
        return [weight.data_ptr() for _, _, weight, _ in self._weights]


def _placement(values: list[Tensor]) -> Placement:
    return tuple((value.device, value.dtype) for value in values)


@contextmanager
def _writing(inference_tensors: bool) -> Iterator[None]:
    """No gradients; outside inference mode whatever the caller is under, so that what is made is an ordinary tensor.

    inference_tensors: inside it, because weights that were made there take writes nowhere else.
    """
    with torch.inference_mode(inference_tensors), torch.no_grad():
        yield


def _finish_queued_work(placement: Placement) -> None:
    for device in {device for device, _ in placement if device.type != "cpu"}:
        torch.accelerator.synchronize(device)
