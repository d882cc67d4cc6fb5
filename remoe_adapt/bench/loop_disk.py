"""A disk of known read-ahead to read experts from: a file of this machine as a block device with its own ext4."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from remoe_adapt.bench.widen import check_space, sync_files
from remoe_adapt.errors import ConfigError

READ_AHEAD_BYTES = 128 << 10
_SECTOR = 512
_TOOLS = ("losetup", "mkfs.ext4", "blockdev", "mount", "umount")


class LoopDisk:
    """A mounted loop device: `folder`, `device`, and whether it bypasses the page cache of the file behind it."""

    def __init__(self, folder: Path, device: str, direct: bool) -> None:
        self.folder, self.device, self.direct = folder, device, direct

    def forget(self) -> None:
        """Everything is written, and nothing of it is in memory any more."""
        _run("umount", str(self.folder))
        _run("mount", self.device, str(self.folder))


def why_no_loop() -> str | None:
    """Why there can be no such disk here; None where there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "a loop device needs root"
    missing = [tool for tool in _TOOLS if shutil.which(tool) is None]
    if missing:
        return f"{', '.join(missing)}: not installed"
    try:
        _run("losetup", "--find")
    except ConfigError as error:
        return str(error)
    return None


@contextmanager
def loop_disk(work: Path, size_bytes: int) -> Iterator[LoopDisk]:
    """An empty disk of this size in a file under `work`; unmounted, detached and deleted afterwards.

    Raises ConfigError when it cannot be made.
    """
    check_space(work, size_bytes)
    image, folder = work / f"disk-{os.getpid()}.img", work / f"disk-{os.getpid()}"
    with ExitStack() as undo:
        undo.callback(image.unlink, missing_ok=True)
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)
        _run("mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=0", str(image))
        device, direct = _attach(image)
        undo.callback(_run, "losetup", "--detach", device)
        _run("blockdev", "--setra", str(READ_AHEAD_BYTES // _SECTOR), device)
        folder.mkdir()
        undo.callback(folder.rmdir)
        _run("mount", device, str(folder))
        undo.callback(_run, "umount", "--lazy", str(folder))
        yield LoopDisk(folder, device, direct)


def evict(folder: Path) -> None:
    """No page of these files stays in the page cache, unless a process maps it."""
    sync_files(folder)
    for path in folder.rglob("*"):
        if path.is_file():
            fd = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def _attach(image: Path) -> tuple[str, bool]:
    try:
        return _run("losetup", "--find", "--show", "--direct-io=on", str(image)), True
    except ConfigError:
        return _run("losetup", "--find", "--show", str(image)), False


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout.strip()
