"""The tensors of a safetensors checkpoint folder as byte ranges of its files."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.errors import ConfigError, ExpertReadError

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# https://github.com/huggingface/safetensors: 8 bytes with the length of the header, the header (JSON), the bytes.
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 100_000_000
SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True, slots=True)
class Extent:
    """`size` bytes of a file from `offset` on, which are a tensor or a row of it."""

    path: Path
    tensor: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    size: int

    def row(self, index: int, rows: int) -> Extent:
        """One of the `rows` along the first dimension, which stays as 1."""
        size = self.size // rows
        return replace(self, shape=(1, *self.shape[1:]), offset=self.offset + index * size, size=size)


def open_checkpoint(folder: Path) -> dict[str, Extent]:
    """Every tensor of the checkpoint in `folder`, by its name in the files.

    Raises ConfigError when there is no safetensors checkpoint, ExpertReadError when a file is missing, truncated or
    not safetensors.
    """
    index = folder / INDEX
    try:
        if index.is_file():
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / SINGLE).is_file():
            names = [SINGLE]
        else:
            raise ConfigError(
                f"{folder} has neither {SINGLE} nor {INDEX}: experts are read from safetensors files, so load the "
                "model with from_pretrained and save_pretrained it to another folder first."
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ExpertReadError(f"{index} is not the index of a checkpoint ({error}): fetch it again.") from error
    return {tensor: extent for name in names for tensor, extent in file_extents(folder / name).items()}


def file_extents(path: Path) -> dict[str, Extent]:
    """Every tensor of one file; raises ExpertReadError as `open_checkpoint`."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            header: dict[str, Any] = json.loads(file.read(length if length <= _MAX_HEADER_BYTES else 0))
        start, file_bytes = _LENGTH_BYTES + length, path.stat().st_size
        found = {}
        for tensor, entry in header.items():
            if tensor == "__metadata__":
                continue
            first, end = entry["data_offsets"]
            # Number formats without a name here belong to quantised weights, of which the bytes alone are known.
            dtype = SAFETENSORS_DTYPES.get(entry["dtype"], torch.uint8)
            found[tensor] = Extent(path, tensor, dtype, tuple(entry["shape"]), start + first, end - first)
    except FileNotFoundError as error:
        raise ExpertReadError(f"{path} is missing, though the index beside it names it: fetch it again.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExpertReadError(
            f"{path} is not a whole safetensors file: its header cannot be read at byte 0."
        ) from error
    for extent in found.values():
        if extent.offset + extent.size > file_bytes:
            raise ExpertReadError(
                f"{path} is truncated: tensor {extent.tensor} ends at byte {extent.offset + extent.size}, the file at "
                f"{file_bytes}. Fetch it again."
            )
        if extent.dtype is not torch.uint8 and prod(extent.shape) * extent.dtype.itemsize != extent.size:
            raise ExpertReadError(
                f"{path}: tensor {extent.tensor} at byte {extent.offset} is not as long as its shape."
            )
    return found


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The type of the first floating tensor; raises as `open_checkpoint`."""
    extents = open_checkpoint(folder).values()
    return next((extent.dtype for extent in extents if extent.dtype.is_floating_point), torch.float32)
