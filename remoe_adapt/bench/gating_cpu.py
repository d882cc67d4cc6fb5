"""One token on the CPU: routers of transformers under the dial and a recency prior, against themselves untouched."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Iterator
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
_BAR = 1.5
_GAIN = 0.2
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
    # The prior replaced the router's own forward, and hangs on it.
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
        baseline_us, us = (1e3 * ms / _LAYERS for ms in interleaved_ms([untouched, under_the_dial], calls))
    model.controller.close()
    row = timed_row(
        "route", family, torch.float32, 1, experts, _COLUMNS, "ema", us, "the stock router", baseline_us, device="cpu"
    )
    return row | held_to("ratio", row["ratio"], _BAR)


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
