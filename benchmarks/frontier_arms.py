"""The rivals of the frontier: ways to choose experts that others published, each by its paper's equations.

Shapes: N rows of a batch, E experts, K chosen; `z` is what the router ranks (its logits, for all three bases). Weights
always come from the router's untouched scores, as in the papers.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from frontier_decode import Caches, Rule, Setting
from frontier_reuse import ReuseDistance
from torch import Tensor

from remoe_adapt.routers import RouterSpec


def places(values_NE: Tensor) -> Tensor:
    """Each expert's place among its row's, the largest value at 0; of equals the lowest index first."""
    order_NE = values_NE.sort(dim=-1, descending=True, stable=True).indices
    count_NE = torch.arange(values_NE.shape[-1]).expand(values_NE.shape)
    return torch.empty_like(order_NE).scatter_(-1, order_NE, count_NE)


def promoted(place_NE: Tensor, *raised: Tensor) -> Tensor:
    """Values that rank experts by their place, those of the first mask before all others, then those of the second."""
    values_NE = -place_NE.float()
    for worth, mask_NE in enumerate(reversed(raised), 1):
        values_NE = torch.where(mask_NE, worth * place_NE.shape[-1] - place_NE, values_NE)
    return values_NE


class Native(Rule):
    """The router's own choice, whatever is resident."""

    name = "native"

    def ranked_NE(self, layer: int, choice_NE: Tensor, probabilities_NE: Tensor, resident_NE: Tensor) -> Tensor:
        return choice_NE


class CachePrior(Rule):
    """Cache-Prior (Skliar et al., arXiv:2412.00099, section 3): experts rank by z' = z + gain * D_avg * m.

    m is 1 for experts in the cache and for the router's own top J; D_avg is the running mean of max z - min z over the
    row's tokens so far, of each layer. gain (the paper's lambda) runs from 0, the router's choice, to 1.
    """

    name = "cache-prior"

    def begin(self, specs: Sequence[RouterSpec], rows: int, caches: Caches) -> None:
        super().begin(specs, rows, caches)
        self.gain_N1, self.top_N1 = self.each_N1("gain"), self.each_N1("J")
        self.span = [torch.zeros_like(self.gain_N1) for _ in specs]
        self.seen = [0] * len(specs)

    def ranked_NE(self, layer: int, choice_NE: Tensor, probabilities_NE: Tensor, resident_NE: Tensor) -> Tensor:
        lowest_N1, highest_N1 = choice_NE.aminmax(dim=-1, keepdim=True)
        self.seen[layer] += 1
        self.span[layer] += (highest_N1 - lowest_N1 - self.span[layer]) / self.seen[layer]
        marked_NE = resident_NE | (places(choice_NE) < self.top_N1)
        return choice_NE + self.gain_N1 * self.span[layer] * marked_NE


class KeptPrior(CachePrior):
    """Cache-Prior with the weights of mode `cost`: how much of what that mode saves is due to the weights alone."""

    name = "cache-prior, weights kept"
    keeps_weights = True


class MaxRank(Rule):
    """Max-Rank (arXiv:2412.00099, section 3 and algorithm 1): of the M best experts those in the cache come first, in
    their own order; then all others in theirs. The router's own top J are always taken. M = K is the router's choice.
    """

    name = "max-rank"

    def begin(self, specs: Sequence[RouterSpec], rows: int, caches: Caches) -> None:
        super().begin(specs, rows, caches)
        self.window_N1, self.top_N1 = self.each_N1("M"), self.each_N1("J")

    def ranked_NE(self, layer: int, choice_NE: Tensor, probabilities_NE: Tensor, resident_NE: Tensor) -> Tensor:
        place_NE = places(choice_NE)
        return promoted(place_NE, place_NE < self.top_N1, resident_NE & (place_NE < self.window_N1))


class CumulativeThreshold(Rule):
    """Cumulative probability threshold (arXiv:2412.00099, section 3 and algorithm 2): as Max-Rank, over as many of the
    best experts as it takes for their probabilities to sum to p. The router's own top J are always taken.
    """

    name = "cumulative"

    def begin(self, specs: Sequence[RouterSpec], rows: int, caches: Caches) -> None:
        super().begin(specs, rows, caches)
        self.mass_N1, self.top_N1 = self.each_N1("p"), self.each_N1("J")

    def ranked_NE(self, layer: int, choice_NE: Tensor, probabilities_NE: Tensor, resident_NE: Tensor) -> Tensor:
        place_NE = places(choice_NE)
        sorted_NE = torch.empty_like(probabilities_NE).scatter_(-1, place_NE, probabilities_NE)
        # An expert is in the set as long as the better ones do not reach p yet.
        before_NE = (sorted_NE.cumsum(dim=-1) - sorted_NE).gather(-1, place_NE)
        return promoted(place_NE, place_NE < self.top_N1, resident_NE & (before_NE < self.mass_N1))


class CoAware(Rule):
    """CECAR's co-aware routing (its authors' code, github.com/malmong/CECAR, `_select_cecar`; no text at hand).

    A learned reuse distance d (`ReuseDistance`) drops the resident expert of the largest d, and steers routing: a
    resident expert gets z' = z + gain * delta * (1 - d / max d), with delta the gap between the largest z and the one
    at place `margin`, max over the row's resident experts. The J best by z' are taken in any case; behind them come
    resident ones only, as far as there are any. theirs: gain 1, margin 8 (of 64 experts), J = K / 2 for all K.
    Where fewer than K are resident theirs runs fewer experts; here the next best fill up, which costs a few misses in
    the first tokens of a row and is better for its quality. Forms of our own, to give the idea its best: margin 0 is
    the gap to the smallest z, as in Cache-Prior; the nearness is raised to `power` (theirs: 1), where 0 prefers all
    resident experts alike.
    """

    name = "cecar"

    def begin(self, specs: Sequence[RouterSpec], rows: int, caches: Caches) -> None:
        super().begin(specs, rows, caches)
        assert isinstance(caches.eviction, ReuseDistance)
        self.reuse = caches.eviction
        self.gain_N1, self.margin_N1 = self.each_N1("gain"), self.each_N1("margin")
        self.power_N1, self.top_N1 = self.each_N1("power"), self.each_N1("J")

    def ranked_NE(self, layer: int, choice_NE: Tensor, probabilities_NE: Tensor, resident_NE: Tensor) -> Tensor:
        sorted_NE = choice_NE.sort(dim=-1, descending=True).values
        last = choice_NE.shape[-1] - 1
        margin_N1 = torch.where(self.margin_N1 > 0, self.margin_N1, last).long()
        gap_N1 = sorted_NE[:, :1] - sorted_NE.gather(-1, margin_N1)
        distance_NE = self.reuse.distance_NE(layer)
        farthest_N1 = distance_NE.masked_fill(~resident_NE, 0.0).amax(dim=-1, keepdim=True).clamp_min(1e-6)
        near_NE = (1.0 - distance_NE / farthest_N1).clamp_min(0.0) ** self.power_N1 * resident_NE
        place_NE = places(choice_NE + self.gain_N1 * gap_N1 * near_NE)
        return promoted(place_NE, place_NE < self.top_N1, resident_NE)


def grid(**values: Sequence[float]) -> list[Setting]:
    """Every combination of these values."""
    return [dict(zip(values, row, strict=True)) for row in itertools.product(*values.values())]
