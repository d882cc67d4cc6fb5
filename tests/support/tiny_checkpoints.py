"""Checkpoints of tiny random models on disk, and the models that transformers loads from them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tiny_models import tiny_model
from transformers import AutoConfig, PreTrainedModel

from remoe_adapt.checkpoints.load import auto_class

SMALL_SHARDS = "60KB"


def save_tiny(
    folder: Path, architecture: str, *, shards: str = SMALL_SHARDS, dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """A checkpoint of an architecture, as `save_pretrained` writes it."""
    tiny_model(architecture, **sizes).to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def stock(folder: Path, **kwargs: Any) -> PreTrainedModel:
    """What from_pretrained makes of it, all in memory.

    Copied from the mapped files, where weights lie at odd addresses: products then differ in the last place.
    """
    loader = auto_class(AutoConfig.from_pretrained(folder))
    model = loader.from_pretrained(folder, experts_implementation="eager", **kwargs)
    assert isinstance(model, PreTrainedModel)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def skeleton(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The same on the meta device."""
    config = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


class Faults:
    """A reader that fails as it is told: `plan` maps the number of a read to "eio", "short" or "end"."""

    def __init__(self, read: Any, plan: dict[int, str] | None = None, *, always: str = "") -> None:
        self._read, self.plan, self.always, self.reads = read, plan or {}, always, 0

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        fault = self.always or self.plan.get(self.reads, "")
        self.reads += 1
        if fault == "eio":
            raise OSError(5, "Input/output error")
        if fault == "end":
            return 0
        if fault == "short":
            return int(self._read(fd, [buffers[0][: max(1, len(buffers[0]) // 3)]], offset))
        return int(self._read(fd, list(buffers), offset))
