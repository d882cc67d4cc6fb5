"""Freed host memory kept for the next allocation of the same size, while the same steps run over and over.

glibc gives every large block back to the system when it is freed, so each step of a CPU model pays for its activations
in page faults: a third of a training step's time.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# mallopt(3): parameter -> (while kept, afterwards). A call ends glibc's own adjusting of its thresholds, so those
# stay where that would have ended.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -2, -3, -4
_SETTINGS = {
    _MMAP_MAX: (0, 65536),
    _MMAP_THRESHOLD: (32 << 20, 32 << 20),
    _TRIM_THRESHOLD: (2**31 - 1, 64 << 20),
    _TOP_PAD: (64 << 20, 128 << 10),
}


@contextmanager
def freed_memory_kept(device_type: str = "cpu") -> Iterator[None]:
    """Within: the allocator keeps what is freed; afterwards free pages go back to the system.

    Does nothing for models on another device, and without glibc (`mallopt`). It counts for the whole process.
    """
    libc = ctypes.CDLL(None) if device_type == "cpu" and sys.platform == "linux" else None
    if libc is None or not hasattr(libc, "mallopt") or not hasattr(libc, "malloc_trim"):
        yield
        return
    for parameter, (kept, _) in _SETTINGS.items():
        libc.mallopt(parameter, kept)
    try:
        yield
    finally:
        for parameter, (_, after) in _SETTINGS.items():
            libc.mallopt(parameter, after)
        libc.malloc_trim(ctypes.c_size_t(0))


def return_freed_memory() -> None:
    """What the allocator holds back of freed memory goes to the system now; nothing without glibc."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(ctypes.c_size_t(0))
