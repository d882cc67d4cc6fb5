"""What all gating kernels share: scores, ranking keys, groups, the span of the prior, the best K, their weights.

Tiles are [tokens, experts]; suffix 1 is a kept axis of length 1. A *key* is a uint32 that orders as
`torch.sort(descending=True, stable=True)` does: the smaller the better, NaN 0, -0.0 equal to 0.0, 0xFFFFFFFF for lanes
that are no expert. Integer minima reduce over a warp in one instruction (redux.sync), float ones take five shuffles.
"""

from __future__ import annotations

import triton
import triton.language as tl

from . import rule

NO_EXPERT = tl.constexpr(0xFFFFFFFF)
PLUS_INF_KEY = tl.constexpr(0x007FFFFF)
MINUS_INF_KEY = tl.constexpr(0xFF7FFFFF)
# A kernel may read a global only if it is a constexpr: these are the numbers of `rule.py` as such.
SOFTMAX, SIGMOID = tl.constexpr(rule.SOFTMAX), tl.constexpr(rule.SIGMOID)
BY_LOGIT, BY_SCORE = tl.constexpr(rule.BY_LOGIT), tl.constexpr(rule.BY_SCORE)
NO_GROUPS, GROUP_TOP2 = tl.constexpr(rule.NO_GROUPS), tl.constexpr(rule.GROUP_TOP2)
PADDING, RESTART = tl.constexpr(rule.PADDING), tl.constexpr(rule.RESTART)
MAX_SPAN, NO_PRICE = tl.constexpr(rule.MAX_SPAN), tl.constexpr(rule.NO_PRICE)


@triton.jit
def to_keys(values):
    """uint32 keys of fp32 values."""
    bits = values.to(tl.uint32, bitcast=True)
    keys = tl.where(bits > 0x7FFFFFFF, bits - 1, 0x7FFFFFFF - bits)
    return tl.where(values != values, tl.zeros_like(keys), keys)


@triton.jit
def from_keys(keys):
    """fp32 values of keys; some NaN for the key of NaN."""
    bits = tl.where(keys > 0x7FFFFFFF, keys + 1, 0x7FFFFFFF - keys)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def softmax_terms(logits_TE, valid_1E):
    """Row maximum and sum of exponentials, [T, 1] each; NaN where torch's softmax gives NaN."""
    keys_TE = tl.where(valid_1E, to_keys(logits_TE), NO_EXPERT)
    top_T1 = from_keys(tl.min(keys_TE, axis=1, keep_dims=True))
    total_T1 = tl.sum(tl.where(valid_1E, tl.exp(logits_TE - top_T1), 0.0), axis=1, keep_dims=True)
    return top_T1, total_T1


@triton.jit
def softplus(values):
    """log(1 + exp(values)), all digits of it."""
    # max(z, 0) + log1p(t), t = exp(-|z|); log1p(t) = 2 atanh(t / (2 + t)) by its series, since the device's fast
    # logarithm loses all digits near 1.
    t = tl.exp(-tl.abs(values))
    ratio = t / (2.0 + t)
    square = ratio * ratio
    series = 1.0 / 13.0 + square * (1.0 / 15.0)
    series = 1.0 / 11.0 + square * series
    series = 1.0 / 9.0 + square * series
    series = 1.0 / 7.0 + square * series
    series = 1.0 / 5.0 + square * series
    series = 1.0 / 3.0 + square * series
    positive = tl.where(values > 0.0, values, 0.0)
    return positive + 2.0 * ratio * (1.0 + square * series)


@triton.jit
def scores(logits, top_T1, total_T1, SCORE: tl.constexpr):
    """fp32 scores of logits (tiles of experts or of chosen ones)."""
    if SCORE == SOFTMAX:
        result = tl.exp(logits - top_T1) / total_T1
    elif SCORE == SIGMOID:
        result = 1.0 / (1.0 + tl.exp(-logits))
    else:
        result = tl.sqrt(softplus(logits))
    return result


@triton.jit
def keep_best_groups(
    choice_TE, valid_1E, fill, GROUPS: tl.constexpr, NUM: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """`choice_TE` with experts outside the best KEPT of NUM groups at `fill`; lanes lie as [BLOCK_G, BLOCK_M]."""
    keys_TE = tl.where(valid_1E, to_keys(choice_TE), NO_EXPERT)
    keys_TGM = tl.reshape(keys_TE, (BLOCK_T, BLOCK_G, BLOCK_M))
    first_TG1 = tl.min(keys_TGM, axis=2, keep_dims=True)
    if GROUPS == GROUP_TOP2:
        # The second best: the same key again where it occurs twice, else the best of the rest.
        twice_TG1 = tl.sum((keys_TGM == first_TG1).to(tl.int32), axis=2, keep_dims=True) > 1
        rest_TG1 = tl.min(tl.where(keys_TGM == first_TG1, NO_EXPERT, keys_TGM), axis=2, keep_dims=True)
        second_TG1 = tl.where(twice_TG1, first_TG1, rest_TG1)
        group_TG1 = to_keys(from_keys(first_TG1) + from_keys(second_TG1))
    else:
        group_TG1 = first_TG1
    groups_1G1 = tl.arange(0, BLOCK_G)[None, :, None]
    group_TG1 = tl.where(groups_1G1 < NUM, group_TG1, NO_EXPERT)
    kept_TG1 = group_TG1 != group_TG1
    for _ in tl.static_range(KEPT):
        best_T11 = tl.min(group_TG1, axis=1, keep_dims=True)
        ids_TG1 = tl.where(group_TG1 == best_T11, groups_1G1, BLOCK_G)
        hit_TG1 = groups_1G1 == tl.min(ids_TG1, axis=1, keep_dims=True)
        kept_TG1 = kept_TG1 | hit_TG1
        group_TG1 = tl.where(hit_TG1, NO_EXPERT, group_TG1)
    kept_TGM = tl.broadcast_to(kept_TG1.to(tl.int32), (BLOCK_T, BLOCK_G, BLOCK_M))
    return tl.where(tl.reshape(kept_TGM, (BLOCK_T, BLOCK_G * BLOCK_M)) != 0, choice_TE, fill)


@triton.jit
def choices(
    logits_TE, bias, experts_1E, valid_1E, fill, SCORE: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr,
    NUM: tl.constexpr, KEPT: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What the router ranks, fp32 [T, E], before any prior. bias: pointer to [E] fp32, or None."""
    choice_TE = logits_TE
    if RANK == BY_SCORE:
        if SCORE == SOFTMAX:
            top_T1, total_T1 = softmax_terms(logits_TE, valid_1E)
            choice_TE = scores(logits_TE, top_T1, total_T1, SCORE)
        else:
            choice_TE = scores(logits_TE, 0.0, 1.0, SCORE)
    if RANK != BY_LOGIT and bias is not None:
        choice_TE += tl.load(bias + experts_1E, mask=valid_1E, other=0.0)
    if GROUPS != NO_GROUPS:
        choice_TE = keep_best_groups(choice_TE, valid_1E, fill, GROUPS, NUM, KEPT, BLOCK_T, BLOCK_G, BLOCK_M)
    return choice_TE


@triton.jit
def span(choice_TE, valid_1E):
    """Largest minus smallest finite choice value, cut to [0, MAX_SPAN]; 0 where none is finite. [T, 1]."""
    keys_TE = tl.where(valid_1E, to_keys(choice_TE), NO_EXPERT)
    highest_T1 = from_keys(tl.min(tl.where(keys_TE > PLUS_INF_KEY, keys_TE, NO_EXPERT), axis=1, keep_dims=True))
    lowest_T1 = from_keys(
        tl.max(tl.where(keys_TE < MINUS_INF_KEY, keys_TE, tl.zeros_like(keys_TE)), axis=1, keep_dims=True)
    )
    width_T1 = highest_T1 - lowest_T1
    # Without a finite value the difference is -inf or NaN, and neither is > 0.
    return tl.where(width_T1 > 0.0, tl.where(width_T1 < MAX_SPAN, width_T1, MAX_SPAN), 0.0)


@triton.jit
def misplaced(words_TE, keys_TE, found_TK, chosen_TE, K: tl.constexpr, BLOCK_K: tl.constexpr):
    """Whether whole keys say other than the words: one chosen before a better one, or a better one left out. [T, 1].

    The minima of different ranks do not wait for one another, as those of a ranking do.
    """
    ranks_1K = tl.arange(0, BLOCK_K)[None, :]
    last_T1 = tl.min(keys_TE, axis=1, keep_dims=True)
    wrong_T1 = last_T1 != last_T1
    for rank in tl.static_range(0, K):
        word_T1 = tl.max(tl.where(ranks_1K == rank, found_TK, tl.zeros_like(found_TK)), axis=1, keep_dims=True)
        key_T1 = tl.min(tl.where(words_TE == word_T1, keys_TE, NO_EXPERT), axis=1, keep_dims=True)
        wrong_T1 = wrong_T1 | (key_T1 < last_T1)
        last_T1 = key_T1
    left_T1 = tl.min(tl.where(chosen_TE, NO_EXPERT, keys_TE), axis=1, keep_dims=True)
    return wrong_T1 | (left_T1 < last_T1)


@triton.jit
def best_experts(
    keys_TE, experts_1E, K: tl.constexpr, BLOCK_K: tl.constexpr, LAST: tl.constexpr, CAN_CLASH: tl.constexpr,
    MORE: tl.constexpr,
):  # fmt: skip
    """Ids [T, BLOCK_K] int32 of the K smallest keys in order, and which lanes they are, bool [T, E].

    The low bits of a key (LAST, a mask of ones >= every id) give way to the expert's id: such words are unique, so
    one minimum per rank finds both, and `word - floor` in unsigned arithmetic hides what is already chosen. That is
    exact unless two of the first K + 1 words differ in the id alone. Equal keys do so rightly, and 16-bit logits have
    many; only where whole keys tell another order are the rows done again with them.
    CAN_CLASH: false where such words stem from equal keys (16-bit logits: their low bits are 0). MORE: E > K.
    """
    ranks_1K = tl.arange(0, BLOCK_K)[None, :]
    ids_1E = experts_1E.to(tl.uint32)
    words_TE = tl.where(keys_TE == NO_EXPERT, keys_TE, (keys_TE & (NO_EXPERT ^ LAST)) | ids_1E)
    floor_T1 = tl.min(words_TE, axis=1, keep_dims=True)
    found_TK = tl.broadcast_to(floor_T1, (words_TE.shape[0], BLOCK_K))
    clash_T1 = floor_T1 != floor_T1
    for rank in tl.static_range(1, K):
        floor_T1 += 1
        word_T1 = tl.min(words_TE - floor_T1, axis=1, keep_dims=True) + floor_T1
        found_TK = tl.where(ranks_1K == rank, word_T1, found_TK)
        if CAN_CLASH:
            clash_T1 = clash_T1 | (((floor_T1 - 1) ^ word_T1) <= LAST)
        floor_T1 = word_T1
    ids_TK = (found_TK & LAST).to(tl.int32)
    chosen_TE = words_TE <= floor_T1
    if CAN_CLASH:
        if MORE:
            next_T1 = tl.min(words_TE - (floor_T1 + 1), axis=1, keep_dims=True) + (floor_T1 + 1)
            clash_T1 = clash_T1 | ((floor_T1 ^ next_T1) <= LAST)
        wrong = tl.max(clash_T1.to(tl.int32))
        if wrong > 0:
            wrong = tl.max(misplaced(words_TE, keys_TE, found_TK, chosen_TE, K, BLOCK_K).to(tl.int32))
        if wrong > 0:
            rest_TE = keys_TE
            for step in range(K):
                best_T1 = tl.min(rest_TE, axis=1, keep_dims=True)
                id_T1 = tl.min(tl.where(rest_TE == best_T1, experts_1E, LAST), axis=1, keep_dims=True)
                ids_TK = tl.where(ranks_1K == step, id_T1, ids_TK)
                rest_TE = tl.where(experts_1E == id_T1, NO_EXPERT, rest_TE)
            chosen_TE = (keys_TE != NO_EXPERT) & (rest_TE == NO_EXPERT)
    return ids_TK, chosen_TE


@triton.jit
def weigh(
    logits_TK, ids_TK, top_T1, total_T1, eps, scaling, K: tl.constexpr, BLOCK_K: tl.constexpr, SCORE: tl.constexpr,
    CHOSEN_SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, NULL_FROM: tl.constexpr,
):  # fmt: skip
    """fp32 weights of the chosen experts from their logits; top and total only matter to plain softmax scores."""
    real_1K = tl.arange(0, BLOCK_K)[None, :] < K
    if CHOSEN_SOFTMAX:
        highest_T1 = tl.max(tl.where(real_1K, logits_TK, float("-inf")), axis=1, keep_dims=True)
        weights_TK = tl.exp(logits_TK - highest_T1)
        weights_TK = weights_TK / tl.sum(tl.where(real_1K, weights_TK, 0.0), axis=1, keep_dims=True)
    else:
        weights_TK = scores(logits_TK, top_T1, total_T1, SCORE)
        if NORMALIZE:
            sum_T1 = tl.sum(tl.where(real_1K, weights_TK, 0.0), axis=1, keep_dims=True)
            weights_TK = weights_TK / (sum_T1 + eps)
    if NULL_FROM >= 0:
        weights_TK = tl.where(ids_TK >= NULL_FROM, 0.0, weights_TK)
    return weights_TK * scaling
