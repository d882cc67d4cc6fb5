"""ggml's block types as numbers: how many values lie in how many bytes, and what they are worth.

Nothing here needs ggml or the gguf package. `dequantise` gives the numbers that gguf-py's `dequantize` gives, bit for
bit, on any device; the layouts are those of `block_*` in
https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h, the formulas those of `dequantize_row_*` in
ggml-quants.c beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from remoe_adapt.errors import UncacheableError

# Values that are dequantised at a time: temporaries stay in the processor's caches, and a matrix of any size takes no
# more memory than this beside the result.
_CHUNK_VALUES = 1 << 17


@dataclass(frozen=True, slots=True)
class BlockType:
    """A type of ggml's tensors.

    name: as ggml writes it, "q4_0".
    number: as GGUF files write it.
    values: how many consecutive values of a row are one block.
    bytes: of a block.
    """

    name: str
    number: int
    values: int
    bytes: int

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of `cols` values, whose last block is whole."""
        return -(-cols // self.values) * self.bytes

    def padded(self, cols: int) -> int:
        """How many values the blocks of a row of `cols` values hold."""
        return -(-cols // self.values) * self.values


# Every type that a GGUF may hold, as ggml numbers it (enum ggml_type in ggml.h).
_TABLE = (
    F32 := BlockType("f32", 0, 1, 4),
    F16 := BlockType("f16", 1, 1, 2),
    Q4_0 := BlockType("q4_0", 2, 32, 18),
    Q4_1 := BlockType("q4_1", 3, 32, 20),
    Q5_0 := BlockType("q5_0", 6, 32, 22),
    Q5_1 := BlockType("q5_1", 7, 32, 24),
    Q8_0 := BlockType("q8_0", 8, 32, 34),
    BlockType("q8_1", 9, 32, 40),
    Q2_K := BlockType("q2_K", 10, 256, 84),
    Q3_K := BlockType("q3_K", 11, 256, 110),
    Q4_K := BlockType("q4_K", 12, 256, 144),
    Q5_K := BlockType("q5_K", 13, 256, 176),
    Q6_K := BlockType("q6_K", 14, 256, 210),
    BlockType("q8_K", 15, 256, 292),
    BlockType("iq2_xxs", 16, 256, 66),
    BlockType("iq2_xs", 17, 256, 74),
    BlockType("iq3_xxs", 18, 256, 98),
    BlockType("iq1_s", 19, 256, 50),
    IQ4_NL := BlockType("iq4_nl", 20, 32, 18),
    BlockType("iq3_s", 21, 256, 110),
    BlockType("iq2_s", 22, 256, 82),
    IQ4_XS := BlockType("iq4_xs", 23, 256, 136),
    BlockType("i8", 24, 1, 1),
    BlockType("i16", 25, 1, 2),
    BlockType("i32", 26, 1, 4),
    BlockType("i64", 27, 1, 8),
    BlockType("f64", 28, 1, 8),
    BlockType("iq1_m", 29, 256, 56),
    BF16 := BlockType("bf16", 30, 1, 2),
    BlockType("tq1_0", 34, 256, 54),
    BlockType("tq2_0", 35, 256, 66),
    MXFP4 := BlockType("mxfp4", 39, 32, 17),
    BlockType("nvfp4", 40, 64, 36),
    BlockType("q1_0", 41, 128, 18),
)
_BY_KEY: dict[str | int, BlockType] = {key: kind for kind in _TABLE for key in (kind.number, kind.name.lower())}


def block_type(name_or_number: str | int) -> BlockType:
    """The type of this name, in capitals or not, or of this number.

    Raises UncacheableError when ggml has none that is known here.
    """
    key = name_or_number.lower() if isinstance(name_or_number, str) else name_or_number
    if (kind := _BY_KEY.get(key)) is None:
        raise UncacheableError(
            f"ggml type {name_or_number!r} is not known here: use a newer remoe-adapt, or weights in another type "
            f"({_decoded_names()})."
        )
    return kind


def dequantise(blocks_NB: Tensor, kind: BlockType, cols: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers [N, cols] of rows of blocks, bit-equal to gguf-py's `dequantize`, then rounded to `dtype`.

    blocks_NB: uint8 [N, kind.row_bytes(cols)], on any device; what the last block of a row holds beyond `cols` is
        dropped.
    kind: their type, one of `DECODED`.
    cols: values of a row.
    dtype: of the result.

    Raises UncacheableError for a type that is not in `DECODED`, and for tensors that are no such rows. A scale that is
    not a number makes its block so: who reads files of others checks the result.
    """
    if (decode := _DECODERS.get(kind)) is None:
        raise UncacheableError(
            f"ggml type {kind.name} cannot be dequantised here: give weights in one of {_decoded_names()}."
        )
    check_blocks(blocks_NB, kind, cols)
    num_rows, num_blocks = len(blocks_NB), blocks_NB.shape[1] // kind.bytes
    numbers_NK = torch.empty(num_rows, cols, dtype=dtype, device=blocks_NB.device)
    step = max(1, _CHUNK_VALUES // max(1, num_blocks * kind.values))
    for start in range(0, num_rows, step):
        chunk_MB = blocks_NB[start : start + step].reshape(-1, kind.bytes)
        # Views of two and four bytes must begin at such a multiple of their storage; blocks of a file lie anywhere.
        chunk_MB = chunk_MB.clone() if chunk_MB.storage_offset() % 4 else chunk_MB
        values_MV = decode(chunk_MB)
        numbers_NK[start : start + step] = values_MV.view(-1, num_blocks * kind.values)[:, :cols]
    return numbers_NK


def check_blocks(blocks_NB: Tensor, kind: BlockType, cols: int) -> None:
    """Raises UncacheableError unless the tensor holds rows of `cols` values as blocks of this type."""
    if blocks_NB.dtype != torch.uint8 or blocks_NB.ndim != 2 or cols < 1 or blocks_NB.shape[1] != kind.row_bytes(cols):
        raise UncacheableError(
            f"A {blocks_NB.dtype} tensor of shape {list(blocks_NB.shape)} does not hold rows of {cols} values as "
            f"{kind.name} blocks: those are torch.uint8 [rows, {kind.row_bytes(cols)}]. Is the checkpoint damaged?"
        )


# The decoders: blocks uint8 [M, bytes] -> fp32 [M, values]. Each keeps the order of gguf-py's roundings; products that
# are exact in fp32, as code times small integer, may come in any.


def _halfs(bytes_M2: Tensor) -> Tensor:
    """fp16 numbers of two bytes each, as fp32 [M, n / 2]."""
    return bytes_M2.contiguous().view(torch.float16).float()


def _nibbles(bytes_MB: Tensor, span: int) -> Tensor:
    """fp32 [M, B / span, 2, span]: of each `span` bytes the low halves, then the high halves."""
    spans_MGS = bytes_MB.unflatten(1, (-1, span))
    codes = torch.empty(*spans_MGS.shape[:2], 2, span, dtype=torch.float32, device=bytes_MB.device)
    codes[:, :, 0] = spans_MGS & 15
    codes[:, :, 1] = spans_MGS >> 4
    return codes


def _bits(bytes_MB: Tensor, span: int, width: int) -> Tensor:
    """uint8 [M, B / span, 8 / width, span]: of each `span` bytes their lowest `width` bits, then the next ones."""
    spans_MGS = bytes_MB.unflatten(1, (-1, span))
    mask = (1 << width) - 1
    return torch.stack([(spans_MGS >> shift) & mask for shift in range(0, 8, width)], dim=2)


def _f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _nibbles(blocks[:, 2:], 16).flatten(1).sub_(8).mul_(_halfs(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    scale_minimum = _halfs(blocks[:, :4])
    return _nibbles(blocks[:, 4:], 16).flatten(1).mul_(scale_minimum[:, :1]).add_(scale_minimum[:, 1:])


def _fives(high_M4: Tensor, low_M16: Tensor) -> Tensor:
    """Codes of five bits: the fifth bit of value i is bit i of four bytes."""
    shifts_8 = torch.arange(8, dtype=torch.uint8, device=high_M4.device)
    fifth_M32 = ((high_M4.unsqueeze(2) >> shifts_8) & 1).flatten(1)
    return _nibbles(low_M16, 16).flatten(1).add_(fifth_M32, alpha=16)


def _q5_0(blocks: Tensor) -> Tensor:
    return _fives(blocks[:, 2:6], blocks[:, 6:]).sub_(16).mul_(_halfs(blocks[:, :2]))


def _q5_1(blocks: Tensor) -> Tensor:
    scale_minimum = _halfs(blocks[:, :4])
    return _fives(blocks[:, 4:8], blocks[:, 8:]).mul_(scale_minimum[:, :1]).add_(scale_minimum[:, 1:])


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halfs(blocks[:, :2]))


def _q2_k(blocks: Tensor) -> Tensor:
    scales_MG, scale_minimum = blocks[:, :16], _halfs(blocks[:, 80:])
    dl = (scales_MG & 15) * scale_minimum[:, :1]
    ml = (scales_MG >> 4) * scale_minimum[:, 1:]
    codes = _bits(blocks[:, 16:80], 32, 2).reshape(-1, 16, 16).float()
    return codes.mul_(dl.unsqueeze(2)).sub_(ml.unsqueeze(2)).flatten(1)


def _q3_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 96:104], 8).flatten(1)
    high = _bits(blocks[:, 104:108], 4, 2).flatten(1)
    dl = low.add_(high, alpha=16).sub_(32).mul_(_halfs(blocks[:, 108:]))
    codes = _bits(blocks[:, 32:96], 32, 2).reshape(-1, 256).float()
    # The mask's bit is one where nothing is subtracted.
    absent = _bits(blocks[:, :32], 32, 1).reshape(-1, 256).bitwise_xor_(1)
    codes.sub_(absent, alpha=4)
    return codes.view(-1, 16, 16).mul_(dl.unsqueeze(2)).flatten(1)


def _scales_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima fp32 [M, 8, 1] of q4_K and q5_K, which pack both in six bits each."""
    scale_minimum = _halfs(blocks[:, :4])
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return (scales * scale_minimum[:, :1]).unsqueeze(2), (minima * scale_minimum[:, 1:]).unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_minima(blocks)
    return _nibbles(blocks[:, 16:], 32).view(-1, 8, 32).mul_(scales).sub_(minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_minima(blocks)
    fifth = _bits(blocks[:, 16:48], 32, 1).reshape(-1, 8, 32)
    codes = _nibbles(blocks[:, 48:], 32).view(-1, 8, 32).add_(fifth, alpha=16)
    return codes.mul_(scales).sub_(minima).flatten(1)


def _q6_k(blocks: Tensor) -> Tensor:
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_halfs(blocks[:, 208:]))
    high = _bits(blocks[:, 128:192], 32, 2).reshape(-1, 256)
    codes = _nibbles(blocks[:, :128], 64).flatten(1).add_(high, alpha=16).sub_(32)
    return codes.view(-1, 16, 16).mul_(scales.unsqueeze(2)).flatten(1)


# Not linear: the code is a place in a table. kvalues_mxfp4, doubled there for the halved scale below, and
# kvalues_iq4nl of ggml-common.h.
_MXFP4_VALUES = (0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0)
_IQ4_VALUES = (
    -127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0,
)  # fmt: skip


def _looked_up(bytes_MB: Tensor, span: int, values: tuple[float, ...]) -> Tensor:
    """Values fp32 [M, 2 B] that the nibbles of `bytes_MB` stand for, in the order of `_nibbles`."""
    table = torch.tensor(values, dtype=torch.float32, device=bytes_MB.device)
    spans_MGS = bytes_MB.unflatten(1, (-1, span))
    places = torch.stack([spans_MGS & 15, spans_MGS >> 4], dim=2).flatten(1)
    return table[places.int()]


def _mxfp4(blocks: Tensor) -> Tensor:
    # An exponent e is the scale 2^(e - 128); the two smallest are subnormal.
    exponents = blocks[:, :1].int()
    bits = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    return _looked_up(blocks[:, 1:], 16, _MXFP4_VALUES).mul_(bits.view(torch.float32))


def _iq4_nl(blocks: Tensor) -> Tensor:
    return _looked_up(blocks[:, 2:], 16, _IQ4_VALUES).mul_(_halfs(blocks[:, :2]))


def _iq4_xs(blocks: Tensor) -> Tensor:
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
    shifts_4 = torch.arange(0, 8, 2, dtype=torch.uint8, device=blocks.device)
    high = ((blocks[:, 2:4].unsqueeze(2) >> shifts_4) & 3).flatten(1)
    scales = (low | (high << 4)).float().sub_(32).mul_(_halfs(blocks[:, :2]))
    values = _looked_up(blocks[:, 8:], 16, _IQ4_VALUES).view(-1, 8, 32)
    return values.mul_(scales.unsqueeze(2)).flatten(1)


_DECODERS: dict[BlockType, Callable[[Tensor], Tensor]] = {
    F32: _f32, F16: _halfs, BF16: _bf16, Q4_0: _q4_0, Q4_1: _q4_1, Q5_0: _q5_0, Q5_1: _q5_1, Q8_0: _q8_0,
    Q2_K: _q2_k, Q3_K: _q3_k, Q4_K: _q4_k, Q5_K: _q5_k, Q6_K: _q6_k, MXFP4: _mxfp4, IQ4_NL: _iq4_nl, IQ4_XS: _iq4_xs,
}  # fmt: skip
DECODED = frozenset(_DECODERS)


def _decoded_names() -> str:
    return ", ".join(kind.name for kind in _DECODERS)
