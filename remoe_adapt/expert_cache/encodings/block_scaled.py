"""Small floating-point numbers under the scales of tiles (FP8, MXFP4), and the ggml blocks that hold them.

E4M3 and E8M0 are those of https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.encodings.blocks import MXFP4, Q8_0, BlockType
from remoe_adapt.expert_cache.encodings.groups import BLOCK, Groups, q8_0_of, renibble, with_numbers

# The exponent byte of E8M0 that stands for no number.
_NO_NUMBER = 255
# The byte of E4M3 without its sign that stands for no number.
_E4M3_NO_NUMBER = 127
# Blocks whose largest number has a smaller exponent's field need factors beyond fp16.
_LEAST_FIELD = 6
# A byte widened with its sign has the sign twice in the upper half: all bits of fp16 but the second.
_NO_SECOND_SIGN = ~0x4000


def checked_pair(stem: str, parts: Mapping[str, Tensor], codes: str, scales: str) -> tuple[Tensor, Tensor]:
    """The codes and the scales of a matrix; raises ExpertReadError for a missing one and for scales that are no
    numbers."""
    if missing := [part for part in (codes, scales) if part not in parts]:
        raise ExpertReadError(f"{stem} has no {missing[0]}, but {', '.join(parts) or 'nothing'}: is the file whole?")
    found = parts[scales]
    if found.is_meta:
        return parts[codes], found
    if found.dtype in (torch.uint8, torch.float8_e8m0fnu):
        good = not bool((found.view(torch.uint8) == _NO_NUMBER).any())
    else:
        good = found.is_floating_point() and bool(found.float().isfinite().all())
    if not good:
        raise ExpertReadError(f"{stem}: {scales} holds what is no finite number: fetch the file again.")
    return parts[codes], found


def mxfp4_blocks(stem: str, codes_NGH: Tensor, scales_NG: Tensor) -> tuple[BlockType, Tensor]:
    """E2M1 codes, uint8 [N, G, 16] with an even column in the low half of a byte, and E8M0 bytes: ggml's MXFP4."""
    if (
        codes_NGH.dtype not in (torch.uint8, torch.int8)
        or codes_NGH.shape != (*scales_NG.shape, 16)
        or scales_NG.element_size() != 1
        or not scales_NG.numel()
    ):
        raise _unfit(stem, codes_NGH, scales_NG)
    blocks_NGC = torch.empty((*scales_NG.shape, MXFP4.bytes), dtype=torch.uint8, device=codes_NGH.device)
    blocks_NGC[..., 0] = scales_NG.view(torch.uint8)
    renibble(codes_NGH.view(torch.uint8), blocks_NGC[..., 1:])
    return MXFP4, blocks_NGC.flatten(1)


def tile_blocks(stem: str, codes_NK: Tensor, scales_RC: Tensor) -> tuple[BlockType, Tensor]:
    """E4M3 numbers as Q8_0; E2M1 numbers, two in an int8, with E8M0 bytes for 32 of a row as MXFP4.

    scales_RC: of R x C tiles of one size, floats, E8M0 or its bytes; one number for all.
    """
    num_rows, cols, scales_RC = _tiled(stem, codes_NK, scales_RC)
    if codes_NK.dtype == torch.int8:
        if scales_RC.element_size() != 1 or scales_RC.shape != (num_rows, cols // BLOCK):
            raise _unfit(stem, codes_NK, scales_RC)
        return mxfp4_blocks(stem, codes_NK.unflatten(1, (-1, 16)), scales_RC)
    if codes_NK.dtype != torch.float8_e4m3fn:
        raise _unfit(stem, codes_NK, scales_RC)
    width = cols // scales_RC.shape[1]
    if width % BLOCK or cols % BLOCK:
        return Q8_0, q8_0_of(tile_values(stem, codes_NK, scales_RC))
    scales_NB = numbers(scales_RC).repeat_interleave(num_rows // len(scales_RC), 0)
    return Q8_0, _q8_0_of_e4m3(stem, codes_NK, scales_NB.repeat_interleave(width // BLOCK, 1))


def int8_blocks(stem: str, codes_NK: Tensor, scales_RC: Tensor) -> Tensor:
    """int8 codes under the scales of tiles as Q8_0, code for code: uint8 [N, 34 * K / 32]."""
    num_rows, cols = codes_NK.shape if codes_NK.ndim == 2 else (0, 0)
    scales_RC = scales_RC.reshape(1, 1) if scales_RC.numel() == 1 else scales_RC
    if not num_rows or scales_RC.ndim != 2 or num_rows % len(scales_RC) or cols % scales_RC.shape[1]:
        raise _unfit(stem, codes_NK, scales_RC)
    scales_NC = scales_RC.float().repeat_interleave(num_rows // len(scales_RC), 0)
    _, blocks_NB = Groups(codes_NK, scales_NC, None, 8).to_blocks(Q8_0)
    return blocks_NB


def tile_values(stem: str, codes_NK: Tensor, scales_RC: Tensor) -> Tensor:
    """fp32 [N, K]: each number times the scale of its tile."""
    num_rows, cols, scales_RC = _tiled(stem, codes_NK, scales_RC, packed=False)
    rows, columns = scales_RC.shape
    tiles = codes_NK.float().view(rows, num_rows // rows, columns, cols // columns)
    return (tiles * numbers(scales_RC)[:, None, :, None]).view(num_rows, cols)


def numbers(scales: Tensor) -> Tensor:
    """Stored scales in fp32: bytes are the exponents of E8M0."""
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def _q8_0_of_e4m3(stem: str, codes_NK: Tensor, scales_NB: Tensor) -> Tensor:
    """Q8_0 whose unit is the tile's scale times a power of two, so that most numbers are held as they are.

    The largest number of a block has four significant bits, at most 15 * 2^e: with units of 2^(e - 3) it is at most
    120, and every number of the block down to an eighth of that is a whole code.
    """
    blocks_NBK = codes_NK.view(torch.uint8).unflatten(1, (-1, BLOCK))
    largest_NB = (blocks_NBK & _E4M3_NO_NUMBER).amax(-1)
    if not largest_NB.is_meta and bool((largest_NB == _E4M3_NO_NUMBER).any()):
        raise ExpertReadError(f"{stem}: weight holds what is no number: fetch the file again.")
    # The exponent's field of the largest, whose bias is 7; the mantissa has 3 bits.
    field_NB = (largest_NB >> 3).clamp(min=1)
    unit_NB = (field_NB.float() - (7 + 3 + 3)).exp2()
    blocks_NBC, front = with_numbers(Q8_0, [scales_NB * unit_NB], blocks_NBK)
    if not largest_NB.is_meta and bool(((largest_NB > 0) & (field_NB < _LEAST_FIELD)).any()):
        whole_NBK = (codes_NK.float().unflatten(1, (-1, BLOCK)) / unit_NB[..., None]).round_()
        blocks_NBC[..., front:] = whole_NBK.to(torch.int8).view(torch.uint8)
        return blocks_NBC.flatten(1)
    # The bits of E4M3 moved to where fp16 has its own are the number times 2^-8, since the biases are 7 and 15.
    halfs_NBK = (blocks_NBK.view(torch.int8).to(torch.int16) << 7).bitwise_and_(_NO_SECOND_SIGN).view(torch.float16)
    # Between 1024 and 2048 fp16 has units of 1: adding 1536 rounds, and leaves the code in the lowest eight bits.
    halfs_NBK *= (2.0**8 / unit_NB.clamp(min=2.0 ** (_LEAST_FIELD - 13))).half()[..., None]
    blocks_NBC[..., front:] = halfs_NBK.add_(1536).view(torch.uint8)[..., ::2]
    return blocks_NBC.flatten(1)


def _tiled(stem: str, codes_NK: Tensor, scales: Tensor, *, packed: bool = True) -> tuple[int, int, Tensor]:
    """(N, K, scales as a matrix); `packed`: int8 is two numbers."""
    scales_RC = scales.reshape(1, 1) if scales.numel() == 1 else scales
    fits = codes_NK.ndim == scales_RC.ndim == 2 and codes_NK.numel() > 0 and scales_RC.numel() > 0
    num_rows, cols = codes_NK.shape if fits else (0, 0)
    cols *= 1 + (packed and codes_NK.dtype == torch.int8)
    if not fits or num_rows % scales_RC.shape[0] or cols % scales_RC.shape[1]:
        raise _unfit(stem, codes_NK, scales)
    return num_rows, cols, scales_RC


def _unfit(stem: str, codes: Tensor, scales: Tensor) -> ExpertReadError:
    shown = [f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}" for tensor in (codes, scales)]
    return ExpertReadError(f"{stem}: codes {shown[0]} and scales {shown[1]} do not fit together: is the file whole?")
