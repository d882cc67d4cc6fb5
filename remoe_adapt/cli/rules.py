"""Options that belong together: one that would do nothing is refused, or said to do nothing, before any work."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from remoe_adapt.errors import ConfigError
from remoe_adapt.recency_settings import DEFAULT_MODE, MODES, share_words

_OF_DATA = ("max_tokens", "policy", "cache", "window", "recency", "recency_gain", "plot", "per_layer", "certified")
# command -> option -> those of which one must be there for it to act
NEEDS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "eval": {
        **dict.fromkeys(_OF_DATA, ("data",)),
        **dict.fromkeys(("task_folder", "limit"), ("tasks",)),
        "certified": ("family",),
        **dict.fromkeys(("recency_decay", "recency_share"), ("recency", "recency_gain")),
    },
    "train": dict.fromkeys(("recency_decay", "recency_share"), ("recency", "recency_gain")),
    "trace": dict.fromkeys(("prompt_tokens", "temperature", "seed"), ("decode",)),
    "run": {"plot": ("log",)},
    "watch": {
        "hold": ("proxy",),
        **dict.fromkeys(("recency", "recency_decay", "recency_share", "control"), ("gain",)),
        **dict.fromkeys(("base", "keep", "reuse_prompts"), ("family", "gain")),
    },
    "serve": {"llama_options": ("llama_server",)},
}
# command -> option -> those it would overrule
EXCLUDES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # A certificate compares a point with its base.
    "eval": {"certified": ("against",)},
    "run": {"pressure": ("strength",)},
    "serve": {"pressure": ("strength",)},
    "export gguf": {"undo": ("strength", "base", "force")},
    "bench decode": {"quick": ("tokens", "quality_tokens")},
    "bench controller": {"quick": ("tokens", "cycles", "squeezes", "take_mib")},
}
# command -> option -> as in NEEDS, where leaving the option in does no harm
HINTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "eval": {"force": ("family",)},
    "run": {"seed": ("temperature",), "force": ("family", "profile")},
    "serve": {"force": ("family", "profile")},
    "trace": {"seed": ("temperature",)},
}

# Parameter -> its option, where that is another word.
_SPELLED = {"context_tokens": "context", "llama_options": "llama-option", "certified": "certify"}


def check_kind(
    values: Mapping[str, Any],
    command: Callable[..., object],
    of_transformers: Collection[str],
    of_gguf: Collection[str],
    *,
    gguf: bool,
    does: str,
) -> None:
    """Raises ConfigError for an option that does nothing for this kind of model.

    values: of the parameters of `command`, whose defaults say which were not given.
    of_transformers: options that concern models in this process alone; of_gguf: those of GGUF files alone.
    does: what llama.cpp does with a GGUF: "serves".
    """
    parameters = inspect.signature(command).parameters
    for name in of_transformers if gguf else of_gguf:
        if values[name] != parameters[name].default:
            kind = f"a GGUF model, which llama.cpp {does}" if gguf else "a GGUF model alone"
            why = "does nothing for" if gguf else "is for"
            raise ConfigError(f"--{_SPELLED.get(name, name.replace('_', '-'))} {why} {kind}: leave it out.")


def passed_on(values: Mapping[str, Any], function: Callable[..., object]) -> dict[str, Any]:
    """Those that a function takes."""
    return {name: values[name] for name in inspect.signature(function).parameters if name in values}


def check_options(
    command: str, values: Mapping[str, Any], given: Callable[[str], bool], spelled: Callable[[str], str]
) -> list[str]:
    """What to tell of options that do nothing; raises ConfigError for those that cannot stay.

    values: by parameter name; given: whether somebody wrote it; spelled: how.
    """
    for name, value in values.items():
        # typer's min and max let nan through, since every comparison with it is false.
        if isinstance(value, float) and math.isnan(value):
            raise ConfigError(f"{spelled(name)} nan is no number that can be used.")
    for name, others in EXCLUDES.get(command, {}).items():
        for other in others:
            # Only what somebody wrote excludes; defaults of both are always there.
            if given(name) and given(other):
                raise ConfigError(f"{spelled(name)} and {spelled(other)} exclude each other: give one of them.")
    mode = MODES.get(values["recency"] or DEFAULT_MODE) if given("recency_decay") else None
    if mode is not None and not mode.takes_decay:
        with_decay = " or ".join(name for name, other in MODES.items() if other.takes_decay)
        raise ConfigError(f"--recency-decay is of --recency {with_decay}; {mode.name} has none: leave it out.")
    mode = MODES.get(values["recency"] or DEFAULT_MODE) if given("recency_share") else None
    if mode is not None and not mode.default_share:
        raise ConfigError(f"--recency-share is of --recency {share_words()}; {mode.name} has none: leave it out.")
    for name, others in NEEDS.get(command, {}).items():
        if given(name) and not any(map(values.get, others)):
            raise ConfigError(f"{spelled(name)} does nothing without {' or '.join(map(spelled, others))}.")
    return [
        f"{spelled(name)} does nothing without {' or '.join(map(spelled, others))}"
        for name, others in HINTS.get(command, {}).items()
        if given(name) and not any(map(values.get, others))
    ]
