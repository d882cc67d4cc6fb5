"""The target in one pass: the numbers and gradients of the losses it is made of, for any dtype and share."""

from __future__ import annotations

import pytest
import torch

from remoe_adapt.objective.losses import distillation_losses, next_token_losses
from remoe_adapt.objective.targets import Teacher, target_losses


@pytest.mark.parametrize("share", [0.0, 0.35, 1.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_sum_of_both_losses_and_of_their_gradients(share: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, base = (torch.randn(3, 9, 31).mul(6).to(dtype) for _ in range(2))
    base[0, 0, 1] = float("-inf")  # a token that the teacher excludes
    labels = torch.randint(0, 31, (3, 9))
    labels[1, 3:5], labels[2, 0], labels[2, 8] = -100, -100, -100
    plain, fused = (logits.clone().requires_grad_() for _ in range(2))
    ce = next_token_losses(plain, labels)
    finite = base.masked_fill(base == float("-inf"), torch.finfo(dtype).min / 4)
    kl = distillation_losses(plain, finite, labels)
    weights = torch.rand(3, 8)
    (((1 - share) * ce + share * kl) * weights).sum().backward()
    target, fused_ce, fused_kl = target_losses(fused, labels, Teacher.of(base), share)
    (target * weights).sum().backward()
    exact = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(fused_ce, ce.detach(), rtol=exact, atol=exact)
    assert fused_kl is not None and not fused_ce.requires_grad
    torch.testing.assert_close(fused_kl, kl.detach(), rtol=exact, atol=10 * exact)
    torch.testing.assert_close(target, ((1 - share) * ce + share * kl).detach(), rtol=exact, atol=10 * exact)
    assert plain.grad is not None and fused.grad is not None and fused.grad.dtype is dtype
    torch.testing.assert_close(fused.grad, plain.grad, rtol=exact, atol=exact)


def test_without_a_teacher_it_is_the_next_token_loss() -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(2, 5, 7, requires_grad=True), torch.randint(0, 7, (2, 5))
    target, ce, kl = target_losses(logits, labels)
    assert kl is None
    torch.testing.assert_close(target, next_token_losses(logits, labels))
    torch.testing.assert_close(ce, target.detach())
    with torch.no_grad():
        assert not target_losses(logits, labels)[0].requires_grad
