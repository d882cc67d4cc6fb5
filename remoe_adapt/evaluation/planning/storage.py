"""How fast storage brings experts, measured as a cache's misses are read."""

from __future__ import annotations

import os
import random
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from remoe_adapt.checkpoints import Extent
from remoe_adapt.errors import ExpertReadError, RemoeError
from remoe_adapt.expert_cache import BLOCK, READ_THREADS, ExtentReader

# Reads without a pause go on for so long. Before, some with pauses as long as a token takes.
_READS_S, _CREDIT_S, _LEAST_TURNS, _PAUSES, _PAUSE_S = 0.8, 0.25, 4, 4, 0.1
# Enough that a device's own cache does not hold it.
_SCRATCH_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Storage:
    """bytes_per_s: at which experts are read, without end; None: not known. burst_bytes_per_s: those of a few reads
    after a pause, which is more where a limit is kept over some time (disks of clouds, limits of a container); None:
    the same. source: where the figures are from.
    """

    bytes_per_s: float | None
    source: str
    burst_bytes_per_s: float | None = None

    def token_s(self, compute_s: float, nbytes: float) -> float | None:
        """Of a token that computes for so long and waits for reads of so many bytes; None: not known."""
        if not nbytes:
            return compute_s
        if self.bytes_per_s is None:
            return None
        # A limit over some time also counts the time of computing; one token after another it cannot be exceeded.
        burst = max(self.bytes_per_s, self.burst_bytes_per_s or 0.0)
        return max(compute_s + nbytes / burst, nbytes / self.bytes_per_s)


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
    turns, bursts_s, turn_bytes = 0, list[float](), READ_THREADS * read_bytes
    try:
        with ThreadPoolExecutor(READ_THREADS) as pool:

            def read(buffer: Tensor) -> None:
                offset = places[draw.randrange(len(places))]
                reader.fill([(Extent(file, "", torch.uint8, (read_bytes,), offset, read_bytes), buffer)])

            def turn_s() -> float:
                begin = time.perf_counter()
                list(pool.map(read, buffers))
                return time.perf_counter() - begin

            turn_s()  # the first touch of the buffers' pages is none of the device's
            for _ in range(_PAUSES):
                time.sleep(_PAUSE_S)
                bursts_s.append(turn_s())
            # A limit that is kept over some time lets the reads after a pause through.
            begin = time.perf_counter()
            while time.perf_counter() - begin < _CREDIT_S:
                turn_s()
            begin = time.perf_counter()
            while (took_s := time.perf_counter() - begin) < _READS_S or turns < _LEAST_TURNS:
                turn_s()
                turns += 1
    except RemoeError as error:
        return Storage(None, str(error))
    finally:
        reader.close()
    source = source if reader.direct_io else f"{source}, through the page cache"
    return Storage(turns * turn_bytes / took_s, source, turn_bytes / median(bursts_s))
