"""The one seam that picks how a gate is computed: one token on a CPU, fused kernels, or plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from remoe_adapt.gating.backends import BACKENDS, ENVIRONMENT, backend, explain, set_backend
from remoe_adapt.gating.decode import one_token
from remoe_adapt.gating.ops import MAX_ROUTE_TOKENS, fused_gating, fused_route
from remoe_adapt.gating.prior import RecencyPrior
from remoe_adapt.gating.reference import PriorStep, topk_gating
from remoe_adapt.routers.spec import RouterSpec

__all__ = ["BACKENDS", "ENVIRONMENT", "LayerGate", "backend", "explain", "gate", "set_backend"]


def gate(
    logits_TE: Tensor, k: int, spec: RouterSpec, prior: PriorStep | None = None, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`reference.topk_gating` by the backend for these tensors (in compiled graphs the operator asks for it)."""
    if torch.compiler.is_compiling() or backend(logits_TE.device) == "triton":
        return fused_gating(logits_TE, k, spec, prior, bias_E)
    return topk_gating(logits_TE, k, spec, prior, bias_E=bias_E)


class LayerGate:
    """The gate of router `layer` of a model under a recency prior; what `RouterForward.gate` is set to."""

    def __init__(self, prior: RecencyPrior, layer: int) -> None:
        self.prior, self.layer = prior, layer

    def __call__(self, logits_TE: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights [T, K] and ids [T, K]; tokens that belong to no known sequence are gated without the prior."""
        tokens = self.prior.here.tokens
        if tokens is not None and tokens.gains and logits_TE.shape[0] == 1 and not torch.compiler.is_dynamo_compiling():
            found = one_token(logits_TE, k, spec, tokens.steps[self.layer], tokens.gains[self.layer], bias_E)
            tokens.pending[self.layer] = found[1]
            return found
        tokens = self.prior.tokens(logits_TE.shape[0])
        if tokens is None or tokens.rests:
            return gate(logits_TE, k, spec, None, bias_E)
        weights_TK, ids_TK = gate(logits_TE, k, spec, tokens.step(self.layer), bias_E)
        tokens.chose(self.layer, ids_TK)
        return weights_TK, ids_TK

    def own(self, hidden: Tensor) -> dict[int, Tensor] | None:
        """Where to note the router's own choice for these hidden states [..., D], which stands while all gains are 0
        and for tokens that belong to no known sequence; None where the gate chooses."""
        tokens = self.prior.here.tokens
        if tokens is None or tokens.rests:
            tokens = self.prior.tokens(hidden.shape[:-1].numel())
            if tokens is None or (tokens.rests and tokens.ended):
                return {}
        return tokens.pending if tokens.rests else None

    def route(
        self, hidden_TD: Tensor, weight_ED: Tensor, linear_bias_E: Tensor | None, k: int, spec: RouterSpec,
        bias_E: Tensor | None, linear_fp32: bool,
    ) -> tuple[Tensor, Tensor, Tensor] | None:  # fmt: skip
        """Product and gate in one launch: logits [T, E], weights and ids; None where that is not to be had."""
        if len(hidden_TD) > MAX_ROUTE_TOKENS or torch.is_grad_enabled() or backend(hidden_TD.device) != "triton":
            return None
        tokens = self.prior.tokens(len(hidden_TD))
        if tokens is not None and tokens.count != tokens.sequences:
            return None  # several tokens of a sequence: the scan
        prior = None if tokens is None else tokens.step(self.layer)
        found = fused_route(hidden_TD, weight_ED, k, spec, prior, bias_E, linear_bias_E, linear_fp32)
        if tokens is not None:
            tokens.chose(self.layer, found[2])
        return found
