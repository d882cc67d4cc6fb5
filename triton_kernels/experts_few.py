"""Experts of a few tokens straight from a pool of slots: two gather-GEMV kernels for every coding of the weights.

Threads lie on tiles [R, Q, L]: L along columns, Q along rows (first product) or choices (second one), while R rows are
a thread's own and share what it has read of the hidden state. Of a row and tile a thread reads 16 bytes of codes at
most, and the one scale that they need: neither codes nor scales move between threads, only sums do. Values of four and
eight bits become floats by bit patterns, since conversions of integers take four times as long as other instructions.
All further axes of a tile (W words of 4 bytes, P values of a word) are inside a thread: their shifts are constants.

Kinds and functions are words of slots.py, written out: Triton compares globals of kernels at every launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import slots as words

# What `values_of` sets beside a code: exponents of 16 and 256.
BASES = {words.INT4: 0x41800000, words.INT8: 0x43C00000}
# Pointers of unknown alignment are read one value a thread, as the tiles above want their scales. Of the rest, where a
# caller's slots and weights begin must not choose among binaries.
SCATTERED = ["scales", "stride_s", "minima", "stride_m", "slots"]


@triton.jit
def activated(gate, up, FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr):
    """`function(gate) * (up + shift)` in fp32, see `slots.Activation`; LIMIT None: nothing is cut."""
    if LIMIT is not None:
        gate = tl.minimum(gate, LIMIT)
        up = tl.minimum(tl.maximum(up, -LIMIT), LIMIT)
    if FUNCTION == "silu":
        gate = gate / (1.0 + tl.exp(-ALPHA * gate))
    elif FUNCTION == "gelu":
        gate = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    elif FUNCTION == "gelu_tanh":
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
    if KIND == "int4":
        # A code is four bits of a mantissa, worth 1 to 8. Odd ones lie four bits lower: two can share a shift.
        number = tl.arange(0, 8)[None, None, None, None, :]
        codes = ((word >> (4 * number)) & 15) << (19 - 4 * (number % 2))
        values = (codes | (base + 0x02000000 * (number % 2)).to(tl.uint32)).to(tl.float32, bitcast=True)
    elif KIND == "int8":
        # A code is eight bits of a mantissa, of which the highest, its sign, is turned over.
        codes = ((word >> (8 * tl.arange(0, 4)[None, None, None, None, :])) & 255) << 15
        values = (codes ^ base.to(tl.uint32)).to(tl.float32, bitcast=True)
    else:
        # Sign, exponent and mantissa can stand as such in an fp16: subnormal ones of both formats are exact there.
        J: tl.constexpr = 4 if KIND == "mxfp4" else 2
        j = tl.arange(0, J)[None, None, None, None, :]
        if KIND == "mxfp4":
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
def load(pointers, mask, MASKED: tl.constexpr):
    """What lies there, 0 where masked."""
    if MASKED:
        values = tl.load(pointers, mask=mask, other=0)
    else:
        values = tl.load(pointers)
    return values


@triton.jit
def scales_of(pointers, mask, MASKED: tl.constexpr, KIND: tl.constexpr):
    """fp32 scales or minima; E8M0 is the exponent of an fp32."""
    values = load(pointers, mask, MASKED)
    if KIND == "mxfp4":
        # The smallest, 2^-127, is subnormal.
        found = tl.where(values == 0, 0x00400000, values.to(tl.uint32) << 23).to(tl.float32, bitcast=True)
    else:
        found = values.to(tl.float32)
    return found


@triton.jit
def products(
    base, x_Q1, codes_M1, scales_M1, minima_M1, live_Q1, live_M1, K: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, VALUES: tl.constexpr, PLACED: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr,
    Q: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Rows of K columns times hidden values, fp32 [R, Q]. Row m of M = R * Q is of thread m % Q.

    Tiles are read as [M, L * ...]: with two axes of which one is contiguous, threads go along that in every Triton.

    base: see `values_of`.
    x_Q1: pointers to hidden values; PLACED: chunks of eight lie as `up_kernel` leaves them.
    codes_M1, scales_M1, minima_M1: pointers to the first of a row; minima may be None.
    live_Q1, live_M1: what is read at all; MASKED: whether that or the number of columns leaves anything out.
    VALUES: numbers in 4 bytes of codes; of FLOAT, numbers that a thread reads at a time.
    """
    # Columns of a thread in one read, the columns of a tile.
    OWN: tl.constexpr = VALUES if KIND == "float" else CHUNKS * 8
    TILE: tl.constexpr = L * OWN
    if KIND == "float":
        column_1T = tl.arange(0, TILE)[None, :]
        # A thread reads its columns at once where all or none of them are inside.
        last_1T = column_1T // VALUES * VALUES if K % VALUES == 0 else column_1T
        total_RQT = tl.full((R, Q, TILE), 0.0, tl.float32)
        next_MT = load(codes_M1 + column_1T, (last_1T < K) & live_M1, MASKED)
        for start in tl.range(0, K, TILE, loop_unroll_factor=UNROLL):
            weight_MT = next_MT
            if K > TILE:
                next_MT = load(codes_M1 + (start + TILE + column_1T), (start + TILE + last_1T < K) & live_M1, True)
            hidden_QT = load(x_Q1 + (start + column_1T), (start + last_1T < K) & live_Q1, MASKED)
            total_RQT += tl.reshape(weight_MT.to(tl.float32), (R, Q, TILE)) * hidden_QT.to(tl.float32)[None, :, :]
        sum_RQ = tl.sum(total_RQT, axis=2)
    else:
        WORDS: tl.constexpr = OWN // VALUES
        OFFSET: tl.constexpr = (KIND == "int4") | (KIND == "int8")
        lane_1L = tl.arange(0, L)[None, :]
        word_1W = tl.arange(0, L * WORDS)[None, :]
        value_1V = tl.arange(0, L * 8)[None, :]
        # A chunk of a thread: in its place, or beside those of other threads.
        spread_1V = value_1V if PLACED else value_1V // 8 * OWN + value_1V % 8
        APART: tl.constexpr = L * 8 if PLACED else 8
        # What `values_of` puts beside a code, and the 8 that a symmetric code of four bits has beside it.
        if KIND == "int4":
            zero: tl.constexpr = 16.0 if minima_M1 is not None else 24.0
            offset_118 = zero + 240.0 * (tl.arange(0, 8)[None, None, :] % 2)
        else:
            offset_118 = 384.0
        total_RQL = tl.full((R, Q, L), 0.0, tl.float32)
        # Codes are read a tile ahead of what is computed with them.
        next_MW = load(codes_M1 + word_1W, (word_1W // WORDS * OWN < K) & live_M1, MASKED)
        for start in tl.range(0, K, TILE, loop_unroll_factor=UNROLL):
            tile_MW = next_MW
            if K > TILE:
                inside_1W = start + TILE + word_1W // WORDS * OWN < K
                next_MW = load(codes_M1 + ((start + TILE) // VALUES + word_1W), inside_1W & live_M1, True)
            tile_RQLW = tl.reshape(tile_MW, (R, Q, L, WORDS)).to(tl.uint32, bitcast=True)
            inside_ML = (start + lane_1L * OWN < K) & live_M1
            # The hint is for older Triton, which would lay threads across rows where scales are alike in a row.
            group_1L = tl.max_contiguous((start + lane_1L * OWN) // GROUP, (1, L))
            scale_RQL = tl.reshape(scales_of(scales_M1 + group_1L, inside_ML, MASKED, KIND), (R, Q, L))
            if minima_M1 is not None:
                minimum_RQL = tl.reshape(scales_of(minima_M1 + group_1L, inside_ML, MASKED, KIND), (R, Q, L))
                sum_QL8 = tl.full((Q, L, 8), 0.0, tl.float32)
            part_RQL8 = tl.full((R, Q, L, 8), 0.0, tl.float32)
            beside_QL8 = tl.full((Q, L, 8), 0.0, tl.float32)
            inside_QV = (start + value_1V // 8 * OWN < K) & live_Q1
            for chunk in tl.static_range(CHUNKS):
                hidden_QV = load(x_Q1 + (start + chunk * APART + spread_1V), inside_QV, MASKED)
                hidden_QL8 = tl.reshape(hidden_QV.to(tl.float32), (Q, L, 8))
                if not OFFSET:
                    hidden_QL8 = interleaved(hidden_QL8, 8 // VALUES)
                words_RQLW = chunk_of(tile_RQLW, chunk, CHUNKS)
                part_RQL8 += values_of(words_RQLW, base, KIND) * hidden_QL8[None, :, :, :]
                if OFFSET:
                    beside_QL8 += hidden_QL8 * offset_118
                if minima_M1 is not None:
                    sum_QL8 += hidden_QL8
            part_RQL = tl.sum(part_RQL8, axis=3)
            if OFFSET:
                part_RQL -= tl.sum(beside_QL8, axis=2)[None, :, :]
            total_RQL += scale_RQL * part_RQL
            if minima_M1 is not None:
                total_RQL += minimum_RQL * tl.sum(sum_QL8, axis=2)[None, :, :]
        sum_RQ = tl.sum(total_RQL, axis=2)
        if KIND == "mxfp4":
            sum_RQ *= 16384.0
        elif KIND == "fp8":
            sum_RQ *= 256.0
    return sum_RQ


@triton.jit
def scale_row(row, ROWS: tl.constexpr, KIND: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr):
    """The row of scales for a row of a matrix [ROWS, ...]; blocks of FP8 have as many rows as columns."""
    if KIND != "fp8":
        found = row
    elif HALVES:
        half = row // (ROWS // 2)
        found = half * ((ROWS // 2 + GROUP - 1) // GROUP) + (row - half * (ROWS // 2)) // GROUP
    else:
        found = row // GROUP
    return found


@triton.jit(do_not_specialize=["base"], do_not_specialize_on_alignment=SCATTERED)
def up_kernel(
    base, x, stride_x, slots, codes, stride_c, scales, stride_s, minima, stride_m, bias, stride_b, hidden,
    C: tl.constexpr, INNER: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, VALUES: tl.constexpr, INTERLEAVED: tl.constexpr,
    FUNCTION: tl.constexpr, ALPHA: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, DOWN_L: tl.constexpr,
    DOWN_CHUNKS: tl.constexpr, MASKED: tl.constexpr, R: tl.constexpr, Q: tl.constexpr, L: tl.constexpr,
    CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
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
        half_M1 = tl.arange(0, 2 * R * Q)[:, None] // (R * Q)
        row_M1 = tl.program_id(0) * (R * Q) + tl.arange(0, 2 * R * Q)[:, None] % (R * Q)
        if INNER % (R * Q):
            row_M1 = tl.minimum(row_M1, INNER - 1)
        row_M1 = row_M1 * 2 + half_M1 if INTERLEAVED else row_M1 + half_M1 * INNER
        scales_M1 = None
        minima_M1 = None
        if scales is not None:
            scale_M1 = scale_row(row_M1, 2 * INNER, KIND, GROUP, HALVES) * ((K + GROUP - 1) // GROUP)
            scales_M1 = scales + slot * stride_s + scale_M1
            if minima is not None:
                minima_M1 = minima + slot * stride_m + scale_M1
        dots_RQ = products(
            base, x + (pair // C).to(tl.int64) * stride_x + tl.arange(0, Q)[:, None] * 0,
            codes + slot * stride_c + row_M1 * (K if KIND == "float" else K // VALUES), scales_M1, minima_M1, True,
            True, K, KIND, GROUP, VALUES, False, MASKED, 2 * R, Q, L, CHUNKS, UNROLL,
        )  # fmt: skip
        if bias is not None:
            dots_RQ += tl.reshape(tl.load(bias + slot * stride_b + row_M1), (2 * R, Q)).to(tl.float32)
        gate_RQ, up_RQ = tl.split(tl.permute(tl.reshape(dots_RQ, (2, R, Q)), (1, 2, 0)))
        value_RQ = activated(gate_RQ, up_RQ, FUNCTION, ALPHA, LIMIT, SHIFT)
        column_RQ = tl.program_id(0) * (R * Q) + tl.arange(0, R)[:, None] * Q + tl.arange(0, Q)[None, :]
        chunk_RQ = column_RQ // 8
        in_tile_RQ = chunk_RQ % (DOWN_L * DOWN_CHUNKS)
        moved_RQ = chunk_RQ - in_tile_RQ + (in_tile_RQ % DOWN_CHUNKS) * DOWN_L + in_tile_RQ // DOWN_CHUNKS
        target_RQ = hidden + pair.to(tl.int64) * WIDTH + moved_RQ * 8 + column_RQ % 8
        tl.store(target_RQ, value_RQ.to(hidden.dtype.element_ty), mask=column_RQ < INNER)


# One binary whether pairs come at once or in turns, so that every sum has the same bits.
@triton.jit(
    do_not_specialize=["base", "pair_rows", "out_rows"], do_not_specialize_on_alignment=[*SCATTERED, "weights", "pairs"]
)
def down_kernel(
    base, pair_rows, out_rows, hidden, slots, weights, codes, stride_c, scales, stride_s, minima, stride_m, bias,
    stride_b, pairs, out, stride_o, C: tl.constexpr, N: tl.constexpr, K: tl.constexpr, WIDTH: tl.constexpr,
    KIND: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr,
    Q: tl.constexpr, L: tl.constexpr, CHUNKS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Program (i, t): R rows from i * R on for token t: the weighted sum over its C choices, Q at a time.

    pair_rows, out_rows: N and 0: the outputs of choices that have a slot go to `pairs` [T, C, N]. 0 and N: the sums go
        to `out`; the outputs of choices that are DONE come from `pairs`.
    """
    token = tl.program_id(1).to(tl.int64)
    row_R = tl.program_id(0) * R + tl.arange(0, R)
    row_M1 = tl.program_id(0) * R + tl.arange(0, R * Q)[:, None] // Q
    if N % R:
        row_M1 = tl.minimum(row_M1, N - 1)
    total_R = tl.full((R,), 0.0, tl.float32)
    for first in tl.static_range(0, C, Q):
        choice_Q = first + tl.arange(0, Q)
        choice_M1 = first + tl.arange(0, R * Q)[:, None] % Q
        slot_Q = tl.load(slots + token * C + choice_Q, mask=choice_Q < C, other=-1)
        slot_M1 = tl.load(slots + token * C + choice_M1, mask=choice_M1 < C, other=-1)
        pair_Q = token * C + tl.minimum(choice_Q, C - 1)
        at_M1 = tl.maximum(slot_M1, 0).to(tl.int64)
        live_Q = slot_Q >= 0
        scales_M1 = None
        minima_M1 = None
        if scales is not None:
            scale_M1 = scale_row(row_M1, N, KIND, GROUP, HALVES) * ((K + GROUP - 1) // GROUP)
            scales_M1 = scales + at_M1 * stride_s + scale_M1
            if minima is not None:
                minima_M1 = minima + at_M1 * stride_m + scale_M1
        dots_RQ = products(
            base, hidden + pair_Q[:, None] * WIDTH,
            codes + at_M1 * stride_c + row_M1 * (K if KIND == "float" else K // VALUES), scales_M1, minima_M1,
            live_Q[:, None], slot_M1 >= 0, K, KIND, GROUP, VALUES, True, True, R, Q, L, CHUNKS, UNROLL,
        )  # fmt: skip
        if bias is not None:
            dots_RQ += tl.reshape(tl.load(bias + at_M1 * stride_b + row_M1), (R, Q)).to(tl.float32)
        # DONE of slots.py.
        done_Q = slot_Q == -2
        pairs_RQ = pairs + pair_Q[None, :] * N + row_R[:, None]
        tl.store(pairs_RQ, dots_RQ, mask=(row_R < pair_rows)[:, None] & live_Q[None, :])
        kept_RQ = tl.load(pairs_RQ, mask=(row_R < out_rows)[:, None] & done_Q[None, :], other=0.0)
        dots_RQ = tl.where(live_Q[None, :], dots_RQ, kept_RQ)
        weight_Q = tl.load(weights + token * C + choice_Q, mask=live_Q | done_Q, other=0.0).to(tl.float32)
        total_R += tl.sum(dots_RQ * weight_Q[None, :], axis=1)
    tl.store(out + token * stride_o + row_R, total_R.to(out.dtype.element_ty), mask=row_R < out_rows)
