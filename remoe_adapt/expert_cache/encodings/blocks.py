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

from remoe_adapt.checkpoints import BLOCKS
from remoe_adapt.errors import UncacheableError

# Values that are dequantised at a time: a matrix of any size takes some multiples of 2 MiB beside the result. A quarter
# of it takes twice as long, for each of torch's operations costs some microseconds.
_CHUNK_VALUES = 1 << 19


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


def _type(name: str, number: int) -> BlockType:
    return BlockType(name, number, *BLOCKS[number])


# Every type that a GGUF may hold, as ggml numbers it (enum ggml_type in ggml.h).
_TABLE = (
    F32 := _type("f32", 0),
    F16 := _type("f16", 1),
    Q4_0 := _type("q4_0", 2),
    Q4_1 := _type("q4_1", 3),
    Q5_0 := _type("q5_0", 6),
    Q5_1 := _type("q5_1", 7),
    Q8_0 := _type("q8_0", 8),
    _type("q8_1", 9),
    Q2_K := _type("q2_K", 10),
    Q3_K := _type("q3_K", 11),
    Q4_K := _type("q4_K", 12),
    Q5_K := _type("q5_K", 13),
    Q6_K := _type("q6_K", 14),
    _type("q8_K", 15),
    _type("iq2_xxs", 16),
    _type("iq2_xs", 17),
    _type("iq3_xxs", 18),
    _type("iq1_s", 19),
    IQ4_NL := _type("iq4_nl", 20),
    _type("iq3_s", 21),
    _type("iq2_s", 22),
    IQ4_XS := _type("iq4_xs", 23),
    _type("i8", 24),
    _type("i16", 25),
    _type("i32", 26),
    _type("i64", 27),
    _type("f64", 28),
    _type("iq1_m", 29),
    BF16 := _type("bf16", 30),
    _type("tq1_0", 34),
    _type("tq2_0", 35),
    MXFP4 := _type("mxfp4", 39),
    _type("nvfp4", 40),
    _type("q1_0", 41),
)
# Types of 4-bit codes with a scale and a minimum for 32 columns each, see `code_groups`.
GROUPED = frozenset({Q4_0, Q4_1, Q4_K})
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


def code_groups(blocks_NB: Tensor, kind: BlockType, cols: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8 [N, cols] of four bits, and scales and minima fp32 [N, G] of groups of 32 columns, the last of which
    need not be full: a value is code * scale + minimum.

    blocks_NB: uint8 [N, kind.row_bytes(cols)].
    kind: one of `GROUPED`.

    Raises UncacheableError for another type, and for tensors that are no such rows.
    """
    if kind not in GROUPED:
        raise UncacheableError(f"{kind.name} blocks hold no 4-bit codes with scale and minimum: dequantise them.")
    check_blocks(blocks_NB, kind, cols)
    blocks_MB = blocks_NB.reshape(-1, kind.bytes).clone()
    if kind == Q4_K:
        scales, minima = _scales_minima(blocks_MB)
        minima.neg_()
    else:
        halfs = _halfs(blocks_MB[:, : 2 if kind == Q4_0 else 4])
        scales, minima = halfs[:, :1], halfs[:, 1:] if kind == Q4_1 else -8 * halfs
    codes = _bits(blocks_MB[:, kind.bytes - kind.values // 2 :], min(32, kind.values // 2), 4)
    num_rows, num_groups = len(blocks_NB), -(-cols // 32)
    codes_NK = codes.view(num_rows, kind.padded(cols))[:, :cols]
    scales_NG, minima_NG = (
        part.reshape(num_rows, kind.padded(cols) // 32)[:, :num_groups] for part in (scales, minima)
    )
    return codes_NK, scales_NG, minima_NG


def byte_groups(blocks_NB: Tensor, kind: BlockType, cols: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes int8 [N, cols], and scales fp32 [N, G] of groups of 16 or 32 columns, the last of which need not be full;
    minima likewise, or None where there are none: a value is code * scale + minimum.

    blocks_NB: uint8 [N, kind.row_bytes(cols)].
    kind: one of `BYTE_CODED`.

    Raises UncacheableError for another type, and for tensors that are no such rows.
    """
    if (decode := _BYTES.get(kind)) is None:
        raise UncacheableError(f"{kind.name} blocks hold no codes of up to eight bits in groups: dequantise them.")
    check_blocks(blocks_NB, kind, cols)
    codes, scales, minima = decode(blocks_NB.reshape(-1, kind.bytes).clone())
    num_rows, group = len(blocks_NB), kind.values // scales[0].numel()
    codes_NK = codes.view(num_rows, -1)[:, :cols].to(torch.int8)
    scales_NG, minima_NG = (
        None if part is None else part.reshape(num_rows, -1)[:, : -(-cols // group)] for part in (scales, minima)
    )
    assert scales_NG is not None
    return codes_NK, scales_NG, minima_NG


def check_blocks(blocks_NB: Tensor, kind: BlockType, cols: int) -> None:
    """Raises UncacheableError unless the tensor holds rows of `cols` values as blocks of this type."""
    if blocks_NB.dtype != torch.uint8 or blocks_NB.ndim != 2 or cols < 1 or blocks_NB.shape[1] != kind.row_bytes(cols):
        raise UncacheableError(
            f"A {blocks_NB.dtype} tensor of shape {list(blocks_NB.shape)} does not hold rows of {cols} values as "
            f"{kind.name} blocks: those are torch.uint8 [rows, {kind.row_bytes(cols)}]. Is the checkpoint damaged?"
        )


# Codes [M, values], scales and minima of the groups of a block.
_Codes = tuple[Tensor, Tensor, Tensor | None]

# The decoders: blocks uint8 [M, bytes] -> fp32 [M, values]. Each keeps the order of gguf-py's roundings; products that
# are exact in fp32, as code times small integer, may come in any. Codes are taken apart eight bytes at a time: torch's
# loops over rows of 16 bytes take several times as long.


def _words(bytes_MB: Tensor, span: int) -> Tensor:
    """int64 [M, B / span, span / 8]: eight bytes each."""
    own = bytes_MB.reshape(-1)
    own = own.clone() if own.storage_offset() % 8 else own
    return own.view(torch.int64).view(len(bytes_MB), -1, span // 8)


def _bits(bytes_MB: Tensor, span: int, width: int) -> Tensor:
    """uint8 [M, 8 / width * B]: of each `span` bytes, a multiple of 8, the lowest `width` bits, then the next ones."""
    words_MGW = _words(bytes_MB, span)
    mask = ((1 << width) - 1) * 0x0101010101010101
    parts = [(words_MGW >> shift if shift else words_MGW) & mask for shift in range(0, 8, width)]
    return torch.stack(parts, dim=2).flatten(1).view(torch.uint8)


def _halfs(bytes_MB: Tensor) -> Tensor:
    """fp16 numbers of two bytes each, as fp32 [M, B / 2]."""
    return bytes_MB.contiguous().view(torch.float16).float()


def _f32(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.float32)


def _bf16(blocks: Tensor) -> Tensor:
    return blocks.contiguous().view(torch.bfloat16).float()


def _q4_0(blocks: Tensor) -> Tensor:
    return _bits(blocks[:, 2:], 16, 4).float().sub_(8).mul_(_halfs(blocks[:, :2]))


def _q4_1(blocks: Tensor) -> Tensor:
    scale_minimum = _halfs(blocks[:, :4])
    return _bits(blocks[:, 4:], 16, 4).float().mul_(scale_minimum[:, :1]).add_(scale_minimum[:, 1:])


def _fives(high_M4: Tensor, low_M16: Tensor) -> Tensor:
    """Codes of five bits: the fifth bit of value i is bit i of four bytes."""
    # Byte i of word b is bit i of b.
    numbers = torch.arange(256, device=high_M4.device)
    spread = torch.stack([((numbers >> i) & 1) << (8 * i) for i in range(8)]).sum(0)
    fifth_M32 = spread.index_select(0, high_M4.reshape(-1).int()).view(torch.uint8).view(len(high_M4), 32)
    return (_bits(low_M16, 16, 4) | (fifth_M32 << 4)).float()


def _q5_0(blocks: Tensor) -> Tensor:
    codes, scales, _ = _q5_0_codes(blocks)
    return codes.mul_(scales)


def _q5_0_codes(blocks: Tensor) -> _Codes:
    return _fives(blocks[:, 2:6], blocks[:, 6:]).sub_(16), _halfs(blocks[:, :2]), None


def _q5_1(blocks: Tensor) -> Tensor:
    codes, scales, minima = _q5_1_codes(blocks)
    return codes.mul_(scales).add_(minima)


def _q5_1_codes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale_minimum = _halfs(blocks[:, :4])
    return _fives(blocks[:, 4:8], blocks[:, 8:]), scale_minimum[:, :1], scale_minimum[:, 1:]


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).float().mul_(_halfs(blocks[:, :2]))


def _q8_0_codes(blocks: Tensor) -> _Codes:
    return blocks[:, 2:].contiguous().view(torch.int8), _halfs(blocks[:, :2]), None


def _q2_k(blocks: Tensor) -> Tensor:
    codes, scales, minima = _q2_k_codes(blocks)
    return codes.float().view(-1, 16, 16).mul_(scales.unsqueeze(2)).add_(minima.unsqueeze(2)).flatten(1)


def _q2_k_codes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales_MG, scale_minimum = blocks[:, :16], _halfs(blocks[:, 80:])
    scales, minima = (scales_MG & 15) * scale_minimum[:, :1], (scales_MG >> 4) * scale_minimum[:, 1:]
    return _bits(blocks[:, 16:80], 32, 2), scales, minima.neg_()


def _q3_k(blocks: Tensor) -> Tensor:
    codes, scales, _ = _q3_k_codes(blocks)
    return codes.view(-1, 16, 16).mul_(scales.unsqueeze(2)).flatten(1)


def _q3_k_codes(blocks: Tensor) -> _Codes:
    high = torch.cat([(blocks[:, 104:108] >> shift) & 3 for shift in range(0, 8, 2)], dim=1)
    scales = (_bits(blocks[:, 96:104], 8, 4) | (high << 4)).float().sub_(32).mul_(_halfs(blocks[:, 108:]))
    # Four are subtracted where the mask's bit is zero.
    return (_bits(blocks[:, 32:96], 32, 2) | (_bits(blocks[:, :32], 32, 1) << 2)).float().sub_(4), scales, None


def _scales_minima(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima fp32 [M, 8, 1] of q4_K and q5_K, which pack both in six bits each."""
    scale_minimum = _halfs(blocks[:, :4])
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 2) & 48)], dim=1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 2) & 48)], dim=1)
    return (scales * scale_minimum[:, :1]).unsqueeze(2), (minima * scale_minimum[:, 1:]).unsqueeze(2)


def _q4_k(blocks: Tensor) -> Tensor:
    scales, minima = _scales_minima(blocks)
    return _bits(blocks[:, 16:], 32, 4).float().view(-1, 8, 32).mul_(scales).sub_(minima).flatten(1)


def _q5_k(blocks: Tensor) -> Tensor:
    codes, scales, minima = _q5_k_codes(blocks)
    return codes.float().view(-1, 8, 32).mul_(scales).add_(minima).flatten(1)


def _q5_k_codes(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scales, minima = _scales_minima(blocks)
    return _bits(blocks[:, 48:], 32, 4) | (_bits(blocks[:, 16:48], 32, 1) << 4), scales, minima.neg_()


def _q6_k(blocks: Tensor) -> Tensor:
    codes, scales, _ = _q6_k_codes(blocks)
    return codes.view(-1, 16, 16).mul_(scales.unsqueeze(2)).flatten(1)


def _q6_k_codes(blocks: Tensor) -> _Codes:
    scales = blocks[:, 192:208].view(torch.int8).float().mul_(_halfs(blocks[:, 208:]))
    codes = _bits(blocks[:, :128], 64, 4) | (_bits(blocks[:, 128:192], 32, 2) << 4)
    return codes.float().sub_(32), scales, None


def _mxfp4(blocks: Tensor) -> Tensor:
    # An exponent e is the scale 2^(e - 127), halved here for codes that are doubled; the two smallest are subnormal.
    exponents = blocks[:, :1].int()
    halved = torch.where(exponents < 2, 0x00200000 << exponents.clamp(max=1), (exponents - 1) << 23)
    # Sign, two bits of exponent and one of mantissa are also those of an fp16 that is 2^14 times smaller.
    codes = _bits(blocks[:, 1:], 16, 4).to(torch.int16)
    numbers = ((codes & 7) << 9 | (codes & 8) << 12).view(torch.float16).float()
    # Code 8 is +0 there, and minus zero is not.
    return numbers.mul_(2.0**15).add_(0.0).mul_(halved.view(torch.float32))


# Not linear: the code is a place in a table (kvalues_iq4nl of ggml-common.h).
_IQ4_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def _looked_up(bytes_MB: Tensor) -> Tensor:
    """Values fp32 [M, 2 B] of that table, in the order of `_bits(..., 16, 4)`."""
    values_16 = torch.tensor(_IQ4_VALUES, dtype=torch.int8, device=bytes_MB.device)
    # Two codes at a time, of two bytes beside each other.
    pairs = torch.stack([values_16.repeat(16), values_16.repeat_interleave(16)], dim=1).view(torch.int16).view(-1)
    codes = _words(bytes_MB, 16).flatten(1)
    first = codes & 0x000F000F000F000F | (codes & 0x0F000F000F000F00) >> 4
    second = (codes & 0x00F000F000F000F0) >> 4 | (codes >> 8 & 0x00F000F000F000F0)
    places = torch.stack([first.unflatten(1, (-1, 2)), second.unflatten(1, (-1, 2))], dim=2)
    found = pairs.index_select(0, places.view(torch.int16).view(-1).int())
    return found.view(torch.int8).view(len(bytes_MB), -1).float()


def _iq4_nl(blocks: Tensor) -> Tensor:
    codes, scales, _ = _iq4_nl_codes(blocks)
    return codes.mul_(scales)


def _iq4_nl_codes(blocks: Tensor) -> _Codes:
    return _looked_up(blocks[:, 2:]), _halfs(blocks[:, :2]), None


def _iq4_xs(blocks: Tensor) -> Tensor:
    codes, scales, _ = _iq4_xs_codes(blocks)
    return codes.view(-1, 8, 32).mul_(scales.unsqueeze(2)).flatten(1)


def _iq4_xs_codes(blocks: Tensor) -> _Codes:
    low = torch.stack([blocks[:, 4:8] & 15, blocks[:, 4:8] >> 4], dim=2).flatten(1)
    high = torch.stack([(blocks[:, 2:4] >> shift) & 3 for shift in range(0, 8, 2)], dim=2).flatten(1)
    scales = (low | (high << 4)).float().sub_(32).mul_(_halfs(blocks[:, :2]))
    return _looked_up(blocks[:, 8:]), scales, None


_DECODERS: dict[BlockType, Callable[[Tensor], Tensor]] = {
    F32: _f32, F16: _halfs, BF16: _bf16, Q4_0: _q4_0, Q4_1: _q4_1, Q5_0: _q5_0, Q5_1: _q5_1, Q8_0: _q8_0,
    Q2_K: _q2_k, Q3_K: _q3_k, Q4_K: _q4_k, Q5_K: _q5_k, Q6_K: _q6_k, MXFP4: _mxfp4, IQ4_NL: _iq4_nl, IQ4_XS: _iq4_xs,
}  # fmt: skip
DECODED = frozenset(_DECODERS)
_BYTES: dict[BlockType, Callable[[Tensor], _Codes]] = {
    Q5_0: _q5_0_codes, Q5_1: _q5_1_codes, Q8_0: _q8_0_codes, Q2_K: _q2_k_codes, Q3_K: _q3_k_codes, Q5_K: _q5_k_codes,
    Q6_K: _q6_k_codes, IQ4_NL: _iq4_nl_codes, IQ4_XS: _iq4_xs_codes,
}  # fmt: skip
BYTE_CODED = frozenset(_BYTES)


def _decoded_names() -> str:
    return ", ".join(kind.name for kind in _DECODERS)
