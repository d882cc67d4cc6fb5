"""All gains 0 is the base: every router answers for itself, bit for bit, and what it chose is remembered."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from kv import kv, returned_cache
from recency_support import HYBRIDS, LONGER, PROMPT, chosen, decode, left_padded, routing_matters
from torch import Tensor, nn
from transformers import DynamicCache, StaticCache

from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.dial.recency import TRAINING_FREE_GAIN
from remoe_adapt.evaluation.record import record_forward
from remoe_adapt.gating.router_forward import RouterForward
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.recency.sequences import _STATE
from remoe_adapt.recency_settings import Ema
from remoe_adapt.routers.discover import discover_routers

# One router each of what the families rank: probabilities, logits with a bias, grouped scores, scores with a bias of
# the block, products in another dtype, results without ids, classes that keep autocast out.
FOLDERS = (
    "qwen2_moe", "gpt_oss", "deepseek_v2", "deepseek_v3", "minimax_m2", "granitemoe", "llama4", "ernie4_5_moe",
    "gemma4", "jamba",
)  # fmt: skip
TEXTS = torch.randint(3, 96, (3, 40), generator=torch.Generator().manual_seed(1))


def tied(folder: str, dtype: torch.dtype) -> Any:
    """Routers whose rows come in equal pairs, and few different values: experts tie in every token."""
    model = routing_matters(folder, **HYBRIDS.get(folder, {})).to(dtype)
    for ref in discover_routers(model):
        weight_ED = ref.weight_ED.detach()
        if not weight_ED.any():
            nn.init.normal_(weight_ED, std=0.3)
        weight_ED[1::2] = weight_ED[::2]
    return model


def outputs(model: Any, ids: Tensor = TEXTS, **inputs: Any) -> list[Tensor]:
    """Logits and what every router returned."""
    returned: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        returned.extend(output if isinstance(output, tuple) else (output,))

    handles = [ref.module.register_forward_hook(keep) for ref in discover_routers(model)]
    logits = model(ids, **inputs).logits
    for handle in handles:
        handle.remove()
    return [logits, *returned]


def assert_identical(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 1
    for own, stock in zip(found, expected, strict=True):
        assert own.dtype == stock.dtype and torch.equal(own, stock)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("folder", FOLDERS)
def test_gain_zero_is_the_stock_forward(folder: str, dtype: torch.dtype) -> None:
    model = tied(folder, dtype)
    batch, mask, _ = left_padded()
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (TEXTS, {"use_cache": False}), (TEXTS, {"use_cache": True}), (TEXTS[:1, :1], {"use_cache": False}),
        (batch, {"attention_mask": mask, "use_cache": False}),
    ]  # fmt: skip
    with torch.no_grad():
        expected = [outputs(model, ids, **inputs) for ids, inputs in calls]
        with torch.autocast("cpu", torch.bfloat16):
            expected.append(outputs(model, use_cache=False))
        with recency_prior(model, "ema", 0.0):
            for (ids, inputs), stock in zip(calls, expected, strict=False):
                assert_identical(outputs(model, ids, **inputs), stock)
            with torch.autocast("cpu", torch.bfloat16):
                assert_identical(outputs(model, use_cache=False), expected[-1])


@pytest.mark.parametrize("mode", ["ema", "cost", "resident"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 3}, {"cache_implementation": "static"}], ids=str
)
def test_text_at_gain_zero_is_that_of_the_base(mode: str, options: dict[str, Any]) -> None:
    model = tied("qwen2_moe", torch.bfloat16)
    ids = LONGER if "prompt_lookup_num_tokens" in options else TEXTS
    wanted = {"return_dict_in_generate": True, "output_scores": True, "max_new_tokens": 8, **options}
    expected: Any = decode(model, ids, **wanted)
    with recency_prior(model, mode, 0.0):
        found: Any = decode(model, ids, **wanted)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(a, b) for a, b in zip(found.scores, expected.scores, strict=True))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_at_gain_zero_is_that_of_the_base(wrapped: bool, checkpointing: bool) -> None:
    gradients = []
    for with_prior in (False, True):
        model = tied("qwen2_moe", torch.float32)
        base = model
        if wrapped:
            model = get_remoe_model(model)
            model.controller.close()
            base = model.get_base_model()
        if checkpointing:
            # The first name since transformers 5.20.
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)()
        base.train().requires_grad_(True)
        with recency_prior(base, "ema", 0.0) if with_prior else nullcontext():
            losses = [base(ids, labels=ids, use_cache=False).loss for ids in (TEXTS, PROMPT, LONGER)]
            sum(losses).backward()
        gradients.append([p.grad for p in base.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 10
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_dial_at_strength_zero_is_the_base_and_comes_back_to_it() -> None:
    model = tied("qwen2_moe", torch.bfloat16)
    with torch.no_grad():
        expected = outputs(model)
        dialled = get_remoe_model(model)
        for strength in (0.0, 1.0, 0.0):
            dialled.controller.set_strength(strength)
            assert torch.equal(dialled(TEXTS).logits, expected[0]) == (strength == 0.0)
            forward: Any = vars(discover_routers(model)[0].module)["forward"]
            assert forward.steps.gains_read() == pytest.approx([strength * TRAINING_FREE_GAIN / 2] * 4)
        dialled.controller.close()


def test_a_router_called_outside_of_its_model_is_that_of_the_base() -> None:
    model = tied("qwen2_moe", torch.bfloat16)
    router = discover_routers(model)[0].module
    hidden_TD = torch.randn(50, router.weight.shape[1], dtype=torch.bfloat16)  # type: ignore[union-attr,index]
    expected = router(hidden_TD)
    for gain in (0.0, 0.4):
        with recency_prior(model, "ema", gain):
            assert isinstance(vars(router)["forward"], RouterForward)
            assert_identical(list(router(hidden_TD)), list(expected))


def by_hand(ids_LBSK: Tensor, mask_BS: Tensor, experts: int) -> Tensor:
    """Recency [L, B, E] after these choices, token by token."""
    recency_LBE = torch.zeros(*ids_LBSK.shape[:2], experts)
    for s in range(ids_LBSK.shape[2]):
        used = torch.zeros_like(recency_LBE).scatter_(-1, ids_LBSK[:, :, s].long(), 1 - Ema.default_decay)
        moved = recency_LBE * Ema.default_decay + used
        recency_LBE = torch.where(mask_BS[None, :, s, None].bool(), moved, recency_LBE)
    return recency_LBE


@pytest.mark.parametrize("cache", ["made", "dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
def test_what_was_chosen_at_rest_is_what_a_gain_continues_from(cache: str, padded: bool) -> None:
    model = routing_matters()
    ids, mask, _ = left_padded()
    if not padded:
        ids, mask = TEXTS[:2], torch.ones_like(TEXTS[:2])
    ones = torch.ones((2, 1), dtype=torch.int64)
    held: Any = {
        "made": lambda: None, "dynamic": lambda: DynamicCache(config=model.config),
        "static": lambda: StaticCache(config=model.config, max_cache_len=64),
    }[cache]()  # fmt: skip
    with recency_prior(model, "ema", 0.0) as installed, torch.no_grad():
        with record_forward(model) as recorder:
            held = returned_cache(model(ids, attention_mask=mask, **kv(held), use_cache=True))
            parts = [recorder.take().unflatten(1, (2, -1))]
            for token in (11, 12):
                mask = torch.cat([mask, ones], dim=1)
                model(ones * token, attention_mask=mask, **kv(held))
                parts.append(recorder.take().unflatten(1, (2, -1)))
        found = torch.stack(getattr(held, _STATE).recency)
        torch.testing.assert_close(found, by_hand(torch.cat(parts, dim=2), mask, found.shape[-1]))
        installed.set_gains(0.9)
        mask = torch.cat([mask, ones], dim=1)
        now = chosen(model, ones * 13, attention_mask=mask, **kv(held))
        installed.set_gains(0.0)
        assert not torch.equal(now, chosen(model, torch.cat([ids, ones * 11, ones * 12, ones * 13], 1),
                                           attention_mask=mask).unflatten(1, (2, -1))[:, :, -1])  # fmt: skip


def test_a_gain_of_zero_between_others_leaves_no_gap() -> None:
    """Recency that gates moved on, then routers, then gates again."""
    model = routing_matters()
    with recency_prior(model, "ema", 0.4) as installed, torch.no_grad():
        cache, parts = DynamicCache(config=model.config), []
        for gain, (begin, end) in zip((0.4, 0.0, 0.0, 0.4), ((0, 3), (3, 7), (7, 8), (8, 11)), strict=True):
            installed.set_gains(gain)
            parts.append(chosen(model, LONGER[:, begin:end], **kv(cache)))
        found = torch.stack(getattr(cache, _STATE).recency)
        ids_LTK = torch.cat(parts, dim=1)
        torch.testing.assert_close(found, by_hand(ids_LTK.unsqueeze(1), torch.ones_like(LONGER), found.shape[-1]))


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_forwards_at_gain_zero_are_the_base(packed: bool) -> None:
    """The graph is chosen by what was written to the gains, so a change of the dial changes it."""
    model = tied("qwen2_moe", torch.float32)
    inputs: dict[str, Any] = {"use_cache": False}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(20), torch.arange(20)])[None].expand(3, -1)
    graphs: list[Any] = []

    def counting(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    step = torch.compile(model, backend=counting, fullgraph=True, dynamic=False)
    with torch.no_grad():
        expected = model(TEXTS, **inputs).logits
        with recency_prior(model, "ema", 0.0) as installed:
            for gain in (0.0, 0.4, 0.2, 0.0):
                installed.set_gains(gain)
                found = step(TEXTS, **inputs).logits
                assert torch.equal(found, expected) == (gain == 0.0)
    torch._dynamo.reset()
    assert len(graphs) == 2, "one at rest, one under any gain"


def test_a_compiled_dial_follows_its_strength() -> None:
    model = tied("qwen2_moe", torch.float32)
    with torch.no_grad():
        expected = model(TEXTS, use_cache=False).logits
        dialled = get_remoe_model(model)
        torch._dynamo.reset()
        step = torch.compile(model, backend="eager")
        for strength in (0.0, 1.0, 0.0):
            dialled.controller.set_strength(strength)
            assert torch.equal(step(TEXTS, use_cache=False).logits, expected) == (strength == 0.0)
        torch._dynamo.reset()
        dialled.controller.close()
