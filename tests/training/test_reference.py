"""What points are held to: the control where next-token training alone helps the base, whose routers stay its own."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny_family import byte_tokenizer, save_base, save_words
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_adapt.errors import AdapterCorruptError, ConfigError
from remoe_adapt.family.family import Family
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.training import passes, run
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.point import PassLog
from remoe_adapt.training.reference import Comparison, Moved
from remoe_adapt.training.run import RUN_FILE, WORK_FOLDER, token_parts, train_family
from remoe_adapt.tuner.layer import RemoeLayer

SHORT: dict[str, Any] = {
    "steps": 5, "batch": 4, "length": 40, "lr": 1.0, "validation_tokens": 400, "bf16": False,
}  # fmt: skip


class KilledError(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of random weights, and text that it learns fast."""
    folder = tmp_path_factory.mktemp("reference")
    save_base(folder / "base")
    save_words(folder / "words.jsonl", 159, least=3, lengths=20)
    return folder


def base_model(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=dtype)
    return model


def family_of(folder: Path, out: Path, strengths: list[float], base: Any = None, **options: Any) -> Family:
    keywords = {name: options.pop(name) for name in ("control", "checkpoint_minutes", "on_point") if name in options}
    return train_family(
        base or folder / "base", [folder / "words.jsonl"], strengths, out, progress=False,
        options=TrainOptions(**{**SHORT, **options}), **keywords,
    )  # fmt: skip


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def rows_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / passes.LOG_FILE).read_text().splitlines()]


def decisions(out: Path) -> list[dict[str, Any]]:
    return [row["reference"] for row in rows_of(out) if "reference" in row]


def first_losses(out: Path) -> dict[str, float]:
    """The next-token loss of each point's first step."""
    return {row["point"]: row["ce"] for row in rows_of(out) if row["step"] == 1}


@pytest.fixture(scope="module")
def trained(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Family:
    out = tmp_path_factory.mktemp("trained") / "family"
    return family_of(folder, out, [1.0], checkpoint_minutes=0)


def test_the_control_is_what_points_begin_as_where_it_is_better(folder: Path, trained: Family) -> None:
    [decision] = decisions(trained.path)
    assert decision["held_to"] == "control" and decision["gain"] > 0.05, decision
    first = next(row for row in rows_of(trained.path) if row["point"] == "s100")
    assert first["step"] == 1 and abs(first["kl_base"]) < 1e-6 and first["kl"] == 0
    assert first["ce"] < first_losses(trained.path)["control"] - 0.05, "the same rows, and what the control has learned"
    assert trained.control is not None and not (trained.path / WORK_FOLDER).exists()
    point, control = trained.deltas(1.0), trained.control.deltas
    assert all((point[name] - control[name]).norm() < point[name].norm() for name in point)


def test_the_decision_is_of_losses_on_the_text_kept_apart(folder: Path, trained: Family) -> None:
    tokenizer = byte_tokenizer()
    _, _, apart = token_parts([folder / "words.jsonl"], tokenizer, 5 * 4 * 40, validation_tokens=400)
    rows = PackedRows(apart, 40, None, 0)
    tuned = PeftModel.from_pretrained(base_model(folder), str(trained.path / "control"))
    found = []
    for arm in (base_model(folder).eval(), tuned.eval()):
        sums = []
        for row in (rows[index] for index in range(len(rows))):
            with torch.no_grad():
                logits_TV = arm(row["input_ids"][None]).logits[0]
            losses = F.cross_entropy(logits_TV[:-1], row["labels"][1:], reduction="sum")
            sums.append((float(losses), int((row["labels"][1:] != -100).sum())))
        found.append(sums)
    (base, control), tokens = found, sum(n for _, n in found[0])
    [decision] = decisions(trained.path)
    assert decision["tokens"] == tokens
    assert decision["base_loss"] == pytest.approx(sum(loss for loss, _ in base) / tokens, abs=2e-5)
    assert decision["control_loss"] == pytest.approx(sum(loss for loss, _ in control) / tokens, abs=2e-5)
    gain = decision["base_loss"] - decision["control_loss"]
    left = [(b[0] - c[0]) - gain * b[1] for b, c in zip(base, control, strict=True)]
    error = math.sqrt(sum(x * x for x in left) * len(left) / (len(left) - 1)) / tokens
    assert decision["error"] == pytest.approx(error, abs=2e-4) and error > 0


@pytest.mark.parametrize(("dtype", "rank"), [(torch.bfloat16, None), (torch.float32, None), (torch.float32, 2)])
def test_a_saved_point_on_the_base_is_the_student_that_was_trained(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rank: int | None
) -> None:
    model = base_model(folder, dtype).eval()
    before, ids = weights(model), torch.randint(1, 256, (2, 24), generator=torch.Generator().manual_seed(0))
    live: dict[str, Tensor] = {}
    onto_base = Moved.onto_base

    def watched(self: Moved, holder: Any, layers: Mapping[str, RemoeLayer], names: Any) -> None:
        for name in names:
            for layer in layers.values():
                layer._active_adapter = [name]
            holder.eval()
            with torch.no_grad():
                live[name] = holder(ids).logits
        onto_base(self, holder, layers, names)

    monkeypatch.setattr(Moved, "onto_base", watched)
    family = family_of(folder, tmp_path / "family", [0.5, 1.0], base=model, rank=rank, reference="control")
    assert same(weights(model), before) and not any(isinstance(part, RemoeLayer) for part in model.modules())
    assert not decisions(family.path), "nothing is left to decide"
    with torch.no_grad():
        base = model(ids).logits
    for strength, name in ((0.5, "s050"), (1.0, "s100")):
        config = json.loads((family.path / name / "adapter_config.json").read_text())
        assert config["rank"] == (None if rank is None else 2 * rank)
        assert config["base_fingerprint"] == fingerprint(model) == family.fingerprint
        tuned = PeftModel.from_pretrained(base_model(folder, dtype), str(family.path / name)).eval()
        with torch.no_grad():
            logits = tuned(ids).logits
        # Differences of two bf16 weights are exact in fp32; those of two fp32 ones are not.
        tolerance = 0.0 if dtype is torch.bfloat16 else 1e-3
        torch.testing.assert_close(logits, live[name], rtol=tolerance, atol=tolerance)
        assert float((logits - base).abs().max()) > 0.05
        assert max(float(delta.abs().max()) for delta in family.deltas(strength).values()) > 0


def test_the_base_stays_the_reference_where_the_control_is_no_better(folder: Path, tmp_path: Path) -> None:
    # Nothing is learned at such a rate. Evaluated, so that both keep the same text out.
    options: dict[str, Any] = {"lr": 1e-4, "evaluate_every": 5}
    family = family_of(folder, tmp_path / "auto", [1.0], **options)
    [decision] = decisions(family.path)
    assert decision["held_to"] == "base" and decision["gain"] < 0.05
    asked = family_of(folder, tmp_path / "base", [1.0], reference="base", **options)
    assert same(family.deltas(1.0), asked.deltas(1.0)) and not decisions(asked.path)
    assert max(float(delta.abs().max()) for delta in asked.deltas(1.0).values()) > 0
    assert family.control is not None and asked.control is not None
    assert same(family.control.deltas, asked.control.deltas)


def test_a_killed_run_goes_on_with_the_same_reference(
    folder: Path, trained: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, out = base_model(folder), tmp_path / "family"
    before = weights(model)
    on_step_end = PassLog.on_step_end

    def killer(self: PassLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._strengths.get(dying) is not None and state.global_step == 4:
            raise KilledError
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(PassLog, "on_step_end", killer)
    for dying in ("control", "s100"):  # noqa: B007 - read by the killer
        with pytest.raises(KilledError):
            family_of(folder, out, [1.0], base=model, checkpoint_minutes=0)
        assert same(weights(model), before) and not any(isinstance(part, RemoeLayer) for part in model.modules())
    assert not (out / "family.json").exists() and (out / WORK_FOLDER / "control" / "adapters").is_dir()
    # The deltas of this checkpoint are relative to the control.
    assert (out / WORK_FOLDER / "s100@control" / "checkpoints" / "checkpoint-3").is_dir()
    monkeypatch.setattr(PassLog, "on_step_end", on_step_end)

    def compared_again(*args: Any, **kwargs: Any) -> Comparison:
        raise AssertionError("a run decides once")

    monkeypatch.setattr(passes, "compare", compared_again)
    with (out / passes.LOG_FILE).open("a") as log:
        log.write('{"point": "s1')
    resumed = family_of(folder, out, [1.0], base=model, checkpoint_minutes=0)
    assert same(resumed.deltas(1.0), trained.deltas(1.0)) and same(weights(model), before)
    assert resumed.control is not None and trained.control is not None
    assert same(resumed.control.deltas, trained.control.deltas)
    assert decisions(out) == decisions(trained.path)
    # Points that are added are held to the same, also by a call that would train no control.
    more = family_of(folder, out, [0.25, 1.0], base=model, control=False)
    assert more.strengths == (0.25, 1.0) and len(decisions(out)) == 1
    assert first_losses(out)["s025"] == pytest.approx(first_losses(out)["s100"], abs=1e-5)
    assert same(weights(model), before)


@pytest.mark.parametrize("rank", [None, 2])
def test_later_points_begin_as_the_weakest_on_the_control(folder: Path, tmp_path: Path, rank: int | None) -> None:
    # The first step of a warm-up has the rate 0, so that a point of one step ends as it began.
    family = family_of(folder, tmp_path / "family", [0.25, 1.0], rank=rank, next_steps=1)
    assert [d["held_to"] for d in decisions(family.path)] == ["control"]
    weak, strong = stored(family.path / "s025"), stored(family.path / "s100")
    assert weak.keys() == strong.keys() and max(float(value.abs().max()) for value in weak.values()) > 0
    for name, value in weak.items():
        torch.testing.assert_close(strong[name], value, rtol=0, atol=0 if rank else 1e-6)


def test_factors_of_another_reference_are_refused() -> None:
    a_RD, b_ER, weight_ED = torch.randn(2, 6), torch.randn(4, 2), torch.randn(4, 6)
    moved = Moved({"r": (a_RD, b_ER)}, {"r": weight_ED})
    torch.testing.assert_close(moved.weights["r"], weight_ED + b_ER @ a_RD)
    assert torch.equal(moved.off_base("r", "remoe_A", torch.cat([a_RD, b_ER @ a_RD][:1] * 2), 2), a_RD)
    with pytest.raises(AdapterCorruptError, match=r"rank 2 in router r.* rank 2 \+ 2"):
        moved.off_base("r", "remoe_A", a_RD, 2)


def test_all_that_points_may_have_works_on_the_control(folder: Path, tmp_path: Path) -> None:
    model = base_model(folder)
    before = weights(model)
    family = family_of(
        folder, tmp_path / "family", [0.5, 1.0], base=model, reference="control", mode="local", rank=2, recency="cost",
        recency_gain=0.3, recovery_rank=2, evaluate_every=1, checkpointing=True, batch=2, steps=3,
    )  # fmt: skip
    assert same(weights(model), before)
    assert [point.recovery for point in family.points] == ["s050-recovery", "s100-recovery"]
    assert {row["point"] for row in rows_of(family.path) if "held_out" in row} == {"control", "s050", "s100"}
    assert all(float(delta.abs().max()) > 0 for delta in family.deltas(1.0).values())


def test_without_a_control_the_base_is_the_reference(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reference='control' needs the control"):
        family_of(folder, tmp_path / "none", [1.0], reference="control", control=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="reference='teacher': choose"):
        TrainOptions(reference="teacher")
    out = tmp_path / "family"
    family_of(folder, out, [0.5], steps=2, control=False)
    # A control that comes later is trained, but points that are there were held to the base, and so are others.
    both = family_of(folder, out, [0.5, 1.0], steps=2)
    assert both.control is not None and not decisions(out)
    # The first look at the same rows is the base's in all of them.
    losses = first_losses(out)
    assert losses["s100"] == pytest.approx(losses["control"], abs=1e-5) and losses["s050"] == losses["s100"]


def test_a_sharded_run_adds_no_points_to_a_family_on_the_control(
    folder: Path, trained: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(trained.path, tmp_path / "family")
    for module in (run, passes):
        monkeypatch.setattr(module, "is_sharded", lambda: True)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")
    with pytest.raises(ConfigError, match="a sharded run has none"):
        family_of(folder, out, [0.5, 1.0])
    with pytest.raises(ConfigError, match="as reference='control' does"):
        family_of(folder, tmp_path / "other", [1.0], reference="control")
    assert Family.load(out).strengths == (1.0,)


def test_too_little_text_to_compare_on_leaves_the_base(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("a few words " * 40)
    names: list[str] = []
    family = train_family(
        folder / "base", [tmp_path / "short.txt"], [1.0], tmp_path / "family", progress=False,
        options=TrainOptions(length=32, batch=1, steps=1), on_point=lambda name, log: names.append(name),
    )  # fmt: skip
    assert names == ["s100", "control"] and not decisions(family.path)


def test_a_run_of_before_was_held_to_the_base(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "family"
    family_of(folder, out, [1.0], steps=1, reference="base")
    record = json.loads((out / RUN_FILE).read_text())
    assert record.pop("reference") == "base"
    (out / RUN_FILE).write_text(json.dumps(record))
    with pytest.raises(ConfigError, match="reference was 'base', now 'control'"):
        family_of(folder, out, [1.0], steps=1, reference="control")
    assert family_of(folder, out, [1.0], steps=1, reference="base").strengths == (1.0,)


def test_the_gain_must_be_large_and_beyond_chance() -> None:
    assert Comparison(3.0, 2.94, 0.029, 0.05, 100).is_control
    assert not Comparison(3.0, 2.94, 0.031, 0.05, 100).is_control, "two standard errors"
    assert not Comparison(3.0, 2.96, 0.0001, 0.05, 100).is_control, "too little to matter"
    assert not Comparison(3.0, 2.8, 0.0001, 0.01, 100).is_control, "of one kind of text among others"
    assert not Comparison(3.0, math.nan, 0.001, 0.1, 9).is_control
    assert not Comparison(3.0, 2.0, math.inf, 0.1, 9).is_control and not Comparison(3, 2, 0.1, math.nan, 9).is_control
    assert "held to the control" in Comparison(3.0, 2.9, 0.01, 0.1, 100).sentence
    assert "2 standard errors are needed" in Comparison(3.0, 3.1, 0.01, -0.1, 100).sentence
