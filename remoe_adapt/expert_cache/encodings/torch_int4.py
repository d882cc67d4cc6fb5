"""Products with 4-bit codes in groups by torch's own CPU kernels: what is left where ggml's cannot be used.

The operators are private, `_convert_weight_to_int4pack_for_cpu` and `_weight_int4pack_mm_for_cpu`, so they are tested
before they are used. They compute in bf16: inputs, scales, minima and results are rounded to it (for other types torch
has no quick kernels). How codes are packed depends on the processor, so packed codes are for the memory of this
process, never for a file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from remoe_adapt._support import printable, say_once
from remoe_adapt.errors import ConfigError

# What the kernel takes: groups of these sizes, and rows in sixteens.
GROUPS = (32, 64, 128, 256)
_ROWS = 16
# The code that stands for a group's zero in the kernel: a value is (code - 8) * scale + zero.
_MIDDLE = 8
_TOLERANCE = 0.02
# Where torch has kernels with vector instructions; elsewhere its products take twenty times as long as those of floats.
_CAPABILITIES = ("AVX2", "AVX512")
# Codes are packed by so many rows at a time, or by fewer: those blocks lie one after another.
_ROWS_OF_A_BLOCK = 64


@dataclass(frozen=True, slots=True)
class TorchInt4:
    """Stands for these kernels where ggml's would compute.

    is_demanded: there shall be an error for codes that they do not know, not exact arithmetic.
    """

    is_demanded: bool

    @classmethod
    def found(cls, is_demanded: bool) -> TorchInt4 | None:
        """None where the kernels cannot be used, which is said once."""
        return cls(is_demanded) if is_usable() else None


def packed_shapes(rows: int, cols: int, group: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Shapes of what `pack` gives for a matrix: uint8 codes, bf16 scales.

    group: how many columns share a scale.

    Raises ConfigError for a group that the kernel does not know.
    """
    if group not in GROUPS:
        raise ConfigError(f"Groups of {group} columns have no product by torch: it knows groups of {GROUPS}.")
    num_groups, padded_rows = -(-cols // group), -(-rows // _ROWS) * _ROWS
    return (padded_rows, num_groups * group // 2), (num_groups, padded_rows, 2)


def pack(codes_NK: Tensor, scales_NG: Tensor, minima_NG: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes uint8 and scales bf16, of the `packed_shapes`, of a matrix code * scale + minimum.

    codes_NK: uint8 [N, K] from 0 to 15.
    scales_NG: floats [N, G] for groups of columns, of which the last need not be full.
    minima_NG: floats [N, G].
    group: how many columns share a scale.

    Raises ConfigError for tensors that do not fit one another, and where `is_usable()` is false.
    """
    rows, cols = codes_NK.shape
    _, scales_shape = packed_shapes(rows, cols, group)
    expected = (rows, scales_shape[0])
    if codes_NK.dtype != torch.uint8 or scales_NG.shape != expected or minima_NG.shape != expected:
        raise ConfigError(
            f"Codes {codes_NK.dtype} {list(codes_NK.shape)}, scales {list(scales_NG.shape)} and minima "
            f"{list(minima_NG.shape)} do not fit groups of {group}: scales and minima are {list(expected)}."
        )
    if codes_NK.numel() and int(codes_NK.max()) > 15:
        raise ConfigError(f"A code is {int(codes_NK.max())}: codes of four bits are 0 to 15.")
    _check_usable()
    return _packed(codes_NK, scales_NG, minima_NG, group)


def _packed(codes_NK: Tensor, scales_NG: Tensor, minima_NG: Tensor, group: int) -> tuple[Tensor, Tensor]:
    rows, cols = codes_NK.shape
    (padded_rows, row_bytes), scales_shape = packed_shapes(rows, cols, group)
    codes_NK = torch.nn.functional.pad(codes_NK, (0, 2 * row_bytes - cols, 0, padded_rows - rows))
    packed_NB = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_NK.int(), 1)
    scales_GN2 = torch.zeros(scales_shape, dtype=torch.bfloat16)
    scales_GN2[:, :rows, 0] = scales_NG.T
    # In fp32: where the two cancel, as in symmetric codes, the sum is zero and stays so.
    scales_GN2[:, :rows, 1] = (minima_NG.float() + _MIDDLE * scales_NG.float()).T
    return packed_NB, scales_GN2


def matmul(x_TK: Tensor, packed_NB: Tensor, scales_GN2: Tensor, rows: int) -> Tensor:
    """fp32 [T, N]: x times the transposed matrix, without a gradient.

    x_TK: floats [T, K].
    packed_NB, scales_GN2: what `pack` gave for the matrix.
    rows: N.

    Raises ConfigError for tensors that do not fit one another, and where `is_usable()` is false.
    """
    padded_cols, num_groups = 2 * packed_NB.shape[1], len(scales_GN2)
    group = padded_cols // max(1, num_groups)
    # Whole groups were made of as many columns as needed them.
    if not padded_cols - group < x_TK.shape[-1] <= padded_cols or x_TK.ndim != 2 or not x_TK.is_floating_point():
        raise ConfigError(
            f"Inputs {x_TK.dtype} {list(x_TK.shape)} do not fit a matrix of {num_groups} groups of {group} columns."
        )
    if not 0 < rows <= len(packed_NB) or packed_shapes(rows, padded_cols, group) != (packed_NB.shape, scales_GN2.shape):
        raise ConfigError(
            f"Codes {list(packed_NB.shape)} and scales {list(scales_GN2.shape)} do not fit a matrix of {rows} rows."
        )
    _check_usable()
    return _product(x_TK, packed_NB, scales_GN2, rows) if len(x_TK) else torch.empty(0, rows)


def _product(x_TK: Tensor, packed_NB: Tensor, scales_GN2: Tensor, rows: int) -> Tensor:
    padded_cols = 2 * packed_NB.shape[1]
    x_TK = torch.nn.functional.pad(x_TK.detach().bfloat16(), (0, padded_cols - x_TK.shape[1])).contiguous()
    group = padded_cols // len(scales_GN2)
    result_TN: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x_TK, packed_NB, group, scales_GN2)
    return result_TN[:, :rows].float()


def dequantise(packed_NB: Tensor, scales_GN2: Tensor, rows: int, cols: int) -> Tensor:
    """fp32 [N, K]: the matrix that `matmul` multiplies with.

    packed_NB, scales_GN2: what `pack` gave for it.
    rows, cols: N and K.

    Raises ConfigError where `is_usable()` is false.
    """
    _check_usable()
    return _unpacked(packed_NB, scales_GN2)[:rows, :cols]


def _unpacked(packed_NB: Tensor, scales_GN2: Tensor) -> Tensor:
    padded_rows, padded_cols = len(packed_NB), 2 * packed_NB.shape[1]
    codes_NK = torch.empty(padded_rows, padded_cols, dtype=torch.uint8)
    for packed_MB, codes_MK in zip(packed_NB.split(_ROWS_OF_A_BLOCK), codes_NK.split(_ROWS_OF_A_BLOCK), strict=True):
        nibbles = _nibbles(packed_MB)
        torch.index_select(nibbles, 0, _places(*codes_MK.shape), out=codes_MK.view(-1))
    scales_NG2 = scales_GN2.float().transpose(0, 1).unsqueeze(-2)
    groups_NGV = codes_NK.view(padded_rows, len(scales_GN2), -1).float().sub_(_MIDDLE)
    return groups_NGV.mul_(scales_NG2[..., 0]).add_(scales_NG2[..., 1]).view(padded_rows, padded_cols)


def _nibbles(packed_NB: Tensor) -> Tensor:
    packed = packed_NB.reshape(-1)
    return torch.stack([packed & 15, packed >> 4], dim=1).view(-1)


@lru_cache(maxsize=16)
def _places(rows: int, cols: int) -> Tensor:
    """int64 [rows * cols]: where each code of a block of rows is among the packed nibbles.

    Found by packing the places themselves, four bits of their numbers at a time.
    """
    with torch.inference_mode(False):
        numbers = torch.arange(rows * cols)
        packed = torch.zeros_like(numbers)
        for shift in range(0, (rows * cols - 1).bit_length(), 4):
            digits_NK = (numbers >> shift & 15).int().view(rows, cols)
            packed |= _nibbles(torch.ops.aten._convert_weight_to_int4pack_for_cpu(digits_NK, 1)).long() << shift
        return torch.empty_like(numbers).index_copy_(0, packed, numbers)


def _passes() -> bool:
    """Whether products of random codes are those of fp32 arithmetic but for bf16's rounding, and codes come back."""
    random = torch.Generator().manual_seed(0)
    for rows, cols, group in ((20, 80, 32), (48, 256, 128), (150, 64, 32)):
        num_groups = -(-cols // group)
        codes_NK = torch.randint(0, 16, (rows, cols), generator=random, dtype=torch.uint8)
        scales_NG, minima_NG = torch.randn(2, rows, num_groups, generator=random).unbind(0)
        spread = [part.repeat_interleave(group, dim=1)[:, :cols] for part in (scales_NG, minima_NG)]
        x_TK = torch.randn(3, cols, generator=random)
        weight_NK = codes_NK * spread[0] + spread[1]
        expected_TN, packed = x_TK @ weight_NK.T, _packed(codes_NK, scales_NG, minima_NG, group)
        found_TN, found_NK = _product(x_TK, *packed, rows), _unpacked(*packed)[:rows, :cols]
        pairs = (found_TN, expected_TN), (found_NK, weight_NK)
        if not all((found - expected).norm() <= _TOLERANCE * expected.norm() for found, expected in pairs):
            say_once("torch's 4-bit kernels are not used, for they compute something else: experts are dequantised.")
            return False
    return True


@cache
def is_usable() -> bool:
    """Whether torch has these operators, they are quick here and compute what they shall; if not, that is said once."""
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in _CAPABILITIES:
        say_once(
            f"torch's 4-bit kernels are not used (they are slow on this processor, {capability}): experts are "
            "dequantised on every use."
        )
        return False
    try:
        return _passes()
    except Exception as error:
        say_once(f"torch's 4-bit kernels are not used ({printable(error)}): experts are dequantised on every use.")
        return False


def _check_usable() -> None:
    if not is_usable():
        raise ConfigError("torch's 4-bit kernels cannot be used here: dequantise instead.")
