"""Around every benchmark: where it finds model, family and room, how it ends when it is told to, what a figure is held
to, and what it needs beside it in a CSV (machine, versions, commit)."""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import os
import platform
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from remoe_adapt._support import replacing, usable_cores
from remoe_adapt.checkpoints import load_with_tokenizer
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation import commit, example_folder
from remoe_adapt.family import Family

REPO_ROOT = Path(__file__).resolve().parents[3]


def environment() -> dict[str, str]:
    """Date (UTC), machine, cores usable, torch threads, versions and commit ("unknown" outside a clone)."""
    # A figure of one version says nothing of the next: all three have changed what a step costs.
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
    # Rows under a header of other columns could not be read any more.
    if not lines or lines[0] != list(row):
        lines = [list(row)]
    lines.append([f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as draft, draft.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(lines)


def bar(
    title: str, value: float | None, target: float, *, at_most: bool = True, failed: bool = False
) -> dict[str, Any]:
    """What a figure is held to: `{bar, value, target, at_most, met}`; met is None where it was not measured.

    at_most: the target is the most that it may be, else the least. failed: it is missed, whatever the value.
    """
    met = None if value is None else value <= target if at_most else value >= target
    return {"bar": title, "value": value, "target": target, "at_most": at_most, "met": not failed and met}


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def chosen_model(model: str | Path | None) -> str | Path:
    """The model asked for, or the shipped one. Raises ConfigError where that is not beside the package."""
    if model is None and not (example_folder() / "config.json").is_file():
        raise ConfigError("the shipped model is not beside this package: clone the repository, or give --model")
    return example_folder() if model is None else model


def work_folder(work: str | Path | None) -> Path:
    """The folder for what is made for a run: the one asked for, or one in the user's cache."""
    if work:
        return Path(work)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe" / "bench"


def checked_family(model: str | Path, family: str | Path | None) -> str | None:
    """Folder or hub id of the family, checked on the model as it is stored; None where there is none.

    family: None: the one in the model's folder. Raises as `Family.load` and `Family.check`.
    """
    place = family
    if place is None:
        place = Path(model) / "family"
        if not (place / "family.json").is_file():
            return None
    # Here, because the widened copy has other names and types; it is used by force afterwards.
    Family.load(place).check(load_with_tokenizer(model, device="cpu")[0])
    # Whole, so that it does not depend on the folder that a process runs in.
    return str(Path(place).resolve()) if Path(place).is_dir() else str(place)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does."""
    # Python lets only the main thread set handlers; a test may run a benchmark in another.
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
