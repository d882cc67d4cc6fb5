"""Disks of known speed to read experts from: their read-ahead, their rate, and what they give to reads of experts.

`loop_disk` is a file of this machine as a block device with its own ext4. `read_cap` slows such a device down for some
processes (`slow_disk`: both, as far as they can be had), `PacedReads` every read of one process; `RawReads` times reads
as a cache's misses ask for them.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from remoe_adapt.bench.harness.memory_group import Group
from remoe_adapt.bench.harness.widen import check_space, each_file
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache import BLOCK, map_pages

# The kernel's default for a disk; a loop device takes over what the disk under its file has, which differs by machine.
READ_AHEAD_BYTES = 128 << 10
# blockdev counts read-ahead in these, whatever the device's own blocks are.
_SECTOR = 512
_TOOLS = ("losetup", "mkfs.ext4", "blockdev", "mount", "umount")


class LoopDisk:
    """A mounted loop device: `folder`, `device`, and whether it bypasses the page cache of the file behind it."""

    def __init__(self, folder: Path, device: str, direct: bool) -> None:
        self.folder, self.device, self.direct = folder, device, direct

    def forget(self) -> None:
        """Everything is written, and nothing of it is in memory any more."""
        # Advice to drop pages leaves those of directories and of maps; without its mount the file system keeps none.
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
        # Without a journal and lazy tables: the kernel would write those while reads are timed.
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
    each_file(folder, os.fsync)  # dirty pages are not dropped
    each_file(folder, lambda fd: os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED))


def _attach(image: Path) -> tuple[str, bool]:
    # Else every read would be answered from this machine's page cache of the image the second time.
    try:
        return _run("losetup", "--find", "--show", "--direct-io=on", str(image)), True
    except ConfigError:
        return _run("losetup", "--find", "--show", str(image)), False


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"{' '.join(command)}: {done.stderr.strip() or f'exit status {done.returncode}'}")
    return done.stdout.strip()


_PARENT = Path("/sys/fs/cgroup/blkio")
_RULE = "blkio.throttle.read_bps_device"


class ReadCap(Group):
    """The processes that read a device no faster than `hold` says, whichever way they read: blkio of cgroup v1.

    Over a tenth of a second and more the rate is held exactly; within it reads come in bursts, and then wait.
    """

    def __init__(self, folder: Path, device: str) -> None:
        super().__init__(folder)
        number = Path(device).stat().st_rdev
        self._device = f"{os.major(number)}:{os.minor(number)}"

    def hold(self, bytes_per_s: float) -> None:
        """No faster than this from now on; 0: as fast as the device."""
        (self.folder / _RULE).write_text(f"{self._device} {int(bytes_per_s)}", encoding="ascii")


def why_no_cap() -> str | None:
    """Why reads cannot be capped here; None where they can."""
    if os.access(_PARENT / _RULE, os.W_OK):
        return None
    return "reads cannot be capped: that needs the blkio controller of cgroup v1, and root"


@contextmanager
def read_cap(device: str) -> Iterator[ReadCap]:
    """A group without a cap as yet, removed afterwards; its processes must have ended by then."""
    cap = ReadCap(_PARENT / f"remoe-bench-{os.getpid()}", device)
    cap.folder.mkdir()
    try:
        yield cap
    finally:
        cap.remove()


@contextmanager
def slow_disk(
    work: Path, size_bytes: int, read_mib_per_s: float, why_not: str | None = None
) -> Iterator[tuple[LoopDisk | None, ReadCap | None, dict[str, Any]]]:
    """A loop disk of this size and a group whose processes read from it no faster than `hold` will say, and what a
    result tells of them; None for what cannot be had here, or shall not (read_mib_per_s 0; why_not: no disk either)."""
    with ExitStack() as undo:
        if why := why_not or why_no_loop():
            yield None, None, {"kind": "the disk of the work folder", "why": why}
            return
        disk = undo.enter_context(loop_disk(work, size_bytes))
        facts = {"kind": "loop device", "read_ahead_bytes": READ_AHEAD_BYTES, "bypasses_host_cache": disk.direct}
        if why := "left out of this run" if not read_mib_per_s else why_no_cap():
            yield disk, None, facts | {"read_mib_per_s": None, "why": why}
            return
        yield disk, undo.enter_context(read_cap(disk.device)), facts | {"read_mib_per_s": read_mib_per_s}


class RawReads:
    """Reads of `read_bytes` (in whole blocks) at random places of a file, with O_DIRECT where it can be had.

    A burst of n is n such reads, at most `threads` at a time, into huge pages that are there already; the next one
    follows when all have ended. Sums run over all `replay` calls. A context manager.
    """

    def __init__(self, path: Path, read_bytes: int, threads: int) -> None:
        self.read_bytes = -(-read_bytes // BLOCK) * BLOCK
        self.bytes, self.seconds = 0, 0.0
        flag = getattr(os, "O_DIRECT", 0)  # some file systems refuse it, macOS does not have it
        try:
            self._fd, self.direct = os.open(path, os.O_RDONLY | flag), flag != 0
        except OSError:
            self._fd, self.direct = os.open(path, os.O_RDONLY), False
        self._places = max(1, path.stat().st_size // self.read_bytes)
        self._free = [map_pages(self.read_bytes) for _ in range(threads)]
        for buffer in self._free:
            buffer[:] = 0  # its pages are taken now
        self._random = random.Random(0)
        self._pool = ThreadPoolExecutor(threads)

    def __enter__(self) -> RawReads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._pool.shutdown()
        os.close(self._fd)

    def replay(self, bursts: Iterable[int]) -> None:
        """Times these bursts."""
        for count in bursts:
            places = [self._random.randrange(self._places) * self.read_bytes for _ in range(count)]
            begin_s = time.perf_counter()
            self.bytes += sum(self._pool.map(self._read, places))
            self.seconds += time.perf_counter() - begin_s

    def _read(self, place: int) -> int:
        buffer = self._free.pop()  # as many as threads
        got = os.preadv(self._fd, [buffer.data], place)
        self._free.append(buffer)
        return got

    @property
    def bytes_per_s(self) -> float:
        """Over all bursts so far; nan before the first."""
        return self.bytes / self.seconds if self.seconds else float("nan")


class PacedReads:
    """Reads as a slower device gives them: one after the other at `bytes_per_s`, whoever asks; a `Reader`.

    A read that the device behind takes longer for ends when that has it.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._lock, self._free_s = threading.Lock(), 0.0

    def __call__(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        wanted = sum(len(buffer) for buffer in buffers)
        # One queue for all threads, as a device has one; the read itself runs outside of the lock, beside others.
        with self._lock:
            ends_s = self._free_s = max(self._free_s, time.perf_counter()) + wanted / self._bytes_per_s
        got = os.preadv(fd, buffers, offset)
        time.sleep(max(0.0, ends_s - time.perf_counter()))
        return got
