"""A model by path or hub id, up to the point where its weights are read: where the expert cache and packs begin."""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import (
    HUB_OPTIONS,
    auto_class,
    check_place,
    checkpoint_dtype,
    checkpoint_folder,
    read_config,
)
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.encoding import FLOATS, Encoding, encoding_of

# Default dtype and classes of experts change for the whole process while a model is made.
LOADING = threading.Lock()


@dataclass(frozen=True)
class Checkpoint:
    """Where a model is and how it is made.

    name: as it was given.
    dtype: of its weights in memory.
    encoding: of its experts.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    trust: Mapping[str, Any]
    encoding: Encoding = FLOATS

    @property
    def loader(self) -> Any:
        """The auto class that makes it."""
        return auto_class(self.config)

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device; under LOADING. Raises UncacheableError when no auto class makes it."""
        try:
            with torch.device("meta"):
                model = self.loader.from_config(copy.deepcopy(self.config), dtype=self.dtype, **self.trust)
        except Exception as error:  # config.json may hold anything
            reason = str(error).partition("\n")[0].partition(" Model type should be")[0] or type(error).__name__
            raise UncacheableError(
                f"{printable(self.name)!r} cannot be made without its weights ({printable(reason)})."
            ) from error
        assert isinstance(model, PreTrainedModel)
        self.encoding.prepare(model)
        return model


def find_checkpoint(
    path: str | os.PathLike[str], dtype: str | torch.dtype | None = None, options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint of a folder or hub id, fetched if need be; dtype None or "auto": the configuration's.

    options: of from_pretrained, of which those for the hub and `trust_remote_code` count here.

    Raises ConfigError when it is not there or the dtype is none, UncacheableError when the configuration says that it
    is quantised in a way that no encoding reads: then no weights have been fetched.
    """
    name, options = os.fspath(path), options or {}
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    trust = {key: options[key] for key in ("trust_remote_code",) if key in options}
    check_place(path, "model", **hub)
    config = read_config(name, **hub, **trust)
    encoding = encoding_of(name, config)
    folder = checkpoint_folder(name, **hub)
    return Checkpoint(name, folder, config, _dtype(dtype, config, folder), trust, encoding)


def _dtype(dtype: str | torch.dtype | None, config: Any, folder: Path) -> torch.dtype:
    if dtype is None or dtype == "auto":
        dtype = getattr(config, "dtype", None) or checkpoint_dtype(folder)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r} is no floating type of torch: give bfloat16 or float32, for instance.")
    return found
