"""Families of random deltas over tiny models, written by the same calls as `remoe train` makes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn

from remoe_adapt.family.family import Family
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.config import RemoeConfig

BASE_ID = "tests/tiny-base"


def save_adapter(model: nn.Module, folder: Path, *, seed: int, rank: int | None = None) -> Path:
    """A saved REMOE adapter of random deltas for a copy of `model`."""
    torch.manual_seed(seed)
    peft_model = get_peft_model(copy.deepcopy(model), RemoeConfig(init_weights=False, rank=rank))
    peft_model.save_pretrained(str(folder))
    return folder


def tiny_family(
    model: nn.Module, path: Path, strengths: Sequence[float] = (0.25, 0.5, 1.0), *, rank: int | None = None
) -> Family:
    """A family of `model` in `path`; its deltas are of the size of the router weights of a tiny random model."""
    family = Family.create(path, BASE_ID, fingerprint(model))
    for seed, strength in enumerate(strengths):
        folder = save_adapter(model, path / Family.adapter_name(strength), seed=seed, rank=rank)
        family.add_point(strength, folder)
    return family


def edit(path: Path, **changes: Any) -> None:
    """Give some entries of a JSON object in a file other values."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
