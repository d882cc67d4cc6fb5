"""A GGUF taken apart: its metadata and routers in a small first part, everything else in parts that strengths share."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from remoe_adapt._support import disk_faults, printable
from remoe_adapt.checkpoints import (
    ALIGNMENT_KEY,
    ARCHITECTURE_KEY,
    DIGEST_KEYS,
    INT32,
    MODEL_KEY,
    ROUTERS_KEY,
    SPLIT_KEYS,
    UINT16,
    GgufFile,
    GgufTensor,
    entry_bytes,
    header_bytes,
    text_entry,
)
from remoe_adapt.engines import OnBytes, append, copy_range, ignore_bytes, new_files, read_at
from remoe_adapt.engines.gguf.patch import NOTHING_LEFT, Base, export_facts, part_paths
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.undo import digest
from remoe_adapt.errors import ConfigError, ExportError
from remoe_adapt.family import Family

_SAMPLE_BYTES = 4096


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

    Every part names the model and its original routers by digests, so that parts of different models are not mixed.
    After an error nothing is left of what was written.

    Raises ConfigError when a file to write exists or the source's routers are alone already, ExportError when one
    cannot be written, else as `GgufModel`, `GgufModel.check` and `GgufModel.live`.
    """
    model = GgufModel(source)
    routers = model.router_tensors()
    apart = {tensor.path for tensor in routers}
    names = {tensor.name for tensor in routers}
    if len(model.files) > 1 and all(
        t.name in names for file in model.files if file.path in apart for t in file.tensors
    ):
        raise ConfigError(
            f"{printable(model.path)} has its routers in a part of their own already: export it without --split."
        )
    live = model.live(family, strength, model.check(family, base, force=force))
    replaced = {name: data for pieces in live.values() for name, data in pieces.items()}
    # One part more: the routers' own, which comes first.
    count, total = len(model.files) + 1, sum(len(file.tensors) for file in model.files)
    paths = part_paths(Path(out), count)
    on_total(sum(file.size for file in model.files))
    first = model.files[0]
    with disk_faults(paths[0], ExportError, NOTHING_LEFT), new_files(paths) as drafts:
        digests = _names_of(model)
        # Backwards, so that the first part, which engines are given, is the last to be written.
        for number, file in reversed(list(enumerate(model.files, start=1))):
            # llama.cpp reads architecture and alignment from every part, and everything else from the first alone.
            entries = [file.entries[ALIGNMENT_KEY]] if ALIGNMENT_KEY in file.entries else []
            if ARCHITECTURE_KEY in first.entries:
                entries.insert(0, first.entries[ARCHITECTURE_KEY])
            rest = [tensor for tensor in file.tensors if tensor.name not in names]
            _write(drafts[number], file, [*entries, *_place(number, count, total), *digests], rest, {}, on_bytes)
        # The first part keeps the source's metadata but for what says how it is split, which would contradict the new
        # parts.
        anew = {*SPLIT_KEYS, *DIGEST_KEYS}
        entries = [entry for key, entry in first.entries.items() if key not in anew]
        _write(drafts[0], first, [*entries, *_place(0, count, total), *digests], routers, replaced, on_bytes)
    sizes = [path.stat().st_size for path in paths]
    parts = {"first_part_bytes": sizes[0], "bytes": sum(sizes), "files": [path.name for path in paths]}
    return export_facts(model, family, strength, paths[0]) | parts


def _place(number: int, count: int, total: int) -> list[bytes]:
    # The types that llama.cpp's own splitter writes; it refuses others.
    values = ((UINT16, number), (UINT16, count), (INT32, total))
    return [entry_bytes(key, kind, value) for key, (kind, value) in zip(SPLIT_KEYS, values, strict=True)]


def _names_of(model: GgufModel) -> list[bytes]:
    """Entries that say which model was split, by its metadata, shapes, original routers and the beginning of every
    other tensor, and which its original routers are."""
    originals = {name: data for file in model.files for name, data in model.originals(file.path).items()}
    whole = hashlib.sha256(digest(originals).encode())
    for file in model.files:
        whole.update(file.header_digest.encode())
        for tensor in file.tensors:
            if tensor.name not in originals:
                # The beginning of each tensor is enough to tell fine-tunings apart, and a model of 100 GB is not read
                # twice.
                whole.update(read_at(tensor.path, tensor.offset, min(tensor.size, _SAMPLE_BYTES)))
    return [text_entry(MODEL_KEY, whole.hexdigest()), text_entry(ROUTERS_KEY, digest(originals))]


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
        # Offsets count from the data, which begins where the header is known to end; so they come before the header.
        placed.append((tensor, end))
        end += tensor.span + -tensor.span % like.alignment
    header = header_bytes(entries, [(t.name, t.shape, t.type, offset) for t, offset in placed], like.alignment)
    with target.open("xb", buffering=0) as new:
        append(new, header)
        with ExitStack() as opened:
            sources: dict[Path, BinaryIO] = {}
            for tensor, _ in placed:
                if tensor.path not in sources:
                    sources[tensor.path] = opened.enter_context(tensor.path.open("rb"))
                data = replaced.get(tensor.name, b"")
                append(new, data)
                # What is left of the span is padding where the tensor was replaced, else the whole tensor.
                rest = tensor.span - len(data)
                copy_range(sources[tensor.path].fileno(), tensor.offset + len(data), rest, new.fileno(), on_bytes)
                append(new, b"\0" * (-tensor.span % like.alignment))
