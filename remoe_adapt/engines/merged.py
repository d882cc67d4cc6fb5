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

from remoe_adapt._support import parse_json, read_json
from remoe_adapt.checkpoints import SAFETENSORS_DTYPES, Extent, chosen_file, file_inside
from remoe_adapt.engines.base import BaseFiles, tensor_bytes
from remoe_adapt.engines.files import (
    OnBytes,
    append,
    clone_or_copy,
    copy_range,
    ignore_bytes,
    link_or_copy,
    new_folder,
    read_at,
    write_at,
)
from remoe_adapt.errors import ConfigError, ExportError
from remoe_adapt.family import Family

PROVENANCE = "remoe_export.json"
# Files with these endings are left out of the copy: they hold the base's routers in other formats, and an engine that
# prefers such a format would load the base.
_OTHER_WEIGHTS = {".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".safetensors", ".ot"}
_INDEX_ENDS = (".bin.index.json", ".safetensors.index.json")
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

    Raises ConfigError when `out` holds something, FamilyError for the strength, WriteError for a disk that is full or
    read-only and the like, else as `BaseFiles`.
    """
    files, target = BaseFiles(base), Path(out)
    files.check(family, force=force)
    # A model that computes its routers in fp32 would round the live weight once more if it were stored in bf16.
    wide = {
        router.name: torch.promote_types(router.weight.dtype, files.loaded_dtype(router)) for router in files.routers
    }
    live = family.live(strength, {name: weight_ED.to(wide[name]) for name, weight_ED in files.weights.items()})
    changed: defaultdict[Path, dict[str, Tensor]] = defaultdict(dict)
    for router in files.routers:
        changed[router.weight.path][router.weight.tensor] = live[router.name]
    # Every file of weights, for a base of several shards has files without a router too.
    shards = sorted({extent.path for extent in files.extents.values()})
    # The folder would replace itself, and its linked shards would be gone.
    if target.resolve() == files.folder.resolve():
        raise ConfigError(f"{target} is the base itself: give a new folder.")
    on_total(sum(shard.stat().st_size for shard in shards))
    how: dict[str, list[str]] = {"rewritten": [], "linked": [], "cloned": [], "copied": []}
    index = chosen_file(files.folder)
    with new_folder(target) as draft:
        for shard in shards:
            name = str(shard.relative_to(files.folder))
            (draft / name).parent.mkdir(parents=True, exist_ok=True)
            # Resolved, for under these names the hub's cache has symbolic links alone.
            if shard in changed:
                _rewrite(shard.resolve(strict=True), draft / name, files.extents, changed[shard], on_bytes)
                how["rewritten"].append(name)
            else:
                how[link_or_copy(shard, draft / name, on_bytes)].append(name)
        _copy_small_files(files.folder, draft, index)
        grown = sum(live[r.name].numel() * live[r.name].element_size() - r.weight.size for r in files.routers)
        _count_in_index(draft / index.relative_to(files.folder), grown)
        facts = {"base": family.base_id, "fingerprint": family.fingerprint, "strength": strength}
        (draft / PROVENANCE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    return {"out": str(target), **facts, "routers": len(files.routers), **how, **left_out(family, strength)}


def left_out(family: Family, strength: float) -> dict[str, Any]:
    """What an engine without this package cannot have of this point, for results: the recency prior's largest gain."""
    recency = family.recency(strength)
    gain = max(recency.gains(), default=0.0) if recency else 0.0
    return {"without_recency_prior_of_gain": gain} if gain else {}


def _rewrite(
    shard: Path, target: Path, extents: dict[str, Extent], changed: dict[str, Tensor], on_bytes: OnBytes
) -> None:
    """A copy of a safetensors file with some tensors replaced; in another dtype, those behind them move."""
    # With unchanged sizes every byte keeps its place, so the file can share blocks with the base's.
    if all(extents[name].dtype == tensor.dtype for name, tensor in changed.items()):
        clone_or_copy(shard, target, on_bytes)
        write_at(target, [(extents[name].offset, tensor_bytes(tensor)) for name, tensor in changed.items()])
        return
    # A safetensors file is: length of the header (8 bytes), header as JSON, data; offsets count from the data.
    data = 8 + int.from_bytes(read_at(shard, 0, 8), "little")
    header: dict[str, Any] = parse_json(bytes(read_at(shard, 8, data - 8)), f"the header of {shard}", ExportError)
    # Routers that grow from bf16 to fp32 move every tensor behind them, so the header is written anew.
    names = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}
    header_tensors = ((name, entry) for name, entry in header.items() if name != "__metadata__")
    tensors = sorted(header_tensors, key=lambda tensor: int(tensor[1]["data_offsets"][0]))
    sources, end = {name: entry["data_offsets"] for name, entry in tensors}, 0
    for name, entry in tensors:
        if name in changed:
            entry["dtype"] = names[changed[name].dtype]
            size = changed[name].numel() * changed[name].element_size()
        else:
            size = sources[name][1] - sources[name][0]
        entry["data_offsets"], end = [end, end + size], end + size
    text = json.dumps(header, separators=(",", ":")).encode()
    # The header is padded so that the data stay aligned, as the format asks.
    text += b" " * (-len(text) % 8)
    with shard.open("rb") as old, target.open("xb", buffering=0) as new:
        append(new, len(text).to_bytes(8, "little") + text)
        for name, _ in tensors:
            first, last = sources[name]
            if name in changed:
                append(new, tensor_bytes(changed[name]))
                on_bytes(last - first)
            else:
                copy_range(old.fileno(), data + first, last - first, new.fileno(), on_bytes)


def _count_in_index(index: Path, grown: int) -> None:
    # `total_size` counts the bytes of all tensors, and misleads whoever plans memory by it when it is wrong.
    if grown and index.name.endswith(".json"):
        entries = read_json(index, ExportError)
        facts = entries.get("metadata")
        if isinstance(facts, dict) and isinstance(facts.get("total_size"), int):
            facts["total_size"] += grown
            index.write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")


def _copy_small_files(folder: Path, draft: Path, index: Path) -> None:
    """Configuration, tokenizer, the index that counts, code; not weights in other formats."""
    found = [*sorted(folder.iterdir()), *sorted((folder / _TEMPLATE_FOLDER).rglob("*"))]
    for path in found:
        other = path.suffix in _OTHER_WEIGHTS or (path.name.endswith(_INDEX_ENDS) and path != index)
        if path.is_file() and not other:
            name = path.relative_to(folder)
            (draft / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(file_inside(folder, str(name)), draft / name)
