"""This process's control groups: where they are, and the tightest memory limit on the path to the root.

v1 and v2 may both be mounted (a hybrid machine): memory limits in one, pressure files in the other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from remoe_adapt.pressure.proc_files import PolledFile, count, garbage

# How often a process is asked which group it is in: that changes rarely, and the answer is long.
_REFRESH_S = 1.0
# Longer ones the kernel refuses, and looking for all their ends would take for ever.
_LONGEST_PATH = 4096
# "No limit" of v1 is the largest page-aligned 64-bit number.
UNLIMITED_BYTES = 1 << 60


@dataclass(frozen=True, slots=True)
class Usage:
    """limit, usage and reclaimable in bytes: of a group and all below it. reclaimable: file cache that is inactive or
    that nobody maps; the kernel drops it before it kills. folder: the group's."""

    folder: Path
    limit: int
    usage: int
    reclaimable: int

    @property
    def headroom(self) -> int:
        """Bytes that may still be taken; never below 0."""
        return max(0, self.limit - self.usage + self.reclaimable)


def roots(cgroups: Path) -> dict[str, Path]:
    """Mount points below `cgroups` by version, those that exist; on a hybrid machine v2 is one level down."""
    unified = cgroups / "unified"
    candidates = {"v1": cgroups / "memory", "v2": unified if unified.is_dir() else cgroups}
    return {version: root for version, root in candidates.items() if root.is_dir()}


def groups_of(membership: str, cgroups: Path) -> dict[str, list[Path]]:
    """Folders from this process's group up to its mount point, by version, from the text of /proc/self/cgroup.

    In a container the mount point may be a group below the root that the path still starts with: the longest end of the
    path that exists counts.
    """
    mounted = roots(cgroups)
    found: dict[str, list[Path]] = {}
    for line in membership.splitlines():
        _, *fields = line.split(":", 2)
        if len(fields) != 2:
            continue
        controllers, path = fields
        version = "v2" if controllers == "" else "v1" if "memory" in controllers.split(",") else ""
        if version not in mounted or len(path) > _LONGEST_PATH:
            continue
        root, parts = mounted[version], [part for part in path.split("/") if part not in ("", "..")]
        ends = (root.joinpath(*parts[start:]) for start in range(len(parts) + 1))
        innermost = next((folder for folder in ends if folder.is_dir()), root)
        found[version] = [
            innermost,
            *(parent for parent in innermost.parents if parent == root or root in parent.parents),
        ]
    return found


class _Level:
    """One group's memory files, of either version."""

    def __init__(self, folder: Path, version: str) -> None:
        v1 = version == "v1"
        self.folder = folder
        names = ("inactive_file", "active_file", "mapped_file" if v1 else "file_mapped")
        prefix = "total_" if v1 else ""
        self._counts = [re.compile(rf"^{prefix}{name} (\d{{1,19}})$", re.MULTILINE | re.ASCII) for name in names]
        limits = ("memory.limit_in_bytes",) if v1 else ("memory.max", "memory.high")
        self._limits = [PolledFile(folder / name) for name in limits if (folder / name).is_file()]
        self._usage = PolledFile(folder / ("memory.usage_in_bytes" if v1 else "memory.current"))
        self._stat = PolledFile(folder / "memory.stat")

    def read(self, faults: dict[Path, Exception]) -> Usage | None:
        """None without a limit. What cannot be read of one file goes to `faults`, and the others count."""
        # memory.high throttles before memory.max kills, so the lower of the two is the limit that is felt.
        limit = min((self._limit(file, faults) for file in self._limits), default=UNLIMITED_BYTES)
        if limit >= UNLIMITED_BYTES:
            return None
        try:
            usage = count(self._usage.read().strip(), self._usage.path)
        except (OSError, ValueError) as error:
            faults[self._usage.path] = error
            return None
        # Mapped pages are in use: taking them away is what thrashing means.
        inactive, active, mapped = self._cached(faults)
        return Usage(self.folder, limit, usage, min(usage, inactive + max(0, active - mapped)))

    def _limit(self, file: PolledFile, faults: dict[Path, Exception]) -> int:
        try:
            text = file.read().strip()
            return UNLIMITED_BYTES if text == "max" else count(text, file.path)
        except (OSError, ValueError) as error:
            faults[file.path] = error
            return UNLIMITED_BYTES

    def _cached(self, faults: dict[Path, Exception]) -> list[int]:
        """Bytes of file cache: inactive, active, mapped; 0 where that cannot be read, which errs on the safe side."""
        try:
            found = [one.search(text := self._stat.read()) for one in self._counts]
            if not any(found):
                raise garbage(self._stat.path, text)
        except (OSError, ValueError) as error:
            faults[self._stat.path] = error
            return [0, 0, 0]
        return [0 if one is None else int(one[1]) for one in found]

    def close(self) -> None:
        for file in (*self._limits, self._usage, self._stat):
            file.close()


class ProcessGroups:
    """Follows the process when it is moved to another group."""

    def __init__(self, proc: Path, cgroups: Path) -> None:
        self._cgroups = cgroups
        self._membership = PolledFile(proc / "cgroup")
        self._seen: str | None = None
        self._looked_s: float | None = None
        self.folders: dict[str, list[Path]] = {}
        self.faults: dict[Path, Exception] = {}
        # Groups whose memory somebody may limit; none where there is no memory controller.
        self.levels: list[_Level] = []

    def refresh(self, now_s: float) -> bool:
        """Look where the process is, once a second; True when that has changed. Raises OSError without cgroups."""
        # A clock that went back asks again, instead of never.
        if self._looked_s is not None and self._looked_s <= now_s < self._looked_s + _REFRESH_S:
            return False
        membership = self._membership.read()
        if membership == self._seen:
            self._looked_s = now_s
            return False
        folders = groups_of(membership, self._cgroups)
        levels = [
            _Level(folder, version)
            for version, path in folders.items()
            for folder in _binding(path)
            if (folder / ("memory.limit_in_bytes" if version == "v1" else "memory.max")).is_file()
        ]
        # Files of the old group may be gone, and would be read as if it were ours.
        self.close()
        self._seen, self.folders, self.levels, self._looked_s = membership, folders, levels, now_s
        return True

    def tightest(self, now_s: float) -> Usage | None:
        """The group of least headroom on the path, of those that can be read; None when none of them has a limit.

        `faults` says which files could not be read, and why. Raises OSError and ValueError when no group can be read.
        """
        self.refresh(now_s)
        tightest = self._tightest()
        if tightest is None and self.faults:  # its group may be gone: it has been moved since
            self.close()
            self.refresh(now_s)
            tightest = self._tightest()
        if tightest is None and self.faults:
            raise next(iter(self.faults.values()))
        return tightest

    def _tightest(self) -> Usage | None:
        self.faults = {}
        limited = [usage for level in self.levels if (usage := level.read(self.faults)) is not None]
        return min(limited, key=lambda usage: usage.headroom, default=None)

    def close(self) -> None:
        for level in self.levels:
            level.close()
        self.levels, self._seen, self._looked_s = [], None, None
        self._membership.close()


def _binding(folders: list[Path]) -> list[Path]:
    """The groups whose limit counts for the first one: v1 parents only where use_hierarchy is on (always, lately)."""
    binding = folders[:1]
    for folder in folders[1:]:
        try:
            if (folder / "memory.use_hierarchy").read_bytes().strip() == b"0":
                break
        except OSError:  # v2, and kernels that have no other way
            pass
        binding.append(folder)
    return binding
