"""What sensors say at one moment: measures with unit, time and age, and why others are missing. JSON both ways.

Every sensor gives a `Reading` of its own; `merged` joins them. Names are dotted, the sensor first: "psi.io.some".
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple

from remoe_adapt._support import parse_json, printable
from remoe_adapt.errors import ConfigError

UNITS = ("B", "B/s", "1/s", "share", "flag")


class Measure(NamedTuple):  # a sample makes dozens: tuples cost the least
    """One value. unit: one of UNITS ("share": part of 1; "flag": 0 or 1); time_s: when it was measured, on the clock of
    its reading; of a rate, the end of the time it was counted over."""

    value: float
    unit: str
    time_s: float


@dataclass(frozen=True, slots=True)
class Reading:
    """Measures by name at `time_s` (seconds on a clock that only has to run forward), and why others are missing."""

    time_s: float
    measures: Mapping[str, Measure] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # A copy behind a read-only view: a reading that the policy remembers must not change under it.
        object.__setattr__(self, "measures", MappingProxyType(dict(self.measures)))
        object.__setattr__(self, "missing", MappingProxyType(dict(self.missing)))

    def value(self, name: str) -> float | None:
        """The value of a measure, None when it is missing."""
        found = self.measures.get(name)
        return None if found is None else found.value

    def age_s(self, name: str) -> float | None:
        """How long before this reading a measure was made, None when it is missing."""
        found = self.measures.get(name)
        return None if found is None else self.time_s - found.time_s

    def to_json(self) -> str:
        """One line of JSON; `from_json` gives an equal reading. What is not finite is written as null, read as NaN."""
        measures = {
            name: {"value": _plain(measure.value), "unit": measure.unit, "time_s": _plain(measure.time_s)}
            for name, measure in self.measures.items()
        }
        whole = {"time_s": _plain(self.time_s), "measures": measures, "missing": dict(self.missing)}
        return json.dumps(whole, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Reading:
        """The reading of a `to_json` text. Raises ConfigError for anything else."""
        try:
            whole = parse_json(text, "its text")
            measures = {
                str(name): Measure(_number(found["value"]), _unit(found["unit"]), _number(found["time_s"]))
                for name, found in whole["measures"].items()
            }
            missing = {str(name): str(why) for name, why in whole["missing"].items()}
            return cls(_number(whole["time_s"]), measures, missing)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
            raise ConfigError(
                f"this is no recorded reading ({printable(reason)}): give one line of Reading.to_json."
            ) from error


def merged(time_s: float, readings: Iterable[Reading]) -> Reading:
    """One reading of several; of a name that two have, the later one's counts, and a value wins over a reason."""
    measures: dict[str, Measure] = {}
    missing: dict[str, str] = {}
    for reading in readings:
        measures.update(reading.measures)
        missing.update(reading.missing)
    return Reading(time_s, measures, {name: why for name, why in missing.items() if name not in measures})


def _plain(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | None):
        raise TypeError(f"{value!r} is not a number")
    return math.nan if value is None else float(value)


def _unit(value: Any) -> str:
    if value not in UNITS:
        raise ValueError(f"unit {value!r} is not one of {', '.join(UNITS)}")
    return str(value)
