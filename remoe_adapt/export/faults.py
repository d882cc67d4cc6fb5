"""What the disk and others' files do to an export, as one error of our tree."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from remoe_adapt.errors import ExportError, RemoeError
from remoe_adapt.untrusted import printable


@contextmanager
def disk_faults(path: Path, remedy: str) -> Iterator[None]:
    """Raises ExportError for a full or read-only disk, a file that cannot be read or goes away, and damaged safetensors
    inside the block; path: what was to be read or written."""
    try:
        yield
    except RemoeError:
        raise
    except (OSError, SafetensorError) as error:
        # An OSError's own text repeats number and file; a SafetensorError has neither, so its text is all there is.
        strerror = getattr(error, "strerror", None)
        named = getattr(error, "filename", None)
        reason = f"{strerror}: {named}" if strerror and named else strerror or error
        raise ExportError(f"{printable(path)} cannot be read or written ({printable(reason)}): {remedy}.") from error


def is_file(path: Path) -> bool:
    """Whether a file of this name can be reached; unlike `Path.is_file`, also for names that no disk can hold."""
    try:
        return path.is_file()
    except OSError:
        return False
