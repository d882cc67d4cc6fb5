"""Experts modules of transformers that compute on the slots of a cache instead of parameters of their own.

A cached module is of a subclass of its class, without parameters. Its forward runs the class's own eager function,
which takes one expert after another in rising order; where that reads row e of a parameter it gets expert e's slot. So
the arithmetic, and every bit of the result, is transformers' own, also when more experts are needed than fit: then
those that were computed with make room for the next.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from remoe_adapt.cache.slots import Lease, Slot
from remoe_adapt.cache.tiers import ExpertCache
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.interrupts import held_back, let_through
from remoe_adapt.tuner.beside import plain_base

_FORWARD_INPUTS = 3
_CPU = torch.device("cpu")


class _Saved(NamedTuple):
    """A view of a slot that backward needs: read again then, so that no graph holds experts beyond the budget."""

    expert: int
    param: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class Predictor(Protocol):
    """Looks a layer ahead of the forwards of a model; see cache/prefetch.py."""

    def settle(self, layer: int, experts: Sequence[int]) -> None:
        """This layer asks for these experts now."""
        ...

    def follow(self, layer: int, hidden_TD: Tensor) -> None:
        """This layer computes on this input from now on."""
        ...


class _Call:
    """One forward of one layer: the experts it needs, and the lease of those it computes with now.

    begin: called once the first of them are there.
    """

    def __init__(
        self, expert_cache: ExpertCache, layer: int, experts: Sequence[int], begin: Callable[[], None] | None
    ) -> None:
        self._cache, self._layer, self._left, self._begin = expert_cache, layer, experts, begin
        self._lease: Lease | None = None
        self._slots: Mapping[int, Slot] = {}
        self._begun = False
        self._places: dict[int, tuple[int, str]] | None = None

    def row(self, expert: int, param: str) -> Tensor:
        if expert not in self._slots:
            with held_back():
                self._advance(expert)
        return self._slots[expert][param]

    def _advance(self, expert: int) -> None:
        self.close()
        if self._begun:
            self._left = [other for other in self._left if other >= expert]
        self._lease = self._cache.lease(self._layer, self._left, continues=self._begun)
        self._slots, self._places = self._lease.slots, None
        if not self._begun:
            self._begun = True
            if self._begin is not None:
                self._begin()

    def close(self) -> None:
        lease, self._lease, self._slots = self._lease, None, {}
        if lease is not None:
            lease.release()

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        if self._places is None:
            self._places = {
                param.untyped_storage().data_ptr(): (expert, name)
                for expert, slot in self._slots.items()
                for name, param in slot.items()
            }
        place = self._places.get(tensor.untyped_storage().data_ptr()) if self._lease is not None else None
        if place is None:
            return tensor
        return _Saved(*place, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        with held_back(), self._cache.lease(self._layer, [saved.expert], continues=True) as lease:
            whole = lease.slots[saved.expert][saved.param]
        return whole.as_strided(saved.size, saved.stride, saved.offset)


class LayerExperts:
    """The experts of one layer, as its module finds them; threads have a call each."""

    def __init__(self, expert_cache: ExpertCache, layer: int, dtype: torch.dtype, device: torch.device) -> None:
        self.cache, self.layer, self._dtype, self._device = expert_cache, layer, dtype, device
        self.predictor: Predictor | None = None
        self._num_experts = expert_cache.source.num_experts[layer]
        self._here = threading.local()

    def __deepcopy__(self, memo: object) -> LayerExperts:
        return self

    def run(
        self, eager: Callable[..., Tensor], module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
    ) -> Tensor:
        """`eager(module, hidden_TD, ids_TK, weights_TK)` on the slots."""
        if hidden_TD.device != self._device:
            raise ConfigError(
                f"hidden states on {hidden_TD.device}, the cached experts on {self._device}: choose device= when the "
                "model is loaded instead of moving it."
            )
        if hidden_TD.dtype != self._dtype and not torch.is_autocast_enabled(self._device.type):
            raise ConfigError(
                f"hidden states are {hidden_TD.dtype}, the cached experts {self._dtype}: choose dtype= when the model "
                "is loaded instead of converting it."
            )
        count = self._num_experts
        needed = sorted(expert for expert in set(ids_TK.flatten().tolist()) if 0 <= expert < count)
        graph = torch.is_grad_enabled() and (hidden_TD.requires_grad or weights_TK.requires_grad)
        with held_back():
            begin = None
            if self.predictor is not None:
                self.predictor.settle(self.layer, needed)
                begin = partial(self.predictor.follow, self.layer, hidden_TD)
            call = self._here.call = _Call(self.cache, self.layer, needed, begin)
            try:
                with saved_tensors_hooks(call.pack, call.unpack) if graph else nullcontext(), let_through():
                    return eager(module, hidden_TD, ids_TK, weights_TK)
            finally:
                call.close()
                del self._here.call

    def row(self, expert: int, param: str) -> Tensor:
        call: _Call = self._here.call
        return call.row(expert, param)


class _Rows:
    """Stands where the parameter [E, ...] was: row e is expert e's slot."""

    def __init__(self, experts: LayerExperts, param: str) -> None:
        self._experts, self._param = experts, param

    def __deepcopy__(self, memo: object) -> _Rows:
        return self

    def __getitem__(self, expert: Tensor | int) -> Tensor:
        return self._experts.row(int(expert), self._param)


@cache
def _cached_class(cls: Any) -> type[nn.Module]:
    # Below the dispatch on `experts_implementation`: other functions want all experts in one tensor.
    eager = inspect.unwrap(cls.forward)
    signature = inspect.signature(eager)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        inputs = signature.bind(self, *args, **kwargs).args[1:] if kwargs else args
        return self.expert_rows.run(eager, self, *inputs)  # type: ignore[no-any-return]

    # Its work depends on the data: compiled code leaves it out.
    return type(
        cls.__name__,
        (cls,),
        {"forward": torch.compiler.disable(forward), "__module__": cls.__module__, "__doc__": cls.__doc__},
    )


def check_experts(modules: dict[str, nn.Module]) -> None:
    """Raises UncacheableError for a module whose eager function is not one of (hidden states, ids, weights)."""
    for name, module in modules.items():
        eager = inspect.unwrap(type(module).forward)
        if len(inspect.signature(eager).parameters) != _FORWARD_INPUTS + 1:
            raise UncacheableError(
                f"{name} ({type(module).__name__}) takes other inputs than experts do: it cannot be cached."
            )


@contextmanager
def experts_left_out(classes: set[type[nn.Module]]) -> Iterator[None]:
    """Within, in this thread: modules of these very classes are made without parameters, to be bound to a cache.

    The classes are changed meanwhile: one thread at a time.
    """
    thread, make = threading.get_ident(), cast(Callable[[Any], Any], _cached_class)

    def patched(cls: type[nn.Module], original: Callable[..., None]) -> Callable[..., None]:
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            original(self, *args, **kwargs)
            if type(self) is cls and threading.get_ident() == thread:
                for name in list(self._parameters):
                    delattr(self, name)
                # Nothing is left that transformers could initialise.
                vars(self)["_is_hf_initialized"] = True
                self.__class__ = make(cls)

        return init

    before: dict[Any, Any] = {cls: vars(cls).get("__init__") for cls in classes}
    try:
        for cls in classes:
            cls.__init__ = patched(cls, cls.__init__)  # type: ignore[method-assign]
        yield
    finally:
        with held_back():
            for cls, own in before.items():
                if own is None:
                    del cls.__init__
                else:
                    cls.__init__ = own


def bind_experts(
    model: nn.Module,
    expert_cache: ExpertCache,
    params: Sequence[Sequence[str]],
    dtype: torch.dtype,
    device: torch.device = _CPU,
) -> None:
    """Let the modules made under `experts_left_out` compute on this cache, whose experts have this dtype and device.

    `params` are the names of their parameters, by layer.
    """
    for layer, (name, names) in enumerate(zip(expert_cache.source.layers, params, strict=True)):
        module: Any = model.get_submodule(name)
        module.expert_rows = LayerExperts(expert_cache, layer, dtype, device)
        for param in names:
            setattr(module, param, _Rows(module.expert_rows, param))


def expert_cache_of(model: nn.Module) -> ExpertCache | None:
    """The cache that a model (the base of a PeftModel) computes with; None without."""
    found = vars(plain_base(model)).get("expert_cache")
    return found if isinstance(found, ExpertCache) else None


def layer_of_router(layers: Sequence[str], router: str) -> int | None:
    """Which of the experts modules `layers` a router of this name serves: the one that shares the longest path."""
    shared = [_common(router.split("."), name.split(".")) for name in layers]
    best = max(shared)
    return shared.index(best) if best and shared.count(best) == 1 else None


def _common(left: Sequence[str], right: Sequence[str]) -> int:
    """How many parts two dotted names share at their start."""
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
