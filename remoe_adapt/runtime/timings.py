"""How long swaps, their staging and decoding steps take: the last of each, and medians."""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections import deque
from typing import Any

_KEPT, _KEPT_STEPS = 1000, 64
_SHOWN_DIGITS, _LEAST_PLACES = 6, 3


def rounded(value: Any) -> Any:
    """JSON-ready values with their floats to six digits, and to three decimals at least: for people and logs."""
    if isinstance(value, float) and math.isfinite(value) and value:
        return round(value, max(_LEAST_PLACES, _SHOWN_DIGITS - 1 - math.floor(math.log10(abs(value)))))
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, list | tuple) else value


class _Here(threading.local):
    began_s: float | None = None


class Timings:
    """Of one dial, in ms; any thread may call anything."""

    def __init__(self) -> None:
        self.swap_ms: deque[float] = deque(maxlen=_KEPT)
        self.stage_ms: deque[float] = deque(maxlen=_KEPT)
        self._step_ms: deque[float] = deque(maxlen=_KEPT_STEPS)
        self._here = _Here()

    def step_begins(self) -> None:
        """A decoding step of this thread begins; the one before it has taken until now."""
        now_s, began_s = time.perf_counter(), self._here.began_s
        if began_s is not None:
            self._step_ms.append((now_s - began_s) * 1e3)
        self._here.began_s = now_s

    def steps_end(self) -> None:
        """What comes before this thread's next step is no step."""
        self._here.began_s = None

    @property
    def tpot_ms(self) -> float | None:
        """Median of the last steps of all threads; None before the second."""
        steps = list(self._step_ms)
        return statistics.median(steps) if steps else None

    def status(self) -> dict[str, float | None]:
        """JSON-ready: `swap_ms` and `stage_ms`, the last ones, each with `..._median`, and `tpot_ms`."""
        found: dict[str, float | None] = {}
        for key, kept in (("swap_ms", self.swap_ms), ("stage_ms", self.stage_ms)):
            values = list(kept)
            found[key] = values[-1] if values else None
            found[f"{key}_median"] = statistics.median(values) if values else None
        return found | {"tpot_ms": self.tpot_ms}
