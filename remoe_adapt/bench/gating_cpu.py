"""One token on the CPU: routers of transformers under the dial and a recency prior, against themselves untouched."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig

from remoe_adapt.bench.swap import interleaved_ms, random_family
from remoe_adapt.dial import get_remoe_model
from remoe_adapt.routers import SCORING_EXAMPLES, discover_routers

Row = dict[str, Any]
TOP_K = 8
_COLUMNS, _EXPERTS = 2048, (64, 128)
# As many as a model has: one router alone would stay in the processor's caches, and its times would be too short.
_LAYERS = 24
# By kind of prior: an ema, whose bonus is one product, and cost, whose bonus is a dozen operations on a token's scores.
_GAINS = {"ema": 0.2, "cost": 0.1}
_BARS = {"ema": 1.5}
# Names under which configurations state the sizes of a router.
_SIZES = {
    "hidden_size": _COLUMNS,
    "num_experts_per_tok": TOP_K,
    "moe_k": TOP_K,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": True,
}
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def cpu_rows(calls: int = 400) -> Iterator[Row]:
    """A row per family, number of experts and kind of prior: microseconds a router, one torch thread, fp32.

    Timed in turns is one token through the routers of 24 layers, which is what a decode step does; ours move their
    recency on in the same time. Medians over `calls`.
    """
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for family, example in SCORING_EXAMPLES:
            for experts in _EXPERTS:
                try:
                    yield from _rows(family, example, experts, calls)
                except (ImportError, AttributeError) as error:  # another version of transformers
                    yield {"family": family, "E": experts, "skipped": f"{example}: {error}"}
    finally:
        torch.set_num_threads(threads_before)


def _rows(family: str, example: str, experts: int, calls: int) -> Iterator[Row]:
    torch.manual_seed(0)
    stock = _Stack(_Block(stock_router(example, experts)) for _ in range(_LAYERS))
    hidden_TD = torch.randn(1, _COLUMNS)
    dialled = {mode: copy.deepcopy(stock) for mode in _GAINS}
    models = [
        get_remoe_model(blocks, family=random_family(blocks), recency=mode, recency_gain=_GAINS[mode])
        for mode, blocks in dialled.items()
    ]
    theirs = [block.get_submodule("gate") for block in stock]

    def untouched() -> None:
        for router in theirs:
            router(hidden_TD)

    with torch.inference_mode():
        steps = [_decode_step(blocks, hidden_TD) for blocks in dialled.values()]
        baseline_us, *found_us = (1e3 * ms / _LAYERS for ms in interleaved_ms([untouched, *steps], calls))
    for model in models:
        model.controller.close()
    for mode, us in zip(_GAINS, found_us, strict=True):
        row = timed_row(
            "route", family, torch.float32, 1, experts, _COLUMNS, mode, us, "the stock router", baseline_us,
            device="cpu",
        )  # fmt: skip
        yield row | (held_to("ratio", row["ratio"], _BARS[mode]) if mode in _BARS else {})


def _decode_step(blocks: nn.ModuleList, hidden_TD: Tensor) -> Callable[[], None]:
    """One token through routers that have a prior, which moves on."""
    routers = [block.get_submodule("gate") for block in blocks]
    # The prior replaced the router's own forward, and hangs on it.
    forward: Any = vars(discover_routers(blocks)[0].module)["forward"]
    prior = forward.steps
    state = prior.new_state(1)

    def step() -> None:
        prior.begin(1, 1, None, state)  # as the model's own call announces a decode step
        for router in routers:
            router(hidden_TD)
        prior.end()

    return step


def timed_row(
    what: str, family: str, dtype: torch.dtype, tokens: int, experts: int, columns: int | None, prior: str | None,
    us: float, baseline: str, baseline_us: float | None, *, device: str,
) -> Row:  # fmt: skip
    """One row, all columns; `ratio` is us / baseline_us, `bar` is what `bar_of` ("us" or "ratio") may be at most."""
    return {
        "what": what, "backend": "torch" if device == "cpu" else "triton", "device": device, "family": family,
        "dtype": str(dtype).removeprefix("torch."), "T": tokens, "E": experts, "K": TOP_K, "D": columns, "prior": prior,
        "us": us, "baseline": None if baseline_us is None else baseline, "baseline_us": baseline_us,
        "ratio": None if baseline_us is None else us / baseline_us, "bar": None, "bar_of": None, "met": None,
        "ns_per_token": None,
    }  # fmt: skip


def held_to(of: str, value: float, bar: float) -> Row:
    """The columns of a row that has a bar."""
    return {"bar": bar, "bar_of": of, "met": value <= bar}


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
        # Router classes leave their weight uninitialised; NaN and ties would take top-k another time.
        nn.init.normal_(parameter, std=_COLUMNS**-0.5)
    for buffer in router.buffers():
        nn.init.normal_(buffer, std=0.1)
    return router.eval()
