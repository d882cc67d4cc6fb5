"""What swaps of `remoe watch --live` do to tokens that llama.cpp is computing: `python benchmarks/run.py live_swap`.

Writes results/live_swap_cpu.csv; this file by itself is the worker process. A process decodes single tokens, each from
an empty cache, so that every answer should be that of one strength; another one swaps the routers of the mapped file
between strength 0 and 1. A token whose logits are of neither strength is torn: a swap came while it was computed. One
row per pause between swaps, 0 being as fast as they can be written; the model is that of llamacpp.py, all of it in
memory. Settings: NAME=VALUE of `Options`.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from llamacpp import Options as ModelOptions
from llamacpp import prepare, windows_of
from numpy.typing import NDArray

from remoe_adapt.bench.harness import process as protocol
from remoe_adapt.bench.harness.process import WorkerProcess
from remoe_adapt.bench.harness.results import REPO_ROOT
from remoe_adapt.engines.gguf.live import LiveRouters
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.llamacpp.in_process import LlamaModel
from remoe_adapt.family import TRAINED, Family

FAMILY = REPO_ROOT / "examples" / "tiny_moe" / "family" / TRAINED
STRENGTHS = (0.0, 1.0)
# The engine computes the same numbers again to the last bit; strengths differ by far more.
_SAME, _APART = 1e-5, 1e-2


@dataclass(frozen=True, kw_only=True)
class Options:
    """seconds: of each row, longer pauses than that are left out; texts: different tokens that are decoded in turn."""

    work: str = "/tmp"
    seconds: float = 15.0
    texts: int = 24


class Worker:
    """Maps the file and decodes tokens, each by itself."""

    def answer(self, request: Any) -> dict[str, Any]:
        if request["op"] == "load":
            self._model = LlamaModel(request["model"], context_tokens=8, load_mode="mmap", repack=False)
            self._ids: list[int] = request["ids"]
            self._known: list[list[NDArray[np.float32]]] = []
            return {}
        if request["op"] == "learn":
            self._known.append([self._logits(token) for token in self._ids])
            return {}
        apart = [
            number
            for number, pair in enumerate(zip(*self._known, strict=True))
            if np.abs(pair[0] - pair[1]).max() > _APART
        ]
        counts, torn_kl, begin_s = [0, 0, 0], [], time.perf_counter()
        while time.perf_counter() - begin_s < request["seconds"]:
            number = apart[sum(counts) % len(apart)]
            logits, known = self._logits(self._ids[number]), [each[number] for each in self._known]
            kind = next((n for n, one in enumerate(known) if np.abs(one - logits).max() <= _SAME), 2)
            counts[kind] += 1
            if kind == 2:
                torn_kl.append(min(kl(one, logits) for one in known))
        took_s = time.perf_counter() - begin_s
        return {
            "tokens": sum(counts),
            "base": counts[0],
            "strongest": counts[1],
            "torn": counts[2],
            "ms_per_token": 1e3 * took_s / sum(counts),
            "torn_kl": statistics.fmean(torn_kl) if torn_kl else 0.0,
            "strengths_kl": statistics.fmean(kl(self._known[0][n], self._known[1][n]) for n in apart),
        }

    def _logits(self, token: int) -> NDArray[np.float32]:
        self._model.clear()
        logits_V: NDArray[np.float32] = self._model.decode([token])[0]
        return logits_V


def kl(logits_V: NDArray[np.float32], other_V: NDArray[np.float32]) -> float:
    """KL divergence in nats of the second distribution from the first."""
    first, second = (np.asarray(x, np.float64) - np.logaddexp.reduce(x.astype(np.float64)) for x in (logits_V, other_V))
    return float((np.exp(first) * (first - second)).sum())


class Swapper(threading.Thread):
    """Swaps to and fro until `stop`, with a pause after each; `swaps_ms` is how long each wrote."""

    def __init__(self, routers: LiveRouters, pause_s: float) -> None:
        super().__init__()
        self._routers, self._pause_s, self._over = routers, pause_s, threading.Event()
        self.swaps_ms: list[float] = []

    def run(self) -> None:
        while not self._over.wait(self._pause_s):
            self._routers.write(STRENGTHS[len(self.swaps_ms) % 2])
            self.swaps_ms.append(1e3 * (self._routers.swap_s or 0.0))

    def stop(self) -> None:
        self._over.set()
        self.join()


def run(options: Options, pauses_s: tuple[float, ...] = (0.0, 0.1, 0.5, 2.0)) -> list[dict[str, Any]]:
    source, _, _ = prepare(ModelOptions(work=options.work))
    (ids, *_) = windows_of(ModelOptions(window=options.texts, quality_tokens=options.texts))
    family, folder = Family.load(FAMILY), source.parent / "split"
    first = folder / "m-00001-of-00002.gguf"
    if not first.exists():
        split_gguf(source, family, 0.0, folder / "m.gguf")
    routers = LiveRouters(first, family)
    worker = WorkerProcess("llama.cpp", command=[sys.executable, __file__])
    rows = []
    try:
        worker.ask("load", model=str(first), ids=ids)
        for strength in STRENGTHS:
            routers.write(strength)
            worker.ask("learn")
        for pause_s in (pause_s for pause_s in pauses_s if pause_s < options.seconds):
            swapper = Swapper(routers, pause_s)
            swapper.start()
            try:
                found = worker.ask("decode", seconds=options.seconds)
            finally:
                swapper.stop()
            swaps = len(swapper.swaps_ms)
            rows.append(
                {
                    "pause_s": pause_s,
                    "swaps": swaps,
                    "swap_ms": statistics.median(swapper.swaps_ms),
                    "swap_ms_max": max(swapper.swaps_ms),
                    **found,
                    "torn_share": found["torn"] / found["tokens"],
                    "torn_per_swap": found["torn"] / swaps,
                }
            )
    finally:
        worker.close()
        routers.close()
    return rows


if __name__ == "__main__":
    protocol.speak(Worker().answer)
