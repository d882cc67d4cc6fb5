"""Step boundaries around `generate`, placed on the instance of a model: classes and forwards stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remoe_adapt.libraries.patching import Override
from remoe_adapt.runtime.gate import Gate
from remoe_adapt.runtime.timings import Timings


class InstanceHooks:
    """Methods of single objects with something around them, until `remove`."""

    def __init__(self) -> None:
        self._placed: list[Override] = []

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """`owner.name(...)` is `around(original, ...)` from now on; nothing where the owner has no such method."""
        if getattr(owner, name, None) is not None:  # a model without generate
            self._placed.append(Override(owner, name, around))

    def remove(self) -> None:
        """All of them, but for those that somebody else has replaced."""
        for override in reversed(self._placed):
            override.undo()
        self._placed.clear()


def wrap_steps(hooks: InstanceHooks, model: Any, gate: Gate, timings: Timings) -> None:
    """Every decoding loop of `model.generate` comes by the gate before and after each of its forwards."""

    def around_generate(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        timings.steps_end()
        with gate.generating():
            try:
                return original(*args, **kwargs)
            finally:
                timings.steps_end()

    def before_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        timings.step_begins()
        gate.boundary(opens=True)
        return original(*args, **kwargs)

    def after_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        gate.boundary(opens=False)
        return original(*args, **kwargs)

    hooks.wrap(model, "generate", around_generate)
    hooks.wrap(model, "prepare_inputs_for_generation", before_forward)
    hooks.wrap(model, "_update_model_kwargs_for_generation", after_forward)
