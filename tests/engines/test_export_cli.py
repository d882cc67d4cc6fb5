"""`remoe export ...` and `remoe trace MODEL.gguf` as a user meets them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from cli_support import call, found, refused
from export_support import Home, holds
from gguf_writer import small_model

from remoe_adapt import Trace
from remoe_adapt.checkpoints.load import load_base
from remoe_adapt.evaluation.record import record_prefill
from remoe_adapt.family.family import original_weights


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("cli"), small_model("qwen3moe"), "qwen3moe")


@pytest.fixture(scope="module")
def family(home: Home) -> Path:
    return home.family.path


def test_help_names_every_export() -> None:
    text = call("export", "--help").stdout
    assert all(f" {name} " in text for name in ("merged", "lora", "gguf", "gguf-lora"))


def test_merged_and_lora(home: Home, family: Path, tmp_path: Path) -> None:
    merged = found("export", "merged", home.base, family, "--strength", 0.6, tmp_path / "merged")
    assert merged["rewritten"] == ["model.safetensors"] and merged["strength"] == 0.6
    live = home.live(0.6)
    loaded = original_weights(load_base(tmp_path / "merged"))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(loaded.values(), live, strict=True))
    lora = found("export", "lora", home.base, family, tmp_path / "lora", "--strength", 1)
    assert (lora["rank"], lora["for_dtype"], lora["inexact"]) == (16, "float32", 0)
    assert [row["engine"] for row in lora["engines"]] == ["vLLM", "SGLang", "LMDeploy", "TGI"]
    shown = call("export", "lora", home.base, family, tmp_path / "second", "--strength", 1)
    assert "PEFT LoRA" in shown.stdout and "TGI" not in shown.stdout
    assert "Engines that do not apply this LoRA" in shown.stderr and "TGI" in shown.stderr
    assert "exists already" in refused(
        "export", "merged", home.base, family, tmp_path / "lora", "--strength", 1, status=2
    )


def test_gguf_in_all_its_ways(home: Home, family: Path, tmp_path: Path) -> None:
    model = Path(shutil.copy(home.gguf, tmp_path / "model.gguf"))
    found("export", "gguf", model, family, tmp_path / "copy.gguf", "--strength", 0.25, "--base", home.base)
    assert holds(tmp_path / "copy.gguf", home.live(0.25))
    split = found("export", "gguf", model, family, tmp_path / "split.gguf", "--strength", 1, "--split")
    assert holds(Path(split["out"]), home.live(1.0)) and split["first_part_bytes"] < split["bytes"]
    patched = found("export", "gguf", model, family, "--in-place", "--strength", 0.5)
    assert holds(model, home.live(0.5)) and not patched["recovered"]
    assert found("export", "gguf", model, "--undo")["was"] == {"model.gguf": "patched"}
    assert model.read_bytes() == home.gguf.read_bytes()
    assert "no undo file" in refused("export", "gguf", model, "--undo", status=2)
    assert "--undo and --strength" in refused("export", "gguf", model, "--undo", "--strength", 1, status=2)


def test_gguf_lora(home: Home, family: Path, tmp_path: Path) -> None:
    loras = found("export", "gguf-lora", home.gguf, family, tmp_path, "--strength", "0.25,1", "--rank", 4)["loras"]
    assert [(row["strength"], row["rank"]) for row in loras] == [(0.25, 4), (1.0, 4)]
    assert all(Path(row["file"]).is_file() and row["relative_error"] > 0 for row in loras)
    text = call("export", "gguf-lora", home.gguf, family, tmp_path / "exact").stdout
    assert "--lora" in text and "s050.gguf" in text and "s100.gguf" in text
    assert "list of numbers" in refused(
        "export", "gguf-lora", home.gguf, family, tmp_path / "x", "--strength", "a", status=2
    )


@pytest.mark.parametrize(
    "options",
    [
        ["{model}"], ["{model}", "{family}"], ["{model}", "{family}", "out.gguf"],
        ["{model}", "{family}", "--strength", "1"], ["{model}", "{family}", "o.gguf", "--in-place", "--strength", "1"],
        ["{model}", "{family}", "--in-place", "--split", "--strength", "1"], ["{model}", "{family}", "--undo"],
    ],
)  # fmt: skip
def test_contradictions_are_bad_usage(home: Home, family: Path, options: list[str]) -> None:
    given = [option.format(model=home.gguf, family=family) for option in options]
    result = call("export", "gguf", *given)
    assert result.exit_code == 2 and "Traceback" not in result.stderr
    assert home.gguf.is_file() and not (home.folder / "model.gguf.remoe-undo").exists()


def test_trace_of_a_gguf(home: Home, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times. " * 6)
    result = found("trace", home.gguf, "--data", tmp_path / "a.txt", "--out", tmp_path / "t.npz", "--max-tokens", 200)
    trace = Trace.load(tmp_path / "t.npz")
    assert (trace.num_layers, trace.num_tokens, trace.top_k) == (3, 200, 4) and result["eor"] > 0
    from remoe_adapt.engines.llamacpp.record import GgufTokenizer, open_gguf

    engine, _ = open_gguf(home.gguf, threads=1)
    with engine:
        ids = GgufTokenizer(engine)((tmp_path / "a.txt").read_text())["input_ids"][:200]
    theirs = record_prefill(home.model, [ids])
    assert (trace.experts == theirs.experts).mean() >= 0.999
    assert "--decode" in refused(
        "trace", home.gguf, "--data", tmp_path / "a.txt", "--out", tmp_path / "t.npz", "--decode", 4, status=2
    )
