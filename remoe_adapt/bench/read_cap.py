"""A block device that some processes read no faster than at a given rate, whichever way they read: blkio of cgroup v1.

Over a tenth of a second and more the rate is held exactly; within it reads come in bursts, and then wait.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_PARENT = Path("/sys/fs/cgroup/blkio")
_RULE = "blkio.throttle.read_bps_device"
_EMPTY_S = 10.0


class ReadCap:
    """The group of these processes."""

    def __init__(self, folder: Path, device: str) -> None:
        number = Path(device).stat().st_rdev
        self._folder, self._device = folder, f"{os.major(number)}:{os.minor(number)}"

    def command(self, command: Sequence[str]) -> list[str]:
        """The command that runs `command` as a member from its first instruction on."""
        return ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self._folder / "cgroup.procs"), *command]

    def hold(self, bytes_per_s: float) -> None:
        """No faster than this from now on; 0: as fast as the device."""
        (self._folder / _RULE).write_text(f"{self._device} {int(bytes_per_s)}", encoding="ascii")


def why_no_cap() -> str | None:
    """Why reads cannot be capped here; None where they can."""
    if os.access(_PARENT / _RULE, os.W_OK):
        return None
    return "reads cannot be capped: that needs the blkio controller of cgroup v1, and root"


@contextmanager
def read_cap(device: str) -> Iterator[ReadCap]:
    """A group without a cap as yet, removed afterwards; its processes must have ended by then."""
    folder = _PARENT / f"remoe-bench-{os.getpid()}"
    folder.mkdir()
    try:
        yield ReadCap(folder, device)
    finally:
        deadline_s = time.monotonic() + _EMPTY_S
        while folder.exists():
            try:
                folder.rmdir()
            except OSError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)
