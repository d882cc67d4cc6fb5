"""A GGUF taken apart: its metadata and routers in a small first part, everything else in parts that strengths share."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from remoe_adapt.errors import ConfigError
from remoe_adapt.export.files import OnBytes, copy_range, ignore_bytes, new_file
from remoe_adapt.export.gguf import Base, target_stem
from remoe_adapt.export.gguf_file import (
    ALIGNMENT_KEY,
    INT32,
    UINT16,
    GgufFile,
    GgufTensor,
    entry_bytes,
    header_bytes,
    shard_name,
)
from remoe_adapt.export.gguf_routers import GgufModel
from remoe_adapt.export.merged import left_out
from remoe_adapt.family import Family

# What llama.cpp reads of every part; counts of parts and tensors are written anew.
_EVERYWHERE = ("general.architecture", ALIGNMENT_KEY)
_SPLIT = ("split.no", "split.count", "split.tensors.count")


def split_gguf(
    source: str | os.PathLike[str],
    family: Family,
    strength: float,
    out: str | os.PathLike[str],
    *,
    base: Base = None,
    force: bool = False,
    on_bytes: OnBytes = ignore_bytes,
    on_total: OnBytes = ignore_bytes,
) -> dict[str, Any]:
    """Write `out` as a split GGUF with the routers at `strength` in its first part; engines are given that part.

    This copies the model once. Other strengths are then exported from the split model (`export_gguf`), which writes
    the first part alone and links the rest.

    Raises ConfigError when a file to write exists or the source's routers are alone already, else as `GgufModel` and
    `GgufModel.check`.
    """
    model, target = GgufModel(source), Path(out)
    routers = model.router_tensors()
    apart = {tensor.path for tensor in routers}
    names = {tensor.name for tensor in routers}
    if len(model.files) > 1 and all(
        t.name in names for file in model.files if file.path in apart for t in file.tensors
    ):
        raise ConfigError(f"{model.path} has its routers in a part of their own already: export it without --split.")
    live = model.live(family, strength, model.check(family, base, force=force))
    replaced = {name: data for pieces in live.values() for name, data in pieces.items()}
    count, total = len(model.files) + 1, sum(len(file.tensors) for file in model.files)
    paths = [target.with_name(shard_name(target_stem(target), number, count)) for number in range(1, count + 1)]
    if there := [path for path in paths if path.exists()]:
        raise ConfigError(f"{there[0]} exists already: give another name, or remove it.")
    on_total(sum(file.size for file in model.files))
    first = model.files[0]
    for number, file in reversed(list(enumerate(model.files, start=1))):
        entries = [first.entries[key] for key in _EVERYWHERE if key in first.entries]
        rest = [tensor for tensor in file.tensors if tensor.name not in names]
        _write(paths[number], file, [*entries, *_place(number, count, total)], rest, {}, on_bytes)
    entries = [entry for key, entry in first.entries.items() if key not in _SPLIT]
    _write(paths[0], first, [*entries, *_place(0, count, total)], routers, replaced, on_bytes)
    sizes = [path.stat().st_size for path in paths]
    return {
        "out": str(paths[0]),
        "base": family.base_id,
        "strength": strength,
        "architecture": model.architecture,
        "routers": len(model.weights),
        "first_part_bytes": sizes[0],
        "bytes": sum(sizes),
        "files": [path.name for path in paths],
        **left_out(family, strength),
    }


def _place(number: int, count: int, total: int) -> list[bytes]:
    values = ((UINT16, number), (UINT16, count), (INT32, total))
    return [entry_bytes(key, kind, value) for key, (kind, value) in zip(_SPLIT, values, strict=True)]


def _write(
    target: Path,
    like: GgufFile,
    entries: list[bytes],
    tensors: Iterable[GgufTensor],
    replaced: dict[str, bytes],
    on_bytes: OnBytes,
) -> None:
    """A GGUF of these tensors, in this order; those in `replaced` with other bytes of the same length."""
    placed, end = [], 0
    for tensor in tensors:
        placed.append((tensor, end))
        end += tensor.span + -tensor.span % like.alignment
    header = header_bytes(entries, [(t.name, t.shape, t.type, offset) for t, offset in placed], like.alignment)
    with new_file(target) as draft, draft.open("xb", buffering=0) as new:
        new.write(header)
        sources: dict[Path, BinaryIO] = {}
        try:
            for tensor, _ in placed:
                if tensor.path not in sources:
                    sources[tensor.path] = tensor.path.open("rb")
                source = sources[tensor.path].fileno()
                data = replaced.get(tensor.name, b"")
                new.write(data)
                copy_range(source, tensor.offset + len(data), tensor.span - len(data), new.fileno(), on_bytes)
                new.write(b"\0" * (-tensor.span % like.alignment))
        finally:
            for file in sources.values():
                file.close()
