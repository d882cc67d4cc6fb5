"""Sensors that need torch or the expert cache: GPU memory, and what the cache misses, reads and waits for."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import torch
from torch import nn

from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache import ExpertCache, domains_of, least_budget
from remoe_adapt.pressure import FIRST_SAMPLE, PROC, Measure, Reading, Sensor, Sensors, os_sensors

# Rates of the cache are of the last second: at some tokens per second a shorter time holds no token.
WINDOW_S = 1.0
# These only grow, so that their differences are what happened in between.
_COUNTERS = ("hits", "misses", "bytes", "stall_s")


class GpuMemory:
    """gpu.free, gpu.total (of the device), gpu.allocated (by tensors of this process), gpu.reusable (held by torch's
    allocator for the next tensors), all B; gpu.unified (flag: CPU and GPU share one memory, as on a Jetson).

    device: a CUDA device, None: the current one. Reading it makes a CUDA context where there is none yet.
    """

    name = "gpu"

    def __init__(self, device: torch.device | str | int | None = None, proc: Path = PROC) -> None:
        self._device, self._compatible = device, proc / "device-tree/compatible"

    def read(self, now_s: float) -> Reading:
        if not torch.cuda.is_available():
            why = "torch has no CUDA" if torch.version.cuda is None else "torch sees no CUDA device"
            return Reading(now_s, {}, {self.name: why})
        free, total = torch.cuda.mem_get_info(self._device)
        allocated = torch.cuda.memory_allocated(self._device)
        sizes = {"free": free, "total": total, "allocated": allocated}
        # What torch's allocator keeps counts as free for us, though the driver says that it is taken.
        sizes["reusable"] = max(0, torch.cuda.memory_reserved(self._device) - allocated)
        found = {f"gpu.{name}": Measure(size, "B", now_s) for name, size in sizes.items()}
        return Reading(now_s, found | {"gpu.unified": Measure(float(self._is_unified()), "flag", now_s)})

    def free_bytes(self, now_s: float) -> float:
        """What a tensor could take: gpu.free and gpu.reusable."""
        # One call of the driver; the rest is torch's own count.
        free, _ = torch.cuda.mem_get_info(self._device)
        return float(free + torch.cuda.memory_reserved(self._device) - torch.cuda.memory_allocated(self._device))

    def _is_unified(self) -> bool:
        # Older torch does not say it, and a Tegra's device tree does.
        facts = torch.cuda.get_device_properties(self._device)
        try:
            return bool(getattr(facts, "is_integrated", 0)) or b"tegra" in self._compatible.read_bytes()
        except OSError:
            return False

    def close(self) -> None:
        """It holds nothing."""


class CacheUse:
    """What an expert cache does: cache.miss_rate, cache.stall_share (share), cache.read (B/s) over the last second, and
    cache.budget, cache.allowed, cache.resident (B), cache.on_gpu (flag); below.budget, .allowed, .resident of the RAM
    tier under a GPU's.

    `allowed_bytes` is the budget that counts as whole; None: what it was at first, or what others than `resize` here
    have set since (a budget set by hand is no loss, and is not grown beyond).
    """

    name = "cache"

    def __init__(self, cache: ExpertCache) -> None:
        self._cache = cache
        self.allowed_bytes: int | None = None
        # By tier: the whole budget, and the one that is expected.
        self._whole: dict[str, int] = {}
        self._expected: dict[str, int] = {}
        self._samples: deque[tuple[float, dict[str, float]]] = deque()

    def read(self, now_s: float) -> Reading:
        stats = self._cache.stats(layers=False)
        measures = self._sizes("cache", stats, self.allowed_bytes, now_s)
        if stats.get("below"):
            measures |= self._sizes("below", stats["below"], None, now_s)
            measures["cache.on_gpu"] = Measure(1.0, "flag", now_s)
        missing: dict[str, str] = {}
        grown, passed_s = self._grown({name: float(stats[name]) for name in _COUNTERS}, now_s)
        if grown is None:
            missing = dict.fromkeys(("cache.miss_rate", "cache.stall_share", "cache.read"), FIRST_SAMPLE)
            return Reading(now_s, measures, missing)
        measures["cache.read"] = Measure(grown["bytes"] / passed_s, "B/s", now_s)
        # Several threads wait at a time, and a wait that began before the window counts where it ends.
        measures["cache.stall_share"] = Measure(min(1.0, grown["stall_s"] / passed_s), "share", now_s)
        # Without a look-up there is no rate, and 0 would read as if nothing were missed.
        look_ups = grown["hits"] + grown["misses"]
        if look_ups:
            measures["cache.miss_rate"] = Measure(grown["misses"] / look_ups, "share", now_s)
        else:
            missing["cache.miss_rate"] = "no token was decoded lately"
        return Reading(now_s, measures, missing)

    def _sizes(self, tier: str, stats: dict[str, int], allowed: int | None, now_s: float) -> dict[str, Measure]:
        budget, asked = stats["budget_bytes"], stats["asked_bytes"]
        # Somebody else has called `resize`: what a user set is whole from now on, and no loss to be regrown.
        if asked != self._expected.get(tier):
            self._whole[tier] = self._expected[tier] = asked
        found = {"budget": budget, "allowed": allowed or self._whole[tier], "resident": stats["resident_bytes"]}
        return {f"{tier}.{name}": Measure(size, "B", now_s) for name, size in found.items()}

    def _grown(self, counters: dict[str, float], now_s: float) -> tuple[dict[str, float] | None, float]:
        """Growth since the oldest sample of the window, and the seconds between; None when there is none to compare."""
        samples = self._samples
        if samples and (now_s <= samples[-1][0] or min(counters[n] - samples[-1][1][n] for n in _COUNTERS) < 0):
            samples.clear()  # the clock went back, or the counters started again
        samples.append((now_s, counters))
        # One sample at or before the window's begin stays, else the window would be a sample too short.
        while len(samples) > 2 and now_s - samples[1][0] >= WINDOW_S - 1e-9:
            samples.popleft()
        if len(samples) < 2:
            return None, math.nan
        began_s, before = samples[0]
        return {name: counters[name] - before[name] for name in _COUNTERS}, now_s - began_s

    def close(self) -> None:
        """It holds nothing."""

    def resize(self, tier: str, budget_bytes: int) -> None:
        """Give a tier ("cache" or "below") another budget, or the least that holds one expert; what a `Governor` calls.
        It never waits: what is leased counts until its lease ends. Raises ConfigError when there is no such tier."""
        cache = self._cache if tier == "cache" else getattr(self._cache, "below", None)
        if cache is None:
            raise ConfigError(f"this expert cache has no tier {tier!r}")
        # A cache that cannot hold one expert would refuse, and the policy would ask for the same again at every sample.
        budget_bytes = max(budget_bytes, least_budget(cache.source, domains_of(cache.source, cache.scope)))
        cache.resize(budget_bytes, wait=False)
        # After the call: what the cache refuses is no budget of ours.
        self._expected[tier] = budget_bytes


def model_sensors(model: nn.Module, *, cache_use: CacheUse | None) -> Sensors:
    """Every sensor that says something about a model: the system's, its GPU's, and that of its expert cache."""
    sensors: list[Sensor] = os_sensors()
    device = next((p.device for p in model.parameters() if p.device.type == "cuda"), None)
    if device is not None:
        sensors.append(GpuMemory(device))
    if cache_use is not None:
        sensors.append(cache_use)
    return Sensors(sensors)
