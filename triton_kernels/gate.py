"""The fused gate: logits in, weights and ids of the best K out, recency prior and its update inside. One launch.

Every row is a token of its own: tokens of different sequences, or any tokens under a prior that only reads
(`decay=None`). `gate_rows` is the body; the router kernel calls it too.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rule as words
from .cost import held, kept_part, raised
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

# Torch multiplies and adds the recency in two roundings; a contracted multiply-add would differ in the last bit.
# Where one rounding is the definition (addcmul), the kernels say fma.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": False}


@triton.jit
def lanes(NUM: tl.constexpr, MEMBERS: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr):
    """Expert of each lane and whether it is one, [1, BLOCK_G * BLOCK_M]; groups start at multiples of BLOCK_M."""
    lane_1E = tl.arange(0, BLOCK_G * BLOCK_M)[None, :]
    if NUM == 1:
        return lane_1E, lane_1E < MEMBERS
    group_1E = lane_1E // BLOCK_M
    member_1E = lane_1E % BLOCK_M
    return group_1E * MEMBERS + member_1E, (member_1E < MEMBERS) & (group_1E < NUM)


@triton.jit
def gate_rows(
    rows_T1, num_rows, logits, stride_t, stride_e, bias, recency, stride_b, gain, flags, weights, ids,
    decay, added, held_count, fill, eps, scaling,
    E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, LAST: tl.constexpr,
    SCORE: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, NUM: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, CHOSEN_SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    NULL_FROM: tl.constexpr, MOVES: tl.constexpr, CAN_CLASH: tl.constexpr, PRICE: tl.constexpr,
):  # fmt: skip
    """Gate BLOCK_T rows; `rows_T1` int64 [BLOCK_T, 1], those >= num_rows are left alone. See `launch_gate`."""
    OWN: tl.constexpr = recency is not None and PRICE != NO_PRICE and (CHOSEN_SOFTMAX or NORMALIZE)
    experts_1E, valid_1E = lanes(NUM, E // NUM, BLOCK_G, BLOCK_M)
    real_T1 = rows_T1 < num_rows
    mask_TE = real_T1 & valid_1E
    # All loads first: their latencies overlap.
    logits_TE = tl.load(logits + rows_T1 * stride_t + experts_1E * stride_e, mask=mask_TE, other=0.0).to(tl.float32)
    if recency is not None:
        recency_TE = tl.load(recency + rows_T1 * stride_b + experts_1E, mask=mask_TE, other=0.0)
        scale = tl.load(gain)
        if flags is not None:
            flags_T1 = tl.load(flags + rows_T1, mask=real_T1, other=0).to(tl.int32)
    choice_TE = choices(
        logits_TE, bias, experts_1E, valid_1E, fill, SCORE, RANK, GROUPS, NUM, KEPT, BLOCK_T, BLOCK_G, BLOCK_M
    )
    if recency is not None:
        if flags is not None and MOVES:
            recency_TE = tl.where((flags_T1 & RESTART) != 0, 0.0, recency_TE)
        if PRICE == NO_PRICE:
            scale_T1 = span(choice_TE, valid_1E) * scale
            if flags is not None:
                scale_T1 = tl.where((flags_T1 & PADDING) != 0, 0.0, scale_T1)
            choice_TE = tl.fma(recency_TE, tl.broadcast_to(scale_T1, choice_TE.shape), choice_TE)
        else:
            own_TE = valid_1E
            if OWN:
                keys_TE = tl.where(valid_1E, to_keys(choice_TE), NO_EXPERT)
                ids_TK, own_TE = best_experts(keys_TE, experts_1E, K, BLOCK_K, LAST, CAN_CLASH, E > K)
                mask_TK = real_T1 & (tl.arange(0, BLOCK_K)[None, :] < K)
                own_TK = tl.load(logits + rows_T1 * stride_t + ids_TK * stride_e, mask=mask_TK, other=0.0)
            plain_TE, raised_TE = raised(choice_TE, logits_TE, scale, own_TE, valid_1E, RANK, PRICE)
            if flags is not None:
                plain_TE = tl.where((flags_T1 & PADDING) != 0, choice_TE, plain_TE)
                raised_TE = tl.where((flags_T1 & PADDING) != 0, choice_TE, raised_TE)
            choice_TE = tl.where(held(recency_TE, valid_1E, held_count), raised_TE, plain_TE)
    keys_TE = tl.where(valid_1E, to_keys(choice_TE), NO_EXPERT)
    ids_TK, chosen_TE = best_experts(keys_TE, experts_1E, K, BLOCK_K, LAST, CAN_CLASH, E > K)
    if MOVES:
        moved_TE = recency_TE * decay + tl.where(chosen_TE, added, 0.0)
        if flags is not None:
            moved_TE = tl.where((flags_T1 & PADDING) != 0, recency_TE, moved_TE)
        tl.store(recency + rows_T1 * stride_b + experts_1E, moved_TE, mask=mask_TE)
    # The chosen logits are in the first-level cache by now: cheaper than carrying them through the ranking.
    ranks_1K = tl.arange(0, BLOCK_K)[None, :]
    mask_TK = real_T1 & (ranks_1K < K)
    logits_TK = tl.load(logits + rows_T1 * stride_t + ids_TK * stride_e, mask=mask_TK, other=0.0).to(tl.float32)
    top_T1 = 0.0
    total_T1 = 1.0
    if SCORE == SOFTMAX and not CHOSEN_SOFTMAX:
        top_T1, total_T1 = softmax_terms(logits_TE, valid_1E)
    weights_TK = weigh(
        logits_TK, ids_TK, top_T1, total_T1, eps, scaling, K, BLOCK_K, SCORE, CHOSEN_SOFTMAX, NORMALIZE, NULL_FROM
    )
    if OWN:
        weights_TK *= kept_part(
            logits_TK, own_TK.to(tl.float32), top_T1, total_T1, eps, K, BLOCK_K, SCORE, CHOSEN_SOFTMAX
        )
    tl.store(weights + rows_T1 * K + ranks_1K, weights_TK, mask=mask_TK)
    tl.store(ids + rows_T1 * K + ranks_1K, ids_TK.to(tl.int64), mask=mask_TK)


# Gains and flags may be views into larger tensors: their alignment must not decide which binary runs.
@triton.jit(do_not_specialize=["num_rows", "gain", "flags", "held_count"])
def gate_kernel(
    num_rows, logits, stride_t, stride_e, bias, recency, stride_b, gain, flags, weights, ids,
    decay, added, held_count, fill, eps, scaling,
    E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, LAST: tl.constexpr,
    SCORE: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, NUM: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, CHOSEN_SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    NULL_FROM: tl.constexpr, MOVES: tl.constexpr, CAN_CLASH: tl.constexpr, PRICE: tl.constexpr,
):  # fmt: skip
    """Program i gates rows i * BLOCK_T and on."""
    rows_T1 = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    gate_rows(
        rows_T1, num_rows, logits, stride_t, stride_e, bias, recency, stride_b, gain, flags, weights, ids,
        decay, added, held_count, fill, eps, scaling, E, K, BLOCK_K, BLOCK_T, LAST, SCORE, RANK, GROUPS, NUM, KEPT,
        BLOCK_G, BLOCK_M, CHOSEN_SOFTMAX, NORMALIZE, NULL_FROM, MOVES, CAN_CLASH, PRICE,
    )  # fmt: skip


def ranking(
    rule: Rule, num_experts: int, k: int, dtype: torch.dtype, prior: bool, held_count: int | None = None
) -> dict[str, Any]:
    """Compile-time facts of scoring and ranking, by parameter name of the kernels."""
    shared = rule.normalize or (rule.rank == words.BY_LOGIT and rule.chosen_softmax)
    groups = rule.num_groups if rule.grouped else 1
    members = num_experts // groups
    narrow = dtype in (torch.float16, torch.bfloat16)
    return {
        "E": num_experts,
        "K": k,
        "BLOCK_K": triton.next_power_of_2(k),
        "LAST": triton.next_power_of_2(num_experts) - 1,
        "SCORE": rule.score,
        "RANK": rule.rank,
        "GROUPS": rule.groups if rule.grouped else words.NO_GROUPS,
        "NUM": groups,
        "KEPT": rule.kept_groups,
        "BLOCK_G": triton.next_power_of_2(groups),
        "BLOCK_M": triton.next_power_of_2(members),
        # Sixteen bits of logit leave the low bits of a key alone, as long as nothing is added to them.
        "PRICE": words.NO_PRICE if held_count is None else words.BY_SHARE if shared else words.BY_ITSELF,
        "CAN_CLASH": not (narrow and rule.rank == words.BY_LOGIT and not prior),
    }


def weighing(rule: Rule) -> dict[str, Any]:
    """Compile-time facts of the weights, by parameter name of the kernels."""
    return {
        "SCORE": rule.score,
        "CHOSEN_SOFTMAX": rule.chosen_softmax,
        "NORMALIZE": rule.normalize,
        "NULL_FROM": -1 if rule.null_from is None else rule.null_from,
    }


def rows_per_program(tokens: int, lanes_per_row: int) -> int:
    """Rows of a program, which always is one warp: with more, Triton lays rows of over 128 values across warps, and
    every reduction waits at barriers.

    Up to 1024 tokens (eight for each multiprocessor of an H200) a token has its own program: least latency. Then rows
    share programs, since what one row costs beside its values (reductions, addresses, weights) is shared as well: up
    to 32 values a thread, which leaves registers for 16 programs or more on a multiprocessor.
    """
    if tokens <= 1024:
        return 1
    return max(1, min(2 if tokens <= 4096 else 16, 1024 // lanes_per_row))


def launch_gate(
    logits_TE: Tensor, k: int, rule: Rule, bias_E: Tensor | None = None, recency_BE: Tensor | None = None,
    gain: Tensor | None = None, decay: float | None = None, flags_T: Tensor | None = None,
    out: tuple[Tensor, Tensor] | None = None, block_t: int | None = None, held_count: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weights fp32 [T, K] and ids int64 [T, K], best first.

    logits_TE: fp32, fp16 or bf16, any strides. bias_E: fp32, contiguous. recency_BE: fp32, last stride 1, one row per
    token, or a single one for all if `decay` is None (then it is only read); with a decay it moves on in place.
    gain: fp32, one value. flags_T: uint8 (1 padding, 2 restart). out: contiguous tensors to write instead of new ones.
    block_t: rows of a program, a power of two, instead of what suits the size. held_count: how many experts a priced
    prior prefers, where weights over a sum are over that of the router's own best; None: the bonus is of the span.

    Raises ValueError for a recency of another shape.
    """
    tokens, num_experts = logits_TE.shape
    check_recency(recency_BE, tokens, num_experts)
    weights_TK, ids_TK = out if out is not None else _outputs(logits_TE, k)
    if tokens == 0:
        return weights_TK, ids_TK
    facts = {**ranking(rule, num_experts, k, logits_TE.dtype, recency_BE is not None, held_count), **weighing(rule)}
    block_t = block_t or rows_per_program(tokens, facts["BLOCK_G"] * facts["BLOCK_M"])
    gate_kernel[(triton.cdiv(tokens, block_t),)](
        tokens, logits_TE, logits_TE.stride(0), logits_TE.stride(1), bias_E, recency_BE, row_stride(recency_BE),
        gain, flags_T, weights_TK, ids_TK, *scalars(rule, decay, held_count),
        BLOCK_T=block_t, MOVES=recency_BE is not None and decay is not None, num_warps=1, **facts, **LAUNCH,
    )  # fmt: skip
    return weights_TK, ids_TK


def check_recency(recency_BE: Tensor | None, tokens: int, num_experts: int) -> None:
    """Raises ValueError where a kernel would read beside the recency."""
    if recency_BE is None:
        return
    rows, columns = recency_BE.shape
    if rows not in (1, tokens) or columns != num_experts or recency_BE.stride(1) != 1:
        raise ValueError(f"recency {[rows, columns]} (last stride {recency_BE.stride(1)}) for {tokens} tokens.")


def row_stride(recency_BE: Tensor | None) -> int:
    """Steps between rows of the recency; 0 where all tokens share one."""
    return 0 if recency_BE is None or recency_BE.shape[0] == 1 else recency_BE.stride(0)


def scalars(
    rule: Rule, decay: float | None, held_count: int | None = None
) -> tuple[float, float, int, float, float, float]:
    """decay, what a chosen expert gains, how many are held, fill, eps, scaling."""
    decay = 0.0 if decay is None else decay
    return decay, 1.0 - decay, held_count or 0, rule.fill, rule.eps, rule.scaling


def _outputs(logits_TE: Tensor, k: int) -> tuple[Tensor, Tensor]:
    tokens = logits_TE.shape[0]
    return (
        torch.empty((tokens, k), dtype=torch.float32, device=logits_TE.device),
        torch.empty((tokens, k), dtype=torch.int64, device=logits_TE.device),
    )
