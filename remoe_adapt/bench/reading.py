"""How much of what the disk gives the expert stores get: raw direct reads against a checkpoint and a pack."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from remoe_adapt.cache.blocks import map_pages
from remoe_adapt.cache.packed import PackedStore
from remoe_adapt.cache.reading import BLOCK, ExtentReader
from remoe_adapt.cache.shards import Extent, open_checkpoint
from remoe_adapt.cache.store import ExpertStore
from remoe_adapt.errors import ConfigError
from remoe_adapt.runtime.checkpoint import LOADING, find_checkpoint

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
    keys = [(layer, expert) for layer, count in enumerate(direct.num_experts) for expert in range(count)]
    rows = []
    for row in _rows(arms, keys, direct.expert_bytes[0], rounds):
        on_row(row)
        rows.append(row)
    return {"expert_bytes": direct.expert_bytes[0], "rows": rows}


def _raw(last: Extent, size: int, *, huge: bool) -> Read:
    """Reads `size` bytes (in whole blocks) somewhere in the file before the end of this extent."""
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
        spare = np.empty(size + BLOCK, dtype=np.uint8)
        place = spare[-spare.ctypes.data % BLOCK :][:size]
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
