"""A family from a base and files: it reuses experts, resumes exactly, refuses other runs, and leaves the base alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_family import byte_tokenizer, save_base, save_words
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import ConfigError, DataError, FamilyError
from remoe_adapt.family.family import Family
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.training import run as train_run
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.point import PassLog
from remoe_adapt.training.run import RUN_FILE, WORK_FOLDER, held_out_documents, token_rows, train_family
from remoe_adapt.tuner.layer import remoe_layers

TOKENIZER = byte_tokenizer()
SHORT = TrainOptions(steps=24, batch=2, length=48, reuse_weight=1.0, kl_weight=0.1, lr=0.3, reference="base")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base on disk, and text with structure: words repeat within a document."""
    folder = tmp_path_factory.mktemp("train")
    save_base(folder / "base")
    (folder / "data").mkdir()
    documents = save_words(folder / "data" / "words.jsonl", 119)
    (folder / "data" / "long.txt").write_text("\n".join(documents[:40]))
    return folder


@pytest.fixture(scope="module")
def trained(folder: Path) -> tuple[Family, list[tuple[str, dict[str, float]]]]:
    points: list[tuple[str, dict[str, float]]] = []
    family = train_family(
        folder / "base", [folder / "data"], [1.0, 0.25], folder / "family", options=SHORT, progress=False,
        on_point=lambda name, log: points.append((name, log)),
    )  # fmt: skip
    return family, points


def base_model(folder: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return model


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(left: Any, right: Any) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_short_training_raises_reuse_with_strength(folder: Path, trained: Any) -> None:
    family, points = trained
    assert family.strengths == (0.25, 1.0) and family.control is not None
    assert [name for name, _ in points] == ["s025", "s100", "control"]
    rows = [json.loads(line) for line in (folder / "family" / "training_log.jsonl").read_text().splitlines()]
    first = {row["point"]: row for row in reversed(rows)}
    last = dict(points)
    assert all(first[name]["step"] == 1 and first[name]["kl"] == 0 for name in last)
    assert last["s100"]["eor"] > first["s100"]["eor"] * 1.15, (first, last)
    assert last["s100"]["eor"] > last["s025"]["eor"] + 0.02
    assert last["s100"]["eor"] > last["control"]["eor"] + 0.05
    assert last["s100"]["kl"] > 0.001
    assert last["control"]["ce"] < first["control"]["ce"]
    assert not (folder / "family" / WORK_FOLDER).exists()
    config = json.loads((folder / "family" / "s025" / "adapter_config.json").read_text())
    assert config["reuse_weight"] == 0.25 and config["kl_weight"] == 0.1
    assert json.loads((folder / "family" / RUN_FILE).read_text())["steps"] == 24
    control = json.loads((folder / "family" / "control" / "adapter_config.json").read_text())
    assert control["reuse_weight"] == control["kl_weight"] == 0.0


def test_calling_again_adds_only_what_is_missing(folder: Path, trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    again = train_family(
        folder / "base", [folder / "data"], [0.25, 1.0], folder / "family", options=SHORT, progress=False,
        on_point=lambda name, log: names.append(name),
    )  # fmt: skip
    assert names == [] and again.strengths == (0.25, 1.0)


def test_another_run_is_refused(folder: Path, trained: Any, tmp_path: Path) -> None:
    def again(data: Path = folder / "data", out: Path = folder / "family", **options: Any) -> None:
        changed = TrainOptions(**{name: getattr(SHORT, name) for name in SHORT.__slots__} | options)
        resume = options.pop("resume", True)
        train_family(folder / "base", [data], [0.5], out, options=changed, progress=False, resume=resume)

    before = sorted(p.name for p in (folder / "family").rglob("*"))
    with pytest.raises(ConfigError, match=r"other options \(lr was 0\.3, now 0\.1\)"):
        again(lr=0.1)
    (tmp_path / "other.txt").write_text("other text " * 2000)
    with pytest.raises(ConfigError, match="data was 'sha256:"):
        again(data=tmp_path / "other.txt")
    with pytest.raises(FamilyError, match="holds a family already"):
        train_family(folder / "base", [folder / "data"], [0.5], folder / "family", options=SHORT, resume=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(FamilyError, match="is a file"):
        again(out=tmp_path / "file")
    assert sorted(p.name for p in (folder / "family").rglob("*")) == before


class KilledError(Exception):
    pass


@pytest.mark.parametrize(
    ("mode", "minutes", "kept", "rank"), [("end-to-end", 5, 10, 2), ("local", 5, 10, None), ("end-to-end", 0, 11, None)]
)
def test_a_killed_run_goes_on_to_the_same_adapter(
    folder: Path, tmp_path: Path, mode: Any, minutes: float, kept: int, rank: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    options = TrainOptions(
        steps=14, batch=2, accumulate=2, length=32, mode=mode, lr=0.2, recency="cost", recency_gain=0.1,
        recovery_rank=rank, evaluate_every=4 if rank else None, validation_tokens=200,
    )  # fmt: skip

    def train(out: Path) -> Family:
        data, base = [folder / "data"], folder / "base"
        return train_family(
            base, data, [0.5, 1.0], out, options=options, progress=False, control=False, checkpoint_minutes=minutes
        )

    whole = train(tmp_path / "whole")
    on_step_end = PassLog.on_step_end

    def killer(self: PassLog, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 12:
            raise KilledError
        on_step_end(self, args, state, control, **kwargs)

    monkeypatch.setattr(PassLog, "on_step_end", killer)
    with pytest.raises(KilledError):
        train(tmp_path / "killed")
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "family.json").exists()
    checkpoints = tmp_path / "killed" / WORK_FOLDER / "s050+s100" / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == [f"checkpoint-{kept}"]
    (checkpoints / "checkpoint-12").mkdir()  # a second kill, in the middle of saving
    resumed_at: list[int] = []
    monkeypatch.setattr(
        PassLog, "on_step_begin", lambda self, args, state, control, **kwargs: resumed_at.append(state.global_step)
    )
    resumed = train(tmp_path / "killed")
    assert resumed_at[0] == kept, "it went on from the checkpoint"
    for strength in (0.5, 1.0):
        assert equal(resumed.deltas(strength), whole.deltas(strength))
        assert resumed.point(strength).recovery == (f"s{strength * 100:03.0f}-recovery" if rank else None)
        for name in ("", "-recovery") if rank else ("",):
            file = Path(f"s{strength * 100:03.0f}{name}") / "adapter_model.safetensors"
            assert equal(*(load_file(family.path / file) for family in (resumed, whole)))
    logs = [(tmp_path / name / "training_log.jsonl").read_text() for name in ("whole", "killed")]
    steps = [
        [(row["point"], row["step"], "held_out" in row) for row in map(json.loads, log.splitlines())] for log in logs
    ]
    assert sorted(steps[0]) == sorted(steps[1]), "steps taken twice are logged once"


def test_a_loaded_model_is_left_as_it_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = base_model(folder)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "style")
    model.train()
    model.get_submodule("model.layers.1").eval()
    before, names = weights(model), [name for name, _ in model.named_modules()]
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    modes = {name: module.training for name, module in model.named_modules()}
    assert any(flags.values()) and not all(flags.values())

    def check() -> None:
        assert equal(weights(model), before)
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
        assert {name: module.training for name, module in model.named_modules()} == modes
        assert [name for name, _ in model.named_modules()] == names
        assert list(lora.peft_config) == ["style"] and not remoe_layers(model)

    options = TrainOptions(steps=2, batch=2, length=32)
    data = [folder / "data" / "words.jsonl"]

    def interrupted(name: str, log: dict[str, float]) -> None:
        raise KilledError

    on_step_end = PassLog.on_step_end
    monkeypatch.setattr(PassLog, "on_step_end", lambda *args, **kwargs: interrupted("", {}))
    with pytest.raises(KilledError):
        train_family(lora, data, [1.0], tmp_path / "a", options=options, tokenizer=TOKENIZER, progress=False)  # type: ignore[arg-type]
    check()
    monkeypatch.setattr(PassLog, "on_step_end", on_step_end)
    family = train_family(lora, data, [1.0], tmp_path / "a", options=options, tokenizer=TOKENIZER, progress=False)  # type: ignore[arg-type]
    check()
    assert family.fingerprint == fingerprint(base_model(folder))
    assert max(delta.abs().max() for delta in family.deltas(1.0).values()) > 0


def test_local_mode_trains_a_family_with_an_end_to_end_control(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(steps=6, batch=2, length=32, mode="local", rank=4)
    family = train_family(
        folder / "base", [folder / "data"], [1.0], tmp_path / "local", options=options, progress=False
    )
    assert family.control is not None
    for deltas in (family.deltas(1.0), family.control.deltas):
        assert all(delta.abs().max() > 0 for delta in deltas.values())


def test_points_may_carry_a_recency_prior(folder: Path, tmp_path: Path) -> None:
    options = TrainOptions(steps=2, batch=2, length=24, recency="cost", recency_gain=0.4, recency_share=0.5)
    family = train_family(
        folder / "base",
        [folder / "data"],
        [0.5, 1.0],
        tmp_path / "family",
        options=options,
        control=False,
        progress=False,
    )
    assert [point.recency for point in family.points] == [
        Recency("cost", (gain,) * 4, 0.95, 0.5) for gain in (0.2, 0.4)
    ]  # fmt: skip
    model = get_remoe_model(folder / "base", family=family)
    model.controller.set_strength(0.25)
    assert model.controller.status()["recency"]["gain"] == pytest.approx(0.1)


def test_a_run_from_before_an_option_existed_goes_on(folder: Path, trained: Any, tmp_path: Path) -> None:
    kept = shutil.copytree(folder / "family", tmp_path / "family")
    record = json.loads((kept / RUN_FILE).read_text())
    del record["recency"], record["recency_gain"]
    (kept / RUN_FILE).write_text(json.dumps(record))
    again = train_family(folder / "base", [folder / "data"], [1.0, 0.25], kept, options=SHORT, progress=False)
    assert again.strengths == (0.25, 1.0)


def test_held_out_documents_are_never_trained_on(folder: Path) -> None:
    data = [folder / "data"]
    train, held_out = token_rows(data, TOKENIZER, 4000, seed=3)
    texts = {tuple(row) for row in train}
    assert held_out and not any(tuple(row) in texts for row in held_out)
    # of a file of one document the end is held out
    alone, end = token_rows([folder / "data" / "long.txt"], TOKENIZER, 100_000)
    text = (folder / "data" / "long.txt").read_text()
    # pieces of it from everywhere, each with its characters kept: together they are the text
    seen, kept = [TOKENIZER.decode(row) for row in alone], [TOKENIZER.decode(row) for row in end]
    assert len(seen) > 1 and sorted("".join(seen + kept)) == sorted(text)
    assert all(piece in text for piece in seen) and "".join(seen) != text[: len("".join(seen))]
    assert "".join(kept) == text[-(len(text) // 20) :]
    model = base_model(folder)
    needed = SHORT.steps * SHORT.batch * 48
    assert held_out_documents(data, TOKENIZER, model, SHORT) == token_rows(data, TOKENIZER, needed)[1]
    # of the data, not of what the steps consume: a twentieth of the documents, whole
    few, apart = token_rows([folder / "data" / "words.jsonl"], TOKENIZER, 10, seed=3)
    assert sum(map(len, few)) == 10 and len(apart) == 6 and sum(map(len, apart)) > 400


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"batch": 1.5}, "batch=1.5"),
        ({"length": 1}, "length=1"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"warmup": 2.0}, "warmup=2.0"),
        ({"mode": "both"}, "mode='both'"),
        ({"reuse_weight": -1.0}, "reuse_weight=-1.0"),
        ({"rank": 0}, "rank=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_bad_options_are_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainOptions(**options)


def test_bad_input_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    data, out = [folder / "data"], tmp_path / "out"
    for strengths in ([], [0.0], [1.5], [0.5, 0.5]):
        with pytest.raises(ConfigError, match="strength"):
            train_family(folder / "base", data, strengths, out)
    with pytest.raises(ConfigError, match="cannot load the model"):
        train_family(tmp_path / "nothing", data, [1.0], out)
    with pytest.raises(ConfigError, match=r"pass tokenizer="):
        model = base_model(folder)
        model.config.name_or_path = str(tmp_path)
        train_family(model, data, [1.0], out)
    with pytest.raises(ConfigError, match=r"length=512: this model has 256 positions"):
        train_family(folder / "base", data, [1.0], out, options=TrainOptions(length=512))
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(DataError, match="no text"):
        train_family(folder / "base", [tmp_path / "empty.txt"], [1.0], out)
    (tmp_path / "tiny.txt").write_text("few")
    with pytest.raises(DataError, match="do not fill one row"):
        train_family(folder / "base", [tmp_path / "tiny.txt"], [1.0], out)
    assert not out.exists()
    out.mkdir()
    (out / RUN_FILE).write_text("{")
    with pytest.raises(ConfigError, match=f"{RUN_FILE} is not valid JSON"):
        train_family(folder / "base", data, [1.0], out, options=SHORT)
    assert train_run.LOG_FILE not in [path.name for path in out.iterdir()]


def test_what_cannot_be_trained_is_said_before_the_work(folder: Path, tmp_path: Path) -> None:
    data, out = [folder / "data"], tmp_path / "out"
    absent = tmp_path / "no such model"  # read only after what is checked first
    with pytest.raises(ConfigError, match=r"rank=100000: router \S+\.0\.mlp\.gate has 8 x 32 weights.* 8 at most"):
        train_family(folder / "base", data, [1.0], out, options=TrainOptions(rank=100_000))
    for device in ("banana", "meta", *(() if torch.cuda.is_available() else ("cuda", "cuda:7"))):
        with pytest.raises(ConfigError, match=f"cannot run on device {device}: "):
            train_family(absent, data, [1.0], out, device=device)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"file/deep cannot be made: .*file is a file"):
        train_family(absent, data, [1.0], tmp_path / "file" / "deep")
    with pytest.raises(DataError, match="does not exist"):
        train_family(absent, [tmp_path / "absent.txt"], [1.0], out)
    assert not out.exists()


def test_a_folder_without_rights_is_refused(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != closed)  # root may write anywhere
    with pytest.raises(ConfigError, match=r"closed/out cannot be written: no right to write in .*closed"):
        train_family(tmp_path / "absent", [folder / "data"], [1.0], closed / "out")


def test_a_full_disk_is_one_error_and_the_run_goes_on(folder: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource", reason="this system limits no files")
    data, out = [folder / "data"], tmp_path / "out"
    options = TrainOptions(steps=12, batch=2, length=32)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    try:
        with pytest.raises(ConfigError, match=r"out cannot be written .*make room"):
            train_family(folder / "base", data, [1.0], out, options=options, progress=False, control=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    again = train_family(folder / "base", data, [1.0], out, options=options, progress=False, control=False)
    assert again.strengths == (1.0,)


def test_too_little_space_is_said_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    with pytest.raises(ConfigError, match=r"2 adapters and a checkpoint take .* MiB, .* has 0\.0 MiB free"):
        train_family(folder / "base", [folder / "data"], [1.0], tmp_path / "out")
