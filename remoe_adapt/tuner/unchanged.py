"""All or nothing: what a failed load did to a model is taken back, however far it came."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn


class Snapshot:
    """The modules of a model as they are: attributes, children, parameters, hooks, flags and who is trained.

    The values of parameters are not copied, but for `values`: a load that only adds an adapter changes no others.
    """

    def __init__(self, root: nn.Module, values: Iterable[Tensor] = ()) -> None:
        self._modules = [(module, dict(vars(module)), _contents(module)) for module in root.modules()]
        self._trained = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
        self._values = [(tensor, tensor.detach().clone()) for tensor in values]

    def restore(self) -> None:
        """Put everything back; modules that were added are let go."""
        for module, attributes, contents in self._modules:
            vars(module).clear()
            vars(module).update(attributes)
            for container, held in contents:
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(held)
        for parameter, trained in self._trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad_(trained)
        with torch.no_grad():
            for tensor, value in self._values:
                tensor.copy_(value)


def _contents(module: nn.Module) -> list[tuple[Any, Any]]:
    """Containers among the attributes, the registries of torch and PEFT's among them, with what they hold."""
    return [
        (value, list(value.items()) if isinstance(value, dict) else list(value))
        for value in vars(module).values()
        if isinstance(value, (dict, list, set))
    ]
