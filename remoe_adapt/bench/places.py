"""Where a benchmark of a whole model finds model, family and room, and how it ends when it is told to."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from remoe_adapt.errors import ConfigError
from remoe_adapt.family import Family
from remoe_adapt.record import load_with_tokenizer
from remoe_adapt.shipped import example_folder


def chosen_model(model: str | Path | None) -> str | Path:
    """The model asked for, or the shipped one. Raises ConfigError where that is not beside the package."""
    if model is None and not (example_folder() / "config.json").is_file():
        raise ConfigError("the shipped model is not beside this package: clone the repository, or give --model")
    return example_folder() if model is None else model


def work_folder(work: Path | None) -> Path:
    """The folder for what is made for a run: the one asked for, or one in the user's cache."""
    return work or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe" / "bench"


def checked_family(model: str | Path, family: str | Path | None) -> str | None:
    """Folder or hub id of the family, checked on the model as it is stored; None where there is none.

    family: None: the one in the model's folder. Raises as `Family.load` and `Family.check`.
    """
    place = family
    if place is None:
        place = Path(model) / "family"
        if not (place / "family.json").is_file():
            return None
    Family.load(place).check(load_with_tokenizer(model, device="cpu")[0])
    return str(Path(place).resolve()) if Path(place).is_dir() else str(place)


@contextmanager
def terminated_as_interrupted() -> Iterator[None]:
    """A polite kill cleans up as Ctrl-C does."""
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
