"""The definition of gating in plain torch: which experts a token gets and with what weights. Kernels are tested by it.

Shapes: B sequences of S tokens each, T = B * S tokens in that order, E experts, K chosen. Ranking is that of
`routers/spec.py`: among equal values the lowest index first, NaN above everything. So K distinct experts come out of
any input, the same ones on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError
from remoe_adapt.gating.cost import held, kept_weights, ranks
from remoe_adapt.routers import RouterSpec, best_ids
from remoe_adapt.triton_kernels import rule

# Flags of a token, where a span of choice values is cut, and a recency ceases: the kernels' own numbers.
PADDING: int = rule.PADDING
RESTART: int = rule.RESTART
MAX_SPAN: float = rule.MAX_SPAN
HELD_ABOVE: float = rule.HELD_ABOVE


@dataclass(frozen=True, slots=True)
class PriorStep:
    """What one gate needs of the recency prior (`recency/prior.py` makes it).

    recency_BE: fp32, one row per sequence (one for all of them in `resident` mode), each in [0, 1]; updated in place.
    gain: fp32 scalar tensor. decay: recency becomes `decay * recency + (1 - decay) * chosen` after each token; 0 is
    the previous token alone; None leaves it as it is (`resident`). flags_T: uint8 or None; PADDING tokens are gated
    without the prior and leave no trace, RESTART sets the recency to 0 before the token. share: of priced modes
    (`recency_settings.Mode.is_priced`), the part of the experts that are preferred, never less than K of them; None:
    the bonus is gain * span * recency.
    """

    recency_BE: Tensor
    gain: Tensor
    decay: float | None
    flags_T: Tensor | None = None
    share: float | None = None


def topk_gating(
    logits_TE: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None = None, *, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weights [T, K] fp32 and ids [T, K] int64 of the chosen experts, best first.

    logits_TE: fp32, fp16 or bf16, any strides; scores are taken in fp32. bias_E: the selection bias of scorings that
    have one. With a prior, experts rank by `choice + gain * span * recency`, where `choice` are `spec.choice_scores`
    and span is the largest minus the smallest finite one of the token (Cache-Prior, arXiv:2412.00099, eq. 3, with the
    span of this token); in priced modes as `gating/cost.py` says, held ones and others. Weights come from the untouched
    scores; in priced modes those of a router that divides by the sum of the chosen are divided by the sum of its own K
    best (`cost.kept_part`). Differentiable in the logits through the weights. The recency of `prior` moves on in place;
    a gain of 0 gives the result without a prior, bit for bit.

    Raises ConfigError when k or a shape does not fit, UnsupportedRouterError when the weights do not follow from the
    logits.
    """
    check_shapes(logits_TE, k, prior, bias_E)
    own_TK: Tensor | None = None
    with torch.no_grad():
        choice_TE = spec.choice_scores(logits_TE, bias_E)
        if prior is None:
            ids_TK = best_ids(choice_TE, k)
        else:
            choice_TE = choice_TE.float()
            if prior.share is None:
                extra_TN = _scales(choice_TE, prior)
            else:
                own_TK = best_ids(choice_TE, k)
                choice_TE, extra_TN = _raised(choice_TE, logits_TE, k, spec, prior)
            if prior.decay is None or len(prior.recency_BE) == len(logits_TE):
                ids_TK = _step(choice_TE, extra_TN, k, prior, prior.flags_T)
            else:
                ids_TK = _scan(choice_TE, extra_TN, k, prior)
    if own_TK is None:
        return spec.expert_weights(logits_TE, ids_TK), ids_TK
    return kept_weights(logits_TE, ids_TK, own_TK, spec), ids_TK


def check_shapes(logits_TE: Tensor, k: int, prior: PriorStep | None, bias_E: Tensor | None) -> None:
    """Raises ConfigError when these do not belong together."""
    if logits_TE.dim() != 2 or not 1 <= k <= logits_TE.shape[1]:
        raise ConfigError(f"top-{k} of logits {list(logits_TE.shape)}: give [tokens, experts] and 1 <= k <= experts.")
    tokens, experts = logits_TE.shape
    if bias_E is not None and bias_E.numel() != experts:
        raise ConfigError(f"a selection bias of {bias_E.numel()} values for {experts} experts.")
    if prior is None:
        return
    rows = len(prior.recency_BE)
    if prior.recency_BE.shape[-1] != experts or rows == 0 or (tokens % rows and prior.decay is not None):
        raise ConfigError(f"recency {list(prior.recency_BE.shape)} does not fit {tokens} tokens of {experts} experts.")
    if prior.flags_T is not None and prior.flags_T.shape != (tokens,):
        raise ConfigError(f"{list(prior.flags_T.shape)} flags for {tokens} tokens.")


def _scales(choice_TE: Tensor, prior: PriorStep) -> Tensor:
    """gain * span [T, 1]; 0 for padding."""
    limit = torch.finfo(torch.float32).max
    highest_T1 = choice_TE.nan_to_num(nan=-limit, posinf=-limit, neginf=-limit).amax(dim=-1, keepdim=True)
    lowest_T1 = choice_TE.nan_to_num(nan=limit, posinf=limit, neginf=limit).amin(dim=-1, keepdim=True)
    scale_T1 = (highest_T1 - lowest_T1).clamp_(0.0, MAX_SPAN).mul_(prior.gain)
    if prior.flags_T is not None:
        scale_T1 = scale_T1 * (prior.flags_T.bitwise_and(PADDING) == 0).unsqueeze(-1)
    return scale_T1


def _raised(choice_TE: Tensor, logits_TE: Tensor, k: int, spec: RouterSpec, prior: PriorStep) -> tuple[Tensor, Tensor]:
    """By what experts rank, others and held ones [T, E] each; the same for padding."""
    plain_TE, raised_TE = ranks(choice_TE, logits_TE, k, spec, prior.gain)
    if prior.flags_T is not None:
        # As choice values, not by their logarithm: padding is gated as without a prior, to the bit.
        is_padding_T1 = (prior.flags_T.bitwise_and(PADDING) != 0).unsqueeze(-1)
        plain_TE = torch.where(is_padding_T1, choice_TE, plain_TE)
        raised_TE = torch.where(is_padding_T1, choice_TE, raised_TE)
    return plain_TE, raised_TE


def _step(choice_BE: Tensor, extra_BN: Tensor, k: int, prior: PriorStep, flags_B: Tensor | None) -> Tensor:
    """One token of each sequence (any tokens in `resident` mode): ids [B, K], recency moved on in place.

    extra_BN: `_scales`, in priced modes by what held experts rank, as others do by choice_BE.
    """
    recency_BE, decay = prior.recency_BE, prior.decay
    if flags_B is not None and decay is not None:
        recency_BE.masked_fill_((flags_B.bitwise_and(RESTART) != 0).unsqueeze(-1), 0.0)
    if prior.share is None:
        ranked_BE = torch.addcmul(choice_BE, recency_BE, extra_BN)
    else:
        ranked_BE = torch.where(held(recency_BE, prior.share, k), extra_BN, choice_BE)
    ids_BK = best_ids(ranked_BE, k)
    if decay is None:
        return ids_BK
    before_BE = recency_BE.clone() if flags_B is not None else None
    update_recency(recency_BE, ids_BK, decay)
    if flags_B is not None and before_BE is not None:
        padding_B1 = (flags_B.bitwise_and(PADDING) != 0).unsqueeze(-1)
        recency_BE.copy_(torch.where(padding_B1, before_BE, recency_BE))
    return ids_BK


def update_recency(recency_BE: Tensor, ids_BK: Tensor, decay: float) -> None:
    """`decay * recency + (1 - decay) * chosen`, in place, for one token of each row; with any leading axes.

    ids_BK: int64, distinct in a row.
    """
    share_BK = recency_BE.new_full((1,) * recency_BE.dim(), 1.0 - decay).expand(ids_BK.shape)
    recency_BE.mul_(decay).scatter_add_(-1, ids_BK, share_BK)


def _scan(choice_TE: Tensor, extra_TN: Tensor, k: int, prior: PriorStep) -> Tensor:
    """Token after token of all sequences side by side: ids [T, K]."""
    sequences = len(prior.recency_BE)
    # What does not depend on the tokens before is worked out for all of them by now: the loop only masks and ranks.
    extra_BSN = extra_TN.reshape(sequences, -1, extra_TN.shape[-1])
    choice_BSE = choice_TE.reshape(sequences, -1, choice_TE.shape[-1])
    flags_BS = None if prior.flags_T is None else prior.flags_T.reshape(sequences, -1)
    chosen = [
        _step(choice_BSE[:, s], extra_BSN[:, s], k, prior, None if flags_BS is None else flags_BS[:, s])
        for s in range(choice_BSE.shape[1])
    ]
    return torch.stack(chosen, dim=1).reshape(-1, k) if chosen else choice_TE.new_zeros((0, k), dtype=torch.int64)
