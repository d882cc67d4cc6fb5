"""Quantised checkpoints on the command line: measured, trained and run behind a cache of their codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli_support import call, found, refused
from quantised_checkpoints import reference, save_quantised
from tiny_family import byte_tokenizer, save_base, save_family

from remoe_adapt import Family
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.expert_cache.load import load_with_expert_cache
from remoe_adapt.family.files import write_whole
from remoe_adapt.texts import read_shared

TEXT = "It was the best of times, it was the worst of times. " * 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """coded (FP8) and plain (its dequantised model, saved), base (floats) with a family, a.txt, c.jsonl"""
    home = tmp_path_factory.mktemp("quantised")
    sizes = {"vocab_size": 257, "max_position_embeddings": 64, "eos_token_id": 0}
    save_quantised(home / "coded", "qwen3_moe", "fp8", sizes=sizes, dtype=torch.float32)
    reference(home / "coded").save_pretrained(home / "plain")
    for name in ("coded", "plain"):
        byte_tokenizer().save_pretrained(home / name)
    save_family(save_base(home / "base", positions=64), home / "family")
    (home / "a.txt").write_text(TEXT)
    (home / "c.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(30)))
    return home


def test_eval_of_a_quantised_model_is_exact_whatever_the_budget(home: Path) -> None:
    documents = read_shared([home / "a.txt"], byte_tokenizer(), None)
    model = load_with_expert_cache(home / "coded", 1.0, arithmetic="exact")
    expected = json.loads(json.dumps(evaluate(model, documents)))
    assert expected["arithmetic"] == {"name": "fp8", "exact": True}
    for options in ((), ("--expert-cache", 0.3)):
        result = found("eval", home / "coded", "--data", home / "a.txt", *options)
        assert {key: result[key] for key in expected} == expected
    shown = call("eval", home / "coded", "--data", home / "a.txt").stdout
    assert "experts: fp8, exact" in " ".join(shown.split()) and "ratio to base" in " ".join(shown.split())


def test_eval_by_the_fast_arithmetic_says_so(home: Path) -> None:
    pytest.importorskip("xllamacpp", reason="ggml's kernels are those of its wheel")
    args = ("eval", home / "coded", "--data", home / "a.txt", "--expert-cache", 0.3)
    exact, fast = found(*args), found(*args, "--arithmetic", "auto")
    assert fast["arithmetic"] == {"name": "q8_0 by ggml", "exact": False}
    assert fast["base"]["ce"] != exact["base"]["ce"]
    assert fast["base"]["ce"] == pytest.approx(exact["base"]["ce"], abs=2e-3)


def test_eval_against_the_plain_model_tells_what_codes_cost(home: Path) -> None:
    args = ("eval", home / "coded", "--data", home / "a.txt", "--expert-cache", 0.5)
    result = found(*args, "--against", home / "coded")
    # By the same arithmetic on both sides: here codes cost nothing.
    assert (result["base"]["ppl_ratio"], result["base"]["kl"]) == (1.0, 0.0)
    against_plain = found(*args, "--against", home / "plain")
    # transformers computes all experts of a whole model in one product: the same but for the last digits.
    assert against_plain["base"]["ppl_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert against_plain["against"]["ppl"] == pytest.approx(result["against"]["ppl"], rel=1e-5)
    other = found("eval", home / "base", "--data", home / "a.txt", "--against", home / "plain", "--window", 32)
    assert other["against_model"] == str(home / "plain") and other["base"]["kl"] > 0.01
    assert other["base"]["ppl_ratio"] == pytest.approx(other["base"]["ppl"] / other["against"]["ppl"])


def test_eval_of_a_pack_against_the_checkpoint(home: Path, tmp_path: Path) -> None:
    found("pack", home / "base", tmp_path / "pack")
    args = ("eval", home / "base", "--data", home / "a.txt", "--storage", tmp_path / "pack", "--against", home / "base")
    result = found(*args)
    assert result["base"]["ppl_ratio"] == pytest.approx(1.0, abs=1e-5) and result["base"]["kl"] < 1e-6
    # The experts are the pack's: of another model's pack nothing is measured.
    assert "pack" in refused("eval", home / "plain", *args[2:], status=2)


def test_eval_shows_the_other_model_first(home: Path, tmp_path: Path) -> None:
    result = call(
        "eval", home / "base", "--family", home / "family", "--data", home / "a.txt", "--against", home / "plain",
        "--csv", tmp_path / "rows.csv",
    )  # fmt: skip
    text = " ".join(result.stdout.split())
    assert result.exit_code == 0 and "KL(against || point)" in text and "ratio to" in text
    arms = [line.split(",")[0] for line in (tmp_path / "rows.csv").read_text().splitlines()]
    assert arms == ["arm", "against", "base", "control", "0.50", "1.00"]
    assert text.index("against ") < text.index("control ")


def test_eval_refuses_what_cannot_be_compared(home: Path, tmp_path: Path) -> None:
    args = ("eval", home / "base", "--family", home / "family", "--data", home / "a.txt")
    assert "--certify and --against" in refused(*args, "--certify", "--against", home / "plain", status=2)
    assert "cannot be found" in refused(*args, "--against", tmp_path / "nothing", status=2)
    config = json.loads((home / "plain" / "config.json").read_text())
    (tmp_path / "larger").mkdir()
    (tmp_path / "larger" / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    # Before weights are looked for, which are not there.
    assert "one of 257 tokens" in refused(*args, "--against", tmp_path / "larger", status=2)
    assert "'quick' is not one of" in refused(*args, "--arithmetic", "quick", status=2)
    assert "expert_cache" in refused(*args, "--expert-cache", "1.5", status=2)


def test_certificates_say_which_arithmetic_and_old_ones_are_still_read(home: Path, tmp_path: Path) -> None:
    save_family(save_base(tmp_path / "base"), tmp_path / "family")
    args = ("eval", tmp_path / "base", "--family", tmp_path / "family", "--data", home / "c.jsonl", "--certify")
    assert call(*args, "--max-tokens", 1200, "--expert-cache", 0.5).exit_code == 0
    certificate = Family.load(tmp_path / "family").points[0].certificate
    assert certificate is not None and certificate["arithmetic"] == {"name": "float", "exact": True}
    entries = json.loads((tmp_path / "family" / "family.json").read_text())
    for point in entries["points"]:
        del point["certificate"]["arithmetic"]
    write_whole(tmp_path / "family" / "family.json", json.dumps(entries))
    old = Family.load(tmp_path / "family").points[0].certificate
    assert old is not None and "arithmetic" not in old


def test_train_makes_a_family_of_a_quantised_model(home: Path, tmp_path: Path) -> None:
    args = ("train", home / "coded", "--data", home / "c.jsonl", "--out", tmp_path / "family", "--strengths", 1.0)
    args += ("--steps", 2, "--batch", 2, "--length", 32, "--no-tune")
    assert "is for decoding" in refused(*args, "--arithmetic", "fast", status=2)
    assert not (tmp_path / "family").exists()
    result = found(*args, "--expert-cache", 0.5)
    assert result["certified"] and result["arithmetic"] == {"name": "fp8", "exact": True}
    family = Family.load(tmp_path / "family")
    assert family.points[0].certificate is not None
    assert family.points[0].certificate["arithmetic"]["name"] == "fp8"
    # And it is the dequantised model's family.
    assert found("eval", home / "plain", "--family", family.path, "--data", home / "a.txt")["points"]


def test_run_shows_the_arithmetic(home: Path) -> None:
    args = ("run", home / "coded", "--prompt", "Once", "--max-new-tokens", 4, "--recency", "ema")
    plain = found(*args, "--arithmetic", "exact")
    assert plain["status"]["expert_cache"]["arithmetic"] == "fp8, exact"
    assert found(*args, "--arithmetic", "exact", "--expert-cache", 0.5)["text"] == plain["text"]
    shown = call(*args, "--arithmetic", "exact", "--profile", "orin-8gb")
    assert shown.exit_code == 0, shown.stderr
    assert "experts fp8, exact: hit rate" in shown.stderr and "fp8, exact" in shown.stdout
    assert "'quick' is not one of" in refused(*args, "--arithmetic", "quick", status=2)
    assert "'quick' is not one of" in refused(*args, "--arithmetic", "quick", "--profile", "server", status=2)


def test_trace_of_a_quantised_model_is_the_dequantised_models(home: Path, tmp_path: Path) -> None:
    figures = [
        found("trace", home / name, "--data", home / "a.txt", "--out", tmp_path / f"{name}.npz", "--max-tokens", 200)
        for name in ("coded", "plain")
    ]
    assert figures[0]["eor"] == pytest.approx(figures[1]["eor"], abs=1e-3)
