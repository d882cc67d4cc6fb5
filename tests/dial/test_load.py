"""get_remoe_model: every kind of base, profile and family, and what it refuses; the swap benchmark on top."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_families import tiny_family
from tiny_models import tiny_model
from torch import Tensor
from watched_decoding import IDS

from remoe_adapt import load_profile
from remoe_adapt.bench import swap as swap_bench
from remoe_adapt.bench.harness.results import append_row, environment
from remoe_adapt.bench.swap import run_swap
from remoe_adapt.dial.load import get_remoe_model, load_base_under, profile_of
from remoe_adapt.errors import (
    AdapterConflictError,
    ConfigError,
    DialError,
    FamilyError,
    FingerprintMismatchError,
    ProfileError,
    RouterNotFoundError,
    UncacheableError,
)
from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.pressure.reading import Measure, Reading
from remoe_adapt.pressure.signals import weigh
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base model and, in `family`, its family."""
    folder = tmp_path_factory.mktemp("load") / "base"
    base: Any = tiny_model("qwen2_moe")
    base.save_pretrained(folder)
    tiny_family(base, folder / "family")
    return folder


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=IDS).logits
    return logits


def expected_logits(strength: float, family: Family) -> Tensor:
    """Logits of a plain model whose router weights were overwritten with the family's."""
    plain = tiny_model("qwen2_moe")
    weights = original_weights(plain)
    with torch.no_grad():
        for name, live_ED in family.live(strength, weights).items():
            weights[name].copy_(live_ED)
    return logits_of(plain)


def with_lora(base: Any, seed: int) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return get_peft_model(base, config, "style")


def test_a_path_a_model_and_every_way_to_name_a_family(saved: Path) -> None:
    family = Family.load(saved / "family")
    bases: list[Any] = [str(saved), saved, tiny_model("qwen2_moe")]
    given_families: list[Any] = [str(saved / "family"), saved / "family", family]
    for base, given in zip(bases, given_families, strict=True):
        model = get_remoe_model(base, family=given)
        assert isinstance(model, PeftModel) and not model.training
        assert model.get_base_model().__dict__["controller"] is model.controller
        assert torch.equal(logits_of(model), expected_logits(0.0, family))
        model.controller.set_pressure(0.7)
        assert torch.equal(logits_of(model), expected_logits(0.7, family)), "the default profile: strength is pressure"
        assert model.controller.status()["profile"] == "default"
    assert model.get_base_model() is bases[2], "the object given, not a copy"


def test_without_a_profile_a_machine_in_ordinary_use_is_calm() -> None:
    default = profile_of(None)

    def pressure(available: float, total: float, **more: float) -> float:
        values = {"memory.available": available * 2**30, "memory.total": total * 2**30, **more}
        reading = Reading(1.0, {name: Measure(value, "", 1.0) for name, value in values.items()})
        return max(signal.pressure for signal in weigh(reading, default).memory)

    assert pressure(3.0, 32.0, **{"process.faults": 20_000.0}) == 0.0, "a model that was just loaded"
    assert pressure(1.2, 4.0) == pressure(0.2, 0.5) == 0.0
    assert pressure(0.4, 32.0) == 1.0 == default.strength_at(1.0)


def test_loading_options_reach_the_loader(saved: Path) -> None:
    model = get_remoe_model(saved, family=saved / "family", dtype=torch.bfloat16)
    assert {weight.dtype for weight in original_weights(model).values()} == {torch.bfloat16}
    model.controller.set_strength(1.0)
    live = Family.load(saved / "family").live(1.0, original_weights(model))
    for name, layer in remoe_layers(model).items():
        assert torch.equal(layer.base_weight_ED, live[name])


def test_a_profile_leaves_experts_in_storage(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    profile, family = load_profile("orin-8gb"), Family.load(saved / "family")
    model = get_remoe_model(saved, profile, family)
    experts = model.get_base_model().expert_cache
    assert experts.policy == "lrfu" and experts.budget_bytes == experts.source.total_bytes // 4
    model.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), expected_logits(1.0, family))
    assert model.controller.status()["bytes_read"] > 0
    layers = model.controller.status()["expert_cache"]["layers"]
    assert len(layers) == 4 and all({"hits", "misses", "bytes", "stall_s"} <= set(layer) for layer in layers)
    assert not hasattr(get_remoe_model(saved, "server", family).get_base_model(), "expert_cache"), "all may be there"
    more = get_remoe_model(saved, profile, family, expert_cache=0.5).get_base_model().expert_cache
    assert more.budget_bytes == experts.source.total_bytes // 2
    other = get_remoe_model(saved, "server", family, policy="lru", prefetch=True).get_base_model().expert_cache
    assert other.policy == "lru" and other.budget_bytes == other.source.total_bytes
    whole = get_remoe_model(saved, profile, family, device_map="cpu").get_base_model()
    assert not hasattr(whole, "expert_cache") and "device_map: profile orin-8gb builds no expert cache" in caplog.text
    with pytest.raises(ConfigError, match="expert_cache: options of loading, but base is a model"):
        get_remoe_model(tiny_model("qwen2_moe"), profile, family, expert_cache=0.5)


def test_the_profile_s_memory_bounds_the_slots(saved: Path) -> None:
    profile = load_profile("orin-8gb")
    whole = load_base_under(profile, saved)
    experts: Any = whole.expert_cache
    dense_bytes = sum(tensor.nbytes for tensor in [*whole.parameters(), *whole.buffers()])
    limit = (dense_bytes + experts.source.expert_bytes[0] * 3) * 16 // 15 + 16
    narrow = replace(profile, memory=replace(profile.memory, budget_bytes=limit))
    slots: Any = load_base_under(narrow, saved).expert_cache
    assert (
        slots.budget_bytes // experts.source.expert_bytes[0] == 3 < experts.budget_bytes // slots.source.expert_bytes[0]
    )
    with pytest.raises(ConfigError, match="the dense part alone takes"):
        load_base_under(replace(profile, memory=replace(profile.memory, budget_bytes=dense_bytes)), saved)


def test_models_that_cannot_be_cached_are_loaded_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base: Any = tiny_model("jetmoe")
    base.save_pretrained(tmp_path / "jet")
    model = load_base_under(load_profile("orin-8gb"), tmp_path / "jet")
    assert "loaded whole" in caplog.text and not hasattr(model, "expert_cache")
    torch.testing.assert_close(logits_of(model), logits_of(base))
    with pytest.raises(UncacheableError, match="cannot be cached"):
        load_base_under(load_profile("orin-8gb"), tmp_path / "jet", 0.5)


def test_without_a_family_the_profile_is_asked_by_the_base_s_id(saved: Path) -> None:
    profile = replace(load_profile("orin-8gb"), families={str(saved): str(saved / "family"), "other/base": None})
    assert get_remoe_model(str(saved), profile).controller.status()["points"] == [0.25, 0.5, 1.0]
    loaded: Any = get_remoe_model(str(saved), profile).unload()
    assert get_remoe_model(loaded, profile).controller.family.path == saved / "family", "by the model's own name"
    with pytest.raises(FamilyError, match=r"only the recency prior.*remoe train .*--data .*family="):
        get_remoe_model(tiny_model("phimoe"))


def test_lora_inside_keeps_working_and_comes_out_unharmed(saved: Path, tmp_path: Path) -> None:
    family = Family.load(saved / "family")
    lora = with_lora(tiny_model("qwen2_moe"), seed=3)
    alone = logits_of(lora)
    assert not torch.equal(alone, expected_logits(0.0, family))
    model = get_remoe_model(lora, family=family)
    assert model.get_base_model() is lora.get_base_model() and lora.controller is model.controller
    assert torch.equal(logits_of(model), alone) and torch.equal(logits_of(lora), alone)
    model.controller.set_strength(1.0)
    both = logits_of(model)
    # The same by hand: LoRA on a base whose routers were overwritten.
    by_hand: Any = tiny_model("qwen2_moe")
    with torch.no_grad():
        weights = original_weights(by_hand)
        for name, live_ED in family.live(1.0, weights).items():
            weights[name].copy_(live_ED)
    assert torch.equal(both, logits_of(with_lora(by_hand, seed=3))) and not torch.equal(both, alone)
    with lora.disable_adapter():
        assert torch.equal(logits_of(model), expected_logits(0.0, family)), "PEFT's LoRA switches every adapter off"
    assert torch.equal(logits_of(model), both)
    with model.disable_adapter():
        assert torch.equal(logits_of(lora), alone), "dial off, LoRA on"
    lora.save_pretrained(str(tmp_path))
    reloaded = PeftModel.from_pretrained(tiny_model("qwen2_moe"), str(tmp_path / "style"))
    assert torch.equal(logits_of(reloaded), alone)
    model.unload()
    assert torch.equal(logits_of(lora), alone) and not remoe_layers(lora)


def test_lora_merged_under_an_open_dial_leaves_the_dial_on(saved: Path) -> None:
    lora = with_lora(tiny_model("qwen2_moe"), seed=3)
    model = get_remoe_model(lora, family=saved / "family")
    model.controller.set_strength(0.5)
    before = logits_of(model)
    merged: Any = lora.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), before, rtol=1e-4, atol=1e-5)
    assert remoe_layers(merged) and merged.controller.strength == 0.5
    merged.controller.set_strength(1.0)
    assert not torch.allclose(logits_of(merged), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["fingerprint", "dial", "remoe", "name", "kwargs", "profile", "path", "dense", "points"]
)
def test_what_cannot_work_is_one_clear_error_and_the_model_is_untouched(saved: Path, kind: str) -> None:
    base: Any = tiny_model("qwen2_moe", seed=1 if kind == "fingerprint" else 0)
    keys = set(base.state_dict())
    family: Any = Family.load(saved / "family")
    if kind == "fingerprint":
        base.config._name_or_path = "other/base"
        with pytest.raises(FingerprintMismatchError, match=r"tests/tiny-base.*other/base.*force=True"):
            get_remoe_model(base, family=family)
    elif kind == "dial":
        model = get_remoe_model(base, family=family)
        for again in (base, model):
            with pytest.raises(DialError, match="a dial already"):
                get_remoe_model(again, family=family)
        model.controller.close()
        base = model.unload()
        base = get_remoe_model(base, family=family).unload()
    elif kind == "remoe":
        adapted = get_peft_model(base, RemoeConfig(init_weights=False), "mine")
        with pytest.raises(AdapterConflictError, match="mine"):
            get_remoe_model(adapted, family=family)
        base = adapted.unload()
    elif kind == "name":
        lora = with_lora(base, seed=0)
        with pytest.raises(AdapterConflictError, match="style"):
            get_remoe_model(lora, family=family, adapter_name="style")
        base = lora.unload()
    elif kind == "kwargs":
        with pytest.raises(ConfigError, match="device_map"):
            get_remoe_model(base, family=family, device_map="cpu")
    elif kind == "profile":
        with pytest.raises(ProfileError, match="orin-8gb"):
            get_remoe_model(base, "orin-8g", family)
    elif kind == "path":
        with pytest.raises(ConfigError, match="nowhere/at-all"):
            get_remoe_model("nowhere/at-all", family=family)
    elif kind == "dense":
        with pytest.raises(RouterNotFoundError):
            get_remoe_model(tiny_model("llama"), family=family)
    else:
        with pytest.raises(FamilyError, match="no points"):
            get_remoe_model(base, family=Family.create(saved / "empty", "x", family.fingerprint))
    assert set(base.state_dict()) == keys and "controller" not in base.__dict__ and "generate" not in base.__dict__


def test_a_foreign_family_can_be_forced_and_starts_at_the_base(saved: Path) -> None:
    base = tiny_model("qwen2_moe", seed=1)
    before = logits_of(base)
    model = get_remoe_model(base, family=saved / "family", force=True)
    assert torch.equal(logits_of(model), before)
    model.controller.set_strength(1.0)
    assert not torch.equal(logits_of(model), before)


def test_a_family_of_some_routers_leaves_the_others_alone(tmp_path: Path) -> None:
    base = tiny_model("qwen2_moe")
    family = Family.create(tmp_path / "part", "tests/tiny-base", "")
    adapted = get_peft_model(tiny_model("qwen2_moe"), RemoeConfig(layers_to_transform=[1, 2], init_weights=False))
    adapted.save_pretrained(str(tmp_path / "part" / "s100"))
    family.fingerprint = fingerprint(base)
    family.add_point(1.0, "s100")
    model = get_remoe_model(base, family=Family.load(family.path))
    assert list(remoe_layers(model)) == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    model.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), logits_of(adapted))


def test_the_swap_benchmark_looks_for_its_model_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(swap_bench, "_time_swaps", lambda *_: pytest.fail("timed before the model was looked for"))
    with pytest.raises(ConfigError, match="no/such/model"):
        run_swap("no/such/model", num_routers=1, num_experts=4, hidden_size=8)


def test_the_swap_benchmark_measures_what_it_says(saved: Path, tmp_path: Path) -> None:
    result = run_swap(
        str(saved),
        str(saved / "family"),
        num_routers=3,
        num_experts=8,
        hidden_size=32,
        swaps=20,
        peft_swaps=4,
        forwards=6,
    )
    assert result["recompiles"] == 0 and result["routers"] == 3
    assert all(result[key] > 0 for key in ("swap_ms", "stage_ms", "peft_swap_ms", "forward_ratio", "base_forward_ms"))
    row = {**environment(), **result}
    append_row(tmp_path / "results" / "swap.csv", row)
    append_row(tmp_path / "results" / "swap.csv", row)
    lines = (tmp_path / "results" / "swap.csv").read_text().splitlines()
    assert len(lines) == 3 and lines[0].startswith("date,") and ",commit,routers," in lines[0] and lines[1] == lines[2]
    append_row(tmp_path / "results" / "swap.csv", {"other": 1.0})
    assert (tmp_path / "results" / "swap.csv").read_text() == "other\n1\n"
