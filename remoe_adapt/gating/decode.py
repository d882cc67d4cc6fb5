"""The gate of one token on a CPU, where every torch call costs as much as its arithmetic: the fewest calls."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from remoe_adapt.gating.reference import MAX_SPAN, PriorStep, best_ids, topk_gating
from remoe_adapt.routers.spec import RouterSpec

_f32 = np.float32


def one_token(
    logits_1E: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`topk_gating` of a single row, to the bit; flags, gradients and values without a finite span go there."""
    if prior is None or prior.flags_T is not None or logits_1E.requires_grad:
        return topk_gating(logits_1E, k, spec, prior, bias_E=bias_E)
    choice_1E = logits_1E if spec.ranks_logits else spec.choice_scores(logits_1E, bias_E)
    if choice_1E.dtype != torch.float32:
        choice_1E = choice_1E.float()
    lowest, highest = choice_1E.aminmax()
    low, high = float(lowest), float(highest)
    if not high - low <= MAX_SPAN:  # infinite, or NaN
        return topk_gating(logits_1E, k, spec, prior, bias_E=bias_E)
    # Rounded as fp32 tensors are; `add` with a factor rounds once, as `addcmul` does.
    scale = (_f32(high) - _f32(low)) * _f32(float(prior.gain))
    ids_1K = _best(torch.add(choice_1E, prior.recency_BE, alpha=float(scale)), k)
    if prior.decay is not None:
        decay, share_1K = _constants(prior.decay, k)
        prior.recency_BE.mul_(decay).scatter_add_(1, ids_1K, share_1K)
    if spec.is_chosen_softmax and logits_1E.dtype == torch.float32 and spec.scaling == 1.0:
        return logits_1E.take(ids_1K).softmax(-1), ids_1K
    return spec.expert_weights(logits_1E, ids_1K), ids_1K


def _best(values_1E: Tensor, k: int) -> Tensor:
    """`best_ids` by way of the faster `topk`, whose order among equal values is not told: without any, it is right."""
    if k >= values_1E.shape[1]:
        return best_ids(values_1E, k)
    values_1K, ids_1K = values_1E.topk(k + 1)
    if len(set(values_1K.tolist()[0])) <= k:
        return best_ids(values_1E, k)
    return ids_1K.resize_(1, k)


@lru_cache
def _constants(decay: float, k: int) -> tuple[Tensor, Tensor]:
    """As tensors: a Python number is made one at every call. Not of inference mode, whatever the caller is in."""
    with torch.inference_mode(False):
        return torch.tensor(decay), torch.full((1, k), 1.0 - decay)
