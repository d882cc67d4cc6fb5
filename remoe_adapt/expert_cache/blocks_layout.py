"""Slots of ggml blocks, which ggml's kernels compute with on a CPU: the fast arithmetic there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encodings import Band, BlockType, Ggml, PoolMatrix
from remoe_adapt.expert_cache.layouts import CodedLayout, Stored
from remoe_adapt.expert_cache.plan import Group, Plan
from remoe_adapt.expert_cache.pool import Pools, PoolSlot
from remoe_adapt.expert_cache.types import Slot

# For types alone, because experts.py imports this file.
if TYPE_CHECKING:
    from remoe_adapt.expert_cache.experts import ChosenExperts


@dataclass(frozen=True, slots=True)
class CodedParam:
    """A matrix [N, K] of a layer as ggml blocks.

    name: of the parameter. The slot's tensors are `names`, one for each band: type and number of rows.
    order: name of the slot's tensor that says in which order the columns are stored; None: in their own.
    """

    name: str
    bands: tuple[tuple[BlockType, int], ...]
    cols: int
    order: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,) if len(self.bands) == 1 else tuple(f"{self.name}.{at}" for at in range(len(self.bands)))

    def parts(self) -> dict[str, Tensor]:
        """The slot's tensors, on the meta device."""
        found = {
            name: torch.empty(rows, kind.row_bytes(self.cols), dtype=torch.uint8, device="meta")
            for name, (kind, rows) in zip(self.names, self.bands, strict=True)
        }
        if self.order is not None:
            found[self.order] = torch.empty(self.cols, dtype=torch.int64, device="meta")
        return found


# By name of the parameter: those that are coded.
CodedLayer = Mapping[str, CodedParam]


class BlocksLayout(CodedLayout):
    """ggml blocks, within a tolerance of the exact result.

    Activations are rounded to 8 bits in groups of 32, as llama.cpp does. A step that needs gradients is computed with
    dequantised weights instead.

    pools: memory for slots, one pool for all slots of one shape.
    """

    is_exact = False

    def __init__(self, plan: Plan, kernels: Ggml, coded: Sequence[CodedLayer] | None = None) -> None:
        super().__init__(plan)
        self._kernels = kernels
        self._coded: list[CodedLayer] = []
        if coded is not None:
            self._use(coded)

    def probe(self, stored: Stored) -> None:
        # Layers whose tensors have the same names, types and shapes are encoded alike: one expert of them tells how.
        known: dict[object, CodedLayer] = {}
        layers = []
        for layer, groups in enumerate(self.plan.groups):
            key = tuple(
                (group.tag, *((source.ending, source.extents[0].dtype, source.shape()) for source in group.sources))
                for group in groups
            )
            if key not in known:
                known[key] = self._probed(layer, stored(layer, 0))
            layers.append(known[key])
        self._use(layers)

    def _use(self, coded: Sequence[CodedLayer]) -> None:
        self._coded = list(coded)
        kinds = {kind for layer in coded for param in layer.values() for kind, _ in param.bands}
        if missing := sorted(kind.name for kind in kinds - self._kernels.types):
            raise UncacheableError(
                f"{self.plan.where}: ggml's kernels here do not compute {', '.join(missing)}: load it with "
                'arithmetic="exact".'
            )
        self.name = f"ggml {', '.join(sorted(kind.name for kind in kinds))}"
        self.pools = Pools([self.parts(layer) for layer in range(len(self.plan.layers))], self.plan.num_experts)

    def _probed(self, layer: int, stored: Mapping[str, Tensor]) -> CodedLayer:
        found = {}
        for param, bands in self._bands(layer, stored).items():
            like = self.plan.likes[layer][param]
            rows, cols = reversed(like.shape) if self.plan.transposed[layer] else like.shape
            if sum(len(band.blocks_NB) for band in bands) != rows or any(
                band.blocks_NB.shape[1] != band.kind.row_bytes(cols) for band in bands
            ):
                raise UncacheableError(
                    f"{self.plan.where}: the codes of {self.plan.layers[layer]}.{param} are "
                    f"{[list(band.blocks_NB.shape) for band in bands]}, which is not [{rows}, {cols}]: is it this "
                    "model's folder?"
                )
            order = f"{param}.order" if any(band.order_K is not None for band in bands) else None
            found[param] = CodedParam(param, tuple((b.kind, len(b.blocks_NB)) for b in bands), cols, order)
        return found

    def _bands(self, layer: int, stored: Mapping[str, Tensor]) -> dict[str, list[Band]]:
        """The bands of each coded parameter, made of an expert's stored tensors."""
        return {group.params[0]: _bands_of(group, stored) for group in self.plan.groups[layer] if group.is_coded}

    def parts(self, layer: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for param, like in self.plan.likes[layer].items():
            coded = self._coded[layer].get(param)
            found |= {param: like} if coded is None else coded.parts()
        return found

    def filled(self, layer: int, stored: Mapping[str, Tensor]) -> Slot:
        slot = self.pools.take(layer)
        bands = self._bands(layer, stored)
        for param in self.plan.likes[layer]:
            coded = self._coded[layer].get(param)
            if coded is None:
                slot[param].copy_(stored[param])
                continue
            for name, (kind, _), band in zip(coded.names, coded.bands, bands[param], strict=True):
                assert band.kind == kind
                slot[name].copy_(band.blocks_NB)
                if coded.order is not None and band.order_K is not None:
                    slot[coded.order].copy_(band.order_K)
        return slot

    def weight(self, layer: int, slot: Slot, param: str) -> Tensor:
        coded, like = self._coded[layer].get(param), self.plan.likes[layer][param]
        if coded is None:
            return slot[param]
        pieces = [
            self._kernels.dequantise(slot[name], kind, coded.cols)
            for name, (kind, _) in zip(coded.names, coded.bands, strict=True)
        ]
        whole_NK = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        if coded.order is not None:
            whole_NK = torch.empty_like(whole_NK).index_copy_(1, slot[coded.order], whole_NK)
        return (whole_NK.T if self.plan.transposed[layer] else whole_NK).to(like.dtype)

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
        if has_graph or getattr(module, "has_post_expert_norm", False):
            return super().compute(layer, module, hidden_TD, ids_TK, weights_TK, chosen)
        out_TD: Tensor | None = None
        for slots in chosen.groups():
            numbers_TK = _numbers(slots, ids_TK)
            if bool((numbers_TK >= 0).all()):
                found_TKD = self._experts(layer, module, hidden_TD, numbers_TK)
                part_TD = torch.bmm(weights_TK.float().unsqueeze(1), found_TKD).squeeze(1)
            else:  # experts of another group, and null experts: the other pairs of a token and an expert alone
                token_S, choice_S = torch.where(numbers_TK >= 0)
                found_SD = self._experts(layer, module, hidden_TD[token_S], numbers_TK[token_S, choice_S, None])[:, 0]
                part_TD = torch.zeros(hidden_TD.shape, dtype=torch.float32)
                part_TD.index_add_(0, token_S, found_SD * weights_TK[token_S, choice_S, None].float())
            out_TD = part_TD if out_TD is None else out_TD + part_TD
        return torch.zeros_like(hidden_TD) if out_TD is None else out_TD.to(hidden_TD.dtype)

    def _experts(self, layer: int, module: Any, hidden_TD: Tensor, numbers_TC: Tensor) -> Tensor:
        """What each chosen expert makes of its token: [T, C, D], float32."""
        up = "gate_up_proj" if module.has_gate else "up_proj"
        inner_TCI = self._projected(layer, up, hidden_TD, numbers_TC, module.has_bias)
        inner_TCI = module._apply_gate(inner_TCI) if module.has_gate else module.act_fn(inner_TCI)
        return self._projected(layer, "down_proj", inner_TCI, numbers_TC, module.has_bias)

    def _projected(self, layer: int, param: str, x: Tensor, numbers_TC: Tensor, has_bias: bool) -> Tensor:
        coded, pool = self._coded[layer][param], self.pools.of(layer)
        if coded.order is not None:
            # Each expert has an order of its own, so each choice gets its own copy of the token.
            order_TCK = pool.part(coded.order)[numbers_TC.long()]
            x = (x if x.dim() == order_TCK.dim() else x.unsqueeze(1).expand(order_TCK.shape)).gather(-1, order_TCK)
        pieces = [
            self._kernels.expert_matmul(
                x,
                numbers_TC,
                PoolMatrix(pool.address + pool.offset(name), pool.slots, pool.slot_bytes, kind, rows, coded.cols),
            )
            for name, (kind, rows) in zip(coded.names, coded.bands, strict=True)
        ]
        found_TCN = pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=-1)
        if has_bias:
            found_TCN += pool.part(f"{param}_bias")[numbers_TC.long()]
        return found_TCN


def _bands_of(group: Group, stored: Mapping[str, Tensor]) -> list[Band]:
    assert group.blocks is not None
    return group.blocks({source.ending: stored[source.ending] for source in group.sources})


def _numbers(slots: Mapping[int, Slot], ids_TK: Tensor) -> Tensor:
    """The slot of each choice, int32 [T, K]; -1 where it is not among these."""
    numbers = {expert: slot.number for expert, slot in slots.items() if isinstance(slot, PoolSlot)}
    rows = [[numbers.get(expert, -1) for expert in row] for row in ids_TK.tolist()]
    return torch.tensor(rows, dtype=torch.int32)
