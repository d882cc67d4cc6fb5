"""Live router weights at any strength of a family, in place: the only writer of strength.

The live weights are the base routers' own tensors; their storage never moves, so compiled graphs and captured pointers
stay valid. `stage` does the arithmetic, off the hot path; `commit` is one `torch._foreach_copy_`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remoe_adapt.errors import MergeStateError, RouterNotFoundError
from remoe_adapt.family import Family
from remoe_adapt.runtime.recency import DialPrior
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers

Placement = tuple[tuple[torch.device, torch.dtype], ...]


@dataclass(frozen=True, eq=False)
class Staged:
    """Router weights (and recency gains) of one strength, ready to be copied; `placement`: where the live ones were."""

    strength: float
    values: tuple[Tensor, ...]
    placement: Placement


class ResidentRouters:
    """The wrapped routers of one model under one family. Not thread-safe: the controller decides who calls when.

    model: its routers are RemoeLayers without merged adapters; they enter resident mode. The points of the family and
    the base are kept precomputed in the dtype and on the device of the model, which may be moved or cast later. prior:
    the recency prior on the model, whose gains are swapped together with the weights.

    Raises RouterNotFoundError when nothing is wrapped, MergeStateError when adapters are merged or another dial is on,
    FamilyError when the family has routers that the model lacks. The model is unchanged then.
    """

    def __init__(self, model: nn.Module, family: Family, prior: DialPrior | None = None) -> None:
        layers = remoe_layers(model)
        if not layers:
            raise RouterNotFoundError(f"{type(model).__name__} has no wrapped router: use get_remoe_model.")
        self.family, self._prior = family, prior
        self._layers: dict[str, RemoeLayer] = layers
        self._placement: Placement = ()
        self._points: dict[float, tuple[Tensor, ...]] = {}
        held: list[RemoeLayer] = []
        try:
            with _writing(False):
                for layer in layers.values():
                    layer.hold()
                    held.append(layer)
            self._precompute()
            if prior is not None and prior.live:
                with _writing(False):
                    torch._foreach_copy_(prior.live, prior.gains(0.0))
                prior.committed(0.0)
        except BaseException:
            for layer in held:
                layer.release()
            raise
        self.strength = 0.0

    @property
    def weights(self) -> list[Tensor]:
        """The live weights [E, D], in model order."""
        return [layer.base_weight_ED for layer in self._layers.values()]

    def stage(self, strength: float) -> Staged:
        """Weights of `strength`, computed (or looked up, for the base and the stored points) but not yet live.

        Raises FamilyError for a strength outside [0, 1], MergeStateError when the routers were let go.
        """
        with _writing(False):
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
        if staged.placement != _placement(live):  # the model was moved or cast after staging
            staged = self.stage(staged.strength)
        if not alone:
            _finish_queued_work(staged.placement)
        with _writing(live[0].is_inference()):
            torch._foreach_copy_(live, list(staged.values))
        if self._prior is not None:
            self._prior.committed(staged.strength)
        if live[0].is_cuda:
            for value in staged.values:  # their memory may be reused only after the copy
                if value.is_cuda:
                    value.record_stream(torch.cuda.current_stream(value.device))
        if not alone:
            _finish_queued_work(staged.placement)
        self.strength = staged.strength

    def release(self, *, keep_live: bool = False) -> None:
        """Leave resident mode: with the base weights bit for bit, or with the live ones as the new base."""
        with _writing(self.weights[0].is_inference()):
            for layer in self._layers.values():
                layer.release(keep_live=keep_live)
        if self._prior is not None:
            self._prior.remove()
        self._points, self._placement = {}, ()
        self.strength = self.strength if keep_live else 0.0

    def _base(self) -> dict[str, Tensor]:
        return {name: layer.original_weight_ED for name, layer in self._layers.items()}

    def _precompute(self) -> None:
        if self._prior is not None:
            self._prior.installed.follow()
        # The kept originals themselves.
        self._points = {0.0: (*self._base().values(), *self._gains(0.0))}
        self._points |= {s: self._values(s) for s in self.family.strengths}
        self._placement = _placement(self._live())
        _finish_queued_work(self._placement)

    def _values(self, strength: float) -> tuple[Tensor, ...]:
        return (*self.family.live(strength, self._base()).values(), *self._gains(strength))

    def _gains(self, strength: float) -> list[Tensor]:
        return [] if self._prior is None else self._prior.gains(strength)

    def _live(self) -> list[Tensor]:
        if not all(layer.resident for layer in self._layers.values()):
            raise MergeStateError("the dial has let go of these routers: call get_remoe_model again.")
        return self.weights if self._prior is None else [*self.weights, *self._prior.live]


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
