"""Tensors that say which experts are in their slots, kept up to date while others read them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from remoe_adapt.cache.slots import Key
from remoe_adapt.errors import ConfigError


class Residency:
    """1 where an expert is in its slot and 0 elsewhere, in [1, E] tensors of others, written in place."""

    def __init__(self, num_experts: Sequence[int]) -> None:
        self._num_experts = num_experts
        self._shown: dict[int, list[Tensor]] = {}

    def follow(self, tensors: Sequence[Tensor], layers: Sequence[int] | None, resident: Iterable[Key]) -> None:
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
        for key in resident:
            self.set(key, 1.0)

    def set(self, key: Key, value: float) -> None:
        """The expert has come (1) or gone (0)."""
        shown = self._shown.get(key[0])
        if shown:
            with torch.no_grad():
                for tensor in shown:
                    tensor[0, key[1]] = value
