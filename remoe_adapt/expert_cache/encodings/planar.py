"""Rows of ggml blocks taken apart, as the experts' kernels on a GPU read them: codes, scales and minima in planes.

A block has its scale beside its codes, so that a row is read byte by byte; threads of a GPU read whole words of codes,
and a scale once for its group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encodings.blocks import (
    BF16,
    F16,
    F32,
    MXFP4,
    Q4_0,
    Q4_1,
    Q4_K,
    Q8_0,
    BlockType,
    check_blocks,
    code_groups,
)
from remoe_adapt.triton_kernels import slots

_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
_KINDS = {
    Q4_0: slots.INT4, Q4_1: slots.INT4, Q4_K: slots.INT4, Q8_0: slots.INT8, MXFP4: slots.MXFP4,
    **dict.fromkeys(_FLOATS, slots.FLOAT),
}  # fmt: skip
# Columns of a group.
_GROUP = 32


@dataclass(frozen=True, slots=True)
class Planar:
    """A matrix [N, K] in planes; kinds, shapes and types as in `SlotMatrix`, without its dimension of slots."""

    kind: str
    codes: Tensor
    scales: Tensor | None = None
    minima: Tensor | None = None


def planar_kind(kind: BlockType, cols: int) -> str | None:
    """The kernels' name of the planes of such rows; None: there are none."""
    found = _KINDS.get(kind)
    return found if found == slots.FLOAT or cols % _GROUP == 0 else None


def planar_from_blocks(kind: BlockType, blocks_NB: Tensor, cols: int) -> Planar:
    """The same numbers in planes; scales and minima of 4-bit codes are rounded to fp16, which only those of q4_K feel.

    kind: of the blocks, one that `planar_kind` has planes for.
    blocks_NB: uint8 [N, kind.row_bytes(cols)].
    cols: K.

    Raises UncacheableError for other types, and for tensors that are no such rows.
    """
    found = planar_kind(kind, cols)
    if found is None:
        raise UncacheableError(f"{kind.name} blocks of {cols} columns have no planes: dequantise them.")
    check_blocks(blocks_NB, kind, cols)
    if found == slots.FLOAT:
        return Planar(found, blocks_NB.contiguous().view(_FLOATS[kind]))
    if found == slots.INT4:
        codes_NK, scales_NG, minima_NG = code_groups(blocks_NB, kind, cols)
        # A symmetric type has no minima: -8 * scale is what its kernel subtracts.
        minima = None if kind == Q4_0 else minima_NG.half()
        return Planar(found, _halves(codes_NK), scales_NG.half(), minima)
    blocks_NGB = blocks_NB.unflatten(1, (-1, kind.bytes))
    if found == slots.INT8:
        scales_NG = blocks_NGB[..., :2].contiguous().view(torch.float16)[..., 0]
        return Planar(found, blocks_NGB[..., 2:].flatten(1).view(torch.int8), scales_NG.contiguous())
    # The first half of a block is in the low halves of its bytes, here neighbours share a byte.
    low, high = blocks_NGB[..., 1:] & 15, blocks_NGB[..., 1:] >> 4
    return Planar(found, _halves(torch.cat([low, high], dim=-1).flatten(1)), blocks_NGB[..., 0].contiguous())


def _halves(codes_NK: Tensor) -> Tensor:
    """uint8 [N, K / 2]: column 2j in the low half of byte j, 2j + 1 in the high one."""
    return codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)
