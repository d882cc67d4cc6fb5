"""The decode benchmark: the widened model, the worker's protocol, limits that are made and removed, one whole run."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_tiny
from transformers import AutoModelForCausalLM

from remoe_adapt.bench.decode.bench import DecodeOptions, quickly, run_decode
from remoe_adapt.bench.decode.figures import (
    arm_row,
    bars,
    coded_bars,
    limit_ms,
    llama_bars,
    miss_bursts,
    ppl_ratio,
    times_faster,
)
from remoe_adapt.bench.decode.worker import Worker
from remoe_adapt.bench.harness import widen as widening
from remoe_adapt.bench.harness.disk import (
    READ_AHEAD_BYTES,
    RawReads,
    evict,
    loop_disk,
    read_cap,
    why_no_cap,
    why_no_loop,
)
from remoe_adapt.bench.harness.memory_group import memory_group, why_no_groups
from remoe_adapt.bench.harness.process import WorkerProcess, serve_lines
from remoe_adapt.bench.harness.widen import check_same, save_whole, widen
from remoe_adapt.errors import ConfigError, RemoeError
from remoe_adapt.evaluation.shipped import example_folder
from remoe_adapt.expert_cache.plan import experts_modules

MIB = 1 << 20


@pytest.fixture(scope="module")
def shipped() -> Path:
    if not (example_folder() / "config.json").is_file():
        pytest.skip("the shipped model is not beside the package")
    return example_folder()


@pytest.mark.parametrize("kind", ["qwen2_moe", "mixtral", "gpt_oss", "deepseek_v3"])
def test_a_widened_model_computes_the_same(tmp_path: Path, kind: str) -> None:
    source = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny", kind), dtype=torch.float32).eval()
    save_whole(widen(source, 1 << 17), tmp_path / "wide")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=torch.float32).eval()
    ids_BT = torch.randint(3, 96, (2, 24))
    with torch.no_grad():
        torch.testing.assert_close(wide(input_ids=ids_BT).logits, source(input_ids=ids_BT).logits, rtol=1e-4, atol=1e-5)
    check_same(tmp_path / "wide", source)
    for module in experts_modules(wide).values():
        assert sum(param[0].nbytes for param in module.parameters()) >= 1 << 17


def test_a_checkpoint_that_computes_something_else_is_noticed(tmp_path: Path) -> None:
    source = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny", "qwen2_moe"), dtype=torch.float32)
    with torch.no_grad():
        source.lm_head.weight[7] += 1
    with pytest.raises(ConfigError, match="its logits change by"):
        check_same(tmp_path / "tiny", source)


def test_a_model_without_experts_is_refused() -> None:
    with pytest.raises(ConfigError, match="no experts"):
        widen(torch.nn.Linear(2, 2))


def test_widening_on_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny(tmp_path / "tiny", "qwen2_moe"))
    small = tmp_path / "small"
    small.mkdir()
    with pytest.raises(ConfigError, match="MiB free"):
        monkeypatch.setattr(widening, "_SLACK_BYTES", 1 << 60)
        save_whole(model, small / "wide")
    assert not list(small.iterdir())
    if os.geteuid() != 0 or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", small]).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        # It filled up after the check.
        monkeypatch.setattr(widening, "_SLACK_BYTES", -(1 << 40))
        with pytest.raises(ConfigError, match=r"cannot take .*--work"):
            save_whole(model, small / "wide")
        assert not list(small.iterdir())
    finally:
        gc.collect()
        subprocess.run(["umount", small], check=True)


def test_a_memory_group_kills_who_takes_more_and_is_gone_afterwards() -> None:
    if why := why_no_groups():
        pytest.skip(why)
    with memory_group("test") as group:
        folder = group.folder
        hog = [sys.executable, "-c", "import time; x = b'a' * (32 << 20); print(len(x), flush=True); time.sleep(60)"]
        with subprocess.Popen(group.command(hog), stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline()
            assert 32 * MIB < group.needed_bytes() <= group.used_bytes() < 128 * MIB
            with pytest.raises(ConfigError, match="cannot be limited to 8 MiB"):
                group.limit(8 * MIB)
            process.kill()
        group.limit(16 * MIB)
        assert subprocess.run(group.command(hog), stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
        assert group.kills() == 1
    assert not folder.exists()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Any]:
    if why := why_no_loop():
        pytest.skip(why)
    with loop_disk(tmp_path, 64 * MIB) as made:
        yield made


def test_a_loop_disk_has_the_read_ahead_and_forgets(disk: Any) -> None:
    file = disk.folder / "file"
    file.write_bytes(b"x" * MIB)
    disk.forget()
    assert file.read_bytes() == b"x" * MIB
    read_ahead = Path(f"/sys/block/{Path(disk.device).name}/queue/read_ahead_kb").read_text()
    assert int(read_ahead) << 10 == READ_AHEAD_BYTES
    evict(disk.folder)


def test_a_loop_disk_is_gone_after_an_error(tmp_path: Path) -> None:
    if why := why_no_loop():
        pytest.skip(why)
    with pytest.raises(KeyboardInterrupt), loop_disk(tmp_path, 64 * MIB) as disk, (disk.folder / "f").open("wb"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_raw_reads_are_timed_as_bursts(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(os.urandom(MIB))
    with RawReads(file, 100_000, 2) as raw:
        raw.replay([1, 3, 4])
        assert raw.bytes == 8 * 102_400
        assert raw.bytes_per_s > MIB


def test_a_cap_holds_every_read_of_its_members_and_nobody_else(disk: Any) -> None:
    if why := why_no_cap():
        pytest.skip(why)
    file = disk.folder / "file"
    file.write_bytes(os.urandom(32 * MIB))
    disk.forget()
    reading = f"import time; t = time.perf_counter(); open({str(file)!r}, 'rb').read(); print(time.perf_counter() - t)"
    with read_cap(disk.device) as cap:
        cap.hold(32 * MIB)
        took_s = float(subprocess.check_output(cap.command([sys.executable, "-c", reading])))
        assert took_s > 0.7, "32 MiB at 32 MiB/s"
        disk.forget()
        cap.hold(0)
        assert float(subprocess.check_output(cap.command([sys.executable, "-c", reading]))) < took_s / 2
    assert not cap.folder.exists()


def _steps(seconds: float, misses: int, nll: float = 1.0) -> dict[tuple[int, int], dict[str, Any]]:
    step = {"s": seconds, "nll": nll, "io_bytes": 0, "major_faults": 0, "hits": 10 - misses, "misses": [misses, 0]}
    return {(0, place): {**step, "bytes": misses * 100, "stall_s": seconds / 2} for place in range(5)}


def test_figures_and_bars_are_those_of_their_definitions() -> None:
    steps = {
        "stock": _steps(0.010, 0), "cache100_s0": _steps(0.0105, 0), "cache25_s0": _steps(0.05, 5),
        "cache25_s50": _steps(0.04, 4, 1.04), "cache25_s100": _steps(0.02, 2, 1.10), "mmap_cgroup": _steps(0.055, 0),
    }  # fmt: skip
    facts = {"cache25": {"dense_bytes": MIB, "budget_bytes": MIB, "anon_growth_bytes": 40 * MIB}}
    nll = {name: {key: step["nll"] for key, step in arm.items()} for name, arm in steps.items()}
    rows = {
        name: arm_row(arm, {"anon_growth_bytes": 7}) | {"ppl_ratio": ppl_ratio(nll[name], nll["stock"])}
        for name, arm in steps.items()
    }
    assert rows["cache25_s50"]["hit_rate"] == 0.6 and rows["cache25_s50"]["bytes_per_token"] == 400
    assert rows["cache25_s50"]["ppl_ratio"] == pytest.approx(1.0408, abs=1e-4)
    assert times_faster(steps["cache25_s100"], {(0, 0): {"s": 0.2}}) == pytest.approx(10.0)
    bursts = {(turn, place): {"s": seconds} for turn in range(3) for place, seconds in enumerate((0.0, 0.0, 0.09))}
    assert times_faster(bursts, {key: {"s": 0.06} for key in bursts}) == pytest.approx(2.0), "of turns, not of steps"
    assert miss_bursts(list(steps["cache25_s0"].values())) == [5] * 5
    limit = limit_ms(500, 500 / 0.03, 10.5)
    assert limit == pytest.approx(40.5)
    found = {row["bar"].partition(":")[0] + str(row["target"]): row for row in bars(steps, rows, limit, facts)}
    assert found["budget 100 %1.1"]["met"] and found["budget 25 %1.25"]["met"]
    assert found["budget 25 %5.0"]["met"] is None
    assert not next(row for row in bars(steps, rows, limit, facts) if row["target"] == 1.2)["met"]  # 1.1
    point = next(row for row in bars(steps, rows, limit, facts) if row["bar"].startswith("family"))
    assert point["arm"] == "cache25_s50" and point["value"] == pytest.approx(1.25) and point["met"]
    memory = next(row for row in bars(steps, rows, limit, facts) if row["bar"].startswith("cache25"))
    assert memory["value"] == pytest.approx(40 / (2.2 + 32)) and not memory["met"]


def test_bars_of_fewer_bits_are_of_bf16_slots() -> None:
    steps = {
        "cache25_s0": _steps(0.1, 5), "cache25_q4_s0": _steps(0.03, 0), "cache7_q4_s0": _steps(0.06, 5),
        "cache7_q4_prior20": _steps(0.034, 1),
    }  # fmt: skip
    found = coded_bars(steps, is_bf16=True)
    assert [row["value"] for row in found] == [pytest.approx(value) for value in (0.3, 0.6, 0.34)]
    assert [row["met"] for row in found] == [True, False, True]
    assert [row["met"] for row in coded_bars(steps, is_bf16=False)] == [None] * 3
    assert [row["met"] for row in coded_bars({"cache25_s0": steps["cache25_s0"]}, is_bf16=True)] == [None] * 3


def test_bars_of_llama_cpp_are_of_as_many_bits_and_of_what_is_as_good() -> None:
    arms = {
        "cache25_s0": (0.1, 1.0), "cache25_s50": (0.02, 1.04), "cache25_q4_s0": (0.03, 1.01),
        "cache7_q4_s0": (0.06, 1.01), "cache7_q4_prior10": (0.04, 1.02), "cache7_q4_prior20": (0.02, 1.03),
        "llamacpp_f16": (0.2, 1.0), "llamacpp_q4": (0.06, 1.01), "llamacpp_q4_resident20": (0.01, 1.0),
        "llamacpp_q4_tight": (0.16, 1.01), "llamacpp_q4_tight_resident10": (0.05, 1.028),
        "llamacpp_q4_tight_resident20": (0.02, 1.035),
    }  # fmt: skip
    steps = {name: _steps(seconds, 0) for name, (seconds, _) in arms.items()}
    rows: dict[str, dict[str, Any]] = {name: {"ppl_ratio": ratio} for name, (_, ratio) in arms.items()}
    found = llama_bars(steps, rows, is_bf16=True)
    assert [row["value"] for row in found] == [pytest.approx(value) for value in (0.5, 0.5, 0.25, 3.2)]
    # Others are faster, but not as good, or in more memory.
    best = ["cache25_s0", "cache25_q4_s0", "cache7_q4_prior10", "llamacpp_q4_tight_resident10"]
    assert [row["arm"] for row in found] == best
    assert [row["met"] for row in found] == [True] * 4, "1.028 / 1.01 is below 1.02"
    rows["llamacpp_q4_tight_resident10"]["ppl_ratio"] = 1.031
    assert [row["met"] for row in llama_bars(steps, rows, is_bf16=True)] == [True, True, True, None]
    rows["llamacpp_q4_tight_resident20"]["ppl_ratio"] = 1.0
    steps["llamacpp_q4_tight_resident20"] = _steps(0.1, 0)
    assert [row["met"] for row in llama_bars(steps, rows, is_bf16=False)] == [None, None, None, False]
    rows["llamacpp_q4_tight"]["ppl_ratio"] = None
    assert llama_bars(steps, rows, is_bf16=True)[3]["met"] is None
    assert [row["met"] for row in llama_bars({}, {}, is_bf16=True)] == [None] * 4


def test_the_worker_answers_errors_and_goes_on() -> None:
    replies = io.StringIO()
    serve_lines(io.StringIO('{"op": "nothing"}\nnot json\n'), replies, Worker().answer)
    lines = [json.loads(line) for line in replies.getvalue().splitlines()]
    assert ["error" in line for line in lines] == [True, True]


def test_a_worker_that_died_is_an_error_with_its_last_words() -> None:
    worker = WorkerProcess("some")
    try:
        with pytest.raises(RemoeError, match="some: "):
            worker.ask("load", regime="stock", folder="/nowhere", threads=1, options={})
        worker._process.kill()
        with pytest.raises(RemoeError, match="some: ended with status -9"):
            worker.ask("load", regime="stock", folder="/nowhere", threads=1, options={})
    finally:
        worker.close()


@pytest.mark.slow
def test_a_quick_run_from_end_to_end(tmp_path: Path, shipped: Path) -> None:
    began = time.time()
    result = run_decode(quickly(DecodeOptions(work=tmp_path, max_seconds=60)))
    arms = result["arms"]
    assert list(arms)[:4] == ["stock", "cache100_s0", "cache25_s0", "cache25_s100"]
    assert {name for name, row in arms.items() if "skipped" in row} == {
        "accelerate_disk", "transformers_disk", "mmap_cgroup", "llamacpp_f16", "llamacpp_q4",
        "llamacpp_q4_resident20", "llamacpp_q4_tight", "llamacpp_q4_tight_resident10", "llamacpp_q4_tight_resident15",
        "llamacpp_q4_tight_resident20",
    }  # fmt: skip
    assert arms["cache100_s0"]["bytes_per_token"] == 0 and arms["cache100_s0"]["hit_rate"] == 1
    assert arms["cache25_s0"]["ppl_ratio"] == pytest.approx(1, abs=1e-3)
    assert 0.3 < arms["cache25_s0"]["hit_rate"] < arms["cache25_s100"]["hit_rate"]
    assert arms["cache25_s0"]["hit_rate"] < arms["cache25_prior20"]["hit_rate"]
    assert arms["cache25_s100"]["ppl_ratio"] != pytest.approx(1, abs=1e-3)
    misses = arms["cache25_s0"]["bytes_per_token"] / result["workers"]["cache25"]["expert_bytes"]
    assert misses / (5 * 6) == pytest.approx(1 - arms["cache25_s0"]["hit_rate"], rel=1e-6)
    # In fewer bits more experts fit into less.
    coded = {name: row for name, row in arms.items() if name.startswith("cache") and "_q" in name}
    priors = [f"cache7_q4_prior{gain}" for gain in (10, 15, 20)]
    assert list(coded) == ["cache25_q4_s0", "cache25_q8_s0", "cache7_q4_s0", *priors]
    workers = result["workers"]
    assert workers["cache25_q4"]["budget_bytes"] == workers["cache25"]["budget_bytes"] // 2, "of bf16, not of float32"
    assert arms["cache25_s0"]["hit_rate"] < arms["cache25_q8_s0"]["hit_rate"] < arms["cache25_q4_s0"]["hit_rate"]
    assert arms["cache7_q4_s0"]["hit_rate"] < arms["cache7_q4_prior20"]["hit_rate"]
    assert all(row["ppl_ratio"] == pytest.approx(1, abs=0.2) for row in coded.values())
    assert result["raw_bandwidth_bytes_per_s"] > MIB and len(result["bars"]) == 10 + 3 + 4 + 4
    assert json.loads(json.dumps(result)) and result["seconds"] <= time.time() - began + 1
    assert not list(tmp_path.iterdir())  # the widened model is not kept
    assert shutil.disk_usage(tmp_path).free
