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
    BYTE_CODED,
    F16,
    F32,
    MXFP4,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    BlockType,
    byte_groups,
    check_blocks,
    code_groups,
)
from remoe_adapt.triton_kernels import slots

_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
# Codes of fewer bits are also four bits in planes, others eight.
_KINDS = {
    **dict.fromkeys(BYTE_CODED, slots.INT8),
    **dict.fromkeys((Q2_K, Q3_K, Q4_0, Q4_1, Q4_K), slots.INT4),
    **dict.fromkeys(_FLOATS, slots.FLOAT),
    MXFP4: slots.MXFP4,
}
# Kernels read so many columns together; groups of 16 lie in them in pairs.
_TOGETHER = 32


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
    return found if found == slots.FLOAT or cols % _TOGETHER == 0 else None


def planar_from_blocks(kind: BlockType, blocks_NB: Tensor, cols: int) -> Planar:
    """The same numbers in planes; scales and minima are rounded to fp16, which only types of blocks of 256 feel.

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
    if found == slots.MXFP4:
        # The first half of a block is in the low halves of its bytes, here neighbours share a byte.
        blocks_NGB = blocks_NB.unflatten(1, (-1, kind.bytes))
        low, high = blocks_NGB[..., 1:] & 15, blocks_NGB[..., 1:] >> 4
        return Planar(found, _halves(torch.cat([low, high], dim=-1).flatten(1)), blocks_NGB[..., 0].contiguous())
    minima: Tensor | None
    if kind in BYTE_CODED:
        codes_NK, scales_NG, minima = byte_groups(blocks_NB, kind, cols)
    else:
        codes_NK, scales_NG, minima = code_groups(blocks_NB, kind, cols)
    if kind == Q4_0:
        # A symmetric type has no minima: -8 * scale is what its kernel adds.
        minima = None
    elif kind == Q3_K:
        codes_NK = codes_NK + 8
    if found == slots.INT4:
        codes_NK = _halves(codes_NK.to(torch.uint8))
    return Planar(found, codes_NK.contiguous(), scales_NG.half(), None if minima is None else minima.half())


def _halves(codes_NK: Tensor) -> Tensor:
    """uint8 [N, K / 2]: column 2j in the low half of byte j, 2j + 1 in the high one."""
    return codes_NK[:, 0::2] | (codes_NK[:, 1::2] << 4)
