"""The process that is watched: found by its port or by a file that it maps, followed through restarts, read by sensors.

What a process maps is what Linux says in /proc/PID/maps.
"""

from __future__ import annotations

import abc
import ipaddress
import os
import re
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

from remoe_adapt._support import printable
from remoe_adapt.engines.llamacpp.client import Address
from remoe_adapt.errors import ConfigError
from remoe_adapt.pressure import CGROUPS, PROC, Reading, Sensors, merged, os_sensors

# Asking every process what it maps reads a long file of each, so nobody is looked for more often than this.
_LOOK_S = 2.0
# No process has this number, so whatever is asked of it is missing, and never that of our own process.
_NOBODY = 0
# begin-end of the addresses, rights, offset in the file, device, inode, name; of anonymous memory, no name.
_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (?P<device>[0-9a-f]+:[0-9a-f]+) (?P<inode>[0-9]+)(?: +(?P<name>.+)| *)",
    re.ASCII,
)


class WatchedProcess(abc.ABC):
    """A process, through its restarts. pid: given by hand, it is never looked for. Raises ConfigError when there is no
    such process."""

    def __init__(self, pid: int | None) -> None:
        self._fixed = pid is not None
        self.why_unknown = ""
        self._process: psutil.Process | None = None
        if pid is not None:
            try:
                self._process = psutil.Process(pid)
            except (psutil.NoSuchProcess, ValueError, OverflowError) as error:  # of numbers that no process has
                raise ConfigError(f"no process {pid} runs here: give the server's --pid, or leave it out.") from error

    @property
    def pid(self) -> int | None:
        """The number of the process that runs now; None when none is known."""
        return self._process.pid if self.alive() and self._process is not None else None

    @property
    def known(self) -> bool:
        """Whether a restart would be seen here."""
        return self._process is not None

    @property
    def folder(self) -> Path | None:
        """The working folder of the process, to which paths that it names are relative."""
        try:
            return None if self._process is None else Path(self._process.cwd())
        except (psutil.Error, OSError):
            return None

    def alive(self) -> bool:
        """Whether the process found last still runs; another one under the same number is not it. Costs 50 us."""
        try:
            process = self._process
            # A zombie keeps its number until its parent has asked for it, and serves nobody.
            return process is not None and process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def find(self) -> bool:
        """Look for it where it does not run; True when one is found that is another than before."""
        if self._fixed or self.alive():
            return False
        before, self._process = self._process, None
        pid = self._look()
        if pid is not None:
            try:
                self._process = psutil.Process(pid)
            except psutil.NoSuchProcess:
                self.why_unknown = "the server has just ended"
        return self._process is not None and self._process != before

    @abc.abstractmethod
    def _look(self) -> int | None:
        """Its number now; None, with `why_unknown` set, when that is not known."""


class ServerProcess(WatchedProcess):
    """Whoever listens on a server's port.

    Raises ConfigError when the address is on another machine: its pressure cannot be seen from here.
    """

    def __init__(self, address: Address, pid: int | None = None) -> None:
        super().__init__(pid)
        self._address = address
        if pid is None and not _is_local(address.host):
            raise ConfigError(
                f"{address} is on another machine, whose pressure cannot be seen from here: run `remoe watch` there, "
                "or give --pid of the server on this one."
            )

    def _look(self) -> int | None:
        try:
            listening = [c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr]
        except psutil.Error as error:
            self.why_unknown = f"the system does not say who listens ({type(error).__name__}): give --pid"
            return None
        on_port = [c for c in listening if getattr(c.laddr, "port", None) == self._address.port]
        if not on_port:
            self.why_unknown = f"nothing listens on port {self._address.port}"
            return None
        # One server may listen on IPv4 and IPv6, which is one process twice.
        pids = {c.pid for c in on_port if c.pid is not None}
        if len(pids) != 1:
            reason = "several processes listen there" if pids else "it belongs to another user"
            self.why_unknown = f"who listens on port {self._address.port} cannot be told ({reason}): give --pid"
            return None
        self.why_unknown = ""
        return pids.pop()


class MappingProcess(WatchedProcess):
    """The one process that maps a file, unless `pid` is given. None is known while there are none, or several."""

    def __init__(self, path: Path, pid: int | None = None) -> None:
        super().__init__(pid)
        self._path, self._next_s = path, -1.0

    def _look(self) -> int | None:
        now_s = time.monotonic()
        if now_s < self._next_s:
            return None
        self._next_s = now_s + _LOOK_S
        try:
            pids = mapped_by(self._path)
        except ConfigError as error:
            self.why_unknown = str(error)
            return None
        several = f"several processes map {printable(self._path)} ({', '.join(map(str, pids))}): give --pid of one"
        self.why_unknown = "" if len(pids) == 1 else several if pids else f"no process maps {printable(self._path)}"
        return pids[0] if len(pids) == 1 else None


class FoundProcess(WatchedProcess):
    """A process that somebody else knows, or one by its number alone.

    look: its number now, None while it does not run.
    """

    def __init__(self, look: Callable[[], int | None] = lambda: None, pid: int | None = None) -> None:
        super().__init__(pid)
        self._number = look

    def _look(self) -> int | None:
        pid = self._number()
        self.why_unknown = "" if pid is not None else "the server does not run"
        return pid


class ServerSensors(Sensors):
    """The sensors of this machine, and of the server's process: its cgroup, stalls, faults and bytes read.

    While there is no such process, the sensors of the machine alone say something, those that anybody adds among them.
    """

    def __init__(self, process: WatchedProcess) -> None:
        super().__init__(os_sensors(PROC, CGROUPS, _NOBODY))
        self._process, self._sensed_pid = process, _NOBODY

    def read(self, now_s: float | None = None) -> Reading:
        self._process.find()
        pid = self._process.pid or _NOBODY
        if pid != self._sensed_pid:
            # New sensors, since the counters of one process must not be held against those of another.
            self.close()
            self.sensors, self._sensed_pid = tuple(os_sensors(PROC, CGROUPS, pid)), pid
        reading = super().read(now_s)
        if pid != _NOBODY:
            return reading
        why = self._process.why_unknown or "the server does not run"
        return merged(reading.time_s, [reading, Reading(reading.time_s, {}, dict.fromkeys(("cgroup", "process"), why))])


def mapped_spans(pid: int, path: Path, proc: Path = PROC) -> list[tuple[int, int]]:
    """(begin, end) in bytes of every part of the file that the process maps.

    Raises OSError when the process has ended, or is another user's, ConfigError when the file is gone.
    """
    try:
        facts, name = path.stat(), str(path.resolve())
    except OSError as error:
        raise ConfigError(f"{printable(path)} cannot be found any more ({error.strerror}): put it back.") from error
    place = (f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}", str(facts.st_ino))
    spans = []
    for line in (proc / str(pid) / "maps").read_text(errors="replace").split("\n"):
        if not (found := _LINE.fullmatch(line)):
            continue
        begin, end, offset = (int(number, 16) for number in found.groups()[:3])
        # Some stacked file systems show the device below them, then the name tells.
        if (found["device"], found["inode"]) == place or found["name"] == name:
            spans.append((offset, offset + end - begin))
    return spans


def covers(spans: Sequence[tuple[int, int]], wanted: Sequence[tuple[int, int]]) -> bool:
    """Whether each wanted span lies inside one of `spans`."""
    return all(any(begin <= first and last <= end for begin, end in spans) for first, last in wanted)


def mapped_by(path: Path) -> list[int]:
    """Processes that map any of the file, as far as this user may know. Raises ConfigError when it is gone."""
    found = []
    for pid in psutil.pids():
        try:
            if mapped_spans(pid, path):
                found.append(pid)
        except OSError:
            continue
    return found


def _is_local(host: str) -> bool:
    local = {address.address.partition("%")[0] for found in psutil.net_if_addrs().values() for address in found}
    try:
        names = {str(info[4][0]) for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"{host!r} is no host that is known here ({error}): give the server's address.") from error
    return all(name in local or ipaddress.ip_address(name).is_loopback for name in names)
