"""Priced recency in the gating kernels: which experts are held, and by what they rank then.

The definition is `gating/cost.py` of the package that launches these; tiles and keys are those of `scoring.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rule
from .scoring import (
    BY_LOGIT,
    BY_SCORE,
    NO_EXPERT,
    SIGMOID,
    best_experts,
    scores,
    softmax_terms,
    softplus,
    to_keys,
)

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
def raised(
    choice_TE, logits_TE, gain, experts_1E, valid_1E, K: tl.constexpr, BLOCK_K: tl.constexpr, LAST: tl.constexpr,
    CAN_CLASH: tl.constexpr, MORE: tl.constexpr, SCORE: tl.constexpr, RANK: tl.constexpr, PRICE: tl.constexpr,
):  # fmt: skip
    """By what experts rank, fp32 [T, E] each: those that are not held, and held ones. gain: fp32 scalar."""
    chosen_TE = valid_1E
    if PRICE == BY_SHARE:
        keys_TE = tl.where(valid_1E, to_keys(choice_TE), NO_EXPERT)
        _, chosen_TE = best_experts(keys_TE, experts_1E, K, BLOCK_K, LAST, CAN_CLASH, MORE)
    if RANK == BY_SCORE:
        scale = gain
        if PRICE == BY_SHARE:
            scale = tl.abs(tl.sum(tl.where(chosen_TE, choice_TE, 0.0), axis=1, keep_dims=True)) * gain
        is_priced = (scale > 0.0) & (scale * scale < float("inf"))
        scale_TE = tl.broadcast_to(scale, choice_TE.shape)
        positive_TE = tl.where(choice_TE > 0.0, choice_TE, 0.0)
        root_TE = tl.sqrt_rn(positive_TE * positive_TE + scale_TE * scale_TE) + scale_TE
        held_TE = tl.div_rn(positive_TE, root_TE) * positive_TE + scale_TE + (choice_TE - positive_TE)
        held_TE = tl.where(tl.abs(choice_TE) < float("inf"), held_TE, choice_TE)
        plain_TE = choice_TE
    elif RANK == BY_LOGIT:
        top_T1, total_T1 = softmax_terms(choice_TE, chosen_TE)
        base = top_T1 + tl.log(total_T1) + tl.log(gain)
        is_priced = tl.abs(base) < float("inf")
        plain_TE = (choice_TE - base) * 2.0
        tail_TE = tl.where(plain_TE > float("-inf"), PRICE_TAIL / -plain_TE, plain_TE)
        held_TE = tl.where(plain_TE < PRICE_FLOOR, tail_TE, softplus(plain_TE))
    else:
        base = tl.log(gain)
        if PRICE == BY_SHARE:
            score_TE = tl.where(chosen_TE, scores(logits_TE, 0.0, 1.0, SIGMOID), 0.0)
            base = tl.log(tl.sum(score_TE, axis=1, keep_dims=True)) + base
        is_priced = tl.abs(base) < float("inf")
        plain_TE = choice_TE - base
        priced_TE = 0.5 * softplus((-softplus(-logits_TE) - base) * 2.0)
        held_TE = priced_TE + softplus(logits_TE) + (choice_TE - logits_TE)
        held_TE = tl.where(tl.abs(held_TE) < float("inf"), held_TE, plain_TE)
    # A row with NaN or infinities among its best has no prices, nor has a gain of 0.
    return tl.where(is_priced, plain_TE, choice_TE), tl.where(is_priced, held_TE, choice_TE)
