"""Which gate the tokens of a forward get: the fused operators, or the definition in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from remoe_adapt.gating import (
    BACKENDS,
    ENVIRONMENT,
    PriorStep,
    backend,
    explain,
    fused_gating,
    set_backend,
    topk_gating,
)
from remoe_adapt.routers import RouterSpec

__all__ = ["BACKENDS", "ENVIRONMENT", "backend", "explain", "gate_of", "set_backend"]

PriorGate = Callable[[Tensor, int, RouterSpec, PriorStep | None, Tensor | None], tuple[Tensor, Tensor]]


def gate_of(device: torch.device) -> PriorGate:
    """`reference.topk_gating` by the backend for this device; (logits_TE, k, spec, prior, bias_E) -> (weights, ids).

    In traced code always the operators, which ask for the backend whenever they run.
    """
    if torch.compiler.is_compiling() or backend(device) == "triton":
        return fused_gating
    return _by_definition


def _by_definition(
    logits_TE: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None = None, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    return topk_gating(logits_TE, k, spec, prior, bias_E=bias_E)
