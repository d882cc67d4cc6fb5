"""Slots of ggml blocks: ggml's kernels compute with them on a CPU, or they are dequantised on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encodings import Band, BlockType, Ggml, PoolMatrix, dequantise
from remoe_adapt.expert_cache.layouts import CodedLayout
from remoe_adapt.expert_cache.plan import Group, Plan
from remoe_adapt.expert_cache.pool import PoolSlot
from remoe_adapt.expert_cache.types import Slot

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts


class CodedBand(NamedTuple):
    """Rows of a matrix [N, K] in a slot.

    name: of the slot's tensor, uint8 [rows, kind.row_bytes(K)].
    order: of the slot's tensor [K] that says in which order the columns are stored, as `Band.order_K`; None: in theirs.
    """

    name: str
    kind: BlockType
    rows: int
    order: str | None = None


class CodedParam(NamedTuple):
    """A matrix of a layer as bands of ggml blocks; `cols`: K."""

    bands: tuple[CodedBand, ...]
    cols: int

    def parts(self) -> dict[str, Tensor]:
        """The slot's tensors, on the meta device."""
        found = {}
        for band in self.bands:
            found[band.name] = torch.empty(band.rows, band.kind.row_bytes(self.cols), dtype=torch.uint8, device="meta")
            if band.order is not None:
                found[band.order] = torch.empty(self.cols, dtype=torch.int64, device="meta")
        return found


# By name of the parameter: those that are coded.
CodedLayer = Mapping[str, CodedParam]


class BlocksLayout(CodedLayout):
    """ggml blocks; with kernels within a tolerance of the exact result.

    The kernels round activations to 8 bits in groups of 32, as llama.cpp does. A step that needs gradients is computed
    with dequantised weights, as all are without kernels.

    kernels: compute; None: the exact arithmetic.
    coded: how each layer is encoded; None: an expert of the files will tell (`probe`).
    """

    def __init__(self, plan: Plan, kernels: Ggml | None, coded: Sequence[CodedLayer] | None = None) -> None:
        super().__init__(plan)
        self._kernels, self.is_exact = kernels, kernels is None
        self._coded: list[CodedLayer] = []
        if coded is not None:
            self._use(coded)

    def probe(self) -> None:
        if not self._coded:
            self._use([self._probed(layer) for layer in range(len(self.plan.layers))])

    def _use(self, coded: Sequence[CodedLayer]) -> None:
        self._coded = list(coded)
        kinds = {band.kind for layer in coded for param in layer.values() for band in param.bands}
        if self._kernels is not None and (missing := sorted(kind.name for kind in kinds - self._kernels.types)):
            raise UncacheableError(
                f"{self.plan.where}: ggml's kernels here do not compute {', '.join(missing)}: load it with "
                'arithmetic="exact".'
            )
        names = ", ".join(sorted(kind.name for kind in kinds))
        self.name = names if self._kernels is None else f"{names} by ggml"
        self.place(None)
        self._fused: dict[int, bool] = {}

    def _probed(self, layer: int) -> CodedLayer:
        found = {}
        for group in self.plan.groups[layer]:
            if group.is_coded and group.blocks is not None:
                (param,) = group.params
                like = self.plan.likes[layer][param]
                rows, cols = reversed(like.shape) if self.plan.transposed[layer] else like.shape
                bands = bands_of(group, group.on_meta())
                if sum(len(band.blocks_NB) for band in bands) != rows or any(
                    band.blocks_NB.shape[1] != band.kind.row_bytes(cols) for band in bands
                ):
                    raise UncacheableError(
                        f"{self.plan.where}: the codes of {self.plan.layers[layer]}.{param} are "
                        f"{[list(band.blocks_NB.shape) for band in bands]}, which is not [{rows}, {cols}]: is it this "
                        "model's folder?"
                    )
                names = [param] if len(bands) == 1 else [f"{param}.{at}" for at in range(len(bands))]
                found[param] = CodedParam(
                    tuple(
                        CodedBand(
                            name, band.kind, len(band.blocks_NB), None if band.order_K is None else f"{name}.order"
                        )
                        for name, band in zip(names, bands, strict=True)
                    ),
                    cols,
                )
        return found

    def parts(self, layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for param, like in self.plan.likes[layer].items():
            coded = self._coded[layer].get(param)
            found |= {param: like} if coded is None else coded.parts()
        return found

    def bands(self, layer: int, param: str) -> tuple[str, ...]:
        coded = self._coded[layer].get(param)
        return () if coded is None else tuple(band.name for band in coded.bands)

    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        assert self.places is not None
        slot = self.places.slot(layer)
        self.fill(layer, stored, slot)
        return slot

    def fill(self, layer: int, stored: Mapping[str, Tensor], slot: Slot) -> None:
        """Put into a slot what these stored tensors make of it; others have been read to their places."""
        for group in self.plan.groups[layer]:
            if group.sources[0].ending not in stored and group.params[0] not in stored:
                continue
            coded = self._coded[layer].get(group.params[0])
            if coded is None:
                made = self.plan.converted(group, stored)
                for param in group.params:
                    slot[param].copy_(made[param])
                continue
            pieces = {source.ending: stored[source.ending] for source in group.sources}
            for place, band in zip(coded.bands, bands_of(group, pieces), strict=True):
                slot[place.name].copy_(band.blocks_NB)
                if place.order is not None and band.order_K is not None:
                    slot[place.order].copy_(band.order_K)

    def coded(self, layer: int) -> CodedLayer:
        """The parameters of a layer that are in blocks, by name."""
        return self._coded[layer]

    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        coded, like = self._coded[layer].get(param), self.plan.likes[layer][param]
        if coded is None:
            return slot[param]
        bands = []
        for band in coded.bands:
            rows_NK = dequantise(slot[band.name], band.kind, coded.cols)
            if band.order is not None:
                rows_NK = torch.empty_like(rows_NK).index_copy_(1, slot[band.order], rows_NK)
            bands.append(rows_NK)
        whole_NK = bands[0] if len(bands) == 1 else torch.cat(bands)
        # In the order of a parameter in memory: products with its transpose differ in the last place.
        return (whole_NK.T.contiguous() if self.plan.transposed[layer] else whole_NK).to(like.dtype)

    def compute(
        self,
        layer: int,
        module: nn.Module,
        hidden_TD: Tensor,
        ids_TK: Tensor,
        weights_TK: Tensor,
        chosen: ChosenExperts,
    ) -> Tensor:
        # In training all forwards are alike: a checkpointed one runs without a graph first, and then again with one.
        has_graph = torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad)
        if self._kernels is None or has_graph or module.training or not self._is_coded(layer, module):
            return super().compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
        out_TD: Tensor | None = None
        for slots in chosen.groups():
            picked = _Picked(slots, ids_TK)
            if picked.is_all:
                found_TKD = self._experts(self._kernels, layer, module, hidden_TD, picked)
                part_TD = torch.bmm(weights_TK.float().unsqueeze(1), found_TKD).squeeze(1)
            else:  # experts of another group, and null experts: the other pairs of a token and an expert alone
                token_S, choice_S = torch.where(picked.places_TC >= 0)
                found_SD = self._experts(
                    self._kernels, layer, module, hidden_TD[token_S], picked.of(token_S, choice_S)
                )[:, 0]
                part_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
                part_TD.index_add_(0, token_S, found_SD * weights_TK[token_S, choice_S, None].float())
            out_TD = part_TD if out_TD is None else out_TD + part_TD
        return torch.zeros_like(hidden_TD) if out_TD is None else out_TD.to(hidden_TD.dtype)

    def _is_coded(self, layer: int, module: Any) -> bool:
        """Whether both products of a layer are of codes, and nothing stands between them but the gate."""
        names = ("gate_up_proj" if module.has_gate else "up_proj", "down_proj")
        return all(name in self._coded[layer] for name in names) and not getattr(module, "has_post_expert_norm", False)

    def _experts(self, kernels: Ggml, layer: int, module: Any, hidden_TD: Tensor, picked: _Picked) -> Tensor:
        """What each chosen expert makes of its token: [T, C, D], float32."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        if self._is_fused(layer, module):
            matrices = self._matrices(layer, up) + self._matrices(layer, "down_proj")
            return kernels.expert_mlp(hidden_TD, picked.numbers_TC, *matrices)
        inner_TCI = self._projected(kernels, layer, up, hidden_TD, picked, module.has_bias)
        inner_TCI = module._apply_gate(inner_TCI) if module.has_gate else module.act_fn(inner_TCI)
        return self._projected(kernels, layer, "down_proj", inner_TCI, picked, module.has_bias)

    def _is_fused(self, layer: int, module: Any) -> bool:
        """Whether one call of the kernels computes all of the layer: gate rows, then up rows, silu, no biases."""
        if layer not in self._fused:
            coded = [self._coded[layer].get(name) for name in ("gate_up_proj", "down_proj")]
            plain = all(p is not None and len(p.bands) == 1 and p.bands[0].order is None for p in coded)
            self._fused[layer] = plain and module.has_gate and not module.has_bias and _is_swiglu(module)
        return self._fused[layer]

    def _matrices(self, layer: int, param: str) -> list[PoolMatrix]:
        assert self.places is not None
        coded, pool, places = self._coded[layer][param], self.places.pools.of(layer), self.places.layers[layer]
        return [
            PoolMatrix(
                pool.address + places[band.name][0], pool.slots, pool.slot_bytes, band.kind, band.rows, coded.cols
            )
            for band in coded.bands
        ]

    def _projected(self, kernels: Ggml, layer: int, param: str, x: Tensor, picked: _Picked, has_bias: bool) -> Tensor:
        found = []
        for band, matrix in zip(self._coded[layer][param].bands, self._matrices(layer, param), strict=True):
            x_band = x
            if band.order is not None:
                # Each expert has an order of its own, so each choice gets its own copy of the token.
                order_TCK = picked.gathered(band.order)
                x_TCK = x if x.dim() == order_TCK.dim() else x.unsqueeze(1).expand(order_TCK.shape)
                x_band = x_TCK.gather(-1, order_TCK)
            found.append(kernels.expert_matmul(x_band, picked.numbers_TC, matrix))
        found_TCN = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        if has_bias:
            found_TCN += picked.gathered(f"{param}_bias")
        return found_TCN


class _Picked:
    """Which slot each choice of each token has.

    places_TC: the number of its expert among the slots; -1: it is not among them.
    numbers_TC: int32, the number of its slot in the pool.
    """

    def __init__(self, slots: Mapping[int, Slot], ids_TC: Tensor) -> None:
        self._slots = list(slots.values())
        place = {expert: at for at, expert in enumerate(slots)}
        rows = [[place.get(expert, -1) for expert in row] for row in ids_TC.tolist()]
        self.is_all = all(-1 not in row for row in rows)
        self.places_TC = torch.tensor(rows, dtype=torch.int64)
        numbers = [slot.number for slot in self._slots if isinstance(slot, PoolSlot)]
        self.numbers_TC = torch.tensor(numbers, dtype=torch.int32)[self.places_TC]

    def of(self, token_S: Tensor, choice_S: Tensor) -> _Picked:
        """These pairs of a token and a choice, as tokens with one choice each."""
        found = object.__new__(_Picked)
        found._slots, found.is_all = self._slots, True
        found.places_TC = self.places_TC[token_S, choice_S, None]
        found.numbers_TC = self.numbers_TC[token_S, choice_S, None]
        return found

    def gathered(self, name: str) -> Tensor:
        """A part of each choice's slot: [T, C, ...]."""
        return torch.stack([slot[name] for slot in self._slots])[self.places_TC]


def _is_swiglu(module: Any) -> bool:
    """Whether a module's gate is silu(gate) * up of one half and the other: tried out, since any class may have its
    own."""
    both_N = torch.linspace(-3.0, 3.0, 64)
    gate, up = both_N.chunk(2)
    with torch.no_grad():
        return torch.allclose(module._apply_gate(both_N[None])[0], torch.nn.functional.silu(gate) * up)


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
