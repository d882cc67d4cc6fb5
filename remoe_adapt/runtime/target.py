"""What is asked of a dial."""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from remoe_adapt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Target:
    """strength: asked for; pressure: that it answers, None where a strength was set by hand; reason: in words; by:
    "hand" or "sensors"."""

    strength: float
    pressure: float | None
    reason: str
    by: str = "hand"


def unit(what: str, value: object) -> float:
    """A pressure or strength given by hand. Raises ConfigError for anything but a number in [0, 1]."""
    number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    if not 0.0 <= number <= 1.0:  # NaN fails too
        meaning = "0 (plenty) to 1 (thrashing)" if what == "pressure" else "0 (the base) to 1 (the strongest point)"
        raise ConfigError(f"{what} {value!r} is out of range: give a number from {meaning}.")
    return number
