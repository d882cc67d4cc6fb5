"""A process with a limit on its memory: cgroups of Linux, version 1 or 2, whichever can be written here."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from remoe_adapt.errors import ConfigError

# With the process id behind it, so that groups of a benchmark that was killed are known as such.
_PREFIX = "remoe-bench-"
_ROOTS_V1 = (Path("/sys/fs/cgroup/memory"),)
_ROOTS_V2 = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))
# The longest that an emptied group may take until it can be removed.
_EMPTY_S = 10.0


class Group:
    """One cgroup that is there already, whatever it controls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` as a member from its first instruction on."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.folder / "cgroup.procs"), *command]

    def remove(self) -> None:
        """Its processes must have ended; their memory may take a moment to go."""
        # The kernel refuses with EBUSY until it has given back the last page and task of the group.
        deadline_s = time.monotonic() + _EMPTY_S
        while self.folder.exists():
            try:
                self.folder.rmdir()
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)


class MemoryGroup(Group):
    """One cgroup of the memory controller. Page cache that its processes are the first to need counts as theirs."""

    def __init__(self, folder: Path, version: int) -> None:
        super().__init__(folder)
        self.version = version

    def limit(self, limit_bytes: int) -> None:
        """From now on; what is over the limit is reclaimed first, and nothing is swapped.

        Raises ConfigError when it cannot be reclaimed.
        """
        try:
            # With swap, memory over the limit would be written to disk, and decode would be timed against that.
            if self.version == 1:
                _write(self.folder / "memory.swappiness", 0)
            elif (self.folder / "memory.swap.max").exists():  # absent where the kernel does not account swap
                _write(self.folder / "memory.swap.max", 0)
            _write(self.folder / ("memory.limit_in_bytes" if self.version == 1 else "memory.max"), limit_bytes)
        except OSError as error:
            raise ConfigError(
                f"{self.used_bytes() >> 20} MiB are in use and cannot be limited to {limit_bytes >> 20} MiB "
                f"({error.strerror})"
            ) from error

    def used_bytes(self) -> int:
        """Charged now: anonymous memory, page cache, kernel memory."""
        return int(_read(self.folder / ("memory.usage_in_bytes" if self.version == 1 else "memory.current")))

    def needed_bytes(self) -> int:
        """Charged once everything is given back that can be: anonymous memory, and what the kernel needs beside it."""
        with contextlib.suppress(OSError):  # some cannot be reclaimed
            if self.version == 1:
                _write(self.folder / "memory.force_empty", 0)
            else:
                _write(self.folder / "memory.reclaim", self.used_bytes())
        return self.used_bytes()

    def kills(self) -> int:
        """How often the kernel killed a member for memory."""
        text = _read(self.folder / ("memory.oom_control" if self.version == 1 else "memory.events"))
        found = re.search(r"oom_kill (\d+)", text)
        return int(found.group(1)) if found else 0


def why_no_groups() -> str | None:
    """Why memory cannot be limited here; None where it can."""
    try:
        with memory_group("probe") as group:
            group.limit(64 << 20)
    except (ConfigError, OSError) as error:
        return str(error)
    return None


@contextmanager
def memory_group(name: str) -> Iterator[MemoryGroup]:
    """A new group without a limit, removed afterwards; groups that a killed benchmark left behind go too.

    Raises ConfigError where there is no memory controller that can be written.
    """
    parent, version = _parent()
    for stale in parent.glob(f"{_PREFIX}*"):
        if not Path(f"/proc/{stale.name.removeprefix(_PREFIX).partition('-')[0]}").exists():
            MemoryGroup(stale, version).remove()
    folder = parent / f"{_PREFIX}{os.getpid()}-{name}"
    folder.mkdir()
    group = MemoryGroup(folder, version)
    try:
        yield group
    finally:
        group.remove()


def _parent() -> tuple[Path, int]:
    for root in _ROOTS_V1:
        if (root / "memory.limit_in_bytes").exists() and os.access(root, os.W_OK):
            return root, 1
    for root in _ROOTS_V2:
        # In version 2 a group has only the controllers that its parent lists here.
        controllers = root / "cgroup.subtree_control"
        if not controllers.exists() or not os.access(root, os.W_OK):
            continue
        if "memory" not in _read(controllers).split() and "memory" in _read(root / "cgroup.controllers").split():
            _write(controllers, "+memory")
        if "memory" in _read(controllers).split():
            return root, 2
    raise ConfigError("no cgroup memory controller can be written here: run as root, on Linux")


def _read(path: Path) -> str:
    return path.read_text(encoding="ascii")


def _write(path: Path, value: object) -> None:
    path.write_text(str(value), encoding="ascii")
