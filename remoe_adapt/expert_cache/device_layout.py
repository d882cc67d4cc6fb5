"""Slots that the experts' kernels compute with: codes, scales and minima apart, each at its place in every slot.

They are made of a checkpoint's floats or codes when an expert is read, so that a tier in RAM keeps the very bytes of
the slots on a device. What the kernels do not know is computed by the model's own function, with dequantised weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remoe_adapt._support import say_once
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.activations import Activations
from remoe_adapt.expert_cache.block_products import CodedLayer
from remoe_adapt.expert_cache.blocks_layout import BandsLayout, BlocksLayout, coded_layers
from remoe_adapt.expert_cache.device_pool import DevicePool, DeviceSlot
from remoe_adapt.expert_cache.encodings import Ggml, Planar, TorchInt4, planar_from_blocks, planar_kind
from remoe_adapt.expert_cache.int4_layout import Int4Layout, others_than_groups
from remoe_adapt.expert_cache.layouts import FLOATS_NAME, Layout, needs_weights
from remoe_adapt.expert_cache.places import Places
from remoe_adapt.expert_cache.plan import Plan
from remoe_adapt.expert_cache.types import Slot
from remoe_adapt.triton_kernels.experts_reference import dequantised
from remoe_adapt.triton_kernels.slots import FLOAT, Activation, SlotMatrix

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts

_TENSORS = ("codes", "scales", "minima")
# So many tokens are computed in two turns, hits and then misses: kernels of more take each slot once for all tokens.
_FEW = 8


@dataclass(frozen=True, slots=True)
class SlotKernels:
    """What computes experts straight from slots of a device.

    name: as `status()` shows it.
    forward: as `experts_forward` of triton_kernels.
    """

    name: str
    forward: Callable[..., Tensor | None]


# What computes with experts: ggml's on a CPU, else torch's for 4 bits; those for slots of a GPU.
Kernels = Ggml | TorchInt4 | SlotKernels


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


class DeviceLayout(BandsLayout):
    """Matrices [N, K] in the kernels' codings, all else as the model has it.

    A step that needs gradients is computed with dequantised weights, as are layers that the kernels do not know.

    kernels: compute.
    coded: how each layer is encoded, in blocks; None: an expert of the files will tell (`probe`).
    """

    is_exact = False
    is_early = True

    def __init__(self, plan: Plan, kernels: SlotKernels, coded: Sequence[CodedLayer] | None = None) -> None:
        super().__init__(plan, coded)
        self._kernels = kernels
        self._matrices: list[dict[str, _Matrix]] = []
        self._likes: list[dict[str, Tensor]] = []
        self._known = Activations()
        self._activations: dict[int, Activation | None] = {}
        self._holds = "own"

    def probe(self) -> None:
        super().probe()
        for layer, coded in enumerate(self._coded):
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
                    likes |= coded[param].parts() if param in coded else {param: like}
            self._matrices.append(matrices)
            self._likes.append(likes)
        kinds = sorted({matrix.kind for matrices in self._matrices for matrix in matrices.values()})
        self.name = f"{', '.join(kinds) or FLOATS_NAME} by {self._kernels.name}"
        if not any(self._coded) and not any(self.plan.transposed):
            self._holds = "params"

    def _planar_like(self, layer: int, param: str, like: Tensor) -> Planar | None:
        """What kernels read of a matrix, of no numbers; None: they do not read it."""
        coded = self._coded[layer].get(param)
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
        return self._holds

    def parts(self, layer: int) -> dict[str, Tensor]:
        return self._likes[layer]

    def packed(self, layer: int, parts: Mapping[str, Tensor]) -> Slot:
        slot = self._placed().slot(layer)
        for param in self.plan.likes[layer]:
            if param in self._coded[layer]:
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
        coded, matrix = self._coded[layer][param], self._matrices[layer].get(param)
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
            return super().weight(layer, slot, param)
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
        is_exact = needs_weights(module, hidden_TD, weights_TK)
        activation = self._activation(layer, module)
        out_TD: Tensor | None = None
        # Without choices there are no slots to look at, and nothing to compute.
        for slots in chosen.groups(early=True):
            pool = _pool_of(slots)
            if activation is None or is_exact or pool is None:
                return super().compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
            up, down = self._slot_matrices(layer, module, pool)
            late, args, kernels = chosen.late, (weights_TK, up, down, activation), self._kernels
            there = {expert: slot for expert, slot in slots.items() if expert not in late} if late else {}
            if there and len(hidden_TD) <= _FEW:
                # The hits compute while the misses are copied.
                pairs_TCD = hidden_TD.new_empty((*ids_TK.shape, hidden_TD.shape[1]), dtype=torch.float32)
                numbers_TC = pool.numbers(layer, ids_TK, chosen.rows, there)
                kernels.forward(hidden_TD, numbers_TC, *args, pairs_TCD, False)
                chosen.wait()
                rest = {expert: slots[expert] for expert in late}
                numbers_TC = pool.numbers(layer, ids_TK, chosen.rows, rest, done=there)
                part_TD = kernels.forward(hidden_TD, numbers_TC, *args, pairs_TCD)
            else:
                chosen.wait()
                is_all = out_TD is None and not chosen.has_more and not chosen.has_others
                numbers_TC = pool.numbers(layer, ids_TK, chosen.rows, None if is_all else slots)
                part_TD = kernels.forward(hidden_TD, numbers_TC, *args)
            assert part_TD is not None
            # More than one group only where the budget does not hold a token's experts.
            out_TD = part_TD if out_TD is None else out_TD + part_TD
        return torch.zeros_like(hidden_TD) if out_TD is None else out_TD

    def _activation(self, layer: int, module: Any) -> Activation | None:
        """What stands between a layer's products, if the kernels know it and read its matrices."""
        if layer not in self._activations:
            found = self._known.of(module)
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
        of_layer = pool.matrices
        found: Any = of_layer.get(layer)
        if found is None:
            places = self._placed().layers[layer]
            matrices = []
            for param in ("gate_up_proj", "down_proj"):
                matrix = self._matrices[layer][param]
                parts = {part: pool.column(places[name]) for part, name in matrix.names.items()}
                if module.has_bias:
                    parts["bias"] = pool.column(places[f"{param}_bias"])
                matrices.append(SlotMatrix(kind=matrix.kind, **parts))
            found = of_layer[layer] = tuple(matrices)
        up, down = found
        return up, down


def _pool_of(slots: Mapping[int, Slot]) -> DevicePool | None:
    """Where they lie; None: not on a device."""
    first = next(iter(slots.values()))
    return first.pool if isinstance(first, DeviceSlot) else None


def layout_for(
    plan: Plan,
    kernels: Kernels | None,
    coded: Sequence[CodedLayer] | None = None,
    exact: Callable[[Plan], Layout] | None = None,
) -> Layout:
    """What these kernels compute with; None: blocks that are dequantised on use.

    coded: how each layer is encoded; None: an expert of the files will tell.
    exact: makes what is computed exactly where kernels that may be missing do not know the codes; None: blocks.

    Raises ConfigError for codes that torch's kernels do not know where those were asked for.
    """
    if isinstance(kernels, SlotKernels):
        return DeviceLayout(plan, kernels, coded)
    if not isinstance(kernels, TorchInt4):
        return BlocksLayout(plan, kernels, coded)
    coded = coded_layers(plan) if coded is None else coded
    if not (others := others_than_groups(coded)):
        say_once("experts of 4 bits are computed by torch's kernels for them instead.")
        return Int4Layout(plan, coded)
    if kernels.is_demanded:
        raise ConfigError(
            f'arithmetic "fast": {plan.where} has experts in {", ".join(others)}, which torch\'s 4-bit kernels do not '
            "compute, and ggml's cannot be used here (pip install 'remoe-adapt[llamacpp]'); give \"exact\", or "
            '"auto" for whatever there is.'
        )
    say_once(f"experts in {', '.join(others)} are dequantised on every use, which takes several times as long.")
    return BlocksLayout(plan, None, coded) if exact is None else exact(plan)
