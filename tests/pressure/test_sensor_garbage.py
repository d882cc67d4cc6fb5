"""Garbage in one file of the kernel's costs what that file tells, is said once, and never reads as pressure."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
from fake_cgroups import below, fake_machine, psi, v1_group, v2_group, write

from remoe_adapt import load_profile
from remoe_adapt.pressure.decide import DecisionState, decide
from remoe_adapt.pressure.reading import Measure, Reading
from remoe_adapt.pressure.sensors import CgroupMemory, MachineMemory, PressureStall, Sensors, os_sensors

GIB, MIB = 1 << 30, 1 << 20
MEMINFO = "MemTotal: 8000000 kB\nMemAvailable: 6000000 kB\nSwapTotal: 100 kB\nSwapFree: 100 kB\n"
PROCESS = {
    "proc/meminfo": MEMINFO,
    "proc/vmstat": "pswpin 10\npswpout 20\nworkingset_refault_anon 5\n",
    "proc/self/statm": "9 5 2\n",
    "proc/self/stat": "7 (a (b) c) R 1 1 1 0 -1 0 5 0 3 0 1 1 0 0\n",
    "proc/self/io": "rchar: 5\nread_bytes: 1000\n",
    "proc/pressure/memory": psi(0),
    "proc/pressure/io": psi(0),
}
GARBAGE = ["", "soon\n", "-5\n", "9" * 400 + "\n", "nan\n", "1e999\n", "0x10\n", "\0\0", "\x1b[31m\n", "max max\n"]
OWN = below("sys/pod/me", v2_group(2 * GIB, GIB, high=3 * GIB)) | below("sys/pod", v2_group(4 * GIB, GIB))


def values(reading: Reading) -> dict[str, float]:
    return {name: measure.value for name, measure in reading.measures.items()}


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize(
    ("name", "headroom"),
    [("memory.high", GIB), ("memory.max", 2 * GIB), ("memory.stat", GIB), ("memory.current", 3 * GIB)],
)
def test_garbage_in_one_file_of_a_group_leaves_its_others(
    tmp_path: Path, name: str, headroom: int, garbage: str, caplog: pytest.LogCaptureFixture
) -> None:
    proc, cgroups = fake_machine(tmp_path, "0::/pod/me\n", OWN)
    (cgroups / "pod/me" / name).write_text(garbage)
    sensor = CgroupMemory(proc, cgroups)
    with caplog.at_level(logging.WARNING, "remoe_adapt"):
        found = [sensor.read(float(second)) for second in range(3)]
    assert all(values(one)["cgroup.headroom"] == headroom for one in found)
    assert name in found[0].missing[f"cgroup.{name}"] and found[0].missing[f"cgroup.{name}"].isprintable()
    assert [record.message.count(name) for record in caplog.records] == [1], "said once"


def test_garbage_in_the_only_limit_there_is_says_so(tmp_path: Path) -> None:
    proc, cgroups = fake_machine(tmp_path, "0::/me\n", below("sys/me", v2_group(2 * GIB, GIB)))
    write(tmp_path, {"sys/me/memory.max": "-1\n"})
    reading = CgroupMemory(proc, cgroups).read(1.0)
    assert not reading.measures and "memory.max holds '-1'" in reading.missing["cgroup"]


def test_what_v1_says_of_hierarchy_may_be_garbage_too(tmp_path: Path) -> None:
    files = below("sys/memory/a/b", v1_group(4 * GIB, GIB)) | below("sys/memory/a", v1_group(2 * GIB, GIB))
    proc, cgroups = fake_machine(tmp_path, "5:memory:/a/b\n", files)
    (cgroups / "memory/a/memory.use_hierarchy").write_bytes(b"\xff\xfe")
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.limit"] == 2 * GIB


def test_a_group_whose_name_is_not_utf8_is_found(tmp_path: Path) -> None:
    proc, cgroups = fake_machine(tmp_path, "", {})
    (proc / "self/cgroup").write_bytes(b"0::/caf\xe9\n")
    folder = Path(str(cgroups), b"caf\xe9".decode("utf-8", "surrogateescape"))
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this file system has UTF-8 names alone")
    for name, text in v2_group(GIB, MIB).items():
        (folder / name).write_text(text)
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.limit"] == GIB


@pytest.mark.parametrize("part", ["a/", "../", "x"])
def test_an_endless_path_of_a_group_is_not_looked_for(tmp_path: Path, part: str) -> None:
    proc, cgroups = fake_machine(tmp_path, "0::/" + part * 30_000 + "\n", below("sys", v2_group(GIB, MIB)))
    assert not CgroupMemory(proc, cgroups).read(1.0).measures


@pytest.mark.parametrize(
    "line",
    ["some avg10={} avg60=0.00 avg300=0.00 total=5", "some avg10=0.00 avg60=0.00 avg300=0.00 total={}"],
)
@pytest.mark.parametrize("garbage", ["nan", "-1", "9" * 400, "1e400", "", "inf"])
def test_garbage_in_a_pressure_file_is_never_a_stall(tmp_path: Path, line: str, garbage: str) -> None:
    whole = psi(0, 0).splitlines()[1]
    files = PROCESS | {"proc/pressure/memory": f"{line.format(garbage)}\n{whole}\n"}
    proc, cgroups = fake_machine(tmp_path, "0::/\n", files)
    sensor = PressureStall(proc, cgroups)
    sensor.read(1.0)
    found = values(sensor.read(2.0))
    assert found["psi.memory.full"] == 0.0 and found["psi.io.some"] == 0.0, "the line and the file beside it"
    assert not any(name.startswith("psi.memory.some") for name in found)


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", sorted(PROCESS))
def test_garbage_in_one_file_of_proc_leaves_the_others_and_no_pressure(
    tmp_path: Path, name: str, garbage: str, caplog: pytest.LogCaptureFixture
) -> None:
    proc, cgroups = fake_machine(tmp_path, "0::/me\n", PROCESS | below("sys/me", v2_group(2 * GIB, GIB)))
    whole = Sensors(os_sensors(proc, cgroups))
    whole.read(1.0)
    expected = set(whole.read(2.0).measures)
    write(tmp_path, {name: garbage})
    sensors, state, profile = Sensors(os_sensors(proc, cgroups)), DecisionState(), load_profile("rpi5-8gb")
    for second in range(1, 9):
        reading = sensors.read(float(second))
        state, decision = decide(state, reading, profile)
        assert all(math.isfinite(pressure) for pressure in decision.signals.values())
        assert not any(decision.signals.values())
    lost = expected - set(reading.measures)
    assert "cgroup.headroom" not in lost and len(lost) <= 6
    assert len({one.split(".")[0] for one in lost}) <= 1, "one sensor's file costs that sensor alone"
    assert len(caplog.records) <= 1


def test_a_measure_of_anybody_s_sensor_may_be_beyond_a_float() -> None:
    measures = {"memory.available": Measure(4.0 * GIB, "B", 1.0), "process.faults": Measure(10**400, "1/s", 1.0)}
    _, decision = decide(DecisionState(), Reading(1.0, measures), load_profile("orin-8gb"))
    assert "process.faults" in decision.unusable and decision.signals["host headroom"] == 0.0


def test_a_glance_does_not_believe_garbage(tmp_path: Path) -> None:
    proc, _ = fake_machine(tmp_path, "", {"proc/meminfo": MEMINFO.replace("6000000", "9" * 400)})
    assert not Sensors([MachineMemory(proc)]).is_free({"memory": 1.0}, 1.0)
