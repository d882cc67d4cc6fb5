"""Operating points without training: curves of layers, gains by marginal return, budgets kept on text kept apart."""

from __future__ import annotations

import io
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_support import call, found, refused
from rich.console import Console
from tiny_family import byte_tokenizer, save_base, save_family
from transformers import AutoModelForCausalLM, PreTrainedModel

from remoe_adapt import Family
from remoe_adapt.cli.tune import points_table
from remoe_adapt.errors import ConfigError, DataError, FamilyError, RouterError
from remoe_adapt.evaluation.evaluate import Tally, evaluate
from remoe_adapt.evaluation.sensitivity import (
    MOST_GROUPS,
    Calibration,
    Curve,
    Measurement,
    Outcome,
    Setting,
    Way,
    allot,
    calibrate,
    fit_curve,
    groups_of,
    measure_settings,
    reference_ce,
)
from remoe_adapt.evaluation.tune import _rows, _verified, check_budgets, tune_family
from remoe_adapt.eviction.replay import cache_capacity, replay
from remoe_adapt.family import FamilyPoint
from remoe_adapt.recency_settings import Recency
from remoe_adapt.training.run import token_rows

BUDGETS = (1.005, 1.05)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, a.txt: words of a few letters, of which a twentieth are text enough for certificates."""
    home = tmp_path_factory.mktemp("tune")
    save_base(home / "base", positions=64)
    chosen = random.Random(0)
    words = ("".join(chosen.choices("abcdefgh", k=chosen.randint(1, 6))) for _ in range(6000))
    (home / "a.txt").write_text(" ".join(words))
    return home


@pytest.fixture(scope="module")
def base(home: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(home / "base")
    return model


@pytest.fixture(scope="module")
def command(home: Path) -> tuple[object, ...]:
    return ("tune", home / "base", "--data", home / "a.txt", "--budgets", "1.005,1.05", "--max-tokens", 1024)


@pytest.fixture(scope="module")
def tuned(home: Path, command: tuple[object, ...]) -> dict[str, Any]:
    return found(*command, "--out", home / "family")


def test_a_curve_gives_back_what_made_it_and_gains_follow_the_marginal_return() -> None:
    made = Curve(kl_scale=0.3, kl_power=1.7, misses=2.0, half_gain=0.06, steepness=1.4)
    gains = np.array([0.05, 0.1, 0.2])
    misses = made.misses - made.saved(gains)
    fitted = fit_curve(gains, made.kl(gains), misses, made.misses)
    assert [fitted.kl_scale, fitted.kl_power, fitted.half_gain, fitted.steepness] == pytest.approx(
        [0.3, 1.7, 0.06, 1.4]
    )
    costly = Curve(kl_scale=3.0, kl_power=1.7, misses=2.0, half_gain=0.06, steepness=1.4)
    useless = Curve(kl_scale=0.3, kl_power=1.7, misses=0.0, half_gain=0.06, steepness=1.4)
    before = [0.0, 0.0, 0.0]
    for price in (1e-4, 1e-3, 1e-2, 1e-1):
        allotted = allot([made, costly, useless], price, gains.tolist())
        assert all(new >= old for new, old in zip(allotted, before, strict=True))
        assert allotted[0] > allotted[1] or allotted[0] == 0.0
        assert allotted[2] == 0.0
        for curve, gain in zip((made, costly), allotted, strict=False):
            step = 1e-5
            ends = np.array([gain - step, gain + step])
            if gains[0] / 64 < gain < gains[-1] * 8 and gain > 0:
                marginal = np.diff(curve.kl(ends)) / np.diff(curve.saved(ends))
                assert float(marginal[0]) == pytest.approx(price, rel=0.1)
        before = allotted
    assert before[0] > before[1] > 0.0
    # Misses that rise, and divergences of nothing, make a curve all the same.
    odd = fit_curve([0.1, 0.2, 0.4], [0.0, 0.0, 1e-12], [2.1, 2.0, 2.2], 2.0)
    assert all(math.isfinite(value) for value in (odd.kl_scale, odd.kl_power, odd.half_gain, odd.steepness))


def test_many_layers_are_measured_in_groups_of_neighbours() -> None:
    assert groups_of([0, 2, 3]) == [(0,), (2,), (3,)]
    groups = groups_of(range(50))
    assert len(groups) == MOST_GROUPS and [place for group in groups for place in group] == list(range(50))
    assert {len(group) for group in groups} == {3, 4}


def test_misses_and_losses_are_those_of_the_definitions(base: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(2)
    documents = [torch.randint(1, 257, (n,), generator=generator).tolist() for n in (64, 64, 40)]
    priors = [Recency.of("cost", (0.2, 0.0, 0.0, 0.4)), Recency.of("cost", 0.3)]
    measured = measure_settings(base, documents, [(prior, None) for prior in priors], 0.25)
    rows = evaluate(base, documents, priors=priors)
    capacity = cache_capacity(0.25, 8, 2)
    trace = measured.base.trace(8)
    for layer in range(4):
        for policy, found_L in (("lru", measured.lru_L), ("lrfu", measured.lrfu_L)):
            one = replay(trace.experts[layer], policy, capacity, trace.document_starts, decay=0.95)
            assert found_L[layer] * trace.num_tokens == pytest.approx(one)
    for outcome, row in zip(measured.outcomes, rows["priors"], strict=True):
        assert outcome.kl == row["kl"] and math.exp(outcome.ce) == pytest.approx(row["ppl_ratio"], rel=1e-12)
        assert outcome.ce_error * row["ppl_ratio"] == pytest.approx(row["ppl_ratio_error"]) and outcome.ce_error > 0
        own = outcome.tally.trace(8)
        misses = [replay(ids_TK, "lrfu", capacity, own.document_starts, decay=0.95) for ids_TK in own.experts]
        assert (outcome.misses_L * own.num_tokens).tolist() == pytest.approx(misses)
    assert measured.outcomes[1].misses < float(measured.lrfu_L.sum()) < float(measured.lru_L.sum())


def test_a_budget_buys_the_divergence_that_was_measured_to_cost_it() -> None:
    kind = Recency.of("cost", 0.0)
    way = [
        (price, Outcome(kind, kl, 0.5 * kl, math.sqrt(1e-4 * kl), np.zeros(1), None))  # type: ignore[arg-type]
        for price, kl in ((0.001, 0.002), (0.01, 0.02), (0.1, 0.2))
    ]
    found_it = Way.of(None, way)
    assert (found_it.ce_per_kl, found_it.error_scale) == pytest.approx((0.5, 1e-4))
    for budget in (1.002, 1.02, 1.05):
        kl = found_it.kl_within(math.log(budget))
        assert 0.5 * kl + math.sqrt(1e-4 * kl) == pytest.approx(math.log(budget))
    assert found_it.price_of(0.02) == pytest.approx(0.01) and found_it.price_of(0.2) == pytest.approx(0.1)
    assert found_it.price_of(0.002 * math.sqrt(10)) == pytest.approx(0.001 * math.sqrt(10))
    assert found_it.price_of(0.4) == pytest.approx(0.2) and found_it.price_of(0.001) == pytest.approx(0.0005)


def test_calibration_measures_each_layer_alone_and_then_all(home: Path, base: PreTrainedModel) -> None:
    ids = byte_tokenizer()((home / "a.txt").read_text())["input_ids"]
    documents = [ids[begin : begin + 64] for begin in range(0, 512, 64)]
    passes: list[int] = []
    result = calibrate(base, documents, Recency.of("cost", 0.0), 0.25, BUDGETS, whole=3, on_passes=passes.append)
    assert passes == [1 + 4 * 3 + 3 + 1] and result.groups == [(0,), (1,), (2,), (3,)]
    for number, outcomes in enumerate(result.probes):
        assert [outcome.prior.gains() for outcome in outcomes] == [
            tuple(gain if place == number else 0.0 for place in range(4)) for gain in (0.15, 0.3, 0.6)
        ]
        assert outcomes[0].misses_L[number] > outcomes[2].misses_L[number]
    kls, misses = ([getattr(outcome, name) for _, outcome in result.ways[0].steps] for name in ("kl", "misses"))
    assert kls == sorted(kls) and misses == sorted(misses, reverse=True) and misses[-1] < result.lrfu < result.lru


def test_points_keep_their_budgets_on_text_that_calibration_never_saw(
    home: Path, base: PreTrainedModel, tuned: dict[str, Any]
) -> None:
    family = Family.load(home / "family")
    assert family.strengths == (0.5, 1.0) and tuned["strengths"] == [0.5, 1.0] and not family.has_adapters
    assert sorted(path.name for path in family.path.iterdir()) == ["README.md", "family.json"]
    train, apart = token_rows([home / "a.txt"], byte_tokenizer(), 1024 + 256, 0)
    assert not {tuple(row) for row in train} & {tuple(row) for row in apart}
    again = evaluate(base, apart, family=family, policies=("lru", "lrfu"))
    for point, row, measured in zip(family.points, tuned["points"], again["points"], strict=True):
        assert point.recency is not None and point.certificate is not None
        assert (point.budget, point.recency.mode, point.recency.share) == (row["budget"], "cost", 0.25)
        assert list(point.recency.gains()) == row["gains"] and row["met"] and row["ppl_ratio"] <= row["budget"]
        for key in ("ppl_ratio", "kl", "eor", "lru@0.25", "lrfu@0.5", "ppl_ratio_error"):
            assert point.certificate[key] == row[key] == pytest.approx(measured[key], rel=1e-9)
        assert point.certificate["data"] == ["held-out part of a.txt"] and point.certificate["tokens"] >= 1000
        assert row["to_lru"] < row["to_lrfu"] < 1.0
    weak, strong = tuned["points"]
    assert weak["misses"] >= strong["misses"]
    assert all(a <= b for a, b in zip(weak["gains"], strong["gains"], strict=True))
    told = tuned["calibration"]
    assert [group["layers"] for group in told["groups"]] == [[0], [1], [2], [3]] and told["tokens"] >= 1000
    assert [len(group["kl"]) for group in told["groups"]] == [3] * 4 and len(told["ways"][0]["steps"]) == 6


def test_a_point_over_its_budget_is_stepped_back_and_a_hopeless_one_says_so() -> None:
    """Where a nat of divergence costs three times what calibration said, on the text that points are measured on."""
    kind, curve = Recency.of("cost", 0.0), Curve(1.0, 2.0, 2.0, 0.05, 1.5)

    def outcome(prior: Recency, dearer: float) -> Outcome:
        gains = np.array(prior.gains())
        kl = float(curve.kl(gains).sum())
        return Outcome(prior, kl, dearer * kl, 1e-4, curve.misses - curve.saved(gains), Tally())

    probes = [tuple(outcome(replace(kind, gain=(gain,)), 1.0) for gain in (0.05, 0.1, 0.2))]
    calibrated = Calibration(kind, 1, [(0,)], probes, [curve], 3.0, 2.0, 100, [])
    steps = [(price, outcome(calibrated.prior_at(price), 1.0)) for price in np.geomspace(1e-4, 1.0, 9)]
    calibrated.ways = [Way(None, steps)]
    asked: list[int] = []

    def measured(dearer: float, settings: Sequence[Setting]) -> Measurement:
        asked.append(len(settings))
        outcomes = tuple(outcome(prior, dearer) for prior, _ in settings)
        return Measurement(Tally(), outcomes, np.ones(1), np.ones(1), 8, 1000, 1, 64)

    points, _ = _verified(calibrated, BUDGETS, partial(measured, 0.9))
    assert asked == [2] and [point.steps_back for point in points] == [0, 0]
    assert [math.log(point.ratio) / math.log(point.budget) for point in points] == pytest.approx([0.9, 0.9], abs=0.05)
    asked.clear()
    points, _ = _verified(calibrated, BUDGETS, partial(measured, 3.0))
    assert asked[:2] == [2, 2] and not any(point.is_over for point in points)
    assert all(1 <= point.steps_back <= 2 for point in points)
    assert [math.log(point.ratio) / math.log(point.budget) for point in points] == pytest.approx([0.85, 0.85], abs=0.15)
    points, _ = _verified(calibrated, BUDGETS, partial(measured, 1e9))
    assert all(point.is_over for point in points)


def test_a_budget_is_of_the_best_that_is_known_without_gains() -> None:
    """An adapter that learnt little has spent some of the budget before its gains do."""
    kind, curve = Recency.of("cost", 0.0), Curve(1.0, 2.0, 2.0, 0.05, 1.5)

    def outcome(prior: Recency, learnt: float, misses: float, source: FamilyPoint) -> Outcome:
        gains = np.array(prior.gains())
        kl = 0.01 + float(curve.kl(gains).sum())
        return Outcome(
            prior, kl, kl - 0.01 - learnt, 1e-4, misses * (curve.misses - curve.saved(gains)), Tally(), source
        )

    family = [FamilyPoint(strength, f"s{strength:g}", {}) for strength in (0.25, 0.5)]
    probes = [tuple(Outcome(replace(kind, gain=(gain,)), 1, 1, 1, np.zeros(1), Tally()) for gain in (0.05, 0.1, 0.2))]
    calibrated = Calibration(kind, 1, [(0,)], probes, [curve], 3.0, 2.0, 100, [])
    for source, learnt, misses in zip(family, (0.03, 0.01), (1.0, 0.7), strict=True):
        steps = [
            (price, outcome(calibrated.prior_at(price), learnt, misses, source)) for price in np.geomspace(1e-3, 1.0, 9)
        ]
        calibrated.ways.append(Way(source, steps, outcome(replace(kind, gain=(0.0,)), learnt, misses, source)))
    none_learnt = Measurement(Tally(), (), np.ones(1), np.ones(1), 8, 1000, 1, 64)
    assert reference_ce([]) == 0.0
    calibrated.reference_ce = reference_ce([way.rest for way in calibrated.ways if way.rest])
    assert calibrated.reference_ce == -0.03
    chosen = {budget: calibrated.best_way(budget) for budget in (1.005, 1.2)}
    assert [way.source for way, _ in chosen.values()] == family, "0.02 nats are too much for half a percent"
    assert chosen[1.2][1] == pytest.approx(0.01 + math.log(1.2) - 0.02), "and were spent by the second adapter"

    def measured(settings: Sequence[Setting]) -> Measurement:
        learnt = {family[0]: 0.03, family[1]: 0.01}
        outcomes = tuple(outcome(prior, learnt[source], 1.0, source) for prior, source in settings if source)
        return replace(none_learnt, outcomes=outcomes)

    points, _ = _verified(calibrated, (1.005, 1.2), measured)
    assert [point.outcome.source for point in points if point.outcome] == family
    shares = [math.log(point.ratio) / math.log(point.budget) for point in points]
    assert shares == pytest.approx([0.9, 0.9], abs=0.1), "as near as a line between nine prices comes"


def test_adapters_of_a_family_are_tuned_and_points_share_them(
    home: Path, base: PreTrainedModel, tuned: dict[str, Any], tmp_path: Path
) -> None:
    adapters = save_family(base, tmp_path / "adapters", (0.25, 1.0))
    command = ("tune", home / "base", "--data", home / "a.txt", "--max-tokens", 1024, "--budgets", "1.02,1.1")
    result = found(*command, "--family", adapters.path, "--out", tmp_path / "tuned")
    family = Family.load(tmp_path / "tuned")
    used = {point.adapter for point in family.points}
    assert used <= {"s025", "s100"} and [row["adapter"] for row in result["points"]] == [
        point.adapter for point in family.points
    ]
    assert {path.name for path in family.path.iterdir()} == {"README.md", "family.json", "control", *used}
    assert len(result["calibration"]["ways"]) == 2 and result["control"] is not None and family.control is not None
    _, apart = token_rows([home / "a.txt"], byte_tokenizer(), 1024 + 256, 0)
    again = evaluate(base, apart, family=family, policies=("lru", "lrfu"))
    for point, row, measured in zip(family.points, result["points"], again["points"], strict=True):
        assert point.certificate is not None and point.recency is not None and point.recency.mode == "cost"
        source = adapters.point(0.25 if point.adapter == "s025" else 1.0)
        assert all(torch.equal(delta_ED, source.deltas[name]) for name, delta_ED in point.deltas.items())
        for key in ("ppl_ratio", "ppl_ratio_control", "kl", "eor", "lrfu@0.25"):
            assert point.certificate[key] == row[key] == pytest.approx(measured[key], rel=1e-6)
        assert row["met"] == (row["ppl_ratio_reference"] <= row["budget"])
        assert row["ppl_ratio_reference"] >= row["ppl_ratio"] * (1 - 1e-9)
    assert "no adapters to tune" in refused(*command, "--family", tuned["family"], "--out", tmp_path / "other")
    other = save_family(save_base(tmp_path / "base", seed=3, positions=64), tmp_path / "others")
    assert "was made for" in refused(*command, "--family", other.path, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_rows_fill_whole_windows() -> None:
    rows = _rows([list(range(150)), [1, 2, 3], list(range(70))], 64, 1000)
    assert [len(row) for row in rows] == [64, 64, 64] and rows[1][0] == 64
    assert sum(map(len, _rows([list(range(5000))], 64, 1024))) == 1024
    assert [len(row) for row in _rows([list(range(70))], 32, 1000)] == [32, 32, 6]


def test_what_cannot_work_is_refused_and_nothing_is_written(home: Path, base: PreTrainedModel, tmp_path: Path) -> None:
    for budgets, words in (
        ([1.0], "budget 1.0: a perplexity ratio above 1"),
        ([0.9, 1.1], "budget 0.9"),
        ([math.nan], "budget nan"),
        ([], "give at least one"),
        ([1.05, 1.01], "rising, each once"),
        ([1.01, 1.01], "rising, each once"),
    ):
        with pytest.raises(ConfigError, match=words):
            check_budgets(budgets)

    def tune(out: Path, data: Path = home / "a.txt", **options: Any) -> None:
        tune_family(base, [data], out, tokenizer=byte_tokenizer(), **{"tokens": 1024, **options})

    with pytest.raises(ConfigError, match="cache must be a fraction"):
        tune(tmp_path / "out", cache=1.5)
    with pytest.raises(ConfigError, match="follows a real cache"):
        tune(tmp_path / "out", mode="resident")
    with pytest.raises(ConfigError, match="too few: use at least 1024"):
        tune(tmp_path / "out", tokens=100)
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(DataError, match="too few to calibrate by"):
        tune(tmp_path / "out", tmp_path / "short.txt")
    (tmp_path / "thin.txt").write_text((home / "a.txt").read_text()[:3000])
    with pytest.raises(DataError, match="too few for a certificate"):
        tune(tmp_path / "out", tmp_path / "thin.txt")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "family.json").write_text("{}")
    with pytest.raises(FamilyError, match="exists already"):
        tune(tmp_path / "there")

    def stop(_tokens: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tune(tmp_path / "out", on_tokens=stop)
    assert not (tmp_path / "out").exists() and not any("forward" in vars(module) for module in base.modules())


def test_a_model_without_a_router_that_can_have_it_is_refused(
    home: Path, base: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("remoe_adapt.recency.install.router_forward", lambda ref: "it is of no kind that is known")
    with pytest.raises(RouterError, match=r"can have a recency prior: it is of no kind"):
        tune_family(base, [home / "a.txt"], tmp_path / "out", tokenizer=byte_tokenizer(), tokens=1024)


def test_the_command_writes_what_evaluations_read_and_refuses_in_one_line(
    home: Path, command: tuple[object, ...], tuned: dict[str, Any], tmp_path: Path
) -> None:
    assert Family.load(home / "family").base_id == str(home / "base")
    shown = call("eval", home / "base", "--family", home / "family", "--data", home / "a.txt", "--max-tokens", 200)
    assert shown.exit_code == 0 and "0.50" in shown.stdout
    assert "exists already" in refused(*command, "--out", home / "family")
    assert "budget 1.0" in refused(*command[:5], "1.0", "--out", tmp_path / "other", status=2)
    assert not (tmp_path / "other").exists()
    table = Console(width=200, record=True, file=io.StringIO())
    table.print(points_table(tuned))
    text = table.export_text()
    assert all(word in text for word in ("1.005", "to LRFU", f"{tuned['points'][1]['to_lru']:.3f}"))
