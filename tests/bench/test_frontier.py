"""`benchmarks/frontier.py`: its simulated caches are the defined ones, its rivals are their papers', its budgets read a
curve as they say."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import TOP_K, VOCAB, tiny_model

from remoe_adapt.eviction.replay import count_misses

SHARE, CAPACITY = 0.5, 4


@pytest.fixture
def frontier(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(repo_root / "benchmarks")
    names = ("frontier", "frontier_arms", "frontier_curves", "frontier_decode", "frontier_reuse")
    found: dict[str, Any] = {}
    for name in names:
        found |= vars(importlib.import_module(name))
    return SimpleNamespace(**found)


def text(frontier: Any) -> Any:
    return frontier.Text(torch.randint(0, VOCAB, (3, 33), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("architecture", ["qwen2_moe", "deepseek_v2", "olmoe"])
def test_misses_are_those_of_replays_of_what_was_chosen(frontier: Any, architecture: str) -> None:
    model = tiny_model(architecture)
    rows = text(frontier)
    settings = [{"J": 1, "gain": 0.2}, {"J": 0, "gain": 0.6}]
    for eviction, policy in ((frontier.Lru(), "lru"), (frontier.Lrfu(0.8), "lrfu")):
        base = frontier.decode(model, rows, eviction, SHARE)[0]
        strong = frontier.decode(model, rows, eviction, SHARE, frontier.CachePrior(settings))
        for found in (base, *strong):
            assert int(found.misses_R.sum()) == int(count_misses(found.trace, policy, [CAPACITY], 0.8).sum())
        misses = [int(found.misses_R.sum()) for found in (base, *strong)]
        assert misses[0] > misses[1] > misses[2] > 0
        assert strong[1].kl_R.min() > 0


def test_quality_is_that_of_the_whole_text_at_once(frontier: Any) -> None:
    model, rows = tiny_model("olmoe"), text(frontier)
    [found] = frontier.decode(model, rows, frontier.Lru(), SHARE)
    with torch.inference_mode():
        log_p_RSV = model(input_ids=rows.ids_RS[:, :-1]).logits.float().log_softmax(dim=-1)
    ce_R = -log_p_RSV.gather(-1, rows.ids_RS[:, 1:, None])[..., 0].mean(dim=-1)
    torch.testing.assert_close(found.ce_R, ce_R, atol=1e-4, rtol=0)


def rules_that_do_nothing(frontier: Any) -> list[Any]:
    return [
        frontier.CachePrior([{"J": 1, "gain": 0.0}]),
        frontier.MaxRank([{"J": 1, "M": TOP_K}]),
        frontier.CumulativeThreshold([{"J": 1, "p": 0.0}]),
        frontier.CoAware([{"J": TOP_K, "margin": 0, "power": 1, "gain": 0.0}]),
    ]


def test_rules_of_no_strength_choose_as_the_base(frontier: Any) -> None:
    model = tiny_model("qwen2_moe")
    rows = text(frontier)
    observed = frontier.Observed()
    [base] = frontier.decode(model, rows, observed, SHARE)
    assert base.kl_R.abs().max() == 0 and base.agree_R.min() == 1
    weights = torch.zeros(len(observed.seen), observed.seen[0][0].shape[-1])
    for rule in rules_that_do_nothing(frontier):
        [found] = frontier.decode(model, rows, frontier.ReuseDistance(weights), SHARE, rule)
        assert (found.trace.experts == base.trace.experts).all(), rule.name
        torch.testing.assert_close(found.ce_R, base.ce_R, atol=1e-5, rtol=0)


def ranked(rule: Any, z: list[float], resident: list[int], specs: Any, caches: Any = None) -> list[int]:
    rule.begin(specs, 1, caches)
    choice_NE = torch.tensor([z])
    mask_NE = torch.zeros(1, len(z), dtype=torch.bool)
    mask_NE[0, resident] = True
    values_NE = rule.ranked_NE(0, choice_NE, choice_NE.softmax(dim=-1), mask_NE)
    order: list[int] = values_NE.argsort(descending=True, stable=True)[0].tolist()
    return order


def test_rules_rank_as_their_papers_say(frontier: Any) -> None:
    specs = [SimpleNamespace(num_experts=6)]
    z = [5.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    max_rank = frontier.MaxRank([{"J": 1, "M": 4}])
    assert ranked(max_rank, z, [3, 4], specs) == [0, 3, 1, 2, 4, 5]
    # 0.636 + 0.234 + 0.086 = 0.956 is the first sum beyond 0.9: the set is of three.
    mass = frontier.CumulativeThreshold([{"J": 1, "p": 0.9}])
    assert ranked(mass, z, [2, 3], specs) == [0, 2, 1, 3, 4, 5]
    prior = frontier.CachePrior([{"J": 2, "gain": 0.5}])
    # The span is 5: resident ones and the two best get 2.5.
    assert ranked(prior, z, [3], specs) == [0, 1, 3, 2, 4, 5]
    assert ranked(prior, z, [5], specs) == [0, 1, 2, 5, 3, 4]


def test_the_largest_predicted_distance_leaves_and_near_ones_are_preferred(frontier: Any) -> None:
    specs = [SimpleNamespace(num_experts=6, top_k=2)]
    weights_LF = torch.zeros(1, 14)
    weights_LF[0, 1] = 1.0  # the age alone
    reuse = frontier.ReuseDistance(weights_LF)
    caches = frontier.Caches(specs, 1, 0.5, reuse)
    probabilities_NE = torch.full((1, 6), 1 / 6)
    for ids in ([0, 1], [2, 3], [2, 4]):
        caches.use(0, torch.tensor([ids]), probabilities_NE)
    # Of the first token both have left, of the second the one that was not used again stays: three places.
    assert caches.resident[0][0].nonzero().flatten().tolist() == [2, 3, 4]
    assert int(caches.misses_N) == 5
    rule = frontier.CoAware([{"J": 1, "margin": 2, "power": 1, "gain": 1.0}])
    # 4 gets the whole gap of 2 between the best and the third; 3 is the farthest and gets nothing.
    assert ranked(rule, [5.0, 4.0, 3.0, 2.0, 4.5, 0.0], [2, 3, 4], specs, caches)[:2] == [4, 2]


def test_a_reuse_distance_is_learned(frontier: Any) -> None:
    chosen_SNE = torch.zeros(5, 1, 2, dtype=torch.bool)
    chosen_SNE[[0, 3], 0, 0] = True
    found = frontier._distances(chosen_SNE)[:, 0, 0].tolist()
    assert found == [2.0, 1.0, 0.0, frontier.HORIZON, frontier.HORIZON]
    # Expert 0 comes every other token, the others by turns: it is known to be near.
    observed = frontier.Observed()
    specs = [SimpleNamespace(num_experts=9)]
    observed.begin(specs, 1)
    for step in range(300):
        observed.use(0, torch.tensor([[0 if step % 2 else 1 + step % 8]]), torch.full((1, 9), 1 / 9))
    learned = observed.fitted()
    learned.begin(specs, 1)
    for step in range(100):
        learned.use(0, torch.tensor([[0 if step % 2 else 1 + step % 8]]), torch.full((1, 9), 1 / 9))
    distances = learned.distance_NE(0)[0]
    # Step 100 uses expert 5, step 101 expert 0; expert 1 + 98 % 8 = 3 was used last of the others.
    assert distances.argmin() in (0, 5) and distances[0] < distances[3]


def points(*at: tuple[float, float], curve: str = "ours", seed: int = 0) -> list[dict[str, Any]]:
    return [{"curve": curve, "ppl_ratio": ratio, "misses": misses, "seed": seed, "eor": 1.0} for ratio, misses in at]


def test_a_curve_is_read_between_its_points_and_never_beyond(frontier: Any) -> None:
    line = points((1.0, 1.0), (1.01, 0.5), (1.02, 0.6), (1.03, 0.125))
    assert frontier.misses_at(line, 1.0) == 1.0
    assert frontier.misses_at(line, 1.005) == pytest.approx(0.5**0.5)
    assert frontier.misses_at(line, 1.02) == pytest.approx(0.25)  # the point that another beats does not count
    assert frontier.misses_at(line, 1.05) == 0.125
    assert frontier.misses_at(line[1:], 1.005) is None


def test_budgets_are_means_over_seeds_and_bars_compare_with_the_best_rival(frontier: Any) -> None:
    found = [
        *points((1.0, 0.2), seed=0), *points((1.0, 0.4), seed=1),
        *points((1.0, 0.5), curve="cecar"), *points((1.0, 0.6), curve="max_rank"),
        *points((1.0, 0.9), curve="published"),
    ]  # fmt: skip
    row = frontier.budgets(found)[0]
    assert row["ours"] == pytest.approx(0.3) and row["spread"]["ours"] == pytest.approx(0.02**0.5)
    assert (row["prior"], row["cecar"], row["published"], row["tuned"]) == (0.6, 0.5, 0.9, None)
    bar = frontier.bars([row], found)[0]
    assert bar["value"] == pytest.approx(0.6) and bar["met"] is True


def test_the_shipped_model_is_measured_from_end_to_end(frontier: Any, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "heldout").mkdir(parents=True)
    (folder / "train").mkdir()
    words = "The river rises in the northern hills and flows south through three counties before it meets the sea. "
    for name in frontier.HELD_OUT:
        with gzip.open(folder / "heldout" / name, "wt") as file:
            file.write(json.dumps({"text": words * 8}) + "\n" if ".jsonl" in name else words * 8)
    (folder / "train" / "a.txt").write_text(words * 30)
    told: list[dict[str, Any]] = []
    options = frontier.Options(
        arms=("prior", "published", "tuned"), data=str(folder), rows=4, steps=8, gains=(0.2,), weights=(1.0,),
        training_steps=1, training_batch=1, work=str(tmp_path / "work"),
    )  # fmt: skip
    result = frontier.run(options, told.append)
    assert [set(row) for row in result["budgets"]] == [
        {"ppl_ratio", "ours", "published", "prior", "cecar", "tuned", "uniform", "spread"}
    ] * 3
    assert sum(map(len, result["curves"].values())) == len(told)
    base = result["curves"]["cache_prior"][0]
    assert base["ppl_ratio"] == 1.0 and base["misses"] == 1.0 and base["kl"] == 0.0
    strong = result["curves"]["cost_uniform"][-1]
    assert strong["misses"] < result["curves"]["cost_uniform"][0]["misses"] and strong["kl"] > 0
    assert result["curves"]["published"][-1]["label"] == "reuse weight 4"
    (tmp_path / "all.json").write_text(json.dumps(result))
    again = frontier.run(frontier.Options(of=[str(tmp_path / "all.json")] * 2))
    assert again == result, "joined with itself it is the same"
    files = frontier.csv_rows(result)
    assert {row["curve"] for row in files["frontier_cpu.csv"]} == set(result["curves"])
    assert all(len({tuple(row) for row in rows}) == 1 for rows in files.values())
