"""The experts that are in their slots, and tensors that say so, kept up to date while others read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from remoe_adapt.cache.slots import Key, Slot
from remoe_adapt.errors import ConfigError


class Residency:
    """`slots` by (layer, expert); and, in [1, E] tensors of others, written in place, 1 where there is one, else 0."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._num_experts = num_experts
        self.slots: dict[Key, Slot] = {}
        self._held = [0 for _ in num_experts]
        self._shown: dict[int, list[Tensor]] = {}

    def put(self, key: Key, slot: Slot) -> None:
        """The expert has come."""
        self._held[key[0]] += key not in self.slots
        self.slots[key] = slot
        self._show(key, 1.0)

    def drop(self, key: Key) -> bool:
        """The expert goes; whether it was there."""
        there = self.slots.pop(key, None) is not None
        if there:
            self._held[key[0]] -= 1
            self._show(key, 0.0)
        return there

    def keep(self, keys: Iterable[Key]) -> None:
        """Only those of these that are there, counted anew."""
        kept = set(keys)
        for key in [key for key in self.slots if key not in kept]:
            del self.slots[key]
        self._held = [sum(at == layer for at, _ in self.slots) for layer in range(len(self._held))]

    def is_whole(self, layer: int) -> bool:
        """All experts of this layer are there."""
        return self._held[layer] == self._num_experts[layer]

    def follow(self, tensors: Sequence[Tensor], layers: Sequence[int] | None) -> None:
        """Write these tensors, of these layers, from now on, and no others; None: one for each layer, in order.

        Raises ConfigError when numbers or shapes do not fit.
        """
        places = list(range(len(self._num_experts)))[: len(tensors)] if layers is None else list(layers)
        counts = [self._num_experts[layer] for layer in places]
        if [tuple(tensor.shape) for tensor in tensors] != [(1, count) for count in counts]:
            shapes = [list(tensor.shape) for tensor in tensors]
            raise ConfigError(f"residency tensors {shapes} for layers of {counts} experts: give one [1, E] for each.")
        self._shown = {}
        with torch.no_grad():
            for layer, tensor in zip(places, tensors, strict=True):
                self._shown.setdefault(layer, []).append(tensor)
                tensor.zero_()
        for key in self.slots:
            self._show(key, 1.0)

    def _show(self, key: Key, value: float) -> None:
        shown = self._shown.get(key[0])
        if shown:
            with torch.no_grad():
                for tensor in shown:
                    tensor[0, key[1]] = value
