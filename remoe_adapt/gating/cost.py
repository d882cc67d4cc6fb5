"""The arithmetic of priced recency modes (`recency_settings.Cost`): what a held expert gains in the ranking.

An expert of weight w ranks as one of weight sqrt(w^2 + g^2), g being the gain. Shapes: T tokens, B sequences, E
experts, K chosen.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.recency_settings import HELD_ABOVE, held_experts
from remoe_adapt.routers import RouterSpec, best_ids

# Stands for a score of 0 and below, so that a gain of 0 gives 0 / tiny and not 0 / 0.
TINY = torch.finfo(torch.float32).tiny


def held(recency_BE: Tensor, share: float, k: int) -> Tensor:
    """bool [B, E]: the experts that an LRFU cache of this share would hold, equals at its end all of them."""
    count = held_experts(share, k, recency_BE.shape[-1])
    last_B1 = recency_BE.topk(count, dim=-1).values[..., -1:]
    return recency_BE >= last_B1.clamp_min(HELD_ABOVE)


def bonus(choice_TE: Tensor, logits_TE: Tensor, k: int, spec: RouterSpec, gain: Tensor) -> Tensor:
    """fp32 [T, E]: what each expert's choice value gains if it is held. 0 at a gain of 0, and where it is not finite.

    choice_TE: fp32, `spec.choice_scores`. gain: fp32 scalar, g.

    Where logits are ranked: log(sqrt(w^2 + g^2) / w) = 1/2 softplus(2 (log g - log w)), which keeps the order of
    weights, for these are ranked by their logarithm up to a constant. Where scores c are ranked: sqrt(c^2 + G^2) - c,
    G being g times what weights are divided by, written so that no digits are lost.
    """
    if spec.ranks_logits or spec.scoring == "logit_bias_sigmoid":
        found_TE = F.softplus(log_price(choice_TE, logits_TE, k, spec) + gain.log(), beta=2.0)
    else:
        scale = gain if not spec.normalize else choice_TE.topk(k, dim=-1).values.sum(dim=-1, keepdim=True) * gain
        found_TE = score_bonus(choice_TE, scale)
    return found_TE.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def log_price(choice_TE: Tensor, logits_TE: Tensor, k: int, spec: RouterSpec) -> Tensor:
    """-log w [T, E] of routers that rank logits: what an expert's weight would be among the K best of the token."""
    if spec.scoring == "logit_bias_sigmoid":
        price_TE = F.softplus(-logits_TE.float())
        if not spec.normalize:
            return price_TE
        chosen_TK = logits_TE.gather(-1, best_ids(choice_TE, k)).float()
        return price_TE + chosen_TK.sigmoid().sum(dim=-1, keepdim=True).log()
    if not spec.is_chosen_softmax and not spec.normalize:
        return -choice_TE.log_softmax(dim=-1)
    return choice_TE.topk(k, dim=-1).values.logsumexp(dim=-1, keepdim=True) - choice_TE


def score_bonus(choice_TE: Tensor, scale: Tensor) -> Tensor:
    """sqrt(c^2 + G^2) - c [T, E] of scores c, negative ones taken for 0; `scale` is G, [T, 1] or of each expert."""
    square = scale * scale
    positive_TE = choice_TE.clamp_min(TINY)
    return square / torch.addcmul(square, positive_TE, positive_TE).sqrt_().add_(positive_TE)
