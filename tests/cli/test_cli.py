"""The command line as a user meets it: one JSON object on stdout, one line per error, exit status 0, 1 or 2."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import call, found, refused
from tiny_family import save_base, save_family

from remoe_adapt import Family, Trace, __version__
from remoe_adapt.bench import gating_cpu
from remoe_adapt.checkpoints.load import load_with_tokenizer
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.eviction.replay import hit_rates, simulate
from remoe_adapt.routers.table import SCORING_EXAMPLES
from remoe_adapt.texts import read_shared

TEXT = "It was the best of times, it was the worst of times. " * 12


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, base/family, base/demo.json, a.txt, b.jsonl, t.npz"""
    home = tmp_path_factory.mktemp("cli")
    save_family(save_base(home / "base"), home / "base" / "family")
    (home / "base" / "demo.json").write_text(json.dumps({"heldout_stdlib": ["heapq"], "prompts": ["Once there was"]}))
    (home / "a.txt").write_text(TEXT)
    (home / "b.jsonl").write_text("".join(json.dumps({"text": TEXT[i : i + 40]}) + "\n" for i in range(30)))
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(16, dtype=np.int16), (3, 200, 1)), axis=2)[..., :4]
    Trace(ids, {"num_experts": 16, "document_starts": [0, 90]}).save(home / "t.npz")
    return home


def test_help_lists_every_command_of_this_version() -> None:
    result = call("--help")
    assert result.exit_code == 0
    for name in ("demo", "train", "eval", "trace", "simulate", "run", "profiles", "doctor", "bench"):
        assert f" {name} " in result.stdout
    assert call("--version").stdout.strip() == __version__


@pytest.mark.parametrize(
    "args",
    [
        [], ["no-such-command"], ["eval"], ["eval", "m"], ["eval", "m", "--data", "f", "--certify"],
        ["eval", "m", "--data", "f", "--max-tokens", "many"], ["trace", "m", "--data", "f"], ["train", "m"],
        ["simulate"], ["run", "m", "--prompt", "x", "--pressure", "0.5", "--strength", "0.5"], ["profiles", "show"],
    ],
)  # fmt: skip
def test_bad_usage_is_status_2(args: list[str]) -> None:
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_eval_is_the_protocol_of_evaluate(home: Path) -> None:
    base, data = home / "base", ["--data", home / "a.txt", "--data", home / "b.jsonl"]
    result = found("eval", base, "--family", base / "family", *data, "--max-tokens", 300, "--policy", "lrfu")
    model, tokenizer = load_with_tokenizer(base)
    documents = read_shared([home / "a.txt", home / "b.jsonl"], tokenizer, 300)
    expected = evaluate(model, documents, family=Family.load(base / "family"), policies=["lrfu"])
    assert {key: result[key] for key in expected} == json.loads(json.dumps(expected))
    assert result["data"] == ["a.txt", "b.jsonl"]
    assert "lrfu@0.25" in result["base"] and "lru@0.25" not in result["base"]


def test_eval_shows_a_table_and_writes_certificates(home: Path, tmp_path: Path) -> None:
    save_family(save_base(tmp_path / "base"), tmp_path / "family")
    (tmp_path / "long.txt").write_text((home / "a.txt").read_text() * 2)
    command = ("eval", tmp_path / "base", "--family", tmp_path / "family", "--certify")
    assert "too few for a certificate" in refused(*command, "--data", home / "a.txt", status=1)
    result = call(*command, "--data", tmp_path / "long.txt")
    assert result.exit_code == 0, result.stderr
    assert "control" in result.stdout and "load entropy" in result.stdout
    certificate = Family.load(tmp_path / "family").points[0].certificate
    assert certificate is not None and certificate["data"] == ["long.txt"]


def test_eval_plots_the_frontier_or_names_the_extra(home: Path, tmp_path: Path) -> None:
    plot = tmp_path / "frontier.png"
    args = ("eval", home / "base", "--family", home / "base/family", "--data", home / "a.txt", "--plot", plot)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        assert "remoe-adapt[plot]" in refused(*args)
        return
    assert call(*args).exit_code == 0
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_trace_then_simulate(home: Path, tmp_path: Path) -> None:
    out = tmp_path / "t.npz"
    facts = found("trace", home / "base", "--data", home / "b.jsonl", "--out", out, "--max-tokens", 200)
    assert (facts["tokens"], facts["documents"], facts["phase"], facts["layers"]) == (200, 5, "prefill", 4)
    replayed = found("simulate", out, "--policy", "lru", "--policy", "belady", "--cache", 0.25, "--cache", "0.5")
    assert replayed["belady@0.5"] >= replayed["lru@0.5"] >= replayed["lru@0.25"]
    assert replayed["eor"] == facts["eor"]


def test_a_recording_is_not_lost_for_want_of_a_folder(home: Path, tmp_path: Path) -> None:
    args = ("trace", home / "base", "--data", home / "a.txt", "--max-tokens", 20, "--out")
    found(*args, tmp_path / "new" / "t.npz")
    assert Trace.load(tmp_path / "new" / "t.npz").num_tokens == 20
    assert "cannot be written" in refused(*args, home / "a.txt" / "t.npz", status=2)


def test_trace_of_decode_spreads_prompts_over_a_long_document(home: Path, tmp_path: Path) -> None:
    args = ("--decode", 10, "--prompt-tokens", 20, "--max-tokens", 40)
    facts = found("trace", home / "base", "--data", home / "a.txt", "--out", tmp_path / "d.npz", *args)
    assert (facts["tokens"], facts["documents"], facts["phase"]) == (40, 4, "decode")
    assert Trace.load(tmp_path / "d.npz").meta["text"] == "a.txt"


def test_simulate_keys_and_figures(home: Path) -> None:
    result = found(
        "simulate", home / "t.npz", "--policy", "lru", "--policy", "belady", "--cache", "0.25", "--tokens", 150
    )
    trace = Trace.load(home / "t.npz").tokens(150)
    expected = simulate(trace, ("lru", "belady"), (0.25,)) | hit_rates(trace, ("lru", "belady"), (0.25,))
    assert {key: result[key] for key in expected} == expected and "belady@0.25/lookup" in expected
    shown = call("simulate", home / "t.npz")
    assert "lru@0.25" in shown.stdout and f"{simulate(Trace.load(home / 't.npz'))['eor']:.4f}" in shown.stdout


def test_demo_prints_its_keys_and_a_sentence(home: Path) -> None:
    args = ("demo", "--model", home / "base", "--tokens", 60, "--max-new-tokens", 5)
    result = found(*args)
    assert [row["strength"] for row in (result["base"], *result["points"])] == [0.0, 0.5, 1.0]
    shown = call(*args)
    assert shown.exit_code == 0
    assert "With a cache for 25% of the experts" in " ".join(shown.stdout.split())
    assert "Once there was" in shown.stdout and "decoding" in shown.stderr


def test_run_pins_strength_and_pressure(home: Path) -> None:
    args = ("run", home / "base", "--family", home / "base/family", "--prompt", "Once", "--max-new-tokens", 6)
    base = found(*args, "--strength", 0)
    assert base["status"]["strength"] == 0.0 and base["tokens"] == 6
    full = found(*args, "--strength", 1)
    assert full["status"]["strength"] == 1.0 and full["status"]["swaps"] == 1
    pressed = found(*args, "--pressure", 0.5, "--profile", "orin-8gb")
    assert pressed["status"]["strength"] == 0.25 and pressed["status"]["profile"] == "orin-8gb"
    shown = call(*args, "--strength", 1)
    assert shown.stdout.startswith(full["text"])
    assert "strength 1.00" in shown.stderr and "tpot_ms" in shown.stdout


def test_run_behind_an_expert_cache_writes_the_same_text(home: Path) -> None:
    args = ("run", home / "base", "--family", home / "base/family", "--prompt", "Once", "--max-new-tokens", 6)
    plain, cached = found(*args, "--strength", 1), found(*args, "--strength", 1, "--expert-cache", 0.5)
    assert cached["text"] == plain["text"] and plain["status"]["hit_rate"] is None
    experts = cached["status"]["expert_cache"]
    assert 0 < cached["status"]["hit_rate"] < 1 and cached["status"]["bytes_read"] == experts["bytes"] > 0
    shown = call(*args, "--expert-cache", "1MiB")
    assert "hit rate with the prompt" in shown.stderr and "after the first token" in " ".join(shown.stdout.split())
    assert "expert_cache" in refused(*args, "--expert-cache", "1.5", status=2)
    if not torch.cuda.is_available():
        assert "cuda" in refused(*args, "--expert-cache", "0.5", "--device", "cuda", status=2)


def test_run_writes_and_draws_its_log(home: Path, tmp_path: Path) -> None:
    log, plot = tmp_path / "run.jsonl", tmp_path / "run.png"
    args = ("run", home / "base", "--family", home / "base/family", "--prompt", "Once", "--expert-cache", 0.5)
    # Long enough for samples of the monitor.
    found(*args, "--strength", 0.5, "--log", log, "--max-new-tokens", 200)
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("swap") == 1 and events.count("sample") >= 2
    if importlib.util.find_spec("matplotlib") is not None:
        found(*args, "--log", log, "--plot", plot, "--max-new-tokens", 2)
        assert plot.read_bytes().startswith(b"\x89PNG")
    assert call(*args, "--plot", plot).exit_code == 2
    short = call(*args, "--log", tmp_path / "none.jsonl", "--plot", plot, "--max-new-tokens", 1, "--profile", "server")
    assert short.exit_code in (0, 1) and "tpot_ms" in short.stdout, "the text is there, with or without a sample"


def test_run_takes_a_recency_prior(home: Path) -> None:
    args = ("run", home / "base", "--prompt", "Once", "--max-new-tokens", 6, "--recency", "ema", "--recency-gain", 0.4)
    assert found(*args)["status"]["recency"]["gain"] == pytest.approx(0.4)
    assert "recency 'often'" in refused(*args[:-3], "often", status=2)


def test_eval_measures_priors_and_bench_gates(home: Path) -> None:
    result = found("eval", home / "base", "--data", home / "a.txt", "--recency", "last", "--recency-gain", "0.1,0.8")
    assert [(row["recency"], row["recency_gain"]) for row in result["priors"]] == [("last", 0.1), ("last", 0.8)]
    assert result["priors"][1]["eor"] > result["base"]["eor"]
    assert (
        "last 0.8"
        in call("eval", home / "base", "--data", home / "a.txt", "--recency", "last", "--recency-gain", "0.8").stdout
    )


def test_bench_gating_prints_every_family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gating_cpu, "_EXPERTS", (64,))
    monkeypatch.setattr(gating_cpu, "_LAYERS", 2)
    rows = [row for row in found("bench", "gating", "--calls", 2)["rows"] if row["device"] == "cpu"]
    assert len(rows) == 2 * len(SCORING_EXAMPLES), "ema and cost"
    assert all(row["ratio"] > 0 and row["D"] == 2048 for row in rows)
    assert "the stock router" in " ".join(call("bench", "gating", "--calls", 2).stdout.split())


def test_train_makes_a_certified_family_and_goes_on_where_it_was(home: Path, tmp_path: Path) -> None:
    (tmp_path / "more.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(30)))
    sizes = ("--steps", 2, "--batch", 2, "--length", 32, "--strengths")

    def trained(data: Path, out: Path, strengths: str, *more: object) -> dict[str, Any]:
        return found("train", home / "base", "--data", data, "--out", out, *sizes, strengths, *more)

    out, only_one = tmp_path / "family", ("--budgets", "1.02,1.05")
    result = trained(tmp_path / "more.jsonl", out, "0.5", *only_one)
    assert result["strengths"] == [0.5] and math.isfinite(result["points"][0]["ppl_ratio_control"])
    adapters, family = Family.load(out / "trained"), Family.load(out)
    assert (result["family"], result["adapters"]) == (str(out), str(adapters.path))
    assert result["certified"] and result["tokens"] >= 1000
    assert adapters.control is not None and adapters.points[0].certificate is not None
    assert [point.budget for point in family.points] == [1.02, 1.05] and family.control is not None
    assert {point.adapter for point in family.points} == {"s050"} and result["tuned"]["strengths"] == [0.5, 1.0]
    assert all(point.recency is not None and point.certificate is not None for point in family.points)
    before = (out / "family.json").read_bytes()
    again = trained(tmp_path / "more.jsonl", out, "0.5,1.0", *only_one)
    assert again["strengths"] == [0.5, 1.0] and again["tuned"] is None and again["family"] == str(out)
    assert (out / "family.json").read_bytes() == before, "tuned already, and the budgets were kept"
    few = trained(home / "b.jsonl", tmp_path / "few", "0.5")
    assert few["tokens"] < 1000 and not few["certified"] and few["tuned"] is None
    assert few["family"] == str(tmp_path / "few" / "trained") and not (tmp_path / "few" / "family.json").exists()
    assert Family.load(few["family"]).points[0].certificate is None, "so few tokens certify nothing"
    alone = trained(home / "b.jsonl", tmp_path / "alone", "0.5", "--no-tune")
    assert alone["family"] == alone["adapters"] == str(tmp_path / "alone") and Family.load(tmp_path / "alone")
    command = ("train", home / "base", "--data", home / "b.jsonl", "--out", tmp_path / "alone", *sizes, "0.5")
    assert "trained without tuning" in refused(*command)
    assert "are of tuned points" in refused(*command, "--no-tune", *only_one, status=2)


def test_profiles_and_doctor(tmp_path: Path) -> None:
    profiles = found("profiles", "list")["profiles"]
    assert profiles["orin-8gb"]["memory"]["budget_bytes"] == int(5.5 * 2**30)
    assert found("profiles", "show", "orin-8gb")["expert_cache"]["share"] == 0.25
    assert found("profiles", "check")["ok"] is True
    (tmp_path / "bad.yaml").write_text("name: bad\ncolour: red\n")
    assert "did you mean 'orin-8gb'" in call("profiles", "check", "orin8gb").stderr
    checked = call("profiles", "check", tmp_path / "bad.yaml")
    assert checked.exit_code == 1 and "bad.yaml:2: colour" in checked.stdout
    assert found("doctor")["ok"] is True
    assert "example model" in call("doctor").stdout


def test_failures_are_one_line_on_stderr(home: Path, tmp_path: Path) -> None:
    (tmp_path / "t.npz").write_bytes(b"PK not a zip")
    base, family, data = home / "base", home / "base/family", ("--data", home / "a.txt")
    assert "t.npz" in refused("simulate", tmp_path / "t.npz")
    assert "unknown cache policy 'arc'" in refused("simulate", home / "t.npz", "--policy", "arc", status=2)
    assert "nothing" in refused("eval", tmp_path / "nothing", *data, status=2)
    assert "does not exist" in refused("eval", base, "--data", tmp_path / "nothing.txt")
    assert "family.json" in refused("eval", base, *data, "--family", tmp_path)
    assert "unknown dtype" in refused("eval", base, *data, "--dtype", "int3", status=2)
    assert "no_such_device" in refused("eval", base, *data, "--device", "no_such_device", status=2)
    assert "no profile named" in refused("profiles", "show", "orin-9gb", status=2)
    assert call("run", base, "--family", family, "--prompt", "x", "--pressure", 2).exit_code == 2
    assert "not a list of numbers" in refused(
        "train", base, *data, "--out", tmp_path / "f", "--strengths", "a,b", status=2
    )
    assert "strength 1.5" in refused("train", base, *data, "--out", tmp_path / "f", "--strengths", "1.5", status=2)
    assert not (tmp_path / "f").exists()


def test_bad_caches_are_refused_before_anything_is_scored(home: Path) -> None:
    args = ("eval", home / "base", "--data", home / "a.txt")
    for option, value, message in (("--cache", 0, "in (0, 1], got 0.0"), ("--policy", "arc", "unknown cache policy")):
        result = call(*args, option, value)
        assert result.exit_code == 2 and message in result.stderr
        assert result.stderr.count("\n") == 1, "no bar, and nothing of the libraries"


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a torch without a GPU")
def test_a_gpu_that_is_not_there_is_one_line(home: Path) -> None:
    assert "on device cuda" in refused("eval", home / "base", "--data", home / "a.txt", "--device", "cuda", status=2)


def test_tasks_need_their_extra(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert "remoe-adapt[eval]" in refused("eval", home / "base", "--tasks", "arc_easy")


def test_as_a_process_stdout_holds_nothing_but_the_object(home: Path) -> None:
    command = [sys.executable, "-m", "remoe_adapt", "eval", str(home / "base"), "--data", str(home / "a.txt"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "RANK": "0"})
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["base"]["strength"] == 0.0
    (bar,) = done.stderr.strip().splitlines()
    assert bar.startswith("scoring"), "nothing of the libraries, and no bar of theirs"


def test_as_a_process_failures_have_no_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remoe_adapt", "simulate", str(tmp_path / "none.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
