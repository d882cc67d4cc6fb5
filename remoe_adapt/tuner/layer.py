"""RemoeLayer: a router module whose weight is W + delta, with several deltas by adapter name."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from remoe_adapt.errors import AdapterConflictError, AdapterCorruptError, MergeStateError
from remoe_adapt.routers import RouterSpec, plain_name
from remoe_adapt.tuner.checks import check_finite
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.mixed_batch import mixed_forward


class RouterTensors(nn.ParameterDict):
    """Tensors of one kind by adapter name. What is put in must be finite: transformers' own adapter loading sets
    parameters one by one and has no other place to check.

    Raises AdapterCorruptError.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Parameter):
            check_finite(f"the tensor of adapter {name!r}", value.detach(), "the file loaded")
        super().__setattr__(name, value)


class RemoeLayer(nn.Module, BaseTunerLayer):
    """Wraps a router and runs it with the weight cast(fp32(W) + sum of active deltas).

    Parameters, by adapter name, fp32 (fp64 on an fp64 base): `remoe_delta` [E, D] for full adapters; `remoe_A` [r, D]
    and `remoe_B` [E, r] for low-rank ones, whose delta is B A. A zero delta gives the base result bit for bit. Reads of
    attributes the wrapper lacks go to the router, because model code reads `gate.top_k` and the like.
    """

    adapter_layer_names: tuple[str, ...] = ("remoe_delta", "remoe_A", "remoe_B")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: RemoeConfig, spec: RouterSpec) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.spec = spec
        self._weight_path = tuple(spec.weight_name.split("."))
        self.remoe_delta = RouterTensors()
        self.remoe_A = RouterTensors()
        self.remoe_B = RouterTensors()
        self.out_features, self.in_features = self.base_weight_ED.shape
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._kept_weight_ED: Tensor | None = None
        self.resident = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            # Private names stay here: accelerate would find the router's hook on the wrapper and remove it twice.
            if name.startswith("_") or "base_layer" not in self.__dict__.get("_modules", ()):
                raise
            return getattr(self.base_layer, name)

    # Weights

    @property
    def base_weight_ED(self) -> Tensor:
        """The router's live weight: the parameter itself, holding merged adapters while they are merged."""
        weight: Any = self.base_layer
        for part in self._weight_path:
            weight = getattr(weight, part)
        return weight  # type: ignore[no-any-return]

    @property
    def original_weight_ED(self) -> Tensor:
        """The base weight without any adapter, also while adapters are merged."""
        return self.base_weight_ED if self._kept_weight_ED is None else self._kept_weight_ED

    def get_base_weight(self) -> Tensor:
        """The live base weight, detached."""
        return self.base_weight_ED.detach()

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Copy into the live base weight; its address stays."""
        with torch.no_grad():
            self.base_weight_ED.copy_(weight_data)

    @property
    def adapters(self) -> set[str]:
        """Names of the adapters this router has."""
        return {*self.remoe_delta.keys(), *self.remoe_A.keys()}

    def delta_ED(self, adapter_name: str) -> Tensor:
        """The adapter's delta [E, D] in fp32 (fp64 on an fp64 base); differentiable.

        Raises KeyError when this router has no such adapter.
        """
        dtype = _compute_dtype(self.base_weight_ED)
        if adapter_name in self.remoe_delta:
            full_ED: Tensor = self.remoe_delta[adapter_name]
            return full_ED.to(dtype)
        a_RD: Tensor = self.remoe_A[adapter_name]
        b_ER: Tensor = self.remoe_B[adapter_name]
        with torch.autocast(a_RD.device.type, enabled=False):
            return b_ER.to(dtype) @ a_RD.to(dtype)

    def get_delta_weight(self, adapter: str) -> Tensor:
        """PEFT's name for `delta_ED`."""
        return self.delta_ED(adapter)

    def effective_weight_ED(self, adapter_names: Sequence[str]) -> Tensor:
        """cast(fp32(W) + sum of deltas) for adapters of this router, in the dtype of W; W is the original weight."""
        weight_ED = self.original_weight_ED
        if not adapter_names:
            return weight_ED
        delta_ED = self.delta_ED(adapter_names[0])
        for name in adapter_names[1:]:
            delta_ED = delta_ED + self.delta_ED(name)
        return (weight_ED.to(delta_ED.dtype) + delta_ED).to(weight_ED.dtype)

    # Forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As any module; under a dial straight to the router's forward where nothing listens on the way.

        Two calls of `nn.Module.__call__` cost a decode step on a CPU as much as four tensor operations.
        """
        # Attributes are read from the instances' dicts: a class with `__getattr__`, as Module is, is slow to ask.
        mine = self.__dict__
        if mine["resident"] and not kwargs and not mine["_disable_adapters"] and "forward" not in mine:
            router = mine["_modules"]["base_layer"].__dict__
            forward = router.get("forward")
            if forward is not None and not (
                mine["_forward_hooks"] or mine["_forward_pre_hooks"] or mine["_backward_hooks"]
                or mine["_backward_pre_hooks"] or router["_forward_hooks"] or router["_forward_pre_hooks"]
                or router["_backward_hooks"] or router["_backward_pre_hooks"]
            ):  # fmt: skip
                return forward(*args)
        return super().__call__(*args, **kwargs)

    def forward(self, *args: Any, adapter_names: list[str] | None = None, **kwargs: Any) -> Any:
        """What the router returns, under the active adapters (or one adapter per sample, see `mixed_batch`).

        In resident mode: with the live weight as it is, or with the original one while adapters are disabled.
        """
        if self.resident:
            if adapter_names is not None:
                self._refuse_while_resident("one adapter per sample")
            if not self.disable_adapters:
                return self.base_layer(*args, **kwargs)
            weights = {self.spec.weight_name: self.original_weight_ED}
            return functional_call(self.base_layer, weights, args, kwargs, tie_weights=False)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(*args, **kwargs)
        if adapter_names is not None:
            return mixed_forward(self, adapter_names, args, kwargs)
        if self.merged:
            return self.base_layer(*args, **kwargs)
        return self.run([name for name in self.active_adapters if self._has(name)], args, kwargs)

    def run(self, adapter_names: Sequence[str], args: Any, kwargs: dict[str, Any]) -> Any:
        """Call the router once under these adapters of its own; hooks of the router fire."""
        if not adapter_names:
            return self.base_layer(*args, **kwargs)
        weights = {self.spec.weight_name: self.effective_weight_ED(adapter_names)}
        return functional_call(self.base_layer, weights, args, kwargs, tie_weights=False)

    def _has(self, adapter_name: str) -> bool:
        return adapter_name in self.remoe_delta or adapter_name in self.remoe_A

    # Adapters

    def update_layer(self, adapter_name: str, config: RemoeConfig) -> None:
        """Add the adapter, or start it anew: zero delta, or a random one with `init_weights=False`.

        In inference mode it waits for its weights, so it is zero in any case: a load that fails changes nothing.

        Random entries have the standard deviation 1 / sqrt(D), which moves logits of normalised inputs by about 1:
        enough to change which experts are chosen.

        Raises AdapterConflictError for a name that cannot be part of a parameter name.
        """
        if not adapter_name or "." in adapter_name:
            raise AdapterConflictError(f"adapter name {adapter_name!r}: it must not be empty or hold a dot.")
        weight_ED = self.base_weight_ED
        device, dtype = weight_ED.device, _compute_dtype(weight_ED)
        rows, columns = weight_ED.shape
        spread = 1.0 / math.sqrt(columns)
        at_random = not config.init_weights and not config.inference_mode
        for values in (self.remoe_delta, self.remoe_A, self.remoe_B):
            if adapter_name in values:
                del values[adapter_name]
        if config.rank is None:
            delta_ED = torch.zeros(rows, columns, device=device, dtype=dtype)
            if at_random:
                delta_ED.normal_(0.0, spread)
            self.remoe_delta[adapter_name] = nn.Parameter(delta_ED)
        else:
            a_RD = torch.empty(config.rank, columns, device=device, dtype=dtype).normal_(0.0, spread)
            b_ER = torch.zeros(rows, config.rank, device=device, dtype=dtype)
            if at_random:
                b_ER.normal_(0.0, 1.0 / math.sqrt(config.rank))
            self.remoe_A[adapter_name] = nn.Parameter(a_RD)
            self.remoe_B[adapter_name] = nn.Parameter(b_ER)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def cast_adapter(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Store the adapter's parameters in `dtype`; whether they are trained stays as it is."""
        for values in (self.remoe_delta, self.remoe_A, self.remoe_B):
            if adapter_name in values and values[adapter_name].dtype != dtype:
                old = values[adapter_name]
                values[adapter_name] = nn.Parameter(old.detach().to(dtype), requires_grad=old.requires_grad)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        # Only the device: PEFT's own version would round the deltas to the dtype of a half-precision base.
        target = device if device is not None else self.base_weight_ED.device
        for values in (self.remoe_delta, self.remoe_A, self.remoe_B):
            if adapter_name in values and not values[adapter_name].is_meta and values[adapter_name].device != target:
                old = values[adapter_name]
                values[adapter_name] = nn.Parameter(old.detach().to(target), requires_grad=old.requires_grad)

    # Resident mode: a dial (dial/swap.py) writes the live weight, the original is kept here

    def hold(self) -> None:
        """Enter resident mode: keep the original weight and run with whatever the live one holds.

        Raises MergeStateError when adapters are merged or another dial holds this router.
        """
        if self.merged or self.resident:
            state = f"adapters {self.merged_adapters} are merged" if self.merged else "another dial holds it"
            raise MergeStateError(f"a router cannot be put under a dial while {state}: unmerge, or close that dial.")
        self._kept_weight_ED = self.base_weight_ED.detach().clone()
        self.resident = True

    def release(self, *, keep_live: bool = False) -> None:
        """Leave resident mode with the original weight, bit for bit, or with the live one as the new base."""
        if self._kept_weight_ED is not None and not keep_live:
            self.set_base_weight(self._kept_weight_ED)
        self._kept_weight_ED, self.resident = None, False

    def _refuse_while_resident(self, what: str) -> None:
        if self.resident:
            raise MergeStateError(
                f"{what}: not while a dial holds the routers. Close it (model.controller.close()), or keep its present "
                "strength (model.merge_and_unload())."
            )

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """BaseTunerLayer.set_adapter. Raises MergeStateError for another adapter of this router in resident mode."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if any(self._has(name) and name not in self.active_adapters for name in names):
            self._refuse_while_resident(f"switching to adapter {names}")
        super().set_adapter(adapter_names, inference_mode=inference_mode)

    def check_deletable(self, adapter_name: str) -> None:
        """Raises MergeStateError when this adapter is what a dial has put on the router."""
        if self._has(adapter_name) and adapter_name in self.active_adapters:
            self._refuse_while_resident(f"deleting adapter {adapter_name!r}")

    def delete_adapter(self, adapter_name: str) -> None:
        """BaseTunerLayer.delete_adapter. Raises MergeStateError as `check_deletable`."""
        self.check_deletable(adapter_name)
        super().delete_adapter(adapter_name)

    # Merging

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + deltas into the live weight, in place; the original is kept for `unmerge`.

        Adapters are summed in fp32 before the one cast, so merging one after the other equals merging at once.

        Raises AdapterCorruptError with `safe_merge` when the result is not finite; nothing is changed then.
        """
        self._refuse_while_resident("merging")
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self._has(name)]
        if not names:
            return
        if safe_merge:
            self.check_mergeable(names)
        with torch.no_grad():
            merged_ED = self.effective_weight_ED([*self.merged_adapters, *names])
            if self._kept_weight_ED is None:
                self._kept_weight_ED = self.base_weight_ED.detach().clone()
            self.base_weight_ED.copy_(merged_ED)
        self.merged_adapters.extend(names)

    def check_mergeable(self, adapter_names: list[str] | None = None) -> None:
        """Raises AdapterCorruptError when merging the active (or named) adapters gives NaN or Inf."""
        named = self.active_adapters if adapter_names is None else adapter_names
        names = [name for name in named if self._has(name) and name not in self.merged_adapters]
        with torch.no_grad():
            if bool(torch.isfinite(self.effective_weight_ED([*self.merged_adapters, *names])).all()):
                return
            broken = [name for name in names if not bool(torch.isfinite(self.delta_ED(name)).all())]
        raise AdapterCorruptError(
            f"NaNs detected in the merged weights. The adapter {[*broken, *names][0]} seems to be broken"
        )

    def unmerge(self) -> None:
        """Restore the original weight bit for bit from the kept copy."""
        self._refuse_while_resident("unmerging")
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        if self._kept_weight_ED is None:
            raise MergeStateError(f"adapters {self.merged_adapters} are merged but no original weight was kept.")
        with torch.no_grad():
            self.base_weight_ED.copy_(self._kept_weight_ED)
        self._kept_weight_ED = None
        self.merged_adapters = []

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """What stays in the model when another tuner's model is unloaded: the router, or this layer as it is when only
        adapters of others are named, so that no delta is lost."""
        if self.resident or (merge and adapter_names is not None and not self.adapters.intersection(adapter_names)):
            return self
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.base_layer

    # Module plumbing

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RemoeLayer:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self._kept_weight_ED is not None:
            self._kept_weight_ED = fn(self._kept_weight_ED)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name, parameter in self.named_parameters():
            key = prefix + name
            if name.startswith("remoe_") and key in state_dict:
                check_finite(key, state_dict[key], "the state dict")
                # With assign=True the entry becomes the parameter: it takes the dtype chosen for this adapter.
                state_dict[key] = state_dict[key].to(parameter.dtype)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __repr__(self) -> str:
        return "remoe." + super().__repr__()


def remoe_layers(model: nn.Module) -> dict[str, RemoeLayer]:
    """The wrapped routers of `model` in model order, by their name inside the base model (no PEFT prefix)."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RemoeLayer)}
    return {plain_name(name): layer for name, layer in layers.items()}


def _compute_dtype(weight_ED: Tensor) -> torch.dtype:
    return torch.promote_types(weight_ED.dtype, torch.float32)
