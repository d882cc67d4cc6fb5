"""Families whose points are recency priors alone: stored, refused where an adapter is needed, turned by the dial."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_family import save_base, save_family
from transformers import PreTrainedModel

from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.engines import export_lora, export_merged
from remoe_adapt.errors import ConfigError, ExportError, FamilyError
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.family.family import Family, FamilyPoint
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers.discover import fingerprint

GAINS = ((0.1, 0.0, 0.2, 0.05), (0.3, 0.1, 0.4, 0.15))
IDS = torch.tensor([[5, 9, 40, 41, 42, 9, 5, 77, 80, 5, 9, 40]])


def points(mode: str = "cost") -> list[FamilyPoint]:
    return [
        FamilyPoint(strength, None, {}, Recency.of(mode, gains), {"ppl_ratio": budget - 0.001}, budget)
        for strength, gains, budget in zip((0.5, 1.0), GAINS, (1.005, 1.02), strict=True)
    ]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_base(tmp_path_factory.mktemp("prior") / "base")


@pytest.fixture
def family(base: PreTrainedModel, tmp_path: Path) -> Family:
    made = Family.create(tmp_path / "family", "tiny/base", fingerprint(base))
    made.add_points(points())
    return made


def test_it_is_stored_and_read_whole(family: Family, tmp_path: Path) -> None:
    entries = json.loads((family.path / "family.json").read_text())
    assert [sorted(path.name for path in family.path.iterdir())] == [["README.md", "family.json"]]
    assert entries["points"][0] == {
        "strength": 0.5, "adapter": None, "budget": 1.005,
        "recency": {"mode": "cost", "decay": 0.95, "share": 0.25, "gain_per_layer": list(GAINS[0])},
        "certificate": {"ppl_ratio": pytest.approx(1.004)},
    }  # fmt: skip
    for again in (Family.load(family.path), Family.load(family.save(tmp_path / "copy"))):
        assert not again.has_adapters and again.strengths == (0.5, 1.0) and again.deltas(0.75) == {}
        assert [(point.recency, point.budget) for point in again.points] == [
            (point.recency, point.budget) for point in points()
        ]
        half = again.recency(0.75)
        assert half is not None
        assert half.gains() == pytest.approx([(a + b) / 2 for a, b in zip(*GAINS, strict=True)])
        assert again.recency(0.0) == replace(half, gain=(0.0,) * 4) or again.recency(0.0) is None
    card = (family.path / "README.md").read_text()
    assert "Family of recency priors" in card and "| 0.5 | none | `cost` |" in card and "library_name: peft" not in card


def test_what_is_no_such_point_is_refused_and_nothing_changes(
    family: Family, base: PreTrainedModel, tmp_path: Path
) -> None:
    before = (family.path / "family.json").read_bytes()
    new = replace(points()[0], strength=0.25)
    for wrong, words in (
        (replace(new, recency=None), "has no recency prior: use add_point"),
        (replace(new, adapter="s025"), "s025 is an adapter of no family"),
        (replace(new, budget=1.0), "budget 1.0 must be a perplexity ratio above 1"),
        (replace(new, strength=0.5), "has a point of strength 0.5 already"),
        (replace(new, recency=Recency.of("ema", GAINS[0])), "differ in recency mode"),
    ):
        with pytest.raises(FamilyError, match=words):
            family.add_points([replace(new, strength=0.3), wrong])
    assert (family.path / "family.json").read_bytes() == before and family.strengths == (0.5, 1.0)
    adapters = save_family(base, tmp_path / "adapters", control=False)
    with pytest.raises(FamilyError, match="all points have adapters, or none has"):
        adapters.add_points([new])
    with pytest.raises(FamilyError, match="all points have adapters, or none has"):
        family.add_point(0.25, adapters.path / "s050")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"recency": {"mode": "none", "decay": 0.0, "gain_per_layer": []}}, "neither an adapter nor a recency"),
        ({"recency": None}, "neither an adapter nor a recency"),
        ({"budget": True}, "budget True must be"),
        ({"budget": "1.005"}, "budget '1.005' must be"),
        ({"adapter": ""}, "adapter '' must be the name of a folder"),
    ],
)
def test_a_file_of_others_is_read_strictly(family: Family, change: dict[str, Any], words: str) -> None:
    file = family.path / "family.json"
    entries = json.loads(file.read_text())
    entries["points"][0] |= change
    file.write_text(json.dumps(entries))
    with pytest.raises(FamilyError, match=words):
        Family.load(family.path)


def test_there_is_nothing_to_export_or_to_load_by_peft(family: Family, base: PreTrainedModel, tmp_path: Path) -> None:
    base.save_pretrained(tmp_path / "base")
    for export in (export_merged, export_lora):
        with pytest.raises(ExportError, match="no adapters: its points are a recency prior alone"):
            export(tmp_path / "base", family, 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    for asked in ({"model_id": family.path}, {"model_id": family.path, "subfolder": "s050"},
                  {"model_id": family.path / "s050"}):  # fmt: skip
        with pytest.raises(ConfigError, match="recency priors without adapters, so PEFT has nothing to load"):
            PeftModel.from_pretrained(base, **asked)
    with pytest.raises(ConfigError, match="PEFT has nothing to load"):
        base.load_adapter(str(family.path))
    assert not hasattr(base, "peft_config") or not base.peft_config


def test_the_dial_turns_gains_and_leaves_the_weights(base: PreTrainedModel, family: Family) -> None:
    expected = evaluate(base, IDS.tolist(), priors=[point.recency for point in family.points if point.recency])
    model = get_remoe_model(base, family=family, monitor=False)
    routers = model.controller._routers
    weights = routers.weights
    versions = [weight._version for weight in weights]
    with torch.no_grad():
        plain = model(input_ids=IDS).logits
        seen = []
        for strength in (0.5, 1.0, 0.75, 0.0):
            model.controller.set_strength(strength)
            recency = family.recency(strength)
            wanted = (0.0,) * 4 if recency is None else recency.gains()
            assert [float(gain) for gain in model.controller._prior.live] == pytest.approx(list(wanted))
            logits = model(input_ids=IDS, use_cache=False).logits[0, :-1]
            targets = IDS[0, 1:, None]
            seen.append(float(-logits.log_softmax(-1).gather(-1, targets).mean()))
    assert seen[:2] == pytest.approx([row["ce"] for row in expected["priors"]], abs=1e-6)
    assert seen[3] == pytest.approx(expected["base"]["ce"], abs=1e-6) and len({round(ce, 7) for ce in seen}) == 4
    assert [weight._version for weight in weights] == versions
    assert model.controller.status()["recency"]["mode"] == "cost" and plain.shape[1] == IDS.shape[1]
    model.controller.close()
