"""The operating system's sensors: memory and swap, cgroup limits, pressure stalls, this process. No torch.

Each can be used alone. One that cannot work here gives a reading without measures that says why; it never raises.
A sample of all of them costs some 0.15 ms, three times that where caches are cold.
"""

from __future__ import annotations

import math
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import psutil

from remoe_adapt.pressure.cgroups import ProcessGroups
from remoe_adapt.pressure.proc_files import Measures, Missing, PolledFile, Rates, count, garbage, reason
from remoe_adapt.pressure.reading import Measure, Reading, merged

# Tests give folders of their own instead.
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
# Numbers end at 19 digits: no kernel counts longer ones, and no float holds them.
_STALLS = re.compile(r"^(some|full) avg10=(\d{1,3}(?:\.\d{1,9})?) .*\btotal=(\d{1,19})$", re.MULTILINE | re.ASCII)
# Of files and, since Linux 5.9, of anonymous memory.
_REFAULTS = re.compile(r"^workingset_refault(?:_anon|_file)? (\d{1,19})$", re.MULTILINE | re.ASCII)
_MEMINFO = re.compile(r"^(MemTotal|MemAvailable|SwapTotal|SwapFree): +(\d{1,19}) kB$", re.MULTILINE | re.ASCII)
_SWAPPED = re.compile(r"^(pswpin|pswpout) (\d{1,19})$", re.MULTILINE | re.ASCII)
_READ = re.compile(r"^read_bytes: (\d{1,19})$", re.MULTILINE | re.ASCII)
_SWAP_RATES = ("swap.in", "swap.out")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096


class Sensor(Protocol):
    """Where pressure is seen; see OS_SENSORS for how to add one.

    name: the first word of its measures.
    """

    name: str

    def read(self, now_s: float) -> Reading:
        """What it says now; `now_s` is the time of the reading, in seconds on a clock of the caller's."""
        ...

    def close(self) -> None:
        """Let go of files; a later `read` opens them again."""
        ...


class MachineMemory:
    """memory.available, memory.total (B); swap.used, swap.total (B), swap.in, swap.out (B/s), all of the machine.

    psutil's figures, which know nothing of cgroups, and count file pages that somebody maps as available. On Linux they
    are read from where psutil has them, at a tenth of the price.
    """

    name = "memory"

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> None:
        self._meminfo, self._vmstat = PolledFile(proc / "meminfo"), PolledFile(proc / "vmstat")
        self._rates = Rates()

    def read(self, now_s: float) -> Reading:
        try:
            found, swapped = self._from_kernel()
        except (OSError, ValueError, KeyError):  # another system, or a kernel without MemAvailable
            # This costs ten times as much, and is right wherever psutil runs.
            found, swapped = _from_psutil()
        measures = {name: Measure(value, "B", now_s) for name, value in found.items()}
        if not swapped:
            return Reading(now_s, measures, dict.fromkeys(_SWAP_RATES, "this machine has no swap"))
        missing: Missing = {}
        self._rates.add(now_s, swapped, "B/s", measures, missing)
        return Reading(now_s, measures, missing)

    def _from_kernel(self) -> tuple[dict[str, float], dict[str, float]]:
        """Sizes, and bytes swapped since the machine started; the latter empty without swap."""
        sizes = {name: float(int(kib) << 10) for name, kib in _MEMINFO.findall(self._meminfo.read())}
        total, swap = sizes["MemTotal"], sizes["SwapTotal"]
        found = {"memory.available": min(sizes["MemAvailable"], total), "memory.total": total}
        found |= {"swap.used": swap - sizes["SwapFree"], "swap.total": swap}
        # The long file of counters is not read where nothing can be swapped.
        if not swap:
            return found, {}
        pages = {name: int(count) for name, count in _SWAPPED.findall(self._vmstat.read())}
        return found, {"swap.in": pages["pswpin"] * _PAGE_BYTES, "swap.out": pages["pswpout"] * _PAGE_BYTES}

    def free_bytes(self, now_s: float) -> float:
        """memory.available. Raises OSError and KeyError."""
        return int(dict(_MEMINFO.findall(self._meminfo.read()))["MemAvailable"]) << 10

    def close(self) -> None:
        self._meminfo.close()
        self._vmstat.close()


def _from_psutil() -> tuple[dict[str, float], dict[str, float]]:
    memory = psutil.virtual_memory()
    with warnings.catch_warnings():  # psutil warns where the counters are missing, and says 0
        warnings.simplefilter("ignore", RuntimeWarning)
        swap = psutil.swap_memory()
    found = {"memory.available": float(memory.available), "memory.total": float(memory.total)}
    found |= {"swap.used": float(swap.used), "swap.total": float(swap.total)}
    return found, {"swap.in": float(swap.sin), "swap.out": float(swap.sout)} if swap.total else {}


class CgroupMemory:
    """cgroup.limit, .usage, .reclaimable, .headroom (B) of the tightest group on this process's path, v1 or v2."""

    name = "cgroup"

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> None:
        self._groups = ProcessGroups(_process_folder(proc, pid), cgroups)

    def read(self, now_s: float) -> Reading:
        try:
            tightest = self._groups.tightest(now_s)
        except (OSError, ValueError) as error:
            return Reading(now_s, {}, {self.name: f"no cgroup can be read ({reason(error)})"})
        if tightest is None:
            limitable = bool(self._groups.levels)
            why = "no group on this process's path has a limit" if limitable else "no memory controller"
            return Reading(now_s, {}, {self.name: why})
        found = ("limit", "usage", "reclaimable", "headroom")
        # One unreadable file of a group is said beside the measures of the others.
        broken = {f"cgroup.{path.name}": reason(error) for path, error in self._groups.faults.items()}
        measures = {f"cgroup.{name}": Measure(getattr(tightest, name), "B", now_s) for name in found}
        return Reading(now_s, measures, broken)

    def free_bytes(self, now_s: float) -> float:
        """cgroup.headroom, without end where nothing is limited. Raises OSError."""
        # Where nothing is limited, the machine's own memory decides alone.
        tightest = self._groups.tightest(now_s)
        return math.inf if tightest is None else tightest.headroom

    def close(self) -> None:
        self._groups.close()


class PressureStall:
    """psi.<memory|io>.<some|full> (share of the time since the last sample in which some or all tasks stalled) and
    .some_avg10, .full_avg10 (the kernel's own average): of the machine, and, as psi.cgroup.*, of the own v2 group."""

    name = "psi"

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> None:
        self._groups = ProcessGroups(_process_folder(proc, pid), cgroups)
        self._machine = {f"psi.{kind}": PolledFile(proc / "pressure" / kind) for kind in ("memory", "io")}
        self._group_files: dict[str, PolledFile] = {}
        self._rates: dict[str, Rates] = {}

    def read(self, now_s: float) -> Reading:
        missing: Missing = {}
        try:
            if self._groups.refresh(now_s):
                self._open_group_files()
            if not self._group_files:
                missing["psi.cgroup"] = "no v2 group with pressure files; the machine's own count"
        except (OSError, ValueError) as error:
            missing["psi.cgroup"] = f"no cgroup can be read ({reason(error)})"
        measures: Measures = {}
        for prefix, file in (self._machine | self._group_files).items():
            self._read_one(now_s, prefix, file, measures, missing)
        return Reading(now_s, measures, missing)

    def _open_group_files(self) -> None:
        for file in self._group_files.values():
            file.close()
        groups = self._groups.folders.get("v2", [])
        # The root of all groups is the machine; a container's own root has events.
        is_group = len(groups) > 1 or (len(groups) == 1 and (groups[0] / "cgroup.events").is_file())
        files = {kind: groups[0] / f"{kind}.pressure" for kind in ("memory", "io")} if is_group else {}
        self._group_files = {f"psi.cgroup.{kind}": PolledFile(path) for kind, path in files.items() if path.is_file()}
        # Counts of the old group are none of the new one's.
        self._rates = {prefix: rates for prefix, rates in self._rates.items() if prefix in self._machine}

    def _read_one(self, now_s: float, prefix: str, file: PolledFile, measures: Measures, missing: Missing) -> None:
        try:
            found = _STALLS.findall(text := file.read())
        except OSError as error:
            # Many distributions compile PSI in and leave it off.
            missing[prefix] = f"{reason(error)}; Linux says it with CONFIG_PSI (boot with psi=1)"
            return
        if not found:
            missing[prefix] = f"{garbage(file.path, text)}: it is no pressure file"
        for kind, average, _ in found:
            measures[f"{prefix}.{kind}_avg10"] = Measure(min(1.0, float(average) / 100), "share", now_s)
        # The kernel counts microseconds, so that their growth per second is a share of the time.
        totals = {f"{prefix}.{kind}": float(total_us) * 1e-6 for kind, _, total_us in found}
        self._rates.setdefault(prefix, Rates()).add(now_s, totals, "share", measures, missing)

    def close(self) -> None:
        self._groups.close()
        for file in (*self._machine.values(), *self._group_files.values()):
            file.close()


class ProcessUse:
    """process.private (B: resident and not file-backed), process.faults (major faults, 1/s), process.read (B/s from
    storage), of this process or of `pid`; process.refaults (pages that this machine dropped and needs again, 1/s) while
    there are faults: a model's first touch of its files faults, too, and is no pressure."""

    name = "process"

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> None:
        folder = _process_folder(proc, pid)
        self._stat, self._io, self._statm = (PolledFile(folder / name) for name in ("stat", "io", "statm"))
        self._vmstat = PolledFile(proc / "vmstat")
        self._fault_rates, self._read_rates, self._refault_rates = Rates(), Rates(), Rates()

    def read(self, now_s: float) -> Reading:
        measures: Measures = {}
        missing: Missing = {}
        # In this order, for pages that are read again are counted only while there are faults.
        looks = {
            "process.private": self._add_private,
            "process.faults": self._add_faults,
            "process.read": self._add_read,
            "process.refaults": self._add_refaults,
        }
        for name, add in looks.items():
            # A file that cannot be read, or holds something else, costs what it tells and nothing else.
            try:
                add(now_s, measures, missing)
            except (OSError, ValueError, IndexError) as error:
                missing[name] = reason(error)
        return Reading(now_s, measures, missing)

    def _add_private(self, now_s: float, measures: Measures, missing: Missing) -> None:
        _, *pages = self._statm.read().split()[:3]
        resident, shared = (count(one, self._statm.path) for one in pages)
        measures["process.private"] = Measure((resident - shared) * _PAGE_BYTES, "B", now_s)

    def _add_faults(self, now_s: float, measures: Measures, missing: Missing) -> None:
        # proc(5): field 12; the name in field 2 may hold spaces and brackets.
        faults = count(self._stat.read().rpartition(")")[2].split()[9], self._stat.path)
        self._fault_rates.add(now_s, {"process.faults": faults}, "1/s", measures, missing)

    def _add_read(self, now_s: float, measures: Measures, missing: Missing) -> None:
        if (found := _READ.search(text := self._io.read())) is None:
            raise garbage(self._io.path, text)
        self._read_rates.add(now_s, {"process.read": int(found[1])}, "B/s", measures, missing)

    def _add_refaults(self, now_s: float, measures: Measures, missing: Missing) -> None:
        # Without faults of this process, what the machine reads again is the business of others.
        faults = measures.get("process.faults")
        if faults is None:
            return
        if not faults.value:
            # The next count must not be held against one of long ago: it would be a rate over the calm between.
            self._refault_rates = Rates()
        elif counts := _REFAULTS.findall(self._vmstat.read()):
            total = {"process.refaults": sum(map(int, counts))}
            self._refault_rates.add(now_s, total, "1/s", measures, missing)
        else:
            missing["process.refaults"] = "this kernel does not count them"

    def close(self) -> None:
        for file in (self._stat, self._io, self._statm, self._vmstat):
            file.close()


class Sensors:
    """Several sensors read together, as one reading; a sensor that fails is a reason in it."""

    def __init__(self, sensors: Iterable[Sensor]) -> None:
        self.sensors = tuple(sensors)

    def now(self) -> float:
        """The clock's time in seconds."""
        return time.monotonic()

    def read(self, now_s: float | None = None) -> Reading:
        """One sample of all; now_s: the time it is given, None: the clock's."""
        now_s = self.now() if now_s is None else now_s
        # Later sensors win where two have one name, so that the order of the list is part of the meaning.
        return merged(now_s, [_guarded(sensor, now_s) for sensor in self.sensors])

    def is_free(self, floors: Mapping[str, float], now_s: float) -> bool:
        """Whether each of the sensors named sees so many bytes free, by its `free_bytes(now_s)`: a glance, at a fifth
        of the price of a sample. False where one cannot tell."""
        found = {sensor.name: sensor for sensor in self.sensors if sensor.name in floors}
        try:
            return all(found[name].free_bytes(now_s) >= floor for name, floor in floors.items())  # type: ignore[attr-defined]
        except Exception:  # a sample will say why
            return False

    def close(self) -> None:
        for sensor in self.sensors:
            sensor.close()


def os_sensors(proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> list[Sensor]:
    """One of each of OS_SENSORS; pid: of another process on this machine, None: this one."""
    return [make(proc, cgroups, pid) for make in OS_SENSORS]


# What is read of every model: a new sensor is a class with this signature and its name in this list. Its measures reach
# the policy by a signal in `signals`, or, without one, as `<name>.pressure`.
OS_SENSORS: list[Callable[[Path, Path, int | None], Sensor]] = [MachineMemory, CgroupMemory, PressureStall, ProcessUse]


def _guarded(sensor: Sensor, now_s: float) -> Reading:
    try:
        return sensor.read(now_s)
    except Exception as error:  # a sensor must never stop a model
        return Reading(now_s, {}, {sensor.name: f"{type(error).__name__}: {error}"})


def _process_folder(proc: Path, pid: int | None) -> Path:
    return proc / ("self" if pid is None else str(pid))
