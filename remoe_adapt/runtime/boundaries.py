"""Step boundaries around `generate`, placed on the instance of a model: classes and forwards stay untouched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from remoe_adapt.runtime.gate import Gate
from remoe_adapt.runtime.timings import Timings


class InstanceHooks:
    """Methods of single objects with something around them, until `remove`."""

    def __init__(self) -> None:
        self._placed: list[tuple[Any, str, Callable[..., Any]]] = []

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """`owner.name(...)` is `around(original, ...)` from now on; nothing where the owner has no such method."""
        original = getattr(owner, name, None)
        if original is None:  # a model without generate
            return
        # transformers reads the signature of prepare_inputs_for_generation, which `wraps` keeps.
        hook = functools.wraps(original)(functools.partial(around, original))
        owner.__dict__[name] = hook
        self._placed.append((owner, name, hook))

    def remove(self) -> None:
        """All of them, but for those that somebody else has replaced."""
        for owner, name, hook in self._placed:
            if owner.__dict__.get(name) is hook:
                del owner.__dict__[name]
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
