"""Decoding with a dial, watched: what tests of the controller and of its gate share."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.tuner.layer import remoe_layers

IDS = torch.tensor([[5, 17, 42, 8]])


def generate(model: PeftModel, tokens: int = 8, **kwargs: Any) -> Any:
    return model.generate(input_ids=IDS, max_new_tokens=tokens, do_sample=False, pad_token_id=0, **kwargs)


class Each(LogitsProcessor):
    """Runs `action(step)` after every forward of a generate call."""

    def __init__(self, action: Callable[[int], None]) -> None:
        self.action, self.step = action, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.action(self.step)
        self.step += 1
        return scores


def each(action: Callable[[int], None]) -> LogitsProcessorList:
    return LogitsProcessorList([Each(action)])


class Watch:
    """Records, for every forward, the strength that each router's live weight is at, when that router runs."""

    def __init__(self, model: PeftModel, family: Family, strengths: list[float]) -> None:
        self.lock, self.current = threading.Lock(), threading.local()
        self.forwards: list[list[float]] = []
        base = {name: weight.detach().clone() for name, weight in original_weights(model).items()}
        layers = remoe_layers(model)
        for name, layer in layers.items():
            # One column of a weight tells the strength; all of it is compared.
            known = {s: family.live(s, base)[name] for s in strengths}
            layer.register_forward_pre_hook(self._see(known, layer, first=name == next(iter(layers))))
        self.count = len(layers)

    def _see(self, known: dict[float, Tensor], layer: Any, *, first: bool) -> Any:
        def see(*_: Any) -> None:
            live = layer.base_weight_ED
            found = next((s for s, weight in known.items() if torch.equal(live, weight)), float("nan"))
            if first:
                self.current.seen = []
                with self.lock:
                    self.forwards.append(self.current.seen)
            self.current.seen.append(found)
            time.sleep(0)  # let other threads in between two routers

        return see

    def check(self) -> set[float]:
        """Every forward saw one strength in all its routers; returns the strengths seen."""
        assert all(len(seen) == self.count and len(set(seen)) == 1 for seen in self.forwards), self.forwards
        return {seen[0] for seen in self.forwards}


def run_all(*targets: Callable[[], None], seconds: float = 60.0) -> None:
    """Run the targets in threads; an exception in one, or a hang, fails the test."""
    errors: list[BaseException] = []

    def guarded(target: Callable[[], None]) -> None:
        try:
            target()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(target,), daemon=True) for target in targets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(seconds)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    if errors:
        raise errors[0]


def run_alone(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
