"""REMOE configurations: bad options, which routers are targets, one object for several models, weighted sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import NoMatchingPeftModuleError, PeftModel, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import AdapterConflictError, AdapterError, ConfigError, RouterNotFoundError
from remoe_adapt.tuner.layer import remoe_layers


def base_model(folder: str = "qwen2_moe") -> nn.Module:
    return tiny_model(folder, initializer_range=0.2)


def random_config(**fields: Any) -> RemoeConfig:
    return RemoeConfig(init_weights=False, **fields)


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rank": 0}, "rank=0"),
        ({"rank": 2.5}, "rank=2.5"),
        ({"reuse_weight": -1.0}, "reuse_weight=-1.0"),
        ({"kl_weight": float("nan")}, "kl_weight=nan"),
        ({"target_modules": ".*gate", "layers_to_transform": 1}, "layers_to_transform needs"),
        ({"layers_pattern": "layers"}, "layers_pattern has no effect"),
    ],
)
def test_bad_options_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RemoeConfig(**fields)


@pytest.mark.parametrize(
    ("fields", "layers"),
    [
        ({}, [0, 1, 2, 3]),
        ({"target_modules": ["gate"]}, [0, 1, 2, 3]),
        ({"target_modules": r".*\.[12]\.mlp\.gate"}, [1, 2]),
        ({"layers_to_transform": [0, 3]}, [0, 3]),
        ({"layers_to_transform": 2, "layers_pattern": "layers"}, [2]),
        ({"target_modules": ["mlp.gate"], "layers_to_transform": [1]}, [1]),
        ({"exclude_modules": ["layers.1.mlp.gate"]}, [0, 2, 3]),
    ],
)
def test_targets(fields: dict[str, Any], layers: list[int]) -> None:
    model = get_peft_model(base_model(), RemoeConfig(**fields))
    assert list(remoe_layers(model)) == [f"model.layers.{index}.mlp.gate" for index in layers]
    assert model.targeted_module_names == list(remoe_layers(model))


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"target_modules": ["q_proj"]}, ConfigError, r"4 module\(s\) that are not routers.*q_proj.*layers.3.mlp.gate"),
        ({"target_modules": "all-linear"}, ConfigError, "adapts routers only"),
        ({"target_modules": ["nowhere"]}, NoMatchingPeftModuleError, "Target modules .* not found in the base model"),
        ({"target_modules": ["nowhere"]}, RouterNotFoundError, "model.layers.0.mlp.gate"),
        ({"layers_to_transform": [9]}, ConfigError, r"layers_to_transform=\[9\] names no layer with a router"),
        ({"exclude_modules": ["gate"]}, NoMatchingPeftModuleError, "No modules were targeted"),
    ],
)
def test_targets_that_are_no_routers_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    base = base_model()
    plain = values(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, RemoeConfig(**fields))
    assert equal(values(base), plain) and not hasattr(base, "peft_config")
    model = get_peft_model(base, RemoeConfig())
    with pytest.raises(error, match=message):
        model.add_adapter("other", RemoeConfig(**fields))
    assert list(model.peft_config) == ["default"]


def test_a_dense_model_has_nothing_to_adapt() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    with pytest.raises(RouterNotFoundError, match="no mixture-of-experts router"):
        get_peft_model(LlamaForCausalLM(config), RemoeConfig())


def test_one_configuration_object_serves_several_models() -> None:
    config = RemoeConfig()
    first = get_peft_model(base_model("qwen2_moe"), config)
    second = get_peft_model(base_model("gpt_oss"), config)
    recorded = first.peft_config["default"].base_fingerprint, second.peft_config["default"].base_fingerprint
    assert recorded[0] != recorded[1] and None not in recorded
    assert all("gate" in name for name in first.peft_config["default"].target_modules)
    assert all("router" in name for name in second.peft_config["default"].target_modules)


@pytest.mark.parametrize("ranks", [(None, None), (2, 3), (None, 3)])
@pytest.mark.parametrize("weights", [[0.5, 1.5], [1.0, -2.0]])
def test_weighted_adapters_are_exact_sums(ranks: tuple[int | None, int | None], weights: list[float]) -> None:
    model = get_peft_model(base_model(), random_config(rank=ranks[0]), "one")
    model.add_adapter("two", random_config(rank=ranks[1], layers_to_transform=[1, 2]))
    model.base_model.add_weighted_adapter(["one", "two"], weights, "sum")
    assert model.peft_config["sum"].rank == (5 if ranks == (2, 3) else None)
    for layer in remoe_layers(model).values():
        expected_ED = weights[0] * layer.delta_ED("one")
        if "two" in layer.adapters:
            expected_ED = expected_ED + weights[1] * layer.delta_ED("two")
        torch.testing.assert_close(layer.delta_ED("sum"), expected_ED)
        assert not any(p.requires_grad for name, p in layer.named_parameters() if name.endswith("sum"))
    assert model.active_adapters == ["one"]
    model.base_model.add_weighted_adapter(["one"], [2.0], "twice")
    for layer in remoe_layers(model).values():
        torch.testing.assert_close(layer.delta_ED("twice"), 2 * layer.delta_ED("one"))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((["one", "nobody"], [1.0, 1.0], "new"), AdapterError, r"no REMOE adapter named \['nobody'\]"),
        ((["one", "two"], [1.0], "new"), ConfigError, "1 weights for 2 adapters"),
        ((["one"], [float("inf")], "new"), ConfigError, "every weight must be a finite number"),
        ((["one"], ["1"], "new"), ConfigError, "every weight must be a finite number"),
        (([], [], "new"), ConfigError, "at least one adapter name"),
        ((["one"], [1.0], "two"), AdapterConflictError, "an adapter named 'two' exists"),
        ((["one"], [1.0], "new", "svd"), ConfigError, "combination_type='svd' is unknown: use one of linear, cat"),
        ((["one", "two"], [1.0, 1.0], "new", "cat"), ConfigError, r"\['one'\] are full deltas: use 'linear'"),
    ],
)
def test_bad_combinations_are_refused(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    model: PeftModel = get_peft_model(base_model(), random_config(), "one")
    model.add_adapter("two", random_config(rank=2))
    with pytest.raises(error, match=message):
        model.base_model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"one", "two"}
