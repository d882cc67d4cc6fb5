"""A recency mode is one class: registered here, it is known by its name to models, options, families and profiles."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import tiny_family
from tiny_models import tiny_model
from typer.testing import CliRunner

from remoe_adapt.checkpoints.load import load_base, load_tokenizer
from remoe_adapt.cli.app import app
from remoe_adapt.device_profile.profile import load_profile
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import ConfigError, FamilyError, ProfileError
from remoe_adapt.evaluation.record import record_forward
from remoe_adapt.family.family import Family
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.recency_settings import MODES, Mode, Recency, register
from remoe_adapt.training.options import TrainOptions

PROFILE = """\
name: mine
description: a test device
memory: {budget: 5.5GiB, reserve: 1GiB}
expert_cache: {budget: 0.25}
strength: {curve: [[0.0, 0.0], [1.0, 1.0]]}
recency: {mode: slow, gain: 0.4}
"""


class Slow(Mode):
    """Forgets a token over some twenty others."""

    name = "slow"
    default_decay = 0.95


@pytest.fixture
def registered() -> Iterator[None]:
    register(Slow)
    yield
    del MODES["slow"]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    return path


@pytest.mark.usefixtures("registered")
def test_a_registered_mode_acts_on_the_shipped_model(repo_root: Path) -> None:
    folder = repo_root / "examples" / "tiny_moe"
    model, tokenizer = load_base(folder), load_tokenizer(str(folder))
    ids = tokenizer("def main(args):\n    for line in sys.stdin:\n", return_tensors="pt")["input_ids"]

    def experts(*prior: Any) -> torch.Tensor:
        with recency_prior(model, *prior), torch.no_grad(), record_forward(model) as recorder:
            model(ids)
            return recorder.take()

    slow = experts("slow", 0.5)
    assert torch.equal(slow, experts("ema", 0.5, 0.95)) and not torch.equal(slow, experts("ema", 0.5))
    assert torch.equal(experts("slow", 0.5, 0.7), experts("ema", 0.5, 0.7))


@pytest.mark.usefixtures("registered")
def test_a_registered_mode_can_stand_in_a_profile(profile: Path) -> None:
    settings = load_profile(profile)
    assert settings.recency == Recency("slow", 0.4, 0.95)
    assert settings.as_keys()["recency"] == {"mode": "slow", "gain": 0.4}
    family = tiny_family(tiny_model("qwen2_moe"), profile.parent / "family")
    model = get_remoe_model(tiny_model("qwen2_moe"), settings, family)
    model.controller.set_strength(0.5)
    assert model.controller.status()["recency"] == {
        "mode": "slow", "decay": 0.95, "routers": 4, "gain": pytest.approx(0.2),
    }  # fmt: skip


@pytest.mark.usefixtures("registered")
def test_a_registered_mode_is_an_option_of_the_command_line(repo_root: Path, tmp_path: Path) -> None:
    text = tmp_path / "a.txt"
    text.write_text("def main(args):\n    return [line.strip() for line in args]\n")
    command = ["eval", str(repo_root / "examples" / "tiny_moe"), "--data", str(text), "--json", "--device", "cpu"]
    done = CliRunner().invoke(app, [*command, "--recency", "slow", "--recency-gain", "0.3", "--recency-decay", "0.9"])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["priors"]
    assert (row["recency"], row["recency_gain"]) == ("slow", 0.3)


@pytest.mark.usefixtures("registered")
def test_a_registered_mode_is_trained_and_stored_by_its_name(tmp_path: Path) -> None:
    options = TrainOptions(recency="slow", recency_gain=0.4)
    assert options.recency_decay == 0.95 and TrainOptions().recency_decay == 0.7
    family = tiny_family(tiny_model("qwen2_moe"), tmp_path / "family")
    family.add_point(0.75, tmp_path / "family" / family.points[0].adapter, options.recency_of(0.5, 4))
    assert Family.load(family.path).recency(0.75) == Recency("slow", (0.2,) * 4, 0.95)
    model = get_remoe_model(tiny_model("qwen2_moe"), family=family, recency_gain=0.1)
    plain = tiny_model("qwen2_moe")
    ids = torch.tensor([[9, 2, 77, 5, 17, 40, 8, 61, 33, 12, 50]])
    with torch.no_grad(), recency_prior(plain, "slow", 0.1):
        assert torch.equal(model(ids).logits, plain(ids).logits)


def test_an_unregistered_mode_is_refused_everywhere(profile: Path) -> None:
    with (
        pytest.raises(ConfigError, match="recency 'slow' is not one of last, ema, resident"),
        recency_prior(tiny_model("qwen2_moe"), "slow"),
    ):
        pass
    with pytest.raises(ConfigError, match="'slow'"):
        get_remoe_model(tiny_model("qwen2_moe"), recency="slow")
    with pytest.raises(ConfigError, match="'slow'"):
        TrainOptions(recency="slow")
    with pytest.raises(ProfileError, match="not one of none, last, ema, resident"):
        load_profile(profile)
    family = tiny_family(tiny_model("qwen2_moe"), profile.parent / "family")
    entries = json.loads((family.path / "family.json").read_text())
    entries["points"][0]["recency"] = {"mode": "slow", "decay": 0.5, "gain_per_layer": [0.1] * 4}
    (family.path / "family.json").write_text(json.dumps(entries))
    with pytest.raises(FamilyError, match="'slow' is not one of none, last, ema, resident"):
        Family.load(family.path)


@pytest.mark.parametrize("decay", [0.8, 0.95, 0.999])
def test_a_prior_that_forgets_slowly_is_not_taken_for_one_without_effect(decay: float) -> None:
    model = tiny_model("qwen2_moe")
    with recency_prior(model, "ema", 0.2, decay) as installed:
        assert len(installed.layers) == 4
