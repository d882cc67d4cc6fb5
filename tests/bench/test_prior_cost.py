"""The benchmark of the prior's cost in llama.cpp: that it times the prior, and writes the columns of its result file."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest

from remoe_adapt.engines.llamacpp.prior.build import compiler

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from llama_engine import skip_without_engine


@pytest.mark.skipif(compiler() is None, reason="no C compiler")
def test_the_callback_is_timed_in_every_mode(repo_root: Path, tmp_path: Path) -> None:
    skip_without_engine()
    program = repo_root / "benchmarks" / "run.py"
    command = [sys.executable, program, "--results", tmp_path, "prior_cost", "passes=3", "tokens=0"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [(row["mode"], row["gain"]) for row in rows] == [
        ("ema", 0.0), ("ema", 0.2), ("last", 0.2), ("resident", 0.2),
    ]  # fmt: skip
    assert all(0 < row["us_best"] <= row["us"] for row in rows)
    with (tmp_path / "prior_cost_cpu.csv").open(newline="") as file:
        (*_, written) = csv.DictReader(file)
    shipped = (repo_root / "benchmarks" / "results" / "prior_cost_cpu.csv").read_text().splitlines()[0].split(",")
    assert list(written) == shipped and written["engine_threads"] == "1"
