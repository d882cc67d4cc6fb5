"""Matrices of floats as blocks of ggml: eight bits (q8_0), or four with a scale and a minimum for each 32 (q4_1).

Four bits are searched for, group by group. Codes follow from a scale and a minimum, and the best scale and minimum for
given codes from least squares, as in ggml's `make_qkx2_quants`
(https://github.com/ggml-org/ggml/blob/master/src/ggml-quants.c). Each candidate is judged by the error of the numbers
that are stored, the scale and the minimum rounded to fp16; ggml judges before it rounds. The search has four candidates
that narrow the group's range, then two beside the best of those, then one more step of least squares: seven candidates
find what 16 evenly spaced ones with two steps each do (32 candidates), in a tenth of the time.

No calibration text is needed: each number of a matrix counts alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.encodings.blocks import Q4_1, Q8_0, BlockType
from remoe_adapt.expert_cache.encodings.groups import q8_0_codes

# What `--bits` stands for.
KINDS = {4: Q4_1, 8: Q8_0}
# The range of a group is cut to these parts of itself, around its middle: cut-off numbers at the ends cost less than
# the wider steps of the others. Chosen on the shipped model's experts and on Student's t with 4 degrees of freedom.
_CUTS = (1.0, 0.92, 0.84, 0.76)
# Then the step of the best is made so much smaller and larger, and what is best then is fitted once more.
_BESIDE = ((0.97, 1.03), (1.0,))
_GROUP, _TOP = 32, 15.0
_HALF_MAX = torch.finfo(torch.float16).max
# Groups that are worked on together: few enough for the processor's caches, many enough that calls of torch, of which
# each takes microseconds, cost little beside their work.
_CHUNK_GROUPS = 8192


@dataclass(frozen=True, slots=True)
class Quantised:
    """A matrix as blocks, and what that cost.

    blocks_NB: uint8 [N, kind.row_bytes(K)].
    error: sum over the matrix of (number - what the blocks are worth) squared.
    norm: sum over the matrix of the numbers squared.
    """

    blocks_NB: Tensor
    error: float
    norm: float


def quantise(weight_NK: Tensor, kind: BlockType, name: str = "a weight") -> Quantised:
    """Encode a matrix of floats.

    weight_NK: any float type; contiguous or not, on the CPU. Where its rows are no multiple of 32 long, the last block
        of each holds its own values once more in the places that are too many: zeros would widen its steps.
    kind: Q4_1 or Q8_0.
    name: of the matrix, for errors.

    Raises ConfigError when a number is NaN or infinite, or too large for scales in fp16; UncacheableError for another
    kind, and for what is no matrix of floats.
    """
    if kind not in KINDS.values():
        raise UncacheableError(f"{name} is to be quantised as {kind.name}: only q4_1 (4 bits) and q8_0 (8 bits) are.")
    if weight_NK.ndim != 2 or not weight_NK.is_floating_point() or 0 in weight_NK.shape:
        raise UncacheableError(
            f"{name} ({weight_NK.dtype}, {list(weight_NK.shape)}) is no matrix of floats: it stays as it is."
        )
    num_rows, cols = weight_NK.shape
    blocks_NB = torch.empty(num_rows, kind.row_bytes(cols), dtype=torch.uint8)
    error = norm = 0.0
    with torch.no_grad():
        scratch: _Scratch | None = None
        for rows, groups_GV in _chunks(weight_NK):
            _check(groups_GV, kind, name)
            if scratch is None or scratch.groups != len(groups_GV):
                scratch = _Scratch(len(groups_GV))
            norm += _squares(groups_GV, cols)
            encode = _encode_4 if kind == Q4_1 else _encode_8
            blocks_GB, left_GV = encode(groups_GV, scratch)
            blocks_NB[rows] = blocks_GB.view(-1, blocks_NB.shape[1])
            error += _squares(left_GV, cols)
    return Quantised(blocks_NB, error, norm)


class _Scratch:
    """Memory that every chunk of a matrix uses again: fresh memory costs a page fault for each 4 KiB of it."""

    def __init__(self, groups: int) -> None:
        self.groups = groups
        self.values_VG, self.codes_VG, self.products_VG = (torch.empty(_GROUP, groups) for _ in range(3))
        self.bytes_VG = torch.empty(_GROUP, groups, dtype=torch.uint8)
        self.ones = torch.ones(1, _GROUP)


def _chunks(weight_NK: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the matrix as fp32 groups [G, 32], the last of a row filled up with its own values."""
    num_rows, cols = weight_NK.shape
    groups_of_row, rest = -(-cols // _GROUP), cols % _GROUP
    step = max(1, _CHUNK_GROUPS // groups_of_row)
    for start in range(0, num_rows, step):
        chunk_RK = weight_NK[start : start + step].to(torch.float32)
        if rest:
            again = torch.arange(_GROUP - rest) % rest + (cols - rest)
            chunk_RK = torch.cat([chunk_RK, chunk_RK[:, again]], 1)
        yield slice(start, start + step), chunk_RK.reshape(-1, _GROUP)


def _check(groups_GV: Tensor, kind: BlockType, name: str) -> None:
    low, high = (float(value) for value in torch.aminmax(groups_GV))
    largest = max(-low, high)
    # NaN is neither above nor below anything.
    if not largest < float("inf"):
        raise ConfigError(
            f"{name} holds NaN or infinity, which no block can: the checkpoint is damaged, fetch it again."
        )
    most = _HALF_MAX * 127 if kind == Q8_0 else _HALF_MAX
    if largest > most:
        raise ConfigError(f"{name} holds {largest:g}; {kind.name} holds up to {most:g}: leave it unquantised.")


def _encode_8(groups_GV: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Blocks and what they miss [G, 32]. q8_0: fp16 scale, int8 codes, to nearest on the scale that is stored."""
    codes_GV, scales_G = q8_0_codes(groups_GV)
    blocks_GB = torch.empty(len(groups_GV), Q8_0.bytes, dtype=torch.uint8)
    blocks_GB.view(torch.float16)[:, 0] = scales_G
    blocks_GB[:, 2:].view(torch.int8).copy_(codes_GV)
    return blocks_GB, codes_GV.mul_(scales_G.float()[:, None]).sub_(groups_GV)


def _encode_4(groups_GV: Tensor, scratch: _Scratch) -> tuple[Tensor, Tensor]:
    """Blocks and what they miss [G, 32]. q4_1: fp16 scale and minimum, codes 0 to 15 of two values a byte."""
    # Value by value, so that sums over a group are sums of rows, and each call works on long rows.
    values_VG = scratch.values_VG.copy_(groups_GV.t())
    low_G, high_G = values_VG.amin(0), values_VG.amax(0)
    search = _Search((low_G + high_G) / 2, (high_G - low_G) / 2, scratch)
    scales_G, minima_G = search.run()
    codes_VG = search.codes(scales_G, minima_G)
    blocks_GB = torch.empty(len(groups_GV), Q4_1.bytes, dtype=torch.uint8)
    halfs = blocks_GB.view(torch.float16)
    halfs[:, 0], halfs[:, 1] = scales_G, minima_G
    bytes_VG = scratch.bytes_VG.copy_(codes_VG)
    # A byte holds a value of the first half of its group, and in its upper bits the one 16 further on.
    pairs_VG = bytes_VG[_GROUP // 2 :].bitwise_left_shift_(4).bitwise_or_(bytes_VG[: _GROUP // 2])
    blocks_GB[:, 4:].copy_(pairs_VG.t())
    # The values of the search lie around 0: the error is the same there, since both sides are moved and scaled alike.
    left_VG = codes_VG.mul_(search.inside(scales_G)).add_(search.place(minima_G)).sub_(values_VG).mul_(search.half_G)
    return blocks_GB, left_VG.t()


class _Search:
    """The scales and minima of a chunk of groups, which lies in `scratch.values_VG`.

    middle_G, half_G: of each group's range; within, its values become (value - middle) / half, from -1 to 1, so that
    candidates are the same for all groups.
    """

    def __init__(self, middle_G: Tensor, half_G: Tensor, scratch: _Scratch) -> None:
        self.middle_G, self.half_G, self._scratch = middle_G, half_G, scratch
        self._inverse_G = _inverse(half_G)
        scratch.values_VG.sub_(middle_G).mul_(self._inverse_G)
        self._sum_G = torch.mm(scratch.ones, scratch.values_VG)[0]

    def run(self) -> tuple[Tensor, Tensor]:
        """fp32 [G] twice: what fp16 numbers the scales and minima of least error are."""
        tried = []
        for cut in _CUTS:
            middle_code = torch.tensor(_TOP / 2)
            self._rounded(torch.add(middle_code, self._scratch.values_VG, alpha=_TOP / 2 / cut, out=self._codes))
            tried.append(self._sums())
        best = self._best(self._fit(torch.stack(tried, 1)))
        for factors in _BESIDE:
            tried = []
            for factor in factors:
                # A step that grows pushes the minimum away by as much as its middle code is worth.
                minima_G = best[1] + best[0] * ((1 - factor) * _TOP / 2)
                self.codes(best[0] * factor, minima_G)
                tried.append(self._sums())
            more = self._fit(torch.stack(tried, 1))
            best = self._best(torch.cat([best[:, None], more], 1))
        return best[0], best[1]

    def codes(self, scales_G: Tensor, minima_G: Tensor) -> Tensor:
        """fp32 [32, G] in the scratch memory: the nearest code of every value."""
        inverse_G = _inverse(scales_G)
        shift_G = (self.middle_G - minima_G) * inverse_G
        return self._rounded(torch.mul(self._scratch.values_VG, self.half_G * inverse_G, out=self._codes).add_(shift_G))

    def inside(self, scales_G: Tensor) -> Tensor:
        """A scale as the values of the search have it."""
        return scales_G * self._inverse_G

    def place(self, minima_G: Tensor) -> Tensor:
        """A minimum as the values of the search have it."""
        return (minima_G - self.middle_G) * self._inverse_G

    @property
    def _codes(self) -> Tensor:
        return self._scratch.codes_VG

    @staticmethod
    def _rounded(codes_VG: Tensor) -> Tensor:
        return codes_VG.round_().clamp_(0, _TOP)

    def _sums(self) -> Tensor:
        """[3, G]: sums of the codes, of their squares, and of codes times values."""
        sums_3G = torch.empty(3, self._scratch.groups)
        codes_VG, products_VG, ones = self._codes, self._scratch.products_VG, self._scratch.ones
        torch.mm(ones, codes_VG, out=sums_3G[0:1])
        torch.mm(ones, torch.mul(codes_VG, codes_VG, out=products_VG), out=sums_3G[1:2])
        torch.mm(ones, torch.mul(codes_VG, self._scratch.values_VG, out=products_VG), out=sums_3G[2:3])
        return sums_3G

    def _fit(self, sums_3CG: Tensor) -> Tensor:
        """[3, C, G] of C candidates: scales and minima by least squares, rounded to fp16, and their errors.

        The error leaves out the sum of the squares of the values, which is the same for all candidates.
        """
        codes_CG, squares_CG, products_CG = sums_3CG.unbind(0)
        # One code for all values: no scale. Codes are whole numbers, so anything else is 1 or more.
        spread_CG = (_GROUP * squares_CG).addcmul_(codes_CG, codes_CG, value=-1).clamp_(min=1)
        fitted = torch.empty_like(sums_3CG)
        scales_CG, minima_CG, errors_CG = fitted.unbind(0)
        slope_CG = (_GROUP * products_CG).addcmul_(codes_CG, self._sum_G, value=-1).div_(spread_CG)
        scales_CG.copy_(slope_CG.mul_(self.half_G).half())
        # The minimum of least error for the scale as it is stored.
        mean_G = self.middle_G + self.half_G * self._sum_G / _GROUP
        minima_CG.copy_((mean_G - scales_CG * codes_CG / _GROUP).clamp_(-_HALF_MAX, _HALF_MAX).half())
        scale_CG, minimum_CG = self.inside(scales_CG), self.place(minima_CG)
        linear_CG = minimum_CG.mul(codes_CG).sub_(products_CG).mul_(2).addcmul_(scale_CG, squares_CG).mul_(scale_CG)
        errors_CG.copy_(minimum_CG.mul(_GROUP).sub_(self._sum_G, alpha=2).mul_(minimum_CG).add_(linear_CG))
        return fitted

    @staticmethod
    def _best(fitted_3CG: Tensor) -> Tensor:
        """[3, G]: of each group the candidate of least error."""
        # Not argmin, which takes ten times as long.
        place_1G = fitted_3CG[2].min(0, keepdim=True).indices
        return fitted_3CG.gather(1, place_1G.expand(3, 1, -1))[:, 0]


def _inverse(values_G: Tensor) -> Tensor:
    """1 / value, and 0 for 0: a group of equal numbers has no scale."""
    return values_G.reciprocal().masked_fill_(values_G == 0, 0.0)


def _squares(groups_GV: Tensor, cols: int) -> float:
    """Of all values [G, 32] that are in rows of so many."""
    groups_of_row, rest = -(-cols // _GROUP), cols % _GROUP
    # vector_norm squares as it sums: no squares of a whole chunk in memory. The second part was there twice.
    total = float(torch.linalg.vector_norm(groups_GV)) ** 2
    if rest:
        total -= float(torch.linalg.vector_norm(groups_GV[groups_of_row - 1 :: groups_of_row, rest:])) ** 2
    return total
