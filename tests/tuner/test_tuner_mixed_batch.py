"""`adapter_names=`: another adapter for every sample of a batch, in forward and in generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from tiny_models import HIDDEN, tiny_model
from torch import Tensor

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import UnsupportedRouterError
from remoe_adapt.tuner.layer import remoe_layers

NAMES = ["__base__", "one", "two", "one"]
IDS_BT = torch.tensor([[5, 7, 9, 11, 23], [31, 8, 44, 17, 60], [3, 4, 90, 6, 12], [77, 2, 45, 45, 9]])


def two_adapters(folder: str = "qwen2_moe", **fields: Any) -> PeftModel:
    base = tiny_model(folder, initializer_range=0.2, **fields)
    model = get_peft_model(base, RemoeConfig(init_weights=False, task_type="CAUSAL_LM"), "one")
    model.add_adapter("two", RemoeConfig(init_weights=False, rank=3, task_type="CAUSAL_LM"))
    return model.eval()


@torch.no_grad()
def apart(model: PeftModel) -> dict[str, Tensor]:
    """Logits of the whole batch under each adapter alone."""
    results = {}
    with model.disable_adapter():
        results["__base__"] = model(input_ids=IDS_BT).logits
    for name in ("one", "two"):
        model.set_adapter(name)
        results[name] = model(input_ids=IDS_BT).logits
    return results


@pytest.mark.parametrize("folder", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss", "dbrx", "llama4", "granitemoe"])
def test_every_sample_gets_its_own_adapter(folder: str) -> None:
    model = two_adapters(folder)
    alone = apart(model)
    with torch.no_grad():
        mixed = model(input_ids=IDS_BT, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[name][row], atol=1e-4, rtol=1e-4)
    assert (alone["one"] - alone["two"]).abs().max() > 1e-2 < (alone["one"] - alone["__base__"]).abs().max()
    assert torch.equal(model(input_ids=IDS_BT).logits, alone["two"])


@pytest.mark.parametrize("shape", [(4, HIDDEN), (12, HIDDEN), (4, 3, HIDDEN)])
def test_rows_are_exact_and_in_sample_order(shape: tuple[int, ...]) -> None:
    layer = next(iter(remoe_layers(two_adapters()).values()))
    x = torch.randn(shape)
    tokens = x.reshape(-1, HIDDEN).shape[0] // len(NAMES)
    mixed = layer(x, adapter_names=NAMES)
    for row, name in enumerate(NAMES):
        rows = slice(row * tokens, (row + 1) * tokens)
        for entry, own in zip(mixed, layer.run([] if name == "__base__" else [name], (x,), {}), strict=True):
            assert torch.equal(entry[rows], own[rows])


def test_recorded_router_logits_are_those_that_were_used() -> None:
    model = two_adapters("qwen3_moe")
    calls: list[Tensor] = []
    layer = next(iter(remoe_layers(model).values()))
    layer.base_layer.register_forward_hook(lambda _, args, output: calls.append(output[0]))
    with torch.no_grad():
        mixed = model(input_ids=IDS_BT, adapter_names=NAMES, output_router_logits=True).router_logits
        whole = {}
        for name in ("one", "two"):
            model.set_adapter(name)
            whole[name] = model(input_ids=IDS_BT, output_router_logits=True).router_logits
    assert len(mixed) == 4 and len(calls) == 3 and torch.equal(calls[0], mixed[0])
    tokens = IDS_BT.shape[1]
    for row, name in enumerate(NAMES):
        if name != "__base__":
            rows = slice(row * tokens, (row + 1) * tokens)
            torch.testing.assert_close(mixed[0][rows], whole[name][0][rows])
    assert "forward" not in layer.base_layer.__dict__


@pytest.mark.parametrize("repeat", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 1, "num_return_sequences": 2}])
def test_generate_keeps_samples_and_adapters_together(repeat: dict[str, Any]) -> None:
    model = two_adapters()
    options = {"max_new_tokens": 5, "attention_mask": torch.ones_like(IDS_BT), **repeat}
    with torch.no_grad():
        mixed = model.generate(input_ids=IDS_BT, adapter_names=NAMES, **options)
        copies = mixed.shape[0] // len(NAMES)
        for row, name in enumerate(NAMES):
            if name == "__base__":
                with model.disable_adapter():
                    alone = model.generate(input_ids=IDS_BT, **options)
            else:
                model.set_adapter(name)
                alone = model.generate(input_ids=IDS_BT, **options)
            own = slice(row * copies, (row + 1) * copies)
            length = min(mixed.shape[1], alone.shape[1])
            assert torch.equal(mixed[own, :length], alone[own, :length])


def test_layers_without_the_adapter_use_the_base() -> None:
    model = get_peft_model(
        tiny_model("qwen2_moe", initializer_range=0.2), RemoeConfig(init_weights=False, layers_to_transform=[1]), "one"
    ).eval()
    model.add_adapter("two", RemoeConfig(init_weights=False, layers_to_transform=[2]))
    alone = apart(model)
    with torch.no_grad():
        mixed = model(input_ids=IDS_BT, adapter_names=NAMES).logits
    for row, name in enumerate(NAMES):
        torch.testing.assert_close(mixed[row], alone[name][row], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["one"] * 3, ValueError, "Length of `adapter_names` should be .* got 3 and 4 respectively"),
        (["one"] * 2, ValueError, "got 2 and 4 respectively"),
        ([], ValueError, "`adapter_names` is empty"),
        (["one", "x", "one", "y"], ValueError, r"Trying to infer with non-existing adapter\(s\): x, y"),
        ("one", TypeError, "a list of adapter names"),
    ],
)
def test_names_that_do_not_fit_are_refused(names: Any, error: type[Exception], message: str) -> None:
    model = two_adapters()
    with pytest.raises(error, match=message):
        model(input_ids=IDS_BT, adapter_names=names)
    with pytest.raises(error, match=message):
        model.generate(input_ids=IDS_BT, adapter_names=names, max_new_tokens=2)
    assert not [module for module in model.modules() if module._forward_pre_hooks]


def test_states_that_cannot_mix_are_refused() -> None:
    model = two_adapters()
    with model.disable_adapter():
        expected = model(input_ids=IDS_BT).logits
        assert torch.equal(model(input_ids=IDS_BT, adapter_names=NAMES).logits, expected)
    model.merge_adapter(["one"])
    with pytest.raises(ValueError, match="please call `unmerge_adapter` first"):
        model(input_ids=IDS_BT, adapter_names=NAMES)
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="when the model is in training mode"):
        model.train()(input_ids=IDS_BT, adapter_names=NAMES)


def test_routers_that_sort_their_tokens_cannot_mix() -> None:
    model = two_adapters("jetmoe")
    with pytest.raises(UnsupportedRouterError, match=r"returns tokens sorted by expert.*once per adapter"):
        model(input_ids=IDS_BT, adapter_names=NAMES)
    assert not [module for module in model.modules() if module._forward_pre_hooks]
