"""What every figure needs beside it: the machine, the versions and the commit; and the CSV that keeps them."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.evaluate import commit
from remoe_adapt.forks import usable_cores

REPO_ROOT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """Date (UTC), machine, cores usable, torch threads, versions and commit ("unknown" outside a clone)."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {usable_cores()} cores, {platform.system()}",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        **versions,
        "commit": commit() or "unknown",
    }


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Add one line to a CSV whose header is the row's keys; another header starts the file anew, in one piece."""
    lines: list[list[str]] = []
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            lines = list(csv.reader(file))
    if not lines or lines[0] != list(row):
        lines = [list(row)]
    lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)
    draft.replace(path)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
