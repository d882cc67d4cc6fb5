"""What `remoe bench controller` compares: the same model behind the same expert cache, under different hands."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from remoe_adapt.bench.harness import PacedReads
from remoe_adapt.device_profile import (
    ControllerProfile,
    DeviceProfile,
    ExpertCacheProfile,
    MemoryProfile,
    StrengthProfile,
)
from remoe_adapt.dial import Controller, Monitor, get_remoe_model
from remoe_adapt.expert_cache import expert_cache_of, load_with_expert_cache
from remoe_adapt.libraries import Patches, replace_module
from remoe_adapt.recency_settings import Recency
from remoe_adapt.tuner import RemoeLayer

# The dial turns both levers: the family's routers and, up to this gain at strength 1, a recency prior. The prior
# remembers which experts the last tokens had, not which are resident: a recorded run is replayed without its cache.
PRIOR_GAIN = 0.3
SAMPLE_HZ = 5.0
_MONITOR_THREAD = "remoe-monitor"


def bench_profile(gain: float = PRIOR_GAIN) -> DeviceProfile:
    """The shipped profiles' controller on a shorter scale: here a squeeze lasts half a minute, so calm counts after
    seconds. The curve ends at strength 1; the reserve outlasts three samples at the squeezer's pace. gain: of the
    prior at strength 1; 0: the adapters alone."""
    return DeviceProfile(
        name="bench-controller",
        description="A small cache whose memory another process takes for half a minute at a time",
        memory=MemoryProfile(budget_bytes=None, reserve_bytes=64 << 20),
        expert_cache=ExpertCacheProfile(
            share=0.8, policy="lrfu", scope="global", prefetch=False, direct_io=True, floor=0.1, regrow_s=2.0
        ),
        strength=StrengthProfile(curve=((0.0, 0.0), (0.5, 0.5), (0.8, 1.0))),
        controller=ControllerProfile(sample_hz=SAMPLE_HZ, rise_s=0.2, fall_s=2.0, dwell_s=0.5, deadband=0.05),
        recency=Recency.of("ema", gain) if gain else None,
    )


@dataclass(frozen=True)
class Kind:
    """dial: the routers have one; strength: pinned by hand, None: the sensors turn it; mover: the cache's budget
    follows memory."""

    dial: bool = True
    strength: float | None = None
    mover: bool = True


def kinds(strengths: tuple[float, ...]) -> dict[str, Kind]:
    """Arms by name."""
    fixed = {f"fixed_{round(100 * strength)}": Kind(strength=strength) for strength in strengths}
    return {**fixed, "adaptive": Kind(), "no_controller": Kind(dial=False), "fixed_budget": Kind(False, None, False)}


class Arm:
    """One loaded model of a kind; `pause` and `resume` are the waiting for its turn: no thread of it samples."""

    def __init__(self, kind: Kind, folder: Path, options: Mapping[str, Any]) -> None:
        pace = options["read_bytes_per_s"]
        profile = bench_profile(options["gain"])
        settings = profile.expert_cache
        model = load_with_expert_cache(
            folder,
            options["share"],
            storage=options["pack"],
            policy=settings.policy,
            scope=settings.scope,
            direct_io=settings.direct_io,
            threads=options["read_threads"],
            reader=PacedReads(pace) if pace else os.preadv,
        )
        self.model: nn.Module = model.eval()
        cache = expert_cache_of(model)
        assert cache is not None
        self.cache, self.controller = cache, None
        self._mover: Monitor | None = None
        if kind.dial:
            self.controller = dialled(model, options["family"], profile)
            if kind.strength is not None:
                self.controller.set_strength(kind.strength)
        elif kind.mover:
            self._mover = Monitor(model, profile)
        self.fill()
        gc.collect()
        gc.freeze()

    def fill(self) -> None:
        """As many experts as fit, of every layer the same part."""
        source, left = self.cache.source, self.cache.budget_bytes
        for expert in range(max(source.num_experts)):
            for layer, count in enumerate(source.num_experts):
                left -= source.expert_bytes[layer]
                if expert < count and left >= 0:
                    self.cache.lease(layer, [expert]).release()

    @property
    def strength(self) -> float:
        """The one that is live."""
        return 0.0 if self.controller is None else self.controller.strength

    @property
    def swaps(self) -> int:
        """So far."""
        return 0 if self.controller is None else self.controller.status()["swaps"]

    def step(self) -> AbstractContextManager[None]:
        """Around one forward."""
        return nullcontext() if self.controller is None else self.controller.step()

    @contextmanager
    def bare(self) -> Iterator[None]:
        """The same model in the same memory with its own routers: as without a controller, but for the mover."""
        assert self.controller is not None, "this arm has no dial to be without"
        prior = self.controller._prior
        wrapped = {name: module for name, module in self.model.named_modules() if isinstance(module, RemoeLayer)}
        with Patches(*(replace_module(self.model, name, layer.base_layer) for name, layer in wrapped.items())):
            if prior is not None:
                prior.installed.enable(False)
            try:
                yield
            finally:
                if prior is not None:
                    prior.installed.enable(True)

    def resume(self) -> None:
        """Its turn: the monitor samples, where it has one."""
        if self.controller is not None:
            self.controller.resume()
        elif self._mover is not None:
            self._mover.resume()

    def pause(self) -> None:
        """Another one's turn."""
        if self.controller is not None:
            self.controller.pause()
        elif self._mover is not None:
            self._mover.stop()

    def monitor_cpu_s(self) -> float:
        """CPU time that the monitor's thread has taken since `resume`, by the kernel's account; 0 without one."""
        ids = [thread.native_id for thread in threading.enumerate() if thread.name == _MONITOR_THREAD]
        paths = [Path(f"/proc/self/task/{number}/schedstat") for number in ids]
        return sum(int(path.read_text(encoding="ascii").split()[0]) for path in paths if path.exists()) * 1e-9


def dialled(model: nn.Module, family: str, profile: DeviceProfile) -> Controller:
    """The dial of the benchmark on a model, unmonitored; the family was checked on the model as it is stored."""
    made: Controller = get_remoe_model(model, profile, family, force=True, monitor=False).controller
    return made
