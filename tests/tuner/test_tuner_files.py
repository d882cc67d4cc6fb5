"""Adapters on disk: every route that loads one, bases they do not belong to, and files that are damaged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, NUM_EXPERTS, tiny_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import AdapterCorruptError, FingerprintMismatchError, RouterError
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers

IDS_BT = torch.tensor([[5, 7, 9, 11, 23], [31, 8, 44, 17, 60]])
WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def base_model(seed: int = 0, dtype: torch.dtype = torch.float32, folder: str = "qwen2_moe", **fields: Any) -> Any:
    return tiny_model(folder, seed=seed, initializer_range=0.2, **fields).to(dtype)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(input_ids=IDS_BT).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Tensor]:
    """(base folder, adapter folder, logits with the adapter); the adapter knows its base by path."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    base_model().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    config = RemoeConfig(init_weights=False, task_type="CAUSAL_LM", reuse_weight=0.5, kl_weight=0.25)
    model = get_peft_model(base, config).eval()
    model.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter", logits(model)


def from_peft(base: Path, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)


def from_peft_on_meta(base: Path, adapter: Path) -> nn.Module:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, low_cpu_mem_usage=True)


def as_second_adapter(base: Path, adapter: Path) -> nn.Module:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), RemoeConfig(rank=2), "first")
    model.load_adapter(adapter, "second", low_cpu_mem_usage=True)
    model.set_adapter("second")
    return model


def from_auto_peft(_: Path, adapter: Path) -> nn.Module:
    return AutoPeftModelForCausalLM.from_pretrained(adapter)


def from_transformers(_: Path, adapter: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(adapter)


def into_transformers(base: Path, adapter: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(base)
    model.load_adapter(str(adapter), "mine")
    return model


ROUTES = [from_peft, from_peft_on_meta, as_second_adapter, from_auto_peft, from_transformers, into_transformers]


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_restores_the_adapter(route: Callable[[Path, Path], nn.Module], saved: Any) -> None:
    base, adapter, expected = saved
    assert torch.equal(logits(route(base, adapter).eval()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_deltas_stay_fp32_and_exact_on_a_half_precision_base(dtype: torch.dtype, saved: Any) -> None:
    base, adapter, _ = saved
    stored = {key.removeprefix("base_model.model."): value for key, value in load_file(adapter / WEIGHTS).items()}
    for route in ("plain", "meta", "transformers"):
        # A checkpoint in fp32 that is read in half precision is still the same base; fp16 rounds it twice.
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        other = {"allow_other_base": True} if dtype == torch.float16 else {}
        if route == "transformers":
            if other:
                continue
            model.load_adapter(str(adapter), "default")
        elif other:
            with pytest.warns(UserWarning, match="loaded because allow_other_base"):
                model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=route == "meta", **other)
        else:
            model = PeftModel.from_pretrained(model, adapter, low_cpu_mem_usage=route == "meta")
        for name, layer in remoe_layers(model).items():
            assert layer.remoe_delta["default"].dtype == torch.float32
            assert torch.equal(layer.remoe_delta["default"], stored[f"{name}.remoe_delta"])


def test_what_is_on_disk(saved: Any) -> None:
    base, adapter, _ = saved
    tensors = load_file(adapter / WEIGHTS)
    assert sorted(tensors) == [f"base_model.model.model.layers.{i}.mlp.gate.remoe_delta" for i in range(4)]
    assert {tuple(tensor.shape) for tensor in tensors.values()} == {(NUM_EXPERTS, HIDDEN)}
    written = json.loads((adapter / CONFIG).read_text())
    assert written["peft_type"] == "REMOE" and written["base_fingerprint"].startswith("sha256:")
    assert written["target_modules"] == [f"model.layers.{i}.mlp.gate" for i in range(4)]
    assert (written["reuse_weight"], written["kl_weight"]) == (0.5, 0.25) and "allow_other_base" not in written
    config = PeftConfig.from_pretrained(pretrained_model_name_or_path=adapter)
    assert isinstance(config, RemoeConfig) and config.to_dict() == RemoeConfig.from_pretrained(adapter).to_dict()
    card = yaml.safe_load((adapter / "README.md").read_text().split("---\n")[1])
    assert card["library_name"] == "peft" and card["base_model"] == str(base)


def test_low_rank_and_several_adapters_are_saved_apart(tmp_path: Path) -> None:
    model = get_peft_model(base_model(), RemoeConfig(init_weights=False, rank=2), "one").eval()
    model.add_adapter("two", RemoeConfig(init_weights=False, layers_to_transform=[1]))
    model.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "one" / WEIGHTS)) == 8 and len(load_file(tmp_path / "two" / WEIGHTS)) == 1
    for name in ("one", "two"):
        model.set_adapter(name)
        loaded = PeftModel.from_pretrained(base_model(), tmp_path / name).eval()
        assert torch.equal(logits(loaded), logits(model))


def test_the_fingerprint_sees_only_the_base() -> None:
    base = base_model()
    plain = fingerprint(base)
    assert plain.startswith("sha256:") and len(plain) == 71
    assert fingerprint(base.model) == plain == fingerprint(base_model())
    assert fingerprint(base_model(seed=1)) != plain
    model = get_peft_model(base, RemoeConfig(init_weights=False))
    assert fingerprint(model) == fingerprint(base) == plain
    model.merge_adapter()
    assert fingerprint(model) == plain
    model.unmerge_adapter()
    assert fingerprint(model) == plain
    assert fingerprint(model.merge_and_unload()) != plain


def test_the_fingerprint_does_not_depend_on_the_dtype_it_is_loaded_in() -> None:
    as_bf16 = base_model(dtype=torch.bfloat16)
    with torch.no_grad():  # values that fp16 holds inexactly or not at all
        as_bf16.model.layers[0].mlp.gate.weight[0, :3] = torch.tensor([1e-6, -3e-8, 1.3e-5])
    plain = fingerprint(as_bf16)
    assert fingerprint(as_bf16.float()) == plain
    assert fingerprint(as_bf16.half()) == plain
    assert fingerprint(base_model(dtype=torch.bfloat16)) == fingerprint(base_model())


def test_a_base_without_values_has_no_fingerprint() -> None:
    base = tiny_model("qwen2_moe", device="meta")
    with pytest.raises(RouterError, match="meta device"):
        fingerprint(base)
    model = get_peft_model(base, RemoeConfig())
    assert model.peft_config["default"].base_fingerprint is None


def untouched(base: nn.Module) -> bool:
    return not any(isinstance(m, RemoeLayer) for m in base.modules()) and not hasattr(base, "peft_config")


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_an_adapter_of_another_base_is_refused_with_both_names(low_cpu_mem_usage: bool, saved: Any) -> None:
    base, adapter, expected = saved
    other = base_model(seed=1)
    other.name_or_path = "somebody/else"
    message = rf"made for the base '{base}' \(routers sha256:\w+\), but it meets 'somebody/else' \(routers sha256:"
    with pytest.raises(FingerprintMismatchError, match=message):
        PeftModel.from_pretrained(other, adapter, low_cpu_mem_usage=low_cpu_mem_usage)
    with pytest.raises(FingerprintMismatchError, match=message):
        other.load_adapter(str(adapter), "mine")
    assert untouched(other)
    model = get_peft_model(other, RemoeConfig(), "own")
    with pytest.raises(FingerprintMismatchError, match=message):
        model.load_adapter(adapter, "second")
    assert list(model.peft_config) == ["own"]
    assert all(layer.adapters == {"own"} for layer in remoe_layers(model).values())
    model.unload()
    with pytest.warns(UserWarning, match="loaded because allow_other_base is set"):
        forced = PeftModel.from_pretrained(other, adapter, allow_other_base=True)
    assert not torch.equal(logits(forced), expected)


def damaged(adapter: Path, tmp_path: Path, damage: str) -> Path:
    """A copy of the adapter with one fault."""
    copy = tmp_path / damage
    copy.mkdir()
    (copy / CONFIG).write_bytes((adapter / CONFIG).read_bytes())
    tensors = load_file(adapter / WEIGHTS)
    key = sorted(tensors)[-1]
    whole = (adapter / WEIGHTS).read_bytes()
    if damage == "truncated":
        (copy / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    elif damage == "empty":
        (copy / WEIGHTS).write_bytes(b"")
    elif damage == "header":
        (copy / WEIGHTS).write_bytes(whole[:8] + b"\xff" * 64 + whole[72:])
    else:
        if damage == "nan":
            tensors[key][0, 0] = torch.nan
        elif damage == "shape":
            tensors[key] = tensors[key][:, :-1].contiguous()
        elif damage == "missing":
            del tensors[key]
        elif damage == "unexpected":
            tensors[key.replace("layers.3", "layers.7")] = tensors[key].clone()
        elif damage == "foreign":
            tensors = {name.replace("remoe_delta", "lora_A.weight"): value for name, value in tensors.items()}
        save_file(tensors, copy / WEIGHTS)
    return copy


DAMAGES = {
    "truncated": "not a complete safetensors file",
    "empty": "not a complete safetensors file",
    "header": "not a complete safetensors file",
    "nan": "layers.3.mlp.gate.remoe_delta in .* holds NaN or Inf",
    "shape": r"layers.3.mlp.gate.remoe_delta is \[8, 31\], the router needs \[8, 32\]",
    "missing": "missing model.layers.3.mlp.gate.remoe_delta",
    "unexpected": "unexpected model.layers.7.mlp.gate.remoe_delta",
    "foreign": "holds no remoe_ tensors",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_and_leave_the_model_alone(damage: str, saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved
    bad = damaged(adapter, tmp_path, damage)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    for low_cpu_mem_usage in (False, True):
        with pytest.raises(AdapterCorruptError, match=DAMAGES[damage]):
            PeftModel.from_pretrained(model, bad, low_cpu_mem_usage=low_cpu_mem_usage)
        assert untouched(model) and torch.equal(logits(model), before)
    wrapped = PeftModel.from_pretrained(model, adapter)
    expected = logits(wrapped)
    with pytest.raises(AdapterCorruptError, match=DAMAGES[damage]):
        wrapped.load_adapter(bad, "bad")
    assert list(wrapped.peft_config) == ["default"] and torch.equal(logits(wrapped), expected)
    assert all(layer.adapters == {"default"} for layer in remoe_layers(wrapped).values())


@pytest.mark.parametrize("damage", ["nan", "shape", "missing", "unexpected"])
def test_state_dicts_are_checked_before_the_first_tensor_is_copied(damage: str, saved: Any, tmp_path: Path) -> None:
    base, adapter, expected = saved
    tensors = load_file(damaged(adapter, tmp_path, damage) / WEIGHTS)
    # What was good in the file differs from what is loaded: a partial copy would show.
    tensors = {key: value + 1.0 for key, value in tensors.items()}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    with pytest.raises(AdapterCorruptError):
        set_peft_model_state_dict(model, tensors)
    assert torch.equal(logits(model), expected)
    if damage in ("nan", "shape"):
        with pytest.raises(AdapterCorruptError):
            model.load_state_dict({f"{key}.default": value for key, value in tensors.items()}, strict=False)
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_transformers_own_loading_refuses_them_too(damage: str, saved: Any, tmp_path: Path) -> None:
    base, adapter, expected = saved
    bad = damaged(adapter, tmp_path, damage)
    model = AutoModelForCausalLM.from_pretrained(base)
    before = logits(model)
    with pytest.raises(AdapterCorruptError, match=DAMAGES[damage]):
        model.load_adapter(str(bad), "mine")
    assert untouched(model) and torch.equal(logits(model), before)
    model.load_adapter(str(adapter), "mine")
    assert torch.equal(logits(model), expected)


def test_a_state_dict_given_to_transformers_takes_no_nan(saved: Any, tmp_path: Path) -> None:
    base, adapter, _ = saved
    model = AutoModelForCausalLM.from_pretrained(base)
    tensors = load_file(damaged(adapter, tmp_path, "nan") / WEIGHTS)
    before = logits(model)
    with pytest.raises(AdapterCorruptError, match=r"3.mlp.gate.remoe_delta in the state dict holds NaN or Inf"):
        model.load_adapter(None, peft_config=PeftConfig.from_pretrained(adapter), adapter_state_dict=tensors)
    assert untouched(model) and torch.equal(logits(model), before)
