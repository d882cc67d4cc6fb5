"""What a student is trained towards, with its gradient written down: next tokens and a teacher's distribution at once.

A loss over a vocabulary is a quarter of a small model's training step when autograd goes through every exponential,
product and sum of it one by one. Here the one softmax that loss and gradient have in common is computed once.

Shapes: B rows, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.objective.losses import IGNORED_LABEL


@dataclass(frozen=True, slots=True)
class Teacher:
    """A teacher's next-token distributions [B, T, V], fp32 (fp64 from fp64), and their negative entropies [B, T]."""

    probs_BTV: Tensor
    sum_p_log_p_BT: Tensor

    @classmethod
    def of(cls, logits_BTV: Tensor) -> Teacher:
        """From the logits of its forward; no gradient. The memory of the logits is taken over where it fits."""
        logits_BTV = logits_BTV.detach()
        wide = torch.promote_types(logits_BTV.dtype, torch.float32)
        log_p_BTV = logits_BTV.to(wide).log_softmax(dim=-1)
        probs_BTV = log_p_BTV.exp()
        # An einsum makes no product of the size of all logits.
        entropy_BT = torch.einsum("btv,btv->bt", probs_BTV, log_p_BTV.clamp_min(torch.finfo(wide).min))
        return cls(probs_BTV, entropy_BT)


def target_losses(
    logits_BTV: Tensor, labels_BT: Tensor, teacher: Teacher | None = None, share: float = 0.0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(1 - share) * L_CE + share * KL(teacher || student) at each predicted token, [B, T-1] nats, with gradient.

    Beside it L_CE and the KL themselves for the log, without gradient; the KL is None without a teacher. 0 where the
    label is -100; labels are shifted here. `share` above 0 needs a teacher. The same numbers as `next_token_losses` and
    `distillation_losses` but for rounding.
    """
    parts = _Target.apply(  # type: ignore[no-untyped-call]
        logits_BTV,
        labels_BT,
        None if teacher is None else teacher.probs_BTV,
        None if teacher is None else teacher.sum_p_log_p_BT,
        share,
    )
    target_BT, ce_BT, kl_BT = (part[:, :-1] for part in parts)
    return target_BT, ce_BT, None if teacher is None else kl_BT


class _Target(torch.autograd.Function):
    """Over all T tokens, the last of which predicts nothing: cutting it off first would copy the logits."""

    @staticmethod
    def forward(
        ctx: Any, logits_BTV: Tensor, labels_BT: Tensor, base_BTV: Tensor | None, entropy_BT: Tensor | None,
        share: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        wide_BTV = logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32))
        targets_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=IGNORED_LABEL)
        ignored_BT = targets_BT == IGNORED_LABEL
        at_BT1 = targets_BT.clamp_min(0).unsqueeze(-1)  # -100 is no index; what is picked there is masked out below
        # Taken off before exp, which overflows at 88 in fp32; the result is the same.
        peak_BT1 = wide_BTV.amax(dim=-1, keepdim=True)
        gradient_BTV = (wide_BTV - peak_BT1).exp_()
        total_BT1 = gradient_BTV.sum(dim=-1, keepdim=True)
        log_z_BT = (total_BT1.log() + peak_BT1).squeeze(-1)
        ce_BT = (log_z_BT - wide_BTV.gather(-1, at_BT1).squeeze(-1)).masked_fill_(ignored_BT, 0.0)
        kl_BT = torch.zeros_like(ce_BT)
        if base_BTV is not None and entropy_BT is not None:
            cross_BT = torch.einsum("btv,btv->bt", base_BTV, wide_BTV)
            kl_BT = (entropy_BT - cross_BT + log_z_BT).masked_fill_(ignored_BT, 0.0)
        if ctx.needs_input_grad[0]:
            # d/dz of logsumexp(z) is softmax(z), and both targets are distributions: p - (1 - share) e_y - share q.
            gradient_BTV.div_(total_BT1)
            if share and base_BTV is not None:
                gradient_BTV.sub_(base_BTV, alpha=share)
            gradient_BTV.scatter_add_(-1, at_BT1, gradient_BTV.new_full((1, 1, 1), share - 1.0).expand(at_BT1.shape))
            ctx.dtype = logits_BTV.dtype
            ctx.save_for_backward(gradient_BTV, ignored_BT)
        ctx.mark_non_differentiable(ce_BT, kl_BT)
        return (1.0 - share) * ce_BT + share * kl_BT, ce_BT, kl_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: Tensor, _ce: Any, _kl: Any) -> tuple[Tensor | None, ...]:
        gradient_BTV, ignored_BT = ctx.saved_tensors
        scale_BT1 = grad_BT.masked_fill(ignored_BT, 0.0).unsqueeze(-1)
        return (gradient_BTV * scale_BT1).to(ctx.dtype), None, None, None, None
