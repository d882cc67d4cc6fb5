"""The tensors of a safetensors checkpoint folder as byte ranges of its files."""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from remoe_adapt._support import parse_json, printable, read_json
from remoe_adapt.errors import ConfigError, ExpertReadError

SINGLE, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# https://github.com/huggingface/safetensors: 8 bytes with the length of the header, the header (JSON), the bytes.
_LENGTH_BYTES = 8
# The limit of the safetensors library itself.
_MAX_HEADER_BYTES = 100_000_000
# torch makes no tensor of more.
_MAX_DIMENSIONS = 64
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
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_QUANTISED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}


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


def chosen_file(folder: Path) -> Path:
    """The safetensors file of a checkpoint folder, or the index of several, as from_pretrained chooses: what the
    configuration names (`transformers_weights`), else the one file, else the index.

    Raises ConfigError when there is none, ExpertReadError when it lies elsewhere.
    """
    config = folder / CONFIG
    entries = read_json(config, ExpertReadError) if config.is_file() else {}
    named = entries.get("transformers_weights") if isinstance(entries, dict) else None
    if named is not None:
        if not isinstance(named, str) or not named.endswith((".safetensors", ".safetensors.index.json")):
            raise ConfigError(
                f"{printable(config)}: transformers_weights {printable(repr(named))} is neither a safetensors file nor "
                "an index of some: experts are read from them alone."
            )
        first = file_inside(folder, named)
    else:
        first = file_inside(folder, next((name for name in (SINGLE, INDEX) if (folder / name).is_file()), SINGLE))
        if not first.is_file():
            raise ConfigError(
                f"{printable(folder)} has neither {SINGLE} nor {INDEX}: experts are read from safetensors files, so "
                "load the model with from_pretrained and save_pretrained it to another folder first."
            )
    return first


def checkpoint_files(folder: Path) -> list[Path]:
    """`chosen_file`, or those that it names; raises as it does, and ExpertReadError for an index that is damaged."""
    first = chosen_file(folder)
    if not first.name.endswith(".index.json"):
        return [first]
    index = read_json(first, ExpertReadError)
    named_files = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named_files, dict) or not all(isinstance(name, str) for name in named_files.values()):
        raise ExpertReadError(
            f"{printable(first)} is not the index of a checkpoint (no weight_map of tensors and files): fetch it again."
        )
    names = sorted(set(named_files.values()))
    if odd := [name for name in names if not name.endswith(".safetensors")]:
        raise ExpertReadError(
            f"{printable(first)}: {printable(repr(odd[0]))} is no safetensors file: no other is read."
        )
    return [file_inside(folder, name) for name in names]


def file_inside(folder: Path, name: str) -> Path:
    """A file that something in this folder names, and that lies in it, or in the blobs of the hub's cache that the
    folder is a snapshot of.

    Raises ExpertReadError for another place, as where a link leads out.
    """
    try:
        home, real = folder.resolve(), (folder / name).resolve()
        # The hub's cache links the files of a snapshot to blobs, which lie beside the snapshots.
        places = (home, home.parent / "blobs", home.parent.parent / "blobs")
        inside = any(real.is_relative_to(place) for place in places)
    except (OSError, RuntimeError, ValueError):  # a circle of links, or no name of a file
        inside = False
    if not inside or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ExpertReadError(
            f"{printable(folder)}: {printable(repr(name))} does not lie in this folder: what is named elsewhere is not "
            "read. Copy the files into one folder."
        )
    return folder / name


def open_checkpoint(folder: Path, *, header_alone: bool = False) -> dict[str, Extent]:
    """Every tensor of the checkpoint in `folder`, by its name in the files.

    header_alone: a file may end behind its header: sizes are asked for, and no weights.

    Raises ConfigError when there is no safetensors checkpoint, ExpertReadError when a file is missing, truncated, not
    safetensors or elsewhere, or two of them hold one tensor.
    """
    return tensors_of(checkpoint_files(folder), header_alone=header_alone)


def tensors_of(paths: Iterable[Path], *, header_alone: bool = False) -> dict[str, Extent]:
    """Every tensor of these files; raises ExpertReadError as `open_checkpoint`."""
    found: dict[str, Extent] = {}
    for path in paths:
        for tensor, extent in file_extents(path, header_alone=header_alone).items():
            if tensor in found:
                raise ExpertReadError(
                    f"tensor {printable(tensor)} is in {printable(found[tensor].path)} and in {printable(path)} too: "
                    "which one counts cannot be known. Fetch the files again."
                )
            found[tensor] = extent
    return found


def file_extents(path: Path, *, header_alone: bool = False) -> dict[str, Extent]:
    """Every tensor of one file; raises ExpertReadError as `open_checkpoint`."""
    try:
        found, facts = {}, path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise ExpertReadError(f"{printable(path)} is no file: fetch it again.")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            whole = 0 < length <= min(_MAX_HEADER_BYTES, facts.st_size - _LENGTH_BYTES)
            text = file.read(length) if whole else b""
        header = parse_json(text, f"the header of {path}", ExpertReadError)
        for tensor, entry in header.items():
            if tensor != "__metadata__":
                found[tensor] = _extent(path, tensor, entry, _LENGTH_BYTES + length)
    except FileNotFoundError as error:
        raise ExpertReadError(
            f"{printable(path)} is missing, though the index beside it names it: fetch it again."
        ) from error
    except ExpertReadError as error:
        # One with a cause comes of `parse_json`, which cannot say what the text should have been.
        if error.__cause__ is None:
            raise
        raise _no_header(path) from error
    except OSError as error:
        raise ExpertReadError(f"{printable(path)} cannot be read: {error.strerror or error}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _no_header(path) from error
    # In the order of their bytes: an overlap is then one of neighbours. Tensors without bytes lie anywhere.
    before = None
    for extent in sorted(found.values(), key=lambda extent: (extent.offset, extent.size)):
        end = extent.offset + extent.size
        if end > facts.st_size and not header_alone:
            raise ExpertReadError(
                f"{printable(path)} is truncated: tensor {printable(extent.tensor)} ends at byte {end}, the file at "
                f"{facts.st_size}. Fetch it again."
            )
        if before is not None and before.offset + before.size > extent.offset:
            raise ExpertReadError(
                f"{printable(path)}: tensor {printable(extent.tensor)} begins at byte {extent.offset}, within tensor "
                f"{printable(before.tensor)}. Fetch it again."
            )
        before = extent if extent.size else before
    return found


def _extent(path: Path, tensor: str, entry: Any, start: int) -> Extent:
    """Raises ValueError, TypeError or KeyError for what is no entry of a header."""
    first, end = entry["data_offsets"]
    shape, dtype = tuple(entry["shape"]), entry["dtype"]
    whole = len(shape) <= _MAX_DIMENSIONS and isinstance(dtype, str)
    if not whole or not all(type(number) is int and number >= 0 for number in (first, end - first, *shape)):
        raise ValueError(f"tensor {tensor!r}")
    # Number formats without a name here belong to quantised weights, of which the bytes alone are known.
    known = SAFETENSORS_DTYPES.get(dtype)
    bits = known.itemsize * 8 if known is not None else _QUANTISED_BITS.get(dtype)
    if bits is not None and prod(shape) * bits != (end - first) * 8:
        raise ExpertReadError(
            f"{printable(path)}: tensor {printable(tensor)} at byte {start + first} is not as long as its shape."
        )
    return Extent(path, tensor, known or torch.uint8, shape, start + first, end - first)


def _no_header(path: Path) -> ExpertReadError:
    return ExpertReadError(f"{printable(path)} is not a whole safetensors file: its header cannot be read at byte 0.")


def checkpoint_dtype(folder: Path) -> torch.dtype:
    """The type of the first floating tensor that is no code; raises as `open_checkpoint`."""
    dtypes = [extent.dtype for extent in open_checkpoint(folder).values()]
    return next((dtype for dtype in dtypes if dtype.is_floating_point and dtype.itemsize > 1), torch.float32)
