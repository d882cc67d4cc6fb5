"""Which processes have a file memory-mapped, and how much of it: what Linux says in /proc/PID/maps."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from remoe_adapt.errors import ConfigError
from remoe_adapt.pressure.sensors import PROC
from remoe_adapt.runtime.llama_process import WatchedProcess
from remoe_adapt.untrusted import printable

_LOOK_S = 2.0
# begin-end of the addresses, rights, offset in the file, device, inode, name; of anonymous memory, no name.
_LINE = re.compile(
    r"([0-9a-f]+)-([0-9a-f]+) \S+ ([0-9a-f]+) (?P<device>[0-9a-f]+:[0-9a-f]+) (?P<inode>[0-9]+)(?: +(?P<name>.+)| *)",
    re.ASCII,
)


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


def mapped_by(path: Path, proc: Path = PROC) -> list[int]:
    """Processes that map any of the file, as far as this user may know. Raises ConfigError when it is gone."""
    found = []
    for pid in psutil.pids():
        try:
            if mapped_spans(pid, path, proc):
                found.append(pid)
        except OSError:
            continue
    return found


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
