"""The gate of one token on a CPU, where every torch call costs as much as its arithmetic: the fewest calls.

Tensors are one row, [1, E] or [1, K]. A Python number given to a tensor operation is made a tensor at every call, so
constants are kept as tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from functools import lru_cache
from math import exp, inf, isfinite, log
from typing import Any

import torch
from torch import Tensor, add, aminmax, cat, logaddexp, mul, where

from remoe_adapt.gating.cost import LEAST_EXACT, divides, held
from remoe_adapt.gating.reference import MAX_SPAN, PriorStep, topk_gating
from remoe_adapt.routers import RouterSpec, best_ids


class Scratch(dict[int, tuple[Any, tuple[Tensor, Tensor], Tensor]]):
    """Memory for what leaves no trace, by number of experts: two numbers as an array, each of them as a tensor, ranked
    values [1, E]. One for the routers that a thread runs, since they run one after another."""

    def __missing__(self, experts: int) -> tuple[Any, tuple[Tensor, Tensor], Tensor]:
        with torch.inference_mode(False):
            ends_2 = torch.empty(2)
            lowest, highest = ends_2.unbind()
            # NumPy makes numbers of two values in half the time of a tensor.
            row = self[experts] = ends_2.numpy(), (lowest, highest), torch.empty((1, experts))
        return row


class SingleGate:
    """A StepGate's `gate` for one token of one sequence: `topk_gating` of a single row, to the bit.

    But the recency stays as it is (see `RecencyState.move`); what routers chose is kept by layer in `chosen`.

    steps, gains: the prior of each layer, and its gain, already read.
    """

    def __init__(self, steps: Sequence[PriorStep], gains: Sequence[float], scratch: Scratch) -> None:
        self._steps, self._gains, self._scratch = steps, gains, scratch
        self.chosen: dict[int, Tensor] = {}
        self._held: dict[tuple[int, int, bool], dict[int, Tensor]] = {}

    def gate(
        self, layer: int, logits_TE: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As StepGate. Gradients and values that are not finite go the long way."""
        # One function without helpers on the common way: after each product of a router the caches are cold, so that a
        # call in Python costs a microsecond.
        prior = self._steps[layer]
        if logits_TE.requires_grad:
            return self._by_definition(layer, logits_TE, k, spec, bias_E)
        z_1E = logits_TE if logits_TE.dtype is torch.float32 else logits_TE.float()
        scores_1E: Tensor | None = None
        if spec.ranks_logits:
            spread_1E = choice_1E = z_1E
        else:
            if spec.scoring == "logit_bias_sigmoid":
                choice_1E = z_1E
            else:
                choice_1E = scores_1E = spec.scores(z_1E)
            if bias_E is not None and spec.scoring != "sigmoid":
                choice_1E = choice_1E + (bias_E if bias_E.dtype is torch.float32 else bias_E.float())
                choice_1E = choice_1E if choice_1E.dim() == 2 else choice_1E.reshape(1, -1)
            spread_1E = choice_1E
            if spec.group_score is not None:
                choice_1E, spread_1E = _best_groups(choice_1E, spec)
            if choice_1E.requires_grad:  # of the bias
                return self._by_definition(layer, logits_TE, k, spec, bias_E)
        experts = spec.num_experts
        ends_2, ends, ranked_1E = self._scratch[experts]
        own: list[float] | None = None
        if prior.share is None:
            aminmax(spread_1E, out=ends)
            lowest, highest = ends_2.tolist()
            span = highest - lowest
            if not span <= MAX_SPAN:  # infinite, or NaN
                return self._by_definition(layer, logits_TE, k, spec, bias_E)
            # Rounded to fp32 where tensors are; `add` rounds the product and takes it in at once, as `addcmul` does.
            add(choice_1E, prior.recency_BE, alpha=c_float(span).value * self._gains[layer], out=ranked_1E)
        elif self._gains[layer] == 0.0:
            ranked_1E = choice_1E
        elif (own := self._rank(layer, z_1E, choice_1E, scores_1E, k, spec)) is None:
            return self._by_definition(layer, logits_TE, k, spec, bias_E)
        if k < experts:  # `_best`, without a call
            values_1K, ids_1K = ranked_1E.topk(k + 1)
            values = values_1K.tolist()[0]
            ids_1K = ids_1K.resize_(1, k) if len(set(values)) > k else best_ids(ranked_1E, k)
        else:
            values, ids_1K = ranked_1E.amax(-1).tolist(), best_ids(ranked_1E, k)
        # Where the definition has no prices, or other values than these.
        if prior.share is not None and not (
            values[0] < inf and values[k - 1] > (LEAST_EXACT if self._gains[layer] else -inf)
        ):
            return self._by_definition(layer, logits_TE, k, spec, bias_E)
        self.chosen[layer] = ids_1K
        if spec.is_chosen_softmax and spec.scaling == 1.0:
            weights_1K = z_1E.take(ids_1K).softmax(-1)
        else:
            weights_1K = _weights(z_1E, scores_1E, ids_1K, spec)
        if own:  # `cost.kept_part`
            of_1E = z_1E if spec.is_chosen_softmax or scores_1E is None else scores_1E
            ends_2[0] = _kept_part(of_1E.take(ids_1K).tolist()[0], own, spec)
            weights_1K = mul(weights_1K, ends[0])
        return weights_1K, ids_1K

    def _rank(
        self, layer: int, z_1E: Tensor, choice_1E: Tensor, scores_1E: Tensor | None, k: int, spec: RouterSpec
    ) -> list[float] | None:
        """Writes what `cost.ranks` says into the scratch, where it is above LEAST_EXACT; None: not of this router.

        Returns of the router's own best the logits or scores by whose sum weights are divided; none if they are not.
        """
        if spec.scoring == "logit_bias_sigmoid":
            return None
        experts, gain, best = spec.num_experts, c_float(self._gains[layer]).value, []
        ends_2, (first, _), ranked_1E = self._scratch[experts]
        if spec.ranks_logits:
            base = log(gain)
            if divides(spec):
                best = z_1E.topk(k).values.tolist()[0]
                base += best[0] + log(sum([exp(value - best[0]) for value in best]))
            else:
                z_1E = z_1E.log_softmax(-1)
            ends_2[0] = -c_float(base).value
            add(first, z_1E, out=ranked_1E)
            logaddexp(ranked_1E, self._held_row(layer, k, experts, logs=True), out=ranked_1E)
            return best
        if spec.normalize:
            own_1K = _best(choice_1E, k, experts)
            gain *= abs(sum(choice_1E.take(own_1K).tolist()[0]))
            assert scores_1E is not None
            best = (z_1E if spec.is_chosen_softmax else scores_1E).take(own_1K).tolist()[0]
        ends_2[0] = scale = c_float(gain).value
        if not 0.0 < scale < inf:
            return None
        raised_1E = add(choice_1E, first)
        where(self._held_row(layer, k, experts, logs=False), raised_1E, choice_1E, out=ranked_1E)
        return best

    def _held_row(self, layer: int, k: int, experts: int, *, logs: bool) -> Tensor:
        """[1, E]: whether an expert is held; as the logarithm of 1 and 0 where logits are ranked.

        For the routers that are alike at once, since their recency stands still: a few calls a token and not a router.
        """
        rows = self._held.get((k, experts, logs))
        if rows is None:
            rows_of = enumerate(step.recency_BE for step in self._steps)
            alike = {at: recency_1E for at, recency_1E in rows_of if recency_1E.shape == (1, experts)}
            held_LE = held(cat(list(alike.values())), self._steps[layer].share or 0.0, k)
            if logs:
                held_LE = where(held_LE, _constant(0.0), _constant(-inf))
            rows = self._held[k, experts, logs] = dict(zip(alike, held_LE.split(1), strict=True))
        return rows[layer]

    def _by_definition(
        self, layer: int, logits_1E: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        prior = self._steps[layer]
        still = PriorStep(prior.recency_BE, prior.gain, None, None, prior.share)
        weights_1K, self.chosen[layer] = topk_gating(logits_1E, k, spec, still, bias_E=bias_E)
        return weights_1K, self.chosen[layer]


def _kept_part(chosen: list[float], own: list[float], spec: RouterSpec) -> float:
    """`cost.kept_part` of the chosen experts' logits or scores, and those of the router's own."""
    if spec.is_chosen_softmax:
        most = max(max(chosen), max(own))
        chosen, own = ([exp(value - most) for value in values] for values in (chosen, own))
    more = 0.0 if spec.is_chosen_softmax else spec.normalize_eps
    whole = sum(own) + more
    part = (sum(chosen) + more) / whole if whole else 1.0
    return part if isfinite(part) else 1.0


def _best(values_1N: Tensor, k: int, count: int) -> Tensor:
    """`best_ids` of `count` values by way of the faster `topk`; its order among equal values is not told, so with any
    the long way."""
    if k >= count:
        return best_ids(values_1N, k)
    values_1K, ids_1K = values_1N.topk(k + 1)
    if len(set(values_1K.tolist()[0])) <= k:
        return best_ids(values_1N, k)
    return ids_1K.resize_(1, k)


def _best_groups(choice_1E: Tensor, spec: RouterSpec) -> tuple[Tensor, Tensor]:
    """(choice with the other groups at the fill, the values that the span is taken of)."""
    groups_GE = choice_1E.view(spec.n_group, -1)
    if spec.group_score == "max":
        score_G = groups_GE.amax(dim=-1)
    else:
        score_G = groups_GE.topk(2, dim=-1).values.sum(dim=-1)
    kept = _best(score_G.view(1, -1), spec.topk_group, spec.n_group).view(-1)
    kept_GE = groups_GE.index_select(0, kept)
    filled_GE = torch.full_like(groups_GE, spec.group_fill).index_copy_(0, kept, kept_GE)
    filled_1E = filled_GE.view(1, -1)
    return filled_1E, kept_GE if spec.group_fill == -torch.inf else filled_1E


def _weights(z_1E: Tensor, scores_1E: Tensor | None, ids_1K: Tensor, spec: RouterSpec) -> Tensor:
    """`RouterSpec.expert_weights`, with the scores that are known."""
    if spec.is_chosen_softmax:
        weights_1K = z_1E.take(ids_1K).softmax(-1)
    elif spec.weight_rule != "score":
        return spec.expert_weights(z_1E, ids_1K)
    else:
        if scores_1E is not None:
            weights_1K = scores_1E.take(ids_1K)
        elif spec.score == "softmax":
            weights_1K = z_1E.softmax(-1).take(ids_1K)
        else:
            weights_1K = spec.scores(z_1E.take(ids_1K))
        if spec.normalize:
            total_11 = weights_1K.sum(-1, keepdim=True)
            weights_1K = weights_1K / (total_11 + _constant(spec.normalize_eps) if spec.normalize_eps else total_11)
    return weights_1K if spec.scaling == 1.0 else weights_1K * _constant(spec.scaling)


@lru_cache
def _constant(value: float) -> Tensor:
    """Not of inference mode, whatever the caller is in."""
    with torch.inference_mode(False):
        return torch.tensor(value)
