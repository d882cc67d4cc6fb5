"""How fast this machine reads experts, multiplies with weights, and goes through a layer: measured in a few seconds.

A decoding step is modelled as four sums: what every layer costs beside its experts whatever its size (Python and the
calls of kernels), the bytes of the dense part over the rate at which products with them are computed, what the experts
of a layer take as an expert cache computes them, and the bytes of missing experts over the rate at which storage brings
them. Each is timed on the functions that a decoding step calls.
"""

from __future__ import annotations

import itertools
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.checkpoints import Extent
from remoe_adapt.errors import ExpertReadError, RemoeError
from remoe_adapt.evaluation import Decoder
from remoe_adapt.expert_cache import BLOCK, READ_THREADS, ExtentReader, experts_modules, load_with_expert_cache
from remoe_adapt.expert_cache.encodings import block_type, dequantise, ggml
from remoe_adapt.libraries import tiny_moe

# No cache of a processor holds so many bytes of weights.
SET_BYTES = 96 << 20
_MOST_COPIES = 256
# A trial takes so long, and each of its turns.
_TRIAL_S, _TURN_S = 0.2, 0.02
_READS_S = 0.6
_STEPS, _WARM_STEPS, _LAYERS = 48, 8, 4
# Rows and columns of a tiny model's matrices.
_TINY = 32
# Matrices that are a smaller part of a kind's are not timed; of larger ones than these a part is.
_LEAST_PART, _MOST_VALUES = 0.02, 1 << 24
# Enough that a device's own cache does not hold it.
_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    """bytes_per_s: at which experts are read; None: not known. source: where the figure is from."""

    bytes_per_s: float | None
    source: str


@dataclass(frozen=True, slots=True)
class Compute:
    """kinds: bytes of the dense part per second that products with one token take, by kind ("bfloat16", "q4_1").
    layer_s: of a layer beside its experts, whatever its size. experts_s: of the first layer's experts, all of them
    there, by format. source: where the rates are from.
    """

    kinds: Mapping[str, float]
    layer_s: float
    experts_s: Mapping[str, float]
    threads: int
    source: str

    def seconds(self, bytes_of: Mapping[str, float]) -> float:
        """Of products with so many bytes of each kind of the dense part."""
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


class Trial(Protocol):
    """What can be timed."""

    def run(self) -> Any: ...


def measured_compute(
    matrices: Mapping[tuple[str, int, int], int],
    trials: Mapping[str, Callable[[], Trial]],
) -> Compute:
    """Times products with the dense part, each format's experts, and the layers of a tiny model, on this machine, with
    torch's threads.

    matrices: of the dense part: how many of each kind, outputs and inputs.
    trials: by format, makes what computes the experts of a layer.
    """
    layer_s, _ = _layer_s(cached=False, top_k=1)
    experts_s = {name: _seconds(make().run) for name, make in trials.items()}
    return Compute(_rates(matrices), layer_s, experts_s, torch.get_num_threads(), "measured on this machine")


def given_compute(ram_mib_per_s: float, kinds: Iterable[str], expert_bytes: Mapping[str, float], top_k: int) -> Compute:
    """As somebody says: weights are read at one rate; only the layers of a tiny model are timed.

    expert_bytes: of the experts that a token uses in the first layer, by format.
    top_k: how many these are, each of which costs calls.
    """
    rate, (layer_s, calls_s) = ram_mib_per_s * (1 << 20), _layer_s(cached=True, top_k=top_k)
    experts_s = {name: calls_s + size / rate for name, size in expert_bytes.items()}
    return Compute(dict.fromkeys(kinds, rate), layer_s, experts_s, torch.get_num_threads(), "given")


def _rates(matrices: Mapping[tuple[str, int, int], int]) -> dict[str, float]:
    """Bytes per second of products of one token with the matrices of each kind."""
    # The layers of the tiny model have one of these in the place of each product.
    call_s = _timed_product("float32", _TINY, _TINY)[1]
    found = {}
    for kind in sorted({kind for kind, _, _ in matrices}):
        counts = {(rows, cols): count for (other, rows, cols), count in matrices.items() if other == kind}
        whole = sum(rows * cols * count for (rows, cols), count in counts.items())
        nbytes = took_s = 0.0
        for (rows, cols), count in counts.items():
            if rows * cols * count >= _LEAST_PART * whole:
                part = min(rows, max(1, _MOST_VALUES // cols))
                size, product_s = _timed_product(kind, part, cols)
                nbytes += size * count * rows / part
                took_s += max(product_s - call_s, product_s / 10) * count * rows / part
        found[kind] = nbytes / took_s
    return found


def _timed_product(kind: str, rows: int, cols: int) -> tuple[int, float]:
    """(bytes of a matrix, seconds of a product with it)."""
    product, nbytes = _floats(kind, rows, cols) if hasattr(torch, kind) else _blocks(kind, rows, cols)
    numbers = itertools.count()
    return nbytes, _seconds(lambda: product(next(numbers)))


def _seconds(run: Callable[[], Any]) -> float:
    """Of a call: the median over turns of many calls. A turn is about as long as a token, so that other work on the
    machine slows it as it slows tokens."""
    run()
    times_s, begin = list[float](), time.perf_counter()
    while (before := time.perf_counter()) - begin < _TRIAL_S:
        calls = 0
        while (took_s := time.perf_counter() - before) < _TURN_S or not calls:
            run()
            calls += 1
        times_s.append(took_s / calls)
    return median(times_s)


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
    return max(2, min(_MOST_COPIES, SET_BYTES // nbytes))


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


def _layer_s(*, cached: bool, top_k: int) -> tuple[float, float]:
    """Seconds of a layer without weights to speak of: beside its experts, and of these.

    cached: they are behind an expert cache.
    """
    model = tiny_moe(layers=_LAYERS, experts=2 * top_k, top_k=top_k)
    if cached:
        with tempfile.TemporaryDirectory(prefix="remoe-plan-") as folder:
            model.save_pretrained(folder)
            model = load_with_expert_cache(folder, 1.0)
    spent_s: list[float] = []
    for module in experts_modules(model).values():
        module.register_forward_pre_hook(lambda *_: spent_s.append(-time.perf_counter()))
        module.register_forward_hook(lambda *_: spent_s.append(time.perf_counter()))
    beside_s, experts_s = list[float](), list[float]()
    with torch.inference_mode():
        decoder = Decoder(model)
        for token in range(_WARM_STEPS + _STEPS):
            spent_s.clear()
            begin = time.perf_counter()
            decoder.feed([token])
            experts_s.append(sum(spent_s))
            beside_s.append(time.perf_counter() - begin - experts_s[-1])
    return median(beside_s[_WARM_STEPS:]) / _LAYERS, median(experts_s[_WARM_STEPS:]) / _LAYERS
