"""The scan: whole sequences, token after token, recency in registers, one program per sequence.

Only the choice of experts depends on the token before. So the scan kernel writes ids alone, and scores, span and loads
of the next tokens are worked out beside the chain of choices; the weights of all tokens follow in parallel. Where a
priced prior leaves weights as shares of the sum of the router's own best, the ids of these are written as well.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .cost import held, kept_part, raised
from .gate import LAUNCH, lanes, ranking, rows_per_program, scalars, weighing
from .rule import Rule
from .scoring import (
    NO_EXPERT,
    NO_PRICE,
    PADDING,
    RESTART,
    SOFTMAX,
    best_experts,
    choices,
    softmax_terms,
    span,
    to_keys,
    weigh,
)


@triton.jit
def _token(step, num_steps, logits, stride_e, flags, experts_1E, valid_1E):
    """fp32 logits [1, E] and flags [1, 1] of a token; zeros behind the last. Pointers stand at the token."""
    zero_T1 = tl.zeros((1, 1), tl.int32)
    inside = zero_T1 + step < num_steps
    logits_TE = tl.load(logits + experts_1E * stride_e, mask=valid_1E & inside, other=0.0).to(tl.float32)
    flag_T1 = zero_T1
    if flags is not None:
        flag_T1 = tl.load(flags + zero_T1, mask=inside, other=0).to(tl.int32)
    return logits_TE, flag_T1


@triton.jit
def _ranks(
    step, num_steps, choice_TE, logits_TE, flag_T1, strength, own, experts_1E, valid_1E, FLAGGED: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, LAST: tl.constexpr, RANK: tl.constexpr,
    CAN_CLASH: tl.constexpr, PRICE: tl.constexpr,
):  # fmt: skip
    """By what a token's experts rank, fp32 [1, E], and what the recency is multiplied with, [1, 1]; of a priced prior:
    by what experts rank that are not held, and by what held ones do. Padding ranks by its choice values.

    own: None, or where the ids of the token's best without a prior are stored, K in number; not behind the last token.
    """
    if PRICE == NO_PRICE:
        plain_TE = choice_TE
        extra_TN = span(choice_TE, valid_1E) * strength
        if FLAGGED:
            extra_TN = tl.where((flag_T1 & PADDING) != 0, 0.0, extra_TN)
    else:
        own_TE = valid_1E
        if own is not None:
            keys_TE = tl.where(valid_1E, to_keys(choice_TE), NO_EXPERT)
            ids_TK, own_TE = best_experts(keys_TE, experts_1E, K, BLOCK_K, LAST, CAN_CLASH, E > K)
            ranks_1K = tl.arange(0, BLOCK_K)[None, :]
            inside = tl.zeros((1, 1), tl.int32) + step < num_steps
            tl.store(own + ranks_1K, ids_TK, mask=(ranks_1K < K) & inside)
        plain_TE, extra_TN = raised(choice_TE, logits_TE, strength, own_TE, valid_1E, RANK, PRICE)
        if FLAGGED:
            plain_TE = tl.where((flag_T1 & PADDING) != 0, choice_TE, plain_TE)
            extra_TN = tl.where((flag_T1 & PADDING) != 0, choice_TE, extra_TN)
    return plain_TE, extra_TN


@triton.jit(do_not_specialize=["num_steps", "gain", "flags", "held_count"])
def scan_kernel(
    num_steps, logits, stride_t, stride_e, bias, recency, stride_b, gain, flags, own, ids, decay, added, held_count,
    fill, E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, LAST: tl.constexpr, SCORE: tl.constexpr,
    RANK: tl.constexpr, GROUPS: tl.constexpr, NUM: tl.constexpr, KEPT: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr, CAN_CLASH: tl.constexpr, PRICE: tl.constexpr,
):  # fmt: skip
    """Program b walks through the num_steps tokens of sequence b.

    own: int32 [T, K] for the ids of the router's own best, of a priced prior whose weights are shares of their sum;
    else None.
    """
    sequence = tl.program_id(0).to(tl.int64)
    experts_1E, valid_1E = lanes(NUM, E // NUM, BLOCK_G, BLOCK_M)
    ranks_1K = tl.arange(0, BLOCK_K)[None, :]
    first = sequence * num_steps
    logits += first * stride_t
    ids += first * K
    if own is not None:
        own += first * K
    if flags is not None:
        flags += first
    recency += sequence * stride_b
    strength = tl.load(gain)
    recency_TE = tl.load(recency + experts_1E, mask=valid_1E, other=0.0)
    # One token ahead in choice and what is added to it, two ahead in loads.
    logits_TE, flag_T1 = _token(0, num_steps, logits, stride_e, flags, experts_1E, valid_1E)
    choice_TE = choices(
        logits_TE, bias, experts_1E, valid_1E, fill, SCORE, RANK, GROUPS, NUM, KEPT, 1, BLOCK_G, BLOCK_M
    )
    choice_TE, extra_TN = _ranks(
        0, num_steps, choice_TE, logits_TE, flag_T1, strength, own, experts_1E, valid_1E, flags is not None, E, K,
        BLOCK_K, LAST, RANK, CAN_CLASH, PRICE,
    )  # fmt: skip
    if flags is not None:
        flags += 1
    logits += stride_t
    later_TE, later_flag_T1 = _token(1, num_steps, logits, stride_e, flags, experts_1E, valid_1E)
    for step in range(num_steps):
        logits += stride_t
        if flags is not None:
            flags += 1
        fetched_TE, fetched_flag_T1 = _token(step + 2, num_steps, logits, stride_e, flags, experts_1E, valid_1E)
        next_TE = choices(
            later_TE, bias, experts_1E, valid_1E, fill, SCORE, RANK, GROUPS, NUM, KEPT, 1, BLOCK_G, BLOCK_M
        )
        if own is not None:
            own += K
        next_TE, next_extra_TN = _ranks(
            step + 1, num_steps, next_TE, later_TE, later_flag_T1, strength, own, experts_1E, valid_1E,
            flags is not None, E, K, BLOCK_K, LAST, RANK, CAN_CLASH, PRICE,
        )  # fmt: skip
        if flags is not None:
            recency_TE = tl.where((flag_T1 & RESTART) != 0, 0.0, recency_TE)
        if PRICE == NO_PRICE:
            ranked_TE = tl.fma(recency_TE, tl.broadcast_to(extra_TN, choice_TE.shape), choice_TE)
        else:
            ranked_TE = tl.where(held(recency_TE, valid_1E, held_count), extra_TN, choice_TE)
        keys_TE = tl.where(valid_1E, to_keys(ranked_TE), NO_EXPERT)
        ids_TK, chosen_TE = best_experts(keys_TE, experts_1E, K, BLOCK_K, LAST, CAN_CLASH, E > K)
        tl.store(ids + ranks_1K, ids_TK.to(tl.int64), mask=ranks_1K < K)
        ids += K
        moved_TE = recency_TE * decay + tl.where(chosen_TE, added, 0.0)
        if flags is not None:
            moved_TE = tl.where((flag_T1 & PADDING) != 0, recency_TE, moved_TE)
        recency_TE = moved_TE
        choice_TE = next_TE
        extra_TN = next_extra_TN
        flag_T1 = later_flag_T1
        later_TE = fetched_TE
        later_flag_T1 = fetched_flag_T1
    tl.store(recency + experts_1E, recency_TE, mask=valid_1E)


@triton.jit(do_not_specialize=["num_rows"])
def weigh_kernel(
    num_rows, logits, stride_t, stride_e, own, ids, weights, eps, scaling,
    E: tl.constexpr, BLOCK_E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr,
    SCORE: tl.constexpr, CHOSEN_SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, NULL_FROM: tl.constexpr,
):  # fmt: skip
    """Weights of experts that are already chosen; whole rows are read only where a softmax needs their sum.

    own: ids int32 [T, K] of the router's own best, of whose sum the weights are shares; None: of that of the chosen.
    """
    rows_T1 = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    ranks_1K = tl.arange(0, BLOCK_K)[None, :]
    real_T1 = rows_T1 < num_rows
    mask_TK = real_T1 & (ranks_1K < K)
    ids_TK = tl.load(ids + rows_T1 * K + ranks_1K, mask=mask_TK, other=0).to(tl.int32)
    logits_TK = tl.load(logits + rows_T1 * stride_t + ids_TK * stride_e, mask=mask_TK, other=0.0).to(tl.float32)
    top_T1 = 0.0
    total_T1 = 1.0
    if SCORE == SOFTMAX and not CHOSEN_SOFTMAX:
        experts_1E = tl.arange(0, BLOCK_E)[None, :]
        logits_TE = tl.load(
            logits + rows_T1 * stride_t + experts_1E * stride_e, mask=real_T1 & (experts_1E < E), other=0.0
        ).to(tl.float32)
        top_T1, total_T1 = softmax_terms(logits_TE, experts_1E < E)
    weights_TK = weigh(
        logits_TK, ids_TK, top_T1, total_T1, eps, scaling, K, BLOCK_K, SCORE, CHOSEN_SOFTMAX, NORMALIZE, NULL_FROM
    )
    if own is not None:
        own_ids_TK = tl.load(own + rows_T1 * K + ranks_1K, mask=mask_TK, other=0)
        own_TK = tl.load(logits + rows_T1 * stride_t + own_ids_TK * stride_e, mask=mask_TK, other=0.0).to(tl.float32)
        weights_TK *= kept_part(logits_TK, own_TK, top_T1, total_T1, eps, K, BLOCK_K, SCORE, CHOSEN_SOFTMAX)
    tl.store(weights + rows_T1 * K + ranks_1K, weights_TK, mask=mask_TK)


def launch_scan(
    logits_TE: Tensor, k: int, rule: Rule, bias_E: Tensor | None, recency_BE: Tensor, gain: Tensor, decay: float,
    flags_T: Tensor | None = None, out: tuple[Tensor, Tensor] | None = None, held_count: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights fp32 [T, K] and ids int64 [T, K] of B sequences of T / B tokens each, sequence after sequence.

    Arguments as for `launch_gate`; recency_BE has one row per sequence and moves on in place over all its tokens. A
    warp per sequence: the chain of choices is what takes the time, and more warps would only add barriers to it.
    """
    tokens, num_experts = logits_TE.shape
    sequences = recency_BE.shape[0]
    if out is None:
        weights_TK = torch.empty((tokens, k), dtype=torch.float32, device=logits_TE.device)
        ids_TK = torch.empty((tokens, k), dtype=torch.int64, device=logits_TE.device)
    else:
        weights_TK, ids_TK = out
    if tokens == 0:
        return weights_TK, ids_TK
    own_TK = None
    if held_count is not None and rule.divides:
        own_TK = torch.empty((tokens, k), dtype=torch.int32, device=logits_TE.device)
    strides = logits_TE.stride()
    facts = ranking(rule, num_experts, k, logits_TE.dtype, True, held_count)
    decay, added, count, fill, eps, scaling = scalars(rule, decay, held_count)
    scan_kernel[(sequences,)](
        tokens // sequences, logits_TE, *strides, bias_E, recency_BE, recency_BE.stride(0), gain, flags_T, own_TK,
        ids_TK, decay, added, count, fill, num_warps=1, **facts, **LAUNCH,
    )  # fmt: skip
    block_e = triton.next_power_of_2(num_experts)
    block_t = rows_per_program(tokens, block_e)
    weigh_kernel[(triton.cdiv(tokens, block_t),)](
        tokens, logits_TE, *strides, own_TK, ids_TK, weights_TK, eps, scaling,
        E=num_experts, BLOCK_E=block_e, K=k, BLOCK_K=facts["BLOCK_K"], BLOCK_T=block_t, num_warps=1,
        **weighing(rule), **LAUNCH,
    )  # fmt: skip
    return weights_TK, ids_TK
