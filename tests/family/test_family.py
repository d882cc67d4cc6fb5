"""Families: files in and out, strict reading, and the one function from strength to weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_families import BASE_ID, edit, save_adapter, tiny_family
from tiny_models import HIDDEN, LAYERS, NUM_EXPERTS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt.errors import AdapterCorruptError, FamilyError, FingerprintMismatchError
from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.layer import remoe_layers


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    model: Any = tiny_model("qwen2_moe")
    model.to(torch.bfloat16)
    assert isinstance(model, PreTrainedModel)
    return model


def test_what_is_written_is_the_format_of_the_design_and_is_read_back(base: PreTrainedModel, family_dir: Path) -> None:
    entries = json.loads((family_dir / "family.json").read_text())
    assert entries == {
        "format": 1,
        "base": {"id": BASE_ID, "fingerprint": fingerprint(base)},
        "points": [{"strength": s, "adapter": a} for s, a in ((0.25, "s025"), (0.5, "s050"), (1.0, "s100"))],
    }
    family = Family.load(str(family_dir))
    assert family.strengths == (0.25, 0.5, 1.0) and family.base_id == BASE_ID and family.control is None
    for point in family.points:
        assert list(point.deltas) == [f"model.layers.{i}.mlp.gate" for i in range(LAYERS)]
        assert {(d.dtype, tuple(d.shape)) for d in point.deltas.values()} == {(torch.float32, (NUM_EXPERTS, HIDDEN))}
    family.check(base)


def test_a_point_is_a_plain_peft_adapter_with_the_same_weights(family_dir: Path) -> None:
    model: Any = tiny_model("qwen2_moe")
    model.to(torch.bfloat16)
    base_weights = {name: w.clone() for name, w in original_weights(model).items()}
    family = Family.load(family_dir)
    for strength, adapter in ((0.25, "s025"), (1.0, "s100")):
        with_adapter = PeftModel.from_pretrained(model, str(family_dir / adapter), adapter_name=adapter)
        live = family.live(strength, base_weights)
        for name, layer in remoe_layers(with_adapter).items():
            assert torch.equal(live[name], layer.effective_weight_ED([adapter]))
            assert live[name].dtype == torch.bfloat16
        with_adapter.unload()


def test_low_rank_points_are_multiplied_out(base: PreTrainedModel, tmp_path: Path) -> None:
    family = tiny_family(base, tmp_path / "low", (1.0,), rank=3)
    stored = load_file(tmp_path / "low" / "s100" / "adapter_model.safetensors")
    name = "model.layers.2.mlp.gate"
    a_RD, b_ER = (stored[f"base_model.model.{name}.remoe_{letter}"] for letter in "AB")
    torch.testing.assert_close(Family.load(family.path).point(1.0).deltas[name], b_ER @ a_RD)
    assert torch.linalg.matrix_rank(family.point(1.0).deltas[name]) == 3


def test_strength_zero_is_the_base_bit_for_bit(family_dir: Path) -> None:
    family = Family.load(family_dir)
    weights = {name: torch.full_like(delta, -0.0) for name, delta in family.points[0].deltas.items()}
    live = family.live(0.0, weights)
    for name, weight in weights.items():
        assert torch.equal(live[name].view(torch.int32), weight.view(torch.int32)), "-0.0 must stay -0.0"
        assert live[name].data_ptr() != weight.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_live_is_the_cast_of_the_interpolated_sum(family_dir: Path, dtype: torch.dtype) -> None:
    family = Family.load(family_dir)
    points = {point.strength: point.deltas for point in family.points}
    weights = {name: torch.randn_like(delta).to(dtype) for name, delta in points[1.0].items()}
    exact = torch.promote_types(dtype, torch.float32)
    mixes: dict[float, Callable[[str], Tensor]] = {
        0.1: lambda n: points[0.25][n] * 0.4,
        0.25: lambda n: points[0.25][n],
        0.4: lambda n: torch.lerp(points[0.25][n], points[0.5][n], 0.6),
        0.75: lambda n: torch.lerp(points[0.5][n], points[1.0][n], 0.5),
        1.0: lambda n: points[1.0][n],
    }
    for strength, mix in mixes.items():
        for name, live_ED in family.live(strength, weights).items():
            expected_ED = (weights[name].to(exact) + mix(name)).to(dtype)
            torch.testing.assert_close(live_ED, expected_ED, rtol=1e-5 if dtype.itemsize > 2 else 1e-2, atol=1e-6)
            if strength in points:
                assert torch.equal(live_ED, expected_ED)


def test_the_dial_is_continuous(family_dir: Path) -> None:
    family = Family.load(family_dir)
    strengths = torch.linspace(0, 1, 401).tolist()
    name = next(iter(family.points[0].deltas))
    path = torch.stack([family.deltas(s)[name] for s in strengths])
    slope = max(p.deltas[name].abs().max() for p in family.points) * 2 / 0.25
    assert (path[1:] - path[:-1]).abs().max() <= slope / 400
    assert not torch.equal(path[100], path[101])


def test_beyond_the_last_point_the_last_point_holds(base: PreTrainedModel, tmp_path: Path) -> None:
    family = tiny_family(base, tmp_path / "short", (0.5,))
    assert all(torch.equal(a, b) for a, b in zip(family.deltas(0.9).values(), family.deltas(0.5).values(), strict=True))


def test_routers_a_family_leaves_alone_keep_their_weight_and_order(base: PreTrainedModel, family_dir: Path) -> None:
    family = Family.load(family_dir)
    weights = {"other.gate": torch.ones(2, 2)} | {f"base_model.model.{n}": w for n, w in original_weights(base).items()}
    live = family.live(1.0, weights)
    assert list(live) == list(weights) and torch.equal(live["other.gate"], weights["other.gate"])
    assert not torch.equal(live["base_model.model.model.layers.0.mlp.gate"], list(weights.values())[1])


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), float("inf")])
def test_strengths_out_of_range_are_refused(family_dir: Path, base: PreTrainedModel, strength: float) -> None:
    family = Family.load(family_dir)
    with pytest.raises(FamilyError, match="out of range"):
        family.live(strength, original_weights(base))


def test_gains_are_interpolated_like_deltas(base: PreTrainedModel, tmp_path: Path) -> None:
    family = Family.create(tmp_path / "f", BASE_ID, fingerprint(base))
    folder = save_adapter(base, tmp_path / "elsewhere", seed=0)
    family.add_point(0.5, folder, Recency("cost", (0.1, 0.2), 0.7, 0.5))
    family.add_point(1.0, folder, Recency("cost", (0.3, 0.2), 0.7, 0.5))
    family = Family.load(family.path)
    assert family.recency(1.0) == Recency("cost", (0.3, 0.2), 0.7, 0.5)
    gains = {s: getattr(family.recency(s), "gain", None) for s in (0.0, 0.25, 0.5, 0.75, 1.0)}
    assert gains[0.0] is None and gains[0.5] == (0.1, 0.2) and gains[1.0] == (0.3, 0.2)
    assert gains[0.25] == pytest.approx((0.05, 0.1)) and gains[0.75] == pytest.approx((0.2, 0.2))
    for other in (Recency("cost", (0.1, 0.2), 0.9, 0.5), Recency("cost", (0.1, 0.2), 0.7, 0.25)):
        with pytest.raises(FamilyError, match="recency mode, decay, share"):
            family.add_point(0.75, folder, other)
    assert family.strengths == Family.load(family.path).strengths == (0.5, 1.0)


def test_certificates_and_control_survive_and_move_with_the_folder(
    base: PreTrainedModel, copied: Path, tmp_path: Path
) -> None:
    family = Family.load(copied)
    family.set_control(save_adapter(base, copied / "control", seed=9), {"ce": 2.0})
    family.set_certificate(0.5, {"ce": 2.5, "data": "x", "lru@0.25": 0.5})
    family.set_certificate(None, {"ce": 2.25})
    again = Family.load(Family.load(copied).save(tmp_path / "moved"))
    assert again.point(0.5).certificate == {"ce": 2.5, "data": "x", "lru@0.25": 0.5}
    assert again.point(1.0).certificate is None
    assert (
        again.control is not None and again.control.certificate == {"ce": 2.25} and again.strengths == family.strengths
    )
    weights = original_weights(base)
    changed = again.control.live(weights)
    assert list(changed) == list(weights) and not any(torch.equal(changed[n], weights[n]) for n in weights)


def test_a_failed_write_leaves_file_and_memory_as_they_were(
    copied: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    family = Family.load(copied)
    before = (copied / "family.json").read_bytes()
    with pytest.raises(FamilyError, match="finite numbers"):
        family.set_certificate(0.5, {"ce": float("nan")})
    other = tiny_model("qwen2_moe", seed=5)
    with pytest.raises(FingerprintMismatchError, match="train it on the family's base"):
        family.add_point(0.75, save_adapter(other, tmp_path / "foreign", seed=1))
    fewer = save_adapter(base, tmp_path / "fewer", seed=1)
    stored = load_file(fewer / "adapter_model.safetensors")
    save_file(dict(list(stored.items())[1:]), fewer / "adapter_model.safetensors")
    with pytest.raises(FamilyError, match="differ in which routers"):
        family.add_point(0.75, fewer)
    with pytest.raises(FamilyError, match="already"):
        family.add_point(0.5, copied / "s050")
    with pytest.raises(FamilyError, match="above 0"):
        family.add_point(0.0, copied / "s050")
    assert (copied / "family.json").read_bytes() == before and not list(copied.glob(".*"))
    assert family.strengths == (0.25, 0.5, 1.0) and family.point(0.5).certificate is None
    with pytest.raises(FamilyError, match="exists already"):
        Family.create(copied, BASE_ID, "sha256:0")


POINT = {"strength": 0.5, "adapter": "s050"}
COST = {"mode": "cost", "decay": 0.95, "gain_per_layer": []}
BAD_FILES: list[tuple[dict[str, Any], str]] = [
    ({"format": 2}, "format 2.*update"),
    ({"format": None}, "format None"),
    ({"points": []}, "no points"),
    ({"points": {}}, "must be a list"),
    ({"points": [POINT, {"strength": 0.25, "adapter": "s025"}]}, "must rise"),
    ({"points": [POINT, POINT]}, "must rise"),
    ({"points": [{"strength": 0.0, "adapter": "s025"}]}, "above 0"),
    ({"points": [{"strength": 1.5, "adapter": "s025"}]}, "at most 1"),
    ({"points": [{"strength": True, "adapter": "s025"}]}, "above 0"),
    ({"points": [{"strength": "0.5", "adapter": "s025"}]}, "'0.5'"),
    ({"points": [{"strength": 0.5}]}, "lacks adapter"),
    ({"points": [POINT | {"extra": 1}]}, "unknown keys.*extra"),
    ({"points": [POINT | {"certificate": 3}]}, "certificate"),
    ({"points": [POINT | {"adapter": "../s050"}]}, "beside"),
    ({"points": [POINT | {"adapter": ".."}]}, "beside"),
    ({"points": [POINT | {"adapter": "gone"}]}, "gone.*not a saved adapter"),
    ({"points": [POINT | {"recency": {"mode": "ema"}}]}, "gain_per_layer"),
    ({"points": [POINT | {"recency": {"mode": "x", "decay": 0.5, "gain_per_layer": []}}]}, "'x'"),
    ({"points": [POINT | {"recency": {"mode": "ema", "decay": 1.0, "gain_per_layer": []}}]}, "decay"),
    ({"points": [POINT | {"recency": {"mode": "ema", "decay": 0.5, "gain_per_layer": [-1]}}]}, "from 0 to 16"),
    ({"points": [POINT | {"recency": {"mode": "ema", "decay": 0.5, "gain_per_layer": [16.5]}}]}, "from 0 to 16"),
    ({"points": [POINT | {"recency": COST | {"share": 0}}]}, "share 0 must be above 0"),
    ({"points": [POINT | {"recency": COST | {"share": True}}]}, "share True must be above 0"),
    ({"points": [POINT | {"recency": COST | {"mode": "ema", "share": 0.5}}]}, "share is of the mode cost; 'ema' has"),
    ({"points": [POINT | {"recency": COST | {"mode": "none", "share": 0.5}}]}, "share is of the mode cost"),
    ({"points": [POINT | {"recency": COST | {"shares": 0.5}}]}, "and share in some modes"),
    ({"base": {"id": "x"}}, "lacks fingerprint"),
    ({"base": {"id": "x", "fingerprint": 3}}, "must be text"),
    ({"base": "x"}, "must be an object"),
    ({"control": {"adapter": "none-here"}}, "none-here"),
    ({"surprise": 1}, "surprise"),
]


@pytest.mark.parametrize(("changes", "words"), BAD_FILES)
def test_bad_family_files_are_refused_with_the_fault(copied: Path, changes: dict[str, Any], words: str) -> None:
    edit(copied / "family.json", **changes)
    with pytest.raises(FamilyError, match=words):
        Family.load(copied)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": NaN}'])
def test_files_that_are_not_a_json_object_are_refused(copied: Path, text: str) -> None:
    (copied / "family.json").write_text(text)
    with pytest.raises(FamilyError, match=r"family\.json"):
        Family.load(copied)


def test_corrupt_and_foreign_adapters_are_refused(copied: Path, base: PreTrainedModel) -> None:
    weights = copied / "s050" / "adapter_model.safetensors"
    whole = weights.read_bytes()
    for cut in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:cut])
        with pytest.raises(AdapterCorruptError, match="s050"):
            Family.load(copied)
    weights.write_bytes(whole)
    stored = load_file(weights)
    key = next(iter(stored))
    save_file(stored | {key: stored[key] * float("nan")}, weights)
    with pytest.raises(AdapterCorruptError, match="NaN"):
        Family.load(copied)
    save_file(stored | {key: stored[key].flatten()}, weights)
    with pytest.raises(FamilyError, match="not \\[experts, hidden\\]"):
        Family.load(copied)
    save_file(stored | {"base_model.model.lm_head.weight": torch.ones(2)}, weights)
    with pytest.raises(FamilyError, match="lm_head"):
        Family.load(copied)
    weights.unlink()
    with pytest.raises(FamilyError, match="copy the family again"):
        Family.load(copied)
    shutil.rmtree(copied / "s050")
    lora = get_peft_model(tiny_model("qwen2_moe"), LoraConfig(target_modules=["q_proj"]))
    lora.save_pretrained(str(copied / "s050"))
    with pytest.raises(FamilyError, match="'LORA'"):
        Family.load(copied)


def test_another_base_is_refused_by_name_unless_forced(family_dir: Path) -> None:
    family = Family.load(family_dir)
    other = tiny_model("qwen2_moe", seed=1)
    other.config._name_or_path = "someone/other-base"
    with pytest.raises(FingerprintMismatchError, match=f"{BASE_ID}.*someone/other-base"):
        family.check(other)
    family.check(other, force=True)
    with pytest.raises(FamilyError, match="no such router"):
        family.check(tiny_model("mixtral", num_hidden_layers=2), force=True)
    with pytest.raises(FamilyError, match="changes router"):
        family.check(tiny_model("qwen2_moe", num_experts=4), force=True)


@pytest.mark.parametrize("name", ["./no-such-folder", "no-such-folder", "someone/never-downloaded", "a/b/c"])
def test_a_missing_family_is_one_clear_error_without_a_network(name: str) -> None:
    with pytest.raises(FamilyError, match=r"no (family )?folder"):
        Family.load(name)


def test_a_folder_that_is_no_family_is_named(family_dir: Path) -> None:
    with pytest.raises(FamilyError, match="no family"):
        Family.load(family_dir / "s025")
