"""Experts modules of transformers that compute on the slots of a cache instead of parameters of their own.

A model enters by transformers' own door: it is loaded with `experts_implementation="remoe_cache"`, a function in the
registry that every experts class asks when it is called. The function leases the slots of all experts that are asked
for, and hands them to the layer's arithmetic.
"""

from __future__ import annotations

import bisect
import inspect
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from remoe_adapt._support import held_back, let_through
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.budget import Lease
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.device_pool import DeviceSlot
from remoe_adapt.expert_cache.encoding import eager_function, has_graph
from remoe_adapt.expert_cache.layouts import FLOATS_NAME, Layout, ParamsLayout
from remoe_adapt.expert_cache.types import Slot
from remoe_adapt.libraries import Patches, override, put_on
from remoe_adapt.tuner import plain_base

if TYPE_CHECKING:
    from remoe_adapt.expert_cache.prefetch import Prefetcher


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
    one group are given back before the next group is leased. `slots` has those that are there now, by expert.

    expert_cache: where the experts are.
    layer: which layer of the cache.
    experts: distinct, in rising order.
    weight: makes a parameter of a slot, by its name; None: the slots hold the parameters.
    rows: the ids of the experts that each token chose, on the host.
    has_others: there are ids among them that are no experts.
    early: lease while experts are under way to a device; they are `late` until somebody waits for them.
    """

    def __init__(
        self,
        expert_cache: ExpertCache,
        layer: int,
        experts: Sequence[int],
        weight: Callable[[Slot, str], Tensor] | None = None,
        *,
        rows: Sequence[Sequence[int]] = (),
        has_others: bool = False,
        early: bool = False,
    ) -> None:
        self.rows, self.has_others, self._early = rows, has_others, early
        self._cache, self._layer, self._later, self._weight = expert_cache, layer, experts, weight
        # The weight that was made last of each parameter: held, so that no other tensor gets its memory meanwhile.
        self._made: dict[str, tuple[int, Tensor]] = {}
        self._lease: Lease | None = None
        self._is_first = True
        self.slots: Mapping[int, Slot] = {}
        # The parts of the slots as ranges of addresses: where each begins, and what it is, in rising order.
        self._starts: list[int] = []
        self._parts: list[tuple[int, str, Tensor]] | None = None

    def lease_next(self) -> None:
        """Lease the next group: `slots` holds it, and it alone."""
        with held_back():
            self.release()
            self._lease = self._cache.lease(self._layer, self._later, continues=not self._is_first, early=self._early)
            self._is_first, self.slots, self._parts = False, self._lease.slots, None
            self._later = self._later[len(self.slots) :]

    def slot(self, expert: int) -> Slot:
        """The slot of a chosen expert, for a caller that asks in rising order."""
        while expert not in self.slots:
            if not self._later:
                raise KeyError(expert)
            self.lease_next()
        self.wait()
        return self.slots[expert]

    @property
    def late(self) -> frozenset[int]:
        """Experts among `slots` that are under way: `wait` must come before what reads them."""
        return frozenset() if self._lease is None else self._lease.late

    def wait(self) -> None:
        """All of `slots` may be read by what is queued from now on."""
        if self._lease is not None:
            self._lease.wait()

    @property
    def has_more(self) -> bool:
        """Some experts come in a later group."""
        return bool(self._later)

    def groups(self, *, early: bool = False) -> Iterator[Mapping[int, Slot]]:
        """The slots by expert, group after group: a single one where the budget holds all of them.

        early: some may still be `late`.
        """
        if not self.slots and self._later:
            self.lease_next()
        while self.slots:
            if not early:
                self.wait()
            yield self.slots
            if not self._later:
                return
            self.lease_next()

    def note_made(self, expert: int, param: str, weight: Tensor) -> None:
        """A parameter of an expert was made of its slot: what backward needs of it is made again."""
        self._made[param] = expert, weight

    def release(self) -> None:
        """Give back what is leased; once is enough."""
        lease, self._lease, self.slots = self._lease, None, {}
        self._made, self._parts = {}, None
        if lease is not None:
            lease.release()

    def pack(self, tensor: Tensor) -> Tensor | _Saved:
        """For saved_tensors_hooks: a view of a slot is saved as its place."""
        if self._lease is None or tensor.layout != torch.strided:
            return tensor
        if self._parts is None:
            parts = [(expert, name, part) for expert, slot in self.slots.items() for name, part in slot.items()]
            self._parts = sorted(parts, key=lambda entry: entry[2].data_ptr())
            self._starts = [part.data_ptr() for _, _, part in self._parts]
        # By addresses: all slots of a pool may be one storage.
        address = tensor.data_ptr()
        at = bisect.bisect_right(self._starts, address) - 1
        near = [self._parts[at]] if at >= 0 else []
        near += [(expert, name, weight) for name, (expert, weight) in self._made.items()]
        for expert, name, part in reversed(near):
            begin = part.data_ptr()
            if begin <= address < begin + part.nbytes and part.device == tensor.device:
                if part.dtype != tensor.dtype:
                    return tensor.clone()
                offset = (address - begin) // part.element_size()
                return _Saved(expert, name, tensor.size(), tensor.stride(), offset)
        return tensor

    def unpack(self, saved: Tensor | _Saved) -> Tensor:
        """For saved_tensors_hooks, in backward."""
        if isinstance(saved, Tensor):
            return saved
        with held_back(), self._cache.lease(self._layer, [saved.expert], continues=True) as lease:
            slot = lease.slots[saved.expert]
            with torch.no_grad():
                whole = slot[saved.param] if self._weight is None else self._weight(slot, saved.param)
                part = whole.as_strided(saved.size, saved.stride, int(whole.storage_offset()) + saved.offset)
                # A slot of a device is filled anew once its lease has ended, which is now.
                return part.clone() if isinstance(slot, DeviceSlot) else part


# What `experts_implementation` is of a model whose experts are in a cache.
IMPLEMENTATION = "remoe_cache"
# Hidden states, ids and weights.
_FORWARD_INPUTS = 3
_CPU = torch.device("cpu")


class CachedExperts:
    """The experts of one layer: what its module has instead of parameters. Any number of threads at once.

    expert_cache: where they are.
    layer: which layer of the cache.
    dtype, device: what hidden states must have.
    layout: of the slots, computes with them.
    """

    def __init__(
        self, expert_cache: ExpertCache, layer: int, dtype: torch.dtype, device: torch.device, layout: Layout
    ) -> None:
        self.cache, self.layer, self._dtype, self._device = expert_cache, layer, dtype, device
        self.predictor: Prefetcher | None = None
        self.layout = layout
        self._weight = None if isinstance(layout, ParamsLayout) else partial(layout.weight, layer)
        self._num_experts = expert_cache.source.num_experts[layer]

    def __deepcopy__(self, memo: object) -> CachedExperts:
        """A copied model computes on the same slots."""
        return self

    def run(self, module: nn.Module, hidden_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """What the module's forward returns, computed on the slots."""
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
        count, predictor = self._num_experts, self.predictor
        rows: list[list[int]] = ids_TK.tolist()
        needed = sorted(set(itertools.chain.from_iterable(rows)))
        # Ids from `count` on are null experts, which some routers choose and which have no weights.
        if has_others := bool(needed) and (needed[0] < 0 or needed[-1] >= count):
            needed = [expert for expert in needed if 0 <= expert < count]
        hooks_needed = has_graph(hidden_TD, weights_TK)
        with held_back():
            if predictor is not None:
                predictor.score(self.layer, needed)
            chosen = ChosenExperts(
                self.cache,
                self.layer,
                needed,
                self._weight,
                rows=rows,
                has_others=has_others,
                early=self.layout.is_early,
            )
            try:
                if needed:
                    chosen.lease_next()
                    # Not before: a read-ahead would compete with what this layer waits for.
                    if predictor is not None:
                        predictor.read_ahead(self.layer, hidden_TD)
                with saved_tensors_hooks(chosen.pack, chosen.unpack) if hooks_needed else nullcontext(), let_through():
                    return self.layout.compute(self.layer, module, hidden_TD, ids_TK, weights_TK, chosen)
            finally:
                chosen.release()


# How many experts there are, and which, depends on the data: torch.compile must not trace it.
@torch.compiler.disable
def remoe_cache(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts implementation of this name. The parameters' names are those of transformers' own."""
    found: CachedExperts | None = vars(module).get("cached_experts")
    if found is None:  # a stock model, made from the configuration of a cached one
        return eager_function(type(module))(module, hidden_states, top_k_index, top_k_weights)
    return found.run(module, hidden_states, top_k_index, top_k_weights)


put_on(ALL_EXPERTS_FUNCTIONS, IMPLEMENTATION, remoe_cache)


def check_experts(modules: dict[str, nn.Module]) -> None:
    """Raises UncacheableError for a module whose eager function is not one of (hidden states, ids, weights)."""
    for name, module in modules.items():
        if len(inspect.signature(eager_function(type(module))).parameters) != _FORWARD_INPUTS + 1:
            raise UncacheableError(
                f"{name} ({type(module).__name__}) takes other inputs than experts do: it cannot be cached."
            )


@contextmanager
def experts_left_out(classes: set[type[nn.Module]]) -> Iterator[None]:
    """Within, in this thread: modules of these very classes are made without parameters, to be bound to a cache.

    The classes are changed meanwhile: one thread at a time.
    """
    thread = threading.get_ident()

    def init(cls: type[nn.Module], original: Callable[..., None], module: Any, *args: Any, **kwargs: Any) -> None:
        original(module, *args, **kwargs)
        if type(module) is cls and threading.get_ident() == thread:
            # Its own `__init__` has made them, of all experts: they would be loaded, and memory taken for them.
            put_on(module, "_parameters", {})
            # transformers would initialise what is missing in the files; here nothing is missing.
            put_on(module, "_is_hf_initialized", True)

    with Patches() as patches:
        with held_back():  # a class changed by then, and noted nowhere, would stay so
            patches.add(*(override(cls, "__init__", partial(init, cls)) for cls in classes))
        yield


def bind_experts(
    model: nn.Module,
    expert_cache: ExpertCache,
    dtype: torch.dtype,
    layout: Layout,
    device: torch.device = _CPU,
) -> None:
    """Let the modules made under `experts_left_out` compute on a cache.

    model: loaded with the experts implementation "remoe_cache".
    expert_cache: its layers are named as the modules.
    dtype, device: of the model's hidden states.
    layout: of the slots.
    """
    for layer, name in enumerate(expert_cache.source.layers):
        experts = CachedExperts(expert_cache, layer, dtype, device, layout)
        put_on(model.get_submodule(name), "cached_experts", experts)
    expert_cache.arithmetic = f"{layout.name}, {'exact' if layout.is_exact else 'fast'}"


def expert_cache_of(model: nn.Module) -> ExpertCache | None:
    """The cache that a model (the base of a PeftModel) computes with; None without."""
    found = vars(plain_base(model)).get("expert_cache")
    return found if isinstance(found, ExpertCache) else None


def arithmetic_of(model: nn.Module) -> dict[str, Any]:
    """What the experts of a model (the base of a PeftModel) are computed with: `{"name", "exact"}`.

    exact: results are those of the parameters that `from_pretrained` loads; not so where kernels compute on codes.
    """
    base = plain_base(model)
    layouts = (vars(module)["cached_experts"].layout for module in base.modules() if "cached_experts" in vars(module))
    layout = next(layouts, None)
    if layout is not None:
        return {"name": layout.name, "exact": layout.is_exact}
    # transformers keeps its quantiser on a model that computes on codes, and takes it off a dequantised one.
    quantizer: Any = getattr(base, "hf_quantizer", None)
    if quantizer is None:
        return {"name": FLOATS_NAME, "exact": True}
    method = getattr(quantizer.quantization_config, "quant_method", "quantised")
    return {"name": str(getattr(method, "value", method)), "exact": False}


def cached_layer(block: nn.Module) -> int | None:
    """Which layer of the cache the experts of a router's block are; None where the block has none, or several."""
    found = [vars(module)["cached_experts"].layer for module in block.modules() if "cached_experts" in vars(module)]
    return found[0] if len(found) == 1 else None
