"""Large files without copying them where the file system allows, and results that appear whole or not at all."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import psutil

from remoe_adapt._support import disk_faults, made_parents, printable
from remoe_adapt.errors import ConfigError

OnBytes = Callable[[int], object]
_CHUNK_BYTES = 8 << 20
# linux/fs.h: the target shares the source's blocks until one of them is written to (btrfs, xfs, bcachefs).
_FICLONE = 0x40049409


def ignore_bytes(count: int) -> None:
    """What hears of progress where nobody asked."""


def link_or_copy(source: Path, target: Path, on_bytes: OnBytes = ignore_bytes) -> str:
    """A file under a second name: "linked", where that fails "cloned" or "copied". Symbolic links are resolved."""
    # A link to a symbolic link would break when the hub's cache, where it points, is cleaned.
    real = source.resolve(strict=True)
    try:
        os.link(real, target)
    except OSError:  # the target is on another file system, or on one without links
        return clone_or_copy(real, target, on_bytes)
    on_bytes(target.stat().st_size)
    return "linked"


def clone_or_copy(source: Path, target: Path, on_bytes: OnBytes = ignore_bytes) -> str:
    """A file of its own that starts out equal: "cloned" (blocks shared until written to) or "copied"."""
    with source.open("rb") as old, target.open("xb") as new:
        size = os.fstat(old.fileno()).st_size
        try:
            # Refused by most file systems, at once and without a byte written, so trying costs nothing.
            fcntl.ioctl(new.fileno(), _FICLONE, old.fileno())
        except OSError:
            copy_range(old.fileno(), 0, size, new.fileno(), on_bytes)
            return "copied"
        on_bytes(size)
        return "cloned"


def copy_range(source_fd: int, offset: int, size: int, target_fd: int, on_bytes: OnBytes = ignore_bytes) -> None:
    """Append `size` bytes from `offset` of one file to another, in the kernel. Raises OSError at a short source."""
    end = offset + size
    while offset < end:
        # In pieces, so that progress is shown and Ctrl-C is heard within a file of many gigabytes.
        sent = os.sendfile(target_fd, source_fd, offset, min(_CHUNK_BYTES, end - offset))
        # sendfile returns 0 at the end of a file; without this check a source that shrank would loop for ever.
        if not sent:
            raise OSError(f"a file ends at byte {offset}, {end - offset} bytes early: was it changed meanwhile?")
        offset += sent
        on_bytes(sent)


def write_at(path: Path, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Overwrite parts of a file, (offset, bytes) each, and wait until they are on the disk."""
    with path.open("r+b", buffering=0) as file:
        write_pieces(file.fileno(), pieces)
        os.fsync(file.fileno())


def write_pieces(fd: int, pieces: Iterable[tuple[int, bytes]]) -> None:
    """Overwrite parts of an open file, (offset, bytes) each, in one call each where the system takes them whole."""
    for offset, data in pieces:
        # pwrite may take less than it was given, near a full disk for instance.
        view = memoryview(data)
        while view:
            written = os.pwrite(fd, view, offset)
            offset, view = offset + written, view[written:]


def append(file: BinaryIO, data: bytes) -> None:
    """All of the data, to a file that has no buffer: the system may take a part and says so by its length alone."""
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def read_at(path: Path, offset: int, size: int) -> bytearray:
    """`size` bytes of a file from `offset` on. Raises OSError when it ends before."""
    data = bytearray(size)
    with path.open("rb") as file:
        file.seek(offset)
        if file.readinto(data) != size:
            raise OSError(f"{path} ends before byte {offset + size}: fetch it again.")
    return data


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to fill that becomes `out` at the end; after an error or a kill nothing of that name exists, nor folders
    that were made for it.

    Raises ConfigError when `out` exists and is not an empty folder, WriteError when it cannot be written.
    """
    with disk_faults(out, what="written"), made_parents(out):
        if os.path.lexists(out) and (not out.is_dir() or any(out.iterdir())):
            raise ConfigError(f"{printable(out)} exists already: give a new folder, or remove it.")
        draft = _draft(out)
        try:
            draft.mkdir()
            yield draft
            # Files before their folder, and all before the rename: after a power cut the name exists only with its
            # content.
            for path in (*(p for p in draft.rglob("*") if p.is_file()), draft):
                sync(path)
            draft.replace(out)
            sync(out.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def new_files(outs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths of files to write, in one folder, that become `outs` at the end, the first one last; after an error there
    is none of them, nor a folder that was made for them; after a kill the first is missing.

    Raises ConfigError when one exists, or two have one name.
    """
    if there := [out for out in outs if out.exists()]:
        raise ConfigError(f"{printable(there[0])} exists already: give another name, or remove it.")
    if twice := [out for out in outs if outs.count(out) > 1]:
        raise ConfigError(f"{printable(twice[0])} would be written twice: give each its own name.")
    with made_parents(outs[0]):
        drafts, done = [_draft(out) for out in outs], list[Path]()
        try:
            yield drafts
            for draft in drafts:
                sync(draft)
            # The first file is what an engine is given, so it appears last, when the others are there already.
            for out, draft in reversed(list(zip(outs, drafts, strict=True))):
                draft.replace(out)
                done.append(out)
                sync(out.parent)
        except BaseException:
            # Also those that have their names already: half a split model would load in no engine.
            for path in done + drafts:
                path.unlink(missing_ok=True)
            raise


def replace_file(path: Path, data: bytes) -> None:
    """Write a small file in one piece, and wait until it is on the disk under its name."""
    draft = _draft(path)
    try:
        # "x": a draft that is there already is another thread's.
        with draft.open("xb") as file:
            file.write(data)
        sync(draft)
        draft.replace(path)
        sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _draft(out: Path) -> Path:
    """A name beside `out`; what killed processes left there under such names is removed."""
    pattern = re.compile(re.escape(f".{out.name}.") + r"([0-9]{1,9})\.tmp")
    # A kill leaves a draft of gigabytes, under a name that nobody would look for.
    for path in out.parent.iterdir():
        match = pattern.fullmatch(path.name)
        # Numbers are used again: an earlier process had ours, and died. One of another user cannot be asked, counts as
        # running, and its draft stays.
        if match and (int(match[1]) == os.getpid() or not psutil.pid_exists(int(match[1]))):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return out.with_name(f".{out.name}.{os.getpid()}.tmp")
