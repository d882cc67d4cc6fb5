"""Fake trees of /proc and /sys/fs/cgroup, for machines that are not this one."""

from __future__ import annotations

from pathlib import Path

PSI = "{kind} avg10={avg10:.2f} avg60=0.00 avg300=0.00 total={total_us}\n"


def psi(some_us: int, full_us: int = 0, some_avg10: float = 0.0) -> str:
    """A pressure file: microseconds stalled since the machine started, and percent of the last ten seconds."""
    some = PSI.format(kind="some", avg10=some_avg10, total_us=some_us)
    return some + PSI.format(kind="full", avg10=0.0, total_us=full_us)


def fake_machine(root: Path, membership: str, files: dict[str, str]) -> tuple[Path, Path]:
    """(proc, cgroups) below `root`, where `files` go: "proc/..." and "sys/...". membership: of /proc/self/cgroup."""
    (root / "proc/self").mkdir(parents=True)
    (root / "sys").mkdir()
    (root / "proc/self/cgroup").write_text(membership)
    write(root, files)
    return root / "proc", root / "sys"


def write(root: Path, files: dict[str, str]) -> None:
    """Files of the tree, new or changed."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


def v1_group(limit: int, usage: int, inactive: int = 0, active: int = 0, mapped: int = 0) -> dict[str, str]:
    """The memory files of a v1 group, by name."""
    stat = f"cache 1\ntotal_inactive_file {inactive}\ntotal_active_file {active}\ntotal_mapped_file {mapped}\n"
    return {"memory.limit_in_bytes": f"{limit}\n", "memory.usage_in_bytes": f"{usage}\n", "memory.stat": stat}


def v2_group(limit: int | None, usage: int, inactive: int = 0, high: int | None = None) -> dict[str, str]:
    """The memory files of a v2 group, by name."""
    stat = f"anon 1\ninactive_file {inactive}\nactive_file 0\nfile_mapped 0\n"
    return {
        "memory.max": f"{'max' if limit is None else limit}\n",
        "memory.high": f"{'max' if high is None else high}\n",
        "memory.current": f"{usage}\n",
        "memory.stat": stat,
    }


def below(folder: str, files: dict[str, str]) -> dict[str, str]:
    """The same files in a folder of the tree."""
    return {f"{folder}/{name}": text for name, text in files.items()}
