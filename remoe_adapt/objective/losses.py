"""The training objective of ReMoE (arXiv:2605.27081), one function per equation.

    L = L_CE + lambda_KL * L_Trust + alpha_t * L_Loc
    L_Loc = lambda_R * L_Reuse + lambda_S * L_Smooth + lambda_L * L_Lag + lambda_W * L_WS

Shapes: B rows, T tokens of a row, E experts, K chosen, V vocabulary. P_t is a router's distribution over experts,
`log_probs_BTE` its logarithm (fp32, fp64 for an fp64 model), `ids_BTK` the chosen experts E_t. `documents_BT` numbers
the document of each token, -1 where padding: no pair of tokens is formed across two documents or with padding.

Each locality and trust term is a value per row, [B]; a step weights rows by their share of the label tokens of the
whole optimizer step, so a row counts the same however rows are spread over micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

LAGS = (1, 2, 4, 8, 16)
WINDOW = 16
IGNORED_LABEL = -100
# As in the paper: the loss of a row that reuses nothing stays finite.
_EPS = 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class LossWeights:
    """Weights of the terms: `kl` is lambda_KL, the others lambda_R, lambda_S, lambda_L and lambda_W.

    `distill_share` is not of the paper: see `distillation_losses`.
    """

    reuse: float = 0.0
    smooth: float = 0.0
    lag: float = 0.0
    window: float = 0.0
    kl: float = 0.0
    distill_share: float = 0.0


def warm_up(step: int, warmup_steps: int) -> float:
    """alpha_t = min(1, t / T_warm) for the optimizer step t >= 1; 1 without warm-up."""
    return 1.0 if warmup_steps <= 0 else min(1.0, step / warmup_steps)


def next_token_losses(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """L_CE before the mean: fp32 (fp64 from fp64) [B, T-1] nats, 0 where the label is -100. Labels are shifted here.

    logsumexp minus the label's logit: the same number as `F.cross_entropy`, which is far slower on some CPUs.
    """
    targets = labels_BT[:, 1:]
    logits = _predicting(logits_BTV)
    # Taken off before exp, which overflows at 88 in fp32; the result is the same.
    peak = logits.detach().amax(dim=-1, keepdim=True)
    log_z = (logits - peak).exp().sum(dim=-1).log() + peak.squeeze(-1)
    # -100 is no index; what is picked there is masked out below.
    picked = logits.gather(-1, targets.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return (log_z - picked).masked_fill(targets == IGNORED_LABEL, 0.0)


def distillation_losses(logits_BTV: Tensor, base_logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """KL(P_base || P) of the next-token distributions: [B, T-1] nats, 0 where the label is -100.

    Hinton et al. 2015, with the base model as the teacher. Mixed into L_CE by `distill_share` it holds a point to the
    base on text unlike the training data, where next-token loss alone drifts towards that data's mixture.
    """
    logits, base = _predicting(logits_BTV), _predicting(base_logits_BTV).detach()
    base_log_z = base.logsumexp(dim=-1)
    base_p = (base - base_log_z.unsqueeze(-1)).exp()
    divergence = (base_p * (base - logits)).sum(dim=-1) - base_log_z + logits.logsumexp(dim=-1)
    return divergence.masked_fill(labels_BT[:, 1:] == IGNORED_LABEL, 0.0)


def _predicting(logits_BTV: Tensor) -> Tensor:
    return logits_BTV[:, :-1].to(torch.promote_types(logits_BTV.dtype, torch.float32))


def pair_mask(documents_BT: Tensor, lag: int = 1) -> Tensor:
    """bool [B, T-lag]: token t+lag and token t belong to the same document and neither is padding."""
    now, before = documents_BT[:, lag:], documents_BT[:, :-lag]
    return (now == before) & (now >= 0)


def row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Mean over the True positions of each row, [B]; 0 for a row without any."""
    # A row without any position has the sum 0, and 0 / 0 would be NaN.
    count_B = mask_BT.sum(dim=1).clamp_min(1)
    return values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / count_B


def reused_mass(probs_BTE: Tensor, ids_BTK: Tensor) -> Tensor:
    """m_t = (1/K) * sum over k in stopgrad(E_{t-1}) of P_t(k): [B, T-1]."""
    return probs_BTE[:, 1:].gather(-1, ids_BTK[:, :-1]).mean(dim=-1)


def reuse_loss(probs_BTE: Tensor, ids_BTK: Tensor, documents_BT: Tensor) -> Tensor:
    """L_Reuse = -log(mean_t m_t + 1e-8) of each row, [B]; 0 for a row without a pair."""
    mask = pair_mask(documents_BT)
    loss_B = -(row_mean(reused_mass(probs_BTE, ids_BTK), mask) + _EPS).log()
    # A row without a pair has a mean of 0, whose logarithm would be a loss of 18 nats for nothing.
    return loss_B * mask.any(dim=1)


def smooth_loss(log_probs_BTE: Tensor, documents_BT: Tensor, lag: int = 1) -> Tensor:
    """L_Smooth: symmetric KL(P_t, P_{t-lag}) = sum (P_t - P_{t-lag}) (log P_t - log P_{t-lag}), row mean, [B].

    Gradient flows into both tokens. The lag is 1 in L_Smooth itself.
    """
    probs_BTE = log_probs_BTE.exp()
    # From logarithms: a quotient of probabilities would overflow where one of them is 0.
    log_ratio = log_probs_BTE[:, lag:] - log_probs_BTE[:, :-lag]
    divergence = ((probs_BTE[:, lag:] - probs_BTE[:, :-lag]) * log_ratio).sum(dim=-1)
    return row_mean(divergence, pair_mask(documents_BT, lag))


def lag_loss(log_probs_BTE: Tensor, documents_BT: Tensor, lags: Sequence[int] = LAGS) -> Tensor:
    """L_Lag: the divergence of L_Smooth averaged over the lags that have a pair in the row, [B].

    Lags too long for a row's documents do not count, so its value does not depend on how far the row is padded.
    """
    losses_BL = torch.stack([smooth_loss(log_probs_BTE, documents_BT, lag) for lag in lags], dim=1)
    return row_mean(losses_BL, torch.stack([pair_mask(documents_BT, lag).any(dim=1) for lag in lags], dim=1))


def window_entropy_loss(probs_BTE: Tensor, documents_BT: Tensor, window: int = WINDOW) -> Tensor:
    """L_WS: entropy in nats of the mean distribution over each `window` consecutive tokens of one document, [B]."""
    if probs_BTE.shape[1] < window:
        return probs_BTE.new_zeros(probs_BTE.shape[0])
    means = probs_BTE.unfold(1, window, 1).mean(dim=-1)
    entropy = -(means * means.clamp_min(_EPS).log()).sum(dim=-1)
    numbers = documents_BT.unfold(1, window, 1)
    # A window counts only where all of its tokens are of the document of its first one.
    inside = (numbers == documents_BT[:, : numbers.shape[1], None]).all(dim=-1) & (numbers[..., 0] >= 0)
    return row_mean(entropy, inside)


def trust_loss(log_probs_BTE: Tensor, reference_log_probs_BTE: Tensor, documents_BT: Tensor) -> Tensor:
    """L_Trust = mean_t KL(P_t || stopgrad(P_ref(h_t))) of each row in nats, [B]."""
    divergence = (log_probs_BTE.exp() * (log_probs_BTE - reference_log_probs_BTE.detach())).sum(dim=-1)
    return row_mean(divergence, documents_BT >= 0)


def overlap(ids_BTK: Tensor, documents_BT: Tensor) -> Tensor:
    """EOR of each row: mean over pairs of |E_t & E_{t-1}| / K, [B]; no gradient."""
    # K is small, so comparing all pairs of slots beats building sets of E.
    same = (ids_BTK[:, 1:, :, None] == ids_BTK[:, :-1, None, :]).any(dim=-1)
    return row_mean(same.float().mean(dim=-1), pair_mask(documents_BT))


@dataclass(frozen=True, slots=True)
class RouterTerms:
    """One router's share of the objective, all [B]: `loss` has gradient, `kl` (L_Trust) and `eor` are for the log."""

    loss: Tensor
    kl: Tensor
    eor: Tensor


def router_terms(
    log_probs_BTE: Tensor,
    ids_BTK: Tensor,
    reference_log_probs_BTE: Tensor,
    documents_BT: Tensor,
    weights: LossWeights,
    alpha: float,
) -> RouterTerms:
    """lambda_KL * L_Trust + alpha_t * L_Loc of one router; terms of weight 0 are not computed."""
    kl_B = trust_loss(log_probs_BTE, reference_log_probs_BTE, documents_BT)
    loss_B = weights.kl * kl_B
    probs_BTE = log_probs_BTE.exp()
    if weights.reuse:
        loss_B = loss_B + alpha * weights.reuse * reuse_loss(probs_BTE, ids_BTK, documents_BT)
    if weights.smooth:
        loss_B = loss_B + alpha * weights.smooth * smooth_loss(log_probs_BTE, documents_BT)
    if weights.lag:
        loss_B = loss_B + alpha * weights.lag * lag_loss(log_probs_BTE, documents_BT)
    if weights.window:
        loss_B = loss_B + alpha * weights.window * window_entropy_loss(probs_BTE, documents_BT)
    return RouterTerms(loss_B, kl_B.detach(), overlap(ids_BTK, documents_BT))
