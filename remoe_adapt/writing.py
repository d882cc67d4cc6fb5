"""What the disk and others' files do while we read and write: one error of our tree, and no folder left for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from remoe_adapt.errors import RemoeError, WriteError
from remoe_adapt.untrusted import first_line, printable

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
    made = [parent for parent in out.absolute().parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
