"""A source of experts of a few bytes that fails where it is told to, and threads that must end."""

from __future__ import annotations

import threading
import time

import torch
from torch import Tensor

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.cache import ExpertCache

Key = tuple[int, int]
LAYERS, EXPERTS = 3, 8


class Source:
    """Experts of a few bytes, of another size in each layer; notes what is read, and fails where it is told to."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.layers = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(LAYERS))
        self.num_experts, self.expert_bytes = (EXPERTS,) * LAYERS, tuple(8 + 4 * layer for layer in range(LAYERS))
        self.reads: list[Key] = []
        self.broken: set[Key] = set()
        self.delay_s = delay_s
        self.cache: ExpertCache | None = None

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        self.reads.append((layer, expert))
        if self.cache is not None:
            stats = self.cache.stats()
            assert stats["resident_bytes"] <= stats["budget_bytes"]
        if self.delay_s:
            time.sleep(self.delay_s)
        if (layer, expert) in self.broken:
            raise ExpertReadError(f"expert {expert} of layer {layer}")
        return {"w": torch.full((self.expert_bytes[layer] // 4,), 10.0 * layer + expert)}

    def like(self, layer: int) -> dict[str, Tensor]:
        """What a slot of this layer holds."""
        return {"w": torch.empty(self.expert_bytes[layer] // 4, device="meta")}

    def give_back(self) -> None:
        """Nothing is kept."""

    @property
    def total(self) -> int:
        return EXPERTS * sum(self.expert_bytes)


def leased_soon(cache: ExpertCache, experts: list[int]) -> bool:
    """Whether a lease of another thread ends by itself."""
    thread = threading.Thread(target=lambda: cache.lease(0, experts).release(), daemon=True)
    thread.start()
    thread.join(10)
    return not thread.is_alive()
