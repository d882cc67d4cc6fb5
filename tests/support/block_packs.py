"""Packs of tiny checkpoints in any of ggml's block types, for tests: what `remoe pack` does in the two it makes."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_checkpoints import skeleton

from remoe_adapt.expert_cache.checkpoint_store import ExpertStore
from remoe_adapt.expert_cache.encodings import BlockType, Ggml
from remoe_adapt.expert_cache.pack import GGML
from remoe_adapt.expert_cache.pack_sources import QuantisedExperts
from remoe_adapt.expert_cache.packing import Piece, write_pack


class _InBlocks(QuantisedExperts):
    """As its base, with ggml's own quantiser."""

    kernels: Ggml

    def read(self, layer: int, expert: int) -> Piece:
        parts = dict(self.store.read(layer, expert))
        for name, param in self.params(layer).items():
            if param.codec == GGML:
                matrix_NK = parts[name].t() if param.transposed else parts[name]
                parts[name] = self.kernels.quantise(matrix_NK.contiguous(), self.kind)
        return Piece(parts, {})


def pack_in(kind: BlockType, kernels: Ggml, folder: Path, out: Path, dtype: torch.dtype = torch.float32) -> Path:
    """A pack of a checkpoint whose experts are in blocks of this type."""
    store = ExpertStore(folder, skeleton(folder, dtype))
    try:
        source = _InBlocks(store, kind)
        source.kernels = kernels
        write_pack(source, out, model_id=folder.name)
    finally:
        store.close()
    return out
