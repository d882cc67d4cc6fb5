"""How much of a mapped file is in memory, as the kernel tells it."""

from __future__ import annotations

import ctypes as C
import mmap
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from remoe_adapt.engines.llamacpp.residency import is_told

_PIECE_BYTES = 1 << 30


def share_in_memory(paths: Sequence[Path]) -> float | None:
    """The share of these files' pages in the page cache; None where it is not told."""
    if not hasattr(C.CDLL(None), "mincore"):
        return None
    pages = resident = 0
    for path in paths:
        try:
            if not is_told(path):
                return None
            with path.open("rb") as file:
                found = [_resident(file.fileno(), begin, path) for begin in range(0, path.stat().st_size, _PIECE_BYTES)]
        except (OSError, ValueError):
            return None
        if None in found:
            return None
        pages += sum(each[1] for each in found if each)
        resident += sum(each[0] for each in found if each)
    return resident / pages if pages else None


def _resident(file: int, begin: int, path: Path) -> tuple[int, int] | None:
    """(pages in memory, pages) of a piece of the file; mapping it reads nothing."""
    size = min(_PIECE_BYTES, path.stat().st_size - begin)
    with mmap.mmap(file, size, prot=mmap.PROT_READ, offset=begin) as mapped:
        bytes_N = np.frombuffer(mapped, np.uint8)
        pages = -(-size // mmap.PAGESIZE)
        seen_P = np.zeros(pages, np.uint8)
        call = C.CDLL(None, use_errno=True).mincore
        call.argtypes = [C.c_void_p, C.c_size_t, C.c_void_p]
        failed = call(bytes_N.ctypes.data, size, seen_P.ctypes.data)
        del bytes_N  # or the map could not be closed
    return None if failed else (int((seen_P & 1).sum()), pages)
