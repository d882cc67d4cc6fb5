"""How a user is told: things to hear once, through the logger `remoe_adapt`, and sizes as text."""

from __future__ import annotations

import logging
from functools import lru_cache

_logger = logging.getLogger("remoe_adapt")


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Log a warning, the first time it comes."""
    _logger.warning(message)


def size_text(size_bytes: float) -> str:
    """Bytes in the largest of B, KiB, MiB and GiB that is not more than they are."""
    for unit, digits, unit_bytes in (("GiB", 2, 1 << 30), ("MiB", 1, 1 << 20), ("KiB", 1, 1 << 10)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"
