"""REMOE beside LoRA on one base: order, training, files, merging, and the collisions that are refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_model
from torch import Tensor, nn

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import AdapterConflictError, FingerprintMismatchError
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers
from remoe_adapt.tuner.peft_compat import wrap_or_inject

IDS_BT = torch.tensor([[5, 7, 9, 11, 23], [31, 8, 44, 17, 60]])
SECOND_TUNER = ["You are trying to modify a model with PEFT", "Already found a `peft_config` attribute"]


def base_model(folder: str = "qwen2_moe", dtype: torch.dtype = torch.float32) -> Any:
    return tiny_model(folder, initializer_range=0.2).to(dtype)


def lora_config() -> LoraConfig:
    return LoraConfig(target_modules=["q_proj", "o_proj"], r=4, init_lora_weights=False)


def second(model: nn.Module, config: Any, name: str) -> PeftModel:
    """get_peft_model on a base that has a tuner already: PEFT warns, rightly."""
    with warnings.catch_warnings():
        for message in SECOND_TUNER:
            warnings.filterwarnings("ignore", message)
        return get_peft_model(model, config, name)


def both(base: nn.Module, first: str) -> tuple[PeftModel, PeftModel]:
    """(the LoRA model, the REMOE model) over one base, the named one made first."""
    torch.manual_seed(7)
    remoe_config = RemoeConfig(init_weights=False)
    if first == "lora":
        lora = get_peft_model(base, lora_config(), "task").eval()
        return lora, wrap_or_inject(lora, remoe_config, "reuse").eval()
    remoe = get_peft_model(base, remoe_config, "reuse").eval()
    return second(base, lora_config(), "task").eval(), remoe


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS_BT).logits


def tensors(model: nn.Module, mark: str) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if mark in name}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("first", ["lora", "remoe"])
def test_both_act_on_one_base_and_are_switched_apart(first: str) -> None:
    base = base_model()
    plain = logits(base)
    lora, remoe = both(base, first)
    assert lora.get_base_model() is remoe.get_base_model() is base
    together = logits(base)
    assert torch.equal(logits(lora), together) and torch.equal(logits(remoe), together)
    with remoe.disable_adapter():
        lora_only = logits(base)
        assert not any(module.disable_adapters for name, module in base.named_modules() if name.endswith("q_proj"))
    for layer in remoe_layers(base).values():
        layer.enable_adapters(False)
    assert torch.equal(logits(base), lora_only)
    for layer in remoe_layers(base).values():
        layer.enable_adapters(True)
    with lora.disable_adapter(), remoe.disable_adapter():
        assert torch.equal(logits(base), plain)
    assert torch.equal(logits(base), together)
    assert not torch.equal(lora_only, plain) and not torch.equal(lora_only, together)

    remoe.add_adapter("other", RemoeConfig())
    remoe.set_adapter("other")
    assert torch.equal(logits(base), lora_only)
    assert lora.active_adapters == ["task"] and remoe.active_adapters == ["other"]


@pytest.mark.parametrize("first", ["lora", "remoe"])
@pytest.mark.parametrize("trained", ["lora", "remoe", "both"])
def test_they_train_together_or_apart(first: str, trained: str) -> None:
    base = base_model()
    lora, remoe = both(base, first)
    lora.set_requires_grad("task", trained in ("lora", "both"))
    remoe.set_requires_grad("reuse", trained in ("remoe", "both"))
    before = {mark: tensors(base, mark) for mark in ("lora_", "remoe_", "weight")}
    optimizer = torch.optim.SGD([p for p in base.parameters() if p.requires_grad], lr=0.1)
    base(input_ids=IDS_BT, labels=IDS_BT).loss.backward()
    optimizer.step()
    after = {mark: tensors(base, mark) for mark in before}
    assert same(before["lora_"], after["lora_"]) == (trained == "remoe")
    assert same(before["remoe_"], after["remoe_"]) == (trained == "lora")
    own = {name for name in before["weight"] if "lora_" not in name}
    assert all(torch.equal(before["weight"][name], after["weight"][name]) for name in own)


@pytest.mark.parametrize("first", ["lora", "remoe"])
@pytest.mark.parametrize("load_first", ["lora", "remoe"])
def test_they_are_saved_and_loaded_separately(first: str, load_first: str, tmp_path: Path) -> None:
    lora, remoe = both(base_model(), first)
    expected = logits(lora)
    lora.save_pretrained(tmp_path / "lora", selected_adapters=["task"])
    remoe.save_pretrained(tmp_path / "remoe", selected_adapters=["reuse"])
    saved_lora = load_file(tmp_path / "lora" / "task" / "adapter_model.safetensors")
    saved_remoe = load_file(tmp_path / "remoe" / "reuse" / "adapter_model.safetensors")
    assert all(".lora_" in key and "base_model.model.base_model" not in key for key in saved_lora)
    assert sorted(saved_remoe) == [f"base_model.model.model.layers.{i}.mlp.gate.remoe_delta" for i in range(4)]

    base = base_model()
    folders = {"lora": (tmp_path / "lora" / "task", "task"), "remoe": (tmp_path / "remoe" / "reuse", "reuse")}
    order = ["lora", "remoe"] if load_first == "lora" else ["remoe", "lora"]
    PeftModel.from_pretrained(base, *folders[order[0]])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SECOND_TUNER[1])
        PeftModel.from_pretrained(base, *folders[order[1]])
    assert torch.equal(logits(base), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("first", ["lora", "remoe"])
@pytest.mark.parametrize("merged_first", ["lora", "remoe"])
def test_merging_in_either_order_gives_the_separately_merged_weights(
    first: str, merged_first: str, dtype: torch.dtype
) -> None:
    lora, remoe = both(base_model(dtype=dtype), first)
    lora_tensors, deltas = tensors(lora.get_base_model(), "lora_"), remoe_layers(remoe)

    alone = get_peft_model(base_model(dtype=dtype), lora_config(), "task")
    for name, parameter in alone.get_base_model().named_parameters():
        if "lora_" in name:
            parameter.data.copy_(lora_tensors[name])
    expected = dict(alone.merge_and_unload().state_dict())
    for name, layer in deltas.items():
        weight_ED = expected[f"{name}.weight"]
        expected[f"{name}.weight"] = (weight_ED.float() + layer.delta_ED("reuse").detach()).to(dtype)

    models = {"lora": (lora, "task"), "remoe": (remoe, "reuse")}
    order = ["lora", "remoe"] if merged_first == "lora" else ["remoe", "lora"]
    (one, own), (other, _) = models[order[0]], models[order[1]]
    one.merge_and_unload(adapter_names=[own])
    left = [m for m in other.get_base_model().modules() if isinstance(m, RemoeLayer)]
    assert bool(left) == (order[1] == "remoe")
    merged = other.merge_and_unload()
    assert same(dict(merged.state_dict()), expected)
    assert not hasattr(merged, "peft_config")


def test_merging_and_unmerging_one_leaves_the_other() -> None:
    base = base_model(dtype=torch.bfloat16)
    lora, remoe = both(base, "lora")
    plain = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    expected = logits(base)
    remoe.merge_adapter()
    assert not any(getattr(module, "merged", False) for name, module in base.named_modules() if "q_proj" in name)
    assert torch.equal(logits(base), expected)
    remoe.unmerge_adapter()
    assert same(dict(base.state_dict()), plain)
    remoe.delete_adapter("reuse")
    assert torch.equal(logits(lora), logits(base))
    assert set(lora.peft_config) == {"task"}


def test_unloading_remoe_keeps_lora_usable(tmp_path: Path) -> None:
    base = base_model()
    lora, remoe = both(base, "lora")
    with remoe.disable_adapter():
        lora_only = logits(base)
    assert remoe.unload() is base
    assert torch.equal(logits(lora), lora_only) and set(lora.peft_config) == {"task"}
    lora.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path / "task").eval()
    assert torch.equal(logits(again), lora_only)


def test_a_peft_model_of_lora_is_unwrapped_never_nested(tmp_path: Path) -> None:
    base = base_model()
    lora = get_peft_model(base, lora_config(), "task")
    remoe = second(lora, RemoeConfig(init_weights=False), "reuse").eval()
    assert remoe.get_base_model() is base
    expected = logits(remoe)
    remoe.save_pretrained(tmp_path, selected_adapters=["reuse"])
    again = get_peft_model(base_model(), lora_config(), "task")
    for name, parameter in again.get_base_model().named_parameters():
        if "lora_" in name:
            parameter.data.copy_(base.get_parameter(name))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", SECOND_TUNER[1])
        loaded = PeftModel.from_pretrained(again, tmp_path / "reuse", "reuse")
    assert torch.equal(logits(loaded.eval()), expected)
    more = wrap_or_inject(remoe, RemoeConfig(rank=2), "more")
    assert more is remoe and remoe_layers(base)["model.layers.0.mlp.gate"].adapters == {"reuse", "more"}


@pytest.mark.parametrize("first", ["lora", "remoe"])
def test_equal_names_are_refused(first: str) -> None:
    base = base_model()
    own, other = (lora_config(), RemoeConfig()) if first == "lora" else (RemoeConfig(), lora_config())
    model = get_peft_model(base, own)
    before, configs = logits(base), dict(model.peft_config)
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(AdapterConflictError, match="adapter name 'default' is taken by"):
        second(base, other, "default")
    assert [name for name, _ in base.named_modules()] == modules
    assert model.peft_config == configs and torch.equal(logits(base), before)
    if first == "lora":
        for refused in (model, base):
            with pytest.raises(AdapterConflictError, match="an adapter named 'default' already"):
                wrap_or_inject(refused, RemoeConfig())


@pytest.mark.parametrize("targets", ["one", "all"])
def test_lora_on_a_router_first_is_refused(targets: str) -> None:
    base = base_model()
    parameters = ["mlp.gate.weight"] if targets == "all" else ["layers.1.mlp.gate.weight"]
    lora = get_peft_model(base, LoraConfig(target_modules=[], target_parameters=parameters, r=2), "task")
    configs, modules = dict(lora.peft_config), [name for name, _ in base.named_modules()]
    for config in (RemoeConfig(), RemoeConfig(target_modules=["gate"])):
        with pytest.raises(AdapterConflictError, match=r"mlp.gate: it is wrapped by lora.*ParamWrapper"):
            wrap_or_inject(lora, config, "reuse")
    assert lora.peft_config == configs and [name for name, _ in base.named_modules()] == modules
    if targets == "one":
        free = RemoeConfig(target_modules=["gate"], exclude_modules=["layers.1.mlp.gate"])
        assert len(remoe_layers(wrap_or_inject(lora, free, "reuse"))) == 3


def test_lora_on_a_router_second_is_refused_by_peft() -> None:
    base = base_model()
    model = get_peft_model(base, RemoeConfig(init_weights=False), "reuse").eval()
    before = logits(model)
    for targets in ({"target_parameters": ["mlp.gate.weight"], "target_modules": []}, {"target_modules": ["gate"]}):
        with pytest.raises(ValueError, match=r"not a valid target|is not supported"):
            second(base, LoraConfig(r=2, **targets), "task")
    assert torch.equal(logits(model), before)


def test_other_wrappers_are_refused() -> None:
    base = base_model()
    prefix = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(AdapterConflictError, match="prompt-learning"):
        wrap_or_inject(prefix, RemoeConfig(), "reuse")
    mixed = get_peft_model(base_model(), lora_config(), "task", mixed=True)
    with pytest.raises(AdapterConflictError, match="PeftMixedModel"):
        wrap_or_inject(mixed, RemoeConfig(), "reuse")


def test_a_refused_base_keeps_the_other_tuners_record() -> None:
    base = base_model()
    lora = get_peft_model(base, lora_config(), "task")
    with pytest.raises(FingerprintMismatchError):
        wrap_or_inject(lora, RemoeConfig(base_fingerprint="sha256:0"), "reuse")
    assert set(lora.peft_config) == {"task"} and not remoe_layers(base)
