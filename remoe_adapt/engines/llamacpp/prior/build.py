"""C sources of ours as shared libraries, compiled by the system's compiler at first use and kept for this user."""

from __future__ import annotations

import ctypes as C
import functools
import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from remoe_adapt.errors import MissingDependencyError

SOURCES = Path(__file__).parent
# No contraction: a multiply-add rounds once where numpy and PyTorch round twice, and ties would go another way.
FLAGS = ("-O3", "-fno-math-errno", "-ffp-contract=off", "-shared", "-fPIC")
_TIMEOUT_S = 120


def cache_folder() -> Path:
    """Where compiled libraries are kept: `$XDG_CACHE_HOME/remoe/native`, or below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remoe" / "native"


def compiler() -> str | None:
    """The path of the system's C compiler: `$CC`, `cc`, `gcc` or `clang`; None without one."""
    names = (os.environ.get("CC", ""), "cc", "gcc", "clang")
    return next((found for name in names if name and (found := shutil.which(name))), None)


def compiled(name: str, *, libraries: Sequence[str] = ("-lm",), folder: Path | None = None) -> Path:
    """The shared library of the source `name` (in this folder, as "prior.c"), compiled where it is not there yet.

    libraries: what it is linked with, as options. folder: instead of `cache_folder()`. The file's name holds a hash of
    all sources, the compiler's version, the flags and the machine; it is written whole or not at all, so several
    processes may ask at once.

    Raises MissingDependencyError without a compiler, when it fails, or when there is no safe place for the result.
    """
    found = compiler()
    if found is None:
        raise MissingDependencyError("no C compiler (cc, gcc or clang, or $CC): install one, as `apt install gcc`.")
    options = (*FLAGS, *_library_options(libraries))
    source = SOURCES / name
    target = _safe_folder(folder) / f"{source.stem}-{_key(found, name, options)}.so"
    if not _is_ours(target):
        _compile(found, source, options, target)
    return target


@functools.cache
def library() -> C.CDLL:
    """`prior.c` as a loaded library. Raises MissingDependencyError as `compiled`, or when it cannot be loaded."""
    path = compiled("prior.c")
    try:
        return C.CDLL(str(path))
    except OSError as error:
        path.unlink(missing_ok=True)  # the next process compiles it again
        raise MissingDependencyError(f"the compiled {path} cannot be loaded: {error}.") from error


def _library_options(libraries: Sequence[str]) -> tuple[str, ...]:
    return tuple(libraries)


def _key(found: str, name: str, options: Sequence[str]) -> str:
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*.[ch]")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    digest.update("\0".join((name, _version(found), platform.machine(), *options)).encode())
    return digest.hexdigest()[:24]


@functools.cache
def _version(found: str) -> str:
    """What the compiler says of itself; another one may make other code."""
    try:
        done = subprocess.run([found, "--version"], capture_output=True, text=True, timeout=_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingDependencyError(f"the C compiler {found} does not run: {error}.") from error
    return f"{found} {done.stdout}"


def _safe_folder(folder: Path | None) -> Path:
    """The folder, made where needed. What others may write there would be run as us, so it is refused."""
    chosen = folder or cache_folder()
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
        facts = chosen.stat()
    except OSError as error:
        raise MissingDependencyError(
            f"no place for compiled libraries: {error}. Set XDG_CACHE_HOME to a folder of yours."
        ) from error
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise MissingDependencyError(
            f"{chosen} belongs to somebody else or others may write to it: `chmod go-w` it, or set XDG_CACHE_HOME."
        )
    return chosen


def _is_ours(path: Path) -> bool:
    try:
        facts = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(facts.st_mode) and facts.st_uid == os.geteuid() and facts.st_size > 0


def _compile(found: str, source: Path, options: Sequence[str], target: Path) -> None:
    flags = [option for option in options if not option.startswith("-l")]
    libraries = [option for option in options if option.startswith("-l")]
    unfinished = None
    try:
        number, unfinished = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(number)
        command = [found, *flags, "-o", unfinished, str(source), *libraries]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
        if done.returncode:
            said = " ".join(done.stderr.split())[:400]
            raise MissingDependencyError(f"{found} cannot compile {source.name} ({done.returncode}): {said}")
        Path(unfinished).chmod(0o700)
        os.replace(unfinished, target)  # noqa: PTH105
    except (OSError, subprocess.SubprocessError) as error:
        raise MissingDependencyError(f"{source.name} cannot be compiled into {target.parent}: {error}.") from error
    finally:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
