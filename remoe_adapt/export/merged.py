"""A checkpoint of the base with the routers of one strength: what any engine loads that loads the base."""

from __future__ import annotations

import json
import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.cache.shards import INDEX, SAFETENSORS_DTYPES, Extent
from remoe_adapt.errors import ConfigError
from remoe_adapt.export.base import BaseFiles, tensor_bytes
from remoe_adapt.export.files import (
    OnBytes,
    clone_or_copy,
    copy_range,
    ignore_bytes,
    link_or_copy,
    new_folder,
    read_at,
    write_at,
)
from remoe_adapt.family import Family

PROVENANCE = "remoe_export.json"
# Weights in other formats hold the base's routers and would be found by engines that prefer them.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".ot"}
_OTHER_INDEXES = (".bin.index.json",)
_TEMPLATE_FOLDER = "additional_chat_templates"


def export_merged(
    base: str | os.PathLike[str],
    family: Family,
    strength: float,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    on_bytes: OnBytes = ignore_bytes,
    on_total: OnBytes = ignore_bytes,
) -> dict[str, Any]:
    """Write the folder `out`: `base` (a folder or hub id) with the router weights that `Family.live` gives.

    Only files that hold routers are rewritten; other files of weights are hard links to the base's, or clones or copies
    where linking fails. Routers keep their stored dtype, unless the model computes in a wider one: loading gives the
    weights of the live model bit for bit. Memory: the routers.

    `on_bytes` hears of bytes done, `on_total` once how many there are. Returns what was done to each file of weights.

    Raises ConfigError when `out` holds something, FamilyError for the strength, else as `BaseFiles`.
    """
    files, target = BaseFiles(base), Path(out)
    files.check(family, force=force)
    wide = {
        router.name: torch.promote_types(router.weight.dtype, files.loaded_dtype(router)) for router in files.routers
    }
    live = family.live(strength, {name: weight_ED.to(wide[name]) for name, weight_ED in files.weights.items()})
    changed: defaultdict[Path, dict[str, Tensor]] = defaultdict(dict)
    for router in files.routers:
        changed[router.weight.path][router.weight.tensor] = live[router.name]
    shards = sorted({extent.path for extent in files.extents.values()})
    if target.resolve() == files.folder.resolve():
        raise ConfigError(f"{target} is the base itself: give a new folder.")
    on_total(sum(shard.stat().st_size for shard in shards))
    how: dict[str, list[str]] = {"rewritten": [], "linked": [], "cloned": [], "copied": []}
    with new_folder(target) as draft:
        for shard in shards:
            if shard in changed:
                _rewrite(shard.resolve(strict=True), draft / shard.name, files.extents, changed[shard], on_bytes)
                how["rewritten"].append(shard.name)
            else:
                how[link_or_copy(shard, draft / shard.name, on_bytes)].append(shard.name)
        _copy_small_files(files.folder, draft)
        grown = sum(live[r.name].numel() * live[r.name].element_size() - r.weight.size for r in files.routers)
        _count_in_index(draft / INDEX, grown)
        facts = {"base": family.base_id, "fingerprint": family.fingerprint, "strength": strength}
        (draft / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return {"out": str(target), **facts, "routers": len(files.routers), **how, **left_out(family, strength)}


def left_out(family: Family, strength: float) -> dict[str, Any]:
    """What an engine without this package cannot have of this point, for results: the recency prior's largest gain."""
    recency = family.recency(strength)
    gain = max(recency.gain_per_layer, default=0.0) if recency and recency.mode != "none" else 0.0
    return {"without_recency_prior_of_gain": gain} if gain else {}


def _rewrite(
    shard: Path, target: Path, extents: dict[str, Extent], changed: dict[str, Tensor], on_bytes: OnBytes
) -> None:
    """A copy of a safetensors file with some tensors replaced; in another dtype, those behind them move."""
    if all(extents[name].dtype == tensor.dtype for name, tensor in changed.items()):
        clone_or_copy(shard, target, on_bytes)
        write_at(target, [(extents[name].offset, tensor_bytes(tensor)) for name, tensor in changed.items()])
        return
    data = 8 + int.from_bytes(read_at(shard, 0, 8), "little")
    header: dict[str, Any] = json.loads(read_at(shard, 8, data - 8))
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    tensors = sorted((entry for entry in header.items() if entry[0] != "__metadata__"), key=_first_byte)
    sources, end = {name: entry["data_offsets"] for name, entry in tensors}, 0
    for name, entry in tensors:
        if name in changed:
            entry["dtype"] = names[changed[name].dtype]
            size = changed[name].numel() * changed[name].element_size()
        else:
            size = sources[name][1] - sources[name][0]
        entry["data_offsets"], end = [end, end + size], end + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with shard.open("rb") as old, target.open("xb", buffering=0) as new:
        new.write(len(text).to_bytes(8, "little") + text)
        for name, _ in tensors:
            first, last = sources[name]
            if name in changed:
                new.write(tensor_bytes(changed[name]))
                on_bytes(last - first)
            else:
                copy_range(old.fileno(), data + first, last - first, new.fileno(), on_bytes)


def _first_byte(entry: tuple[str, dict[str, Any]]) -> int:
    return int(entry[1]["data_offsets"][0])


def _count_in_index(index: Path, grown: int) -> None:
    if grown and index.is_file():
        entries = json.loads(index.read_text(encoding="utf-8"))
        if "total_size" in entries.get("metadata", {}):
            entries["metadata"]["total_size"] += grown
            index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _copy_small_files(folder: Path, draft: Path) -> None:
    """Configuration, tokenizer, index, code; not weights in other formats."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.suffix not in _OTHER_WEIGHTS and not path.name.endswith(_OTHER_INDEXES):
            shutil.copyfile(path, draft / path.name)
        elif path.is_dir() and path.name == _TEMPLATE_FOLDER:
            shutil.copytree(path, draft / path.name)
