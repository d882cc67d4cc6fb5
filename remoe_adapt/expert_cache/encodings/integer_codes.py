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

import torch
from torch import Tensor

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.encodings.groups import Groups

_WORD_BITS = 32
# Of the eight outputs in a word of AWQ, nibble i holds this one.
_AWQ_OUTPUTS = (0, 2, 4, 6, 1, 3, 5, 7)
# Widths of codes that lie in words without crossing from one into the next.
_WHOLE_BITS = (2, 4, 8)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix [N, K] of unsigned integers in groups along K: value = (code - zero) * scale.

    codes_NK: uint8.
    scales_NG: floats, as stored.
    zeros_NG: int16; None: `middle` for all.
    bits: of a code.
    group_K: int64, the group of each column; None: G groups of neighbours, each as wide as the others.
    """

    codes_NK: Tensor
    scales_NG: Tensor
    zeros_NG: Tensor | None
    bits: int
    group_K: Tensor | None = None

    @property
    def middle(self) -> int:
        """The zero point of symmetric codes."""
        return 1 << (self.bits - 1)

    def dequantise(self, dtype: torch.dtype, through: torch.dtype = torch.float32) -> Tensor:
        """[N, K]: the product in fp32, where it is exact for scales of 16 bits, rounded to `through`, then `dtype`."""
        num_rows, cols = self.codes_NK.shape
        scales_NG = self.scales_NG.float()
        if self.group_K is not None:
            zeros_NK = self.middle if self.zeros_NG is None else self.zeros_NG[:, self.group_K].float()
            values_NK = (self.codes_NK.float() - zeros_NK) * scales_NG[:, self.group_K]
        else:
            zeros_NG1 = self.middle if self.zeros_NG is None else self.zeros_NG.float()[..., None]
            codes_NGK = self.codes_NK.view(num_rows, scales_NG.shape[1], -1).float()
            values_NK = ((codes_NGK - zeros_NG1) * scales_NG[..., None]).view(num_rows, cols)
        return values_NK.to(through).to(dtype)

    def groups(self) -> Groups:
        """The same with columns in the order of their groups."""
        order_K = None if self.group_K is None else self.group_K.argsort(stable=True)
        codes_NK = self.codes_NK if order_K is None else self.codes_NK[:, order_K]
        scales_NG = self.scales_NG.float()
        if self.zeros_NG is None:
            # In bytes that wrap, as 8 bits need it.
            return Groups((codes_NK - self.middle).view(torch.int8), scales_NG, None, self.bits, order_K)
        return Groups(codes_NK, scales_NG, -self.zeros_NG.float() * scales_NG, self.bits, order_K)


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
    zeros_NG = (unpacked(zero_words, bits).T.to(torch.int16) + zero_offset).contiguous()
    # Whole words change places, not codes: eight times fewer.
    codes_NK = unpacked(_turned(words), bits)
    return _checked(name, Codes(codes_NK, scales_NG, zeros_NG, bits, group_K), is_symmetric, "sym")


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
    codes = Codes(_awq_rows(words), scales_NG, _awq_rows(zero_words).to(torch.int16), 4)
    return _checked(name, codes, is_symmetric, "zero_point")


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
        zeros_NG = unpacked(_turned(zero_words), bits).T[:num_rows].to(torch.int16).contiguous()
    return Codes(unpacked(words, bits)[:, :cols].contiguous(), _finite(name, "weight_scale", scales_NG), zeros_NG, bits)


def unpacked(words_RW: Tensor, bits: int) -> Tensor:
    """Words int32 [R, W] as unsigned codes uint8 [R, W * 32 / bits], the first in a word's lowest bits."""
    # Bytes of a word come lowest first on every machine that torch runs on here.
    bytes_RB = words_RW.reshape(-1).view(torch.uint8).view(len(words_RW), -1)
    if bits == 8:
        return bytes_RB
    each = 8 // bits
    codes_RBE = torch.empty((*bytes_RB.shape, each), dtype=torch.uint8, device=bytes_RB.device)
    for place in range(each):
        torch.bitwise_and(bytes_RB >> (place * bits), (1 << bits) - 1, out=codes_RBE[..., place])
    return codes_RBE.flatten(1)


def _turned(words_RW: Tensor) -> Tensor:
    """Transposed in its own memory. `contiguous` leaves a row or a column of one where it is, whose bytes no view
    takes."""
    return torch.empty_like(words_RW.T, memory_format=torch.contiguous_format).copy_(words_RW.T)


def _awq_rows(words_KW: Tensor) -> Tensor:
    """The codes [N, K] of words [K, N / 8]."""
    words_WK = _turned(words_KW)
    bytes_WKB = words_WK.view(torch.uint8).view(*words_WK.shape, 4)
    codes_WOK = torch.empty((len(words_WK), 8, words_WK.shape[1]), dtype=torch.uint8, device=words_KW.device)
    for place, output in enumerate(_AWQ_OUTPUTS):
        torch.bitwise_and(bytes_WKB[..., place // 2] >> (place % 2 * 4), 15, out=codes_WOK[:, output])
    return codes_WOK.flatten(0, 1)


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
