"""What one router does, as data: how it scores, how experts rank, what its forward returns.

Shapes: T tokens (all leading axes flattened), E choices of the router, K chosen per token, D columns of its weight.
Experts rank the same on every device: largest first, NaN above all, equals by lowest index.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt.errors import UnsupportedRouterError

SCORINGS = (
    "softmax",  # p = softmax(z); top-k of p; weights p, renormalised or not
    "topk_softmax",  # top-k of z (+ logit bias); softmax over the chosen
    "softmax_bias",  # p = softmax(z); top-k of p + bias; weights p
    "softmax_group",  # p = softmax(z); best groups first; top-k inside them; weights p
    "sigmoid",  # s = sigmoid(z); top-k of z or s; weights s
    "sigmoid_bias",  # s = sigmoid(z); top-k of s + bias; weights s
    "sigmoid_group",  # the same, best groups first
    "logit_bias_sigmoid",  # top-k of z + bias; weights sigmoid(z)
    "sqrt_softplus_bias",  # s = sqrt(softplus(z)); top-k of s + bias; weights s
    "sparsemixer",  # top-2 of z; each weight a softmax over the logits close to the best one left
)

STANDARD_RETURNS = ("logits", "weights", "ids")
# What a PeftModel puts before the names of its base, and torch.compile before those of the model it is given.
PEFT_PREFIX = "base_model.model."
_COMPILED = "_orig_mod."


def plain_name(name: str) -> str:
    """The name of a module inside the base model, from its name in a PeftModel or compiled model around it."""
    return name.removeprefix(_COMPILED).removeprefix(PEFT_PREFIX).removeprefix(_COMPILED)


@dataclass(frozen=True, slots=True)
class RouterOutput:
    """One router call: logits_TE (model dtype), weights_TK (None where the router returns none), ids_TK int64."""

    logits_TE: Tensor
    weights_TK: Tensor | None
    ids_TK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpec:
    """The facts of one router; immutable, no tensors inside.

    num_experts E is what can be chosen, so the width of `logits_TE`: it counts the last `null_experts` choices, which
    have no weights of their own (zero experts, skip). `num_rows` is the row count of the weight: E, except where
    shared experts have rows too. `correction_bias_name` is relative to the router module, or to its parent block when
    `correction_bias_in_block`; it shifts the ranking only. `logit_bias_name` is already part of the returned logits.
    `returns` names the entries of the forward's result in order. `weight_rule` says how the weights of the chosen
    come about: "score" (the chosen scores, over their sum + `normalize_eps` if `normalize`, times `scaling`),
    "chosen_softmax" (softmax over the chosen logits, times `scaling`), "null_is_zero" (score, null experts at 0), or
    another name where more than logits decides. Derived: `ranks_logits`, the logits themselves are ranked;
    `is_chosen_softmax`, the weights are a softmax over the chosen logits (as softmax scores over their sum are).
    """

    scoring: str
    num_experts: int
    top_k: int
    hidden_size: int
    weight_name: str
    num_rows: int
    null_experts: int = 0
    score: str = "softmax"
    normalize: bool = False
    normalize_eps: float = 0.0
    scaling: float = 1.0
    weight_rule: str = "score"
    n_group: int = 1
    topk_group: int = 1
    group_score: str | None = None
    group_fill: float = -math.inf
    correction_bias_name: str | None = None
    correction_bias_in_block: bool = False
    logit_bias_name: str | None = None
    returns: tuple[str, ...] = STANDARD_RETURNS
    ranks_logits: bool = field(init=False, repr=False, compare=False)
    is_chosen_softmax: bool = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        chosen = self.weight_rule == "score" and self.normalize and self.score == "softmax"
        object.__setattr__(self, "ranks_logits", self.scoring in ("softmax", "topk_softmax", "sparsemixer"))
        object.__setattr__(self, "is_chosen_softmax", chosen or self.weight_rule == "chosen_softmax")

    def scores(self, logits_TE: Tensor) -> Tensor:
        """Unbiased fp32 scores [T, E] that the expert weights are taken from; differentiable."""
        logits_TE = logits_TE.float()
        if self.score == "softmax":
            return logits_TE.softmax(dim=-1)
        if self.score == "sigmoid":
            return logits_TE.sigmoid()
        return F.softplus(logits_TE).sqrt()

    def probabilities(self, logits_TE: Tensor) -> Tensor:
        """fp32 distribution over experts [T, E], rows sum to 1; differentiable. Not softmax: scores over their sum."""
        scores_TE = self.scores(logits_TE)
        if self.score == "softmax":
            return scores_TE
        return scores_TE / scores_TE.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def choice_scores(self, logits_TE: Tensor, correction_bias_E: Tensor | None = None) -> Tensor:
        """Values [T, E] whose K largest are chosen (before any recency prior).

        The logits themselves where ranking needs no more; scores (+ bias, fp32) in bias and group scorings, with
        experts outside the chosen groups at `group_fill`. `correction_bias_E` is ignored by scorings without one.
        """
        if self.ranks_logits:
            return logits_TE
        if self.scoring == "sigmoid":
            return self.scores(logits_TE)
        choice_TE = logits_TE.float() if self.scoring == "logit_bias_sigmoid" else self.scores(logits_TE)
        if correction_bias_E is not None:
            choice_TE = choice_TE + correction_bias_E.float().reshape(-1)
        return choice_TE if self.group_score is None else self._keep_best_groups(choice_TE)

    def expert_weights(self, logits_TE: Tensor, ids_TK: Tensor) -> Tensor:
        """fp32 weights [T, K] of the chosen experts; differentiable.

        Raises UnsupportedRouterError where more than the logits decides (see `weight_rule`).
        """
        if self.is_chosen_softmax:
            weights_TK = logits_TE.float().gather(-1, ids_TK).softmax(dim=-1)
            return weights_TK if self.scaling == 1.0 else weights_TK * self.scaling
        if self.weight_rule not in ("score", "null_is_zero"):
            raise UnsupportedRouterError(
                f"weights of a {self.scoring} router with the rule {self.weight_rule!r} do not follow from its logits: "
                "let the model's own router compute them."
            )
        weights_TK = self.scores(logits_TE).gather(-1, ids_TK)
        if self.normalize:
            total_T1 = weights_TK.sum(dim=-1, keepdim=True)
            weights_TK = weights_TK / (total_T1 + self.normalize_eps if self.normalize_eps else total_T1)
        if self.weight_rule == "null_is_zero":
            weights_TK = weights_TK.masked_fill(ids_TK >= self.num_experts - self.null_experts, 0.0)
        return weights_TK if self.scaling == 1.0 else weights_TK * self.scaling

    def _keep_best_groups(self, choice_TE: Tensor) -> Tensor:
        groups_TGE = choice_TE.reshape(*choice_TE.shape[:-1], self.n_group, -1)
        if self.group_score == "max":
            group_TG = groups_TGE.amax(dim=-1)
        else:
            group_TG = groups_TGE.topk(2, dim=-1).values.sum(dim=-1)
        best_TG = best_ids(group_TG, self.topk_group)
        dropped_TG = torch.ones_like(group_TG, dtype=torch.bool).scatter(-1, best_TG, False)
        return groups_TGE.masked_fill(dropped_TG.unsqueeze(-1), self.group_fill).flatten(-2)

    def read(self, output: Any) -> RouterOutput:
        """Logits, weights and chosen ids from what the router's forward returned, flattened over tokens.

        Where the router returns no ids they are the top-k of its logits, as its block computes them. Where it returns
        probabilities, the logits are their logarithm (equal up to a constant per token).

        Raises UnsupportedRouterError when the result does not have the entries of `returns`.
        """
        entries = tuple(output) if isinstance(output, (tuple, list)) else (output,)
        if len(entries) != len(self.returns):
            raise UnsupportedRouterError(
                f"a {self.scoring} router returned {len(entries)} values, expected {len(self.returns)}: "
                f"{', '.join(self.returns)}. Another transformers version? Please report it."
            )
        by_name = dict(zip(self.returns, entries, strict=True))
        source = by_name["probabilities" if "probabilities" in by_name else "logits"]
        if source.shape[-1] != self.num_experts:
            raise UnsupportedRouterError(
                f"a {self.scoring} router returned {tuple(source.shape)} as scores, expected {self.num_experts} per "
                "token. Another transformers version? Please report it."
            )
        if "probabilities" in by_name:
            tiny = torch.finfo(torch.float32).tiny
            logits_TE = source.reshape(-1, self.num_experts).clamp_min(tiny).log()
        else:
            logits_TE = source.reshape(-1, self.num_experts)
        weights_TK = by_name["weights"].reshape(-1, self.top_k) if "weights" in by_name else None
        if "ids" in by_name:
            ids_TK = by_name["ids"].reshape(-1, self.top_k).long()
        elif "masked_ids" in by_name:
            # A skipped slot is returned as expert 0 with weight 0; its true choice is the null expert.
            ids_TK = by_name["masked_ids"].reshape(-1, self.top_k).long()
            assert weights_TK is not None
            ids_TK = torch.where(weights_TK == 0, self.num_experts - 1, ids_TK)
        else:  # the dense weights of the others are 0
            ranked_TE = by_name.get("dense_weights", logits_TE).reshape(-1, self.num_experts)
            ids_TK = ranked_TE.topk(self.top_k, dim=-1).indices
        if weights_TK is None and "dense_weights" in by_name:
            weights_TK = by_name["dense_weights"].reshape(-1, self.num_experts).gather(-1, ids_TK)
        return RouterOutput(logits_TE, weights_TK, ids_TK)


@dataclass(frozen=True, slots=True)
class RouterRef:
    """A router inside a model: its path (the wrapper's when wrapped), the base module, its block, its facts."""

    name: str
    module: nn.Module
    spec: RouterSpec
    block: nn.Module

    @property
    def weight_ED(self) -> nn.Parameter:
        """The live base weight, [num_rows, hidden_size]."""
        return self.module.get_parameter(self.spec.weight_name)

    @property
    def outermost(self) -> nn.Module:
        """What the block calls now: the wrapper where the router is wrapped."""
        return self.block.get_submodule(self.name.rpartition(".")[2])

    @property
    def original_weight_ED(self) -> Tensor:
        """The weight without adapters, also while some are merged into the live one or a dial has turned it.

        A wrapper keeps it under the same name; asked by name, because wrappers are of a room above.
        """
        kept = getattr(self.outermost, "original_weight_ED", None)
        return kept if isinstance(kept, Tensor) else self.weight_ED

    @property
    def correction_bias_E(self) -> Tensor | None:
        """The live selection bias, or None."""
        if self.spec.correction_bias_name is None:
            return None
        owner_path, _, leaf = self.spec.correction_bias_name.rpartition(".")
        owner = (self.block if self.spec.correction_bias_in_block else self.module).get_submodule(owner_path)
        bias = getattr(owner, leaf)
        assert isinstance(bias, Tensor)
        return bias

    def choice_scores(self, logits_TE: Tensor) -> Tensor:
        """`RouterSpec.choice_scores` with this router's own selection bias."""
        return self.spec.choice_scores(logits_TE, self.correction_bias_E)


def best_ids(values_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest, best first; -0.0 equals 0.0, every NaN equals every other.

    As CPUs sort floats. On other devices whole numbers are sorted: CUDA does not put the NaN of each bf16 row first.
    """
    ranked_TE = values_TE if values_TE.is_cpu else ranking_keys(values_TE)
    return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def ranking_keys(values: Tensor) -> Tensor:
    """Whole numbers that order as `values` do: int32, int64 for fp64."""
    wide = values if values.dtype is torch.float64 else values.float()
    whole = torch.int64 if wide.dtype is torch.float64 else torch.int32
    bits = wide.view(whole)
    largest = torch.iinfo(whole).max
    keys = torch.where(bits < 0, bits ^ largest, bits)  # the larger a negative number's bits, the smaller it is
    return keys.masked_fill(wide == 0, 0).masked_fill(wide.isnan(), largest)
