"""Where the experts of a layer are computed: one replaceable piece, and the leased slots that it computes with."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from remoe_adapt.cache.slots import Lease, Slot
from remoe_adapt.cache.tiers import ExpertCache
from remoe_adapt.interrupts import held_back


class Arithmetic(Protocol):
    """Computes one layer's experts.

    module: the experts module, which has no parameters. chosen: the slots of all experts that `ids_TK` names.
    """

    def __call__(
        self, module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: ChosenExperts
    ) -> Tensor: ...


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


class _Rows:
    """Stands for a parameter [E, ...]: row e is read from the slot of expert e."""

    __slots__ = ("_chosen", "_param")

    def __init__(self, chosen: ChosenExperts, param: str) -> None:
        self._chosen, self._param = chosen, param

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._chosen.slot(int(expert))[self._param]


def eager_arithmetic(
    module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, chosen: ChosenExperts
) -> Tensor:
    """The eager function of the module's class, which computes one expert after another in rising order.

    So every bit of the result is transformers' own, also when the experts come in several groups.
    """
    # The function reads its parameters from `self`: it gets a shallow copy of the module that has rows in their place.
    # A copy for each call needs no lock and no thread-local, and shares the submodules.
    copied: Any = object.__new__(type(module))
    fields = vars(copied)
    fields.update(vars(module))
    for slot in chosen.slots.values():
        for param in slot:
            fields[param] = _Rows(chosen, param)
        break
    return eager_function(type(module))(copied, hidden_TD, ids_TK, weights_TK)


@cache
def eager_function(cls: Any) -> Callable[..., Tensor]:
    """The forward of an experts class below transformers' choice of an implementation."""
    found: Callable[..., Tensor] = inspect.unwrap(cls.forward)
    return found
