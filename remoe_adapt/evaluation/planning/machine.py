"""How fast this machine reads experts, multiplies with weights, and goes through a layer: measured in a few seconds.

A decoding step is modelled as three sums: what every layer costs whatever its size (Python and the calls of kernels),
the bytes of weights over the rate at which products with them are computed, and the bytes of missing experts over the
rate at which storage brings them.
"""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.checkpoints import Extent
from remoe_adapt.errors import ExpertReadError, RemoeError
from remoe_adapt.evaluation import Decoder
from remoe_adapt.expert_cache import BLOCK, READ_THREADS, ExtentReader, load_with_expert_cache
from remoe_adapt.expert_cache.encodings import block_type, dequantise, ggml
from remoe_adapt.libraries import tiny_moe

_SET_BYTES, _MOST_COPIES = 96 << 20, 256
_PRODUCTS_S, _READS_S = 0.15, 0.6
_STEPS, _WARM_STEPS, _LAYERS = 24, 6, 4
# Enough that a device's own cache does not hold it.
_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    """bytes_per_s: at which experts are read; None: not known. source: where the figure is from."""

    bytes_per_s: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Compute:
    """kinds: bytes of weights per second that products with one token take, by kind ("bfloat16", "q4_1"). layer_s: of a
    layer whatever its size, with all experts in memory by transformers; cached_layer_s: by the expert cache. source:
    where the rates are from.
    """

    kinds: Mapping[str, float]
    layer_s: float
    cached_layer_s: float
    threads: int
    source: str

    def seconds(self, bytes_of: Mapping[str, float]) -> float:
        """Of products with so many bytes of each kind."""
        return sum(count / self.kinds[kind] for kind, count in bytes_of.items() if count)


def given_storage(mib_per_s: float) -> Storage:
    """As somebody says."""
    return Storage(mib_per_s * (1 << 20), "given")


def measured_storage(file: Path | None, folder: Path, read_bytes: int) -> Storage:
    """Reads of `read_bytes` as a cache's misses are read: directly, several at a time, at random places.

    file: one of the model; None, or too small: a scratch file of 64 MiB in `folder`, where the model would lie.
    """
    read_bytes = max(BLOCK, -(-read_bytes // BLOCK) * BLOCK)
    if file is not None and file.stat().st_size >= 4 * read_bytes and file.stat().st_size >= _SCRATCH_BYTES // 4:
        return _timed(file, read_bytes, f"measured on {file.name}")
    place = next((each for each in (folder, *folder.parents) if each.is_dir()), None)
    if place is None or not os.access(place, os.W_OK):
        return Storage(None, f"no file to measure, and {folder} cannot be written to")
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".remoe-plan-") as scratch:
            piece = os.urandom(4 << 20)
            for _ in range(_SCRATCH_BYTES // len(piece)):
                scratch.write(piece)
            scratch.flush()
            os.fsync(scratch.fileno())
            return _timed(Path(scratch.name), min(read_bytes, _SCRATCH_BYTES // 4), f"measured on a file in {place}")
    except OSError as error:
        return Storage(None, f"{place} cannot be written to ({error.strerror})")


def _timed(file: Path, read_bytes: int, source: str) -> Storage:
    size = file.stat().st_size
    places = range(0, size - read_bytes + 1, BLOCK)
    draw = random.Random(0)
    try:
        reader = ExtentReader([file], direct_io=True)
    except ExpertReadError as error:
        return Storage(None, str(error))
    buffers = [torch.empty(read_bytes, dtype=torch.uint8) for _ in range(READ_THREADS)]
    done = 0
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:

            def read(buffer: Tensor) -> None:
                offset = places[draw.randrange(len(places))]
                reader.fill([(Extent(file, "", torch.uint8, (read_bytes,), offset, read_bytes), buffer)])

            list(pool.map(read, buffers))  # the first touch of the buffers' pages is none of the device's
            begin = time.perf_counter()
            while (took_s := time.perf_counter() - begin) < _READS_S:
                list(pool.map(read, buffers))
                done += READ_THREADS * read_bytes
    except RemoeError as error:
        return Storage(None, str(error))
    finally:
        reader.close()
    return Storage(done / took_s, source if reader.direct_io else f"{source}, through the page cache")


def measured_compute(
    kinds: Iterable[str], shapes: Sequence[tuple[int, int]], top_k: int, ram_mib_per_s: float | None = None
) -> Compute:
    """Times products with each kind of weights, and the layers of a tiny model, on this machine, with torch's threads.

    shapes: [outputs, inputs] of an expert's matrices: products with short rows take longer.
    top_k: experts of a token, each of which costs calls.
    ram_mib_per_s: instead of the rates of products.
    """
    if ram_mib_per_s is None:
        rates, source = {kind: _rate(kind, shapes) for kind in kinds}, "measured on this machine"
    else:
        rates, source = dict.fromkeys(kinds, ram_mib_per_s * (1 << 20)), "given"
    layer_s, cached_layer_s = _layers_s(top_k)
    return Compute(rates, layer_s, cached_layer_s, torch.get_num_threads(), source)


def _rate(kind: str, shapes: Sequence[tuple[int, int]]) -> float:
    """Bytes per second of products of one token with matrices of this kind."""
    found = [_timed_product(kind, rows, cols) for rows, cols in shapes]
    return sum(nbytes for nbytes, _ in found) / sum(took_s for _, took_s in found)


def _timed_product(kind: str, rows: int, cols: int) -> tuple[int, float]:
    """(bytes of a matrix, seconds of a product with it)."""
    product, nbytes = _floats(kind, rows, cols) if hasattr(torch, kind) else _blocks(kind, rows, cols)
    product(0)
    times_s, begin = list[float](), time.perf_counter()
    while (before := time.perf_counter()) - begin < _PRODUCTS_S:
        product(len(times_s) + 1)
        times_s.append(time.perf_counter() - before)
    # The median, because others use the machine too.
    return nbytes, median(times_s)


def _floats(kind: str, rows: int, cols: int) -> tuple[Callable[[int], Any], int]:
    dtype: torch.dtype = getattr(torch, kind)
    nbytes = rows * cols * dtype.itemsize
    matrices = [torch.ones(rows, cols, dtype=dtype) for _ in range(_copies(nbytes))]
    x_TK = torch.ones(1, cols, dtype=dtype)

    def product(number: int) -> Tensor:
        with torch.inference_mode():
            return F.linear(x_TK, matrices[number % len(matrices)])

    return product, nbytes


def _copies(nbytes: int) -> int:
    """So many matrices that no cache of a processor holds them."""
    return max(2, min(_MOST_COPIES, _SET_BYTES // nbytes))


def _blocks(kind: str, rows: int, cols: int) -> tuple[Callable[[int], Any], int]:
    """By the kernels that the cache would use, else by dequantising."""
    blocks, kernels = block_type(kind), ggml()
    row_bytes = blocks.row_bytes(cols)
    # Bytes of 0x3C are no tiny scales in any type of block, with which processors compute slowly.
    matrices = [torch.full((rows, row_bytes), 0x3C, dtype=torch.uint8) for _ in range(_copies(rows * row_bytes))]
    x_TK = torch.ones(1, cols)

    def product(number: int) -> Tensor:
        matrix_NB = matrices[number % len(matrices)]
        with torch.inference_mode():
            if kernels is not None and blocks in kernels.types:
                return kernels.matmul(x_TK, matrix_NB, blocks, rows)
            return F.linear(x_TK, dequantise(matrix_NB, blocks, cols))

    return product, rows * row_bytes


def _layers_s(top_k: int) -> tuple[float, float]:
    """Seconds of a layer without weights to speak of: by transformers' eager experts, and behind an expert cache."""
    model = tiny_moe(layers=_LAYERS, experts=2 * top_k, top_k=top_k)
    whole_s = _step_s(model) / _LAYERS
    with tempfile.TemporaryDirectory(prefix="remoe-plan-") as folder:
        model.save_pretrained(folder)
        cached = load_with_expert_cache(folder, 1.0)
        return whole_s, _step_s(cached) / _LAYERS


def _step_s(model: Any) -> float:
    times_s = []
    with torch.inference_mode():
        decoder = Decoder(model)
        for token in range(_WARM_STEPS + _STEPS):
            begin = time.perf_counter()
            decoder.feed([token])
            times_s.append(time.perf_counter() - begin)
    return median(times_s[_WARM_STEPS:])
