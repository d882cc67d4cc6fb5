"""`benchmarks/run.py pool`: its rows on tiny shapes, what it says without a GPU, and what is held to a bar."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from remoe_adapt.triton_kernels.experts_reference import experts_reference
from remoe_adapt.triton_kernels.slots import Activation

from remoe_adapt.bench.pool import CODINGS, PoolOptions, _candidates, random_experts, run_pool
from remoe_adapt.bench.pool_decode import _held
from remoe_adapt.errors import ConfigError

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
ARMS = ["eager", "grouped_mm", "dense", "pool_100", "pool_25", "pool_q4", "pool_q4_25"]


def test_a_quick_run_measures_every_arm(tmp_path: Path) -> None:
    heard: list[dict[str, object]] = []
    options = PoolOptions(quick=True, codings="int4", tokens=2, warm=1, work=tmp_path)
    found = run_pool(options, on_row=heard.append)
    assert heard == [*found["kernels"], *found["decode"]]
    assert [(row["coding"], row["T"]) for row in found["kernels"]] == [("int4", 1), ("int4", 9)]
    arms = {row["arm"]: row for row in found["decode"]}
    assert list(arms)[: len(ARMS)] == ARMS
    # Rows of one file have the same columns.
    assert len({tuple(row) for row in found["decode"]}) == 1
    assert arms["pool_100"]["miss_bytes"] < arms["pool_25"]["miss_bytes"]
    assert arms["pool_q4"]["miss_bytes"] < arms["pool_q4_25"]["miss_bytes"] < arms["pool_25"]["miss_bytes"]
    assert arms["pool_25"]["error"] < 1e-2 and 1e-6 < arms["pool_q4"]["error"] < 0.2
    assert not list(tmp_path.iterdir()), "the checkpoint and its pack stay"


@without_a_gpu
def test_without_a_gpu_it_says_so_and_measures_nothing(repo_root: Path, tmp_path: Path) -> None:
    command = [sys.executable, repo_root / "benchmarks" / "run.py", "--results", tmp_path, "pool"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert "no rows for cuda: no CUDA device is there" in done.stderr
    assert not list(tmp_path.iterdir())


@without_a_gpu
def test_kernels_are_not_interpreted_unless_triton_was_told_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    found = run_pool(PoolOptions(quick=True, decode=False, work=tmp_path))
    assert not found["kernels"] and "TRITON_INTERPRET=1" in found["skipped"]["kernels"]


@pytest.mark.slow
@without_a_gpu
def test_a_sweep_tries_both_products_and_ends_with_the_best() -> None:
    found = run_pool(PoolOptions(quick=True, codings="bf16", sweep="bf16", decode=False))
    swept = [row for row in found["kernels"] if row["what"] == "sweep"]
    assert len({row["up"] for row in swept}) > 1 and len({row["down"] for row in swept}) > 1
    assert [row["what"] for row in found["kernels"]][-1] == "best"
    assert not any(row["error"] for row in swept), swept


@pytest.mark.parametrize("name", list(CODINGS))
def test_random_experts_are_whole_and_every_tiling_fits_them(name: str) -> None:
    experts = random_experts(name, 128, 256, 9, "cpu", chosen=4)
    x_TD, slots_TC = torch.randn(1, 256), experts.sets[0]
    assert slots_TC.dtype == torch.int32 and len(slots_TC.unique()) == 4
    y_TD = experts_reference(x_TD, slots_TC, torch.ones(1, 4), experts.up, experts.down, Activation())
    assert y_TD is not None and bool(y_TD.isfinite().all()) and float(y_TD.norm()) > 0
    parts = [part for matrix in (experts.up, experts.down) for part in (matrix.codes, matrix.scales, matrix.minima)]
    assert experts.slot_bytes == sum(part[0].nbytes for part in parts if part is not None)
    for product in (0, 1):
        for tiling in _candidates(experts, product, quick=False):
            assert tiling.warps * 32 == tiling.lanes * tiling.others
            assert name == "bf16" or tiling.chunks * 8 <= experts.up.group


def test_what_is_held_to_a_bar() -> None:
    row = {"device": "NVIDIA H100"}
    assert _held("of it", row, lambda: 1.2, 1.25) == {"bar_of": "of it", "value": 1.2, "target": 1.25, "met": True}
    assert _held("of it", row, lambda: 12.0, 20.0, at_most=False)["met"] is False
    assert _held("of it", row, lambda: {}["tpot_ms"], 1.0) == {}, "another arm was skipped"
    assert _held("of it", {"device": "cpu"}, lambda: 0.5, 1.0) == {}


@pytest.mark.parametrize("options", [{"codings": "int5"}, {"sweep": "q4"}, {"layers": 0}, {"tokens": 1.5}])
def test_options_that_cannot_work(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="give"):
        PoolOptions(**options)  # type: ignore[arg-type]
