"""The controller benchmark: figures from recorded phases, the squeezer, the replay, one short run under pressure."""

from __future__ import annotations

import gc
import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from remoe_adapt.bench.controller.arms import bench_profile, kinds
from remoe_adapt.bench.controller.bench import ControllerOptions, Replay, quickly, run_controller
from remoe_adapt.bench.controller.figures import (
    Phase,
    arm_row,
    bars,
    calm_ratio,
    monitoring,
    return_s,
    rise_s,
    strengths,
    why_void,
)
from remoe_adapt.bench.controller.process import ArmProcess
from remoe_adapt.bench.controller.worker import COLUMNS, Worker
from remoe_adapt.bench.harness.disk import PacedReads
from remoe_adapt.bench.harness.memory_group import memory_group, why_no_groups
from remoe_adapt.bench.harness.process import WorkerProcess
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation.shipped import example_folder
from remoe_adapt.expert_cache.load import pack_experts

MIB = 1 << 20
SETTLE_S = 0.5
COMPARED = {"dial_s": [0.01], "dial_misses": [1.0], "bare_s": [0.01], "bare_misses": [1.0]}


@pytest.fixture(scope="module")
def shipped() -> Path:
    if not (example_folder() / "config.json").is_file():
        pytest.skip("the shipped model is not beside the package")
    return example_folder()


def _phase(kind: int, ms: float, levels: list[float], cycle: int = 0, budget: float = 8.0) -> Phase:
    """A step every 0.1 s."""
    count = len(levels)
    steps = {"s": [ms / 1e3] * count, "at_s": [0.1 * n for n in range(count)], "strength": levels}
    return Phase(cycle, kind, {**steps, "budget_bytes": [budget] * count, "misses": [2] * count})


def _arm(calm_ms: float, squeeze_ms: float, strength: float) -> list[Phase]:
    level = [strength] * 10
    return [_phase(0, calm_ms, level), _phase(1, squeeze_ms, level), _phase(2, calm_ms, level)]


def _adaptive(squeeze_ms: float, calm_ms: float = 10.0) -> list[Phase]:
    rises = [0.0, 0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    falls = [1.0, 1.0, 0.4, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    return [_phase(0, calm_ms, [0.0] * 10), _phase(1, squeeze_ms, rises), _phase(2, calm_ms, falls)]


def test_rows_are_those_of_their_definitions() -> None:
    phases = _adaptive(40.0)
    row = arm_row(phases, died=False)
    assert row["squeeze_p95_ms"] == pytest.approx(40) and row["calm_tpot_ms"] == pytest.approx(10)
    assert row["squeeze_budget_bytes"] == 8 and row["squeeze_misses"] == 2
    assert row["mean_strength"] == pytest.approx((7.5 + 2.4) / 30) and len(strengths(phases)) == 30
    first, later = _phase(0, 10.0, [0.0] * 5), _phase(0, 20.0, [0.0] * 15)
    steps = {key: [*values, *later.steps[key]] for key, values in first.steps.items()}
    row = arm_row([replace(first, steps=steps), phases[1]], died=False)
    assert row["calm_tpot_ms"] == pytest.approx(15), "of two turns, whatever their lengths"
    assert return_s(phases) == pytest.approx(0.3) and rise_s(phases) == pytest.approx(0.3)
    assert return_s(_arm(10, 40, 1.0)) is None and rise_s(_arm(10, 40, 0.0)) is None
    died = arm_row([_phase(0, 10.0, [0.0] * 10)], died=True)
    assert died["squeeze_p95_ms"] is None and died["calm_tpot_ms"] == pytest.approx(10)


def test_what_sampling_costs_is_the_excess_of_the_steps_it_falls_into() -> None:
    times = [0.011 if place % 20 == 5 else 0.010 for place in range(200)]  # every 0.2 s
    begins = [sum(times[:place]) for place in range(200)]
    turn = {"s": times, "at_s": begins, "ran": [place % 20 == 5 for place in range(200)]}
    found = monitoring([{**turn, "monitor_cpu_s": 0.01, "seconds": 2.0}] * 2, 5.0)
    assert found["tpot_ratio"] == pytest.approx(1.005) and found["tpot_ratio_error"] == pytest.approx(0, abs=1e-6)
    assert found["monitor_cpu_share"] == pytest.approx(0.005) and found["samples"] == 20


def test_calm_is_compared_over_the_tokens_that_missed_as_often() -> None:
    compared = {"dial_s": [0.0102, 0.0202, 0.5, 0.0302], "dial_misses": [0, 2, 3, 4]}
    compared |= {"bare_s": [0.01, 0.02, 0.02, 0.03], "bare_misses": [0, 2, 0, 4]}
    assert calm_ratio(compared) == pytest.approx(1.01)


def _run(adaptive_ms: float) -> tuple[dict[str, list[Phase]], dict[str, dict[str, Any]]]:
    phases = {
        "fixed_0": _arm(10, 60, 0.0), "fixed_50": _arm(10, 50, 0.5), "fixed_100": _arm(10, 40, 1.0),
        "adaptive": _adaptive(adaptive_ms), "no_controller": _arm(10, 60, 0.0), "fixed_budget": [],
    }  # fmt: skip
    kl = {"fixed_0": 0.0, "fixed_50": 0.04, "fixed_100": 0.1, "adaptive": 0.03, "no_controller": 0.0}
    rows = {name: arm_row(arm, died=not arm) | {"kl": kl.get(name)} for name, arm in phases.items()}
    return phases, rows


@pytest.mark.parametrize(
    ("adaptive_ms", "rival", "slower", "kl_met"),
    [(43.0, "fixed_100", 43 / 40, True), (52.0, "fixed_50", 52 / 40, False), (60.0, "fixed_0", 60 / 40, False)],
)
def test_quality_is_compared_with_the_weakest_point_that_is_as_fast(
    adaptive_ms: float, rival: str, slower: float, kl_met: bool
) -> None:
    phases, rows = _run(adaptive_ms)
    overhead = {"monitor_cpu_share": 0.004, "tpot_ratio": 1.006}
    squeezes = {"adaptive": {"oom_kills": 0}, "fixed_budget": {"oom_kills": 20}}
    found = {row["bar"]: row for row in bars(rows, phases, COMPARED, overhead, squeezes, SETTLE_S)}
    p95 = found["squeeze p95 TPOT, adaptive / fixed_100"]
    assert p95["value"] == pytest.approx(slower) and p95["met"] == (slower <= 1.1)
    assert found[f"mean KL, adaptive / {rival}"]["met"] is kl_met
    assert found["calm: seconds until strength is 0"]["met"] and found["monitoring: share of one core"]["met"]
    assert not found["monitoring: TPOT with / without"]["met"]
    assert found["kills in the squeezes, adaptive"]["met"] and found["kills in the squeezes, fixed_budget"]["met"]
    unmeasured = {row["bar"]: row["met"] for row in bars(rows, phases, {}, {}, {}, SETTLE_S)}
    assert unmeasured["kills in the squeezes, fixed_budget"] is None


def test_a_run_in_which_strength_wins_nothing_is_void() -> None:
    rows = _run(43.0)[1]
    assert why_void(rows, "fixed_100") is None  # 1.5
    rows["fixed_0"]["squeeze_p95_ms"] = 51.0
    assert "1.27 times" in (why_void(rows, "fixed_100") or "")
    rows["fixed_0"]["squeeze_p95_ms"] = None
    assert "died" in (why_void(rows, "fixed_100") or "")


def test_arms_differ_in_dial_and_mover_alone() -> None:
    found = kinds((0.0, 0.5, 1.0))
    assert list(found) == ["fixed_0", "fixed_50", "fixed_100", "adaptive", "no_controller", "fixed_budget"]
    assert [name for name, kind in found.items() if not kind.mover] == ["fixed_budget"]
    assert [name for name, kind in found.items() if kind.dial and kind.strength is None] == ["adaptive"]
    assert bench_profile(0.0).recency is None and bench_profile().recovery_s < 6


def test_the_squeezer_takes_at_its_pace_and_gives_back_at_once() -> None:
    if why := why_no_groups():
        pytest.skip(why)
    script = Path(sys.modules[ArmProcess.__module__].__file__ or "").with_name("squeezer.py")
    with memory_group("test-squeezer") as group:
        process = WorkerProcess("squeezer", group, (sys.executable, "-S", str(script)))
        try:
            process.ask("held")
            before, began_s = group.used_bytes(), time.monotonic()
            process.ask("take", size_bytes=48 * MIB, bytes_per_s=96 * MIB)
            assert time.monotonic() - began_s < 0.4
            assert process.ask("wait") == {"held_bytes": 48 * MIB}
            assert time.monotonic() - began_s > 0.45
            assert group.used_bytes() - before > 46 * MIB
            assert process.ask("give_back") == {"held_bytes": 48 * MIB}
            assert group.used_bytes() - before < 8 * MIB
        finally:
            process.close()


def test_paced_reads_take_their_time_together(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(range(256)) * 4096)
    read, buffers = PacedReads(16 * MIB), [memoryview(bytearray(MIB // 2)) for _ in range(4)]
    with file.open("rb") as opened, ThreadPoolExecutor(4) as pool:
        began_s = time.perf_counter()
        got = list(pool.map(lambda buffer: read(opened.fileno(), [buffer], MIB // 4), buffers))
        assert got == [MIB // 2] * 4 and time.perf_counter() - began_s >= 0.125
    assert all(buffer[:256] == bytes(range(256)) for buffer in buffers)


def test_a_replay_costs_nothing_at_strength_0_and_something_above(shipped: Path) -> None:
    documents = [list(range(5, 29)), list(range(100, 124))]
    replay = Replay(shipped, str(shipped / "family"), 0.3, documents, torch.float32)
    assert replay.kl([0.0] * 40) == pytest.approx(0, abs=1e-6)  # its forward adds up in another order
    half = [0.0] * 20 + [1.0] * 20
    whole, part = replay.kl([1.0] * 40), replay.kl(half)
    assert 0 < part < whole and replay.kl(half) == part


def test_options_that_cannot_work_are_refused(shipped: Path) -> None:
    if why := why_no_groups():
        with pytest.raises(ConfigError, match="limits memory"):
            run_controller(ControllerOptions())
        pytest.skip(why)
    with pytest.raises(ConfigError, match="recency gain 99"):
        run_controller(ControllerOptions(gain=99))
    with pytest.raises(ConfigError, match="begin with 0"):
        run_controller(ControllerOptions(strengths=(0.5, 1.0)))
    with pytest.raises(ConfigError, match=r"squeezed 0\.9"):
        run_controller(ControllerOptions(squeezed=0.9, expert_bytes=1, keep=True, work=Path("/nowhere")))


@pytest.mark.parametrize("name", ["fixed_100", "adaptive", "no_controller", "fixed_budget"])
def test_a_worker_decodes_its_arm(tmp_path: Path, shipped: Path, name: str) -> None:
    pack = tmp_path / "pack"
    pack_experts(shipped, pack)
    options = {"family": str(shipped / "family"), "gain": 0.3, "share": 0.5, "pack": str(pack)}
    kind, documents = asdict(kinds((1.0,))[name]), [list(range(5, 12)), list(range(50, 53))]
    worker, threads = Worker(), torch.get_num_threads()
    facts = worker.answer(
        {"op": "load", "kind": kind, "folder": str(shipped), "documents": documents, "warm": 3, "threads": threads}
        | {"options": {**options, "read_threads": 2, "read_bytes_per_s": None}}
    )
    assert facts["budget_bytes"] == facts["experts_bytes"] // 2
    assert worker.arm.cache.resident_bytes > 0.9 * facts["budget_bytes"]
    worker.answer({"op": "resume"})
    found = worker.answer({"op": "decode", "tokens": 12, "seconds": 0.5})
    steps = found["steps"]
    assert list(steps) == list(COLUMNS) and len({len(column) for column in steps.values()}) == 1
    assert len(steps["s"]) >= 12 and set(steps["strength"]) == {1.0 if name == "fixed_100" else 0.0}
    assert sum(steps["misses"]) > 0 and steps["at_s"] == sorted(steps["at_s"])
    assert (found["monitor_cpu_s"] > 0) == (name != "fixed_budget")
    assert worker.answer({"op": "pause"})["swaps"] == int(name == "fixed_100")
    assert worker.arm.monitor_cpu_s() == 0.0
    watched = worker.answer({"op": "watch", "seconds": 0.7})
    assert any(watched["ran"]) == (name != "fixed_budget") and not all(watched["ran"])
    gc.unfreeze()  # what a worker's load keeps from being looked at again
    if worker.arm.controller is not None:
        worker.arm.controller.close()


@pytest.mark.slow
def test_a_quick_run_from_end_to_end(tmp_path: Path, shipped: Path) -> None:
    if why := why_no_groups():
        pytest.skip(why)
    options = quickly(ControllerOptions(work=tmp_path))
    result = run_controller(options)
    arms = result["arms"]
    assert list(arms) == ["fixed_0", "fixed_100", "adaptive", "no_controller", "fixed_budget"]
    assert result["ok"] == (result["void"] is None) and json.loads(json.dumps(result))
    assert {name for name, row in arms.items() if row["oom_kills"]} == {"fixed_budget"}
    assert list(result["died"]) == ["fixed_budget"] and arms["fixed_budget"]["squeeze_p95_ms"] is None
    assert arms["fixed_budget"]["calm_tpot_ms"] > 0
    calm = {phase["budget_bytes"][0] for phase in result["trace"]["fixed_0"] if phase["phase"] == 0}
    assert arms["fixed_0"]["squeeze_budget_bytes"] < 0.8 * min(calm)  # the mover gave memory back
    assert arms["fixed_0"]["kl"] == 0 and arms["no_controller"]["kl"] == 0 and arms["fixed_100"]["kl"] > 0.01
    assert arms["adaptive"]["swaps"] >= 2 and 0 < arms["adaptive"]["kl"] < arms["fixed_100"]["kl"]
    assert result["squeezes"]["adaptive"]["oom_kills"] == 0 and result["squeezes"]["fixed_budget"]["oom_kills"] == 1
    assert 0 < result["monitor_cpu_share"] < 0.05 and 0.5 < result["overhead"]["tpot_ratio"] < 2
    assert not list(tmp_path.iterdir())  # nothing is kept
