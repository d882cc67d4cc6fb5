"""Options of loading a model: whether they can be meant, before anything is read; and what a misspelt one was to be."""

from __future__ import annotations

import difflib
import inspect
import os
import re
from collections.abc import Iterable, Sequence

import torch
from transformers import PreTrainedModel

from remoe_adapt.device_profile import parse_size
from remoe_adapt.errors import ConfigError

# What `load_with_expert_cache` takes beside `from_pretrained`'s options.
CACHE_OPTIONS = (
    "ram_budget", "memory", "storage", "arithmetic", "policy", "scope", "prefetch", "direct_io", "threads", "decay",
    "reader",
)  # fmt: skip
# The same thing under an earlier name, or under another function's name for it.
_ELSEWHERE = {"budget": "expert_cache", "path": "base", "base": "path"}
# Those of from_pretrained that its signature does not name (transformers 5), as far as they resemble one of ours.
_UNNAMED = {"torch_dtype", "device_map", "device_mesh", "max_memory", "adapter_name", "adapter_kwargs", "tp_plan"}
# difflib's ratio from which a name counts as a slip of another: lower ones would refuse options of a configuration.
_ALIKE = 0.8
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")


def check_names(given: Iterable[str], known: Sequence[str]) -> None:
    """Refuse options that are not `known` to a function, and nearly so or to another one.

    Other names may be options of from_pretrained, or of the model's configuration: `unknown_option` knows later.

    Raises ConfigError.
    """
    theirs = _UNNAMED | inspect.signature(PreTrainedModel.from_pretrained).parameters.keys()
    for name in given:
        if name not in theirs and name not in known and _meant(name, known) is not None:
            raise _unknown(name, known)


def unknown_option(error: TypeError, known: Sequence[str]) -> ConfigError | None:
    """What transformers says of an option that nobody knows, in our words; None for another TypeError."""
    found = _UNEXPECTED.search(str(error))
    return None if found is None else _unknown(found[1], known)


def check_memory(value: object) -> None:
    """Raises ConfigError for anything but a size or a number of bytes."""
    if isinstance(value, str):
        try:
            parse_size(value)
        except ConfigError as error:
            raise ConfigError(f"memory: {error}") from error
    elif isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        raise ConfigError(f"memory {value!r}: give a size, as '6GiB', or a number of bytes.")


def check_device(value: object) -> None:
    """Raises ConfigError for what cannot be a device; torch says whether there is such a one."""
    if isinstance(value, bool) or not isinstance(value, str | int | torch.device):
        raise ConfigError(f"device {value!r}: give its name, as 'cpu' or 'cuda:0'.")


def check_flags(**flags: object) -> None:
    """Raises ConfigError for anything but True and False: "no" would be taken for yes."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{name} {value!r}: give True or False.")


def check_path(what: str, value: object, wanted: str) -> None:
    """Raises ConfigError for what is neither a string nor a path."""
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{what} {value!r}: give {wanted}.")


def _meant(name: str, known: Sequence[str]) -> str | None:
    if _ELSEWHERE.get(name) in known:
        return _ELSEWHERE[name]
    return next(iter(difflib.get_close_matches(name.lower(), known, n=1, cutoff=_ALIKE)), None)


def _unknown(name: str, known: Sequence[str]) -> ConfigError:
    meant = _meant(name, known)
    hint = "" if meant is None else f" (did you mean {meant}?)"
    return ConfigError(
        f"option {name!r} is not known{hint}: give one of {', '.join(known)}, or one that from_pretrained takes."
    )
