"""What the experts of a layer make of tokens, computed by ggml's kernels on blocks in a pool of slots."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from remoe_adapt.expert_cache.encodings import BlockType, Ggml, PoolMatrix
from remoe_adapt.expert_cache.pool import Parts, SlotPool
from remoe_adapt.expert_cache.types import Slot
from remoe_adapt.triton_kernels.slots import Activation

# Up to so many choices a loop over them takes less time than torch's operations.
_FEW_CHOICES = 64


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


def matrices_of(module: Any) -> tuple[str, str]:
    """Names of the parameters that an experts module multiplies with, first and last."""
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def is_coded(coded: CodedLayer, module: Any) -> bool:
    """Whether both products of a layer are of codes, and nothing stands between them but the gate."""
    return all(name in coded for name in matrices_of(module)) and not getattr(module, "has_post_expert_norm", False)


def numbers_of(numbers: Mapping[int, int], ids_TC: Tensor) -> tuple[Tensor, bool]:
    """int32 [T, C]: the number that each id has, -1 for ids that have none; and whether all have one."""
    if ids_TC.numel() <= _FEW_CHOICES:
        found = array("i", [numbers.get(expert, -1) for row in ids_TC.tolist() for expert in row])
        # Of the array's own memory: torch takes longer to copy a list.
        return torch.frombuffer(found, dtype=torch.int32).view(ids_TC.shape), -1 not in found
    # The last entry is for all larger ids, and for those below 0.
    last = max(numbers) + 1
    table_E = torch.full((last + 1,), -1, dtype=torch.int32)
    table_E[list(numbers)] = torch.tensor(list(numbers.values()), dtype=torch.int32)
    found_TC = table_E[torch.where(ids_TC < 0, last, ids_TC).clamp_(max=last)]
    return found_TC, bool((found_TC >= 0).all())


class _Matrix(NamedTuple):
    """The rows of a projection in one band. order_SK: of the columns of each slot's band; None: in theirs."""

    pool: PoolMatrix
    order_SK: Tensor | None


class _Projection:
    """One matrix of every slot, with its bias; `weights` [N, K] are bands one after another."""

    def __init__(self, param: CodedParam, bias: str | None, pool: SlotPool, places: Parts) -> None:
        self.bands = [
            _Matrix(
                PoolMatrix(
                    pool.address + places[band.name][0], pool.slots, pool.slot_bytes, band.kind, band.rows, param.cols
                ),
                None if band.order is None else _of_all_slots(pool, *places[band.order]),
            )
            for band in param.bands
        ]
        self._bias_SN = None if bias is None else _of_all_slots(pool, *places[bias])

    @property
    def is_plain(self) -> bool:
        """Whether it is a single matrix, its columns in their order, and has no bias."""
        return len(self.bands) == 1 and self.bands[0].order_SK is None and self._bias_SN is None

    def of(self, kernels: Ggml, x: Tensor, numbers_TC: Tensor) -> Tensor:
        """fp32 [T, C, N] of x [T, K] or [T, C, K]."""
        found = []
        for matrix, order_SK in self.bands:
            x_band = x
            if order_SK is not None:
                # Each expert has an order of its own, so each choice gets its own copy of the token.
                order_TCK = order_SK[numbers_TC]
                x_TCK = x if x.ndim == 3 else x.unsqueeze(1).expand(order_TCK.shape)
                x_band = x_TCK.gather(-1, order_TCK)
            found.append(kernels.expert_matmul(x_band, numbers_TC, matrix))
        found_TCN = found[0] if len(found) == 1 else torch.cat(found, dim=-1)
        return found_TCN if self._bias_SN is None else found_TCN.add_(self._bias_SN[numbers_TC])


class LayerProducts:
    """The experts of one layer whose matrices are blocks.

    kernels: compute.
    coded: how its matrices are encoded.
    pool: of its slots, which must outlive this object.
    places: of the parts in a slot.
    module: whose experts they are, or one like it.
    activation: between its products; None: not known to the kernels.
    """

    def __init__(
        self,
        kernels: Ggml,
        coded: CodedLayer,
        pool: SlotPool,
        places: Parts,
        module: Any,
        activation: Activation | None,
    ) -> None:
        self._kernels = kernels
        up, down = (
            _Projection(coded[name], f"{name}_bias" if module.has_bias else None, pool, places)
            for name in matrices_of(module)
        )
        self._up, self._down = up, down
        # One call of the kernels computes gate rows, then up rows, with silu between, and no biases.
        self._whole: tuple[PoolMatrix, PoolMatrix] | None = None
        if up.is_plain and down.is_plain and activation == Activation():
            self._whole = up.bands[0].pool, down.bands[0].pool

    def experts(self, module: Any, x_TD: Tensor, numbers_TC: Tensor) -> Tensor:
        """fp32 [T, C, D]: what each chosen expert makes of its token.

        module: has the gate, or the activation.
        numbers_TC: int32, of slots of the pool.
        """
        if self._whole is not None:
            return self._kernels.expert_mlp(x_TD, numbers_TC, *self._whole)
        inner_TCI = self._up.of(self._kernels, x_TD, numbers_TC)
        inner_TCI = module._apply_gate(inner_TCI) if module.has_gate else module.act_fn(inner_TCI)
        return self._down.of(self._kernels, inner_TCI, numbers_TC)

    def sum(self, module: Any, x_TD: Tensor, ids_TC: Tensor, weights_TC: Tensor, slots: Mapping[int, Slot]) -> Tensor:
        """fp32 [T, D]: the weighted sum over those of a token's experts that are among the slots.

        module: as for `experts`.
        slots: PoolSlots by expert; other ids are of other groups of experts, or of none at all.
        """
        numbers: Any = {expert: slot.number for expert, slot in slots.items()}  # type: ignore[attr-defined]
        numbers_TC, is_all = numbers_of(numbers, ids_TC)
        weights_TC = weights_TC.float()
        if is_all and len(ids_TC) == 1:
            return weights_TC @ self.experts(module, x_TD, numbers_TC)[0]
        if is_all:
            return torch.bmm(weights_TC.unsqueeze(1), self.experts(module, x_TD, numbers_TC)).squeeze(1)
        # Pairs of a token and an expert, as tokens with one choice each.
        token_S, choice_S = torch.where(numbers_TC >= 0)
        found_SD = self.experts(module, x_TD[token_S], numbers_TC[token_S, choice_S, None])[:, 0]
        out_TD = torch.zeros(x_TD.shape, dtype=torch.float32)
        return out_TD.index_add_(0, token_S, found_SD.mul_(weights_TC[token_S, choice_S, None]))


def _of_all_slots(pool: SlotPool, offset: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A part of every slot of a pool, [slots, *shape], where it lies. Rows of slots that nobody has filled are zeros or
    anything; the pool's owner keeps it."""
    if not pool.slots or 0 in shape:
        return torch.empty(pool.slots, *shape, dtype=dtype)
    size = pool.slots * pool.slot_bytes
    memory = (ctypes.c_uint8 * size).from_address(pool.address)
    (length,) = shape
    whole_B = torch.frombuffer(memory, dtype=torch.uint8)
    return whole_B.view(dtype).as_strided(
        (pool.slots, length), (pool.slot_bytes // dtype.itemsize, 1), offset // dtype.itemsize
    )
