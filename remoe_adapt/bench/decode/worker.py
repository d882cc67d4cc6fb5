"""A process that holds one regime of `remoe bench decode` and decodes what it is told: JSON lines in, JSON lines out.

Its stdout is the protocol's alone; what libraries print goes to stderr. It ends when its stdin does.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto  # noqa: F401  (part of the process, not of what a model takes)

from remoe_adapt._support import disk_reads
from remoe_adapt.bench import harness
from remoe_adapt.bench.decode.llamacpp import LlamaCpp
from remoe_adapt.bench.decode.regimes import AccelerateDisk, Cached, Mapped, Regime, Stock, TransformersDisk, Whole
from remoe_adapt.dial import profile_of
from remoe_adapt.evaluation import score
from remoe_adapt.evaluation.planning import Planner, PlanOptions

REGIMES: dict[str, type[Regime]] = {
    "stock": Stock, "whole": Whole, "cached": Cached, "mapped": Mapped, "accelerate": AccelerateDisk,
    "transformers": TransformersDisk, "llamacpp": LlamaCpp,
}  # fmt: skip


class Worker(harness.Worker):
    """Answers requests: `load` once, then any number of `decode`; or any number of `read`, for the raw bandwidth; or
    `plan`, and then any number of `measure`."""

    def __init__(self) -> None:
        self._regime: Regime | None = None
        self._before_bytes = 0
        self._raw: harness.RawReads | None = None
        self._planner: Planner | None = None

    def do_read(self, file: str, read_bytes: int, threads: int, bursts: Sequence[int]) -> dict[str, Any]:
        """Time these bursts of reads; the figures are of all requests so far."""
        if self._raw is None:
            self._raw = harness.RawReads(Path(file), read_bytes, threads)
        self._raw.replay(bursts)
        return {"bytes_per_s": self._raw.bytes_per_s, "direct": self._raw.direct, "read_bytes": self._raw.read_bytes}

    def do_plan(self, model: str, threads: int, storage: str | None, trace: str, **options: Any) -> dict[str, Any]:
        """Begin a plan; `options` of `PlanOptions`. Its storage is measured now."""
        torch.set_num_threads(threads)
        pack = None if storage is None else Path(storage)
        self._planner = Planner(PlanOptions(model, profile_of(None), storage=pack, trace=Path(trace), **options))
        return {}

    def do_measure(self, rounds: int) -> dict[str, Any]:
        """The plan by so many more rounds of measurement."""
        assert self._planner is not None
        for _ in range(rounds):
            self._planner.measure()
        return self._planner.plan()

    def do_load(self, regime: str, folder: str, threads: int, options: Mapping[str, Any]) -> dict[str, Any]:
        """Make this process a regime; what it says of itself."""
        torch.set_num_threads(threads)
        self._before_bytes = anonymous_bytes()
        self._regime = REGIMES[regime](Path(folder), options)
        if self._regime.model is not None:
            self._regime.model.eval()
        gc.collect()
        gc.freeze()  # collections between documents need not look at the model again
        return {**self._regime.facts, "anon_growth_bytes": anonymous_bytes() - self._before_bytes}

    def do_decode(self, arm: Mapping[str, Any], ids: Sequence[int], prompt: int, max_seconds: float) -> dict[str, Any]:
        """Feeds `prompt` tokens at once, then one at a time until `max_seconds` are over; the last is only a target.

        `steps` holds for each token fed: `s`, `nll` of the next one (nats), what the kernel read from disk for this
        process (`io_bytes`) and its major faults, and with a cache `hits`, `misses` of each layer, `bytes`, `stall_s`.
        """
        regime = self._regime
        assert regime is not None and 0 < prompt < len(ids) - 1
        regime.use(arm)
        gc.collect()
        gc.disable()  # a collection would be a step that takes longer
        steps: list[dict[str, Any]] = []
        with torch.inference_mode():
            decoder = regime.decoder()
            with regime.between_steps():
                decoder.feed(ids[:prompt])
            deadline_s = time.perf_counter() + max_seconds
            counted = self._counters()
            for token, target in zip(ids[prompt:-1], ids[prompt + 1 :], strict=True):
                begin_s = time.perf_counter()
                if begin_s > deadline_s and steps:
                    break
                with regime.between_steps():
                    logits_V = decoder.feed([token])
                took_s = time.perf_counter() - begin_s
                # Read outside of the timed part: each of these files takes the kernel some time.
                before, counted = counted, self._counters()
                steps.append(
                    {
                        "s": took_s,
                        "nll": float(score(logits_V[None], torch.tensor([target]))[0]),
                        **_difference(counted, before),
                    }
                )
        gc.enable()
        return {"steps": steps, "anon_growth_bytes": anonymous_bytes() - self._before_bytes}

    def _counters(self) -> dict[str, Any]:
        found: dict[str, Any] = dict(zip(("io_bytes", "major_faults"), disk_reads(), strict=True))
        if self._regime is not None and self._regime.cache is not None:
            stats = self._regime.cache.stats()
            found |= {key: stats[key] for key in ("hits", "bytes", "stall_s")}
            found["misses"] = [layer["misses"] for layer in stats["layers"]]
            found["prefetch_hits"] = stats.get("prefetch_hits", 0)
        return found


def anonymous_bytes() -> int:
    """Anonymous memory of this process, by the kernel's account."""
    # The kernel's sum over all maps; a resident size would count the page cache of mapped weights too.
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10


def _difference(now: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    def since(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [after - then for after, then in zip(value, before[key], strict=True)]
        return value - before[key]

    return {key: since(key, value) for key, value in now.items()}


if __name__ == "__main__":
    harness.speak(Worker().answer)
