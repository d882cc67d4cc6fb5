"""Router adapters trained with experts in a cache: bit for bit those that transformers' dequantised model gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import reference, save_quantised
from safetensors.torch import load_file
from tiny_family import byte_tokenizer, save_base, save_words

from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.load import load_with_expert_cache, pack_experts
from remoe_adapt.family.family import Family
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.run import RUN_FILE, train_family

SIZES = {"vocab_size": 257, "max_position_embeddings": 64}
SHORT: dict[str, Any] = {"steps": 4, "batch": 2, "length": 32, "reuse_weight": 1.0, "lr": 0.3}
METHODS = [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    file = tmp_path_factory.mktemp("data") / "words.jsonl"
    save_words(file, 59)
    return [file]


def quantised(folder: Path, architecture: str, method: str) -> Path:
    save_quantised(folder, architecture, method, sizes=SIZES)
    byte_tokenizer().save_pretrained(folder)
    return folder


def same(left: Family, right: Family) -> bool:
    assert left.control is not None and right.control is not None
    pairs = [(left.points[0].deltas, right.points[0].deltas), (left.control.deltas, right.control.deltas)]
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)


@pytest.mark.parametrize("mode", ["end-to-end", "local"])
@pytest.mark.parametrize(("architecture", "method"), METHODS)
def test_adapters_are_those_of_the_dequantised_model(
    architecture: str, method: str, mode: Any, data: list[Path], tmp_path: Path
) -> None:
    folder = quantised(tmp_path / "model", architecture, method)
    options = TrainOptions(**SHORT, mode=mode)
    plain = train_family(
        reference(folder, dtype=torch.float32), data, [1.0], tmp_path / "plain", options=options, progress=False,
        tokenizer=byte_tokenizer(),
    )  # fmt: skip
    assert max(float(delta_ED.abs().max()) for delta_ED in plain.points[0].deltas.values()) > 1e-3, "nothing learnt"
    # Fewer slots than a step needs: experts come and go in forward and backward.
    small = train_family(folder, data, [1.0], tmp_path / "small", options=options, progress=False, expert_cache=0.3)
    assert same(small, plain)
    # A quantised base needs no option.
    assert same(train_family(folder, data, [1.0], tmp_path / "whole", options=options, progress=False), plain)
    assert small.fingerprint == plain.fingerprint


def test_under_the_rule_too(data: list[Path], tmp_path: Path) -> None:
    folder = quantised(tmp_path / "model", "qwen3_moe", "fp8")
    rule = TrainOptions(**SHORT | {"steps": 2}, recency="cost", recency_gain=0.3, recovery_rank=2)
    options: dict[str, Any] = {"tokenizer": byte_tokenizer(), "progress": False, "control": False}
    args: Any = (data, [1.0])
    train_family(reference(folder, dtype=torch.float32), *args, tmp_path / "plain", options=rule, **options)
    cached: dict[str, Any] = {"expert_cache": 0.3, "arithmetic": "exact", **options}
    train_family(folder, *args, tmp_path / "small", options=rule, **cached)
    train_family(folder, *args, tmp_path / "bare", options=replace(rule, recency=None), **cached)

    def learnt(out: str, adapter: str) -> dict[str, torch.Tensor]:
        return load_file(tmp_path / out / adapter / "adapter_model.safetensors")

    for adapter in ("s100", "s100-recovery"):
        small, plain, bare = (learnt(out, adapter) for out in ("small", "plain", "bare"))
        assert small.keys() == plain.keys() and all(torch.equal(small[name], plain[name]) for name in small)
        # The rule was in the forward: without it other experts act.
        assert any(not torch.equal(small[name], bare[name]) for name in small)


def test_a_killed_run_goes_on_and_other_experts_are_another_run(
    data: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, out = quantised(tmp_path / "model", "qwen3_moe", "fp8"), tmp_path / "family"
    args = (folder, data, [1.0], out)
    options: dict[str, Any] = {"options": TrainOptions(**SHORT), "progress": False}
    whole = train_family(*args[:3], tmp_path / "whole", **options)

    class KilledError(Exception):
        pass

    def kill(name: str, log: dict[str, float]) -> None:
        raise KilledError

    with pytest.raises(KilledError):
        train_family(*args, **options, expert_cache=0.3, on_point=kill)
    assert json.loads((out / RUN_FILE).read_text())["experts"] == "fp8"
    # With another budget: where the experts are makes no other adapters.
    assert same(train_family(*args, **options, expert_cache=0.6), whole)
    record = json.loads((out / RUN_FILE).read_text())
    (out / RUN_FILE).write_text(json.dumps({**record, "experts": "float"}))
    with pytest.raises(ConfigError, match="experts was 'float', now 'fp8'"):
        train_family(*args, **options)


def test_a_run_of_before_goes_on(data: list[Path], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    args = (tmp_path / "base", data, [1.0], tmp_path / "family")
    options: dict[str, Any] = {"options": TrainOptions(**SHORT), "progress": False}
    train_family(*args, **options)
    record = json.loads((tmp_path / "family" / RUN_FILE).read_text())
    assert record.pop("experts") == "float"
    (tmp_path / "family" / RUN_FILE).write_text(json.dumps(record))
    assert train_family(*args, **options, expert_cache=0.5).strengths == (1.0,)


def test_experts_may_come_from_a_pack(data: list[Path], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    pack_experts(tmp_path / "base", tmp_path / "pack")
    args: Any = (tmp_path / "base", data, [1.0])
    # The control of two steps, which every run has.
    options: dict[str, Any] = {"options": TrainOptions(**SHORT | {"steps": 2}), "progress": False}
    cached = train_family(*args, tmp_path / "cached", **options, expert_cache=0.3)
    packed = train_family(*args, tmp_path / "packed", **options, expert_cache=0.3, storage=tmp_path / "pack")
    assert same(packed, cached)


def test_fast_arithmetic_is_refused_before_anything_is_written(data: list[Path], tmp_path: Path) -> None:
    folder, out = quantised(tmp_path / "model", "qwen3_moe", "fp8"), tmp_path / "family"
    with pytest.raises(ConfigError, match='arithmetic="fast" is for decoding'):
        train_family(folder, data, [1.0], out, arithmetic="fast")
    with pytest.raises(ConfigError, match="'quick' is not one of auto, fast, exact"):
        train_family(folder, data, [1.0], out, arithmetic="quick")
    model = load_with_expert_cache(folder, 0.5)
    with pytest.raises(ConfigError, match="base is a model already"):
        train_family(model, data, [1.0], out, expert_cache=0.5, tokenizer=byte_tokenizer())
    for layer in model.modules():
        if "cached_experts" in vars(layer):
            layer.cached_experts.layout.is_exact = False
    with pytest.raises(ConfigError, match=r"computes its experts fast \(.+\)"):
        train_family(model, data, [1.0], out, tokenizer=byte_tokenizer())
    assert not out.exists()
