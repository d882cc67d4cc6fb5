"""How much of what the disk gives the expert stores get: raw direct reads against a checkpoint and a pack.

What another strength costs in a GGUF of some gigabytes: in place, as a split part, against copying the file.

The model has the router and vocabulary sizes of a real one (24 layers, 60 experts, hidden 2048, 151,936 tokens);
its experts are a hole in the file, which no exporter reads.
"""

from __future__ import annotations

import os
import random
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remoe_adapt._support import disk_faults
from remoe_adapt.checkpoints import Extent, entry_bytes, header_bytes, open_checkpoint
from remoe_adapt.engines import clone_or_copy, gguf
from remoe_adapt.errors import ConfigError, ExportError
from remoe_adapt.expert_cache import BLOCK, LOADING, ExpertStore, ExtentReader, PackedStore, find_checkpoint, map_pages
from remoe_adapt.family import Family, FamilyPoint
from remoe_adapt.routers import GGUF_ARCH, GGUF_ROUTER_WEIGHT, fingerprint_of_weights

# Reads at a time; each round of an arm is so many reads of each thread.
THREADS, READS_EACH = (1, 2, 4), 2
Read = Callable[[tuple[int, int]], object]


def run_file_reads(
    model: str | Path,
    pack: str | Path,
    *,
    rounds: int = 40,
    on_row: Callable[[dict[str, Any]], None] = lambda row: None,
) -> dict[str, Any]:
    """Reads single experts at random, arms in turn and in random order, nothing of them in the page cache.

    Arms: `raw` (one aligned direct read as long as an expert, memory of ordinary pages), `raw_huge` (of huge pages),
    `checkpoint` and `pack` (through their stores). Returns (JSON-ready) `expert_bytes` and `rows` of `threads`,
    `arm`, `mib_per_s` (of the median round), `of_raw` and `of_raw_huge` (shares of these arms' in the same run).

    Raises ConfigError where there is no direct I/O, and as load_with_expert_cache(model, storage=pack).
    """
    checkpoint = find_checkpoint(model)
    with LOADING:
        skeleton = checkpoint.skeleton()
    direct = ExpertStore(checkpoint.folder, skeleton, direct_io=True)
    if not direct.direct_io:
        raise ConfigError(f"{checkpoint.folder} is on a file system without direct I/O: copy it to another disk.")
    packed = PackedStore(pack, direct, direct_io=True)
    largest = max(open_checkpoint(checkpoint.folder).values(), key=lambda extent: extent.offset)
    arms: dict[str, Read] = {
        "raw": _raw(largest, direct.expert_bytes[0], huge=False),
        "raw_huge": _raw(largest, direct.expert_bytes[0], huge=True),
        "checkpoint": lambda key: direct.read(*key),
        "pack": lambda key: packed.read(*key),
    }
    # Experts of all layers: those of one may lie side by side, where a disk reads ahead.
    keys = [(layer, expert) for layer, count in enumerate(direct.num_experts) for expert in range(count)]
    rows = []
    for row in _rows(arms, keys, direct.expert_bytes[0], rounds):
        on_row(row)
        rows.append(row)
    return {"expert_bytes": direct.expert_bytes[0], "rows": rows}


def _raw(last: Extent, size: int, *, huge: bool) -> Read:
    """Reads `size` bytes (in whole blocks) somewhere in the file before the end of this extent."""
    # Direct reads must begin and end at blocks; the place is random, as an expert's is to the disk.
    reader, whole = ExtentReader([last.path], direct_io=True), -(-size // BLOCK) * BLOCK
    memory: list[np.ndarray] = []
    if (places := (last.offset + last.size) // whole) < 1:
        raise ConfigError(f"{last.path} is shorter than one expert: give a larger checkpoint.")

    def read(key: tuple[int, int]) -> None:
        place = memory.pop() if memory else _buffer(whole, huge)
        extent = Extent(last.path, "raw", torch.uint8, (whole,), random.randrange(places) * whole, whole)
        reader.fill([(extent, torch.from_numpy(place))])
        memory.append(place)

    return read


def _buffer(size: int, huge: bool) -> np.ndarray:
    if huge:
        place = map_pages(size)
    else:
        # numpy aligns to 64 bytes, direct reads need a block.
        spare = np.empty(size + BLOCK, dtype=np.uint8)
        place = spare[-spare.ctypes.data % BLOCK :][:size]
    # Its pages are taken now, else the first read into it would pay for them.
    place[:] = 0
    return place


def _rows(arms: dict[str, Read], keys: list[tuple[int, int]], size: int, rounds: int) -> Iterator[dict[str, Any]]:
    for threads in THREADS:
        seconds: dict[str, list[float]] = {arm: [] for arm in arms}
        with ThreadPoolExecutor(threads) as pool:
            for number in range(rounds + 1):
                for arm in random.sample(sorted(arms), len(arms)):
                    chosen = random.sample(keys, threads * READS_EACH)
                    begin_s = time.perf_counter()
                    for _ in pool.map(arms[arm], chosen):
                        pass
                    if number:  # the first round takes the memory
                        seconds[arm].append(time.perf_counter() - begin_s)
        median = {arm: statistics.median(times) for arm, times in seconds.items()}
        for arm, median_s in median.items():
            yield {
                "threads": threads,
                "expert_mib": size / (1 << 20),
                "arm": arm,
                "mib_per_s": threads * READS_EACH * size / median_s / (1 << 20),
                "of_raw": median["raw"] / median_s,
                "of_raw_huge": median["raw_huge"] / median_s,
            }


LAYERS, EXPERTS, HIDDEN, TOKENS = 24, 60, 2048, 151_936
_UINT32, _STRING, _ARRAY, _ALIGNMENT = 4, 8, 9, 32
_F32, _Q8_0, _Q8_0_BYTES = 0, 8, 34 / 32
_MAX_GIGABYTES = 10_000


def run_patching(gigabytes: float = 3.0, folder: Path | None = None, repeats: int = 5) -> dict[str, Any]:
    """Seconds (median of `repeats`) and bytes of each way, in a temporary folder below `folder`.

    in_place_s, undo_s: routers replaced and put back, on the disk; variant_s, variant_bytes, variant_share: another
    strength of a split model; live_s: its routers in the page cache, as `remoe watch --live` swaps them; split_s:
    taking it apart, once; copy_s: copying the file (the baseline).

    Raises ConfigError for a size that no model of this form has, ExportError when the folder does not take it.
    """
    smallest = LAYERS * EXPERTS * HIDDEN * _Q8_0_BYTES / 1e9
    if not smallest <= gigabytes <= _MAX_GIGABYTES:
        raise ConfigError(f"{gigabytes:g} GB is no size for it: give {smallest:.4f} to {_MAX_GIGABYTES}.")
    place = folder or Path(tempfile.gettempdir())
    with (
        disk_faults(place, ExportError, "give a folder with more room"),
        tempfile.TemporaryDirectory(dir=place) as home,
    ):
        source, family = _model(Path(home) / "model.gguf", gigabytes)
        size = source.stat().st_size
        steps: dict[str, list[float]] = {"in_place_s": [], "undo_s": [], "variant_s": []}
        for strength in (1.0, 0.5, *[0.25] * repeats)[:repeats]:
            steps["in_place_s"].append(_seconds(gguf.patch_in_place, source, family, strength))
            steps["undo_s"].append(_seconds(gguf.undo_in_place, source))
        copy_s = _seconds(_copy_to_disk, source, Path(home) / "copy.gguf")
        (Path(home) / "copy.gguf").unlink()
        split_s = _seconds(gguf.split_gguf, source, family, 0.0, Path(home) / "split" / "m.gguf")
        first = Path(home) / "split" / "m-00001-of-00002.gguf"
        for number in range(repeats):
            target = Path(home) / f"variant{number}" / "m.gguf"
            steps["variant_s"].append(_seconds(gguf.export_gguf, first, family, 1.0 - number / 10, target))
        routers = gguf.LiveRouters(first, family)
        live_s = []
        for number in range(repeats):
            routers.write(1.0 - number / 10)
            live_s.append(routers.swap_s or 0.0)
        routers.close()
        part = (Path(home) / "variant0" / first.name).stat().st_size
        medians = {name: sorted(values)[len(values) // 2] for name, values in steps.items()}
    return {
        "bytes": size,
        "router_bytes": LAYERS * EXPERTS * HIDDEN * 4,
        **medians,
        "variant_bytes": part,
        "variant_share": part / size,
        "live_s": sorted(live_s)[repeats // 2],
        "split_s": split_s,
        "copy_s": copy_s,
    }


def _copy_to_disk(source: Path, target: Path) -> None:
    clone_or_copy(source, target)
    with target.open("rb") as file:
        # Else the copy would end in the page cache, and the others, which do reach the disk, would look slow.
        os.fsync(file.fileno())


def _seconds(work: Callable[..., object], *arguments: object) -> float:
    os.sync()  # what others left to write is not waited for by this
    start = time.perf_counter()
    work(*arguments)
    return time.perf_counter() - start


def _model(path: Path, gigabytes: float) -> tuple[Path, Family]:
    torch.manual_seed(0)
    architecture = next(iter(GGUF_ARCH.values()))
    entries = [_string("general.architecture", architecture), *_vocabulary()]
    sizes = {"block_count": LAYERS, "expert_count": EXPERTS, "embedding_length": HIDDEN}
    entries += [entry_bytes(f"{architecture}.{key}", _UINT32, value) for key, value in sizes.items()]
    rows = int(gigabytes * 1e9 / LAYERS / EXPERTS / HIDDEN / _Q8_0_BYTES)
    tensors: list[tuple[str, tuple[int, ...], int, int]] = []
    end, routers = 0, []
    for layer in range(LAYERS):
        routers.append((end, torch.randn(EXPERTS, HIDDEN)))
        tensors.append((GGUF_ROUTER_WEIGHT.format(layer=layer), (EXPERTS, HIDDEN), _F32, end))
        end += EXPERTS * HIDDEN * 4
        tensors.append((f"blk.{layer}.ffn_up_exps.weight", (EXPERTS, rows, HIDDEN), _Q8_0, end))
        end += int(EXPERTS * rows * HIDDEN * _Q8_0_BYTES)
        # llama.cpp refuses tensors that do not begin at a multiple of it.
        end += -end % _ALIGNMENT
    header = header_bytes(entries, tensors, _ALIGNMENT)
    with path.open("wb") as file:
        file.write(header)
        for offset, weight_ED in routers:
            file.seek(len(header) + offset)
            file.write(weight_ED.numpy().tobytes())
        file.truncate(len(header) + end)
    weights = {f"model.layers.{layer}.mlp.gate": weight_ED for layer, (_, weight_ED) in enumerate(routers)}
    deltas = {name: 0.1 * torch.randn_like(weight_ED) for name, weight_ED in weights.items()}
    points = (FamilyPoint(1.0, Family.adapter_name(1.0), deltas),)
    return path, Family(path.parent / "family", "benchmark", fingerprint_of_weights(weights.values()), points)


def _string(key: str, value: str) -> bytes:
    return _text(key) + struct.pack("<I", _STRING) + _text(value)


def _vocabulary() -> list[bytes]:
    """Tokens and merges of a real vocabulary's size."""
    found = []
    for key, words in (
        ("tokenizer.ggml.tokens", (f"token{number}" for number in range(TOKENS))),
        ("tokenizer.ggml.merges", (f"to{number} ken{number}" for number in range(TOKENS))),
    ):
        body = b"".join(map(_text, words))
        found.append(_text(key) + struct.pack("<IIQ", _ARRAY, _STRING, TOKENS) + body)
    return found


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()
