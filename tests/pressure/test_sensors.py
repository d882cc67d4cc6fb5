"""Sensors of the system: right on fake machines of every kind, and true on this one."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from fake_cgroups import below, fake_machine, psi, v1_group, v2_group, write

from remoe_adapt.errors import ConfigError
from remoe_adapt.pressure.reading import Measure, Reading, merged
from remoe_adapt.pressure.sensors import (
    CGROUPS,
    CgroupMemory,
    MachineMemory,
    PressureStall,
    ProcessUse,
    Sensors,
    os_sensors,
)

GIB, MIB = 1 << 30, 1 << 20
RECORDED = Path(__file__).parents[1] / "data" / "readings-squeeze.jsonl"
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def values(reading: Reading) -> dict[str, float]:
    return {name: measure.value for name, measure in reading.measures.items()}


# Readings


def test_recorded_readings_are_read_and_written_alike() -> None:
    lines = RECORDED.read_text(encoding="utf-8").splitlines()
    readings = [Reading.from_json(line) for line in lines]
    assert [reading.to_json() for reading in readings] == lines
    assert len(readings) == 22 and readings[0].missing["process.faults"] == "a rate needs a second sample"
    assert max(reading.value("process.faults") or 0 for reading in readings) > 50
    assert min(reading.value("cgroup.headroom") or 0 for reading in readings) < 64 * MIB


def test_a_reading_knows_ages_and_keeps_what_is_not_finite() -> None:
    reading = Reading(10.0, {"a": Measure(math.nan, "B", 9.5), "b": Measure(1.0, "share", 10.0)}, {"c": "broken"})
    back = Reading.from_json(reading.to_json())
    assert back.age_s("a") == 0.5 and math.isnan(back.value("a") or 0.0)
    assert back.value("b") == 1.0 and back.value("c") is None and back.age_s("c") is None
    assert back.missing == {"c": "broken"}
    with pytest.raises(TypeError):
        back.measures["d"] = Measure(1.0, "B", 1.0)  # type: ignore[index]


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 100_000, "\x1b[1m", '{"time_s": ' + "9" * 400 + ', "measures": {}, "missing": {}}',
     '{"time_s": Infinity, "measures": {}, "missing": {}}', '{"time_s": 1, "time_s": 1, "measures": {}, "missing": {}}',
     "", "[]", "{}", '{"time_s": "1", "measures": {}, "missing": {}}', '{"time_s": 1, "measures": [], "missing": {}}',
     '{"time_s": 1, "measures": {"a": {"value": 1, "unit": "furlong", "time_s": 1}}, "missing": {}}',
     '{"time_s": 1, "measures": {"a": {"value": true, "unit": "B", "time_s": 1}}, "missing": {}}'],
)  # fmt: skip
def test_other_text_is_no_reading(text: str) -> None:
    with pytest.raises(ConfigError, match="no recorded reading") as raised:
        Reading.from_json(text)
    assert str(raised.value).isprintable()


def test_a_value_wins_over_a_reason() -> None:
    some = Reading(1.0, {"a": Measure(1.0, "B", 1.0)}, {"b": "no"})
    other = Reading(1.0, {"b": Measure(2.0, "B", 1.0)}, {"a": "no"})
    assert values(merged(2.0, [some, other])) == {"a": 1.0, "b": 2.0} and not merged(2.0, [some, other]).missing


# Control groups


def test_the_tightest_limit_on_the_path_counts(tmp_path: Path) -> None:
    files = below("sys/pod/box", v2_group(3 * GIB, 1 * GIB)) | below("sys/pod", v2_group(8 * GIB, 7 * GIB, 512 * MIB))
    proc, cgroups = fake_machine(tmp_path, "0::/pod/box\n", files | {"sys/cgroup.procs": ""})
    sensor = CgroupMemory(proc, cgroups)
    found = values(sensor.read(1.0))
    assert found["cgroup.limit"] == 8 * GIB and found["cgroup.headroom"] == 1.5 * GIB
    assert found["cgroup.reclaimable"] == 512 * MIB
    write(tmp_path, below("sys/pod/box", v2_group(3 * GIB, 2 * GIB, high=2 * GIB)))
    assert values(sensor.read(2.0))["cgroup.headroom"] == 0, "memory.high throttles before memory.max kills"


def test_limits_of_a_hybrid_machine_are_those_of_v1(tmp_path: Path) -> None:
    files = below("sys/memory/jobs/me", v1_group(GIB, GIB - 10 * MIB, inactive=4 * MIB, active=9 * MIB, mapped=6 * MIB))
    files |= below("sys/memory/jobs", v1_group(1 << 62, 5 * GIB)) | below("sys/memory", v1_group(1 << 62, 9 * GIB))
    files |= {"sys/unified/cgroup.procs": "", "sys/unified/jobs/me/memory.pressure": psi(0)}
    proc, cgroups = fake_machine(tmp_path, "5:cpu,memory:/jobs/me\n1:name=systemd:/\n0::/jobs/me\n", files)
    found = values(CgroupMemory(proc, cgroups).read(1.0))
    assert found["cgroup.usage"] == GIB - 10 * MIB
    assert found["cgroup.headroom"] == 17 * MIB, "inactive file cache, and active cache that nobody maps, is no use"


def test_a_v1_parent_without_hierarchy_does_not_bind(tmp_path: Path) -> None:
    files = below("sys/memory/a/b", v1_group(4 * GIB, GIB)) | below("sys/memory/a", v1_group(2 * GIB, GIB))
    proc, cgroups = fake_machine(tmp_path, "5:memory:/a/b\n", files)
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.limit"] == 2 * GIB
    write(tmp_path, {"sys/memory/a/memory.use_hierarchy": "0\n"})
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.limit"] == 4 * GIB


def test_in_a_container_the_own_group_is_mounted_as_the_root(tmp_path: Path) -> None:
    files = below("sys/memory", v1_group(GIB, MIB)) | below("sys/memory/inner", v1_group(GIB // 2, MIB))
    proc, cgroups = fake_machine(tmp_path, "5:memory:/docker/0123\n", files)
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.limit"] == GIB
    (proc / "self/cgroup").write_text("5:memory:/docker/0123/inner\n")
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.limit"] == GIB // 2


def test_a_process_that_is_moved_is_followed(tmp_path: Path) -> None:
    files = below("sys/a", v2_group(GIB, 0)) | below("sys/b", v2_group(2 * GIB, 0)) | {"sys/a/memory.pressure": psi(0)}
    proc, cgroups = fake_machine(tmp_path, "0::/a\n", files)
    memory, stall = CgroupMemory(proc, cgroups), PressureStall(proc, cgroups)
    assert values(memory.read(1.0))["cgroup.limit"] == GIB
    assert "psi.cgroup.memory.some_avg10" in stall.read(1.0).measures
    (proc / "self/cgroup").write_text("0::/b\n")
    assert values(memory.read(2.0))["cgroup.limit"] == 2 * GIB
    assert "no v2 group" in stall.read(2.0).missing["psi.cgroup"]


@pytest.mark.parametrize(
    ("membership", "files", "why"),
    [
        ("0::/\n", below("sys", v2_group(None, 5)), "no group on this process's path has a limit"),
        ("0::/\n", {"sys/cgroup.procs": ""}, "no memory controller"),
        ("1:name=systemd:/\n", {}, "no memory controller"),
        ("4:memory:/x\n", {}, "no memory controller"),
    ],
)
def test_why_there_is_no_limit(tmp_path: Path, membership: str, files: dict[str, str], why: str) -> None:
    proc, cgroups = fake_machine(tmp_path, membership, files)
    reading = CgroupMemory(proc, cgroups).read(1.0)
    assert not reading.measures and why in reading.missing["cgroup"]


def test_a_machine_with_nothing_says_why_for_each(tmp_path: Path) -> None:
    sensors = Sensors(os_sensors(tmp_path / "proc", tmp_path / "sys"))
    reading = sensors.read(1.0)
    assert {"cgroup", "psi.cgroup", "psi.memory", "psi.io", "process.private", "process.faults", "process.read"} <= set(
        reading.missing
    )
    assert all(reading.missing.values()) and "memory.available" in reading.measures


def test_broken_files_are_reasons(tmp_path: Path) -> None:
    files = {"sys/memory.max": "soon\n", "proc/pressure/memory": "some avg10=x\n", "proc/self/statm": "1\n",
             "proc/self/stat": "1 (a) R\n", "proc/self/io": "rchar: 1\n"}  # fmt: skip
    proc, cgroups = fake_machine(tmp_path, "0::/\n", files)
    reading = Sensors(os_sensors(proc, cgroups)).read(1.0)
    assert "no pressure file" in reading.missing["psi.memory"]
    for name in ("cgroup", "process.private", "process.faults", "process.read"):
        assert "Error" in reading.missing[name], name
    assert "memory.available" in reading.measures
    (proc / "self/cgroup").write_text("no line of a cgroup file\n")
    assert "no memory controller" in CgroupMemory(proc, cgroups).read(1.0).missing["cgroup"]


@pytest.mark.parametrize("garbage", [b"", b"soon\n", b"\xff\xfe\x00", b"1:2\n", b":::\n"])
@pytest.mark.parametrize("name", ["cgroup", "memory.max", "memory.current", "memory.stat", "memory.pressure"])
def test_no_sensor_raises_for_garbage_nor_hides_another(tmp_path: Path, name: str, garbage: bytes) -> None:
    files = below("sys/pod/me", v2_group(3 * GIB, GIB)) | below("sys/pod", v2_group(2 * GIB, GIB))
    files |= {"sys/pod/me/memory.pressure": psi(0), "proc/pressure/memory": psi(0), "proc/pressure/io": psi(0)}
    proc, cgroups = fake_machine(tmp_path, "0::/pod/me\n", files)
    (proc / "self/cgroup" if name == "cgroup" else cgroups / "pod/me" / name).write_bytes(garbage)
    stalls = PressureStall(proc, cgroups).read(1.0)
    assert {"psi.memory.some_avg10", "psi.io.some_avg10"} <= set(stalls.measures)
    found = CgroupMemory(proc, cgroups).read(1.0)
    if name != "cgroup":
        assert values(found)["cgroup.headroom"] == GIB, "the parent binds as before"
    else:
        assert found.missing["cgroup"]


def test_a_group_whose_own_limit_binds_counts_whatever_its_parents_hide(tmp_path: Path) -> None:
    files = below("sys/pod/me", v2_group(GIB, GIB - 1)) | below("sys/pod", v2_group(2 * GIB, GIB))
    proc, cgroups = fake_machine(tmp_path, "0::/pod/me\n", files)
    (cgroups / "pod/memory.stat").unlink()
    (cgroups / "pod/memory.current").unlink()
    assert values(CgroupMemory(proc, cgroups).read(1.0))["cgroup.headroom"] == 1


def test_swap_and_memory_are_the_kernel_s(tmp_path: Path) -> None:
    meminfo = "MemTotal: 1000 kB\nMemFree: 1 kB\nMemAvailable: 600 kB\nSwapTotal: {} kB\nSwapFree: 100 kB\n"
    files = {"proc/meminfo": meminfo.format(500), "proc/vmstat": "pgfault 9\npswpin 10\npswpout 20\n"}
    proc, _ = fake_machine(tmp_path, "", files)
    sensor = MachineMemory(proc)
    first = sensor.read(1.0)
    kib = {"memory.available": 600, "memory.total": 1000, "swap.used": 400, "swap.total": 500}
    assert values(first) == {name: size * 1024.0 for name, size in kib.items()}
    assert first.missing == dict.fromkeys(("swap.in", "swap.out"), "a rate needs a second sample")
    write(tmp_path, {"proc/vmstat": "pgfault 9\npswpin 14\npswpout 20\n"})
    page = os.sysconf("SC_PAGE_SIZE")
    assert values(sensor.read(3.0)).items() >= {"swap.in": 2.0 * page, "swap.out": 0.0}.items()
    write(tmp_path, {"proc/meminfo": meminfo.format(0).replace("SwapFree: 100", "SwapFree: 0")})
    assert "no swap" in sensor.read(4.0).missing["swap.in"]
    (proc / "meminfo").unlink()
    sensor.close()
    assert values(sensor.read(5.0))["memory.total"] == psutil.virtual_memory().total, "psutil stands in"


def test_the_root_of_all_groups_is_the_machine_and_a_container_s_is_not(tmp_path: Path) -> None:
    files = {"sys/memory.pressure": psi(0), "proc/pressure/memory": psi(0), "proc/pressure/io": psi(0)}
    proc, cgroups = fake_machine(tmp_path, "0::/\n", files)
    assert "psi.cgroup" in PressureStall(proc, cgroups).read(1.0).missing
    write(tmp_path, {"sys/cgroup.events": "populated 1\n"})
    assert "psi.cgroup.memory.some_avg10" in PressureStall(proc, cgroups).read(1.0).measures


# Rates


def test_stall_shares_are_of_the_time_between_samples(tmp_path: Path) -> None:
    files = {"proc/pressure/memory": psi(5_000_000, 100), "proc/pressure/io": psi(7), "sys/me/memory.pressure": psi(0)}
    proc, cgroups = fake_machine(tmp_path, "0::/me\n", files)
    sensor = PressureStall(proc, cgroups)
    first = sensor.read(100.0)
    assert first.missing["psi.memory.some"] == "a rate needs a second sample"
    after = {"proc/pressure/memory": psi(5_100_000, 50_100, some_avg10=12.5), "sys/me/memory.pressure": psi(900_000)}
    write(tmp_path, after)
    found = values(sensor.read(100.2))
    assert found["psi.memory.some"] == pytest.approx(0.5) and found["psi.memory.full"] == pytest.approx(0.25)
    assert found["psi.memory.some_avg10"] == 0.125 and found["psi.io.some"] == 0.0
    assert found["psi.cgroup.memory.some"] == 1.0, "a share is at most 1, whatever the clocks say"


def test_rates_survive_clocks_and_counters_that_go_back(tmp_path: Path) -> None:
    stat = "7 (a (b) c) R 1 1 1 0 -1 0 5 0 {faults} 0 1 1 0 0\n"
    files = {
        "proc/9/stat": stat.format(faults=10),
        "proc/9/io": "rchar: 5\nread_bytes: 1000\n",
        "proc/9/statm": "9 5 2",
    }
    proc, _ = fake_machine(tmp_path, "", files)
    sensor = ProcessUse(proc, pid=9)
    assert values(sensor.read(1.0)) == {"process.private": 3 * os.sysconf("SC_PAGE_SIZE")}
    write(tmp_path, {"proc/9/stat": stat.format(faults=30), "proc/9/io": "read_bytes: 5000\n"})
    found = values(sensor.read(3.0))
    assert found["process.faults"] == 10.0 and found["process.read"] == 2000.0
    assert "process.faults" in sensor.read(2.0).missing
    write(tmp_path, {"proc/9/stat": stat.format(faults=1)})
    assert "process.faults" in sensor.read(4.0).missing
    assert values(sensor.read(5.0))["process.faults"] == 0.0


def test_pages_read_again_are_counted_while_there_are_faults(tmp_path: Path) -> None:
    stat, vmstat = (
        "7 (a) R 1 1 1 0 -1 0 5 0 {} 0 1 1\n",
        "nr_x 1\nworkingset_refault_anon 5\nworkingset_refault_file {}\n",
    )
    proc, _ = fake_machine(tmp_path, "", {"proc/9/stat": stat.format(0), "proc/vmstat": vmstat.format(100)})
    sensor = ProcessUse(proc, pid=9)
    assert "process.refaults" not in {**sensor.read(1.0).missing, **sensor.read(2.0).missing}, "nothing faults"
    write(tmp_path, {"proc/9/stat": stat.format(50)})
    assert sensor.read(3.0).missing["process.refaults"] == "a rate needs a second sample"
    write(tmp_path, {"proc/9/stat": stat.format(90), "proc/vmstat": vmstat.format(107)})
    found = values(sensor.read(4.0))
    assert found["process.faults"] == 40.0 and found["process.refaults"] == 7.0
    write(tmp_path, {"proc/9/stat": stat.format(95), "proc/vmstat": "nr_x 1\n"})
    assert "does not count" in sensor.read(5.0).missing["process.refaults"]


def test_a_glance_sees_what_a_sample_sees(tmp_path: Path) -> None:
    files = below("sys/me", v2_group(GIB, 3 * MIB, inactive=MIB)) | {
        "proc/meminfo": "MemTotal: 900 kB\nMemAvailable: 800 kB\n"
    }
    proc, cgroups = fake_machine(tmp_path, "0::/me\n", files)
    sensors = Sensors(os_sensors(proc, cgroups))
    floors = {"memory": 800 * 1024.0, "cgroup": GIB - 2.0 * MIB}
    assert sensors.is_free(floors, 1.0) and sensors.is_free({}, 1.0)
    for name in floors:
        assert not sensors.is_free(floors | {name: floors[name] + 1}, 1.0), name
    assert not sensors.is_free(floors | {"gpu": 1.0}, 1.0), "who is not there cannot tell"
    (cgroups / "me/memory.max").write_text("soon\n")
    assert not sensors.is_free(floors, 1.1), "nor who is broken"


# This machine


def test_the_machine_agrees_with_psutil() -> None:
    found = values(MachineMemory().read(1.0))
    assert found["memory.total"] == psutil.virtual_memory().total
    assert found["memory.available"] == pytest.approx(psutil.virtual_memory().available, rel=0.2)


@linux
def test_own_major_faults_and_reads_are_seen() -> None:
    sensor = ProcessUse()
    with tempfile.NamedTemporaryFile(dir=Path(__file__).parent) as file:
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        sensor.read(1.0)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as pages:
            pages.madvise(mmap.MADV_RANDOM)
            assert sum(pages[:: mmap.PAGESIZE]) > 0
        found = values(sensor.read(2.0))
    if found["process.faults"] == 0:
        pytest.skip("this file system keeps its pages: nothing was read again")
    assert found["process.faults"] > 100
    assert found["process.private"] == pytest.approx(psutil.Process().memory_info().rss, rel=0.6)


@linux
def test_after_a_fork_a_child_sees_itself() -> None:
    sensor = ProcessUse()
    held = mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE)  # of no allocator, which might keep what is freed
    held.write(os.urandom(64 * MIB))
    parent = sensor.read(1.0).value("process.private")
    with warnings.catch_warnings():  # threads of torch: the child only reads a file
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        try:
            held.close()
            child = sensor.read(2.0).value("process.private")
            os._exit(0 if (child or 0) < (parent or 0) - 32 * MIB else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
def limited_group() -> Iterator[Path]:
    """A v1 group of 64 MiB."""
    group = CGROUPS / "memory" / f"remoe-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(64 * MIB))
    except OSError as error:
        pytest.skip(f"no cgroup v1 memory group can be made here: {error}")
    yield group
    for _ in range(50):
        with contextlib.suppress(OSError):
            group.rmdir()
            return
        time.sleep(0.1)


@linux
def test_the_limit_of_another_process_in_a_real_group(limited_group: Path) -> None:
    child = subprocess.Popen(["sleep", "60"])
    try:
        sensor = CgroupMemory(pid=child.pid)
        before = sensor.read(1.0).value("cgroup.limit")
        (limited_group / "cgroup.procs").write_text(str(child.pid))
        found = values(sensor.read(2.0))
        assert found["cgroup.limit"] == 64 * MIB and before != 64 * MIB
        assert 0 < found["cgroup.headroom"] <= 64 * MIB
    finally:
        child.kill()
        child.wait()


def test_closed_sensors_open_again() -> None:
    sensors = Sensors(os_sensors())
    first = set(sensors.read().measures)
    sensors.close()
    open_files = len(psutil.Process().open_files())
    assert first <= set(sensors.read().measures)
    sensors.close()
    assert len(psutil.Process().open_files()) == open_files
