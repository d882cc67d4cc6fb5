"""The arithmetic of priced recency modes (`recency_settings.Cost`): by what experts rank, held ones and others.

A held expert of weight w ranks as one of weight w + g, g being the gain. Of those with w far below g the sum has the
same digits, and rounding would choose among them; so where logits are ranked it is written such that, of equals in all
but w, the larger w never ranks below. Shapes: T tokens, B sequences, E experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.recency_settings import held_experts
from remoe_adapt.routers import RouterSpec, best_ids
from remoe_adapt.triton_kernels import rule

# Below it exponentials have too few digits left to order experts: what they rank by goes on as PRICE_TAIL / -x.
PRICE_FLOOR: float = rule.PRICE_FLOOR
PRICE_TAIL: float = rule.PRICE_TAIL
# What is ranked of logits is plainly log(1 + exp) above this.
LEAST_EXACT: float = PRICE_TAIL / -PRICE_FLOOR


def held(recency_BE: Tensor, share: float, k: int) -> Tensor:
    """bool [B, E]: the experts that an LRFU cache of this share would hold, equals at its end all of them."""
    count = held_experts(share, k, recency_BE.shape[-1])
    last_B1 = recency_BE.topk(count, dim=-1).values[..., -1:]
    return recency_BE >= last_B1.clamp_min(rule.HELD_ABOVE)


def ranks(choice_TE: Tensor, logits_TE: Tensor, k: int, spec: RouterSpec, gain: Tensor) -> tuple[Tensor, Tensor]:
    """fp32 [T, E] each: by what experts rank that are not held, and by what held ones do.

    choice_TE: fp32, `spec.choice_scores`. gain: fp32 scalar, g. A row without prices ranks by its choice values: at a
    gain of 0, and where the best values are not finite. A value that is not finite ranks where it did.

    Where logits are ranked: x = log w - log g, and log(1 + exp x) of held ones. Where scores c are ranked: c, and c + G
    of held ones, G being g times what weights are divided by. Where logits with a bias are ranked and weights are their
    sigmoid: choice - log g and choice - log g + log(1 + g / w).
    """
    if spec.scoring == "logit_bias_sigmoid":
        plain_TE, held_TE, is_priced = _biased_logits(choice_TE, logits_TE, k, spec, gain)
    elif spec.ranks_logits:
        plain_TE = excess(choice_TE, k, spec, gain)
        is_priced = plain_TE.amax(dim=-1, keepdim=True).isfinite()
        held_TE = of_excess(plain_TE)
    else:
        scale = gain.double()
        if spec.normalize:
            scale = choice_TE.topk(k, dim=-1).values.double().sum(dim=-1, keepdim=True).abs() * scale
        scale = scale.float()
        is_priced = (scale > 0) & scale.isfinite()
        plain_TE, held_TE = choice_TE, choice_TE + scale
    return torch.where(is_priced, plain_TE, choice_TE), torch.where(is_priced, held_TE, choice_TE)


def excess(choice_TE: Tensor, k: int, spec: RouterSpec, gain: Tensor) -> Tensor:
    """log w - log g [T, E] of routers that rank logits; w is what an expert's weight would be among the K best.

    Sums of the few are taken in fp64 and rounded once, so that one token's, taken in Python, are the same.
    """
    base = gain.double().log()
    if not divides(spec):
        choice_TE = choice_TE.log_softmax(dim=-1)
    else:
        base = choice_TE.topk(k, dim=-1).values.double().logsumexp(dim=-1, keepdim=True) + base
    return choice_TE - base.float()


def of_excess(excess_TE: Tensor) -> Tensor:
    """log(1 + exp x) [T, E] of x, which keeps the order of all finite ones; -inf remains."""
    found_TE = torch.logaddexp(excess_TE, excess_TE.new_zeros(()))
    tail_TE = torch.where(excess_TE > -torch.inf, PRICE_TAIL / -excess_TE, excess_TE)
    return torch.where(excess_TE < PRICE_FLOOR, tail_TE, found_TE)


def _biased_logits(
    choice_TE: Tensor, logits_TE: Tensor, k: int, spec: RouterSpec, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ranks` before rows without prices, and which have them; w = sigmoid(z), over the sum of the K best."""
    logits_TE = logits_TE.float()
    base = gain.log()
    if spec.normalize:
        chosen_TK = logits_TE.gather(-1, best_ids(choice_TE, k))
        base = chosen_TK.sigmoid().sum(dim=-1, keepdim=True).log() + base
    plain_TE = choice_TE - base
    # z - log sigmoid(z) is softplus(z), which has digits where the difference has none.
    priced_TE = F.softplus(-F.softplus(-logits_TE) - base)
    held_TE = priced_TE.add_(F.softplus(logits_TE)).add_(choice_TE - logits_TE)
    return plain_TE, torch.where(held_TE.isfinite(), held_TE, plain_TE), base.isfinite()


def kept_weights(logits_TE: Tensor, ids_TK: Tensor, own_TK: Tensor, spec: RouterSpec) -> Tensor:
    """fp32 [T, K]: `spec.expert_weights`, times `kept_part` where they are divided by a sum. Differentiable."""
    weights_TK = spec.expert_weights(logits_TE, ids_TK)
    part_T1 = kept_part(logits_TE, ids_TK, own_TK, spec)
    return weights_TK if part_T1 is None else weights_TK * part_T1


def kept_part(logits_TE: Tensor, ids_TK: Tensor, own_TK: Tensor, spec: RouterSpec) -> Tensor | None:
    """fp32 [T, 1]: the sum of the chosen experts' scores over that of the router's own K best (`own_TK`); 1 where both
    are the same, and where it is no number. None where weights are not divided by that sum. Sums are taken as in
    `excess`.

    Times it, the weights of `spec.expert_weights` are what they would be among the router's own: an expert that stays
    weighs what it weighed, whatever was put in another's place. Differentiable.
    """
    if not divides(spec):
        return None
    if spec.is_chosen_softmax:
        most_T1 = logits_TE.detach().amax(dim=-1, keepdim=True).double()
        sums = [
            (logits_TE.gather(-1, ids).double() - most_T1).exp().sum(dim=-1, keepdim=True) for ids in (ids_TK, own_TK)
        ]
    else:
        scores_TE = spec.scores(logits_TE)
        sums = [
            scores_TE.gather(-1, ids).double().sum(dim=-1, keepdim=True) + spec.normalize_eps
            for ids in (ids_TK, own_TK)
        ]
    part_T1 = (sums[0] / sums[1]).float()
    return torch.where(part_T1.isfinite(), part_T1, 1.0)


def divides(spec: RouterSpec) -> bool:
    """Whether a router's weights are divided by the sum of the chosen experts' scores."""
    return spec.is_chosen_softmax or spec.normalize
