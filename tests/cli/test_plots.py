"""Plots from real figures: written whole or not at all, and clear about what they cannot draw."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from remoe_adapt.cli.plots import hit_rates, plot_frontier, plot_log, read_samples
from remoe_adapt.errors import ConfigError, DataError


def sample(time_s: float, hits: int | None, misses: int | None) -> dict[str, Any]:
    return {
        "event": "sample", "time_s": time_s, "pressure": 0.5, "strength": 0.25, "tpot_ms": None, "hits": hits,
        "misses": misses, "budget_bytes": None if hits is None else 1 << 20,
    }  # fmt: skip


def test_hit_rates_are_of_the_time_between_two_samples() -> None:
    samples = [sample(0, 0, 0), sample(1, 3, 1), sample(2, 3, 1), sample(3, 3, 5), sample(4, None, None)]
    assert hit_rates(samples) == [None, 0.75, None, 0.0, None]


def test_counters_that_began_again_are_no_rate() -> None:
    appended = [sample(0, 10, 10), sample(1, 20, 10), sample(2, 10, 30), sample(3, 50, 20), sample(4, 51, 23)]
    assert hit_rates(appended) == [None, 1.0, None, None, 0.25]


def test_a_log_becomes_a_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    log = tmp_path / "log.jsonl"
    lines = [sample(0, 0, 0), {"event": "swap", "time_s": 0.5}, sample(1, 3, 1), sample(2, None, None)]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [found["time_s"] for found in read_samples(log)] == [0, 1, 2]
    plot_log(log, tmp_path / "log.svg")
    drawn = (tmp_path / "log.svg").read_text()
    assert drawn.count("<svg") == 1 and sorted(path.name for path in tmp_path.iterdir()) == ["log.jsonl", "log.svg"]
    with pytest.raises(ConfigError, match=r"\.png, \.svg or \.pdf"):
        plot_log(log, tmp_path / "log.what")
    with pytest.raises(ConfigError, match="cannot be written"):
        plot_log(log, tmp_path / "no" / "log.svg")
    row = {"strength": 0.0, "eor": 0.2, "ppl_ratio": 1.0}
    plot_frontier({"base": row, "points": [row], "control": row}, tmp_path / "frontier.png")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_priors_are_drawn_as_a_line_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    row = {"strength": 0.0, "eor": 0.2, "ppl_ratio": 1.0}
    priors = [row | {"recency": "ema", "recency_gain": gain, "eor": gain, "ppl_ratio": 1 + gain} for gain in (0.3, 0.1)]
    for points, words in (([], ("gain",)), ([row | {"strength": 1.0}], ("gain", "family"))):
        plot_frontier({"base": row, "points": points, "control": None, "priors": priors}, tmp_path / "f.svg")
        drawn = (tmp_path / "f.svg").read_text()
        assert [word for word in ("gain", "family") if word in drawn] == list(words)
        assert "<!-- 0.1 -->" in drawn and "<!-- 0.3 -->" in drawn


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1]\n", '{"event": "swap"}\n', "[" * 100_000, '{"event": {}}', "\xff", "x" * (3 << 20)),
        json.dumps(sample(0, 1, 1) | {"strength": "1"}),
        json.dumps(sample(0, 1, 1) | {"pressure": [1]}),
        json.dumps(sample(0, 1, 1) | {"time_s": None}),
        json.dumps({"event": "sample", "time_s": 0, "strength": 0.0}),
        json.dumps(sample(0, 1, 1)).replace("0.5", "NaN"),
        json.dumps(sample(0, 1, 1)).replace("0.5", "9" * 400),
    ],
)
def test_what_is_no_log_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match=r"log\.jsonl"):
        read_samples(tmp_path / "log.jsonl")
