"""Packed experts: a copy of a model's experts with all parameters of one in one aligned piece of a file.

A pack is a folder of safetensors files, whose data starts at a multiple of BLOCK, and `experts.json`, which says how
they are to be understood. For each expert there is one tensor of bytes, `<experts module>.<expert>`, a multiple of
BLOCK long; in it lie the parameters as the model has them, one after another, at multiples of ALIGNMENT. So one read
brings an expert, straight to where it is computed with.

`write_pack` makes packs, with one expert in memory at a time; what a killed run has finished the next one takes over.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from remoe_adapt._support import disk_faults, made_parents, printable, read_json, size_text
from remoe_adapt.checkpoints import Extent, file_inside, tensors_of
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache.checkpoint_store import ALIGNMENT, ExpertStore, FileStore
from remoe_adapt.expert_cache.direct_io import BLOCK, Reader

# The number of the format, which older versions refuse, and the file that says it.
FORMAT, MANIFEST = 1, "experts.json"
# Numbers of each parameter of the first and the last expert of every layer that are compared with the checkpoint.
SAMPLE = 2048


@dataclass(frozen=True, slots=True)
class PackedParam:
    """One parameter of one expert; `offset` in its piece, bytes."""

    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One experts module; `bytes` of each expert's piece."""

    name: str
    experts: int
    bytes: int
    params: Mapping[str, PackedParam]

    @classmethod
    def of(cls, source: ExpertStore, layer: int) -> PackedLayer:
        """The layer as it is packed from this store."""
        params, at = {}, 0
        for name, like in source.like(layer).items():
            params[name] = PackedParam(tuple(like.shape), str(like.dtype).removeprefix("torch."), at)
            at = round_up(at + like.nbytes, ALIGNMENT)
        return cls(source.layers[layer], source.num_experts[layer], round_up(at, BLOCK), params)


class PackedStore(FileStore):
    """Reads experts of a pack; any number of threads at once. Stands where the ExpertStore of the checkpoint would.

    folder: of the pack.
    source: the store of the checkpoint that the pack must be a copy of.
    direct_io, reader: as for ExpertStore.

    Raises ConfigError when the folder is no pack or one of another model, type or fine-tuning, ExpertReadError for
    files that are missing, truncated or cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: ExpertStore,
        *,
        direct_io: bool = False,
        reader: Reader = os.preadv,
    ) -> None:
        self.folder = Path(folder)
        self.layers, self.num_experts, self.params = source.layers, source.num_experts, source.params
        self.expert_bytes, self.layout = source.expert_bytes, source.layout
        self._likes = [source.like(layer) for layer in range(len(self.layers))]
        self._packed = [PackedLayer.of(source, layer) for layer in range(len(self.layers))]
        manifest = read_manifest(self.folder)
        self._check(manifest, source)
        self._extents = self._find(manifest["files"])
        super().__init__({extent.path for extents in self._extents for extent in extents}, direct_io, reader)
        self._compare(manifest, source)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        with torch.inference_mode(False), torch.no_grad():
            extent, params = self._extents[layer][expert], self._packed[layer].params
            block = self._blocks.take(extent.size)
            self._reader.fill([(extent, torch.frombuffer(block, dtype=torch.uint8))])
            return {
                name: torch.frombuffer(
                    block, dtype=like.dtype, count=like.numel(), offset=params[name].offset
                ).view(like.shape)
                for name, like in self._likes[layer].items()
            }  # fmt: skip

    def _check(self, manifest: dict[str, Any], source: ExpertStore) -> None:
        found, wanted = manifest["layers"], [as_json(layer) for layer in self._packed]
        if found == wanted:
            return
        what = f"{self.folder} is a pack of {manifest['model']}"
        remedy = "give the pack of this model, or make it with `remoe pack`."
        if len(found) != len(wanted):
            raise ConfigError(
                f"{what} with {len(found)} layers of experts, {source.folder} has {len(wanted)}: {remedy}"
            )
        theirs, mine = next(pair for pair in zip(found, wanted, strict=True) if pair[0] != pair[1])
        if _without_dtypes(theirs) == _without_dtypes(mine):
            had, asked = (
                ", ".join(sorted({param["dtype"] for param in one["params"].values()})) for one in (theirs, mine)
            )
            raise ConfigError(
                f"{what} in {printable(had)}, the model is to be loaded in {asked}: choose the pack's type with "
                "dtype=, or pack again with --dtype."
            )
        raise ConfigError(
            f"{what} ({printable(theirs['name'])}: {theirs['experts']} experts, {printable(_shapes(theirs))}), not of "
            f"{source.folder} ({mine['name']}: {mine['experts']} experts, {_shapes(mine)}): {remedy}"
        )

    def _find(self, files: Sequence[str]) -> list[list[Extent]]:
        extents = tensors_of(file_inside(self.folder, file) for file in files)
        found = []
        for layer in self._packed:
            names = [f"{layer.name}.{expert}" for expert in range(layer.experts)]
            for name in names:
                if name not in extents or extents[name].size != layer.bytes:
                    raise ExpertReadError(f"{self.folder}: {name} is missing or not {layer.bytes} bytes: pack again.")
            found.append([extents[name] for name in names])
        return found

    def _compare(self, manifest: dict[str, Any], source: ExpertStore) -> None:
        # A fine-tuned sibling has the same names and shapes; only the numbers tell it apart. Training changes all
        # layers, so the first and the last expert of each are enough.
        for layer, (packed, extents) in enumerate(zip(self._packed, self._extents, strict=True)):
            for expert in sorted({0, packed.experts - 1}):
                for name, wanted in source.sample(layer, expert, SAMPLE).items():
                    found, param, extent = torch.empty_like(wanted), packed.params[name], extents[expert]
                    cut = replace(
                        extent,
                        shape=tuple(found.shape),
                        dtype=found.dtype,
                        offset=extent.offset + param.offset,
                        size=found.nbytes,
                    )
                    self._reader.fill([(cut, found)])
                    # As bytes: NaN is not equal to itself.
                    if not torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)):
                        raise ConfigError(
                            f"{self.folder} (a pack of {manifest['model']}) has other numbers than {source.folder} in "
                            f"{name} of expert {expert} of {packed.name}: it is of another training of this model. "
                            "Give this one's pack, or make it with `remoe pack`."
                        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `experts.json` says; raises ConfigError when it is not there or not understood."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ConfigError(
            f"{printable(folder)} is no folder of packed experts (no {MANIFEST}): make it with `remoe pack`."
        )
    try:
        manifest: dict[str, Any] = read_json(file)
        number, files = manifest["format"], manifest["files"]
        whole = isinstance(manifest["model"], str) and isinstance(files, list) and len(set(files)) == len(files)
        whole = whole and all(isinstance(name, str) and Path(name).name == name for name in files)
        manifest["model"] = printable(manifest["model"])
        for layer in manifest["layers"]:
            whole = whole and isinstance(layer["name"], str) and isinstance(layer["experts"], int)
            for param in layer["params"].values():
                whole = whole and isinstance(param["shape"], list) and isinstance(param["dtype"], str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{printable(file)} is not whole ({printable(error)}): pack again.") from error
    if type(number) is not int or number != FORMAT:
        raise ConfigError(
            f"{printable(file)} is of format {printable(repr(number))}, this version reads {FORMAT}: pack again."
        )
    if not whole:
        raise ConfigError(f"{printable(file)} is not whole: pack again.")
    return manifest


def as_json(layer: PackedLayer) -> dict[str, Any]:
    """The entry of a layer in `experts.json`."""
    entry: dict[str, Any] = json.loads(json.dumps(asdict(layer)))
    return entry


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def _without_dtypes(entry: dict[str, Any]) -> list[Any]:
    params = {name: param["shape"] for name, param in entry["params"].items()}
    return [entry["name"], entry["experts"], params]


def _shapes(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {param['shape']}" for name, param in entry["params"].items())


# What a killed run has to write again is less than one file.
SHARD_BYTES = 4 << 30
# A pack waits for the disk after so many bytes: dirty pages of a whole pack would push everything else out of memory.
_FLUSH_BYTES = 128 << 20
# What a draft is a draft of; a pack that is finished has none.
_PLAN = "plan.json"
# The (layer, expert) pairs of one file, in its order.
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

    source: the store of the checkpoint.
    out: the folder of the pack.
    model_id: says in the pack what it is a copy of.
    overwrite: replace a pack that is there.
    shard_bytes: a file has at most about so many bytes.
    on_start: called with the bytes in all.
    on_bytes: called with the bytes that were written since the last call.

    Returns (JSON-ready) `out`, `model`, `dtypes`, `layers`, `experts`, `bytes` and `files`.

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
        # Once more: another process may have published its pack before this one got the lock.
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
        # Opened as every user will open it, before it replaces anything.
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
    # The system lets go of a lock when its process dies, however it dies; a lock file would stay.
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
        same = read_json(draft / _PLAN) == plan
    except ConfigError:
        same = False
    if not same:
        for path in draft.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        _write_json(draft / _PLAN, plan)


def _check_room(draft: Path, needed: int) -> None:
    # Halves of a killed run are written over, so their room counts as free.
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
        # The file gets all its room at once: a full disk is noticed before the work, and the file lies in few pieces.
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
        # A file system that cannot reserve room is found full later.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _flush(file: BinaryIO) -> None:
    """Bring the file to the disk, and out of the page cache, which others need more."""
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
    # The files are on the disk before their folder has its name, and the old pack is there until the new one is: a
    # power cut leaves one of the two.
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
