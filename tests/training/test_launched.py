"""Two processes train what one does with the same rows: replicated (DDP) and sharded (FSDP2), on CPUs over gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_family import save_base, save_words

from remoe_adapt.errors import ConfigError
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.processes import join_processes
from remoe_adapt.training.run import train_family
from remoe_adapt.training.sharding import check_sharded

CHILD = Path(__file__).parents[1] / "support" / "launched_child.py"
ACCELERATE = [
    sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
    "--mixed_precision", "no", "--dynamo_backend", "no",
]  # fmt: skip
DDP = [*ACCELERATE, "--multi_gpu"]
FSDP2 = [
    *ACCELERATE, "--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP",
    "--fsdp_reshard_after_forward", "true",
]  # fmt: skip
# Without another process that starts them.
BARE: list[str] = []
RULE: dict[str, Any] = {"recency": "cost", "recency_gain": 0.3, "length": 40, "lr": 0.3, "reference": "base"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launched")
    save_base(folder / "base")
    save_words(folder / "words.jsonl", 249, least=3, lengths=20)
    return folder


def launched(folder: Path, out: Path, launcher: list[str], options: dict[str, Any], **more: Any) -> dict[str, Any]:
    """Trains two points in two processes, each with half of the rows of a step; what the first of them saw."""
    request = out.with_suffix(".request")
    asked = {"base": str(folder / "base"), "data": str(folder / "words.jsonl"), "out": str(out)}
    halved = {**options, "batch": options["batch"] // 2}
    request.write_text(json.dumps({**asked, "strengths": [0.5, 1.0], "options": halved, **more}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "FSDP_"))},
        "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(CHILD.parents[2]), *sys.path]),
    }  # fmt: skip
    command = [*launcher, *(["--main_process_port", port] if launcher else [sys.executable]), str(CHILD), str(request)]
    ranks: list[dict[str, str]] = [{}] if launcher else [
        {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in "01"
    ]  # fmt: skip
    logs = [out.with_suffix(f".log{number}") for number in range(len(ranks))]
    processes = []
    for rank, log in zip(ranks, logs, strict=True):
        with log.open("w") as file:
            processes.append(subprocess.Popen(command, env=environment | rank, stdout=file, stderr=file))
    try:
        codes = [process.wait(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * len(codes), "\n".join(log.read_text()[-3000:] for log in logs)
    seen: dict[str, Any] = json.loads(Path(f"{request}.0").read_text())
    assert seen == json.loads(Path(f"{request}.1").read_text()) and seen["processes"] == 2
    return seen


def alone(folder: Path, out: Path, options: dict[str, Any], **more: Any) -> None:
    train_family(
        folder / "base", [folder / "words.jsonl"], [0.5, 1.0], out, options=TrainOptions(**options), progress=False,
        **more,
    )  # fmt: skip


def check_same(left: Path, right: Path, adapters: int) -> None:
    """The same adapters, which have learned something."""
    files = sorted(file.relative_to(left) for file in left.glob("*/*.safetensors"))
    assert len(files) == adapters and files == sorted(file.relative_to(right) for file in right.glob("*/*.safetensors"))
    for file in files:
        mine, others = load_file(left / file), load_file(right / file)
        assert mine.keys() == others.keys() and max(float(v.abs().max()) for v in mine.values()) > 1e-3
        for name in mine:
            torch.testing.assert_close(mine[name], others[name], rtol=0, atol=1e-5, msg=lambda m, f=file: f"{f}: {m}")


@pytest.mark.slow
def test_two_processes_train_what_one_does(folder: Path, tmp_path: Path) -> None:
    options = {**RULE, "steps": 2, "batch": 4, "recovery_rank": 2}
    alone(folder, tmp_path / "one", options)
    seen = launched(folder, tmp_path / "two", BARE, options)
    assert seen["sharded"] == 0
    check_same(tmp_path / "one", tmp_path / "two", adapters=5)


CASES: dict[str, dict[str, Any]] = {
    "recovery": {"recovery_rank": 2},
    "local": {"mode": "local", "rank": 2},
    "checkpointing": {"checkpointing": True, "accumulate": 2},
    "held-out": {"evaluate_every": 2, "patience": 1, "validation_tokens": 200, "lag_weight": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("launcher", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_accelerate_launch_trains_what_one_process_does(
    folder: Path, tmp_path: Path, launcher: list[str], case: str
) -> None:
    options = {**RULE, "steps": 4, "batch": 4, **CASES[case]}
    accumulate = options.get("accumulate")
    # With more rows a choice of an expert comes that rounding decides, and so the rows of a product: one process gets
    # the same micro-batches then.
    same = {} if accumulate is None else {"batch": 2, "accumulate": 2 * accumulate}
    alone(folder, tmp_path / "one", {**options, **same})
    seen = launched(folder, tmp_path / "two", launcher, options)
    # Every tensor of the base but its four routers'.
    assert (seen["sharded"], seen["trained_sharded"]) == ((63, 0) if launcher is FSDP2 else (0, 0))
    check_same(tmp_path / "one", tmp_path / "two", adapters=5 if "recovery_rank" in CASES[case] else 3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_a_bf16_base_under_the_rule_with_checkpointing(folder: Path, tmp_path: Path, launcher: list[str]) -> None:
    options = {**RULE, "steps": 4, "batch": 4, "checkpointing": True}
    # In the micro-batches that the two processes have: a router's gradient is rounded to bf16 in each of them.
    alone(folder, tmp_path / "one", {**options, "batch": 2, "accumulate": 2}, dtype=torch.bfloat16)
    seen = launched(folder, tmp_path / "two", launcher, options, dtype="bfloat16")
    assert (seen["sharded"], seen["trained_sharded"]) == ((63, 0) if launcher is FSDP2 else (0, 0))
    check_same(tmp_path / "one", tmp_path / "two", adapters=3)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [DDP, FSDP2], ids=["ddp", "fsdp2"])
def test_all_processes_hold_points_to_the_same(folder: Path, tmp_path: Path, launcher: list[str]) -> None:
    """The first process decides; a sharded run has one pass, so that its points are held to the base."""
    auto = launcher is DDP
    # Evaluated, so that the run alone keeps the same text out with either reference.
    options = {**RULE, "steps": 6, "batch": 4, "evaluate_every": 6, "validation_tokens": 400, "reference": "auto"}
    more: dict[str, Any] = {"next_steps": 2} if auto else {}
    alone(folder, tmp_path / "one", {**options, **more, "reference": "auto" if auto else "base"})
    launched(folder, tmp_path / "two", launcher, {**options, **more})
    logs = [(tmp_path / out / "training_log.jsonl").read_text().splitlines() for out in ("one", "two")]
    held_to = [[row["reference"]["held_to"] for row in map(json.loads, log) if "reference" in row] for log in logs]
    assert held_to == [["control"] if auto else []] * 2
    check_same(tmp_path / "one", tmp_path / "two", adapters=3)


def test_what_a_sharded_run_cannot_do_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ConfigError, match="--fsdp_version 2"):
        check_sharded(False, False, False)
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    for place, remedy in enumerate(("give its folder", "leave one of them out", "next_steps trains twice")):
        with pytest.raises(ConfigError, match=remedy):
            check_sharded(*(place == other for other in range(3)))
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    check_sharded(False, False, False)
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_processes_that_do_not_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    # Somebody asked accelerate for its state before, and it took this process for one alone.
    assert join_processes("cpu").num_processes == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="2 processes were launched, but this one finds 1"):
        join_processes("cpu")


def test_accelerate_launch_of_one_process_on_a_cpu_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert join_processes("cpu").num_processes == 1
    assert "starts one process" in caplog.text
