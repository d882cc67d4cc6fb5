"""Packs written: one file after another, with a few experts in memory at a time.

Nothing is there until all is. What is finished lies in the folder `.<name of out>.partial` meanwhile; it stays when the
process dies, and the next run goes on with it unless model, layout or files of the checkpoint have changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
import torch
from torch import Tensor

from remoe_adapt import __version__
from remoe_adapt._support import disk_faults, made_parents, read_json, size_text, usable_cores
from remoe_adapt.checkpoints import SAFETENSORS_DTYPES
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache.direct_io import BLOCK
from remoe_adapt.expert_cache.pack import DENSE, FORMAT, MANIFEST, PackedLayer, PackedParam, round_up

# What a killed run has to write again is less than one file.
SHARD_BYTES = 4 << 30
# A pack waits for the disk after so many bytes: dirty pages of a whole pack would push everything else out of memory.
_FLUSH_BYTES = 128 << 20
# What a draft is a draft of; a pack that is finished has none.
_PLAN = "plan.json"
# Beside a finished file of a draft: what its encoding cost.
_LOSSES = ".losses.json"
# Experts that are read and encoded at a time, on machines with more cores: each is in memory as floats.
_MOST_WORKERS = 16
# Of a weight: the sum of its errors squared, and of its numbers squared.
Losses = Mapping[str, tuple[float, float]]
# The header of a safetensors file says so.
_DTYPE_NAMES = {dtype: name for name, dtype in SAFETENSORS_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Piece:
    """What is written of one expert, or of one tensor of the dense part.

    parts: by name, in the shapes and types that were announced.
    losses: of each parameter that is not kept exactly.
    """

    parts: Mapping[str, Tensor]
    losses: Losses


class ExpertSource(Protocol):
    """Experts to pack. `layers` are the names of the experts modules, `num_experts` goes with them."""

    @property
    def layers(self) -> Sequence[str]: ...

    @property
    def num_experts(self) -> Sequence[int]: ...

    def parts(self, layer: int) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each part of an expert of this layer, in the order in which they lie in its piece."""
        ...

    def params(self, layer: int) -> Mapping[str, PackedParam]:
        """How each parameter is made of them."""
        ...

    def fingerprint(self, layer: int) -> str | None:
        """What ties an encoded layer to its checkpoint; None where the numbers themselves are in the pack."""
        ...

    def read(self, layer: int, expert: int) -> Piece:
        """One expert; raises ExpertReadError."""
        ...

    def state(self) -> Any:
        """Whatever changes (JSON-ready) when the files of the checkpoint do: a draft of others is begun anew."""
        ...

    def check(self, folder: Path) -> None:
        """Open the pack in this folder as its users will, and close it; raises what they would see."""
        ...


class DenseSource(Protocol):
    """The dense part to pack."""

    def entries(self) -> Mapping[str, dict[str, Any]]:
        """What the manifest says of each weight that is in blocks, by the parameter's name in the model."""
        ...

    def tensors(self) -> Mapping[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type of each tensor that is written, blocks as uint8."""
        ...

    def fingerprint(self) -> str:
        """What ties it to its checkpoint."""
        ...

    def read(self, name: str) -> Piece:
        """One tensor, as the only part of its piece."""
        ...


@dataclass(frozen=True, slots=True)
class _File:
    """One file to write: its name, its header, all its bytes, and how its data comes."""

    name: str
    header: bytes
    size: int
    data: Callable[[], Generator[tuple[np.ndarray, Losses]]]


def write_pack(
    source: ExpertSource,
    out: str | os.PathLike[str],
    *,
    model_id: str,
    config: Mapping[str, Any] | None = None,
    dense: DenseSource | None = None,
    overwrite: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_start: Callable[[int], None] = lambda total_bytes: None,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Pack all experts of `source` into the folder `out`; nothing is there until all is.

    source: the experts, and how they are encoded.
    out: the folder of the pack.
    model_id: says in the pack what it is a copy of.
    config: of the model, for whoever plans with the pack alone.
    dense: the dense part, if that is to be in the pack too.
    overwrite: replace a pack that is there.
    shard_bytes: a file of experts has at most about so many bytes.
    on_start: called with the bytes in all.
    on_bytes: called with the bytes that were written since the last call.

    Returns (JSON-ready) `out`, `model`, `dtypes`, `layers`, `experts`, `bytes`, `files`, `weight_error`: by layer the
    relative errors (Frobenius norms) of the parameters that are not kept exactly, and `dense_weight_error` by name.

    What is finished lies in the folder `.<name of out>.partial` meanwhile. It stays when the process dies, and the next
    call goes on with it unless model or layout have changed.

    Raises ConfigError when `out` cannot be had (there is something already, another process packs into it, the disk
    is too full: what was written is removed then) or a number cannot be encoded, WriteError for other faults of the
    disk, and ExpertReadError when the checkpoint cannot be read.
    """
    out = Path(out).resolve()
    with disk_faults(out, what="written"):
        _refuse(out, overwrite)
    layers = [
        PackedLayer.of(name, count, source.parts(layer), source.params(layer), source.fingerprint(layer))
        for layer, (name, count) in enumerate(zip(source.layers, source.num_experts, strict=True))
    ]
    files = [*_expert_files(source, layers, model_id, shard_bytes), *_dense_files(dense, model_id)]
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "model": model_id,
        "tool": f"remoe-adapt {__version__}",
        "files": [file.name for file in files if file.name != DENSE],
        "layers": [layer.as_json() for layer in layers],
    }
    if config is not None:
        manifest["config"] = dict(config)
    if dense is not None:
        manifest |= {"dense": dict(dense.entries()), "dense_fingerprint": dense.fingerprint()}
    total_bytes = sum(file.size for file in files)
    on_start(total_bytes)
    draft = out.with_name(f".{out.name}.partial")
    with disk_faults(out, what="written"), made_parents(out), _alone(draft, out):
        # Once more: another process may have published its pack before this one got the lock.
        _refuse(out, overwrite)
        try:
            _continue(draft, manifest | {"source": source.state()})
            done = [_is_done(draft, file) for file in files]
            _check_room(draft, sum(file.size for file, there in zip(files, done, strict=True) if not there))
            for file, there in zip(files, done, strict=True):
                if there:
                    on_bytes(file.size)
                else:
                    _write_file(draft, file, on_bytes)
            errors = _with_errors(draft, files, manifest)
            _write_json(draft / MANIFEST, manifest)
        except ExpertReadError:
            raise
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise ConfigError(
                f"the disk of {out.parent} became full; what was packed has been removed. The pack takes "
                f"{size_text(total_bytes)}: make room, or give another folder."
            ) from error
        # Opened as every user will open it, before it replaces anything.
        source.check(draft)
        for path in (draft / _PLAN, *draft.glob(f"*{_LOSSES}")):
            path.unlink(missing_ok=True)
        _publish(draft, out)
    codes = {band.kind.name for layer in layers for param in layer.params.values() for band in param.bands}
    floats = {layer.parts[name].dtype for layer in layers for name, p in layer.params.items() if not p.bands}
    return {
        "out": str(out),
        "model": model_id,
        "dtypes": sorted(codes | floats),
        "layers": len(layers),
        "experts": sum(layer.experts for layer in layers),
        "bytes": total_bytes,
        "files": len(files),
        **errors,
    }


def _with_errors(draft: Path, files: Sequence[_File], manifest: dict[str, Any]) -> dict[str, Any]:
    """Puts the relative errors of all weights into the manifest; returns them for the result."""
    sums: dict[str, list[float]] = {}
    for file in files:
        for name, (error, norm) in read_json(_losses_of(draft, file)).items():
            known = sums.setdefault(name, [0.0, 0.0])
            known[0], known[1] = known[0] + error, known[1] + norm
    errors = {name: math.sqrt(error / norm) if norm else 0.0 for name, (error, norm) in sums.items()}
    by_layer: dict[str, dict[str, float]] = {}
    for layer in manifest["layers"]:
        names = {param: f"{layer['name']}.{param}" for param in layer["params"]}
        if found := {param: errors[name] for param, name in names.items() if name in errors}:
            by_layer[layer["name"]] = layer["weight_error"] = found
    dense = manifest.get("dense", {})
    for name, entry in dense.items():
        entry["weight_error"] = errors[name]
    return {"weight_error": by_layer, "dense_weight_error": {name: errors[name] for name in dense}}


def _expert_files(source: ExpertSource, layers: list[PackedLayer], model_id: str, shard_bytes: int) -> Iterator[_File]:
    shards = list(_shards(layers, shard_bytes))
    for number, shard in enumerate(shards, 1):
        sizes = {f"{layers[layer].name}.{expert}": ((layers[layer].bytes,), torch.uint8) for layer, expert in shard}
        header = _header(sizes, model_id)
        size = len(header) + sum(layers[layer].bytes for layer, _ in shard)
        name = f"experts-{number:05}-of-{len(shards):05}.safetensors"
        yield _File(name, header, size, partial(_pieces, source, layers, shard))


def _pieces(source: ExpertSource, layers: list[PackedLayer], shard: _Shard) -> Generator[tuple[np.ndarray, Losses]]:
    with closing(_read_ahead(source, shard)) as experts:
        for (number, _), read in zip(shard, experts, strict=True):
            layer = layers[number]
            piece = np.zeros(layer.bytes, dtype=np.uint8)
            for name, value in read.parts.items():
                start = layer.parts[name].offset
                piece[start : start + value.nbytes] = _bytes(value)
            yield piece, {f"{layer.name}.{param}": loss for param, loss in read.losses.items()}


def _read_ahead(source: ExpertSource, shard: _Shard) -> Generator[Piece]:
    """These experts in their order, as many of them at work as there are cores: encoding takes longer than reading."""
    workers = max(1, min(_MOST_WORKERS, usable_cores()))
    # One core for each expert: torch's own threads would wait for each other after every operation.
    pool = ThreadPoolExecutor(workers, "remoe-pack", initializer=torch.set_num_threads, initargs=(1,))
    try:
        waiting = deque[Future[Piece]]()
        for number, expert in shard:
            waiting.append(pool.submit(source.read, number, expert))
            if len(waiting) > workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        # Threads that begin later take the number that was set last, by whichever thread.
        torch.set_num_threads(torch.get_num_threads())


def _dense_files(dense: DenseSource | None, model_id: str) -> Iterator[_File]:
    if dense is None:
        return
    tensors = dense.tensors()
    header = _header(tensors, model_id)
    data_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in tensors.values())

    def data() -> Generator[tuple[np.ndarray, Losses]]:
        for name in tensors:
            piece = dense.read(name)
            yield _bytes(piece.parts[name]), piece.losses

    yield _File(DENSE, header, len(header) + data_bytes, data)


def _bytes(value: Tensor) -> np.ndarray:
    found: np.ndarray = value.detach().contiguous().view(-1).view(torch.uint8).numpy()
    return found


def _refuse(out: Path, overwrite: bool) -> None:
    if not os.path.lexists(out) or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / MANIFEST).is_file():
        raise ConfigError(f"{out} is there and no pack: give another folder.")
    if not overwrite:
        raise ConfigError(f"{out} is there: give another folder, or --overwrite to replace it.")


# The (layer, expert) pairs of one file, in its order.
_Shard = list[tuple[int, int]]


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


def _header(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], model_id: str) -> bytes:
    """The start of a safetensors file of these tensors, as long as whole blocks."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "remoe_pack": str(FORMAT), "model": model_id}}
    at = 0
    for name, (shape, dtype) in tensors.items():
        end = at + torch.Size(shape).numel() * dtype.itemsize
        entries[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [at, end]}
        at = end
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


def _is_done(draft: Path, file: _File) -> bool:
    path = draft / file.name
    return path.exists() and path.stat().st_size == file.size and _losses_of(draft, file).exists()


def _losses_of(draft: Path, file: _File) -> Path:
    return draft / f"{file.name}{_LOSSES}"


def _write_file(draft: Path, file: _File, on_bytes: Callable[[int], None]) -> None:
    scratch = draft / f"{file.name}.tmp"
    losses: dict[str, tuple[float, float]] = {}
    with scratch.open("wb") as opened, closing(file.data()) as data:
        # The file gets all its room at once: a full disk is noticed before the work, and the file lies in few pieces.
        _reserve(opened, file.size)
        opened.write(file.header)
        on_bytes(len(file.header))
        waiting = 0
        for piece, lost in data:
            opened.write(piece.data)
            on_bytes(len(piece))
            for name, (error, norm) in lost.items():
                before = losses.get(name, (0.0, 0.0))
                losses[name] = (before[0] + error, before[1] + norm)
            waiting += len(piece)
            if waiting >= _FLUSH_BYTES:
                _flush(opened)
                waiting = 0
        _flush(opened)
    # Before the file has its name: a run that goes on takes it for finished.
    _write_json(_losses_of(draft, file), losses)
    scratch.replace(draft / file.name)


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


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
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
