"""Integer matrices as GPTQ, AWQ and compressed-tensors store them: codes in words, scales and zero points of groups.

Each function takes the stored tensors of one matrix and gives `Codes`. What the tensors say is checked here, since
files come from anywhere: on the meta device shapes alone.

Sources of the layouts: `TorchQuantLinear.dequantize_weight` in https://github.com/ModelCloud/GPTQModel
(nn_modules/qlinear) for GPTQ and the zero points of its version 1, which are stored less one; `dequantize_gemm` in
https://github.com/casper-hansen/AutoAWQ (awq/utils/packing_utils.py) for AWQ; `pack_to_int32` in
https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized/helpers.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.encodings.blocks import BlockType
from remoe_adapt.expert_cache.encodings.groups import BLOCK, Groups, q4_of_pairs

_WORD_BITS = 32
# Of the eight outputs in a word of AWQ, nibble i holds this one.
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
# The low four bits of each of four bytes.
_LOW_HALVES = 0x0F0F0F0F
# Widths of codes that lie in words without crossing from one into the next.
_WHOLE_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix [N, K] of unsigned integers in groups along K: value = (code - zero) * scale.

    packed_NB: uint8, the codes of a row one after another, the first in the lowest bits.
    cols: K.
    scales_NG: floats, as stored.
    zeros_NG: int16; None: `middle` for all.
    bits: of a code: 2, 4 or 8.
    group_K: int64, the group of each column; None: G groups of neighbours, each as wide as the others.
    """

    packed_NB: Tensor
    cols: int
    scales_NG: Tensor
    zeros_NG: Tensor | None
    bits: int
    group_K: Tensor | None = None

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    @property
    def codes_NK(self) -> Tensor:
        """uint8 [N, K], one code a byte."""
        return unpacked(self.packed_NB, self.bits)[:, : self.cols]

    def dequantise(self, dtype: torch.dtype, through: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: the product in fp32, where it is exact for scales of 16 bits, rounded to `through`, then `dtype`."""
        scales_NG = self.scales_NG.float()
        zeros_NG = self.middle if self.zeros_NG is None else self.zeros_NG.float()
        if self.group_K is None:
            return self._products(self.codes_NK, scales_NG, zeros_NG).to(through).to(dtype)
        if (order_K := self._order()) is not None:
            # By groups, and then back: scales for every single column would be as many numbers as the matrix has.
            values_NK = self._products(_columns(self.codes_NK, order_K), scales_NG, zeros_NG).to(through).to(dtype)
            return _columns(values_NK, order_K.argsort())
        zeros_NK = zeros_NG if isinstance(zeros_NG, int) else zeros_NG[:, self.group_K]
        return ((self.codes_NK.float() - zeros_NK) * scales_NG[:, self.group_K]).to(through).to(dtype)

    def _products(self, codes_NK: Tensor, scales_NG: Tensor, zeros_NG: Tensor | int) -> Tensor:
        """fp32 [N, K] of groups of neighbours."""
        values_NGK = codes_NK.float().view(*scales_NG.shape, -1)
        values_NGK -= zeros_NG if isinstance(zeros_NG, int) else zeros_NG[..., None]
        values_NGK *= scales_NG[..., None]
        return values_NGK.view(len(codes_NK), -1)

    def _order(self) -> Tensor | None:
        """Columns in the order of their groups; None where those are not of one size."""
        assert self.group_K is not None
        num_groups = self.scales_NG.shape[1]
        if self.group_K.is_meta:
            return torch.empty_like(self.group_K)
        counts_G = self.group_K.bincount(minlength=num_groups)
        return self.group_K.argsort(stable=True) if bool((counts_G * num_groups == self.cols).all()) else None

    def groups(self) -> Groups:
        """The same with columns in the order of their groups.

        Raises ExpertReadError for act-order with groups of several sizes.
        """
        codes_NK, order_K = self.codes_NK, None
        if self.group_K is not None:
            if (order_K := self._order()) is None:
                counts = sorted(set(self.group_K.bincount().tolist()))
                raise ExpertReadError(f"g_idx makes groups of {counts} columns: fetch the file again.")
            codes_NK = _columns(codes_NK, order_K)
        scales_NG = self.scales_NG.float()
        if self.zeros_NG is None:
            # In bytes that wrap, as 8 bits need it.
            return Groups((codes_NK - self.middle).view(torch.int8), scales_NG, None, self.bits, order_K)
        return Groups(codes_NK, scales_NG, self._minima(), self.bits, order_K)

    def to_blocks(self) -> tuple[BlockType, Tensor, Tensor | None]:
        """(type, blocks uint8 [N, row_bytes], order of the columns), as `groups().to_blocks()` and faster."""
        num_rows, num_groups = self.scales_NG.shape
        if self.bits == 4 and self.group_K is None and self.cols % (num_groups * BLOCK) == 0:
            minima_NG = None if self.zeros_NG is None else self._minima()
            pairs_NBH = self.packed_NB.view(num_rows, -1, BLOCK // 2)
            return (*q4_of_pairs(pairs_NBH, self.scales_NG.float(), minima_NG), None)
        groups = self.groups()
        return (*groups.to_blocks(), groups.order_K)

    def _minima(self) -> Tensor:
        assert self.zeros_NG is not None
        return -self.zeros_NG.float() * self.scales_NG.float()


def gptq(name: str, parts: Mapping[str, Tensor], *, zero_offset: int, is_symmetric: bool = False) -> Codes:
    """A matrix of GPTQ.

    name: of the matrix, for errors.
    parts: qweight int32 [K * bits / 32, N], qzeros int32 [G, N * bits / 32], scales [G, N], perhaps g_idx int32 [K].
    zero_offset: what the stored zero points lack: 1 in version 1 of the format ("gptq"), 0 in version 2.
    is_symmetric: every zero point is the middle of the codes (sym).

    Raises ExpertReadError for tensors that do not fit together or hold what cannot be.
    """
    words, zero_words, scales_GN = _named(name, parts, "qweight", "qzeros", "scales")
    num_groups, num_rows = _two(name, "scales", scales_GN)
    bits = _bits(name, zero_words, (num_groups, num_rows))
    cols = _two(name, "qweight", words)[0] * _WORD_BITS // bits
    if words.shape[1] != num_rows or not cols:
        raise _unfit(name, parts)
    group_K = _group_of(name, parts, parts.get("g_idx"), cols, num_groups)
    if group_K is None and cols % num_groups:
        raise _unfit(name, parts)
    scales_NG = _finite(name, "scales", scales_GN).T.contiguous()
    zeros_NG = (unpacked(_bytes(zero_words), bits).T.to(torch.int16) + zero_offset).contiguous()
    # Whole words change places, not codes: eight times fewer.
    codes = Codes(_bytes(_turned(words)), cols, scales_NG, zeros_NG, bits, group_K)
    return _checked(name, codes, is_symmetric, "sym")


def awq(name: str, parts: Mapping[str, Tensor], *, is_symmetric: bool = False) -> Codes:
    """A matrix of AWQ ("gemm"), of 4 bits.

    name: of the matrix, for errors.
    parts: qweight int32 [K, N / 8], qzeros int32 [G, N / 8], scales [G, N].
    is_symmetric: every zero point is the middle of the codes (no zero_point).

    Raises ExpertReadError as `gptq`.
    """
    words, zero_words, scales_GN = _named(name, parts, "qweight", "qzeros", "scales")
    num_groups, num_rows = _two(name, "scales", scales_GN)
    cols = _two(name, "qweight", words)[0]
    if _bits(name, zero_words, (num_groups, num_rows)) != 4 or words.shape[1] * 8 != num_rows or cols % num_groups:
        raise _unfit(name, parts)
    scales_NG = _finite(name, "scales", scales_GN).T.contiguous()
    zeros_NG = unpacked(_awq_rows(zero_words), 4)[:, :num_groups].to(torch.int16)
    return _checked(name, Codes(_awq_rows(words), cols, scales_NG, zeros_NG, 4), is_symmetric, "zero_point")


def packed(name: str, parts: Mapping[str, Tensor], bits: int) -> Codes:
    """A matrix of compressed-tensors, packed.

    name: of the matrix, for errors.
    parts: weight_packed int32 [N, K * bits / 32], weight_scale [N, G], weight_shape [2], perhaps weight_zero_point
        int32 [N * bits / 32, G].
    bits: of a code.

    Raises ExpertReadError as `gptq`.
    """
    words, scales_NG = _named(name, parts, "weight_packed", "weight_scale")
    num_rows, num_groups = _two(name, "weight_scale", scales_NG)
    stored_rows, num_words = _two(name, "weight_packed", words)
    cols = num_words * _WORD_BITS // bits
    if (shape := parts.get("weight_shape")) is not None and not shape.is_meta:
        said = [int(size) for size in shape.flatten().tolist()]
        # The last word of a row may hold more codes than the row has columns.
        if len(said) != 2 or said[0] != num_rows or not 0 <= cols - said[1] < _WORD_BITS // bits:
            raise _unfit(name, parts, f"weight_shape says {said}")
        cols = said[1]
    if stored_rows != num_rows or not cols or cols % num_groups:
        raise _unfit(name, parts)
    zeros_NG = None
    if (zero_words := parts.get("weight_zero_point")) is not None:
        if zero_words.dtype != torch.int32 or zero_words.shape != (-(-num_rows * bits // _WORD_BITS), num_groups):
            raise _unfit(name, parts)
        zeros_NG = unpacked(_bytes(_turned(zero_words)), bits).T[:num_rows].to(torch.int16).contiguous()
    return Codes(_bytes(words), cols, _finite(name, "weight_scale", scales_NG), zeros_NG, bits)


def unpacked(packed_NB: Tensor, bits: int) -> Tensor:
    """Bytes uint8 [N, B] as unsigned codes uint8 [N, B * 8 / bits], the first in the lowest bits of a byte."""
    if bits == 8:
        return packed_NB
    if bits == 4:
        wide_NB = packed_NB.to(torch.int16)
        return ((wide_NB & 0x0F) | ((wide_NB & 0xF0) << 4)).view(torch.uint8)
    each = 8 // bits
    codes_NBE = torch.empty((*packed_NB.shape, each), dtype=torch.uint8, device=packed_NB.device)
    for place in range(each):
        codes_NBE[..., place] = (packed_NB >> (place * bits)) & ((1 << bits) - 1)
    return codes_NBE.flatten(1)


def _bytes(words_RW: Tensor) -> Tensor:
    """uint8 [R, 4 W] of int32 words, the lowest byte first as on every machine that torch runs on here."""
    # Flat first: no view takes the bytes of rows of one word that do not lie one after another.
    return words_RW.reshape(-1).view(torch.uint8).view(len(words_RW), -1)


def _turned(words_RW: Tensor) -> Tensor:
    """Transposed in its own memory, which `contiguous` leaves out for one row or one column."""
    return torch.empty_like(words_RW.T, memory_format=torch.contiguous_format).copy_(words_RW.T)


def _columns(values_NK: Tensor, order_K: Tensor) -> Tensor:
    """These columns in this order."""
    if values_NK.device.type != "cpu":
        return values_NK.index_select(1, order_K)
    # Three times as fast as torch's index_select along rows. numpy knows no bf16, but integers as wide.
    width = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[values_NK.element_size()]
    taken = np.take(values_NK.contiguous().view(width).numpy(), order_K.numpy(), axis=1)
    return torch.from_numpy(taken).view(values_NK.dtype)


def _awq_rows(words_KW: Tensor) -> Tensor:
    """Words [K, N / 8] as codes of rows, uint8 [N, K / 2 rounded up], the even column in the low half of a byte."""
    if len(words_KW) % 2:
        words_KW = F.pad(words_KW, (0, 0, 0, 1))
    columns_HSW = words_KW.unflatten(0, (-1, 2))
    even_WH, odd_WH = (_turned(columns_HSW[:, place]) for place in range(2))
    # Each word has eight outputs: those of its even nibbles for two columns are the bytes of one new word, those of its
    # odd nibbles the bytes of another.
    pairs = (
        (even_WH & _LOW_HALVES) | ((odd_WH & _LOW_HALVES) << 4),
        ((even_WH >> 4) & _LOW_HALVES) | (odd_WH & ~_LOW_HALVES),
    )
    bytes_SWHB = [pair.view(torch.uint8).unflatten(1, (-1, 4)) for pair in pairs]
    rows_WOH = torch.empty((len(even_WH), 8, even_WH.shape[1]), dtype=torch.uint8, device=words_KW.device)
    for nibble, output in enumerate(_AWQ_OUTPUTS):
        rows_WOH[:, output] = bytes_SWHB[nibble % 2][..., nibble // 2]
    return rows_WOH.flatten(0, 1)


# Checks


def _named(name: str, parts: Mapping[str, Tensor], *wanted: str) -> list[Tensor]:
    """These tensors, the first of words, the last of scales."""
    if missing := [part for part in wanted if part not in parts]:
        raise ExpertReadError(f"{name} has no {missing[0]}: is the checkpoint whole?")
    found = [parts[part] for part in wanted]
    if any(tensor.dtype != torch.int32 for tensor in found[:-1]) or not found[-1].is_floating_point():
        raise _unfit(name, parts)
    return found


def _two(name: str, part: str, tensor: Tensor) -> tuple[int, int]:
    if tensor.ndim != 2 or not tensor.numel():
        raise ExpertReadError(f"{name}.{part} has shape {list(tensor.shape)}: that is no matrix. Fetch the file again.")
    return tensor.shape[0], tensor.shape[1]


def _bits(name: str, zero_words: Tensor, shape: tuple[int, int]) -> int:
    """Bits of a code, told by the words that hold one zero point for each scale."""
    num_groups, num_rows = shape
    num_words = _two(name, "qzeros", zero_words)[1]
    bits = num_words * _WORD_BITS // num_rows
    if bits not in _WHOLE_BITS or num_words * _WORD_BITS != bits * num_rows or len(zero_words) != num_groups:
        raise ExpertReadError(
            f"{name}: qzeros {list(zero_words.shape)} for scales {list(shape)} are no codes of 2, 4 or 8 bits. Give a "
            "checkpoint of 4 or 8 bits, or fetch the file again."
        )
    return bits


def _group_of(
    name: str, parts: Mapping[str, Tensor], index_K: Tensor | None, cols: int, num_groups: int
) -> Tensor | None:
    """The group of each column; None where groups are neighbours, as in files without act-order."""
    if index_K is None:
        return None
    if index_K.shape != (cols,) or index_K.is_floating_point():
        raise _unfit(name, parts)
    if index_K.is_meta:
        return None
    low, high = (int(value) for value in index_K.aminmax())
    if low < 0 or high >= num_groups:
        raise ExpertReadError(f"{name}.g_idx names group {low if low < 0 else high} of {num_groups}: fetch it again.")
    if cols % num_groups == 0:
        neighbours_K = torch.arange(cols, device=index_K.device) // (cols // num_groups)
        if torch.equal(index_K.long(), neighbours_K):
            return None
    return index_K.long()


def _checked(name: str, codes: Codes, is_symmetric: bool, setting: str) -> Codes:
    """Codes that the configuration calls symmetric lose their zero points: blocks without them hold fewer bytes."""
    if not is_symmetric or codes.zeros_NG is None:
        return codes
    if not codes.zeros_NG.is_meta and bool((codes.zeros_NG != codes.middle).any()):
        raise ExpertReadError(
            f"{name}: its zero points are not all {codes.middle}, as the configuration's {setting} has it. Correct "
            "config.json, or fetch the file again."
        )
    return replace(codes, zeros_NG=None)


def _finite(name: str, part: str, scales: Tensor) -> Tensor:
    if not scales.is_meta and not bool(scales.isfinite().all()):
        raise ExpertReadError(f"{name}.{part} holds numbers that are not finite: fetch the file again.")
    return scales


def _unfit(name: str, parts: Mapping[str, Tensor], why: str = "they do not fit together") -> ExpertReadError:
    shapes = ", ".join(f"{part} {str(t.dtype).removeprefix('torch.')} {list(t.shape)}" for part, t in parts.items())
    return ExpertReadError(f"{name}: {shapes}: {why}. Is this the model's checkpoint, and whole?")
