"""The dense part of a model out of a pack."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import Extent, file_extents, file_inside
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.checkpoint import Checkpoint
from remoe_adapt.expert_cache.checkpoint_store import dense_fingerprint
from remoe_adapt.expert_cache.dense import Encoded, model_of
from remoe_adapt.expert_cache.direct_io import ExtentReader
from remoe_adapt.expert_cache.encodings import block_type, dequantise
from remoe_adapt.expert_cache.pack import DENSE, PackedStore


class PackedDense:
    """Stands where the checkpoint would for the dense part; made by `of`."""

    is_mapped = False

    def __init__(self, store: PackedStore, checkpoint: Checkpoint, extents: Mapping[str, Extent]) -> None:
        self._store, self._checkpoint, self._extents = store, checkpoint, extents
        self._entries: dict[str, dict[str, Any]] = store.manifest["dense"]

    @classmethod
    def of(cls, store: PackedStore, checkpoint: Checkpoint) -> PackedDense | None:
        """The dense part of a pack; None where it has none.

        Raises ConfigError for that of another checkpoint, ExpertReadError for a damaged one.
        """
        if (found := store.manifest.get("dense_fingerprint")) is None:
            return None
        if found != dense_fingerprint(store.plan, checkpoint.extents()):
            raise ConfigError(
                f"{store.folder} has another dense part than {printable(checkpoint.name)}: routers, attention or "
                "embeddings were trained since it was packed. Pack again, or leave the dense part out of the pack."
            )
        return cls(store, checkpoint, file_extents(file_inside(store.folder, DENSE)))

    def encoded(self, skeleton: PreTrainedModel) -> dict[str, Encoded]:
        """The modules whose weights are in blocks."""
        return {
            name.removesuffix(".weight"): Encoded(block_type(entry["codec"]), entry["rows"], entry["cols"])
            for name, entry in self._entries.items()
        }

    def load(self, skeleton: PreTrainedModel, encoded: Mapping[str, Encoded], **kwargs: Any) -> PreTrainedModel:
        """The model; raises ConfigError for a dense part of another one, ExpertReadError when it cannot be read."""
        checkpoint, kept = self._checkpoint, {f"{name}.weight" for name in encoded}
        tensors = self._read()
        for name, entry in self._entries.items():
            if name not in kept:
                kind = block_type(entry["codec"])
                tensors[name] = dequantise(tensors[name], kind, entry["cols"], checkpoint.dtype)
        kwargs.pop("trust_remote_code", None)
        return model_of(
            type(skeleton), checkpoint.plain_config(), tensors, encoded, checkpoint.dtype, fast=True,
            folder=checkpoint.folder, **kwargs,
        )  # fmt: skip

    def _read(self) -> dict[str, Tensor]:
        for name, entry in self._entries.items():
            extent = self._extents.get(name)
            shape = entry["rows"], block_type(entry["codec"]).row_bytes(entry["cols"])
            if extent is None or (extent.dtype, extent.shape) != (torch.uint8, shape):
                raise ConfigError(f"{self._store.folder}: {name} is missing or not {list(shape)} bytes: pack again.")
        tensors = {name: torch.empty(e.shape, dtype=e.dtype, device="cpu") for name, e in self._extents.items()}
        reader = ExtentReader([extent.path for extent in self._extents.values()])
        try:
            reader.fill([(extent, tensors[name]) for name, extent in self._extents.items()])
        finally:
            reader.close()
        return tensors
