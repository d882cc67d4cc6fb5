"""Priced recency in the gating kernels: which experts are held, by what they rank then, and what they weigh.

The definition is `gating/cost.py` of the package that launches these; tiles and keys are those of `scoring.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rule
from .scoring import BY_LOGIT, BY_SCORE, SIGMOID, scores, softmax_terms, softplus

BY_SHARE = tl.constexpr(rule.BY_SHARE)
HELD_ABOVE = tl.constexpr(rule.HELD_ABOVE)
PRICE_FLOOR, PRICE_TAIL = tl.constexpr(rule.PRICE_FLOOR), tl.constexpr(rule.PRICE_TAIL)


@triton.jit
def held(recency_TE, valid_1E, count):
    """bool [T, E]: recencies in [0, 2) of which fewer than `count` are larger, and which are not as good as 0."""
    # Numbers of one sign order as their bits do, and whole sums over a warp take one instruction. The largest number
    # that `count` recencies reach is found bit by bit; of these numbers the first two are 0.
    bits_TE = tl.where(valid_1E, recency_TE, 0.0).to(tl.int32, bitcast=True)
    last_T1 = tl.min(bits_TE, axis=1, keep_dims=True) * 0
    for place in tl.static_range(0, 30):
        probe_T1 = last_T1 | (1 << (29 - place))
        reached_T1 = tl.sum((bits_TE >= probe_T1).to(tl.int32), axis=1, keep_dims=True)
        last_T1 = tl.where(reached_T1 >= count, probe_T1, last_T1)
    return (bits_TE >= last_T1) & (recency_TE >= HELD_ABOVE)


@triton.jit
def raised(choice_TE, logits_TE, gain, own_TE, valid_1E, RANK: tl.constexpr, PRICE: tl.constexpr):
    """By what experts rank, fp32 [T, E] each: those that are not held, and held ones.

    gain: fp32 scalar. own_TE: bool, the best by `choice_TE`; only read where weights are shares of their sum.
    """
    if RANK == BY_SCORE:
        scale = gain
        if PRICE == BY_SHARE:
            scale = tl.abs(tl.sum(tl.where(own_TE, choice_TE, 0.0), axis=1, keep_dims=True)) * gain
        is_priced = (scale > 0.0) & (scale < float("inf"))
        plain_TE = choice_TE
        held_TE = choice_TE + scale
    elif RANK == BY_LOGIT:
        if PRICE == BY_SHARE:
            top_T1, total_T1 = softmax_terms(choice_TE, own_TE)
        else:
            top_T1, total_T1 = softmax_terms(choice_TE, valid_1E)
        base = top_T1 + tl.log(total_T1) + tl.log(gain)
        is_priced = tl.abs(base) < float("inf")
        plain_TE = choice_TE - base
        tail_TE = tl.where(plain_TE > float("-inf"), PRICE_TAIL / -plain_TE, plain_TE)
        held_TE = tl.where(plain_TE < PRICE_FLOOR, tail_TE, softplus(plain_TE))
    else:
        base = tl.log(gain)
        if PRICE == BY_SHARE:
            score_TE = tl.where(own_TE, scores(logits_TE, 0.0, 1.0, SIGMOID), 0.0)
            base = tl.log(tl.sum(score_TE, axis=1, keep_dims=True)) + base
        is_priced = tl.abs(base) < float("inf")
        plain_TE = choice_TE - base
        priced_TE = softplus(-softplus(-logits_TE) - base)
        held_TE = priced_TE + softplus(logits_TE) + (choice_TE - logits_TE)
        held_TE = tl.where(tl.abs(held_TE) < float("inf"), held_TE, plain_TE)
    # A row with NaN or infinities among its best has no prices, nor has a gain of 0.
    return tl.where(is_priced, plain_TE, choice_TE), tl.where(is_priced, held_TE, choice_TE)


@triton.jit
def kept_part(
    logits_TK, own_TK, top_T1, total_T1, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, SCORE: tl.constexpr,
    CHOSEN_SOFTMAX: tl.constexpr,
):  # fmt: skip
    """fp32 [T, 1]: the sum of the chosen experts' scores over that of the router's own best; 1 where it is no number.

    logits_TK, own_TK: logits of the chosen and of the own, best first. The rest as for `weigh`, whose weights times
    this are shares of the sum of the own.
    """
    # Both sums add up in the order of the ranks, and the quotient is rounded right: of the same experts in the same
    # order it is 1 to the bit, so that padding and a gain of 0 weigh as without a prior.
    real_1K = tl.arange(0, BLOCK_K)[None, :] < K
    if CHOSEN_SOFTMAX:
        # Of both, for the chosen of a router that ranks scores with a bias can be above its own.
        highest_TK = tl.where(logits_TK > own_TK, logits_TK, own_TK)
        highest_T1 = tl.max(tl.where(real_1K, highest_TK, float("-inf")), axis=1, keep_dims=True)
        chosen_TK = tl.exp(logits_TK - highest_T1)
        best_TK = tl.exp(own_TK - highest_T1)
    else:
        chosen_TK = scores(logits_TK, top_T1, total_T1, SCORE)
        best_TK = scores(own_TK, top_T1, total_T1, SCORE)
    chosen_T1 = tl.sum(tl.where(real_1K, chosen_TK, 0.0), axis=1, keep_dims=True)
    best_T1 = tl.sum(tl.where(real_1K, best_TK, 0.0), axis=1, keep_dims=True)
    if not CHOSEN_SOFTMAX:
        chosen_T1 += eps
        best_T1 += eps
    part_T1 = tl.div_rn(chosen_T1, best_T1)
    # Neither is NaN below.
    return tl.where(part_T1 < float("inf"), part_T1, 1.0)
