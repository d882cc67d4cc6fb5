"""Every term of the objective against numbers worked out by hand, and blind to padding and other documents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.objective.losses import (
    LossWeights,
    distillation_losses,
    lag_loss,
    next_token_losses,
    overlap,
    pair_mask,
    reuse_loss,
    reused_mass,
    router_terms,
    row_mean,
    smooth_loss,
    trust_loss,
    warm_up,
    window_entropy_loss,
)

LN2, LN3 = math.log(2.0), math.log(3.0)
# Three tokens over three experts: P_1 = (1/2, 1/4, 1/4), P_2 = (1/4, 1/2, 1/4), P_3 = (1/4, 1/4, 1/2).
PROBS = torch.tensor([[[0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.25, 0.25, 0.5]]], dtype=torch.float64)
IDS = torch.tensor([[[0, 1], [1, 2], [2, 0]]])
ONE = torch.zeros(1, 3, dtype=torch.long)


def close(value: Tensor, *expected: float) -> None:
    torch.testing.assert_close(value, torch.tensor(expected, dtype=value.dtype), rtol=1e-6, atol=1e-7)


def test_next_token_losses() -> None:
    logits = torch.tensor([[[0.0, LN3], [LN3, 0.0], [5.0, -5.0]]])
    # Token 0 predicts label 1 with probability 3/4, token 1 predicts label 1 with 1/4; the last predicts nothing.
    losses = next_token_losses(logits, torch.tensor([[0, 1, 1]]))
    close(losses[0], -math.log(0.75), -math.log(0.25))
    close(next_token_losses(logits, torch.tensor([[0, -100, 1]]))[0], 0.0, -math.log(0.25))


def test_next_token_losses_and_gradients_equal_cross_entropy_also_for_large_logits_in_half_precision() -> None:
    logits = (torch.randn(2, 5, 7) * 60).to(torch.bfloat16)
    labels = torch.randint(0, 7, (2, 5))
    labels[0, 2] = -100
    ours, theirs = logits.float().requires_grad_(), logits.float().requires_grad_()
    next_token_losses(ours, labels).sum().backward()
    F.cross_entropy(theirs[:, :-1].reshape(-1, 7), labels[:, 1:].reshape(-1), reduction="sum").backward()
    torch.testing.assert_close(ours.grad, theirs.grad)
    losses = next_token_losses(logits, labels)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.sum(), next_token_losses(logits.double(), labels).sum().float())


def test_distillation_losses() -> None:
    base = torch.tensor([[[LN3, 0.0], [0.0, 0.0], [9.0, 9.0]]], dtype=torch.float64)
    ours = torch.tensor([[[0.0, LN3], [0.0, 0.0], [1.0, -5.0]]], dtype=torch.float64, requires_grad=True)
    # KL((3/4, 1/4), (1/4, 3/4)) = 3/4 ln 3 - 1/4 ln 3; equal distributions cost nothing; the last predicts nothing.
    losses = distillation_losses(ours, base, torch.tensor([[0, 1, 1]]))
    assert losses.dtype == torch.float64
    close(losses[0], LN3 / 2, 0.0)
    close(distillation_losses(ours, base, torch.tensor([[0, -100, 1]]))[0], 0.0, 0.0)
    losses.sum().backward()
    assert ours.grad is not None
    close(ours.grad[0, 0], 0.25 - 0.75, 0.75 - 0.25)  # P - P_base
    close(ours.grad[0, 1], 0.0, 0.0)


def test_a_broken_ignored_position_does_not_spoil_the_loss() -> None:
    logits = torch.zeros(1, 3, 2)
    logits[0, 1] = math.nan
    close(next_token_losses(logits, torch.tensor([[0, 1, -100]]))[0], LN2, 0.0)


def test_reuse_loss() -> None:
    # m_2 = (P_2(0) + P_2(1)) / 2 = 3/8; m_3 = (P_3(1) + P_3(2)) / 2 = 3/8
    close(reused_mass(PROBS, IDS)[0], 0.375, 0.375)
    close(reuse_loss(PROBS, IDS, ONE), -math.log(0.375 + 1e-8))


def test_reuse_loss_takes_the_logarithm_of_the_mean() -> None:
    ids = torch.tensor([[[0], [0], [0]]])
    probs = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]])
    close(reuse_loss(probs, ids, ONE), -math.log(0.375))  # the mean of -log would be 1.04, not 0.98


def test_reuse_gradient_reaches_only_the_later_token() -> None:
    logits = PROBS.log().clone().requires_grad_()
    reuse_loss(logits.log_softmax(-1).exp(), IDS, ONE).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, 0] == 0).all()
    assert (logits.grad[0, 1:].abs().sum(-1) > 1e-3).all()


def test_smooth_loss() -> None:
    # Symmetric KL of (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4): 2 * (1/4) * ln 2; so for both pairs.
    close(smooth_loss(PROBS.log(), ONE), 0.5 * LN2)
    logits = PROBS.log().clone().requires_grad_()
    smooth_loss(logits.log_softmax(-1), torch.tensor([[0, 0, -1]])).sum().backward()
    assert logits.grad is not None
    assert (logits.grad[0, :2].abs().sum(-1) > 1e-3).all(), "no stop-gradient on either side"


def test_lag_loss() -> None:
    a, b = [0.5, 0.5], [0.25, 0.75]
    log_probs = torch.tensor([[a, b, b]]).log()
    # lag 1: pairs (a, b) and (b, b); lag 2: (a, b). Symmetric KL(a, b) = (1/4) ln 2 - (1/4) ln(2/3) = ln(3) / 4
    ab = LN3 / 4
    close(smooth_loss(log_probs, ONE), ab / 2)
    close(smooth_loss(log_probs, ONE, lag=2), ab)
    close(lag_loss(log_probs, ONE, lags=(1, 2)), (ab / 2 + ab) / 2)
    # lags without a pair do not count, however long the tensor is
    close(lag_loss(log_probs, ONE), (ab / 2 + ab) / 2)
    padded = torch.cat([log_probs, torch.tensor([[[0.9, 0.1]]]).log().expand(1, 30, 2)], dim=1)
    close(lag_loss(padded, torch.tensor([[0] * 3 + [-1] * 30])), (ab / 2 + ab) / 2)


def test_window_entropy_loss() -> None:
    one_hot = torch.eye(2)[torch.tensor([[0, 1, 1]])]
    # windows of 2: mean (1/2, 1/2) has entropy ln 2; mean (0, 1) has 0
    close(window_entropy_loss(one_hot, ONE, window=2), LN2 / 2)
    close(window_entropy_loss(one_hot, torch.tensor([[0, 0, 1]]), window=2), LN2)
    close(window_entropy_loss(one_hot, torch.tensor([[0, 1, 1]]), window=2), 0.0)
    close(window_entropy_loss(one_hot, torch.tensor([[0, -1, 0]]), window=3), 0.0)
    close(window_entropy_loss(one_hot, ONE), 0.0)  # a row shorter than the window has none


def test_trust_loss() -> None:
    reference = torch.full((1, 3, 3), 1 / 3, dtype=torch.float64).log().requires_grad_()
    # KL(P || uniform) = ln 3 - H(P), H = (1/2) ln 2 + 2 (1/4) ln 4 = 1.5 ln 2, for every token
    logits = PROBS.log().clone().requires_grad_()
    loss = trust_loss(logits.log_softmax(-1), reference, ONE)
    close(loss, LN3 - 1.5 * LN2)
    loss.sum().backward()
    assert reference.grad is None
    assert logits.grad is not None and logits.grad.abs().sum() > 0
    close(trust_loss(PROBS.log(), PROBS.log(), ONE), 0.0)


def test_overlap() -> None:
    # {0,1} {1,2} {2,0}: one of two shared, twice; order within a token does not matter
    close(overlap(IDS, ONE), 0.5)
    close(overlap(torch.tensor([[[0, 1], [1, 0], [2, 3]]]), ONE), 0.5)
    close(overlap(IDS, torch.tensor([[0, 1, 2]])), 0.0)


def test_masks() -> None:
    documents = torch.tensor([[0, 0, 1, 1, -1, -1]])
    assert pair_mask(documents).tolist() == [[True, False, True, False, False]]
    assert pair_mask(documents, lag=9).shape == (1, 0)
    close(row_mean(torch.tensor([[1.0, 3.0, math.nan]]), torch.tensor([[True, True, False]])), 2.0)
    close(row_mean(torch.tensor([[1.0]]), torch.tensor([[False]])), 0.0)


def test_warm_up() -> None:
    assert [warm_up(step, 4) for step in (1, 2, 4, 5)] == [0.25, 0.5, 1.0, 1.0]
    assert warm_up(1, 0) == 1.0


def test_router_terms_weighs_the_terms_and_warms_up_locality_only() -> None:
    reference = torch.full((1, 3, 3), 1 / 3, dtype=torch.float64).log()
    alone: dict[str, float] = {}
    for name in ("reuse", "smooth", "lag", "window", "kl"):
        weights = LossWeights(**{name: 1.0})
        alone[name] = router_terms(PROBS.log(), IDS, reference, ONE, weights, 1.0).loss.item()
    close(torch.tensor([alone["reuse"], alone["smooth"]]), -math.log(0.375), 0.5 * LN2)
    weights = LossWeights(reuse=2.0, smooth=3.0, lag=5.0, window=7.0, kl=11.0)
    terms = router_terms(PROBS.log(), IDS, reference, ONE, weights, 0.25)
    local = 2 * alone["reuse"] + 3 * alone["smooth"] + 5 * alone["lag"] + 7 * alone["window"]
    close(terms.loss, 0.25 * local + 11 * alone["kl"])
    close(terms.kl, LN3 - 1.5 * LN2)
    close(terms.eor, 0.5)


@pytest.mark.parametrize("name", ["reuse", "smooth", "lag", "window", "kl"])
def test_terms_are_blind_to_padding_and_do_not_look_across_documents(name: str) -> None:
    weights = LossWeights(**{name: 1.0})

    def loss(logits: Tensor, ids: Tensor, reference: Tensor, documents: Tensor) -> Tensor:
        return router_terms(logits.log_softmax(-1), ids, reference.log_softmax(-1), documents, weights, 1.0).loss

    torch.manual_seed(3)
    logits, reference = torch.randn(1, 60, 5).double(), torch.randn(1, 60, 5).double()
    ids = torch.randn(1, 60, 5).topk(2).indices
    documents = torch.zeros(1, 60, dtype=torch.long)
    first = loss(logits[:, :20], ids[:, :20], reference[:, :20], documents[:, :20])
    second = loss(logits[:, 20:40], ids[:, 20:40], reference[:, 20:40], documents[:, 20:40])
    assert first.item() > 0 and abs(first - second).item() > 1e-4

    documents[:, 20:] = -1  # padding on the right, then on the left
    close(loss(logits, ids, reference, documents), first.item())
    flipped = documents.roll(40, 1)
    close(loss(logits.roll(40, 1), ids.roll(40, 1), reference.roll(40, 1), flipped), first.item())

    documents[:, 20:40] = 1
    if name == "reuse":  # -log of the mean over both documents' pairs, of equal number
        joined = -math.log((math.exp(-first) + math.exp(-second)) / 2)
    else:
        joined = (first + second).item() / 2
    close(loss(logits, ids, reference, documents), joined)
