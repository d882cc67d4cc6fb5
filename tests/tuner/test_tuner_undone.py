"""Loading an adapter is all or nothing, and names that PEFT cannot save are refused."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    HEAD,
    INTO_A_BASE,
    PREFIX,
    ROUTER,
    WEIGHTS,
    as_a_second_one,
    base_at,
    by_peft,
    by_transformers,
    changed,
    logits,
    same_state,
    saved_adapter,
    saved_home,
    state_of,
)
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from tiny_models import HIDDEN, LAYERS, tiny_model
from torch import Tensor, nn

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import AdapterConflictError, AdapterCorruptError, ConfigError
from remoe_adapt.family.family import Family
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers
from remoe_adapt.tuner.peft_compat import wrap_or_inject


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_home(tmp_path_factory.mktemp("home"))


def test_modules_to_save_come_back_by_every_route(home: Path, tmp_path: Path) -> None:
    model = get_peft_model(base_at(home / "base"), RemoeConfig(init_weights=False, modules_to_save=["lm_head"])).eval()
    with torch.no_grad():
        model.base_model.model.lm_head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    for route in INTO_A_BASE:
        assert torch.equal(logits(route(base_at(home / "base"), tmp_path).eval()), logits(model))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: {key: value for key, value in t.items() if key != HEAD}, "missing lm_head.weight"),
        (lambda t: t | {HEAD: torch.zeros(95, HIDDEN)}, r"lm_head.weight is \[95, 32\], the module needs \[96, 32\]"),
        (lambda t: t | {HEAD: torch.zeros(96, HIDDEN).int()}, "lm_head.weight .*has type torch.int32"),
        (lambda t: t | {HEAD: torch.full((96, HIDDEN), torch.nan)}, "lm_head.weight .*NaN"),
        (lambda t: t | {f"{PREFIX}lm_head.bias": torch.zeros(96)}, "unexpected lm_head.bias"),
    ],
)
def test_a_bad_copy_of_a_module_leaves_the_model_alone(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str, home: Path, tmp_path: Path
) -> None:
    bad = changed(home / "copied", tmp_path / "bad", damage)
    for route in (by_peft, by_transformers):
        model = base_at(home / "base")
        before = state_of(model)
        with pytest.raises(AdapterCorruptError, match=words):
            route(model, bad)
        assert same_state(state_of(model), before)
    model = by_peft(base_at(home / "base"), home / "adapter").eval()
    before = state_of(model)
    with pytest.raises(AdapterCorruptError, match=words):
        as_a_second_one(model, bad)
    assert same_state(state_of(model), before)


MOMENTS = [
    "peft.peft_model.load_peft_weights",
    "peft.peft_model.set_peft_model_state_dict",
    "peft.tuners.tuners_utils.set_additional_trainable_modules",
    "remoe_adapt.tuner.model.check_stored",
]


@pytest.mark.parametrize("fault", [KeyboardInterrupt, OSError("read-only")])
@pytest.mark.parametrize("moment", MOMENTS)
def test_an_interrupt_at_any_moment_leaves_the_model_as_it_was(
    moment: str, fault: Any, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise fault

    for route in (by_peft, by_transformers, as_a_second_one):
        model = base_at(home / "base")
        if route is as_a_second_one:
            model = get_peft_model(model, RemoeConfig(init_weights=False), "first").eval()
        before = state_of(model)
        with monkeypatch.context() as patch:
            patch.setattr(moment, interrupted)
            if route is by_transformers and moment.startswith("peft.peft_model"):
                patch.setattr(type(model), "_load_pretrained_model", interrupted)
            with pytest.raises(type(fault) if isinstance(fault, Exception) else fault):
                route(model, home / "copied")
        assert same_state(state_of(model), before), route.__name__
        again = route(model, home / "copied")
        assert "lm_head" in str(again.peft_config)


def test_an_interrupt_between_tensors_of_an_adapter_loaded_again_keeps_the_old_ones(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = by_peft(base_at(home / "base"), home / "copied").eval()
    before = state_of(model)
    other = changed(home / "copied", tmp_path / "other", lambda t: {key: value + 1 for key, value in t.items()})
    load = RemoeLayer._load_from_state_dict
    seen: list[str] = []

    def interrupted(self: RemoeLayer, state_dict: Any, prefix: str, *args: Any) -> None:
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(prefix)
        load(self, state_dict, prefix, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RemoeLayer, "_load_from_state_dict", interrupted)
        with pytest.raises(KeyboardInterrupt):
            model.load_adapter(other, "default")
    assert same_state(state_of(model), before)
    model.load_adapter(other, "default")
    assert not torch.equal(logits(model.eval()), before["logits"])


def test_a_failed_load_of_another_type_is_left_to_peft(home: Path, tmp_path: Path) -> None:
    lora = get_peft_model(base_at(home / "base"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert list(load_file(tmp_path / "lora" / WEIGHTS))
    base = base_at(home / "base")
    loaded = PeftModel.from_pretrained(base, tmp_path / "lora")
    with pytest.raises(ValueError, match="Can't find"):
        loaded.load_adapter(tmp_path / "nowhere", "other")
    assert torch.equal(logits(loaded.eval()), logits(lora.eval()))


NAMES = ["mlp", "gate", "layers", "model", "0", "weight", "lm_head", "base_layer", "remoe_delta", "modules_to_save"]


@pytest.mark.parametrize("name", NAMES)
def test_a_name_that_is_part_of_a_path_is_refused_by_every_route(name: str, home: Path) -> None:
    base = base_at(home / "base")
    before = state_of(base)
    attempts: list[Callable[[], Any]] = [
        lambda: get_peft_model(base, RemoeConfig(), name),
        lambda: wrap_or_inject(base, RemoeConfig(), name),
        lambda: inject_adapter_in_model(RemoeConfig(), base, name),
        lambda: PeftModel.from_pretrained(base, home / "adapter", name),
        lambda: base.load_adapter(str(home / "adapter"), name),
    ]
    for attempt in attempts:
        with pytest.raises(AdapterConflictError, match=f"adapter name '{name}' is part of the path"):
            attempt()
        assert same_state(state_of(base), before)
    model = get_peft_model(base, RemoeConfig(init_weights=False), "first").eval()
    before = state_of(model)
    attempts = [
        lambda: model.add_adapter(name, RemoeConfig()),
        lambda: model.load_adapter(home / "adapter", name),
        lambda: model.base_model.add_weighted_adapter(["first"], [1.0], name),
        lambda: get_peft_model(base, LoraConfig(target_modules=["q_proj"]), name),
    ]
    for number, attempt in enumerate(attempts):
        with pytest.raises(AdapterConflictError, match="part of the path"), pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *_, **__: None)  # of a second tuner on one base
            attempt()
        if number < 3:
            assert same_state(state_of(model), before)
    assert set(model.peft_config) == {"first"}


def test_beside_an_adapter_of_such_a_name_there_is_no_place(home: Path) -> None:
    lora = get_peft_model(base_at(home / "base"), LoraConfig(target_modules=["q_proj"]), "mlp").eval()
    before = state_of(lora)
    with pytest.raises(AdapterConflictError, match="adapter name 'mlp' is part of the path"):
        wrap_or_inject(lora, RemoeConfig(), "reuse")
    assert same_state(state_of(lora), before)


def test_names_of_adapters_and_of_what_they_hold_are_no_paths(home: Path, tmp_path: Path) -> None:
    model = get_peft_model(base_at(home / "base"), RemoeConfig(init_weights=False, modules_to_save=["lm_head"]), "one")
    for name in ("two", "three"):
        model.add_adapter(name, RemoeConfig(init_weights=False))
    model.save_pretrained(tmp_path)
    for name, count in (("one", LAYERS + 1), ("two", LAYERS), ("three", LAYERS)):
        assert len(load_file(tmp_path / name / WEIGHTS)) == count


@pytest.mark.parametrize("name", ["remoe_head", "head.remoe_x", "remoe_delta", "delta", "_A", "base_layer", "layer"])
def test_copies_of_modules_that_could_not_be_loaded_are_refused_when_named(name: str) -> None:
    with pytest.raises(ConfigError, match="modules_to_save"):
        RemoeConfig(modules_to_save=[name])


def test_adapters_whose_sum_is_infinite_are_not_switched_on_together(home: Path, tmp_path: Path) -> None:
    def large(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.full_like(value, 2e16) for key, value in tensors.items()}

    bad = changed(home / "adapter", tmp_path / "large", large)
    model = PeftModel.from_pretrained(base_at(home / "base"), bad, "one").eval()
    model.load_adapter(bad, "two")
    before = state_of(model)
    with pytest.raises(AdapterCorruptError, match="together"):
        model.base_model.set_adapter(["one", "two"])
    assert same_state(state_of(model), before)


def test_a_point_of_a_family_with_a_prior_says_what_it_lacks(
    home: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = base_at(home / "base")
    family = Family.create(tmp_path / "family", "tests/base", fingerprint(base))
    plain = saved_adapter(home / "base", tmp_path / "plain")
    family.add_point(0.5, plain)
    family.add_point(1.0, plain, Recency("ema", (0.3,) * LAYERS, 0.7))

    def said(load: Callable[[], Any]) -> list[str]:
        caplog.clear()
        with caplog.at_level(logging.WARNING, "remoe_adapt"):
            load()
        return [record.getMessage() for record in caplog.records if "recency" in record.getMessage()]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(family.path / "s100")
        assert len(said(lambda: by_peft(base_at(home / "base"), Path()))) == 1
    for route in (by_transformers, by_peft):
        from remoe_adapt._support.process import say_once

        say_once.cache_clear()
        (message,) = said(lambda route=route: route(base_at(home / "base"), family.path / "s100"))  # type: ignore[misc]
        assert "get_remoe_model" in message and "recency_prior" in message and "s100" in message
    assert not said(lambda: by_peft(base_at(home / "base"), family.path / "s100"))  # once
    assert not said(lambda: by_peft(base_at(home / "base"), family.path / "s050"))
    assert not said(lambda: Family.load(family.path))
    shutil.copytree(family.path / "s100", tmp_path / "alone" / "s100")
    assert not said(lambda: by_peft(base_at(home / "base"), tmp_path / "alone" / "s100"))


def test_a_router_named_by_modules_to_save_is_not_adapted_twice() -> None:
    base: nn.Module = tiny_model("qwen2_moe")
    with pytest.raises(ValueError, match="targeted"):
        get_peft_model(base, RemoeConfig(modules_to_save=["gate"]))
    assert not remoe_layers(base) and ROUTER in dict(base.named_modules())


@pytest.mark.filterwarnings("ignore:Could not find a config file")
def test_an_adapter_has_a_card_that_says_what_it_is(home: Path, tmp_path: Path) -> None:
    model = get_peft_model(base_at(home / "base"), RemoeConfig(rank=2, reuse_weight=0.5))
    model.base_model.model.name_or_path = "a/b`\n# evil | <b>"
    model.add_adapter("other", RemoeConfig())
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "More Information Needed" not in text and "library_name: peft" in text and "PEFT" in text
    assert "| `default` | 4 | rank 2 | reuse 0.5 |" in text and "| `other` | 4 | full deltas |" in text
    assert "PeftModel.from_pretrained" in text and "# evil" not in text.splitlines()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nmy own words\n")
    model.save_pretrained(tmp_path)
    assert "my own words" in (tmp_path / "README.md").read_text()
    lora = get_peft_model(base_at(home / "base"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    assert "REMOE" not in (tmp_path / "lora" / "README.md").read_text()
