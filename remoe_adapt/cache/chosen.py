"""The leased slots that one forward of a layer computes with; a ChosenSlots of cache/encoding.py."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from remoe_adapt.cache.slots import Lease, Slot
from remoe_adapt.cache.tiers import ExpertCache
from remoe_adapt.interrupts import held_back


class _Saved(NamedTuple):
    """A view of a slot that backward needs. The slot is leased again then, so no graph exceeds the budget."""

    expert: int
    param: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class ChosenExperts:
    """The experts that one forward of one layer computes with, in rising order.

    All are leased at once where the budget holds them. Else as many are leased at a time as it holds, and the slots of
    one group are given back before the next group is leased.

    expert_cache: the cache. layer: the layer in it. experts: distinct, in rising order.
    """

    def __init__(self, expert_cache: ExpertCache, layer: int, experts: Sequence[int]) -> None:
        self._cache, self._layer, self._later = expert_cache, layer, experts
        self._lease: Lease | None = None
        self._is_first = True
        self.slots: Mapping[int, Slot] = {}
        self._places: dict[int, tuple[int, str]] | None = None

    def lease_next(self) -> None:
        """Lease the next group: `slots` holds it, and it alone."""
        with held_back():
            self.release()
            self._lease = self._cache.lease(self._layer, self._later, continues=not self._is_first)
            self._is_first, self.slots, self._places = False, self._lease.slots, None
            self._later = self._later[len(self.slots) :]

    def slot(self, expert: int) -> Slot:
        """The slot of a chosen expert, for a caller that asks in rising order."""
        while expert not in self.slots:
            if not self._later:
                raise KeyError(expert)
            self.lease_next()
        return self.slots[expert]

    def groups(self) -> Iterator[Mapping[int, Slot]]:
        """The slots by expert, group after group: a single one where the budget holds all of them."""
        if self.slots:
            yield self.slots
        while self._later:
            self.lease_next()
            yield self.slots

    def release(self) -> None:
        """Give back what is leased; once is enough."""
        lease, self._lease, self.slots = self._lease, None, {}
        if lease is not None:
            lease.release()

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        """For saved_tensors_hooks: a view of a slot is saved as its place."""
        if self._places is None:
            self._places = {
                param.untyped_storage().data_ptr(): (expert, name)
                for expert, slot in self.slots.items()
                for name, param in slot.items()
            }
        place = self._places.get(tensor.untyped_storage().data_ptr()) if self._lease is not None else None
        if place is None:
            return tensor
        return _Saved(*place, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        """For saved_tensors_hooks, in backward."""
        if isinstance(saved, Tensor):
            return saved
        with held_back(), self._cache.lease(self._layer, [saved.expert], continues=True) as lease:
            whole = lease.slots[saved.expert][saved.param]
        return whole.as_strided(saved.size, saved.stride, saved.offset)
