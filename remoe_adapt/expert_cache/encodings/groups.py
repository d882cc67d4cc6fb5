"""Integer codes in groups along the inputs, and the ggml blocks that hold them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.encodings.blocks import Q4_0, Q4_1, Q8_0, BlockType

# Values of a block of the types made here.
BLOCK = 32
_CHUNK_VALUES = 1 << 16
# The low four bits of each of eight bytes.
_LOW_HALVES = 0x0F0F0F0F0F0F0F0F


@dataclass(frozen=True, slots=True)
class Groups:
    """A matrix [N, K] of integers: value = code * scale + minimum, with G groups of neighbouring columns.

    codes_NK: one code a byte: int8 around zero (symmetric), or uint8.
    scales_NG: fp32.
    minima_NG: fp32; None: 0.
    bits: of a code.
    order_K: int64, the columns of the matrix in the order in which the codes have them; None: as they are. A product
        with x is one of the codes with x[..., order_K].
    """

    codes_NK: Tensor
    scales_NG: Tensor
    minima_NG: Tensor | None
    bits: int
    order_K: Tensor | None = None

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return self.codes_NK.shape[1] // self.scales_NG.shape[1]

    def dequantise(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K], the columns where the matrix has them."""
        values_NK = self._values()
        if self.order_K is not None:
            values_NK = torch.empty_like(values_NK).index_copy_(1, self.order_K, values_NK)
        return values_NK.to(dtype)

    def to_blocks(self, kind: BlockType | None = None) -> tuple[BlockType, Tensor]:
        """The codes as rows of ggml blocks, uint8 [N, kind.row_bytes(K)], the columns in the order of the codes.

        kind: Q4_0, Q4_1 or Q8_0. By default Q4_0 for symmetric codes of at most 4 bits, Q4_1 for others of them, and
            Q8_0 for wider codes and where a block would have columns of two groups.

        Codes stay what they are; scales and minima are rounded to fp16, so that Q4_0 holds the very values of scales
        that are fp16 numbers. Q8_0 quantises anew what is not symmetric of 8 bits.

        Raises ExpertReadError for a type that cannot hold the codes, and for scales beyond fp16.
        """
        kind = kind or self.block_type()
        if kind == Q8_0:
            if self.bits == 8 and self._is_symmetric() and self._is_whole():
                return kind, q8_0_blocks(self.codes_NK, self.scales_NG)
            return kind, q8_0_of(self._values())
        holds = kind == Q4_1 or (kind == Q4_0 and self._is_symmetric())
        if not holds or self.bits > 4 or not self._is_whole():
            raise ExpertReadError(
                f"codes of {self.bits} bits in groups of {self.group_size}{' with minima' * (kind == Q4_0)} do not fit "
                f"{kind.name}: use {self.block_type().name}."
            )
        if kind == Q4_0:
            return kind, _q4_blocks(kind, self.codes_NK.view(torch.uint8) + 8, [self.scales_NG])
        # Codes around zero move up, and their minima down.
        low = 1 << (self.bits - 1) if self.codes_NK.dtype == torch.int8 else 0
        minima_NG = (0 if self.minima_NG is None else self.minima_NG) - low * self.scales_NG
        return kind, _q4_blocks(kind, self.codes_NK.view(torch.uint8) + low, [self.scales_NG, minima_NG])

    def block_type(self) -> BlockType:
        """What `to_blocks` makes by default: told by shapes and types alone, so all experts of a layer agree."""
        if self.bits > 4 or not self._is_whole():
            return Q8_0
        return Q4_0 if self._is_symmetric() else Q4_1

    def _is_symmetric(self) -> bool:
        return self.minima_NG is None and self.codes_NK.dtype == torch.int8

    def _is_whole(self) -> bool:
        """Whether no block has columns of two groups: one group may end with the row."""
        return self.group_size % BLOCK == 0 or self.scales_NG.shape[1] == 1

    def _values(self) -> Tensor:
        """fp32 [N, K], the columns in the order of the codes."""
        num_rows, num_groups = self.scales_NG.shape
        values_NGK = self.codes_NK.view(num_rows, num_groups, -1).float() * self.scales_NG[..., None]
        if self.minima_NG is not None:
            values_NGK += self.minima_NG[..., None]
        return values_NGK.view(num_rows, -1)


def q8_0_of(values_NK: Tensor) -> Tensor:
    """Numbers quantised to Q8_0: uint8 [N, 34 * blocks].

    The scale of a block is its largest number / 127, rounded to fp16 before the codes are chosen, which ggml's own
    quantiser does after.
    """
    # A few rows at a time, whose temporaries stay in the processor's caches.
    rows = max(1, _CHUNK_VALUES // values_NK.shape[1])
    return torch.cat([_q8_0_of_rows(chunk_NK) for chunk_NK in values_NK.split(rows)])


def _q8_0_of_rows(values_NK: Tensor) -> Tensor:
    codes_NBK, scales_NB = q8_0_codes(_padded(values_NK).unflatten(1, (-1, BLOCK)))
    return q8_0_blocks(codes_NBK.to(torch.int8).flatten(1), scales_NB.float())


def q8_0_codes(values_BK: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of blocks of numbers, whole fp32 numbers [..., 32], and the scale of each block, fp16 [...]."""
    scales_B = (torch.maximum(-values_BK.amin(-1), values_BK.amax(-1)) / 127).half()
    steps_B = scales_B.float()
    # A block of zeros has no scale.
    inverse_B = steps_B.reciprocal().masked_fill_(steps_B == 0, 0.0)
    # Rounding may have taken the scale down: the largest code then is 128 or more.
    return (values_BK * inverse_B[..., None]).round_().clamp_(-127, 127), scales_B


def q8_0_blocks(codes_NK: Tensor, scales_NG: Tensor) -> Tensor:
    """int8 codes and the scales of their groups as Q8_0: uint8 [N, 34 * blocks]."""
    codes_NBK = _padded(codes_NK).view(torch.uint8).unflatten(1, (-1, BLOCK))
    blocks_NBC, front = with_numbers(Q8_0, [scales_NG], codes_NBK)
    blocks_NBC[..., front:] = codes_NBK
    return blocks_NBC.flatten(1)


def q4_of_pairs(pairs_NBH: Tensor, scales_NG: Tensor, minima_NG: Tensor | None) -> tuple[BlockType, Tensor]:
    """Codes of 4 bits, two in a byte as files have them, as Q4_0 (zero point 8) or with minima as Q4_1.

    pairs_NBH: uint8 [N, B, 16], the even column in the low half of a byte.
    scales_NG, minima_NG: of groups of whole blocks.
    """
    kind = Q4_0 if minima_NG is None else Q4_1
    blocks_NBC, front = with_numbers(kind, [scales_NG] if minima_NG is None else [scales_NG, minima_NG], pairs_NBH)
    renibble(pairs_NBH, blocks_NBC[..., front:])
    return kind, blocks_NBC.flatten(1)


def renibble(pairs_NBH: Tensor, out_NBH: Tensor) -> None:
    """Order codes as ggml has them: byte j of a block has column j in its low half, column j + 16 in the high.

    pairs_NBH, out_NBH: uint8 [N, B, 16]; a byte of the first has an even column in its low half, the next in the high.
    """
    # Columns 0 to 15 and 16 to 31 of a block, in words of eight bytes: eight times fewer numbers to handle.
    first_NB, second_NB = pairs_NBH.reshape(-1).view(torch.int64).view(*pairs_NBH.shape[:2], 2).unbind(-1)
    even_NB = (first_NB & _LOW_HALVES) | ((second_NB & _LOW_HALVES) << 4)
    odd_NB = ((first_NB >> 4) & _LOW_HALVES) | (second_NB & ~_LOW_HALVES)
    for start, words_NB in enumerate((even_NB, odd_NB)):
        out_NBH[..., start::2] = words_NB.view(-1).view(torch.uint8).view(*words_NB.shape, 8)


def _q4_blocks(kind: BlockType, codes_NK: Tensor, numbers_NG: list[Tensor]) -> Tensor:
    """Codes below 16, one a byte, after the fp16 numbers of their groups."""
    codes_NBK = _padded(codes_NK).unflatten(1, (-1, BLOCK))
    blocks_NBC, front = with_numbers(kind, numbers_NG, codes_NBK)
    # In words of eight bytes, of which a block has two of low halves and two of high ones.
    words_NBW = codes_NBK.view(torch.int64)
    pairs_NBW = words_NBW[..., :2] | (words_NBW[..., 2:] << 4)
    blocks_NBC[..., front:] = pairs_NBW.view(torch.uint8)
    return blocks_NBC.flatten(1)


def with_numbers(kind: BlockType, numbers_NG: list[Tensor], codes: Tensor) -> tuple[Tensor, int]:
    """(blocks [N, B, kind.bytes] that begin with these numbers of their groups in fp16, bytes of the numbers)."""
    num_rows, num_blocks = codes.shape[:2]
    blocks_NBC = torch.empty((num_rows, num_blocks, kind.bytes), dtype=torch.uint8, device=codes.device)
    for place, each_NG in enumerate(numbers_NG):
        halfs_NG = each_NG.half()
        if not halfs_NG.is_meta and not bool(halfs_NG.isfinite().all()):
            raise ExpertReadError(
                f"a scale of {each_NG.abs().max():g} is beyond fp16, in which ggml holds scales: is the file whole?"
            )
        # Two bytes are one number here: every type has an even count of them.
        spots_NGB = blocks_NBC.view(torch.float16)[..., place].unflatten(1, (halfs_NG.shape[1], -1))
        spots_NGB.copy_(halfs_NG[..., None].expand_as(spots_NGB))
    return blocks_NBC, 2 * len(numbers_NG)


def _padded(values_NK: Tensor) -> Tensor:
    """With zeros up to whole blocks."""
    missing = -values_NK.shape[1] % BLOCK
    return F.pad(values_NK, (0, missing)) if missing else values_NK.contiguous()
