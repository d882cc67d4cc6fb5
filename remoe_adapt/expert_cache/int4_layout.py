"""Slots of 4-bit codes as torch's CPU kernels take them: the fast arithmetic where ggml's kernels cannot be used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remoe_adapt.expert_cache.block_products import CodedBand, CodedLayer, is_coded, matrices_of
from remoe_adapt.expert_cache.blocks_layout import BandsLayout
from remoe_adapt.expert_cache.encodings import GROUPED, code_groups, torch_int4
from remoe_adapt.expert_cache.layouts import needs_weights
from remoe_adapt.expert_cache.plan import Plan
from remoe_adapt.expert_cache.types import Slot

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts

# Columns that share a scale in all of `GROUPED`.
_GROUP = 32


def others_than_groups(coded: Sequence[CodedLayer]) -> list[str]:
    """Names of the types among these codes that are no 4-bit codes in groups; `Int4Layout` holds those alone."""
    kinds = {band.kind for layer in coded for param in layer.values() for band in param.bands}
    return sorted(kind.name for kind in kinds - GROUPED)


class Int4Layout(BandsLayout):
    """Codes of 4 bits, and scales and zeros in bf16, packed when an expert is read.

    Activations are rounded to bf16, and so are the weights' scales: results differ from exact ones by some thousandths
    of their norm. A step that needs gradients is computed with dequantised weights, which have those rounded scales.

    coded: how each layer is encoded: in types of `GROUPED`.
    """

    is_exact = False

    def __init__(self, plan: Plan, coded: Sequence[CodedLayer]) -> None:
        super().__init__(plan, coded)
        kinds = {band.kind.name for layer in coded for param in layer.values() for band in param.bands}
        self.name = f"{', '.join(sorted(kinds))} by torch int4"
        self.place(None)

    def parts(self, layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for param, like in self.plan.likes[layer].items():
            coded = self._coded[layer].get(param)
            if coded is None:
                found[param] = like
                continue
            for band in coded.bands:
                codes, scales = torch_int4.packed_shapes(band.rows, coded.cols, _GROUP)
                found[band.name] = torch.empty(codes, dtype=torch.uint8, device="meta")
                found[_scales(band)] = torch.empty(scales, dtype=torch.bfloat16, device="meta")
                if band.order is not None:
                    found[band.order] = torch.empty(coded.cols, dtype=torch.int64, device="meta")
        return found

    def packed(self, layer: int, parts: Mapping[str, Tensor]) -> Slot:
        assert self.places is not None
        slot = self.places.slot(layer)
        for param in self.plan.likes[layer]:
            coded = self._coded[layer].get(param)
            if coded is None:
                slot[param].copy_(parts[param])
                continue
            for band in coded.bands:
                groups = code_groups(parts[band.name], band.kind, coded.cols)
                codes_NB, scales_GN2 = torch_int4.pack(*groups, _GROUP)
                slot[band.name].copy_(codes_NB)
                slot[_scales(band)].copy_(scales_GN2)
                if band.order is not None:
                    slot[band.order].copy_(parts[band.order])
        return slot

    def _rows(self, slot: Slot, band: CodedBand, cols: int) -> Tensor:
        return torch_int4.dequantise(slot[band.name], slot[_scales(band)], band.rows, cols)

    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        if needs_weights(module, hidden_TD, weights_TK) or not is_coded(self._coded[layer], module):
            return super().compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
        out_TD, weights_TK = torch.zeros(hidden_TD.shape, dtype=torch.float32), weights_TK.float()
        for slots in chosen.groups():
            for expert, slot in slots.items():
                token_S, choice_S = torch.where(ids_TK == expert)
                found_SD = self._expert(layer, module, hidden_TD[token_S], slot)
                out_TD.index_add_(0, token_S, found_SD.mul_(weights_TK[token_S, choice_S, None]))
        return out_TD.to(hidden_TD.dtype)

    def _expert(self, layer: int, module: Any, x_SD: Tensor, slot: Slot) -> Tensor:
        """What one expert makes of its tokens: fp32 [S, D]."""
        up, down = matrices_of(module)
        inner_SI = self._projected(layer, up, x_SD, slot, module.has_bias)
        inner_SI = module._apply_gate(inner_SI) if module.has_gate else module.act_fn(inner_SI)
        return self._projected(layer, down, inner_SI, slot, module.has_bias)

    def _projected(self, layer: int, param: str, x_SK: Tensor, slot: Slot, has_bias: bool) -> Tensor:
        found = []
        for band in self._coded[layer][param].bands:
            x_band_SK = x_SK if band.order is None else x_SK[:, slot[band.order]]
            found.append(torch_int4.matmul(x_band_SK, slot[band.name], slot[_scales(band)], band.rows))
        found_SN = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return found_SN.add_(slot[f"{param}_bias"]) if has_bias else found_SN


def _scales(band: CodedBand) -> str:
    return f"{band.name}.scales"
