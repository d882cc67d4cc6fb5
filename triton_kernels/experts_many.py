"""Experts of many tokens out of a pool of slots: matrix products of tiles, each of tokens that chose the same slot.

Pairs of a token and a choice are sorted by slot on the device; a program multiplies BM of them with BN rows of their
slot, whose codes become numbers of the hidden states' type on the way to the tensor cores (fp32 as three products of
TF32, which keep its precision). Outputs of pairs are summed by a kernel of its own, in the order of the choices: the
sum does not depend on who chose the same slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .experts_few import activated, load, scale_row, scales_of, values_of


@dataclass(frozen=True, slots=True)
class Blocks:
    """Pairs in the order of their slots, cut where a program begins.

    order: int32 [T * C], pairs by slot.
    firsts: int32, where in the order each program's pairs begin; -1: it has none.
    """

    order: Tensor
    firsts: Tensor


def blocks_of(slots_TC: Tensor, size: int, slots: int) -> Blocks:
    """The blocks of at most `size` pairs of one slot, found on the device: the host waits for nothing.

    slots: of the pool, which bounds the number of blocks.
    """
    pairs, device = slots_TC.numel(), slots_TC.device
    sorted_P, order_P = slots_TC.flatten().sort(stable=True)
    index_P = torch.arange(pairs, device=device)
    begins_P = torch.ones(pairs, dtype=torch.bool, device=device)
    torch.ne(sorted_P[1:], sorted_P[:-1], out=begins_P[1:])
    begin_P = torch.where(begins_P, index_P, 0).cummax(0).values
    first_P = ((index_P - begin_P) % size == 0) & (sorted_P >= 0)
    # Each slot that is chosen may have one block that is not full.
    most = -(-pairs // size) + min(pairs, slots)
    firsts = torch.full((most + 1,), -1, dtype=torch.int32, device=device)
    # What begins no block goes to the place after the last.
    firsts.scatter_(0, torch.where(first_P, first_P.cumsum(0) - 1, most), index_P.int())
    return Blocks(order_P.int(), firsts[:most])


@triton.jit
def weight_tile(
    base, codes_N1, scales_N1, minima_N1, start, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    VALUES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, MASKED: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Numbers [BN, BK] of rows of a slot's matrix from column `start` on; pointers as for `products`."""
    if KIND == "float":
        column_1K = start + tl.arange(0, BK)[None, :]
        tile_NK = load(codes_N1 + column_1K, column_1K < K, MASKED)
    else:
        # Groups of GROUP columns, or of as many as the tile has.
        OWN: tl.constexpr = min(GROUP, BK)
        L: tl.constexpr = BK // OWN
        word_1W = start // VALUES + tl.arange(0, BK // VALUES)[None, :]
        tile_NW = load(codes_N1 + word_1W, word_1W * VALUES < K, MASKED).to(tl.uint32, bitcast=True)
        # `values_of` takes chunks of eight columns.
        value_NK = values_of(tl.reshape(tile_NW, (1, BN, BK // 8, 8 // VALUES)), base, KIND)
        if KIND == "int4":
            value_NK -= 16.0 + 240.0 * (tl.arange(0, 8)[None, None, None, :] % 2)
        elif KIND == "int8":
            value_NK -= 384.0
        else:
            halves = tl.reshape(value_NK, (BN, BK // VALUES, VALUES // 2, 2))
            value_NK = tl.permute(halves, (0, 1, 3, 2)) * (16384.0 if KIND == "mxfp4" else 256.0)
        group_1L = (start + tl.arange(0, L)[None, :] * OWN) // GROUP
        inside_1L = start + tl.arange(0, L)[None, :] * OWN < K
        scale_NL = scales_of(scales_N1 + group_1L, inside_1L, MASKED, KIND)
        number_NLK = tl.reshape(value_NK, (BN, L, OWN))
        if minima_N1 is not None:
            number_NLK = number_NLK * scale_NL[:, :, None]
            number_NLK += scales_of(minima_N1 + group_1L, inside_1L, MASKED, KIND)[:, :, None]
        elif KIND == "int4":
            number_NLK = (number_NLK - 8.0) * scale_NL[:, :, None]
        else:
            number_NLK = number_NLK * scale_NL[:, :, None]
        tile_NK = tl.reshape(number_NLK, (BN, BK))
    return tile_NK.to(dtype)


@triton.jit
def pairs_of_block(first, num_pairs, order, slots, BM: tl.constexpr):
    """(pairs [BM] from place `first` of the order on, which of them have the slot of the first one, that slot)."""
    at_M = first + tl.arange(0, BM)
    pair_M = tl.load(order + at_M, mask=at_M < num_pairs, other=0)
    slot = tl.load(slots + tl.load(order + first))
    mine_M = (at_M < num_pairs) & (tl.load(slots + pair_M) == slot)
    return pair_M, mine_M, slot.to(tl.int64)


@triton.jit(do_not_specialize=["base", "num_pairs"])
def up_tiles_kernel(
    base, num_pairs, order, firsts, x, stride_x, slots, codes, stride_c, scales, stride_s, minima, stride_m, bias,
    stride_b, hidden, C: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, VALUES: tl.constexpr, INTERLEAVED: tl.constexpr, FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr,
):  # fmt: skip
    """Program (i, b): columns i * BN and on of the activated rows of block b's pairs, to `hidden` [pairs, INNER]."""
    first = tl.load(firsts + tl.program_id(1))
    if first >= 0:
        pair_M, mine_M, at = pairs_of_block(first, num_pairs, order, slots, BM)
        column_N = tl.program_id(0) * BN + tl.arange(0, BN)
        row_N1 = tl.minimum(column_N, INNER - 1)[:, None]
        gate_N1 = row_N1 * 2 if INTERLEAVED else row_N1
        up_N1 = row_N1 * 2 + 1 if INTERLEAVED else row_N1 + INNER
        row_values: tl.constexpr = K if KIND == "float" else K // VALUES
        gate_scales = None
        up_scales = None
        gate_minima = None
        up_minima = None
        if scales is not None:
            GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
            gate_at = scale_row(gate_N1, 2 * INNER, KIND, GROUP, HALVES) * GROUPS
            up_at = scale_row(up_N1, 2 * INNER, KIND, GROUP, HALVES) * GROUPS
            gate_scales = scales + at * stride_s + gate_at
            up_scales = scales + at * stride_s + up_at
            if minima is not None:
                gate_minima = minima + at * stride_m + gate_at
                up_minima = minima + at * stride_m + up_at
        x_M1 = x + (pair_M // C).to(tl.int64)[:, None] * stride_x
        gate_MN = tl.full((BM, BN), 0.0, tl.float32)
        up_MN = tl.full((BM, BN), 0.0, tl.float32)
        for start in range(0, K, BK):
            column_1K = start + tl.arange(0, BK)[None, :]
            hidden_MK = tl.load(x_M1 + column_1K, mask=mine_M[:, None] & (column_1K < K), other=0.0)
            gate_NK = weight_tile(
                base, codes + at * stride_c + gate_N1 * row_values, gate_scales, gate_minima, start, K, KIND, GROUP,
                VALUES, BN, BK, K % BK != 0, hidden_MK.dtype,
            )  # fmt: skip
            gate_MN = tl.dot(hidden_MK, tl.trans(gate_NK), gate_MN, input_precision="tf32x3")
            up_NK = weight_tile(
                base, codes + at * stride_c + up_N1 * row_values, up_scales, up_minima, start, K, KIND, GROUP, VALUES,
                BN, BK, K % BK != 0, hidden_MK.dtype,
            )  # fmt: skip
            up_MN = tl.dot(hidden_MK, tl.trans(up_NK), up_MN, input_precision="tf32x3")
        if bias is not None:
            bias_N1 = bias + at * stride_b
            gate_MN += tl.trans(tl.load(bias_N1 + gate_N1).to(tl.float32))
            up_MN += tl.trans(tl.load(bias_N1 + up_N1).to(tl.float32))
        value_MN = activated(gate_MN, up_MN, FUNCTION, ALPHA, LIMIT, SHIFT)
        target_MN = hidden + pair_M.to(tl.int64)[:, None] * INNER + column_N[None, :]
        tl.store(target_MN, value_MN.to(hidden.dtype.element_ty), mask=mine_M[:, None] & (column_N < INNER)[None, :])


@triton.jit(do_not_specialize=["base", "num_pairs"])
def down_tiles_kernel(
    base, num_pairs, order, firsts, hidden, slots, codes, stride_c, scales, stride_s, minima, stride_m, bias, stride_b,
    pairs, N: tl.constexpr, K: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr,
    VALUES: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Program (i, b): rows i * BN and on of the outputs of block b's pairs, to `pairs` [pairs, N]."""
    first = tl.load(firsts + tl.program_id(1))
    if first >= 0:
        pair_M, mine_M, at = pairs_of_block(first, num_pairs, order, slots, BM)
        row_N = tl.program_id(0) * BN + tl.arange(0, BN)
        row_N1 = tl.minimum(row_N, N - 1)[:, None]
        row_values: tl.constexpr = K if KIND == "float" else K // VALUES
        scales_N1 = None
        minima_N1 = None
        if scales is not None:
            scale_at = scale_row(row_N1, N, KIND, GROUP, HALVES) * ((K + GROUP - 1) // GROUP)
            scales_N1 = scales + at * stride_s + scale_at
            if minima is not None:
                minima_N1 = minima + at * stride_m + scale_at
        sum_MN = tl.full((BM, BN), 0.0, tl.float32)
        for start in range(0, K, BK):
            column_1K = start + tl.arange(0, BK)[None, :]
            hidden_MK = tl.load(
                hidden + pair_M.to(tl.int64)[:, None] * K + column_1K, mask=mine_M[:, None] & (column_1K < K), other=0.0
            )
            weight_NK = weight_tile(
                base, codes + at * stride_c + row_N1 * row_values, scales_N1, minima_N1, start, K, KIND, GROUP, VALUES,
                BN, BK, K % BK != 0, hidden_MK.dtype,
            )  # fmt: skip
            sum_MN = tl.dot(hidden_MK, tl.trans(weight_NK), sum_MN, input_precision="tf32x3")
        if bias is not None:
            sum_MN += tl.trans(tl.load(bias + at * stride_b + row_N1).to(tl.float32))
        target_MN = pairs + pair_M.to(tl.int64)[:, None] * N + row_N[None, :]
        tl.store(target_MN, sum_MN, mask=mine_M[:, None] & (row_N < N)[None, :])


@triton.jit
def sum_kernel(pairs, slots, weights, out, stride_o, C: tl.constexpr, N: tl.constexpr, BN: tl.constexpr):
    """Program (t, i): columns i * BN and on of token t: its choices' outputs by their weights, one after another."""
    token = tl.program_id(0).to(tl.int64)
    column_N = tl.program_id(1) * BN + tl.arange(0, BN)
    total_N = tl.full((BN,), 0.0, tl.float32)
    for choice in range(C):
        slot = tl.load(slots + token * C + choice)
        # What is skipped (SKIP of slots.py) was never written: it may be no numbers.
        pair_N = tl.load(
            pairs + (token * C + choice) * N + column_N, mask=column_N < tl.where(slot == -1, 0, N), other=0.0
        )
        weight = tl.load(weights + token * C + choice).to(tl.float32)
        total_N += tl.where(slot == -1, 0.0, weight) * pair_N
    tl.store(out + token * stride_o + column_N, total_N.to(out.dtype.element_ty), mask=column_N < N)
