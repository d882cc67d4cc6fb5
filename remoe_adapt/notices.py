"""Things a user should hear once, through the logger `remoe_adapt`."""

from __future__ import annotations

import logging
from functools import lru_cache

_logger = logging.getLogger("remoe_adapt")


@lru_cache(maxsize=1024)
def say_once(message: str) -> None:
    """Log a warning, the first time it comes."""
    _logger.warning(message)
