"""`remoe bench swap`: what a swap costs the decoding thread, against PEFT's own way to change a router's strength."""

from __future__ import annotations

import copy
import functools
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F

from remoe_adapt.bench.harness import REPO_ROOT
from remoe_adapt.checkpoints import load_base
from remoe_adapt.dial import get_remoe_model
from remoe_adapt.family import TRAINED, Family, FamilyPoint, original_weights
from remoe_adapt.routers import survey_routers

SHIPPED = REPO_ROOT / "examples" / "tiny_moe"
# Far apart and never twice in a row: a swap to where the weights are already would do nothing.
_STRENGTHS = (0.1, 0.9, 0.2, 0.8, 0.3, 0.7, 0.4, 0.6, 0.35, 0.65)
_TOP_K = 4
_LORAS = ("first", "second")


class _Router(nn.Module):
    """Softmax, then top-k: the most common router."""

    def __init__(self, num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = num_experts, _TOP_K, False
        self.weight = nn.Parameter(torch.randn(num_experts, hidden_size, dtype=dtype) * hidden_size**-0.5)

    def forward(self, hidden_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Names as transformers' routers have them: discovery reads this source.
        router_logits = F.linear(hidden_TD, self.weight)
        router_weights, router_indices = router_logits.softmax(dim=-1, dtype=torch.float32).topk(self.top_k, dim=-1)
        return router_logits, router_weights, router_indices


class _Block(nn.Module):
    def __init__(self, num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate = _Router(num_experts, hidden_size, dtype)
        self.experts = nn.ModuleList(nn.Identity() for _ in range(num_experts))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        _, weights_TK, _ = self.gate(hidden_TD)
        scale_T1 = 1 + weights_TK.sum(dim=-1, keepdim=True)
        scaled_TD: Tensor = hidden_TD * scale_T1.to(hidden_TD.dtype)
        return scaled_TD


class RouterStack(nn.Module):
    """The routers of a large model without its experts: what a swap touches, and nothing else."""

    def __init__(self, num_routers: int, num_experts: int, hidden_size: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Block(num_experts, hidden_size, dtype) for _ in range(num_routers))

    def forward(self, hidden_TD: Tensor) -> Tensor:
        for layer in self.layers:
            hidden_TD = layer(hidden_TD)
        return hidden_TD


def random_family(model: nn.Module, strengths: tuple[float, ...] = (0.5, 1.0)) -> Family:
    """A family in memory whose deltas are random, a tenth of the weights in size."""
    routers = survey_routers(model)
    weights = routers.original_weights
    deltas = {
        name: torch.randn(weight.shape) * 0.1 * float(weight.detach().float().std()) for name, weight in weights.items()
    }
    points = tuple(FamilyPoint(s, Family.adapter_name(s), {n: d * s for n, d in deltas.items()}) for s in strengths)
    return Family(Path("in-memory"), type(model).__name__, routers.fingerprint, points)


def run_swap(
    model: str | None = None,
    family: str | None = None,
    *,
    num_routers: int = 26,
    num_experts: int = 64,
    hidden_size: int = 2048,
    dtype: torch.dtype = torch.bfloat16,
    swaps: int = 200,
    peft_swaps: int = 40,
    forwards: int = 600,
) -> dict[str, Any]:
    """Medians in ms: `swap_ms` (on the decoding thread, gate included), `stage_ms` (on the posting thread),
    `peft_swap_ms` (stock LoRA on the same weights: unmerge + set_adapter + merge, rank 64, interleaved with ours);
    `recompiles` over ten strengths under fullgraph; `forward_ratio`: one-token forwards of `model` (None: the shipped
    one) at full strength over those of the untouched base, interleaved (None, with `forward_skipped`, without a model).

    Both sides run on one torch thread: with more, a busy machine measures its thread pool (a swap took 60 ms there).

    Raises as `get_remoe_model` for a model or family that cannot be used.
    """
    # A benchmark may be called from a program that goes on, so its threads are given back.
    threads_before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sizes = {"routers": num_routers, "experts": num_experts, "hidden": hidden_size}
        sizes_and_type = {**sizes, "dtype": str(dtype).removeprefix("torch."), "threads": 1}
        forward = _forward_figures(model, family, forwards)  # first: a model that is not there is said at once
        swapping = _swap_figures(RouterStack(num_routers, num_experts, hidden_size, dtype), swaps, peft_swaps)
        return {**sizes_and_type, **swapping, **forward}
    finally:
        torch.set_num_threads(threads_before)


def _swap_figures(stack: RouterStack, swaps: int, peft_swaps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    lora = _stock_lora(copy.deepcopy(stack))
    dialed = get_remoe_model(stack, family=random_family(stack))
    times = _time_swaps(dialed, lora, swaps, peft_swaps)
    weight_ED = next(iter(original_weights(stack).values()))
    return {
        **times,
        "peft_ratio": times["swap_ms"] / times["peft_swap_ms"],
        "recompiles": _recompiles(dialed, torch.randn(1, weight_ED.shape[1], dtype=weight_ED.dtype)),
    }


def _time_swaps(dialed: PeftModel, lora: PeftModel, swaps: int, peft_swaps: int) -> dict[str, float]:
    controller = dialed.controller
    controller.step()  # this thread is the decoding one: targets of others wait for its next step
    ours: list[float] = []
    theirs: list[float] = []
    for i in range(swaps):
        poster = threading.Thread(target=controller.set_strength, args=(_STRENGTHS[i % len(_STRENGTHS)],))
        poster.start()
        # Staging is done here, so that `step` below times the swap alone.
        poster.join()
        ours.append(_ms(controller.step))
        if i % max(1, swaps // peft_swaps) == 0:
            theirs.append(_ms(functools.partial(_peft_swap, lora, _LORAS[len(theirs) % 2])))
    assert controller.status()["swaps"] == swaps
    return {
        "swap_ms": statistics.median(ours),
        "stage_ms": float(controller.status()["stage_ms_median"]),
        "peft_swap_ms": statistics.median(theirs),
    }


def _stock_lora(stack: Any) -> PeftModel:
    config = LoraConfig(
        r=64, lora_alpha=64, target_parameters=["gate.weight"], target_modules=[], init_lora_weights=False
    )
    lora: Any = get_peft_model(stack, config, _LORAS[1])
    lora.add_adapter(_LORAS[0], copy.deepcopy(config))
    lora.requires_grad_(False)
    lora.merge_adapter()
    assert isinstance(lora, PeftModel)
    return lora


def _peft_swap(lora: Any, name: str) -> None:
    # What PEFT offers for it: a merged adapter can be exchanged in no other way.
    lora.unmerge_adapter()
    lora.base_model.set_adapter(name)
    lora.merge_adapter()


def _recompiles(dialed: Any, hidden_TD: Tensor) -> int:
    torch._dynamo.reset()  # what others compiled before must not count
    counter = CompileCounter()
    compiled: Callable[[Tensor], Tensor] = torch.compile(dialed, backend=counter, fullgraph=True)
    with torch.no_grad():
        for strength in _STRENGTHS:
            dialed.controller.set_strength(strength)
            compiled(hidden_TD)
    torch._dynamo.reset()
    return int(counter.frame_count) - 1


def _forward_figures(model: str | None, family: str | None, forwards: int) -> dict[str, Any]:
    if model is None and not (SHIPPED / "config.json").exists():
        return {"forward_ratio": None, "forward_skipped": "no shipped model in this installation: name one"}
    source = model or str(SHIPPED)
    shipped_family = SHIPPED / "family" / TRAINED
    if family is None and model is None and shipped_family.exists():
        family = str(shipped_family)
    return forward_ratio(source, family, forwards)


def forward_ratio(source: str | nn.Module, family: str | Family | None, forwards: int) -> dict[str, Any]:
    """Keys `forward_ratio`, `forward_ms`, `base_forward_ms`: medians of one-token forwards, order alternating.

    Timed is what `generate` calls: the base object with the dial on it, and a second, untouched one.
    """
    plain = load_base(source) if isinstance(source, str) else copy.deepcopy(source)
    with_dial = load_base(source) if isinstance(source, str) else source
    dialed = get_remoe_model(with_dial, family=random_family(with_dial) if family is None else family)
    dialed.controller.set_strength(1.0)
    ids = torch.tensor([[1]])
    runs = [functools.partial(each, input_ids=ids, use_cache=False) for each in (plain, with_dial)]
    with torch.inference_mode():
        base_ms, dial_ms = interleaved_ms(runs, forwards)
    # Before the figures are returned: the model belongs to the caller.
    dialed.controller.close()
    return {"forward_ratio": dial_ms / base_ms, "forward_ms": dial_ms, "base_forward_ms": base_ms}


def interleaved_ms(runs: Sequence[Callable[[], object]], calls: int) -> list[float]:
    """Median milliseconds of each, taken in turns whose order alternates."""
    times: list[list[float]] = [[] for _ in runs]
    warm = min(100, calls)
    for i in range(warm + calls):
        # Who comes second finds the caches as the first has left them, so each of them comes first as often.
        for run, kept in list(zip(runs, times, strict=True))[:: 1 if i % 2 else -1]:
            kept.append(_ms(run))
    return [statistics.median(kept[warm:]) for kept in times]


def _ms(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e3
