"""A base to evaluate or to train: whole where its weights are floats, behind an expert cache where they are codes."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from remoe_adapt._support import return_freed_memory, say_once
from remoe_adapt.checkpoints import HUB_OPTIONS, load_base, names_gguf, on_device, read_config, usable_device
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.checkpoint import check_arithmetic
from remoe_adapt.expert_cache.encoding import FLOATS, encoding_of
from remoe_adapt.expert_cache.load import load_with_expert_cache

# Devices that an expert cache is for.
_CACHED_ON = ("cpu", "cuda")


def load_whole_or_cached(
    path: str | os.PathLike[str],
    expert_cache: str | int | float | None = None,
    *,
    storage: str | os.PathLike[str] | None = None,
    arithmetic: str = "exact",
    device: str | None = None,
    dtype: str | torch.dtype | None = None,
    **from_pretrained_kwargs: Any,
) -> nn.Module:
    """A base by path or hub id: behind an expert cache where one is asked for, or where its weights are quantised.

    A quantised checkpoint is loaded behind a cache of all experts, which holds their codes: dequantised they would take
    two to four times the memory, and transformers reads some formats with packages of others only. Where that cannot
    be, it is loaded whole as `load_base` does, which is said once.

    path: of the checkpoint, or its hub id.
    expert_cache: the budget of the cache; None: all experts.
    storage: a pack of this model, to read its experts from.
    arithmetic: of quantised experts, as in load_with_expert_cache.
    device: where it computes; None: where from_pretrained puts it.
    dtype: as in from_pretrained; None: the default of the way in which it is loaded.
    from_pretrained_kwargs: its other options.

    Raises ConfigError when it cannot be loaded, and what load_with_expert_cache raises where a cache or a pack is asked
    for.
    """
    check_arithmetic(arithmetic)
    if device is not None:
        device = usable_device(device)
    is_asked = expert_cache is not None or storage is not None
    typed: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    if is_asked or _has_codes(path, device, from_pretrained_kwargs):
        try:
            return load_with_expert_cache(
                path, 1.0 if expert_cache is None else expert_cache, storage=storage, arithmetic=arithmetic,
                device="cpu" if device is None else device, **typed, **from_pretrained_kwargs,
            )  # fmt: skip
        except UncacheableError as error:
            if is_asked:
                raise
            say_once(f"{error} It is loaded whole.")
    model = on_device(load_base(path, **typed, **from_pretrained_kwargs), device)
    # The files' tensors that parameters were put together of: the allocator keeps up to a fourth of a small model.
    return_freed_memory()
    return model


def _has_codes(path: str | os.PathLike[str], device: str | None, options: dict[str, Any]) -> bool:
    """Whether weights of this checkpoint are quantised, and a cache could hold them."""
    if names_gguf(path, options):
        return True
    if device is not None and torch.device(device).type not in _CACHED_ON:
        return False
    known = {key: options[key] for key in (*HUB_OPTIONS, "trust_remote_code") if key in options}
    try:
        config = read_config(path, **known)
    except ConfigError:
        # An adapter that names its base, or a fault: `load_base` loads the one and says the other.
        return False
    return encoding_of(config) is not FLOATS
