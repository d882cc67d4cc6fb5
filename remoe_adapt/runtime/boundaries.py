"""Step boundaries around `generate`, placed on the instance of a model: classes and forwards stay untouched."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from remoe_adapt.libraries.patching import Overrides
from remoe_adapt.runtime.gate import Gate
from remoe_adapt.runtime.timings import Timings


def wrap_steps(hooks: Overrides, model: Any, gate: Gate, timings: Timings) -> None:
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
