"""What a command will write, asked before its work, so that no result is lost to a typo; and faults of the disk.

What the disk and others' files do while we read and write becomes one error of our tree, and no folder is left that was
made for nothing.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import os
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from remoe_adapt._support.untrusted import first_line, printable
from remoe_adapt.errors import ConfigError, MissingDependencyError, RemoeError, WriteError


def check_file(path: Path, option: str, suffixes: Sequence[str] = (), *, new_folders: bool = False) -> None:
    """Nothing is left behind. suffixes: of its name, any where none is given; new_folders: its writer makes them.

    Raises ConfigError, which names `option` and the remedy, when no regular file can be written at `path`.
    """
    if suffixes and path.suffix.lower() not in suffixes:
        listed = ", ".join(suffixes)
        raise ConfigError(f"{option} {printable(path)}: the name must end in {listed}, which says what is written.")
    try:
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(path.stat().st_mode):
                raise ConfigError(f"{option} {printable(path)} is no regular file: give the name of a file to write.")
        folder = path.absolute().parent
        # The nearest folder that exists tells whether the others could be made below it.
        while new_folders and not folder.exists():
            folder = folder.parent
        # Tried and not asked: os.access knows nothing of read-only mounts and quotas.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except (OSError, ValueError) as error:  # ValueError: a NUL character
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{option} {printable(path)} cannot be written ({reason}): give a place that can.") from error


def check_appendable(path: Path, option: str) -> None:
    """`check_file` for a file that is added to: a device or a pipe will do."""
    if not path.exists():
        check_file(path, option)
    # A pipe must not be opened to be tried: its reader would see the end of it.
    elif path.is_dir() or not os.access(path, os.W_OK):
        raise ConfigError(f"{option} {printable(path)} cannot be written: give a file that can.")


def check_extra(module: str, extra: str, what: str) -> None:
    """Raises MissingDependencyError, which names the extra to install, when `module` cannot be imported."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(f"{what} ({error}): pip install 'remoe-adapt[{extra}]'") from error


def blank_figure(width: float, height: float) -> Any:
    """A figure of matplotlib, in inches, that needs no display. Raises MissingDependencyError without matplotlib."""
    check_extra("matplotlib", "plot", "a plot needs matplotlib")
    import matplotlib

    # Without a display the default backend fails, on servers for instance.
    matplotlib.use("agg")
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One line per row under a header of all keys; nested mappings have dotted keys, None is empty. Written whole.

    Raises ConfigError when it cannot be written.
    """
    flat = [dict(flatten(row)) for row in rows]
    try:
        with replacing(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
            writer.writeheader()
            writer.writerows(flat)
    except OSError as error:
        raise ConfigError(f"{printable(path)} cannot be written ({error.strerror}): give a place that can.") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its name at the end; after an error `path` is as it was."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        scratch.replace(path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


def flatten(row: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(dotted key, value) of everything in a row that is no mapping, in order."""
    flat: list[tuple[str, Any]] = []
    for key, value in row.items():
        flat += flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return flat


# In what torch's writer of checkpoints raises when the disk refuses.
_OF_TORCH = ("PytorchStreamWriter", "iostream", "unexpected pos")


@contextmanager
def disk_faults(
    path: Path,
    error: type[RemoeError] = WriteError,
    remedy: str = "make room, or give another place",
    what: str = "read or written",
) -> Iterator[None]:
    """Within, what the system says of full or read-only disks, permissions, damaged files and the like becomes `error`.

    path: what is read or written.
    remedy: what the message tells to do.
    what: what cannot be done with the path then.
    """
    try:
        yield
    except RemoeError:
        raise
    except (OSError, SafetensorError, RuntimeError) as fault:
        if isinstance(fault, RuntimeError) and not any(word in str(fault) for word in _OF_TORCH):
            raise
        # Errors of the system name what went wrong; those of libraries only have their text.
        strerror, named = getattr(fault, "strerror", None), getattr(fault, "filename", None)
        reason = f"{strerror}: {named}" if strerror and named else strerror or first_line(fault)
        raise error(f"{printable(path)} cannot be {what} ({printable(reason)}): {remedy}.") from fault


def is_file(path: Path) -> bool:
    """Whether a file of this name can be reached; unlike `Path.is_file`, also for names that no disk can hold."""
    try:
        return path.is_file()
    except OSError:
        return False


@contextmanager
def made_parents(out: Path) -> Iterator[None]:
    """The folders above `out`; after an error those that were made for it are gone, as far as they are empty."""
    # The innermost first, the order in which they can be removed.
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
