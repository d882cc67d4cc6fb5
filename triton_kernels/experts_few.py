"""Experts of a few tokens straight from a pool of slots: two gather-GEMV kernels for every coding of the weights.

Threads lie on tiles [R, Q, L]: L along columns, Q along rows (first product) or choices (second one), while R rows are
a thread's own and share what it has read of the hidden state. Of a row and tile a thread reads 16 bytes of codes at
most, and the one scale that they need: neither codes nor scales move between threads, only sums do. Values of four and
eight bits become floats by bit patterns, since conversions of integers take four times as long as other instructions.
All further axes of a tile (W words of 4 bytes, P values of a word) are inside a thread: their shifts are constants.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import slots as words

FLOAT, INT8, INT4 = tl.constexpr(words.FLOAT), tl.constexpr(words.INT8), tl.constexpr(words.INT4)
MXFP4, FP8, FP8_BLOCK = tl.constexpr(words.MXFP4), tl.constexpr(words.FP8), tl.constexpr(words.FP8_BLOCK)
SILU, GELU, GELU_TANH = tl.constexpr(words.SILU), tl.constexpr(words.GELU), tl.constexpr(words.GELU_TANH)
DONE = tl.constexpr(words.DONE)
# What `values_of` sets beside a code: exponents of 16 and 256.
BASES = {words.INT4: 0x41800000, words.INT8: 0x43C00000}
# Pointers of unknown alignment are read one value a thread, as the tiles above want their scales.
SCATTERED = ["scales", "stride_s", "minima", "stride_m"]


@triton.jit
def activated(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """`function(gate) * (up + shift)` in fp32, see `slots.Activation`; LIMIT None: nothing is cut."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if FUNCTION == SILU:
        gate = gate / (1.0 + tl.exp(-ALPHA * gate))
    elif FUNCTION == GELU:
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif FUNCTION == GELU_TANH:
        # 0.5 * (1 + tanh(z)) is the sigmoid of 2z.
        gate = gate / (1.0 + tl.exp(-1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)))
    else:
        gate = tl.maximum(gate, 0.0)
    return gate * (up + SHIFT)


@triton.jit
def chunk_of(tile_RQLW, NUMBER: tl.constexpr, CHUNKS: tl.constexpr):
    """The words of a thread's chunk NUMBER: [R, Q, L, CHUNKS * W] to [R, Q, L, W]."""
    R: tl.constexpr = tile_RQLW.shape[0]
    Q: tl.constexpr = tile_RQLW.shape[1]
    L: tl.constexpr = tile_RQLW.shape[2]
    W: tl.constexpr = tile_RQLW.shape[3] // CHUNKS
    if CHUNKS == 1:
        words = tile_RQLW
    elif CHUNKS == 2:
        first, second = tl.split(tl.permute(tl.reshape(tile_RQLW, (R, Q, L, 2, W)), (0, 1, 2, 4, 3)))
        words = second if NUMBER else first
    else:
        even, odd = tl.split(tl.permute(tl.reshape(tile_RQLW, (R, Q, L, 2, 2, W)), (0, 1, 2, 5, 3, 4)))
        first, second = tl.split(odd if NUMBER % 2 else even)
        words = second if NUMBER // 2 else first
    return words


@triton.jit
def values_of(word_RQLW, base, KIND: tl.constexpr):
    """fp32 [R, Q, L, 8] of the words of a chunk: what the codes stand for, over a unit and beside an offset.

    INT4 codes are 16 too large, in odd columns 256; INT8 codes 384. MXFP4 is 2^14 times too small, FP8 2^8 times.
    Values are in order for INT4 and INT8; else as `interleaved` orders columns.
    base: `BASES[KIND]`. Only because it is no constant to the compiler, masking and setting bits is one instruction.
    """
    R: tl.constexpr = word_RQLW.shape[0]
    Q: tl.constexpr = word_RQLW.shape[1]
    L: tl.constexpr = word_RQLW.shape[2]
    W: tl.constexpr = word_RQLW.shape[3]
    word = tl.reshape(word_RQLW, (R, Q, L, W, 1))
    if KIND == INT4:
        # A code is four bits of a mantissa, worth 1 to 8. Odd ones lie four bits lower: two can share a shift.
        number = tl.arange(0, 8)[None, None, None, None, :]
        codes = ((word >> (4 * number)) & 15) << (19 - 4 * (number % 2))
        values = (codes | (base + 0x02000000 * (number % 2)).to(tl.uint32)).to(tl.float32, bitcast=True)
    elif KIND == INT8:
        # A code is eight bits of a mantissa, of which the highest, its sign, is turned over.
        codes = ((word >> (8 * tl.arange(0, 4)[None, None, None, None, :])) & 255) << 15
        values = (codes ^ base.to(tl.uint32)).to(tl.float32, bitcast=True)
    else:
        # Sign, exponent and mantissa can stand as such in an fp16: subnormal ones of both formats are exact there.
        J: tl.constexpr = 4 if KIND == MXFP4 else 2
        j = tl.arange(0, J)[None, None, None, None, :]
        if KIND == MXFP4:
            moved = word << (12 - 4 * j)
            pairs = (moved & 0x80008000) | ((moved >> 3) & 0x0E000E00)
        else:
            moved = word << (8 - 8 * j)
            pairs = (moved & 0x80008000) | ((moved >> 1) & 0x3F803F80)
        half = tl.reshape(pairs, (R, Q, L, W, J, 1)) >> (16 * tl.arange(0, 2)[None, None, None, None, None, :])
        values = half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return tl.reshape(values, (R, Q, L, 8))


@triton.jit
def interleaved(hidden_QL8, W: tl.constexpr):
    """Columns of W words in the order of the values of MXFP4 and FP8: 0, P / 2, 1, P / 2 + 1, ... of each word of P."""
    Q: tl.constexpr = hidden_QL8.shape[0]
    L: tl.constexpr = hidden_QL8.shape[1]
    return tl.reshape(tl.permute(tl.reshape(hidden_QL8, (Q, L, W, 2, 4 // W)), (0, 1, 2, 4, 3)), (Q, L, 8))


@triton.jit
def scales_of(pointers, mask, MASKED: tl.constexpr, KIND: tl.constexpr):
    """fp32 scales or minima; E8M0 is the exponent of an fp32."""
    if MASKED:
        values = tl.load(pointers, mask=mask, other=0)
    else:
        values = tl.load(pointers)
    if KIND == MXFP4:
        # The smallest, 2^-127, is subnormal.
        found = tl.where(values == 0, 0x00400000, values.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    else:
        found = values.to(tl.float32)
    return found


@triton.jit
def load_hidden(pointers, mask, MASKED: tl.constexpr):
    """Hidden values, 0 beyond the last column."""
    if MASKED:
        values = tl.load(pointers, mask=mask, other=0.0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def products(
    base, x_Q11, codes_1Q1, scales_1Q1, minima_1Q1, row_RQ1, live_1Q1, K: tl.constexpr, ROWS: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr, VALUES: tl.constexpr, PLACED: tl.constexpr,
    MASKED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows of a matrix [ROWS, K] in a slot times hidden values, fp32 [R, Q].

    base: see `values_of`.
    x_Q11: pointers to hidden values; PLACED: chunks of eight lie as `up_kernel` leaves them.
    codes_1Q1, scales_1Q1, minima_1Q1: pointers to the slot's parts, one or one for each of Q; minima may be None.
    row_RQ1: the rows.
    live_1Q1: which of Q are read at all; MASKED: whether that or the number of columns leaves anything out.
    VALUES: numbers in 4 bytes of codes; of FLOAT, numbers that a thread reads at a time.
    """
    lane_11L = tl.arange(0, L)[None, None, :]
    lane_1L1 = tl.arange(0, L)[None, :, None]
    live_Q11 = tl.reshape(live_1Q1, (Q, 1, 1))
    COLUMNS: tl.constexpr = VALUES if KIND == FLOAT else CHUNKS * 8
    WORDS: tl.constexpr = COLUMNS if KIND == FLOAT else COLUMNS // VALUES
    OFFSET: tl.constexpr = (KIND == INT4) | (KIND == INT8)
    word_111W = tl.arange(0, WORDS)[None, None, None, :]
    if KIND == FLOAT:
        value_11V = tl.arange(0, VALUES)[None, None, :]
        total_RQLV = tl.full((R, Q, L, VALUES), 0.0, tl.float32)
    else:
        GROUPS: tl.constexpr = (K + GROUP - 1) // GROUP
        BLOCKS: tl.constexpr = (ROWS // 2 + FP8_BLOCK - 1) // FP8_BLOCK
        value_11V = tl.arange(0, 8)[None, None, :]
        total_RQL = tl.full((R, Q, L), 0.0, tl.float32)
        if KIND == FP8:
            if HALVES:
                lower_RQ1 = row_RQ1 // (ROWS // 2)
                scale_row_RQ1 = lower_RQ1 * BLOCKS + (row_RQ1 - lower_RQ1 * (ROWS // 2)) // FP8_BLOCK
            else:
                scale_row_RQ1 = row_RQ1 // FP8_BLOCK
        else:
            scale_row_RQ1 = row_RQ1
        # What `values_of` puts beside a code, and the 8 that a symmetric code of four bits has beside it.
        if KIND == INT4:
            zero: tl.constexpr = 16.0 if minima_1Q1 is not None else 24.0
            offset_118 = zero + 240.0 * (tl.arange(0, 8)[None, None, :] % 2)
        else:
            offset_118 = 384.0
    for first in range(0, K, L * COLUMNS * UNROLL):
        for step in tl.static_range(UNROLL):
            start = first + step * (L * COLUMNS)
            column_11L = start + lane_11L * COLUMNS
            if KIND == FLOAT:
                at_RQL1 = row_RQ1[:, :, :, None] * K + column_11L[:, :, :, None]
            else:
                at_RQL1 = row_RQ1[:, :, :, None] * (K // VALUES) + column_11L[:, :, :, None] // VALUES
            codes_RQLW = codes_1Q1[:, :, :, None] + (at_RQL1 + word_111W)
            if MASKED:
                inside_QL1 = (start + lane_1L1 * COLUMNS < K) & live_Q11
                mask_1QL = (column_11L < K) & live_1Q1
                if KIND == FLOAT and K % VALUES:
                    inside_QL1 = (start + lane_1L1 * COLUMNS + value_11V < K) & live_Q11
                    mask_1QL1 = (column_11L[:, :, :, None] + word_111W < K) & live_1Q1[:, :, :, None]
                else:
                    mask_1QL1 = mask_1QL[:, :, :, None]
                tile_RQLW = tl.load(codes_RQLW, mask=mask_1QL1, other=0)
            else:
                inside_QL1 = None
                mask_1QL = None
                tile_RQLW = tl.load(codes_RQLW)
            if KIND == FLOAT:
                hidden_QLV = load_hidden(x_Q11 + (start + lane_1L1 * COLUMNS + value_11V), inside_QL1, MASKED)
                total_RQLV += tile_RQLW.to(tl.float32) * hidden_QLV.to(tl.float32)[None, :, :, :]
            else:
                group_RQL = scale_row_RQ1 * GROUPS + column_11L // GROUP
                scale_RQL = scales_of(scales_1Q1 + group_RQL, mask_1QL, MASKED, KIND)
                if minima_1Q1 is not None:
                    minimum_RQL = scales_of(minima_1Q1 + group_RQL, mask_1QL, MASKED, KIND)
                    sum_QL8 = tl.full((Q, L, 8), 0.0, tl.float32)
                part_RQL8 = tl.full((R, Q, L, 8), 0.0, tl.float32)
                beside_QL8 = tl.full((Q, L, 8), 0.0, tl.float32)
                for chunk in tl.static_range(CHUNKS):
                    if PLACED:
                        hidden_Q18 = x_Q11 + (start + (chunk * L + lane_1L1) * 8 + value_11V)
                    else:
                        hidden_Q18 = x_Q11 + (start + (lane_1L1 * CHUNKS + chunk) * 8 + value_11V)
                    hidden_QL8 = load_hidden(hidden_Q18, inside_QL1, MASKED).to(tl.float32)
                    if not OFFSET:
                        hidden_QL8 = interleaved(hidden_QL8, 8 // VALUES)
                    words_RQLW = chunk_of(tile_RQLW, chunk, CHUNKS).to(tl.uint32, bitcast=True)
                    part_RQL8 += values_of(words_RQLW, base, KIND) * hidden_QL8[None, :, :, :]
                    if OFFSET:
                        beside_QL8 += hidden_QL8 * offset_118
                    if minima_1Q1 is not None:
                        sum_QL8 += hidden_QL8
                part_RQL = tl.sum(part_RQL8, axis=3)
                if OFFSET:
                    part_RQL -= tl.sum(beside_QL8, axis=2)[None, :, :]
                total_RQL += scale_RQL * part_RQL
                if minima_1Q1 is not None:
                    total_RQL += minimum_RQL * tl.sum(sum_QL8, axis=2)[None, :, :]
    if KIND == FLOAT:
        total_RQL = tl.sum(total_RQLV, axis=3)
    sum_RQ = tl.sum(total_RQL, axis=2)
    if KIND == MXFP4:
        sum_RQ *= 16384.0
    elif KIND == FP8:
        sum_RQ *= 256.0
    return sum_RQ


@triton.jit(do_not_specialize=["base"], do_not_specialize_on_alignment=SCATTERED)
def up_kernel(
    base, x, stride_x, slots, codes, stride_c, scales, stride_s, minima, stride_m, bias, stride_b, hidden,
    C: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, VALUES: tl.constexpr, INTERLEAVED: tl.constexpr, FUNCTION: tl.constexpr,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, DOWN_L: tl.constexpr, DOWN_CHUNKS: tl.constexpr,
    MASKED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Program (i, p): R * Q activated rows from i * R * Q on, of pair p (token p // C), to `hidden` [pairs, WIDTH].

    DOWN_L, DOWN_CHUNKS: a thread of `down_kernel` reads so many neighbouring chunks of eight columns. Threads side by
    side would read them from lines of their own, so chunks are stored in the order in which the threads read: all first
    ones, all second ones.
    """
    pair = tl.program_id(1)
    slot = tl.load(slots + pair).to(tl.int64)
    if slot >= 0:
        # A thread's rows are R gates and then their R ups.
        member = tl.arange(0, 2 * R)[:, None, None]
        row_RQ1 = tl.program_id(0) * (R * Q) + (member % R) * Q + tl.arange(0, Q)[None, :, None]
        if INNER % (R * Q):
            row_RQ1 = tl.minimum(row_RQ1, INNER - 1)
        if INTERLEAVED:
            row_RQ1 = row_RQ1 * 2 + member // R
        else:
            row_RQ1 = row_RQ1 + (member // R) * INNER
        nothing_1Q1 = tl.full((1, Q, 1), 0, tl.int32)
        codes_1Q1 = codes + slot * stride_c + nothing_1Q1
        scales_1Q1 = None
        minima_1Q1 = None
        if scales is not None:
            scales_1Q1 = scales + slot * stride_s + nothing_1Q1
        if minima is not None:
            minima_1Q1 = minima + slot * stride_m + nothing_1Q1
        x_Q11 = x + (pair // C).to(tl.int64) * stride_x + tl.full((Q, 1, 1), 0, tl.int32)
        dots_RQ = products(
            base, x_Q11, codes_1Q1, scales_1Q1, minima_1Q1, row_RQ1, nothing_1Q1 == 0, K, 2 * INNER, KIND, GROUP,
            HALVES, VALUES, False, MASKED, 2 * R, Q, L, CHUNKS, UNROLL,
        )  # fmt: skip
        if bias is not None:
            dots_RQ += tl.load(bias + slot * stride_b + tl.reshape(row_RQ1, (2 * R, Q))).to(tl.float32)
        gate_RQ, up_RQ = tl.split(tl.permute(tl.reshape(dots_RQ, (2, R, Q)), (1, 2, 0)))
        value_RQ = activated(gate_RQ, up_RQ, FUNCTION, ALPHA, LIMIT, SHIFT)
        column_RQ = tl.program_id(0) * (R * Q) + tl.arange(0, R)[:, None] * Q + tl.arange(0, Q)[None, :]
        chunk_RQ = column_RQ // 8
        in_tile_RQ = chunk_RQ % (DOWN_L * DOWN_CHUNKS)
        moved_RQ = chunk_RQ - in_tile_RQ + (in_tile_RQ % DOWN_CHUNKS) * DOWN_L + in_tile_RQ // DOWN_CHUNKS
        target_RQ = hidden + pair.to(tl.int64) * WIDTH + moved_RQ * 8 + column_RQ % 8
        tl.store(target_RQ, value_RQ.to(hidden.dtype.element_ty), mask=column_RQ < INNER)


# One binary whether pairs come at once or in turns, so that every sum has the same bits.
@triton.jit(do_not_specialize=["base", "pair_rows", "out_rows"], do_not_specialize_on_alignment=SCATTERED)
def down_kernel(
    base, pair_rows, out_rows, hidden, slots, weights, codes, stride_c, scales, stride_s, minima, stride_m, bias,
    stride_b, pairs, out, stride_o,
    C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr,
    HALVES: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """Program (i, t): R rows from i * R on for token t: the weighted sum over its C choices, Q at a time.

    pair_rows, out_rows: N and 0: the outputs of choices that have a slot go to `pairs` [T, C, N]. 0 and N: the sums go
        to `out`; the outputs of choices that are DONE come from `pairs`.
    """
    token = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    real_R = row_R < N
    row_RQ1 = row_R[:, None, None] + tl.full((R, Q, 1), 0, tl.int32)
    if N % R:
        row_RQ1 = tl.minimum(row_RQ1, N - 1)
    total_R = tl.full((R,), 0.0, tl.float32)
    for first in tl.static_range(0, C, Q):
        choice_Q = first + tl.arange(0, Q)
        slot_Q = tl.load(slots + token * C + choice_Q, mask=choice_Q < C, other=-1)
        pair_Q = token * C + tl.minimum(choice_Q, C - 1)
        at_1Q1 = tl.maximum(slot_Q, 0).to(tl.int64)[None, :, None]
        live_Q = slot_Q >= 0
        done_Q = slot_Q == DONE
        scales_1Q1 = None
        minima_1Q1 = None
        if scales is not None:
            scales_1Q1 = scales + at_1Q1 * stride_s
        if minima is not None:
            minima_1Q1 = minima + at_1Q1 * stride_m
        dots_RQ = products(
            base, hidden + pair_Q[:, None, None] * WIDTH, codes + at_1Q1 * stride_c, scales_1Q1, minima_1Q1, row_RQ1,
            live_Q[None, :, None], K, N, KIND, GROUP, HALVES, VALUES, True, True, R, Q, L, CHUNKS, UNROLL,
        )  # fmt: skip
        if bias is not None:
            bias_RQ = bias + tl.reshape(at_1Q1, (1, Q)) * stride_b + row_R[:, None]
            dots_RQ += tl.load(bias_RQ, mask=real_R[:, None] & live_Q[None, :], other=0.0).to(tl.float32)
        pairs_RQ = pairs + pair_Q[None, :] * N + row_R[:, None]
        tl.store(pairs_RQ, dots_RQ, mask=(row_R < pair_rows)[:, None] & live_Q[None, :])
        kept_RQ = tl.load(pairs_RQ, mask=real_R[:, None] & done_Q[None, :], other=0.0)
        dots_RQ = tl.where(live_Q[None, :], dots_RQ, kept_RQ)
        weight_Q = tl.load(weights + token * C + choice_Q, mask=live_Q | done_Q, other=0.0).to(tl.float32)
        total_R += tl.sum(dots_RQ * weight_Q[None, :], axis=1)
    tl.store(out + token * stride_o + row_R, total_R.to(out.dtype.element_ty), mask=row_R < out_rows)
