"""What goes wrong while results are written: one error of our tree, and no folder left that was made for nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from remoe_adapt.errors import RemoeError, WriteError
from remoe_adapt.untrusted import printable


@contextmanager
def writing(out: Path, error: type[RemoeError] = WriteError) -> Iterator[None]:
    """Within, what the system says of full or read-only disks, permissions and the like becomes `error`."""
    try:
        yield
    except RemoeError:
        raise
    except (OSError, SafetensorError) as fault:
        raise error(
            f"{printable(out)} cannot be written ({printable(fault)}): make room, or give another place."
        ) from fault


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
