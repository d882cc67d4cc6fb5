"""Slots that the experts' kernels compute with: codes, scales and minima apart, each at its place in every slot.

They are made of a checkpoint's floats or codes when an expert is read, so that a tier in RAM keeps the very bytes of
the slots on a device. What the kernels do not know is computed by the model's own function, with dequantised weights.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remoe_adapt._support import say_once
from remoe_adapt.expert_cache.blocks_layout import BlocksLayout, CodedLayer, bands_of
from remoe_adapt.expert_cache.device_pool import DevicePool, DeviceSlot
from remoe_adapt.expert_cache.encodings import Ggml, Planar, planar_from_blocks, planar_kind
from remoe_adapt.expert_cache.layouts import FLOATS_NAME, CodedLayout, Layout
from remoe_adapt.expert_cache.places import Places
from remoe_adapt.expert_cache.plan import Plan
from remoe_adapt.expert_cache.types import Slot
from remoe_adapt.triton_kernels.experts_reference import activated, dequantised
from remoe_adapt.triton_kernels.slots import FLOAT, FUNCTIONS, Activation, SlotMatrix

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts

_TENSORS = ("codes", "scales", "minima")


@dataclass(frozen=True, slots=True)
class SlotKernels:
    """What computes experts straight from slots of a device.

    name: as `status()` shows it.
    forward: as `experts_forward` of triton_kernels.
    """

    name: str
    forward: Callable[..., Tensor | None]


# What computes with experts: ggml's on a CPU, those for slots of a GPU.
Kernels = Ggml | SlotKernels


def slot_kernels() -> SlotKernels | None:
    """Triton's, where it is installed; else None, which is said once."""
    try:
        from remoe_adapt.triton_kernels.experts import experts_forward
    except ImportError as error:
        say_once(f"experts on the GPU are computed one by one: triton cannot be imported ({error}).")
        return None
    return SlotKernels("triton", experts_forward)


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix [N, K] that kernels read: its kind, and which of the slot's tensors it is made of."""

    kind: str
    rows: int
    cols: int
    names: Mapping[str, str]


class DeviceLayout(CodedLayout):
    """Matrices [N, K] in the kernels' codings, all else as the model has it.

    A step that needs gradients is computed with dequantised weights, as are layers that the kernels do not know.

    kernels: compute.
    coded: how each layer is encoded, in blocks; None: an expert of the files will tell (`probe`).
    """

    is_exact = False

    def __init__(self, plan: Plan, kernels: SlotKernels, coded: Sequence[CodedLayer] | None = None) -> None:
        super().__init__(plan)
        # Knows how codes lie in bands of blocks, and how blocks that kernels do not read are dequantised.
        self._blocks, self._kernels = BlocksLayout(plan, None, coded), kernels
        self._matrices: list[dict[str, _Matrix]] = []
        self._likes: list[dict[str, Tensor]] = []
        self._activations: dict[int, Activation | None] = {}

    def probe(self) -> None:
        self._blocks.probe()
        for layer in range(len(self.plan.layers)):
            matrices, likes = dict[str, _Matrix](), dict[str, Tensor]()
            for param, like in self.plan.likes[layer].items():
                planar = self._planar_like(layer, param, like)
                if planar is not None:
                    names = {part: f"{param}.{part}" for part in _TENSORS if getattr(planar, part) is not None}
                    if planar.kind == FLOAT:
                        names = {"codes": param}
                    rows, cols = reversed(like.shape) if self.plan.transposed[layer] else like.shape
                    matrices[param] = _Matrix(planar.kind, rows, cols, names)
                    likes |= {name: getattr(planar, part).to("meta") for part, name in names.items()}
                else:
                    coded = self._blocks.coded(layer).get(param)
                    likes |= {param: like} if coded is None else coded.parts()
            self._matrices.append(matrices)
            self._likes.append(likes)
        kinds = sorted({matrix.kind for matrices in self._matrices for matrix in matrices.values()})
        self.name = f"{', '.join(kinds) or FLOATS_NAME} by {self._kernels.name}"

    def _planar_like(self, layer: int, param: str, like: Tensor) -> Planar | None:
        """What kernels read of a matrix, of no numbers; None: they do not read it."""
        coded = self._blocks.coded(layer).get(param)
        if coded is None:
            if like.ndim != 2:
                return None
            return Planar(FLOAT, like.T.contiguous() if self.plan.transposed[layer] else like)
        band = coded.bands[0]
        if len(coded.bands) > 1 or band.order is not None or planar_kind(band.kind, coded.cols) is None:
            return None
        blocks_NB = torch.zeros(band.rows, band.kind.row_bytes(coded.cols), dtype=torch.uint8, device="cpu")
        return planar_from_blocks(band.kind, blocks_NB, coded.cols)

    @property
    def holds(self) -> str:
        plain = not any(self._blocks.coded(layer) for layer in range(len(self.plan.layers)))
        return "params" if plain and not any(self.plan.transposed) else "own"

    def parts(self, layer: int) -> dict[str, Tensor]:
        return self._likes[layer]

    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        slot = self._placed().slot(layer)
        for group in self.plan.groups[layer]:
            coded = self._blocks.coded(layer).get(group.params[0])
            if coded is None:
                made = self.plan.converted(group, stored)
                for param in group.params:
                    self._put_floats(layer, slot, param, made[param])
                continue
            bands = bands_of(group, {source.ending: stored[source.ending] for source in group.sources})
            found = {place.name: band.blocks_NB for place, band in zip(coded.bands, bands, strict=True)}
            for place, band in zip(coded.bands, bands, strict=True):
                if place.order is not None and band.order_K is not None:
                    found[place.order] = band.order_K
            self._put_blocks(layer, slot, group.params[0], found)
        return slot

    def packed(self, layer: int, parts: Mapping[str, Tensor]) -> Slot:
        slot = self._placed().slot(layer)
        for param in self.plan.likes[layer]:
            if param in self._blocks.coded(layer):
                self._put_blocks(layer, slot, param, parts)
            else:
                self._put_floats(layer, slot, param, parts[param])
        return slot

    def _placed(self) -> Places:
        assert self.places is not None
        return self.places

    def _put_floats(self, layer: int, slot: Slot, param: str, value: Tensor) -> None:
        turned = param in self._matrices[layer] and self.plan.transposed[layer]
        slot[param].copy_(value.T if turned else value)

    def _put_blocks(self, layer: int, slot: Slot, param: str, parts: Mapping[str, Tensor]) -> None:
        coded, matrix = self._blocks.coded(layer)[param], self._matrices[layer].get(param)
        if matrix is None:
            for name in coded.parts():
                slot[name].copy_(parts[name])
            return
        band = coded.bands[0]
        planar = planar_from_blocks(band.kind, parts[band.name], coded.cols)
        for part, name in matrix.names.items():
            slot[name].copy_(getattr(planar, part))

    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        matrix, like = self._matrices[layer].get(param), self.plan.likes[layer][param]
        if matrix is None:
            return self._blocks.weight(layer, slot, param)
        parts: dict[str, Any] = {part: slot[name][None] for part, name in matrix.names.items()}
        if matrix.kind == FLOAT:
            whole_NK = parts["codes"][0]
        else:
            whole_NK = dequantised(SlotMatrix(kind=matrix.kind, **parts), 0)
        found: Tensor = (whole_NK.T if self.plan.transposed[layer] else whole_NK).to(like.dtype)
        return found

    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        has_graph = torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad)
        activation = self._activation(layer, module)
        out_TD: Tensor | None = None
        # Without choices there are no slots to look at, and nothing to compute.
        for slots in chosen.groups():
            pool = _pool_of(slots)
            if activation is None or has_graph or module.training or pool is None:
                return super().compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
            up, down = self._slot_matrices(layer, module, pool)
            is_all = out_TD is None and not chosen.has_more and not chosen.has_others
            numbers_TC = pool.numbers(layer, ids_TK, chosen.rows, None if is_all else slots)
            part_TD = self._kernels.forward(hidden_TD, numbers_TC, weights_TK, up, down, activation)
            assert part_TD is not None
            # More than one group only where the budget does not hold a token's experts.
            out_TD = part_TD if out_TD is None else out_TD + part_TD
        return torch.zeros_like(hidden_TD) if out_TD is None else out_TD

    def _activation(self, layer: int, module: Any) -> Activation | None:
        """What stands between a layer's products, if the kernels know it and read its matrices."""
        if layer not in self._activations:
            found = activation_of(module)
            if found is None:
                say_once(
                    f"{type(module).__name__}: the kernels do not know what its experts compute between their products "
                    "(or behind them); they are computed one by one, with dequantised weights."
                )
            elif missing := [name for name in ("gate_up_proj", "down_proj") if name not in self._matrices[layer]]:
                found = None
                say_once(
                    f"{self.plan.where}: the kernels do not read the codes of {', '.join(missing)} of "
                    f"{self.plan.layers[layer]}: its experts are computed one by one, with dequantised weights."
                )
            self._activations[layer] = found
        return self._activations[layer]

    def _slot_matrices(self, layer: int, module: Any, pool: DevicePool) -> tuple[SlotMatrix, SlotMatrix]:
        found: Any = pool.matrices.get(layer)
        if found is None:
            places = self._placed().layers[layer]
            matrices = []
            for param in ("gate_up_proj", "down_proj"):
                matrix = self._matrices[layer][param]
                parts = {part: pool.column(places[name]) for part, name in matrix.names.items()}
                if module.has_bias:
                    parts["bias"] = pool.column(places[f"{param}_bias"])
                matrices.append(SlotMatrix(kind=matrix.kind, **parts))
            found = pool.matrices[layer] = tuple(matrices)
        up, down = found
        return up, down


def _pool_of(slots: Mapping[int, Slot]) -> DevicePool | None:
    """Where they lie; None: not on a device."""
    first = next(iter(slots.values()))
    return first.pool if isinstance(first, DeviceSlot) else None


def activation_of(module: Any) -> Activation | None:
    """What an experts module computes between its products, if the kernels know it.

    It is tried out, since any class may have its own: with each function that the kernels know, and the limits and
    factors that the module has.
    """
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    floats = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
    limits = [None, *(float(value) for name, value in floats.items() if "limit" in name)]
    alphas = [1.0, *(float(value) for name, value in floats.items() if "alpha" in name)]
    generator = torch.Generator().manual_seed(0)
    # Wide, so that what is cut off shows.
    both = torch.randn(8, 64, generator=generator, device="cpu") * 8.0
    try:
        with torch.no_grad():
            expected = module._apply_gate(both)
    except (RuntimeError, AttributeError, TypeError):  # it computes with more than the rows
        return None
    for interleaved, function, limit, alpha, shift in itertools.product(
        (False, True), FUNCTIONS, limits, alphas, (0.0, 1.0)
    ):
        tried = Activation(function=function, alpha=alpha, limit=limit, shift=shift, interleaved=interleaved)
        if torch.allclose(activated(both, tried), expected, rtol=1e-4, atol=1e-4):
            return tried
    return None


def layout_for(plan: Plan, kernels: Kernels | None, coded: Sequence[CodedLayer] | None = None) -> Layout:
    """What these kernels compute with; None: blocks that are dequantised on use.

    coded: how each layer is encoded; None: an expert of the files will tell.
    """
    if isinstance(kernels, SlotKernels):
        return DeviceLayout(plan, kernels, coded)
    return BlocksLayout(plan, kernels, coded)
