"""The same places in all slots of a layer: what a copy of a whole slot, and a kernel that takes slot numbers, need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from remoe_adapt.expert_cache.pool import Parts, Pools, PoolSlot

# Parts of a slot lie at multiples of so many bytes, as torch's tensors do: elsewhere some kernels compute other last
# bits, and others cannot read.
ALIGNMENT = 64


class Places:
    """Where each part of an expert lies in a slot of its layer, and RAM for such slots.

    layers: by layer, offset, shape and dtype of each part, by name.
    slot_bytes: by layer, from one slot to the next where nothing else decides; a multiple of ALIGNMENT.
    pools: memory for slots, one pool for all slots of one size.

    parts: by layer, the tensors of a slot, by name, on any device.
    num_experts: by layer.
    device: a GPU that copies from these slots, whose memory is pinned for it; None: none.
    """

    def __init__(
        self, parts: Sequence[Mapping[str, Tensor]], num_experts: Sequence[int], device: torch.device | None = None
    ) -> None:
        placed = [_placed(tensors) for tensors in parts]
        self.layers: tuple[Parts, ...] = tuple(laid for laid, _ in placed)
        self.slot_bytes = tuple(size for _, size in placed)
        self.pools = Pools(self.slot_bytes, num_experts, device=device)

    def slot(self, layer: int) -> PoolSlot:
        """A slot with arbitrary contents; raises ConfigError as `SlotPool.take`."""
        return self.pools.of(layer).slot(self.layers[layer])

    def copied(self, layer: int, parts: Mapping[str, Tensor]) -> PoolSlot:
        """A slot with these parts, which lie elsewhere."""
        slot = self.slot(layer)
        for name, part in slot.items():
            part.copy_(parts[name])
        return slot

    def give_back(self) -> None:
        """Memory of free slots goes to the system."""
        self.pools.give_back()


def _placed(parts: Mapping[str, Tensor]) -> tuple[Parts, int]:
    """The parts of a slot one after another, and their bytes."""
    found, at = {}, 0
    for name, like in parts.items():
        found[name] = at, tuple(like.shape), like.dtype
        at += -(-like.nbytes // ALIGNMENT) * ALIGNMENT
    return found, max(ALIGNMENT, at)
