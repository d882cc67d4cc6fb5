"""CECAR's learned reuse distance: how many tokens until an expert is used again, from what its router showed so far.

Shapes: L routers, N rows, E experts, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from frontier_decode import Eviction
from torch import Tensor

from remoe_adapt.routers import RouterSpec

# A use farther away than this counts as this far: nothing is held that long (CECAR clips at 48 of 64 experts).
HORIZON = 64
_FAST, _SLOW, _SLOWEST = 0.7, 0.9, 0.98


class _Features:
    """What is known of every expert of one router after each token."""

    def __init__(self, rows: int, experts: int) -> None:
        def start(value: float) -> Tensor:
            return torch.full((rows, experts), float(value))

        self.age, self.gap, self.count = start(HORIZON), start(HORIZON), start(0.0)
        self.used = {decay: start(0.0) for decay in (_FAST, _SLOW, _SLOWEST)}
        self.probability = {decay: start(1.0 / experts) for decay in (0.0, _FAST, _SLOW)}

    def move(self, ids_NK: Tensor, probabilities_NE: Tensor) -> None:
        """One token of each row."""
        chosen_NE = torch.zeros_like(self.age).scatter_(1, ids_NK, 1.0)
        self.age += 1.0
        self.gap = torch.where(chosen_NE > 0, self.age.clamp(max=HORIZON), self.gap)
        self.age = torch.where(chosen_NE > 0, 0.0, self.age)
        self.count += chosen_NE
        for decay, used_NE in self.used.items():
            used_NE.lerp_(chosen_NE, 1.0 - decay)
        for decay, mean_NE in self.probability.items():
            mean_NE.lerp_(probabilities_NE, 1.0 - decay)

    def stacked_NEF(self) -> Tensor:
        """All of them, and a 1."""
        age_NE = self.age.clamp(max=HORIZON)
        share_NE = self.count / self.count.amax(dim=-1, keepdim=True).clamp_min(1.0)
        logs = [mean_NE.clamp_min(1e-6).log() for mean_NE in self.probability.values()]
        found = [1.0 / (1.0 + age_NE), age_NE.log1p(), share_NE, self.gap.log1p(), *self.used.values(),
                 *(used_NE.sqrt() for used_NE in self.used.values()), *logs, torch.ones_like(age_NE)]  # fmt: skip
        return torch.stack(found, dim=-1)


class ReuseDistance(Eviction):
    """Drops the largest predicted distance. weights_LF: `fit`ted on a base's decoding of training text.

    CECAR trains a network of two features (1 / age, share of uses) towards the distance, clipped and scaled; this ridge
    regression of the logarithm has those and more (means of use and of router probability, the last gap).
    """

    def __init__(self, weights_LF: Tensor) -> None:
        self.weights_LF = weights_LF

    def begin(self, specs: Sequence[RouterSpec], rows: int) -> None:
        super().begin(specs, rows)
        self.features = [_Features(rows, spec.num_experts) for spec in specs]
        self._log_distance = [torch.zeros(rows, spec.num_experts) for spec in specs]

    def use(self, layer: int, ids_NK: Tensor, probabilities_NE: Tensor | None) -> None:
        assert probabilities_NE is not None
        self.features[layer].move(ids_NK, probabilities_NE)
        self._log_distance[layer] = self.features[layer].stacked_NEF() @ self.weights_LF[layer]

    def worth_NE(self, layer: int) -> Tensor:
        return -self._log_distance[layer].double()

    def distance_NE(self, layer: int) -> Tensor:
        """Predicted tokens until the next use, from 0."""
        return self._log_distance[layer].clamp(0.0, 10.0).expm1()


class Observed(ReuseDistance):
    """Watches a base decode training text under any caches, and fits the weights of a `ReuseDistance` afterwards."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0))

    def begin(self, specs: Sequence[RouterSpec], rows: int) -> None:
        super().begin(specs, rows)
        self.seen: list[list[Tensor]] = [[] for _ in specs]
        self.chosen: list[list[Tensor]] = [[] for _ in specs]

    def use(self, layer: int, ids_NK: Tensor, probabilities_NE: Tensor | None) -> None:
        assert probabilities_NE is not None
        self.features[layer].move(ids_NK, probabilities_NE)
        self.seen[layer].append(self.features[layer].stacked_NEF().half())
        self.chosen[layer].append(torch.zeros_like(probabilities_NE, dtype=torch.bool).scatter_(1, ids_NK, True))
        self._log_distance[layer] = self.features[layer].age.neg()

    def fitted(self, ridge: float = 1.0) -> ReuseDistance:
        """Least squares of log(1 + distance), where the row goes on for a whole horizon."""
        weights = []
        for seen, chosen in zip(self.seen, self.chosen, strict=True):
            features = torch.stack(seen[:-HORIZON]).float().flatten(0, 2)
            target = _distances(torch.stack(chosen))[:-HORIZON].log1p().flatten()
            square_FF = features.T @ features + ridge * torch.eye(features.shape[1])
            weights.append(torch.linalg.solve(square_FF, features.T @ target))
        return ReuseDistance(torch.stack(weights))


def _distances(chosen_SNE: Tensor) -> Tensor:
    """Tokens until the next use behind each token, HORIZON where none comes sooner."""
    next_NE = torch.full(chosen_SNE.shape[1:], float(HORIZON))
    found = []
    for chosen_NE in chosen_SNE.flip(0):
        found.append(next_NE)
        next_NE = torch.where(chosen_NE, 0.0, (next_NE + 1.0).clamp(max=HORIZON))
    return torch.stack(found).flip(0)
