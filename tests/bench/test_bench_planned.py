"""What `remoe plan` is held against, and what its hit rates are from: small runs of both benchmarks."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from remoe_adapt.bench import harness
from remoe_adapt.bench.decode.planned import PlannedOptions, run_planned
from remoe_adapt.bench.reuse import ReuseOptions, run_reuse


def header(repo_root: Path, name: str) -> list[str]:
    with (repo_root / "benchmarks" / "results" / name).open(newline="") as file:
        return next(csv.reader(file))


def test_the_prior_saves_misses_and_its_rows_are_those_of_the_result_file(repo_root: Path) -> None:
    base, prior = run_reuse(ReuseOptions(shares=(0.25,), gains=(0.0, 0.2), tokens=60, document_tokens=48))
    assert (base["miss_ratio"], base["ppl_ratio"]) == (1.0, 1.0) and 0 < base["hit_rate"] < prior["hit_rate"] < 1
    assert prior["miss_ratio"] == pytest.approx((1 - prior["hit_rate"]) / (1 - base["hit_rate"]))
    assert 0.8 < prior["ppl_ratio"] < 1.5 and prior["tokens"] == base["tokens"] > 30
    assert header(repo_root, "reuse_cpu.csv")[-len(base) :] == list(base)


def test_without_a_disk_of_its_own_a_benchmark_says_why(tmp_path: Path) -> None:
    with harness.slow_disk(tmp_path, 1 << 20, 300.0, "no limits in this run") as (disk, cap, facts):
        assert (disk, cap) == (None, None) and facts["why"] == "no limits in this run"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("read_mib_per_s", [300.0, 0.0])
def test_set_ups_are_decoded_and_planned(read_mib_per_s: float, repo_root: Path, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    rows = run_planned(
        PlannedOptions(
            work=tmp_path, tokens=60, trace_tokens=60, expert_bytes=(1 << 18,), bits=(4,),
            read_mib_per_s=read_mib_per_s, set_ups=("all in RAM", "cache", "cache, resident 0.2", "4 bits, cache"),
        ),
        on_row=seen.append,
    )  # fmt: skip
    whole, cache, prior, codes = rows
    assert seen == rows
    assert (whole["hit_rate"], whole["bytes_per_token"], whole["planned_bytes_per_token"]) == (1.0, 0.0, 0.0)
    assert 0 < cache["hit_rate"] < prior["hit_rate"] and cache["planned_hit_rate"] < prior["planned_hit_rate"]
    assert codes["bytes_per_token"] < cache["bytes_per_token"] / 4
    for row in rows:
        assert row["tpot_ms"] > 0 and row["planned_tpot_ms"] > 0
        assert row["tpot_off"] == pytest.approx(row["planned_tpot_ms"] / row["tpot_ms"] - 1)
        # A process beside a model this small counts for more than a tenth.
        assert abs(row["memory_bytes"] - row["planned_memory_bytes"]) < 64 << 20
    assert whole.keys() <= set(header(repo_root, "plan_cpu.csv"))
    assert harness.why_no_loop() or whole["storage"] == "loop device"
    assert not list(tmp_path.iterdir()), "what was made is gone"
