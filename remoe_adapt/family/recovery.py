"""Recovery: a small LoRA beside a point's routers, which buys back what routing costs.

On what every token runs through: attention, dense layers and shared experts. Never on routed experts, which a cache
holds as they are stored, and never on routers, which the point itself changes. Plain LoRA of stock PEFT.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from remoe_adapt._support import printable
from remoe_adapt.errors import AdapterConflictError, ConfigError, FamilyError
from remoe_adapt.family.family import Family
from remoe_adapt.libraries import replace_module
from remoe_adapt.routers import Routers, survey_routers
from remoe_adapt.tuner import plain_base

# `model.layers.3.mlp.gate` is in the list of layers `model.layers`.
_LAYER = re.compile(r"^(.*?)\.\d+\.")


def recovery_targets(model: nn.Module, routers: Routers | None = None) -> list[str]:
    """The linear layers that a recovery LoRA is put on: by their last names where those mean no others, else by paths.

    Raises ConfigError when there are none.
    """
    refs = (routers or survey_routers(model)).usable()
    lists = {in_list[1] + "." for ref in refs if (in_list := _LAYER.match(ref.name))}
    blocks = {ref.name.rpartition(".")[0] for ref in refs}
    left_out = {ref.name for ref in refs} | {f"{block}.experts" for block in blocks}
    left_out |= {
        f"{block}.{name}"
        for block in blocks
        for name, child in model.get_submodule(block).named_modules()
        if isinstance(child, nn.ModuleList)
    }
    found = [
        name
        for name, module in model.named_modules()
        # A single row, as the gate of a shared expert has, is a router of a kind.
        if isinstance(module, nn.Linear) and module.out_features > 1
        and name.startswith(tuple(lists)) and not any(f"{name}.".startswith(f"{out}.") for out in left_out)
    ]  # fmt: skip
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear layer beside its experts, so nothing can carry a recovery LoRA: "
            "leave recovery_rank out."
        )
    leaves = sorted({name.rpartition(".")[2] for name in found})
    meant = [name for name, module in model.named_modules() if name.rpartition(".")[2] in leaves]
    return leaves if sorted(meant) == sorted(found) else sorted(found)


class FamilyRecovery:
    """The recovery LoRAs of a family on a base; none acts until `use`, and the base's results are then bit for bit its
    own.

    The layers that carry them are wrapped once, and a strength switches between adapters that are loaded: nothing is
    written into weights of the base.
    """

    def __init__(self, model: nn.Module, family: Family) -> None:
        """Raises FamilyError for an adapter that is no plain LoRA of the layers that a recovery adapter may change, or
        does not fit; AdapterConflictError for a model that carries LoRAs already. The model is unchanged then."""
        base = plain_base(model)
        if any(isinstance(module, LoraLayer) for module in base.modules()):
            raise AdapterConflictError(
                "the model carries a LoRA already, and a family's recovery adapters could not be told from it: merge "
                "or unload it first."
            )
        self._names = {point.strength: point.recovery for point in family.points if point.recovery}
        self._allowed = set(_paths(base, recovery_targets(base)))
        self._base = base
        self._layers: list[tuple[str, Any]] = []
        self._trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
        modes = [(module, module.training) for module in base.modules()]
        try:
            self._load(family)
            self._layers = [(name, module) for name, module in base.named_modules() if isinstance(module, LoraLayer)]
            self._check()
        except BaseException:
            self.remove()
            raise
        finally:
            # A loaded adapter puts all of the model into eval mode.
            for module, training in modes:
                module.training = training
        for _, layer in self._layers:
            layer.train(layer.base_layer.training)
        self.use(0.0)

    def _load(self, family: Family) -> None:
        loras: PeftModel | None = None
        for name in self._names.values():
            folder = str(family.path / name)
            try:
                with _quiet():
                    if loras is None:
                        loras = PeftModel.from_pretrained(self._base, folder, adapter_name=name)
                    else:
                        loras.load_adapter(folder, name)
            except (ValueError, TypeError, KeyError, RuntimeError, OSError, UserWarning) as error:
                raise FamilyError(
                    f"{printable(folder)} is no recovery adapter of this model: {printable(error)}"
                ) from error

    def _check(self) -> None:
        for name, layer in self._layers:
            if name not in self._allowed:
                raise FamilyError(
                    f"a recovery adapter changes {printable(name)}, which is none of attention, dense layers and "
                    "shared experts: train the family again."
                )
            for parameter_name, value in layer.named_parameters():
                if "lora_" in parameter_name and not bool(torch.isfinite(value).all()):
                    raise FamilyError(
                        f"the recovery adapter of {printable(name)} is not finite: copy the family again."
                    )

    def use(self, strength: float) -> None:
        """From now on the adapter of the nearest point at or below `strength` acts, where that point has one."""
        below = [stored for stored in self._names if stored <= strength]
        name = self._names[max(below)] if below else None
        for _, layer in self._layers:
            layer._active_adapter = [] if name is None else [name]
            # A layer that is disabled runs its base layer and nothing else.
            layer._disable_adapters = name is None

    @property
    def acts(self) -> bool:
        """Whether the model is another one than without recovery adapters now."""
        return any(not layer._disable_adapters for _, layer in self._layers)

    def remove(self) -> None:
        """Take the LoRAs off the base."""
        for name, module in list(self._base.named_modules()):
            if isinstance(module, LoraLayer):
                replace_module(self._base, name, module.base_layer)
        self._layers = []
        # The dictionary itself stays: other tuners of this base hold it.
        held: Any = getattr(self._base, "peft_config", None)
        if held is not None:
            for name in self._names.values():
                held.pop(name, None)
            if not held:
                del self._base.peft_config
        for parameter in self._trained:
            parameter.requires_grad_(True)


def _paths(model: nn.Module, targets: list[str]) -> list[str]:
    return [n for n, _ in model.named_modules() if n in targets or n.rpartition(".")[2] in targets]


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that a base gets a second tuner, which is meant; what is missing in a file is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        # A layer without its tensors would keep random ones.
        warnings.filterwarnings("error", "Found missing adapter keys")
        yield
