"""Slots of ggml blocks: ggml's kernels compute with them on a CPU, or they are dequantised on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.activations import Activations
from remoe_adapt.expert_cache.block_products import CodedBand, CodedLayer, CodedParam, LayerProducts, is_coded
from remoe_adapt.expert_cache.encodings import Band, Ggml, dequantise
from remoe_adapt.expert_cache.layouts import CodedLayout, needs_weights
from remoe_adapt.expert_cache.plan import Group, Plan
from remoe_adapt.expert_cache.types import Slot

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts


class BandsLayout(CodedLayout):
    """What layouts share whose matrices are made of bands of ggml blocks, whatever a slot holds of them.

    coded: how each layer is encoded; None: the stored tensors tell (`probe`).
    """

    def __init__(self, plan: Plan, coded: Sequence[CodedLayer] | None = None) -> None:
        super().__init__(plan)
        self._coded: list[CodedLayer] = []
        if coded is not None:
            self._use(coded)

    def probe(self) -> None:
        if not self._coded:
            self._use(coded_layers(self.plan))

    def _use(self, coded: Sequence[CodedLayer]) -> None:
        self._coded = list(coded)

    def coded(self, layer: int) -> CodedLayer:
        """The parameters of a layer that are coded, by name."""
        return self._coded[layer]

    def parts(self, layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for param, like in self.plan.likes[layer].items():
            coded = self._coded[layer].get(param)
            found |= {param: like} if coded is None else coded.parts()
        return found

    def in_blocks(self, layer: int, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """An expert as a pack has it, floats and bands of blocks by name, of as many groups as `stored` has."""
        found: dict[str, Tensor] = {}
        for group in self.plan.groups[layer]:
            if group.sources[0].ending not in stored and group.params[0] not in stored:
                continue
            coded = self._coded[layer].get(group.params[0])
            if coded is None:
                made = self.plan.converted(group, stored)
                found |= {param: made[param] for param in group.params}
                continue
            pieces = {source.ending: stored[source.ending] for source in group.sources}
            for place, band in zip(coded.bands, bands_of(group, pieces), strict=True):
                found[place.name] = band.blocks_NB
                if place.order is not None and band.order_K is not None:
                    found[place.order] = band.order_K
        return found

    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        return self.packed(layer, self.in_blocks(layer, stored))

    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        coded, like = self._coded[layer].get(param), self.plan.likes[layer][param]
        if coded is None:
            return slot[param]
        bands = []
        for band in coded.bands:
            rows_NK = self._rows(slot, band, coded.cols)
            if band.order is not None:
                rows_NK = torch.empty_like(rows_NK).index_copy_(1, slot[band.order], rows_NK)
            bands.append(rows_NK)
        whole_NK = bands[0] if len(bands) == 1 else torch.cat(bands)
        # In the order of a parameter in memory: products with its transpose differ in the last place.
        return (whole_NK.T if self.plan.transposed[layer] else whole_NK).to(like.dtype).contiguous()

    def _rows(self, slot: Slot, band: CodedBand, cols: int) -> Tensor:
        """fp32 [N, K]: the rows of a band, its columns as they are stored."""
        return dequantise(slot[band.name], band.kind, cols)


class BlocksLayout(BandsLayout):
    """ggml blocks; with kernels within a tolerance of the exact result.

    The kernels round activations to 8 bits, as llama.cpp does. A step that needs gradients is computed
    with dequantised weights, as all are without kernels.

    kernels: compute; None: the exact arithmetic.
    """

    def __init__(self, plan: Plan, kernels: Ggml | None, coded: Sequence[CodedLayer] | None = None) -> None:
        self._kernels, self.is_exact = kernels, kernels is None
        self._activations = Activations()
        super().__init__(plan, coded)

    def _use(self, coded: Sequence[CodedLayer]) -> None:
        super()._use(coded)
        kinds = {band.kind for layer in coded for param in layer.values() for band in param.bands}
        if self._kernels is not None and (missing := sorted(kind.name for kind in kinds - self._kernels.types)):
            raise UncacheableError(
                f"{self.plan.where}: ggml's kernels here do not compute {', '.join(missing)}: load it with "
                'arithmetic="exact".'
            )
        names = ", ".join(sorted(kind.name for kind in kinds))
        self.name = names if self._kernels is None else f"{names} by ggml"
        self.place(None)

    def place(self, device: torch.device | None) -> None:
        super().place(device)
        # Of a layer: they know where the pool is.
        self._products: dict[int, LayerProducts | None] = {}

    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        is_exact = self._kernels is None or needs_weights(module, hidden_TD, weights_TK)
        products = None if is_exact else self._products_of(layer, module)
        if products is None:
            return super().compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
        out_TD: Tensor | None = None
        for slots in chosen.groups():
            part_TD = products.sum(module, hidden_TD, ids_TK, weights_TK, slots)
            out_TD = part_TD if out_TD is None else out_TD.add_(part_TD)
        return torch.zeros_like(hidden_TD) if out_TD is None else out_TD.to(hidden_TD.dtype)

    def _products_of(self, layer: int, module: nn.Module) -> LayerProducts | None:
        """None: what the module computes is not known to be products of codes."""
        if layer not in self._products:
            assert self.places is not None and self._kernels is not None
            coded, places = self._coded[layer], self.places
            self._products[layer] = (
                LayerProducts(
                    self._kernels,
                    coded,
                    places.pools.of(layer),
                    places.layers[layer],
                    module,
                    self._activations.of(module),
                )
                if is_coded(coded, module)
                else None
            )
        return self._products[layer]


def coded_layers(plan: Plan) -> list[CodedLayer]:
    """How each layer of a plan becomes blocks.

    Raises UncacheableError for codes that do not make up the model's parameters.
    """
    return [_coded_layer(plan, layer) for layer in range(len(plan.layers))]


def _coded_layer(plan: Plan, layer: int) -> CodedLayer:
    found: dict[str, CodedParam] = {}
    for group in plan.groups[layer]:
        if group.is_coded and group.blocks is not None:
            (param,) = group.params
            like = plan.likes[layer][param]
            rows, cols = reversed(like.shape) if plan.transposed[layer] else like.shape
            bands = bands_of(group, group.on_meta())
            if sum(len(band.blocks_NB) for band in bands) != rows or any(
                band.blocks_NB.shape[1] != band.kind.row_bytes(cols) for band in bands
            ):
                raise UncacheableError(
                    f"{plan.where}: the codes of {plan.layers[layer]}.{param} are "
                    f"{[list(band.blocks_NB.shape) for band in bands]}, which is not [{rows}, {cols}]: is it this "
                    "model's folder?"
                )
            names = [param] if len(bands) == 1 else [f"{param}.{at}" for at in range(len(bands))]
            found[param] = CodedParam(
                tuple(
                    CodedBand(name, band.kind, len(band.blocks_NB), None if band.order_K is None else f"{name}.order")
                    for name, band in zip(names, bands, strict=True)
                ),
                cols,
            )
    return found


def bands_of(group: Group, pieces: Mapping[str, Tensor]) -> list[Band]:
    """The bands of a coded parameter; neighbours of one type, whose columns are in order, are one."""
    assert group.blocks is not None
    found: list[Band] = []
    for band in group.blocks(pieces):
        last = found[-1] if found else None
        if last is not None and last.kind == band.kind and last.order_K is None and band.order_K is None:
            found[-1] = Band(band.kind, torch.cat((last.blocks_NB, band.blocks_NB)), None)
        else:
            found.append(band)
    return found
