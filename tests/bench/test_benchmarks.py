"""`benchmarks/run.py`: one command per benchmark, and rows of one form in the result files."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest


def run(repo_root: Path, *args: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error::UserWarning", repo_root / "benchmarks" / "run.py", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_benchmark_prints_json_and_adds_a_row_with_machine_and_commit(repo_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="GGUF (extra: export)")
    done = run(repo_root, "--results", tmp_path, "patch_gguf", 0.01)
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    with (tmp_path / "patch_gguf.csv").open(newline="") as file:
        [row] = csv.DictReader(file)
    shipped = (repo_root / "benchmarks" / "results" / "patch_gguf.csv").read_text().splitlines()[0].split(",")
    assert list(row) == shipped
    assert row["machine"] and row["commit"] and int(row["bytes"]) == printed["bytes"]


def test_a_setting_that_a_benchmark_does_not_have_is_bad_usage(repo_root: Path, tmp_path: Path) -> None:
    for settings, words in ((["tokenz=3"], "tokenz"), (["tokens"], "NAME=VALUE")):
        done = run(repo_root, "--results", tmp_path, "controller", *settings)
        assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
