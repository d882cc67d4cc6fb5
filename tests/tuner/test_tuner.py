"""REMOE as a PEFT tuner: forward, several adapters, merging, dtypes, targets, training, compilation."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import peft
import pytest
import torch
from peft import get_peft_model, inject_adapter_in_model
from peft.utils import PeftType
from tiny_models import HIDDEN, NUM_EXPERTS, tiny_model
from torch import Tensor, nn

import remoe_adapt.tuner
from remoe_adapt import RemoeConfig
from remoe_adapt.errors import AdapterConflictError, AdapterCorruptError
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.tuner import register
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers

FOLDERS = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "jetmoe", "dbrx"]
IDS_BT = torch.tensor([[5, 7, 9, 11, 23], [31, 8, 44, 17, 60]])
KINDS = {"full": {}, "low_rank": {"rank": 3}}


def base_model(folder: str = "qwen2_moe", dtype: torch.dtype = torch.float32, **overrides: Any) -> nn.Module:
    """A tiny model whose experts matter: weights ten times as spread as usual."""
    return tiny_model(folder, initializer_range=0.2, **overrides).to(dtype)


def random_config(**fields: Any) -> RemoeConfig:
    return RemoeConfig(init_weights=False, **fields)


@torch.no_grad()
def logits(model: nn.Module, **inputs: Any) -> Tensor:
    return model(input_ids=IDS_BT, **inputs).logits


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", FOLDERS)
def test_a_zero_delta_is_the_base_and_merging_is_what_the_forward_computes(folder: str, kind: str) -> None:
    base = base_model(folder)
    before, plain = logits(base), values(base)
    model = get_peft_model(base, RemoeConfig(**KINDS[kind])).eval()
    assert torch.equal(logits(model), before)

    model.add_adapter("other", random_config(**KINDS[kind]))
    model.set_adapter("other")
    changed = logits(model)
    assert (changed - before).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    assert torch.equal(logits(model), changed)

    model.merge_adapter()
    assert torch.equal(logits(model), changed)
    model.unmerge_adapter()
    assert torch.equal(logits(model), changed)
    merged = model.merge_and_unload()
    assert torch.equal(logits(merged), changed)
    assert merged is base
    assert not any(isinstance(module, RemoeLayer) for module in base.modules())
    assert not hasattr(base, "peft_config")
    assert values(base).keys() == plain.keys()


def test_the_effective_weight_is_the_cast_of_the_fp32_sum() -> None:
    model = get_peft_model(base_model(dtype=torch.bfloat16), random_config(), "one")
    model.add_adapter("two", random_config(rank=2))
    model.base_model.set_adapter(["one", "two"])
    for layer in remoe_layers(model).values():
        weight_ED = layer.base_weight_ED
        assert weight_ED.dtype == torch.bfloat16 and layer.delta_ED("one").dtype == torch.float32
        low_ED = layer.remoe_B["two"] @ layer.remoe_A["two"]
        expected_ED = (weight_ED.float() + (layer.remoe_delta["one"] + low_ED)).bfloat16()
        assert torch.equal(layer.effective_weight_ED(["one", "two"]), expected_ED)
        assert torch.equal(layer.get_delta_weight("two"), low_ED)
        x_TD = torch.randn(6, HIDDEN, dtype=torch.bfloat16)
        assert torch.equal(layer(x_TD)[0], nn.functional.linear(x_TD, expected_ED))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_two_hundred_merges_leave_no_trace(dtype: torch.dtype) -> None:
    base = base_model(dtype=dtype)
    plain = values(base)
    pointers = [parameter.data_ptr() for parameter in base.parameters()]
    model = get_peft_model(base, random_config())
    for _ in range(200):
        model.merge_adapter()
        model.unmerge_adapter()
    assert equal(values(model.unload()), plain)
    assert [parameter.data_ptr() for parameter in base.parameters()] == pointers
    with pytest.warns(UserWarning, match="Already unmerged"):
        get_peft_model(base, RemoeConfig()).unmerge_adapter()


def test_merging_in_turn_equals_merging_at_once() -> None:
    model = get_peft_model(base_model(dtype=torch.bfloat16), random_config(), "one")
    model.add_adapter("two", random_config(rank=3))
    plain = values(model)
    model.merge_adapter(["one", "two"])
    at_once = values(model)
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        model.merge_adapter(["one"])
    model.unmerge_adapter()
    assert equal(values(model), plain)
    model.merge_adapter(["one"])
    with pytest.warns(UserWarning, match="additionally merging two"):
        model.merge_adapter(["two"])
    assert equal(values(model), at_once)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['two'\] while they are merged"):
        model.delete_adapter("two")
    with pytest.warns(UserWarning, match="Unmerging the model first"):
        model.set_adapter("two")
    assert equal(values(model), plain)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_safe_merge_refuses_broken_deltas_before_any_router_changes(value: float) -> None:
    model = get_peft_model(base_model(), random_config())
    last = list(remoe_layers(model).values())[-1]
    with torch.no_grad():
        last.remoe_delta["default"][0] = value
    plain = values(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            AdapterCorruptError, match=r"NaNs detected in the merged weights. The adapter default seems"
        ):
            merge(safe_merge=True)
        assert torch.equal(values(model)[name := "base_model.model.lm_head.weight"], plain[name])
        assert not any(layer.merged for layer in remoe_layers(model).values())


def test_adapters_are_switched_added_up_and_deleted() -> None:
    base = base_model()
    before = logits(base)
    model = get_peft_model(base, random_config(), "one").eval()
    model.add_adapter("two", random_config())
    one = logits(model)
    model.set_adapter("two")
    two = logits(model)
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert len({tensor.sum().item() for tensor in (before, one, two, both)}) == 4
    assert model.active_adapters == ["one", "two"]
    for layer in remoe_layers(model).values():
        assert layer.remoe_delta["one"].requires_grad and layer.adapters == {"one", "two"}
    model.set_adapter("one")
    assert not any(layer.remoe_delta["two"].requires_grad for layer in remoe_layers(model).values())
    model.set_requires_grad("two")
    assert all(layer.remoe_delta["two"].requires_grad for layer in remoe_layers(model).values())

    with pytest.warns(UserWarning, match="Setting active adapter to two"):
        model.delete_adapter("one")
    assert torch.equal(logits(model), two)
    model.delete_adapter("two")
    assert model.active_adapters == [] and torch.equal(logits(base), before)
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.delete_adapter("nobody")
    with pytest.raises(AdapterConflictError, match=r"adapter name '0\.5'"):
        model.add_adapter("0.5", RemoeConfig())
    assert list(model.peft_config) == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_deltas_are_fp32_unless_the_base_dtype_is_asked_for(dtype: torch.dtype) -> None:
    model = get_peft_model(base_model(dtype=dtype), random_config())
    model.add_adapter("narrow", random_config(), autocast_adapter_dtype=False)
    dtypes = {name.rpartition(".")[2]: p.dtype for name, p in model.named_parameters() if "remoe_" in name}
    assert dtypes == {"default": torch.float32, "narrow": dtype}
    assert torch.isfinite(logits(model)).all()
    narrow = get_peft_model(base_model(dtype=dtype), random_config(), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in narrow.named_parameters() if "remoe_" in name} == {dtype}
    model.merge_adapter()
    half = model.to(torch.float64)
    half.unmerge_adapter()
    assert next(iter(remoe_layers(half).values())).base_weight_ED.dtype == torch.float64


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_training_moves_the_deltas_and_nothing_else(kind: str, checkpointing: bool | None) -> None:
    base = base_model()
    if checkpointing is not None:
        base.activation_checkpointing_enable({"use_reentrant": checkpointing})
    model = get_peft_model(base, RemoeConfig(**KINDS[kind])).train()
    plain = values(model)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
        optimizer.step()
    moved = {name for name, tensor in values(model).items() if not torch.equal(tensor, plain[name])}
    assert moved == {name for name, _ in model.named_parameters() if "remoe_" in name}
    expected = 4 * NUM_EXPERTS * HIDDEN if kind == "full" else 4 * 3 * (NUM_EXPERTS + HIDDEN)
    assert model.get_nb_trainable_parameters()[0] == expected


def test_checkpointing_does_not_change_the_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        base = base_model()
        if checkpointing:
            base.activation_checkpointing_enable()
        model = get_peft_model(base, random_config()).train()
        torch.manual_seed(0)
        model(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
        gradients.append([layer.remoe_delta["default"].grad for layer in remoe_layers(model).values()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
        assert plain.abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("folder", ["qwen2_moe", "deepseek_v3", "gpt_oss"])
def test_the_layer_compiles_as_one_graph(folder: str, kind: str) -> None:
    model = get_peft_model(base_model(folder), random_config(**KINDS[kind]))
    layer = next(iter(remoe_layers(model).values()))
    x_TD = torch.randn(6, HIDDEN)
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for eager, traced in zip(layer(x_TD), compiled(x_TD), strict=True):
        torch.testing.assert_close(eager, traced)


def test_copies_and_pickles_behave_alike() -> None:
    model = get_peft_model(base_model(), random_config(rank=2)).eval()
    expected = logits(model)
    for clone in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert torch.equal(logits(clone), expected)
        clone.merge_adapter()
        assert torch.equal(logits(clone), expected)
    assert not any(layer.merged for layer in remoe_layers(model).values())
    config = model.peft_config["default"]
    for clone in (copy.deepcopy(config), pickle.loads(pickle.dumps(config))):  # noqa: S301
        assert clone == config and clone.peft_type is PeftType("REMOE")


def test_model_code_reads_the_router_through_the_wrapper() -> None:
    base = base_model("deepseek_v3")
    router = discover_routers(base)[0]
    model = get_peft_model(base, RemoeConfig())
    layer = remoe_layers(model)[router.name]
    assert layer.top_k == 2 and layer.weight is router.module.weight
    assert layer.e_score_correction_bias is router.module.e_score_correction_bias
    assert (layer.out_features, layer.in_features) == (NUM_EXPERTS, HIDDEN)
    with pytest.raises(AttributeError, match="nothing_like_it"):
        _ = layer.nothing_like_it
    assert repr(layer).startswith("remoe.RemoeLayer(")
    assert list(remoe_layers(model)) == [ref.name for ref in discover_routers(base)]
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.active_adapters, status.enabled) == (3, ["default"], True)
    assert model.get_layer_status()[0].module_type == "remoe.RemoeLayer"


def test_registration_is_idempotent_and_real() -> None:
    register()
    kind = PeftType("REMOE")
    assert kind is PeftType.REMOE and kind in list(PeftType) and kind.value == "REMOE"
    assert pickle.loads(pickle.dumps(kind)) is kind and copy.deepcopy(kind) is kind  # noqa: S301
    assert peft.get_peft_config({"peft_type": "REMOE"}) == RemoeConfig()


def test_registration_refuses_a_taken_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remoe_adapt.tuner.PEFT_TYPE_TO_CONFIG_MAPPING, PeftType("REMOE"), peft.LoraConfig)
    with pytest.raises(AdapterConflictError, match=r"registered already, by .*LoraConfig"):
        register()


def test_modules_to_save_follow_the_adapter() -> None:
    model = get_peft_model(base_model(tie_word_embeddings=False), RemoeConfig(modules_to_save=["lm_head"])).eval()
    before = logits(model)
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2.0)
    torch.testing.assert_close(logits(model), 2 * before)
    with model.disable_adapter():
        assert torch.equal(logits(model), before)
    torch.testing.assert_close(logits(model.merge_and_unload()), 2 * before)


def test_injection_without_a_peft_model() -> None:
    base = base_model()
    before = logits(base)
    injected = inject_adapter_in_model(random_config(), base, "mine")
    assert injected is base and set(base.peft_config) == {"mine"}
    assert not torch.equal(logits(base), before)
    state_dict = peft.get_peft_model_state_dict(base, adapter_name="mine")
    assert sorted(state_dict) == sorted(f"{name}.remoe_delta" for name in remoe_layers(base))
    other = inject_adapter_in_model(RemoeConfig(), base_model(), "yours", state_dict=state_dict)
    peft.set_peft_model_state_dict(other, state_dict, adapter_name="yours")
    assert torch.equal(logits(other), logits(base))
