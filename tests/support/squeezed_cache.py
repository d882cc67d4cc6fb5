"""A model that decodes with an expert cache beside a process that takes memory: just enough of both to close the loop.

Misses fall with the cache's size and with strength, as measured on small models (the prior takes up to 83 % of them
away); a token waits for each of them. Nothing here decides anything.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from remoe_adapt.pressure.decide import Decision
from remoe_adapt.pressure.governor import Governor
from remoe_adapt.pressure.reading import Measure, Reading

MIB = 1 << 20


@dataclass
class SqueezedCache:
    """Sizes in bytes; `taken(time_s)`: by the other process; `storage_slowdown(time_s)`: of reads, 1 = as usual.
    A Sensor, the cache's `resize`, and a dial: `apply` turns it, `tick` has a governor decide and turns it."""

    taken: Callable[[float], float] = lambda time_s: 0.0
    storage_slowdown: Callable[[float], float] = lambda time_s: 1.0
    limit: float = 4000.0 * MIB
    dense: float = 1000.0 * MIB
    allowed: float = 1600.0 * MIB
    relief: float = 0.8
    calm_wait: float = 0.6  # waiting per token in calm, in units of its compute time
    fill_bytes_per_s: float = 400.0 * MIB
    name: str = "plant"
    strength: float = 0.0
    budget: float = 0.0
    resident: float = 0.0
    time_s: float = 0.0
    killed_at_s: float | None = None
    swaps: list[tuple[float, float]] = field(default_factory=list)
    budgets: list[tuple[float, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.budget = self.resident = self.allowed

    def apply(self, strength: float) -> None:
        self.strength = strength
        self.swaps.append((self.time_s, strength))

    def tick(self, governor: Governor) -> Decision:
        decision = governor.tick(self.time_s, self.strength)
        if decision.changed:
            self.apply(decision.strength)
        return decision

    def resize(self, tier: str, budget_bytes: int) -> None:
        assert tier == "cache" and budget_bytes > 0
        self.budget = float(budget_bytes)
        self.resident = min(self.resident, self.budget)
        self.budgets.append((self.time_s, self.budget))

    @property
    def free(self) -> float:
        return self.limit - self.dense - self.taken(self.time_s) - self.resident

    @property
    def miss_rate(self) -> float:
        return min(1.0, 0.3 * (self.allowed / max(self.resident, MIB)) * (1 - self.relief * self.strength))

    @property
    def wait_ratio(self) -> float:
        """Waiting per token in units of its compute time."""
        return self.calm_wait * self.miss_rate / 0.3 * self.storage_slowdown(self.time_s)

    def pass_time(self, step_s: float) -> None:
        """Time goes by: the cache fills up, and the kernel kills when nothing is left."""
        for _ in range(20):
            self.time_s += step_s / 20
            self.resident = min(self.budget, self.resident + self.fill_bytes_per_s * step_s / 20)
            if self.free <= 0 and self.killed_at_s is None:
                self.killed_at_s = self.time_s

    def read(self, now_s: float) -> Reading:
        found: Mapping[str, tuple[float, str]] = {
            "memory.available": (20000.0 * MIB, "B"),
            "memory.total": (24000.0 * MIB, "B"),
            "cgroup.limit": (self.limit, "B"),
            "cgroup.headroom": (max(0.0, self.free), "B"),
            "process.faults": (0.0, "1/s"),
            "cache.budget": (self.budget, "B"),
            "cache.allowed": (self.allowed, "B"),
            "cache.resident": (self.resident, "B"),
            "cache.miss_rate": (self.miss_rate, "share"),
            "cache.stall_share": (self.wait_ratio / (1 + self.wait_ratio), "share"),
        }
        return Reading(now_s, {name: Measure(value, unit, now_s) for name, (value, unit) in found.items()})

    def close(self) -> None:
        """It holds nothing."""


def reversals(swaps: list[tuple[float, float]]) -> int:
    """How often the direction of a row of (time, strength) changes, from 0 on."""
    values = [0.0, *(strength for _, strength in swaps)]
    steps = [after - before for before, after in pairwise(values) if after != before]
    return sum((before > 0) != (after > 0) for before, after in pairwise(steps))
