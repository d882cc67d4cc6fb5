"""One token on the CPU: routers of transformers under the dial and a recency prior, against themselves untouched."""

from __future__ import annotations

import copy
import importlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from remoe_adapt.bench.swap import random_family
from remoe_adapt.dial import get_remoe_model
from remoe_adapt.routers import SCORING_EXAMPLES, discover_routers

Row = dict[str, Any]
_K, _COLUMNS, _EXPERTS = 8, 2048, (64, 128)
_LAYERS = 24
_BAR = 1.5
_GAIN = 0.2
# Names under which configurations state the sizes of a router.
_SIZES = {
    "hidden_size": _COLUMNS,
    "num_experts_per_tok": _K,
    "moe_k": _K,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": True,
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def cpu_rows(calls: int = 400) -> Iterator[Row]:
    """A row per family and number of experts: microseconds a router, one torch thread, fp32.

    Timed in turns is one token through the routers of 24 layers, which is what a decode step does; ours move their
    recency on in the same time. Medians over `calls`.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for family, example in SCORING_EXAMPLES:
            for experts in _EXPERTS:
                try:
                    yield _row(family, example, experts, calls)
                except (ImportError, AttributeError) as error:  # another version of transformers
                    yield {"family": family, "E": experts, "skipped": f"{example}: {error}"}
    finally:
        torch.set_num_threads(threads_before)


def _row(family: str, example: str, experts: int, calls: int) -> Row:
    torch.manual_seed(0)
    stock = _Stack(_Block(stock_router(example, experts)) for _ in range(_LAYERS))
    dialled = copy.deepcopy(stock)
    model = get_remoe_model(dialled, family=random_family(dialled), recency="ema", recency_gain=_GAIN)
    forward: Any = vars(discover_routers(dialled)[0].module)["forward"]
    prior = forward.steps
    hidden_TD = torch.randn(1, _COLUMNS)
    state = prior.new_state(1)
    theirs, ours = ([block.get_submodule("gate") for block in blocks] for blocks in (stock, dialled))

    def under_the_dial() -> None:
        prior.begin(1, 1, None, state)  # as the model's own call announces a decode step
        for router in ours:
            router(hidden_TD)
        prior.end()

    def untouched() -> None:
        for router in theirs:
            router(hidden_TD)

    with torch.inference_mode():
        baseline_us, us = (us / _LAYERS for us in interleaved_us([untouched, under_the_dial], calls))
    model.controller.close()
    return {
        "what": "route", "backend": "torch", "device": "cpu", "family": family, "dtype": "float32", "T": 1,
        "E": experts, "K": _K, "D": _COLUMNS, "prior": "ema", "us": us, "baseline": "the stock router",
        "baseline_us": baseline_us, "ratio": us / baseline_us, "bar": _BAR, "bar_of": "ratio",
        "met": us / baseline_us <= _BAR, "ns_per_token": None,
    }  # fmt: skip


class _Block(nn.Module):
    """What discovery needs around a router."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate
        self.experts = nn.ModuleList(nn.Identity() for _ in range(int(next(gate.parameters()).shape[0])))

    def forward(self, hidden_TD: Tensor) -> Any:
        return self.gate(hidden_TD)


class _Stack(nn.ModuleList):
    """Blocks of a model that is called with tokens, as one has to be for the prior; installing it runs three of them.

    Only the routers run, each on the same embeddings.
    """

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden_TD: Tensor = self.get_input_embeddings()(input_ids).view(-1, _COLUMNS)
        for block in self:
            block(hidden_TD)
        return hidden_TD

    def get_input_embeddings(self) -> nn.Embedding:
        """Made where they are asked for, so that the list holds nothing but blocks; 16 tokens are enough."""
        return nn.Embedding(16, _COLUMNS)


def stock_router(example: str, experts: int) -> nn.Module:
    """The router class `folder.Class` of transformers at the benchmark's sizes, with random weights.

    Raises ImportError or AttributeError where this version of transformers does not have it.
    """
    folder, name = example.split(".")
    modeling = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    config = AutoConfig.for_model(folder).get_text_config()
    for field, value in {**_SIZES, **dict.fromkeys(_COUNTS, experts)}.items():
        if hasattr(config, field):
            setattr(config, field, value)
    router: nn.Module = getattr(modeling, name)(config)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=_COLUMNS**-0.5)
    for buffer in router.buffers():
        nn.init.normal_(buffer, std=0.1)
    return router.eval()


def interleaved_us(runs: list[Callable[[], object]], calls: int) -> list[float]:
    """Median microseconds of each, taken in turns."""
    times: list[list[int]] = [[] for _ in runs]
    warm = min(100, calls)
    for i in range(warm + calls):
        for run, kept in zip(runs, times, strict=True):
            begin = time.perf_counter_ns()
            run()
            elapsed = time.perf_counter_ns() - begin
            if i >= warm:
                kept.append(elapsed)
    return [statistics.median(kept) / 1e3 for kept in times]
