"""The demo on a tiny model of our own: same text for every arm, figures of the protocol, restored weights."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import tiny_family
from tiny_family import byte_tokenizer, save_base, save_family
from tiny_models import tiny_model
from transformers import AutoModelForCausalLM

from remoe_adapt import Family
from remoe_adapt.cli import report
from remoe_adapt.errors import ConfigError, DataError
from remoe_adapt.evaluation import demo
from remoe_adapt.evaluation.demo import run_demo
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.evaluation.generation import generate_text
from remoe_adapt.evaluation.shipped import example_folder, held_out
from remoe_adapt.expert_cache.load import load_with_expert_cache

PROMPTS = ["Once there was", "def f(x):"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "base"
    save_family(save_base(folder), folder / "family")
    (folder / "demo.json").write_text(json.dumps({"heldout_stdlib": ["heapq", "no_such_module"], "prompts": PROMPTS}))
    return folder


@pytest.fixture(scope="module")
def result(folder: Path) -> dict[str, Any]:
    return run_demo(folder, tokens=90, new_tokens=8)


def test_text_is_prompts_and_the_interpreters_own_source(folder: Path) -> None:
    tokenizer = byte_tokenizer()
    text = held_out(folder, tokenizer, 100)
    assert text.sources == ["2 prompts", "heapq"]
    assert [tokenizer.decode(ids) for ids in text.documents[:2]] == PROMPTS
    assert sum(map(len, text.documents)) == 100
    import heapq

    assert heapq.__file__ is not None
    assert Path(heapq.__file__).read_text().startswith(str(tokenizer.decode(text.documents[2])))


@pytest.mark.parametrize("tokens", [2, 7, 20])
def test_fewer_tokens_than_the_prompts_have_are_no_more_than_that(folder: Path, tokens: int) -> None:
    assert sum(map(len, held_out(folder, byte_tokenizer(), tokens).documents)) == tokens


def test_more_data_is_decoded_in_pieces(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "more.txt").write_text("x" * 300)
    text = held_out(folder, byte_tokenizer(), 250, [tmp_path / "more.txt"])
    assert text.sources[-1] == "more.txt"
    assert [len(ids) for ids in text.documents[-2:]] == [128, 122]


def test_a_recipe_names_modules_of_the_standard_library_and_no_other_file(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("secret = 1")
    up = "../" * 20 + str(tmp_path / "mine").lstrip("/")
    for name in (str(tmp_path / "mine"), up, "site-packages/pip/__init__", "no\x00thing"):
        (tmp_path / "demo.json").write_text(json.dumps({"heldout_stdlib": [name], "prompts": ["Once"]}))
        assert held_out(tmp_path, byte_tokenizer(), 100).sources == ["1 prompts"]


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"prompts": []}', '{"prompts": [1], "heldout_stdlib": []}', "[" * 100_000),
        *('{"prompts": "abc", "heldout_stdlib": []}', '{"prompts": [], "heldout_stdlib": ' + "9" * 5000 + "}"),
    ],
)
def test_damaged_recipe_is_one_clear_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "demo.json").write_text(content)
    with pytest.raises(DataError, match=r"demo\.json"):
        held_out(tmp_path, byte_tokenizer(), 100)


def test_every_arm_decodes_the_same_text_and_scores_as_evaluation_does(folder: Path, result: dict[str, Any]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    documents = held_out(folder, byte_tokenizer(), 90).documents
    expected = evaluate(model, documents, family=Family.load(folder / "family"))
    assert result["tokens"] == expected["tokens"]
    rows = [(result["base"], expected["base"]), (result["control"], expected["control"])]
    rows += list(zip(result["points"], expected["points"], strict=True))
    for found, wanted in rows:
        assert found["strength"] == wanted["strength"]
        for key in ("ce", "ppl_ratio", "ppl_ratio_control"):
            assert found[key] == pytest.approx(wanted[key], rel=1e-5), key
        assert found["kl"] == pytest.approx(wanted["kl"], rel=1e-2, abs=1e-6)
        # Near ties may fall the other way where one token at a time rounds differently.
        assert found["eor"] == pytest.approx(wanted["eor"], abs=0.01)
        assert found["lru@0.25"] == pytest.approx(wanted["lru@0.25"], abs=0.01)
        assert math.isfinite(found["tpot_ms"]) and found["tpot_ms"] > 0


def test_keys_are_those_of_the_design(result: dict[str, Any]) -> None:
    keys = {"strength", "ce", "ppl", "ppl_ratio", "ppl_ratio_control", "kl", "eor", "lru@0.25", "load_entropy"}
    assert keys | {"tpot_ms", "hit_rate", "bytes_per_token", "stall_share"} <= set(result["base"])
    assert [row["strength"] for row in result["points"]] == [0.5, 1.0]
    assert all(set(row) == set(result["base"]) for row in result["points"])
    assert result["expert_cache"]["share"] == pytest.approx(0.25) and result["expert_cache"]["policy"] == "lrfu"
    assert result["stopped_after_s"] is None and result["tokens_asked"] == result["tokens"]
    assert "stopped" not in str(report.demo_table(result).title)
    json.dumps(result)


def test_experts_come_through_the_cache(folder: Path, result: dict[str, Any]) -> None:
    experts = load_with_expert_cache(folder).expert_cache
    for row in (result["base"], *result["points"]):
        assert 0 < row["hit_rate"] < 1 and 0 < row["stall_share"] < 1
    whole = run_demo(folder, expert_cache=1.0, tokens=90, new_tokens=0)["base"]
    documents, per_layer = 3, experts.source.num_experts[0] * experts.source.expert_bytes[0]
    most_bytes = documents * per_layer * len(experts.source.layers)
    # With room for all, each expert is read at most once for each document.
    assert whole["bytes_per_token"] * 90 <= most_bytes and whole["hit_rate"] > result["base"]["hit_rate"]
    assert whole["ce"] == result["base"]["ce"], "the budget changes no figure of the model"


def test_a_model_that_cannot_be_cached_is_decoded_without(tmp_path: Path) -> None:
    base = tiny_model("jetmoe", vocab_size=257)
    base.save_pretrained(tmp_path / "jet")
    byte_tokenizer().save_pretrained(tmp_path / "jet")
    tiny_family(base, tmp_path / "jet" / "family")
    (tmp_path / "text.txt").write_text("Once upon a time there was")
    found = run_demo(tmp_path / "jet", data=[tmp_path / "text.txt"], new_tokens=0)
    assert found["expert_cache"] is None and found["base"]["hit_rate"] is None and found["base"]["tpot_ms"] > 0
    assert "recorded decode" in str(report.demo_table(found).caption) and "25%" in report.demo_meaning(found)


def test_samples_show_base_and_full_strength(result: dict[str, Any]) -> None:
    assert [(s["strength"], s["prompt"]) for s in result["samples"]] == [
        (0.0, PROMPTS[0]), (1.0, PROMPTS[0]), (0.0, PROMPTS[1]), (1.0, PROMPTS[1]),
    ]  # fmt: skip


def test_out_of_time_all_arms_have_seen_the_same_shorter_text(folder: Path) -> None:
    short = run_demo(folder, tokens=90, new_tokens=0, max_seconds=0.0)
    assert short["tokens"] == len(PROMPTS[0]) - 1
    assert short["samples"] == []
    assert (short["tokens_asked"], short["stopped_after_s"]) == (90 - 3, 0.0)
    assert "13 tokens" in str(title := report.demo_table(short).title) and "of 87: stopped after 0 s" in str(title)


def test_progress_hears_every_step(folder: Path) -> None:
    totals: list[int] = []
    steps: list[int] = []
    run_demo(folder, tokens=12, new_tokens=0, on_start=totals.append, on_tokens=steps.append)
    assert totals == [sum(steps)] == [12 * 4]


def test_meaning_and_table_come_from_the_figures(result: dict[str, Any]) -> None:
    made_up = {
        **result,
        "base": {**result["base"], "hit_rate": 0.6, "eor": 0.4},
        "points": [{**result["points"][0], "strength": 1.0, "hit_rate": 0.8, "eor": 0.5, "ppl_ratio": 1.031}],
    }
    sentence = report.demo_meaning(made_up)
    assert "60.0%" in sentence and "80.0%" in sentence and "50% fewer" in sentence and "3.1% higher" in sentence
    table = report.demo_table(made_up)
    assert table.row_count == 3
    assert "50.0 % (+25%)" in list(table.columns[1].cells)


def test_without_the_shipped_model_it_says_how_to_get_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, folder: Path
) -> None:
    assert example_folder().parts[-2:] == ("examples", "tiny_moe")
    monkeypatch.setattr(demo, "example_folder", lambda: tmp_path / "nothing")
    with pytest.raises(ConfigError, match="--model and --family"):
        run_demo()
    save_base(tmp_path / "bare")
    with pytest.raises(ConfigError, match="no family in"):
        run_demo(tmp_path / "bare")
    with pytest.raises(DataError, match="give --data FILE"):
        (tmp_path / "bare" / "family").symlink_to(folder / "family")
        run_demo(tmp_path / "bare")


def test_generated_text_equals_greedy_generate(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = byte_tokenizer()
    pieces: list[str] = []
    made = generate_text(model, tokenizer, PROMPTS[0], new_tokens=12, on_text=pieces.append)
    prompt_BT = tokenizer(PROMPTS[0], return_tensors="pt")["input_ids"]
    ids_BT = model.generate(prompt_BT, max_new_tokens=12, do_sample=False)
    assert (
        made["text"] == "".join(pieces) == tokenizer.decode(ids_BT[0, prompt_BT.shape[1] :], skip_special_tokens=True)
    )
    assert made["prompt_tokens"] == len(PROMPTS[0])
    assert made["tokens"] == ids_BT.shape[1] - prompt_BT.shape[1]
    assert 0 <= made["eor"] <= 1 and made["tpot_ms"] > 0 and made["ttft_ms"] > 0


def test_sampling_leaves_the_callers_random_state_alone(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    before = torch.get_rng_state()
    first, again = (generate_text(model, byte_tokenizer(), "ab", new_tokens=9, temperature=1.0)["text"] for _ in "12")
    assert first == again
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("prompt", "new_tokens", "temperature"), [("a", 0, 0.0), ("a", 5, -0.5), ("", 5, 0.0)])
def test_impossible_generations_are_refused(folder: Path, prompt: str, new_tokens: int, temperature: float) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with pytest.raises(ConfigError):
        generate_text(model, byte_tokenizer(), prompt, new_tokens=new_tokens, temperature=temperature)


def test_more_tokens_than_the_model_has_positions_for_are_refused(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    limit = model.config.max_position_embeddings
    for prompt, new_tokens in (("ab", limit - 1), ("a" * limit, 1)):
        with pytest.raises(ConfigError, match=rf"more than the {limit} positions"):
            generate_text(model, byte_tokenizer(), prompt, new_tokens=new_tokens)
    with pytest.raises(ConfigError, match="seed"):
        generate_text(model, byte_tokenizer(), "ab", new_tokens=1, seed=1 << 64)


def test_shipped_model_and_family(repo_root: Path) -> None:
    """The real thing, on few tokens: it is a language model, and its family turns reuse up."""
    shipped = repo_root / "examples" / "tiny_moe"
    if not (shipped / "family" / "family.json").is_file():
        pytest.skip("examples/tiny_moe has no family in this checkout")
    found = run_demo(tokens=400, new_tokens=0, max_seconds=10.0)
    assert found["base"]["ppl"] < 200
    assert max(row["eor"] for row in found["points"]) > found["base"]["eor"]
