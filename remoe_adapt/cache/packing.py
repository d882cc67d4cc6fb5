"""Writes packs: streaming, one expert in memory at a time; what a killed run has finished the next one takes over."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from remoe_adapt.cache.packed import FORMAT, MANIFEST, PackedLayer, PackedStore, as_json, round_up
from remoe_adapt.cache.reading import BLOCK
from remoe_adapt.cache.store import ExpertStore
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.notices import size_text
from remoe_adapt.untrusted import read_json
from remoe_adapt.writing import disk_faults, made_parents

SHARD_BYTES = 4 << 30
# So much may wait to be written out before we wait for it.
_FLUSH_BYTES = 128 << 20
_PLAN = "plan.json"
# (layer, expert) pairs, in the order of the file.
_Shard = list[tuple[int, int]]


def write_pack(
    source: ExpertStore,
    out: str | os.PathLike[str],
    *,
    model_id: str,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_start: Callable[[int], None] = lambda total_bytes: None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Pack all experts of `source` into the folder `out`; nothing is there until all is.

    model_id: says in the pack what it is a copy of. overwrite: replace a pack that is there. on_start, on_bytes: told
    the bytes in all, then those done since. Returns (JSON-ready) `out`, `model`, `dtypes`, `layers`, `experts`,
    `bytes` and `files`.

    What is finished lies in the folder `.<name of out>.partial` meanwhile. It stays when the process dies, and the next
    call goes on with it unless model or layout have changed.

    Raises ConfigError when `out` cannot be had (there is something already, another process packs into it, the disk
    is too full: what was written is removed then), WriteError for other faults of the disk, and ExpertReadError when
    the checkpoint cannot be read.
    """
    out = Path(out).resolve()
    with disk_faults(out, what="written"):
        _refuse(out, overwrite)
    layers = [PackedLayer.of(source, layer) for layer in range(len(source.layers))]
    shards = list(_shards(layers, shard_bytes))
    names = [f"experts-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    manifest = {"format": FORMAT, "model": model_id, "files": names, "layers": [as_json(layer) for layer in layers]}
    headers = [_header(layers, shard, model_id) for shard in shards]
    sizes = [
        len(head) + sum(layers[layer].bytes for layer, _ in shard) for head, shard in zip(headers, shards, strict=True)
    ]
    on_start(sum(sizes))
    draft = out.with_name(f".{out.name}.partial")
    with disk_faults(out, what="written"), made_parents(out), _alone(draft, out):
        _refuse(out, overwrite)
        try:
            _continue(draft, manifest | {"source": source.state()})
            done = [
                (draft / name).exists() and (draft / name).stat().st_size == size
                for name, size in zip(names, sizes, strict=True)
            ]
            _check_room(draft, sum(size for size, there in zip(sizes, done, strict=True) if not there))
            for number, shard in enumerate(shards):
                if done[number]:
                    on_bytes(sizes[number])
                else:
                    _write_shard(draft / names[number], headers[number], shard, source, layers, on_bytes)
            _write_json(draft / MANIFEST, manifest)
        except ExpertReadError:
            raise
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"the disk of {out.parent} became full; what was packed has been removed. The pack takes "
                f"{size_text(sum(sizes))}: make room, or give another folder."
            ) from error
        PackedStore(draft, source).close()
        (draft / _PLAN).unlink(missing_ok=True)
        _publish(draft, out)
    dtypes = sorted({param.dtype for layer in layers for param in layer.params.values()})
    return {
        "out": str(out),
        "model": model_id,
        "dtypes": dtypes,
        "layers": len(layers),
        "experts": sum(layer.experts for layer in layers),
        "bytes": sum(sizes),
        "files": len(names),
    }


def _refuse(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} is there and no pack: give another folder.")
    if not overwrite:
        raise ConfigError(f"{out} is there: give another folder, or --overwrite to replace it.")


def _shards(layers: list[PackedLayer], shard_bytes: int) -> Iterator[_Shard]:
    shard: _Shard = []
    used = 0
    for number, layer in enumerate(layers):
        for expert in range(layer.experts):
            if shard and used + layer.bytes > shard_bytes:
                yield shard
                shard, used = [], 0
            shard.append((number, expert))
            used += layer.bytes
    yield shard


def _header(layers: list[PackedLayer], shard: _Shard, model_id: str) -> bytes:
    """The start of a safetensors file, as long as whole blocks."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "remoe_pack": str(FORMAT), "model": model_id}}
    at = 0
    for layer, expert in shard:
        size = layers[layer].bytes
        entries[f"{layers[layer].name}.{expert}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    length = round_up(8 + len(text), BLOCK) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


@contextmanager
def _alone(draft: Path, out: Path) -> Iterator[None]:
    draft.mkdir(exist_ok=True)
    lock = os.open(draft, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise ConfigError(f"another process packs into {out} now: wait for it, or give another folder.") from error
    finally:
        os.close(lock)


def _continue(draft: Path, plan: dict[str, Any]) -> None:
    """Keep what there is if it follows this plan, else begin anew."""
    try:
        same = read_json(draft / _PLAN) == json.loads(json.dumps(plan))
    except ConfigError:
        same = False
    if not same:
        for path in draft.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _write_json(draft / _PLAN, plan)


def _check_room(draft: Path, needed: int) -> None:
    free = shutil.disk_usage(draft).free + sum(path.stat().st_size for path in draft.glob("*.tmp"))
    if needed > free:
        shutil.rmtree(draft)
        raise ConfigError(
            f"the pack needs {size_text(needed)} more on the disk of {draft.parent}, which has {size_text(free)} free: "
            "make room, or give another folder."
        )


def _write_shard(
    path: Path,
    header: bytes,
    shard: _Shard,
    source: ExpertStore,
    layers: list[PackedLayer],
    on_bytes: Callable[[int], None],
) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("wb") as file:
        # All room at once: a full disk is noticed now, and the file lies in few pieces.
        _reserve(file, len(header) + sum(layers[layer].bytes for layer, _ in shard))
        file.write(header)
        on_bytes(len(header))
        waiting = 0
        for layer, expert in shard:
            piece = np.zeros(layers[layer].bytes, dtype=np.uint8)
            for name, value in source.read(layer, expert).items():
                start = layers[layer].params[name].offset
                piece[start : start + value.nbytes] = value.view(-1).view(torch.uint8).numpy()
            file.write(piece.data)
            on_bytes(len(piece))
            waiting += len(piece)
            if waiting >= _FLUSH_BYTES:
                _flush(file)
                waiting = 0
        _flush(file)
    draft.replace(path)


def _reserve(file: BinaryIO, size: int) -> None:
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _flush(file: BinaryIO) -> None:
    """To the disk, and out of the page cache, which others need more."""
    file.flush()
    os.fsync(file.fileno())
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    draft = path.with_name(f"{path.name}.tmp")
    with draft.open("wb") as file:
        file.write(json.dumps(content, indent=1).encode())
        _flush(file)
    draft.replace(path)


def _publish(draft: Path, out: Path) -> None:
    _sync(draft)
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        shutil.rmtree(old)
    if (out / MANIFEST).is_file():
        out.rename(old)
    draft.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
