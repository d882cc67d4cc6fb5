"""Adapters of others: what must not reach a model, by any route that loads one."""

from __future__ import annotations

import json
import struct
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_files import (
    CONFIG,
    HEAD,
    INTO_A_BASE,
    PREFIX,
    ROUTER,
    WEIGHTS,
    WITHOUT_A_BASE,
    as_a_second_one,
    base_at,
    by_peft,
    changed,
    logits,
    same_state,
    saved_home,
    state_of,
)
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from tiny_models import HIDDEN, NUM_EXPERTS
from torch import Tensor

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import AdapterCorruptError, ConfigError, FingerprintMismatchError
from remoe_adapt.tuner.layer import remoe_layers

DELTA = f"{PREFIX}{ROUTER}.remoe_delta"
Route = Callable[..., Any]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_home(tmp_path_factory.mktemp("home"))


def refused(home: Path, adapter: Path, error: type[Exception], words: str, *, given: bool = True) -> None:
    """By every route, with the model as it was; `given`: also where the caller brings the configuration."""
    for route in INTO_A_BASE if given else INTO_A_BASE[:2] + INTO_A_BASE[3:]:
        model = base_at(home / "base")
        before = state_of(model)
        with pytest.raises(error, match=words):
            route(model, adapter)
        assert same_state(state_of(model), before), route.__name__
    model = get_peft_model(base_at(home / "base"), RemoeConfig(init_weights=False), "first").eval()
    before = state_of(model)
    with pytest.raises(error, match=words):
        as_a_second_one(model, adapter)
    assert same_state(state_of(model), before)
    for whole in WITHOUT_A_BASE:
        with pytest.raises(error, match=words):
            whole(adapter)


def with_head(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {HEAD: torch.zeros(96, HIDDEN)}


def with_embeddings(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {f"{PREFIX}model.embed_tokens.weight": torch.zeros(96, HIDDEN)}


def with_the_router_itself(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {f"{PREFIX}{ROUTER}.base_layer.weight": torch.zeros(NUM_EXPERTS, HIDDEN)}


def twice(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {DELTA.removeprefix(PREFIX): torch.zeros(NUM_EXPERTS, HIDDEN)}


def as_type(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {DELTA: tensors[DELTA].to(dtype)}


def of_value(value: float, dtype: torch.dtype = torch.float32) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {DELTA: torch.full((NUM_EXPERTS, HIDDEN), value, dtype=dtype)}


ATTACKS: dict[str, tuple[Callable[[dict[str, Tensor]], Mapping[str, Tensor]], str]] = {
    "head": (with_head, "unexpected lm_head.weight.*overwrite the base"),
    "embeddings": (with_embeddings, "unexpected model.embed_tokens.weight.*overwrite the base"),
    "router": (with_the_router_itself, r"unexpected .*base_layer\.weight"),
    "twice": (twice, "twice"),
    "int8": (as_type(torch.int8), "type I8"),
    "bool": (as_type(torch.bool), "type BOOL"),
    "complex": (as_type(torch.complex64), "type C64"),
    "f8": (as_type(torch.float8_e4m3fn), "type F8_E4M3"),
    "overflow": (of_value(1e300, torch.float64), "holds NaN or Inf"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_what_is_not_the_adapter_s_own_is_refused_by_every_route(attack: str, home: Path, tmp_path: Path) -> None:
    tensors, words = ATTACKS[attack]
    refused(home, changed(home / "adapter", tmp_path / "bad", tensors), AdapterCorruptError, words)


@pytest.mark.parametrize("attack", ["head", "router", "twice", "int8", "complex", "overflow"])
def test_state_dicts_given_by_the_caller_are_refused_too(attack: str, home: Path) -> None:
    tensors = dict(ATTACKS[attack][0](load_file(home / "adapter" / WEIGHTS)))
    base = base_at(home / "base")
    before = state_of(base)
    with pytest.raises(AdapterCorruptError):
        base.load_adapter(None, peft_config=PeftConfig.from_pretrained(home / "adapter"), adapter_state_dict=tensors)
    assert same_state(state_of(base), before)
    model = by_peft(base, home / "adapter").eval()
    before = state_of(model)
    with pytest.raises(AdapterCorruptError):
        set_peft_model_state_dict(model, tensors)
    assert same_state(state_of(model), before)


def test_a_delta_that_stands_there_twice_by_the_adapter_s_name_is_refused(home: Path, tmp_path: Path) -> None:
    adapter = changed(home / "adapter", tmp_path / "bad", lambda held: held | {f"{DELTA}.default": held[DELTA] * 2})
    model = by_peft(base_at(home / "base"), home / "adapter").eval()
    before = state_of(model)
    with pytest.raises(AdapterCorruptError, match="twice"):
        model.load_adapter(adapter, "default")
    with pytest.raises(AdapterCorruptError, match="twice"):
        set_peft_model_state_dict(model, load_file(adapter / WEIGHTS))
    assert same_state(state_of(model), before)


def test_fp64_deltas_are_fine(home: Path, tmp_path: Path) -> None:
    exact = changed(home / "adapter", tmp_path / "exact", as_type(torch.float64))
    expected = logits(by_peft(base_at(home / "base"), home / "adapter").eval())
    for route in INTO_A_BASE:
        assert torch.equal(logits(route(base_at(home / "base"), exact).eval()), expected)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [
        (torch.float32, 3e38),
        (torch.float32, 3.4e38),
        (torch.float16, 7e4),
        (torch.float16, 6e4),
        (torch.bfloat16, 3e38),
    ],
)
def test_finite_deltas_that_make_live_weights_or_logits_infinite_are_refused(
    dtype: torch.dtype, value: float, home: Path, tmp_path: Path
) -> None:
    bad = changed(home / "adapter", tmp_path / "bad", of_value(value), base_fingerprint=None)
    for route in INTO_A_BASE:
        model = base_at(home / "base", dtype=dtype)
        before = state_of(model)
        with pytest.raises(AdapterCorruptError, match="infinite or NaN"):
            route(model, bad)
        assert same_state(state_of(model), before)


def test_factors_whose_product_is_infinite_are_refused(home: Path, tmp_path: Path) -> None:
    def large(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return {key: torch.full_like(value, 1e30) for key, value in tensors.items()}

    refused(home, changed(home / "low", tmp_path / "bad", large), AdapterCorruptError, "infinite or NaN")


def test_tensors_that_would_be_huge_are_compared_with_the_model_first(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bomb(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        low = f"{PREFIX}{ROUTER}.remoe_"
        return tensors | {f"{low}A": torch.zeros(3, 50_000), f"{low}B": torch.zeros(50_000, 3)}

    def empty(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        low = f"{PREFIX}{ROUTER}.remoe_"
        return tensors | {f"{low}A": torch.zeros(0, 10_000_000), f"{low}B": torch.zeros(10_000_000, 0)}

    largest = 0
    product = Tensor.__matmul__

    def watched(left: Tensor, right: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, left.shape[0] * right.shape[-1])
        return product(left, right)

    monkeypatch.setattr(Tensor, "__matmul__", watched)
    for name, attack in (("bomb", bomb), ("empty", empty)):
        words = r"the router needs \[(3, 32|8, 3)\]"
        refused(home, changed(home / "low", tmp_path / name, attack), AdapterCorruptError, words)
    assert largest <= 96 * HIDDEN
    with pytest.raises(ConfigError, match=r"rank=1000000: router .* a full delta \(rank=None\) is smaller"):
        get_peft_model(base_at(home / "base"), RemoeConfig(rank=1_000_000))


def test_a_header_of_any_size_is_not_read(home: Path, tmp_path: Path) -> None:
    bad = changed(home / "adapter", tmp_path / "bad")
    with (bad / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", 60 << 20) + b"{" + b" " * (5 << 20))
        file.truncate((60 << 20) + 8)
    refused(home, bad, AdapterCorruptError, "its header would have 62914560 bytes")
    header = json.dumps({"a.remoe_delta": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    double = b'{"x":' + header + b',"x":1}'
    (bad / WEIGHTS).write_bytes(struct.pack("<Q", len(double)) + double)
    refused(home, bad, AdapterCorruptError, "stands twice")


def test_a_pickle_is_refused_by_name(home: Path, tmp_path: Path) -> None:
    bad = changed(home / "adapter", tmp_path / "bad")
    torch.save(load_file(bad / WEIGHTS), bad / "adapter_model.bin")
    for choice in ({}, {"use_safetensors": True}):
        base_at(home / "base").load_adapter(str(bad), "mine", **choice)
    model = base_at(home / "base")
    before = state_of(model)
    with pytest.raises(AdapterCorruptError, match=r"would read that pickle"):
        model.load_adapter(str(bad), "mine", use_safetensors=False)
    assert same_state(state_of(model), before)
    (bad / WEIGHTS).unlink()
    refused(home, bad, AdapterCorruptError, r"only in adapter_model\.bin, a pickle")
    (bad / "adapter_model.bin").unlink()
    refused(home, bad, AdapterCorruptError, r"has no adapter_model\.safetensors")


@pytest.mark.parametrize("spelling", ["allow_other_base", "Allow_Other_Base", "allow-other-base", "allowOtherBase"])
def test_no_file_can_switch_the_check_of_the_base_off(spelling: str, home: Path, tmp_path: Path) -> None:
    bad = changed(home / "adapter", tmp_path / "bad", base_fingerprint="sha256:0", **{spelling: True})
    with _quiet():
        assert PeftConfig.from_pretrained(bad).allow_other_base is False  # type: ignore[attr-defined]
    for route in INTO_A_BASE[:2] + INTO_A_BASE[3:]:
        model = base_at(home / "base")
        before = state_of(model)
        with pytest.raises(FingerprintMismatchError), _quiet():
            route(model, bad)
        assert same_state(state_of(model), before)
        with _quiet():
            assert remoe_layers(route(base_at(home / "base"), bad, allow_other_base=True))
    with _quiet():
        model = get_peft_model(base_at(home / "base"), RemoeConfig(), "first")
        with pytest.raises(FingerprintMismatchError):
            model.load_adapter(bad, "second")
        model.load_adapter(bad, "second", allow_other_base=True)
    assert "second" in model.peft_config


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"rank": "3"}, "rank="),
    ({"rank": 10**18}, "rank="),
    ({"target_modules": 5}, "target_modules="),
    ({"target_modules": [5]}, "target_modules="),
    ({"target_modules": "(gate"}, "target_modules=.*no regular expression"),
    ({"target_modules": "a{99999999999}"}, "target_modules=.*no regular expression"),
    ({"target_modules": "(" * 900 + ")" * 900}, "target_modules="),
    ({"target_modules": None, "exclude_modules": "[gate"}, "exclude_modules=.*no regular expression"),
    ({"modules_to_save": "lm_head"}, "modules_to_save="),
    ({"modules_to_save": ["(a+)+$"]}, "modules_to_save.*no name of a module"),
    ({"modules_to_save": ["remoe_head"]}, "modules_to_save.*adapter itself"),
    ({"modules_to_save": ["delta"]}, "modules_to_save.*adapter itself"),
    ({"layers_to_transform": [1], "layers_pattern": "(a+)+$", "target_modules": None}, "layers_pattern.*no name"),
    ({"layers_to_transform": ["1"], "target_modules": None}, "layers_to_transform="),
    ({"base_fingerprint": ["x"]}, "base_fingerprint="),
    ({"base_fingerprint": 5}, "base_fingerprint="),
    ({"inference_mode": "yes"}, "inference_mode="),
    ({"reuse_weight": "much"}, "reuse_weight="),
    ({"self": 1}, "no field"),
    ({"target_modules": "dummy-target-modules"}, "target_modules=.*no effect"),
    ({"task_type": "EVIL"}, "task type"),
    ({"task_type": ["CAUSAL_LM"]}, "task type"),
    ({"peft_type": ["REMOE"]}, "no configuration"),
]


@pytest.mark.parametrize(("fields", "words"), FIELDS)
def test_fields_of_a_configuration_are_checked(fields: dict[str, Any], words: str, home: Path, tmp_path: Path) -> None:
    bad = changed(home / "adapter", tmp_path / "bad", **fields)
    model = base_at(home / "base")
    before = state_of(model)
    for load in (lambda: by_peft(model, bad), lambda: model.load_adapter(str(bad), "mine")):
        with pytest.raises((ConfigError, AdapterCorruptError), match=words):
            load()
        assert same_state(state_of(model), before)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"peft_type": "REMOE", "rank": ' + "9" * 400 + "}",
        '{"peft_type": "REMOE", "rank": 1, "rank": 2}',
        '{"peft_type": "REMOE", "reuse_weight": NaN}',
        "null",
        "[]",
        "3",
    ],
)
def test_a_configuration_that_is_no_plain_json_is_one_error(text: str, home: Path, tmp_path: Path) -> None:
    bad = changed(home / "adapter", tmp_path / "bad")
    (bad / CONFIG).write_text(text)
    for load in (PeftConfig.from_pretrained, lambda folder: by_peft(base_at(home / "base"), folder)):
        with pytest.raises(ConfigError, match="adapter_config"):
            load(bad)


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules"])
def test_an_expression_without_end_is_stopped(
    field: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remoe_adapt.tuner.patterns._SECONDS", 2.0)
    endless = r"(([a-z0-9_.])+)+!"
    fields = {"target_modules": None} | {field: endless}
    bad = changed(home / "adapter", tmp_path / "bad", **fields)
    model = base_at(home / "base")
    before = state_of(model)
    with pytest.raises(ConfigError, match=f"{field}=.*takes more than 2 s"):
        by_peft(model, bad)
    assert same_state(state_of(model), before)


def test_expressions_still_choose_routers_and_are_saved_as_names(home: Path, tmp_path: Path) -> None:
    config = RemoeConfig(target_modules=r".*layers\.(1|2)\.mlp\.gate", init_weights=False)
    model = get_peft_model(base_at(home / "base"), config).eval()
    assert list(remoe_layers(model)) == ["model.layers.1.mlp.gate", "model.layers.2.mlp.gate"]
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(by_peft(base_at(home / "base"), tmp_path).eval()), logits(model))
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == list(remoe_layers(model))
    other = get_peft_model(base_at(home / "base"), RemoeConfig(exclude_modules=r".*\.[12]\.mlp\.gate"))
    assert list(remoe_layers(other)) == ["model.layers.0.mlp.gate", "model.layers.3.mlp.gate"]
    again = get_peft_model(base_at(home / "base"), config)  # the object is the user's, expression and all
    assert list(remoe_layers(again)) == list(remoe_layers(model))


def test_texts_of_others_are_printed_without_escapes(home: Path, tmp_path: Path) -> None:
    escape = "\x1b[31mred\x07"
    bad = changed(
        home / "adapter",
        tmp_path / "bad",
        lambda tensors: tensors | {f"{escape}.weight": torch.zeros(1)},
        base_fingerprint=escape,
        base_model_name_or_path=str(home / "base"),
    )
    model = base_at(home / "base")
    for adapter in (bad, changed(home / "adapter", tmp_path / "other", base_fingerprint=escape)):
        with pytest.raises((AdapterCorruptError, FingerprintMismatchError)) as caught:
            by_peft(model, adapter)
        assert "\x1b" not in str(caught.value) and "\x07" not in str(caught.value)


def test_an_adapter_of_the_hub_is_checked_before_the_model_is_touched(home: Path, tmp_path: Path) -> None:
    commit, cache = "0" * 40, tmp_path / "hub"
    place = cache / "models--someone--adapter"
    (place / "refs").mkdir(parents=True)
    (place / "snapshots").mkdir()
    (place / "refs" / "main").write_text(commit)
    bad = changed(home / "adapter", place / "snapshots" / commit, with_head)
    model = base_at(home / "base")
    before = state_of(model)
    where = {"cache_dir": str(cache)}
    with pytest.raises(AdapterCorruptError, match=r"lm_head\.weight"):
        PeftModel.from_pretrained(model, "someone/adapter", **where)
    with pytest.raises(AdapterCorruptError, match=r"lm_head\.weight"):
        model.load_adapter("someone/adapter", adapter_kwargs=where)
    assert same_state(state_of(model), before)
    save_file(load_file(home / "adapter" / WEIGHTS), bad / WEIGHTS)
    expected = logits(by_peft(base_at(home / "base"), home / "adapter").eval())
    assert torch.equal(logits(PeftModel.from_pretrained(model, "someone/adapter", **where).eval()), expected)


@contextmanager
def _quiet() -> Iterator[None]:
    """PEFT warns of fields that it does not know."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
