"""`remoe eval MODEL.gguf`: what a prior and a family cost and save in llama.cpp, against the same in transformers."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import found, refused
from gguf_writer import small_model, write_gguf
from llama_architectures import write_dense
from llama_engine import skip_without_engine

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from transformers import AutoModelForCausalLM

from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.engines.llamacpp import evaluate as evaluating
from remoe_adapt.engines.llamacpp.evaluate import GgufMeasuring, evaluate_gguf, pieces, renormalises
from remoe_adapt.engines.llamacpp.in_memory import share_in_memory
from remoe_adapt.engines.llamacpp.in_process import LlamaModel
from remoe_adapt.engines.llamacpp.prior.native import NativePrior
from remoe_adapt.errors import ConfigError, DataError, ExportError, RouterNotFoundError
from remoe_adapt.evaluation import Tally
from remoe_adapt.family.family import Family, FamilyPoint
from remoe_adapt.recency_settings import Recency

TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
READ = {"mib_per_token", "major_faults_per_token", "in_memory"}
PRIOR = {"recency", "recency_gain", "swapped_share"}


@pytest.fixture(scope="module", autouse=True)
def _right_version() -> None:
    skip_without_engine()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """m.gguf, random and with a tokenizer; a.txt, b.txt"""
    home = tmp_path_factory.mktemp("eval")
    write_gguf(small_model("qwen3moe"), "qwen3moe", home / "m.gguf")
    (home / "a.txt").write_text(TEXT)
    (home / "b.txt").write_text(TEXT[40:])
    return home


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """The shipped model as F32 without a tokenizer, for its own is not one that the writer knows."""
    model = AutoModelForCausalLM.from_pretrained(repo_root / "examples" / "tiny_moe", dtype=torch.float32)
    return write_gguf(model, "qwen2moe", tmp_path_factory.mktemp("shipped") / "m.gguf", vocabulary=False)


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 250, (length,), generator=generator).tolist() for length in (40, 1, 25)]


def measured(path: Path, documents: list[list[int]], **options: Any) -> dict[str, Any]:
    return evaluate_gguf(path, documents, GgufMeasuring(**{"threads": 1, "warm_tokens": 0} | options))


def test_gain_0_is_the_base_and_a_gain_raises_overlap(home: Path, documents: list[list[int]]) -> None:
    gains = (0.0, 0.3)
    priors = [Recency.of(mode, gain) for mode in ("ema", "last") for gain in gains]
    priors += [Recency.of("cost", gain, share=share) for share in (0.5, 0.25) for gain in (0.0, 0.3)]
    result = measured(home / "m.gguf", documents, priors=priors, warm_tokens=3)
    base, (none, ema, still, last, idle, wide, _, narrow) = result["base"], result["priors"]
    assert (result["tokens"], result["documents"], result["window"]) == (39 + 24, 2, 256)
    for row in (none, still, idle):
        assert (row["ppl_ratio"], row["kl"], row["swapped_share"]) == (1.0, 0.0, 0.0)
        assert {k: v for k, v in row.items() if k not in READ | PRIOR} == {k: base[k] for k in base if k not in READ}
    for row, mode in ((ema, "ema"), (last, "last"), (wide, "cost"), (narrow, "cost")):
        assert (row["recency"], row["recency_gain"]) == (mode, 0.3)
        assert row["eor"] > base["eor"] + 0.1 and row["kl"] > 1e-6 and 0.05 < row["swapped_share"] < 1
        assert row["lru@0.25"] > base["lru@0.25"] and row["switch_rate"] <= base["switch_rate"]
    assert len({row["eor"] for row in (ema, last, wide, narrow)}) == 4
    assert base["mib_per_token"] >= 0 and base["major_faults_per_token"] >= 0 and base["in_memory"] > 0.5


def test_each_token_is_decoded_once_and_the_routes_are_the_engines(
    home: Path, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    traces, trace = [], Tally.trace

    def kept(tally: Tally, num_experts: int, phase: str = "prefill") -> Any:
        traces.append(trace(tally, num_experts, phase))
        return traces[-1]

    monkeypatch.setattr(Tally, "trace", kept)
    steps: list[int] = []
    options = GgufMeasuring(threads=1, priors=[Recency.of("ema", 0.4)], window=16)
    result = evaluate_gguf(home / "m.gguf", documents, options, on_tokens=steps.append)
    assert result["window"] == 16 and sum(steps) == 2 * 65 and result["tokens"] == 65 - (3 + 2)
    plan = pieces(documents, 16)
    assert [(document, begin, len(ids)) for document, begin, ids in plan] == [
        (0, 0, 16), (0, 16, 16), (0, 32, 8), (2, 0, 16), (2, 16, 9),
    ]  # fmt: skip
    chosen = []
    with LlamaModel(home / "m.gguf", recency="ema", gain=0.4, trace=True) as engine:
        for _, _, ids in plan:
            engine.clear()
            for token in ids:
                engine.decode([token])
        chosen = [np.concatenate(engine.routes[layer]) for layer in sorted(engine.routes)]
    assert np.array_equal(traces[1].experts, np.stack(chosen)) and traces[1].meta["phase"] == "decode"
    assert traces[1].document_starts == (0, 40) and not np.array_equal(traces[0].experts, traces[1].experts)


def test_pieces_leave_out_what_would_score_nothing() -> None:
    assert pieces([[1], [], [1, 2], [1, 2, 3]], 2) == [(2, 0, [1, 2]), (3, 0, [1, 2])]


def test_the_shipped_model_agrees_with_itself_in_transformers(shipped: Path, repo_root: Path, tmp_path: Path) -> None:
    """Within one context both compute the same: ratios agree to 1e-4, overlap to 0.002 (a tie may go another way)."""
    folder, text = repo_root / "examples" / "tiny_moe", tmp_path / "text.txt"
    text.write_bytes((repo_root / "LICENSE").read_bytes())
    common = ("--data", text, "--max-tokens", 60, "--recency", "cost", "--family", folder / "family")
    ours = found("eval", folder, *common, "--recency-gain", 0.1, "--dtype", "float32")
    theirs = found("eval", shipped, *common, "--gain", 0.1, "--config", folder, "--threads", 1, "--warm-tokens", 1)
    assert theirs["renormalised"] and theirs["tokens"] == ours["tokens"] and theirs["window"] == ours["window"] == 512

    def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
        return [result["base"], result["control"], *result["points"], *result["priors"]]

    assert len(rows(theirs)) == len(rows(ours)) == 8
    near = {"ppl_ratio": 1e-4, "ppl_ratio_control": 1e-4, "kl": 1e-4, "eor": 2e-3, "lru@0.25": 2e-3}
    for one, other in zip(rows(theirs), rows(ours), strict=True):
        own = READ | {"swapped_share"} if "recency" in one else READ
        assert set(one) - set(other) == own and set(other) < set(one)
        assert one["ppl"] == pytest.approx(other["ppl"], rel=1e-4) and one["strength"] == other["strength"]
        for key, distance in near.items():
            assert one[key] == pytest.approx(other[key], abs=distance), key
    # Without its configuration the engine computes another model, and says so.
    plain = measured(shipped, [list(range(5, 60))])
    assert plain["base"]["ce"] != measured(shipped, [list(range(5, 60))], renormalise=True)["base"]["ce"]
    assert "norm_topk_prob" in renormalises("qwen2moe")[1] and renormalises("qwen3moe") == (False, "")


def test_a_point_brings_its_own_prior(shipped: Path, repo_root: Path, documents: list[list[int]]) -> None:
    stored = Family.load(repo_root / "examples" / "tiny_moe" / "family" / "trained")
    point = replace(stored.points[-1], recency=Recency.of("ema", (0.0, 0.1, 0.2, 0.3, 0.4)))
    family = Family(stored.path, stored.base_id, stored.fingerprint, (point,))
    priors = [Recency.of("last", 0.2), Recency.of("ema", 0.2)]
    result = measured(shipped, documents, family=family, priors=priors, renormalise=True)
    (row,), (last, ema) = result["points"], result["priors"]
    assert result["control"] is None and (row["strength"], row["recency"]) == (point.strength, "ema")
    assert row["recency_gain"] == pytest.approx(0.2) and [each["recency"] for each in (last, ema)] == ["last", "ema"]
    assert row["eor"] > ema["eor"] > result["base"]["eor"]
    with pytest.raises(ConfigError, match="3 recency gains for 5"):
        unfit = replace(point, recency=Recency.of("ema", (0.1, 0.2, 0.3)))
        measured(shipped, documents, family=Family(family.path, family.base_id, family.fingerprint, (unfit,)))


def test_a_family_without_adapters_is_its_gains(home: Path, documents: list[list[int]], tmp_path: Path) -> None:
    family = Family.create(tmp_path / "family", "tiny", "sha256:0")
    layers = len(measured(home / "m.gguf", documents, per_layer=True)["base"]["per_layer"])
    priors = [Recency.of("cost", tuple(strength * 0.1 * number for number in range(layers))) for strength in (0.5, 1.0)]
    family.add_points(
        [FamilyPoint(strength, None, {}, prior) for strength, prior in zip((0.5, 1.0), priors, strict=True)]
    )
    result = measured(home / "m.gguf", documents, family=family, priors=priors)
    assert [row["strength"] for row in result["points"]] == [0.5, 1.0]
    for point, prior in zip(result["points"], result["priors"], strict=True):
        for key in ("kl", "eor", "recency", "recency_gain", "swapped_share"):
            assert point[key] == prior[key]
        assert point["kl"] > 0
    with pytest.raises(ExportError, match="no adapters"):
        export_gguf_lora(home / "m.gguf", family, tmp_path / "loras")


def test_the_command_line_prints_it_and_names_what_would_do_nothing(
    home: Path, shipped: Path, repo_root: Path, tmp_path: Path
) -> None:
    data = ("--data", home / "a.txt")
    ask = ("eval", home / "m.gguf", *data, "--data", home / "b.txt", "--max-tokens", 60, "--threads", 1)
    result = found(*ask, "--recency", "ema,resident", "--gain", "0.3", "--csv", tmp_path / "t.csv", "--per-layer",
                   "--cache", 0.5, "--policy", "lfu", "--warm-tokens", 1)  # fmt: skip
    assert result["data"] == ["a.txt", "b.txt"] and result["engine"].startswith("xllamacpp")
    assert {"lfu@0.5", "per_layer", *READ} < result["base"].keys() and not PRIOR & result["base"].keys()
    assert [row["recency"] for row in result["priors"]] == ["ema", "resident"] and result["priors"][0].keys() > PRIOR
    # The whole file is in memory here, so nothing is read, and `resident` has nothing to prefer: both are said.
    assert result["priors"][1]["swapped_share"] == 0 and any("resident 0.3 changed no" in n for n in result["notes"])
    with (tmp_path / "t.csv").open(newline="") as file:
        assert [row["arm"] for row in csv.DictReader(file) if row["mib_per_token"]] == [
            "base",
            "ema 0.3",
            "resident 0.3",
        ]
    for args, words in (
        (("--tasks", "arc_easy"), "--tasks does nothing for a"), (("--device", "cpu"), "--device does nothing for"),
        (("--dtype", "float32"), "--dtype does nothing"), (("--storage", "pack"), "--storage does nothing"),
        (("--storage", home), "--storage does"), (("--arithmetic", "fast"), "--arithmetic does"),
        (("--against", "x"), "--against does"), (("--family", "x", "--certify"), "--certify does"),
        (("--recency", "often"), "'often'"), (("--recency", "last", "--gain", 0.1, "--recency-decay", 0.5), "ema"),
        (("--recency", "ema,last", "--recency-decay", 0.5), "nothing in the mode last"),
        (("--recency", "cost,ema", "--recency-share", 0.5), "nothing in the mode ema"),
        (("--recency", "cost", "--recency-share", 1.5), "share 1.5"), (("--gain", "99"), "gain 99"),
        (("--window", 999), "longer than this model's, 256"), (("--max-tokens", 3), "too few for 2"),
        (("--config", repo_root / "examples" / "tiny_moe"), "of a qwen2_moe model, the file is of the architecture"),
    ):  # fmt: skip
        assert words in refused(*ask[:6], *args, status=2), args
    assert "is for a GGUF model alone" in refused(
        "eval", repo_root / "examples" / "tiny_moe", *data, "--threads", 1, status=2
    )
    assert "no tokenizer in it" in refused("eval", shipped, *data, status=2)
    assert "cannot load" in refused("eval", home / "none.gguf", *data, status=2)
    assert "does not exist" in refused("eval", home / "m.gguf", "--data", home / "c.txt")


def test_a_prior_that_cannot_act_is_an_error_and_no_row(
    home: Path, documents: list[list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, resident = home / "m.gguf", Recency.of("resident", 0.2)
    with pytest.raises(RouterNotFoundError, match="without experts"):
        measured(write_dense(tmp_path / "dense.gguf"), documents, priors=[resident])
    with pytest.raises(ConfigError, match="2 recency gains for 3 layers"):
        measured(path, documents, priors=[Recency.of("ema", (0.1, 0.2))])
    with pytest.raises(ConfigError, match=r"token 320 is none of this model's 320"):
        measured(path, [[1, 2, 320]])
    with pytest.raises(DataError, match="two tokens"):
        measured(path, [[1], []])
    with pytest.raises(ConfigError, match="give fewer --max-tokens, or another folder by TMPDIR"):
        evaluating._BaseLogits(1 << 40, 1 << 20)
    status = NativePrior.status

    def changed(**facts: Any) -> None:
        monkeypatch.setattr(NativePrior, "status", lambda self: replace(status(self), **facts))

    changed(is_blind=True)
    with pytest.raises(ConfigError, match="told to its owner"):
        measured(path, documents, priors=[resident], warm_tokens=0)
    changed(acts=False, reason="of a test")
    with pytest.raises(ConfigError, match="off for this file: of a test"):
        measured(path, documents, priors=[Recency.of("ema", 0.2)])


def test_the_logits_of_the_base_come_back_as_they_went(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluating, "_CACHED_BYTES", 3 * 4 * 7)
    rows_NV = np.random.default_rng(0).normal(size=(10, 7)).astype(np.float32)
    with evaluating._BaseLogits(*rows_NV.shape) as kept:
        for row_V in rows_NV:
            kept.add(row_V[None])
        for _ in range(2):
            for number, row_V in enumerate(rows_NV):
                assert kept.read(number).tolist() == [row_V.tolist()]


def test_what_is_in_memory_is_told_of_own_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 20))
    assert share_in_memory([path]) == 1.0
    assert share_in_memory([tmp_path / "none"]) is None


def test_an_expert_cache_changes_what_is_read_and_no_figure_of_quality(home: Path, documents: list[list[int]]) -> None:
    options = GgufMeasuring(priors=[Recency.of("ema", 0.3)], threads=1)
    plain = evaluate_gguf(home / "m.gguf", documents, options)
    cached = evaluate_gguf(home / "m.gguf", documents, replace(options, expert_cache=0.5))
    assert plain["expert_cache"] is None and cached["expert_cache"] == 0.5
    for one, other in zip([plain["base"], *plain["priors"]], [cached["base"], *cached["priors"]], strict=True):
        assert [one[key] for key in ("ce", "kl", "eor")] == [other[key] for key in ("ce", "kl", "eor")]
