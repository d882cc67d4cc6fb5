"""An adapter's file: where it lies and which tensors it holds, known from its header before any data is read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor

from remoe_adapt._support import parse_json, printable, read_json, say_once
from remoe_adapt.errors import AdapterCorruptError, ConfigError, FamilyError
from remoe_adapt.tuner.checks import PREFIX, is_router_key, plain_key

# Two tensors for each of ten thousand routers.
_MAX_HEADER_BYTES = 4 << 20
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
FAMILY_FILE = "family.json"


@dataclass(frozen=True)
class StoredTensor:
    """What the header says of one tensor; `dtype` is None for types that no adapter has (complex, 4 and 8 bits)."""

    key: str
    dtype: torch.dtype | None
    shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredAdapter:
    """A whole safetensors file of a REMOE adapter: its tensors by key without PEFT's prefix."""

    path: Path
    tensors: dict[str, StoredTensor]

    @contextmanager
    def values(self) -> Iterator[StoredValues]:
        """The tensors' values, one at a time. Raises AdapterCorruptError when the file cannot be read."""
        try:
            with safe_open(self.path, framework="pt") as file:
                yield StoredValues(self, file)
        except (SafetensorError, OSError) as error:
            raise _incomplete(self.path, error) from error


@dataclass(frozen=True)
class StoredValues:
    """The tensors of an open file, each read when it is asked for."""

    _adapter: StoredAdapter
    _file: Any

    def __getitem__(self, key: str) -> Tensor:
        values: Tensor = self._file.get_tensor(self._adapter.tensors[key].key)
        return values


def find_file(model_id: str | os.PathLike[str], name: str, subfolder: str | None = None, **hub: Any) -> Path | None:
    """A file of an adapter folder, or of a hub repository (fetched, or from the cache); None where there is none."""
    folder = Path(os.fspath(model_id), subfolder or "")
    if folder.is_dir():
        return folder / name if (folder / name).is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(model_id), name, subfolder=subfolder, **hub))
    # A file that is not in the repository, no network, or a name that is none: the caller says what is missing.
    except (HfHubHTTPError, HFValidationError, OSError):
        return None


def find_adapter(model_id: str | os.PathLike[str], subfolder: str | None = None, **hub: Any) -> StoredAdapter:
    """The adapter file that a load of `model_id` reads.

    Raises AdapterCorruptError when there is none, when there is only a pickle, and as `read_adapter`.
    """
    path = find_file(model_id, SAFETENSORS_WEIGHTS_NAME, subfolder, **hub)
    if path is not None:
        return read_adapter(path)
    where = printable(Path(os.fspath(model_id), subfolder or ""))
    if find_file(model_id, WEIGHTS_NAME, subfolder, **hub) is not None:
        raise AdapterCorruptError(
            f"{where} has its weights only in {WEIGHTS_NAME}, a pickle, which can run code and is never read: save the "
            f"adapter again as {SAFETENSORS_WEIGHTS_NAME} (save_pretrained does)."
        )
    raise AdapterCorruptError(f"{where} has no {SAFETENSORS_WEIGHTS_NAME}: copy or save the adapter again.")


def read_adapter(path: Path) -> StoredAdapter:
    """Names, types and shapes of the tensors in an adapter file; no data is read.

    Raises AdapterCorruptError for a file that is no whole safetensors file, has a header of more than 4 MiB, holds one
    tensor twice (with and without PEFT's prefix), no router's tensor at all, or a router's tensor that is not
    fp64, fp32, fp16 or bf16.
    """
    tensors: dict[str, StoredTensor] = {}
    for key, dtype, shape in _header(path):
        plain = plain_key(key)
        # Keys with and without the prefix are one to PEFT, which takes whichever comes last.
        if plain in tensors:
            raise AdapterCorruptError(
                f"{printable(path)} holds {printable(plain)} twice, with and without 'base_model.model.': one of them "
                "is not meant. Save the adapter again."
            )
        found = tensors[plain] = StoredTensor(key, _DTYPES.get(dtype), shape)
        if is_router_key(plain) and (found.dtype is None or not found.dtype.is_floating_point):
            raise AdapterCorruptError(
                f"{printable(plain)} in {printable(path)} has type {printable(dtype)}: deltas are F32, BF16, F16 or "
                "F64. Save the adapter again."
            )
    if not any(is_router_key(key) for key in tensors):
        raise AdapterCorruptError(
            f"{printable(path)} holds no {PREFIX} tensors: it is not the file of a REMOE adapter."
        )
    return StoredAdapter(path, tensors)


def _header(path: Path) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(key, dtype, shape) of every tensor."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError(f"its header would have {length} bytes, an adapter's has a few thousand")
            # safetensors reads a header of up to 100 MB; an adapter's has no reason to be that long.
            entries = parse_json(file.read(length), "its header")
        # Sizes, offsets and the length of the file are compared in there.
        with safe_open(path, framework="pt") as whole:
            keys = list(whole.keys())
        return iter([(key, entries[key]["dtype"], tuple(entries[key]["shape"])) for key in keys])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise _incomplete(path, error) from error


def _incomplete(path: Path, reason: object) -> AdapterCorruptError:
    return AdapterCorruptError(
        f"{printable(path)} is not a complete safetensors file ({printable(reason)}): copy or save the adapter again."
    )


def refuse_prior_points(model_id: str | os.PathLike[str], subfolder: str | None) -> None:
    """Raises ConfigError where the folder of an adapter is asked for that a family of recency priors has not.

    PEFT would say no more than that a file is missing.
    """
    folder = Path(os.fspath(model_id), subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        return
    for family in (folder, folder.parent):
        if not (family / FAMILY_FILE).is_file():
            continue
        try:
            adapters = [point["adapter"] for point in read_json(family / FAMILY_FILE, FamilyError)["points"]]
        except (FamilyError, KeyError, TypeError):
            return  # no family that could be loaded, so nothing is known of its points
        if None in adapters:
            raise ConfigError(
                f"{printable(family)} is a family of recency priors without adapters, so PEFT has nothing to load: "
                "get_remoe_model(base, family=...) runs it, recency_prior(model, ...) one point of it."
            )
        return


def warn_of_missing_prior(adapter: Path, family: Path | None) -> None:
    """Say once that the adapter folder is a point of a family whose recency prior no PEFT route installs."""
    if family is None or not family.is_file():
        return
    try:
        points = read_json(family, FamilyError)["points"]
        names = [point["adapter"] for point in points if point.get("recency")]
    except (FamilyError, KeyError, TypeError, AttributeError):
        return  # no family that could be loaded, so it promises nothing
    if adapter.name in names:
        say_once(
            f"{printable(adapter)} is a point of the family {printable(family.parent)} and was measured with a recency "
            "prior, which loading it as a plain PEFT adapter does not install: its certificate does not hold for this "
            "model. get_remoe_model(base, family=...) gives both; recency_prior(model, ...) adds a prior by hand."
        )
