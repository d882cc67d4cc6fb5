"""RemoeModel: PEFT's tuner for routers. It touches routers only, and among adapters only its own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from peft import NoMatchingPeftModuleError
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists, onload_layer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from peft.utils.constants import DUMMY_TARGET_MODULES
from torch import Tensor, nn

from remoe_adapt.errors import AdapterCorruptError, ConfigError
from remoe_adapt.libraries import Snapshot, replace_module
from remoe_adapt.routers import RouterSpec, survey_routers
from remoe_adapt.tuner.attached import attach_objective, detach_objective
from remoe_adapt.tuner.checks import check_finite, check_shapes
from remoe_adapt.tuner.combine import add_weighted_adapter
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.fitting import check_given, check_loaded, check_rank, check_stored, check_sum
from remoe_adapt.tuner.layer import RemoeLayer
from remoe_adapt.tuner.loading import current_load
from remoe_adapt.tuner.mixed_batch import mixed_batch
from remoe_adapt.tuner.peft_compat import AdapterConfigs, check_free_name, check_name, path_parts, plain_base
from remoe_adapt.tuner.targets import NoRouterMatchedError, check_base, resolve_targets


class RemoeModel(BaseTuner):
    """Adds router deltas to `model` in place.

    Several adapters may be loaded, several active: their deltas add up. Other tuners' layers on the same base are never
    switched, merged or removed from here. A PeftModel passed as `model` is unwrapped first, so nothing nests.

    Raises RouterNotFoundError or UnsupportedRouterError when there is no router to adapt, ConfigError when
    `target_modules` names other modules, AdapterConflictError for a name or a router that another tuner holds,
    FingerprintMismatchError for an adapter of another base, AdapterCorruptError when stored tensors do not fit. The
    model is unchanged after an error.
    """

    prefix: str = "remoe_"
    tuner_layer_cls = RemoeLayer
    # A dial lets go of the routers by this before they are unwrapped, with live weights (True) or the original ones,
    # else the base would be left at a strength.
    before_unload: Callable[[bool], None] | None = None
    # PEFT's per-architecture defaults; routers are discovered instead.
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012 (PEFT declares the type)

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        base = plain_base(model)
        if load := current_load():
            load.ours = True
        check_free_name(base, adapter_name)
        configs = AdapterConfigs({adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config)
        shared = getattr(base, "peft_config", None)
        before = None if shared is None else dict(shared)
        try:
            super().__init__(base, configs, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except BaseException:
            if shared is not None:
                # The dictionary itself stays: other tuners of this base hold it.
                shared.clear()
                shared.update(before)
            raise
        # Kept here too: another tuner's unload deletes the attribute of the base.
        self.peft_config = self.peft_config
        if isinstance(self.peft_config, AdapterConfigs):
            self.peft_config.parts = path_parts(base)

    # Injection

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict[str, Any]) -> PeftConfig:
        # Targets are resolved in `_prepare_model`, which sees the model.
        return peft_config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        """All checks, before the first module is replaced."""
        assert isinstance(peft_config, RemoeConfig)
        self._specs: dict[str, RouterSpec] = {}
        load = current_load()
        given = None if load is None else load.state_dict
        if peft_config.target_modules == DUMMY_TARGET_MODULES:
            if given is not None or peft_config.stored is not None:
                raise ConfigError(
                    f"target_modules={DUMMY_TARGET_MODULES!r} adapts nothing, so what is stored would have no effect: "
                    "name the routers, or leave it out for all of them."
                )
            return
        survey = peft_config.surveyed or survey_routers(model)
        routers = resolve_targets(peft_config, model, survey)
        self._specs = {router.name: router.spec for router in routers}
        check_base(
            peft_config,
            model,
            survey,
            allow_other_base=peft_config.allow_other_base or (load is not None and load.allow_other_base),
        )
        targets = {
            router.name: router.original_weight_ED
            for router in routers
            if check_target_module_exists(peft_config, router.name)
        }
        if given is not None:
            check_given(given, peft_config, model, targets)
        elif peft_config.stored is not None:
            check_stored(peft_config.stored, peft_config, model, targets)
        else:
            check_rank(peft_config.rank, targets)

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """BaseTuner.inject_adapter. A configuration object that another model has filled in is taken as it was written,
        and stays that model's: this one gets a copy unless both agree. An error leaves the model as it was."""
        # Kept, because a copy may take its place below and the caller's object must be known again.
        given = self.peft_config[adapter_name]
        check_name(model, adapter_name)
        before = Snapshot(model)
        if isinstance(given, RemoeConfig) and given.is_filled:
            self.peft_config[adapter_name] = given.unfilled()
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except BaseException as error:
            before.restore()
            self.peft_config.pop(adapter_name, None)
            if isinstance(error, NoMatchingPeftModuleError) and not isinstance(error, NoRouterMatchedError):
                listing = ", ".join(self._specs) or "none"
                raise NoRouterMatchedError(f"{error} The routers of this model are: {listing}.") from error
            raise
        if self.peft_config[adapter_name].to_dict() == given.to_dict():
            self.peft_config[adapter_name] = given
        attach_objective(self.model, self.peft_config)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        assert isinstance(peft_config, RemoeConfig)
        if isinstance(target, RemoeLayer):
            target.update_layer(adapter_name, peft_config)
            return
        if current_key not in self._specs:
            raise AdapterCorruptError(
                f"the state dict has a delta for {current_key}, which is no router of this model."
            )
        layer = RemoeLayer(target, adapter_name, peft_config, self._specs[current_key])
        if adapter_name not in self.active_adapters:
            # An additional adapter is not trainable by itself.
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer creates its parameters on the right device; PEFT's version needs a weight named `weight`.
        replace_module(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # Deltas are fp32 from birth; only an explicit False asks for the dtype of the base.
        if autocast_adapter_dtype:
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
            return
        for layer in self._layers():
            layer.cast_adapter(adapter_name, layer.base_weight_ED.dtype)

    # Only our own adapters

    @property
    def remoe_adapters(self) -> set[str]:
        """Names of the REMOE adapters of this base."""
        return {name for name, config in self.peft_config.items() if config.peft_type == PeftType("REMOE")}

    def _layers(self) -> list[RemoeLayer]:
        return [module for module in self.model.modules() if isinstance(module, RemoeLayer)]

    def _copies(self) -> Iterator[AuxiliaryTrainingWrapper]:
        """Wrappers of modules_to_save that hold one of our adapters."""
        ours = self.remoe_adapters
        return (m for m in self.model.modules() if isinstance(m, AuxiliaryTrainingWrapper) and ours & m._adapters)

    def _enable_adapter_layers(self, enabled: bool = True) -> None:
        for layer in self._layers():
            layer.enable_adapters(enabled)
        for copies in self._copies():
            copies.enable_adapters(enabled)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make these adapters the active ones (and trainable, unless `inference_mode`); merged ones are unmerged.

        Raises AdapterCorruptError for several whose sum makes a router's weight infinite or NaN; nothing is switched.
        """
        if not isinstance(adapter_name, str) and len(adapter_name) > 1:
            check_sum(self._layers(), adapter_name)
        for copies in self._copies():
            chosen = copies.check_set_adapter(adapter_name)
            known = [chosen] if chosen is not None and chosen in copies._adapters else []
            copies.set_adapter(known, inference_mode=inference_mode)
        for layer in self._layers():
            if layer.merged:
                warnings.warn(
                    "Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=2
                )
                layer.unmerge()
            layer.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def delete_adapter(self, adapter_name: str) -> None:
        """BaseTuner.delete_adapter. Raises MergeStateError for the adapter of a dial; nothing is deleted then."""
        for layer in self._layers():
            layer.check_deletable(adapter_name)
        super().delete_adapter(adapter_name)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Write the active (or named) adapters into the router weights, in place, originals kept.

        Raises AdapterCorruptError with `safe_merge` when a merged weight is not finite; no router is changed then.
        """
        self._check_merge_allowed()  # type: ignore[no-untyped-call]
        self._merge(self._layers(), safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """Restore the router weights bit for bit."""
        for layer in self._layers():
            with onload_layer(layer):
                layer.unmerge()

    def _merge(self, layers: list[RemoeLayer], safe_merge: bool, adapter_names: list[str] | None) -> None:
        # All are checked before one is merged, so that a refusal leaves no router changed.
        if safe_merge:
            for layer in layers:
                layer.check_mergeable(adapter_names)
        for layer in layers:
            with onload_layer(layer):
                layer.merge(adapter_names=adapter_names)

    # PEFT declares None and returns the model.
    def _unload_and_optionally_merge(  # type: ignore[override]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if self.before_unload is not None:
            self.before_unload(merge)
        elif merge:
            self._check_merge_allowed()  # type: ignore[no-untyped-call]
            self._merge(self._layers(), safe_merge, adapter_names)
        copies = list(self._copies())
        for name, module in list(self.model.named_modules()):
            if isinstance(module, RemoeLayer):
                replacement = module.base_layer
            elif module in copies:
                replacement = module.unload_and_optionally_merge_module(
                    merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
                )
            else:
                continue
            replace_module(self.model, name, replacement)
        self._leave(self.remoe_adapters)
        return self.model  # type: ignore[no-any-return]

    def _leave(self, ours: set[str]) -> None:
        """Take our names off the base model; other tuners' stay."""
        shared = getattr(self.model, "peft_config", None)
        self.peft_config = AdapterConfigs({name: self.peft_config[name] for name in ours})
        detach_objective(self.model)
        if shared is None:
            return
        for name in ours & shared.keys():
            del shared[name]
        if not shared:
            del self.model.peft_config

    # Inference with one adapter per sample

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        adapter_names = kwargs.pop("adapter_names", None)
        if adapter_names is None:
            return nullcontext()
        return mixed_batch(self.model, self._layers(), self.remoe_adapters, adapter_names, args, kwargs)

    # Combination

    def add_weighted_adapter(
        self, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Add the adapter whose delta is the sum of weights[i] * delta of adapters[i], exactly.

        "linear" takes any adapters; low-rank ones are joined, rank = sum of ranks. "cat" is the same and insists on
        low-rank ones. Weights may be negative. The new adapter is neither active nor trainable.

        Raises ConfigError for bad weights or types of combination, AdapterError for unknown adapters,
        AdapterConflictError when `adapter_name` exists.
        """
        add_weighted_adapter(self, adapters, weights, adapter_name, combination_type)

    # Tensors in and out

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        tensors = super()._get_adapter_state_dict(model, config, adapter_name, state_dict, unwanted_adapter_names)
        ending = f".{adapter_name}"
        return {key: value for key, value in tensors.items() if f".{cls.prefix}" in key and key.endswith(ending)}

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Every PEFT route to load an adapter passes here: refuse bad tensors before one is copied."""
        assert isinstance(config, RemoeConfig)
        tensors: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        check_loaded(state_dict, tensors, model, adapter_name)
        return tensors

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # load_state_dict of a whole model: all deltas are checked before the first is copied.
        for name, parameter in self.named_parameters():
            value = state_dict.get(prefix + name)
            if f".{self.prefix}" in name and value is not None:
                check_shapes({name: value.shape}, {name: parameter.shape}, "the state dict")
                check_finite(name, value, "the state dict")
        super()._load_from_state_dict(state_dict, prefix, *args)
