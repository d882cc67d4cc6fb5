"""Small kernel files that are read over and over: kept open, read by pread; and rates of what they count."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

from remoe_adapt._support import printable, say_once
from remoe_adapt.pressure.reading import Measure

# The largest of them, memory.stat, has some 2 KiB.
_READ_BYTES = 1 << 16
FIRST_SAMPLE = "a rate needs a second sample"
Measures = dict[str, Measure]
Missing = dict[str, str]


class PolledFile:
    """A file of /proc or /sys that stays open. Every read sees it as it is then.

    After a fork the child opens its own: what was opened below /proc/self tells of the process that opened it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor, self._owner = -1, 0

    def read(self) -> str:
        """The text. Raises OSError."""
        if self._descriptor >= 0 and self._owner == os.getpid():
            try:
                return os.pread(self._descriptor, _READ_BYTES, 0).decode("utf-8", "surrogateescape")
            except OSError:  # its group or process is gone; the path may name another one by now
                pass
        self.close()
        self._descriptor, self._owner = os.open(self.path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)), os.getpid()
        return os.pread(self._descriptor, _READ_BYTES, 0).decode("utf-8", "surrogateescape")

    def close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


class Rates:
    """Counters -> growth per second since the last call; none at first, after a counter or the clock went back."""

    def __init__(self) -> None:
        self._before: tuple[float, dict[str, float]] | None = None

    def add(self, now_s: float, counters: Mapping[str, float], unit: str, measures: Measures, missing: Missing) -> None:
        """Put the rates among the measures by their counters' names, or say why there are none. No share is above 1."""
        before, self._before = self._before, (now_s, dict(counters))
        grown: dict[str, float] = {}
        if before is not None and now_s > before[0] and before[1].keys() == counters.keys():
            grown = {name: counter - before[1][name] for name, counter in counters.items()}
        if before is None or not grown or min(grown.values()) < 0:
            missing.update(dict.fromkeys(counters, FIRST_SAMPLE))
            return
        # A counter may run ahead of the clock that it is divided by, so that a share of time would be 1.01.
        most = 1.0 if unit == "share" else math.inf
        for name, more in grown.items():
            measures[name] = Measure(min(most, more / (now_s - before[0])), unit, now_s)


def count(text: str, path: Path) -> int:
    """A count of the kernel's. Raises ValueError, as `garbage`, for anything but decimal digits of less than 64 bits:
    a negative or endless number would be weighed as if memory were gone."""
    if len(text) > 20 or not (text.isascii() and text.isdigit()) or int(text) >> 64:
        raise garbage(path, text)
    return int(text)


def garbage(path: Path, text: str) -> ValueError:
    """The error of a file that holds what the kernel never writes; it is logged once for each file."""
    where = printable(path)
    say_once(f"{where} holds no count where the kernel writes one: what it tells is left out until it does.")
    return ValueError(f"{where} holds {printable(text[:40])!r}, which is no count")


def reason(error: Exception) -> str:
    """Why a file could not be read, in words."""
    if isinstance(error, OSError):
        return f"{error.filename or 'the file'}: {error.strerror or error}"
    return f"{type(error).__name__}: {error}"
