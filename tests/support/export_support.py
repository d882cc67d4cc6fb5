"""A base, its GGUF and a family on disk, and what of a GGUF an export has changed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from gguf_writer import gguf, write_gguf
from tiny_families import tiny_family
from transformers import PreTrainedModel

from remoe_adapt import Family
from remoe_adapt.family.family import original_weights


class Home:
    """A base in base/, its F32 GGUF model.gguf, a family."""

    def __init__(self, folder: Path, model: PreTrainedModel, kind: str) -> None:
        self.folder, self.model = folder, model
        self.base, self.gguf = folder / "base", write_gguf(model, kind, folder / "model.gguf")
        model.save_pretrained(self.base)
        self.family: Family = tiny_family(model, folder / "family", (0.5, 1.0))

    def live(self, strength: float) -> list[torch.Tensor]:
        return list(self.family.live(strength, original_weights(self.model)).values())


def routers(path: Path) -> list[torch.Tensor]:
    """Read by the gguf package."""
    found = [t for t in gguf.GGUFReader(path).tensors if t.name.endswith("ffn_gate_inp.weight")]
    return [torch.from_numpy(np.array(tensor.data)) for tensor in found]


def holds(path: Path, weights: list[torch.Tensor]) -> bool:
    return all(torch.equal(ours, theirs) for ours, theirs in zip(routers(path), weights, strict=True))


def changed_only_in_routers(before: Path, after: Path) -> bool:
    old, new = (np.fromfile(path, np.uint8) for path in (before, after))
    inside = np.zeros(len(old), bool)
    for tensor in gguf.GGUFReader(before).tensors:
        if tensor.name.endswith("ffn_gate_inp.weight"):
            inside[tensor.data_offset : tensor.data_offset + tensor.n_bytes] = True
    return len(old) == len(new) and bool((old != new).any()) and not bool((old != new)[~inside].any())
