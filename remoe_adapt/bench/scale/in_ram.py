"""All experts in RAM: 4 bits by the fast arithmetic against transformers' bf16, at the sizes of real experts.

A model of a few layers, as wide as those that people run, with as large a part of it in its vocabulary: once as a GGUF
(experts in Q4_0, the rest in Q8_0), once as a checkpoint in bf16. Each of them has random weights of its own, which no
kernel's time depends on. They decode the same tokens in turns, each in a process of its own; nothing is read.
"""

from __future__ import annotations

import shutil
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.bench import harness
from remoe_adapt.bench.scale.checkpoint import Shape, config_of, write_checkpoint
from remoe_adapt.checkpoints import auto_class

# Inner sizes of experts of Qwen3-30B-A3B and of Qwen1.5-MoE-A2.7B; both have hidden states of 2048.
INNERS = (768, 1408)
_LAYERS, _EXPERTS = 4, 16
_TURNS, _PROMPT, _STEPS = 7, 4, 24


def run_in_ram(inner: int, *, work: Path, keep: bool, threads: int, shape: Shape | None = None) -> dict[str, Any]:
    """One row: `{inner, hidden, layers, experts, stock_ms, stock, fast_ms, ratio}`. ratio: median over turns of the
    time of a token, ours over stock's.

    inner: of the experts.
    work: folder for the models; keep: leave them there.
    threads: of torch.
    shape: another model.

    Raises ConfigError when the disk is too small, and what loading raises.
    """
    whole = Shape()
    vocabulary = whole.vocabulary * _LAYERS // whole.layers
    shape = shape or Shape(_LAYERS, _EXPERTS, inner=inner, vocabulary=vocabulary)
    folder = work / f"in-ram-{shape.layers}x{shape.experts}x{shape.hidden}x{inner}"
    stock, coded = folder / "bf16", folder / "model.gguf"
    with ExitStack() as undo:
        if not keep:
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        write_checkpoint(coded, shape)
        if not (stock / "config.json").is_file():
            config = config_of(shape)
            torch.manual_seed(0)
            harness.save_whole(auto_class(config).from_config(config, dtype=torch.bfloat16), stock)
        ids = torch.randint(0, shape.vocabulary, (_TURNS, _PROMPT + _STEPS + 1)).tolist()
        fast = {"budget": 1.0, "cache": {"arithmetic": "fast"}, "family": None, "gain": 0.0, "dial": False}
        plans: dict[str, tuple[str, Path, dict[str, Any], dict[str, Any]]] = {
            "stock": ("stock", stock, {"trial_ids": ids[0]}, {}),
            "fast": ("cached", coded, fast, {"strength": 0.0}),
        }
        workers, facts = {}, {}
        for name, (regime, place, settings, _) in plans.items():
            workers[name] = harness.WorkerProcess(name)
            undo.callback(workers[name].close)
            facts[name] = workers[name].ask("load", regime=regime, folder=str(place), threads=threads, options=settings)
        times_ms: dict[str, list[float]] = {name: [] for name in plans}
        for turn, tokens in enumerate(ids):
            # Who comes first changes, since the machine's speed drifts.
            for name in plans if turn % 2 else reversed(plans):
                answer = workers[name].ask("decode", arm=plans[name][3], ids=tokens, prompt=_PROMPT, max_seconds=1e9)
                times_ms[name].append(1e3 * statistics.median(step["s"] for step in answer["steps"]))
    ratios = [ours / theirs for ours, theirs in zip(times_ms["fast"], times_ms["stock"], strict=True)]
    return {
        "inner": shape.inner,
        "hidden": shape.hidden,
        "layers": shape.layers,
        "experts": shape.experts,
        "stock_ms": statistics.median(times_ms["stock"]),
        "stock": facts["stock"]["experts_implementation"],
        "fast_ms": statistics.median(times_ms["fast"]),
        "ratio": statistics.median(ratios),
    }
