"""A process that holds one arm of `remoe bench controller` and decodes when it is its turn: JSON lines in and out."""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers.models.auto.modeling_auto  # noqa: F401  (part of the process, not of what a model takes)

from remoe_adapt.bench import harness
from remoe_adapt.bench.controller.arms import Arm, Kind
from remoe_adapt.evaluation import Decoder

# How long `compare` waits for the dial to be at rest; then it compares nothing.
_LONGEST_WAIT_S = 30.0
# Times of one step, in the order of `Worker.decode`'s lists.
COLUMNS = ("s", "at_s", "strength", "budget_bytes", "misses")


class Text:
    """Documents as one endless row of tokens; `starts` is set on the first one of each."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self._tokens = [(token, place == 0) for ids in documents for place, token in enumerate(ids)]
        self._next = 0

    def next(self) -> tuple[int, bool]:
        """The next token, and whether it begins a document."""
        found = self._tokens[self._next % len(self._tokens)]
        self._next += 1
        return found

    def rewind(self) -> None:
        """Begin with the first one again."""
        self._next = 0


class Worker(harness.Worker):
    """Answers requests by their `op`: `load` first, then `resume`, `decode`, `pause` as turns come."""

    def __init__(self) -> None:
        self._arm: Arm | None = None
        self._decoder: Decoder | None = None

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """In inference mode, as decoding is timed."""
        with torch.inference_mode():
            return super().answer(request)

    @property
    def arm(self) -> Arm:
        """The loaded one."""
        assert self._arm is not None, "load first"
        return self._arm

    def do_load(
        self, kind: Mapping[str, Any], folder: str, documents: list[list[int]], warm: int, threads: int, options: Any
    ) -> dict[str, Any]:
        """Load an arm, fill its cache, decode `warm` tokens, and begin the text again."""
        torch.set_num_threads(threads)
        self._arm = Arm(Kind(**kind), Path(folder), options)
        self._text = Text(documents)
        for _ in range(warm):
            self._feed()
        self._text.rewind()
        source = self.arm.cache.source
        total = sum(count * size for count, size in zip(source.num_experts, source.expert_bytes, strict=True))
        return {"experts_bytes": total, "budget_bytes": self.arm.cache.budget_bytes}

    def do_resume(self) -> dict[str, Any]:
        """The arm's turn begins."""
        self.arm.resume()
        return {}

    def do_pause(self) -> dict[str, Any]:
        """The arm's turn has ended."""
        self.arm.pause()
        return {"swaps": self.arm.swaps}

    def do_fill(self) -> dict[str, Any]:
        """Read experts until the budget is full."""
        self.arm.fill()
        return {}

    def do_decode(self, tokens: int = 0, seconds: float = 0.0) -> dict[str, Any]:
        """So many tokens, and for so long at least. `steps`: a list for each of COLUMNS: seconds, seconds since this
        began, strength, the cache's budget, and misses; `monitor_cpu_s` of `seconds`."""
        arm = self.arm
        # One list a column: rows of mappings would take more time in the loop than the counters do.
        steps: list[list[float]] = [[] for _ in COLUMNS]
        gc.collect()
        gc.disable()  # a collection would be a step that takes longer
        began_s, cpu_s, missed = time.perf_counter(), arm.monitor_cpu_s(), _misses(arm)
        while len(steps[0]) < tokens or time.perf_counter() - began_s < seconds:
            begin_s = time.perf_counter()
            strength = self._feed()
            took_s = time.perf_counter() - begin_s
            before, missed = missed, _misses(arm)
            row = (took_s, begin_s - began_s, strength, arm.cache.budget_bytes, missed - before)
            for column, value in zip(steps, row, strict=True):
                column.append(value)
        gc.enable()
        return {
            "steps": dict(zip(COLUMNS, steps, strict=True)),
            "monitor_cpu_s": arm.monitor_cpu_s() - cpu_s,
            "seconds": time.perf_counter() - began_s,
            "resident_bytes": arm.cache.resident_bytes,
        }

    def do_compare(self, tokens: int) -> dict[str, Any]:
        """So many tokens, each with the dial and without, in turns: lists of `dial_s`, `dial_misses`, `bare_s` and
        `bare_misses`, in the same memory. It waits until the dial is at strength 0, and ends when that is turned."""
        arm, began_s = self.arm, time.perf_counter()
        while arm.strength > 0 and time.perf_counter() - began_s < _LONGEST_WAIT_S:
            self._feed()
        found: dict[str, list[float]] = {key: [] for key in ("dial_s", "dial_misses", "bare_s", "bare_misses")}
        decoders = dict[str, Decoder]()
        gc.collect()
        gc.disable()
        for place in range(tokens):
            if arm.strength > 0:
                break
            token, starts = self._text.next()
            # Two caches of the same tokens: with one, whoever comes second would see the token twice.
            if starts or not decoders:
                decoders = {kind: Decoder(arm.model) for kind in ("dial", "bare")}
            # Twice in one order, twice in the other: who comes second finds caches warm.
            for kind in ("dial", "bare") if place % 4 < 2 else ("bare", "dial"):
                with nullcontext() if kind == "dial" else arm.bare():
                    missed, begin_s = _misses(arm), time.perf_counter()
                    with arm.step() if kind == "dial" else nullcontext():
                        decoders[kind].feed([token])
                    found[f"{kind}_s"].append(time.perf_counter() - begin_s)
                    found[f"{kind}_misses"].append(_misses(arm) - missed)
        gc.enable()
        return found

    def do_watch(self, seconds: float) -> dict[str, Any]:
        """Decode so long under the monitor: `s` and `at_s` of every step, `ran`: the monitor's thread ran in it, and
        its `monitor_cpu_s` of `seconds`."""
        arm = self.arm
        rows: list[tuple[float, float, bool]] = []
        arm.resume()
        gc.collect()
        gc.disable()
        began_s, began_cpu_s = time.perf_counter(), arm.monitor_cpu_s()
        cpu_s = began_cpu_s
        while (begin_s := time.perf_counter()) - began_s < seconds:
            self._feed()
            took_s = time.perf_counter() - begin_s
            before_s, cpu_s = cpu_s, arm.monitor_cpu_s()
            rows.append((took_s, begin_s - began_s, cpu_s > before_s))
        gc.enable()
        passed_s = time.perf_counter() - began_s
        arm.pause()
        columns = dict(zip(("s", "at_s", "ran"), zip(*rows, strict=True), strict=True))
        return {**columns, "monitor_cpu_s": cpu_s - began_cpu_s, "seconds": passed_s}

    def _feed(self) -> float:
        """Decode the next token of the text; the strength it was decoded at."""
        token, starts = self._text.next()
        if starts or self._decoder is None:
            self._decoder = Decoder(self.arm.model)
        with self.arm.step():
            strength = self.arm.strength
            self._decoder.feed([token])
        return strength


def _misses(arm: Arm) -> int:
    total: int = arm.cache.stats()["misses"]
    return total


if __name__ == "__main__":
    harness.speak(Worker().answer)
