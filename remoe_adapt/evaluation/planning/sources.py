"""What is known of a model before its weights are there: a folder, a GGUF, or the metadata of a hub id."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from remoe_adapt._support import first_line, printable, read_json
from remoe_adapt.checkpoints import HUB_OPTIONS, check_place, file_extents, is_gguf
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache import MANIFEST, Checkpoint, GgufModel, described_checkpoint, read_manifest

_CONFIG, _SINGLE, _INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
# Configurations of models have some 10 KB; those that list every layer, some 100.
_MAX_CONFIG_BYTES = 16 << 20
# A skeleton has modules for each layer: more than any model has would take memory and minutes.
_MOST_LAYERS, _MOST_ENTRIES, _LARGEST_NUMBER = 2048, 1 << 16, 1 << 40


@dataclass(frozen=True, slots=True)
class Source:
    """A model to plan for.

    name: as it was given.
    known_from: what is known of it is read there: "config.json", "the index", "safetensors headers", "GGUF header".
    has_files: the headers of all its tensors are there.
    has_weights: all its weights are.
    stored_bytes: of its files; None: not known.
    reads_from: a file of it that is there, large enough to time reads; None: none.
    folder: where it lies, or would lie once downloaded.
    predicting_layers: layers of its files that predict further tokens, which no model of transformers has.
    pack: what `remoe pack` made of it is all that is there; None: it is the model itself.
    """

    name: str
    checkpoint: Checkpoint
    known_from: str
    has_files: bool
    has_weights: bool
    stored_bytes: int | None
    reads_from: Path | None
    folder: Path
    predicting_layers: int
    pack: Path | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether its files are GGUF."""
        return isinstance(self.checkpoint, GgufModel)


def open_source(model: str | os.PathLike[str], config: str | None = None, **hub: Any) -> Source:
    """What is there of a model; of a hub id its configuration and index are fetched, never weights.

    model: a folder with a config.json, with or without safetensors files or their index; a pack, for which nothing is
        asked of the hub; a GGUF, of a split one the first part, whole or cut off behind its header; or a hub id.
    config: of a GGUF: folder or hub id of the model that it was made from.
    hub: options of from_pretrained for the hub.

    Raises ConfigError when there is nothing of the kind, or what is there cannot be of a model (layers and sizes beyond
    reason), UncacheableError for models whose experts cannot be cached, ExpertReadError for damaged files.
    """
    if is_gguf(model):
        return _of_gguf(model, config)
    if config is not None:
        raise ConfigError("config is of a GGUF, which may not tell its own: other models have a config.json.")
    check_place(model, "model", **{key: hub[key] for key in HUB_OPTIONS if key in hub})
    folder = Path(model)
    if folder.is_dir():
        if (folder / MANIFEST).is_file() and not (folder / _CONFIG).is_file():
            return _of_pack(folder)
        return _of_folder(os.fspath(model), folder, folder)
    downloads = Path(str(hub.get("cache_dir") or constants.HF_HUB_CACHE))
    return _of_folder(os.fspath(model), _metadata(os.fspath(model), hub), downloads)


def _metadata(model: str, hub: dict[str, Any]) -> Path:
    """The folder of the hub's cache with configuration and index of a model."""
    try:
        config = hf_hub_download(model, _CONFIG, **hub)
        # A model of one file has none.
        with contextlib.suppress(EntryNotFoundError, LocalEntryNotFoundError):
            hf_hub_download(model, _INDEX, **hub)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ConfigError(
            f"the configuration of {printable(model)!r} cannot be had ({first_line(error)}): go online, or give a "
            "folder with its config.json."
        ) from error
    return Path(config).parent


def _of_folder(name: str, folder: Path, place: Path) -> Source:
    entries = read_json(folder / _CONFIG, max_bytes=_MAX_CONFIG_BYTES)
    if not isinstance(entries, dict):
        raise ConfigError(f"{printable(folder / _CONFIG)} is no configuration of a model: give another folder.")
    _check_sizes(entries, folder / _CONFIG)
    checkpoint = described_checkpoint(folder)
    files, stored_bytes = _files(folder)
    there = [file for file in files if file.is_file()]
    has_files = bool(files) and len(there) == len(files)
    whole = False
    if has_files:
        ends = [max((e.offset + e.size for e in file_extents(f, header_alone=True).values()), default=0) for f in files]
        stored_bytes = sum(ends)
        whole = all(file.stat().st_size >= end for file, end in zip(files, ends, strict=True))
    known_from = "safetensors headers" if has_files else "config.json" if stored_bytes is None else "the index"
    largest = max(there, key=lambda file: file.stat().st_size, default=None)
    predicting = entries.get("num_nextn_predict_layers")
    return Source(
        name, replace(checkpoint, name=name), known_from, has_files, whole, stored_bytes,
        largest, place, predicting if isinstance(predicting, int) and predicting > 0 else 0,
    )  # fmt: skip


def _of_pack(folder: Path) -> Source:
    manifest = read_manifest(folder)
    if not manifest.get("config"):
        raise ConfigError(
            f"{printable(folder)} is a pack of an older version, which does not say how its model computes: give the "
            f"model's own folder or hub id, and the pack as its storage (--storage {printable(folder)})."
        )
    _check_sizes(manifest["config"], folder / MANIFEST)
    # As a folder would have it, so that it is read and refused as that of any model.
    with tempfile.TemporaryDirectory(prefix="remoe-plan-") as described:
        (Path(described) / _CONFIG).write_text(json.dumps(manifest["config"]), encoding="utf-8")
        checkpoint = replace(described_checkpoint(described), name=manifest["model"], folder=folder)
    files = sorted(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    return Source(
        manifest["model"], checkpoint, "the pack", False, bool(files), sum(file.stat().st_size for file in files),
        files[-1] if files else None, folder, 0, folder,
    )  # fmt: skip


def _files(folder: Path) -> tuple[list[Path], int | None]:
    """The safetensors files that a folder has or should have, and their bytes as its index says, or None."""
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE], None
    if not (folder / _INDEX).is_file():
        return [], None
    index = read_json(folder / _INDEX, ExpertReadError)
    named = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(named, dict) or not all(isinstance(file, str) for file in named.values()):
        raise ExpertReadError(
            f"{printable(folder / _INDEX)} is not the index of a checkpoint (no weight_map of tensors and files)."
        )
    names = sorted(set(named.values()))
    if odd := [file for file in names if Path(file).name != file or not file.endswith(".safetensors")]:
        raise ExpertReadError(f"{printable(folder / _INDEX)}: {printable(repr(odd[0]))} is no safetensors file.")
    metadata = index.get("metadata")
    total = metadata.get("total_size") if isinstance(metadata, dict) else None
    return [folder / file for file in names], int(total) if isinstance(total, int | float) and total > 0 else None


def _of_gguf(model: str | os.PathLike[str], config: str | None) -> Source:
    checkpoint = described_checkpoint(model, config)
    assert isinstance(checkpoint, GgufModel)
    _check_layers(checkpoint.config.num_hidden_layers, Path(model))
    files = [file.path for file in checkpoint.file.files]
    ends = [max((t.offset + t.size for t in file.tensors), default=0) for file in checkpoint.file.files]
    whole = all(file.stat().st_size >= end for file, end in zip(files, ends, strict=True))
    predicting = checkpoint.file.num_blocks - int(checkpoint.config.num_hidden_layers)
    largest = max(files, key=lambda file: file.stat().st_size)
    return Source(
        os.fspath(model), checkpoint, "GGUF header", True, whole, sum(ends), largest, checkpoint.folder, predicting
    )  # fmt: skip


def _check_sizes(entries: dict[str, Any], where: Path) -> None:
    """Before anything is made of it: a list with an entry for each of a billion layers fills the memory."""
    waiting: list[tuple[str, Any]] = list(entries.items())
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.items()
        elif isinstance(value, list):
            if len(value) > _MOST_ENTRIES:
                raise ConfigError(f"{printable(where)}: {printable(key)} has {len(value)} entries: no model has.")
            waiting += [(key, entry) for entry in value if isinstance(entry, dict | list)]
        elif isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > _LARGEST_NUMBER:
            if not isinstance(value, float):
                raise ConfigError(f"{printable(where)}: {printable(key)} is {value}: no model is so large.")
        elif isinstance(value, int) and ("layers" in key or key in ("n_layer", "depth")):
            _check_layers(value, where)


def _check_layers(count: int, where: Path) -> None:
    if count > _MOST_LAYERS:
        raise ConfigError(f"{printable(where)}: {count} layers: no model has more than {_MOST_LAYERS}.")
