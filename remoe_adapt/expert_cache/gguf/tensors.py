"""The tensors of a GGUF (all its parts) as rows of blocks in files, and their numbers."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import Extent, GgufFile, GgufTensor, check_parts, shard_paths
from remoe_adapt.errors import ConfigError, ExpertReadError, UncacheableError
from remoe_adapt.expert_cache.encodings import BF16, DECODED, F16, F32, BlockType, block_type, dequantise

# What to do where tensors and configuration do not fit.
OTHER_CONFIG = "give config=, the folder or hub id of the very model that it was made from"
_FLOATS = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
# Blocks that are read and dequantised at a time, so that a matrix needs no second one beside it.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Stored:
    """Rows of blocks in a file.

    extent: torch.uint8 [..., rows, row bytes]; of a vector [1, bytes].
    kind: ggml's type of the blocks.
    shape: of the numbers, from the slowest dimension on.
    """

    extent: Extent
    kind: BlockType
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return self.extent.tensor

    def rows(self, first: int, count: int) -> Stored:
        """`count` rows of a matrix from `first` on."""
        row_bytes = self.extent.shape[-1]
        extent = replace(
            self.extent,
            shape=(count, row_bytes),
            offset=self.extent.offset + first * row_bytes,
            size=count * row_bytes,
        )
        return replace(self, extent=extent, shape=(count, self.shape[-1]))


def open_gguf(path: Path, *, header_alone: bool = False) -> tuple[list[GgufFile], dict[str, Stored]]:
    """(the files of a GGUF of which `path` is the only or first one, every tensor by its name).

    header_alone: they may end behind their headers.

    Raises ConfigError when there is no such file or part, ExpertReadError for damaged files (as `GgufFile`) and parts
    of several models.
    """
    files = [GgufFile(part, ExpertReadError, header_alone=header_alone) for part in shard_paths(path, ConfigError)]
    check_parts(files)
    return files, {tensor.name: _stored(tensor) for file in files for tensor in file.tensors}


def _stored(tensor: GgufTensor) -> Stored:
    kind, shape = block_type(tensor.type), tensor.shape or (1,)
    # A vector is a row; all dimensions but the last count rows.
    rows = shape[:-1] or (1,)
    extent_shape = (*rows, kind.row_bytes(shape[-1]))
    extent = Extent(tensor.path, tensor.name, torch.uint8, extent_shape, tensor.offset, tensor.size)
    return Stored(extent, kind, shape)


def check_kind(stored: Stored) -> None:
    """Raises UncacheableError for a type that cannot be dequantised."""
    if stored.kind not in DECODED:
        raise UncacheableError(
            f"{printable(stored.extent.path)}: tensor {printable(stored.name)} is of ggml type {stored.kind.name}, "
            f"which cannot be read: give a GGUF in {', '.join(sorted(kind.name for kind in DECODED))}."
        )


def numbers_of(stored: Stored, dtype: torch.dtype) -> Tensor:
    """The numbers of a tensor in its shape, dequantised in fp32 and rounded to `dtype`; in chunks of a few MiB.

    Raises ExpertReadError when the file cannot be read or has numbers that are not finite.
    """
    extent, cols = stored.extent, stored.shape[-1]
    row_bytes = extent.shape[-1]
    num_rows = extent.size // row_bytes
    numbers_NK = torch.empty(num_rows, cols, dtype=dtype, device="cpu")
    step = max(1, _CHUNK_BYTES // row_bytes)
    buffer = bytearray(min(step, num_rows) * row_bytes)
    with _opened(extent) as fd:
        for first in range(0, num_rows, step):
            count = min(step, num_rows - first)
            part = memoryview(buffer)[: count * row_bytes]
            _fill(fd, part, extent.offset + first * row_bytes, extent)
            blocks_NB = torch.frombuffer(part, dtype=torch.uint8).view(count, row_bytes)
            rows_NK = numbers_NK[first : first + count]
            rows_NK.copy_(decoded(blocks_NB, stored.kind, cols, dtype))
            # The sum is quick, and finite unless a number is not, or all of them are huge.
            if not math.isfinite(float(rows_NK.sum(dtype=torch.float32))) and not torch.isfinite(rows_NK).all():
                raise ExpertReadError(
                    f"{printable(extent.path)}: tensor {printable(extent.tensor)} at byte {extent.offset} has "
                    "numbers that are not finite: fetch it again."
                )
    return numbers_NK.view(stored.shape)


def bytes_of(stored: Stored) -> Tensor:
    """The blocks of a matrix as they are, uint8 [rows, row bytes]. Raises ExpertReadError when they cannot be read."""
    extent = stored.extent
    blocks_NB = torch.empty(extent.size // extent.shape[-1], extent.shape[-1], dtype=torch.uint8, device="cpu")
    with _opened(extent) as fd:
        _fill(fd, blocks_NB.view(-1).numpy().data, extent.offset, extent)
    return blocks_NB


@contextmanager
def _opened(extent: Extent) -> Iterator[int]:
    """The file of a tensor; raises ExpertReadError when it cannot be opened, or read within."""
    try:
        with extent.path.open("rb", buffering=0) as file:
            yield file.fileno()
    except OSError as error:
        if isinstance(error, ExpertReadError):
            raise
        raise ExpertReadError(
            f"{printable(extent.path)} cannot be read: {error.strerror or printable(error)}."
        ) from error


def decoded(blocks_NB: Tensor, kind: BlockType, cols: int, dtype: torch.dtype) -> Tensor:
    """As `dequantise`; plain numbers, which need no decoder, are a view where they are of `dtype` already."""
    floats = _FLOATS.get(kind)
    # A row of a file may begin anywhere, but numbers of two and four bytes may not.
    if floats is None or blocks_NB.data_ptr() % floats.itemsize:
        return dequantise(blocks_NB, kind, cols, dtype)
    return blocks_NB.view(floats).to(dtype)


def _fill(fd: int, part: memoryview, offset: int, extent: Extent) -> None:
    done = 0
    while done < len(part):
        count = os.preadv(fd, [part[done:]], offset + done)
        if not count:
            raise ExpertReadError(
                f"{printable(extent.path)} ends inside tensor {printable(extent.tensor)} at byte {offset + done}: it "
                "was whole when it was opened; fetch it again."
            )
        done += count


def one_row(pieces: Sequence[Tensor]) -> list[Tensor]:
    """Blocks [..., rows, row bytes] of one expert, each as [rows, row bytes]."""
    return [piece.reshape(-1, piece.shape[-1]) for piece in pieces]
