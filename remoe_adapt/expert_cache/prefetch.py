"""Prediction of the next layer's experts, and read-aheads of those that the predictor has lately been right about.

The router of layer l + 1 is run on the input of layer l's experts: the residual stream moves little in one layer, so
most of its best choices come out the same (A. Eliseev, D. Mazur, Fast Inference of MoE Language Models with Offloading,
arXiv:2312.17238, section 3.2). How often depends on the model, the layer and the rank of the choice, so each layer and
rank has a score: the share of its predictions that were missing, and that the layer then did ask for.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt._support import say_once
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.experts import CachedExperts, cached_layer
from remoe_adapt.routers import RouterRef, Routers, survey_routers

# Forwards of more tokens are not predicted: they ask for most experts anyway, and their reads fill the device.
MAX_TOKENS = 8
# Scores are means over about the last 1 / RATE predictions; new ones stand between reading and not.
RATE, FIRST_SCORE = 0.05, 0.5
# Without a read-ahead in the offing, one forward in so many is predicted all the same, to keep the scores.
SAMPLED = 8
# A wrong read-ahead evicts the least valued expert, and takes the memory bus and a core from what computes.
MIN_SCORE = 0.5
# `window_s` is a mean over about the last 1 / _WINDOW_RATE predictions.
_WINDOW_RATE = 0.1


class _Router:
    """One router to predict with. It holds no part of the model alive."""

    def __init__(self, ref: RouterRef, num_experts: int) -> None:
        self._name, self.spec = ref.name, ref.spec
        self._module, self._block = weakref.ref(ref.module), weakref.ref(ref.block)
        self._num_experts = num_experts
        self.scores = [FIRST_SCORE] * ref.spec.top_k
        self.skipped = 0
        # Seconds from the prediction to the layer's look-ups, lately.
        self.window_s = 0.0

    def predict(self, hidden_TD: Tensor) -> list[list[int]] | None:
        """The chosen experts of each token, best first, by the live weight; None where the input is not the router's.

        The module's own forward is not called: whoever records, hooks or replaces it sees nothing.
        """
        module, block = self._module(), self._block()
        if module is None or block is None or hidden_TD.shape[-1] != self.spec.hidden_size:
            return None
        ref = RouterRef(self._name, module, self.spec, block)
        weight_ED = ref.weight_ED[: self.spec.num_experts]
        bias_name = self.spec.logit_bias_name
        bias_E = None if bias_name is None else module.get_parameter(bias_name).to(weight_ED.dtype)
        logits_TE = F.linear(hidden_TD.to(weight_ED.dtype), weight_ED, bias_E)
        found: list[list[int]] = ref.choice_scores(logits_TE).topk(self.spec.top_k, dim=-1).indices.tolist()
        return found

    def ranked(self, hidden_TD: Tensor) -> dict[int, int]:
        """Predicted experts and the best rank that a token gives each, by rank."""
        ranks: dict[int, int] = {}
        chosen = self.predict(hidden_TD) or []
        for rank in range(self.spec.top_k):
            for experts in chosen:
                if experts[rank] < self._num_experts:  # a router may choose null experts, which have no weights
                    ranks.setdefault(experts[rank], rank)
        return ranks

    def score(self, missing: dict[int, int], asked: set[int], window_s: float) -> None:
        """Learn from a prediction: which of the `missing` experts (and ranks) the layer asked for, `window_s` later."""
        self.window_s += _WINDOW_RATE * (window_s - self.window_s)
        for expert, rank in missing.items():
            self.scores[rank] += RATE * ((expert in asked) - self.scores[rank])

    def threshold(self, miss_s: float) -> float:
        """The score from which reading ahead gains more than it loses.

        Let a read take r (`miss_s`) and W pass before the layer looks up. A right read-ahead saves min(W, r) of the
        wait; a wrong one that is under way then holds the device for max(r - W, 0) longer. They balance at a share of
        1 - W / r right ones.
        """
        return max(MIN_SCORE, 1.0 - self.window_s / miss_s) if miss_s > 0.0 else MIN_SCORE


class Prefetcher:
    """Predicts for the layers of one model, in the threads that run it, and posts read-aheads to its expert cache."""

    def __init__(self, expert_cache: ExpertCache, routers: dict[int, RouterRef]) -> None:
        """`routers`: by the layer of the cache."""
        self._cache = expert_cache
        self._routers = {layer: _Router(ref, expert_cache.source.num_experts[layer]) for layer, ref in routers.items()}
        # Each thread runs its own forwards. `prediction` is (layer, {expert: rank}, when), until the layer looks up.
        self._of_thread = threading.local()

    @property
    def scores(self) -> dict[int, list[float]]:
        """By layer and rank, in [0, 1]."""
        return {layer: list(router.scores) for layer, router in self._routers.items()}

    def score(self, layer: int, experts: Sequence[int]) -> None:
        """A layer asks for these experts: score what was predicted for it."""
        predicted = getattr(self._of_thread, "prediction", None)
        # Taken once: what a later forward asks for was not predicted by this one.
        if predicted is not None:
            self._of_thread.prediction = None
            if predicted[0] == layer:
                self._routers[layer].score(predicted[1], set(experts), time.perf_counter() - predicted[2])

    def read_ahead(self, layer: int, hidden_TD: Tensor) -> None:
        """A layer computes on `hidden_TD` [T, D] from now on: predict the next one's experts, and read ahead."""
        router = self._routers.get(layer + 1)
        if router is None or len(hidden_TD) > MAX_TOKENS or self._cache.is_whole(layer + 1):
            return
        least = router.threshold(self._cache.miss_s)
        if max(router.scores) < least:
            router.skipped += 1
            if router.skipped % SAMPLED:
                return
        with torch.no_grad():
            ranks = router.ranked(hidden_TD)
        missing = {expert: ranks[expert] for expert in self._cache.missing(layer + 1, ranks)}
        if missing:
            self._of_thread.prediction = layer + 1, missing, time.perf_counter()
            wanted = [expert for expert, rank in ranks.items() if router.scores[rank] >= least]
            if not missing.keys().isdisjoint(wanted):
                self._cache.prefetch(layer + 1, wanted)


def bind_prefetch(model: nn.Module, expert_cache: ExpertCache, survey: Routers | None = None) -> Prefetcher | None:
    """Let a model, bound to this cache, read ahead; None, said once, when none of its routers can be predicted with.

    survey: the routers of `model`, where they are known already.
    Layers are taken to run in the cache's order; where they do not, predictions fail and nothing is read ahead.
    """
    survey = survey or survey_routers(model)
    layers = expert_cache.source.layers
    routers = {layer: ref for ref in survey.refs if (layer := cached_layer(ref.block)) is not None}
    known = [layer for layer in range(1, len(layers)) if layer in routers]
    if len(known) < len(layers) - 1:
        reasons = sorted({reason for _, reason in survey.refused}) or ["their routers are not known"]
        say_once(
            f"{type(model).__name__}: {len(layers) - 1 - len(known)} of {len(layers)} layers of experts are read only "
            f"when they are asked for, not ahead ({'; '.join(reasons)})."
        )
    if not known:
        return None
    prefetcher = Prefetcher(expert_cache, {layer: routers[layer] for layer in known})
    for name in layers:
        cached = getattr(model.get_submodule(name), "cached_experts", None)
        if isinstance(cached, CachedExperts):
            cached.predictor = prefetcher
    return prefetcher
