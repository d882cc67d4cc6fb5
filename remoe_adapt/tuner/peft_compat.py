"""Living beside other PEFT adapters on one base: no nesting, no shared names, no second layer on a router."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

from peft import PeftMixedModel, PeftModel, get_peft_model
from peft.config import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, PeftType
from torch import nn

from remoe_adapt.errors import AdapterConflictError
from remoe_adapt.routers import Routers
from remoe_adapt.tuner.checks import KINDS
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer

# Parts of the paths that PEFT and we make.
_WRAPPERS = (BaseTunerLayer, AuxiliaryTrainingWrapper)
_OWN_PARTS = {"base_model", "model", "base_layer", "original_module", "modules_to_save", *KINDS}


class AdapterConfigs(dict[str, PeftConfig]):
    """Configurations by adapter name, shared by all tuners of one base.

    A second tuner writes its names in here first: that is where an equal name of another type is caught, whichever
    comes first, and a name that is part of the module paths of the base (`parts`). Raises AdapterConflictError.
    """

    parts: frozenset[str] = frozenset()

    def __setitem__(self, adapter_name: str, config: PeftConfig) -> None:
        held = self.get(adapter_name)
        if held is not None and held.peft_type != config.peft_type:
            raise _conflict(adapter_name, held.peft_type, config.peft_type)
        if adapter_name in self.parts:
            raise _part_of_a_path(adapter_name)
        super().__setitem__(adapter_name, config)

    def update(self, *args: Any, **kwargs: Any) -> None:
        """dict.update, with the same check for every name."""
        for adapter_name, config in dict(*args, **kwargs).items():
            self[adapter_name] = config


def plain_base(model: nn.Module) -> nn.Module:
    """The model inside a PeftModel, with the layers injected into it; any other model as it is.

    Raises AdapterConflictError for PeftMixedModel and for prompt learning, which lives in the wrapper itself.
    """
    if isinstance(model, PeftMixedModel):
        raise AdapterConflictError(
            "PeftMixedModel cannot hold REMOE adapters (PEFT lists its types and cannot save it): "
            "use one PeftModel per type over the same base model."
        )
    if not isinstance(model, PeftModel):
        return model
    if any(config.is_prompt_learning for config in model.peft_config.values()):
        raise AdapterConflictError(
            "a prompt-learning PeftModel keeps its prompts outside the base model, so REMOE cannot be added to it: "
            "add REMOE to the base model instead."
        )
    return plain_base(model.get_base_model())


def check_free_name(base: nn.Module, adapter_name: str) -> None:
    """Raises AdapterConflictError when an adapter of another type has this name in `base`."""
    held = (getattr(base, "peft_config", None) or {}).get(adapter_name)
    if held is not None and held.peft_type != PeftType("REMOE"):
        raise _conflict(adapter_name, held.peft_type, "REMOE")
    for name, module in base.named_modules():
        foreign = isinstance(module, BaseTunerLayer) and not isinstance(module, RemoeLayer)
        if foreign and adapter_name in module._get_available_adapters():
            raise _conflict(adapter_name, f"{type(module).__name__} at {name}", "REMOE")


def check_name(base: nn.Module, adapter_name: str) -> None:
    """Raises AdapterConflictError when this name, or that of another adapter of `base`, is part of a module's path.

    PEFT finds the tensors of an adapter by its name between dots, so it would write the other adapters' files without
    any tensor of a path that holds the name.
    """
    parts = path_parts(base)
    for name in (adapter_name, *(getattr(base, "peft_config", None) or {})):
        if name in parts:
            raise _part_of_a_path(name)


def path_parts(base: nn.Module) -> frozenset[str]:
    """What no adapter of `base` can be called: the parts of the paths of its modules, parameters and buffers."""
    wrappers = tuple(f"{name}." for name, module in base.named_modules() if isinstance(module, _WRAPPERS))
    named = itertools.chain(base.named_modules(), base.named_parameters(), base.named_buffers())
    parts = set(_OWN_PARTS)
    for path, _ in named:
        inside = next((wrapper for wrapper in wrappers if path.startswith(wrapper)), None)
        # Beside what they wrap, wrappers hold tensors under the adapters' own names.
        if inside is None or path.removeprefix(inside).startswith(("base_layer.", "original_module.")):
            parts.update(path.split("."))
    return frozenset(parts)


def wrap_or_inject(
    model: nn.Module, config: RemoeConfig, adapter_name: str = "default", routers: Routers | None = None
) -> PeftModel:
    """Add a REMOE adapter to `model`, whatever is on it already, and return the PeftModel that holds it.

    A PeftModel of REMOE gets the adapter as one more. The base model inside any other PeftModel gets a PeftModel of its
    own: both then act on the same base object and are switched, saved and merged separately. Nothing is nested.

    routers: those of the base model, where they are known already.

    Raises AdapterConflictError for an adapter name in use, a layer of another type on a router, prompt learning or
    mixed models; otherwise as `RemoeModel`. The model is unchanged after an error.
    """
    base = plain_base(model)
    if adapter_name in (getattr(base, "peft_config", None) or {}):
        raise AdapterConflictError(f"the model has an adapter named {adapter_name!r} already: choose another name.")
    check_free_name(base, adapter_name)
    config.surveyed = routers
    try:
        if isinstance(model, PeftModel) and model.peft_type == PeftType("REMOE"):
            model.add_adapter(adapter_name, config)
            return model
        with warnings.catch_warnings():
            # Both say that a base gets a second tuner, which is what this function is for.
            warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            return get_peft_model(base, config, adapter_name)
    finally:
        config.surveyed = None


def _conflict(adapter_name: str, held: Any, new: Any) -> AdapterConflictError:
    held, new = (getattr(kind, "value", kind) for kind in (held, new))
    return AdapterConflictError(
        f"adapter name {adapter_name!r} is taken by {held} and cannot be used for {new} on the same base model, "
        "because both would be saved under one label: pass another adapter_name."
    )


def _part_of_a_path(adapter_name: str) -> AdapterConflictError:
    return AdapterConflictError(
        f"adapter name {adapter_name!r} is part of the path of a module of this model, and PEFT would save other "
        "adapters of the model as empty files: choose another name."
    )
