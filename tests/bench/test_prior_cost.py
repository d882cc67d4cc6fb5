"""The benchmark of the prior's cost in llama.cpp: it times the prior, and writes the columns of its result file."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest

from remoe_adapt.engines.llamacpp.prior.build import compiler

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from llama_engine import skip_without_engine


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
def test_the_callback_is_timed_in_every_mode(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without_engine()
    monkeypatch.syspath_prepend(repo_root / "benchmarks")
    bench = importlib.import_module("prior_cost")
    rows = bench.run(bench.Options(passes=3, tokens=0))["rows"]
    assert [(row["mode"], row["gain"]) for row in rows] == [
        ("ema", 0.0), ("ema", 0.2), ("last", 0.2), ("resident", 0.2), ("cost", 0.1),
    ]  # fmt: skip
    assert all(0 < row["us_best"] <= row["us"] for row in rows)
    with (repo_root / "benchmarks" / "results" / "prior_cost_cpu.csv").open(newline="") as file:
        shipped = list(csv.DictReader(file))
    assert {row["what"] for row in shipped} == {"callback", "token"}
    assert all(set(rows[0]) < set(row) for row in shipped)
