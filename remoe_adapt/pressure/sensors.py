"""The operating system's sensors: memory and swap, cgroup limits, pressure stalls, this process. No torch.

Each can be used alone. One that cannot work here gives a reading without measures that says why; it never raises.
A sample of all of them costs some 0.2 ms.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

import psutil

from remoe_adapt.pressure.cgroups import OwnGroups
from remoe_adapt.pressure.files import PolledFile, Rates, reason
from remoe_adapt.pressure.reading import Measure, Reading, merged

PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
FIRST_SAMPLE = "a rate needs a second sample"
_SWAP_AGAIN_S = 10.0
_STALL_KINDS = ("some", "full")
_MEMINFO = ("MemTotal", "MemAvailable")


class Sensor(Protocol):
    """name: the first word of its measures."""

    name: str

    def read(self, now_s: float) -> Reading:
        """What it says now; `now_s` is the time of the reading, in seconds on a clock of the caller's."""
        ...

    def close(self) -> None:
        """Let go of files; a later `read` opens them again."""
        ...


class MachineMemory:
    """memory.available, memory.total (B); swap.used, swap.total (B), swap.in, swap.out (B/s), all of the machine.

    psutil's figures: they know nothing of cgroups, and count file pages that somebody maps as available. Where the
    kernel says the same in two lines, those are read, at a third of the price.
    """

    name = "memory"

    def __init__(self) -> None:
        self._file, self._rates = PolledFile(PROC / "meminfo"), Rates()
        self._swapless_until_s: float | None = None

    def read(self, now_s: float) -> Reading:
        available, total = self._available_and_total()
        found = {"memory.available": float(available), "memory.total": float(total)}
        if self._swapless_until_s is None or not now_s < self._swapless_until_s <= now_s + _SWAP_AGAIN_S:
            with warnings.catch_warnings():  # psutil warns where the counters are missing, and says 0
                warnings.simplefilter("ignore", RuntimeWarning)
                self._swap = psutil.swap_memory()
            # The dearest figure of all; a machine without swap rarely gets some.
            self._swapless_until_s = now_s + _SWAP_AGAIN_S if self._swap.total == 0 else None
        swap = self._swap
        found |= {"swap.used": float(swap.used), "swap.total": float(swap.total)}
        measures = {name: Measure(value, "B", now_s) for name, value in found.items()}
        if swap.total == 0:
            return Reading(now_s, measures, dict.fromkeys(("swap.in", "swap.out"), "this machine has no swap"))
        rates = self._rates.per_second(now_s, {"swap.in": swap.sin, "swap.out": swap.sout})
        if rates is None:
            return Reading(now_s, measures, dict.fromkeys(("swap.in", "swap.out"), FIRST_SAMPLE))
        return Reading(now_s, measures | {name: Measure(rate, "B/s", now_s) for name, rate in rates.items()})

    def _available_and_total(self) -> tuple[int, int]:
        try:
            text = self._file.read()
            total, available = (int(text.partition(f"{name}:")[2].split(None, 1)[0]) << 10 for name in _MEMINFO)
        except (OSError, ValueError, IndexError):  # another system, or a kernel without MemAvailable
            memory = psutil.virtual_memory()
            return memory.available, memory.total
        return min(available, total), total

    def close(self) -> None:
        self._file.close()


class CgroupMemory:
    """cgroup.limit, .usage, .reclaimable, .headroom (B) of the tightest group on this process's path, v1 or v2."""

    name = "cgroup"

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> None:
        self._groups = OwnGroups(_process_folder(proc, pid), cgroups)

    def read(self, now_s: float) -> Reading:
        try:
            tightest = self._groups.tightest()
        except OSError as error:
            return Reading(now_s, {}, {self.name: f"no cgroups here ({reason(error)})"})
        if tightest is None:
            why = (
                "no group on this process's path has a limit" if self._groups.has_controller else "no memory controller"
            )
            return Reading(now_s, {}, {self.name: why})
        found = ("limit", "usage", "reclaimable", "headroom")
        return Reading(now_s, {f"cgroup.{name}": Measure(getattr(tightest, name), "B", now_s) for name in found})

    def close(self) -> None:
        self._groups.close()


class PressureStall:
    """psi.<memory|io>.<some|full> (share of the time since the last sample in which some or all tasks stalled) and
    .some_avg10, .full_avg10 (the kernel's own average): of the machine, and, as psi.cgroup.*, of the own v2 group."""

    name = "psi"

    def __init__(self, proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> None:
        self._groups = OwnGroups(_process_folder(proc, pid), cgroups)
        self._machine = {f"psi.{kind}": PolledFile(proc / "pressure" / kind) for kind in ("memory", "io")}
        self._own: dict[str, PolledFile] = {}
        self._rates: dict[str, Rates] = {}

    def read(self, now_s: float) -> Reading:
        missing: dict[str, str] = {}
        try:
            if self._groups.follow():
                self._find_own()
            if not self._own:
                missing["psi.cgroup"] = "no v2 group with pressure files; the machine's own count"
        except OSError as error:
            missing["psi.cgroup"] = f"no cgroups here ({reason(error)})"
        measures: dict[str, Measure] = {}
        for prefix, file in (self._machine | self._own).items():
            try:
                self._read_one(prefix, file.read(), now_s, measures, missing)
            except OSError as error:
                missing[prefix] = f"{reason(error)}; Linux says it with CONFIG_PSI (boot with psi=1)"
        return Reading(now_s, measures, missing)

    def _find_own(self) -> None:
        for file in self._own.values():
            file.close()
        folder = next(iter(self._groups.folders.get("v2", [])), None)
        files = {} if folder is None else {kind: folder / f"{kind}.pressure" for kind in ("memory", "io")}
        self._own = {f"psi.cgroup.{kind}": PolledFile(path) for kind, path in files.items() if path.is_file()}
        self._rates = {prefix: rates for prefix, rates in self._rates.items() if prefix in self._machine}

    def _read_one(
        self, prefix: str, text: str, now_s: float, measures: dict[str, Measure], missing: dict[str, str]
    ) -> None:
        totals: dict[str, float] = {}
        for line in text.splitlines():
            kind, *pairs = line.split()
            values = dict(pair.split("=", 1) for pair in pairs)
            if kind in _STALL_KINDS:
                measures[f"{prefix}.{kind}_avg10"] = Measure(float(values["avg10"]) / 100, "share", now_s)
                totals[kind] = float(values["total"]) * 1e-6  # microseconds
        shares = self._rates.setdefault(prefix, Rates()).per_second(now_s, totals)
        for kind in totals:
            if shares is None:
                missing[f"{prefix}.{kind}"] = FIRST_SAMPLE
            else:
                measures[f"{prefix}.{kind}"] = Measure(min(1.0, shares[kind]), "share", now_s)

    def close(self) -> None:
        self._groups.close()
        for file in (*self._machine.values(), *self._own.values()):
            file.close()


class ProcessUse:
    """process.private (B: resident and not file-backed), process.faults (major faults, 1/s), process.read (B/s from
    storage), of this process or of `pid`."""

    name = "process"

    def __init__(self, proc: Path = PROC, pid: int | None = None) -> None:
        folder = _process_folder(proc, pid)
        self._stat, self._io, self._statm = (PolledFile(folder / name) for name in ("stat", "io", "statm"))
        self._fault_rates, self._read_rates = Rates(), Rates()
        self._page_bytes = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

    def read(self, now_s: float) -> Reading:
        measures: dict[str, Measure] = {}
        missing: dict[str, str] = {}
        try:
            _, resident, shared = self._statm.read().split()[:3]
            measures["process.private"] = Measure((int(resident) - int(shared)) * self._page_bytes, "B", now_s)
        except (OSError, ValueError) as error:
            missing["process.private"] = _why(error)
        rates: tuple[tuple[str, str, Rates, Callable[[], float]], ...] = (
            ("process.faults", "1/s", self._fault_rates, self._count_faults),
            ("process.read", "B/s", self._read_rates, self._count_read),
        )
        for name, unit, keeper, count in rates:
            try:
                rate = keeper.per_second(now_s, {name: count()})
            except (OSError, ValueError, IndexError, KeyError) as error:
                missing[name] = _why(error)
                continue
            if rate is None:
                missing[name] = FIRST_SAMPLE
            else:
                measures[name] = Measure(rate[name], unit, now_s)
        return Reading(now_s, measures, missing)

    def _count_faults(self) -> float:
        # proc(5): field 12; the name in field 2 may hold spaces and brackets.
        return float(self._stat.read().rpartition(")")[2].split()[9])

    def _count_read(self) -> float:
        return float(dict(line.split(": ", 1) for line in self._io.read().splitlines())["read_bytes"])

    def close(self) -> None:
        for file in (self._stat, self._io, self._statm):
            file.close()


class Sensors:
    """Several sensors read together, as one reading; a sensor that fails is a reason in it."""

    def __init__(self, sensors: Iterable[Sensor], clock: Callable[[], float] = time.monotonic) -> None:
        self.sensors, self._clock = tuple(sensors), clock

    def read(self, now_s: float | None = None) -> Reading:
        """One sample of all; now_s: the time it is given, None: the clock's."""
        now_s = self._clock() if now_s is None else now_s
        return merged(now_s, [_guarded(sensor, now_s) for sensor in self.sensors])

    def close(self) -> None:
        for sensor in self.sensors:
            sensor.close()


def os_sensors(proc: Path = PROC, cgroups: Path = CGROUPS, pid: int | None = None) -> list[Sensor]:
    """All sensors of the operating system; pid: of another process on this machine, None: this one."""
    return [
        MachineMemory(),
        CgroupMemory(proc, cgroups, pid),
        PressureStall(proc, cgroups, pid),
        ProcessUse(proc, pid),
    ]


def _guarded(sensor: Sensor, now_s: float) -> Reading:
    try:
        return sensor.read(now_s)
    except Exception as error:  # a sensor must never stop a model
        return Reading(now_s, {}, {sensor.name: f"{type(error).__name__}: {error}"})


def _process_folder(proc: Path, pid: int | None) -> Path:
    return proc / ("self" if pid is None else str(pid))


def _why(error: Exception) -> str:
    return reason(error) if isinstance(error, OSError) else f"{type(error).__name__}: {error}"
