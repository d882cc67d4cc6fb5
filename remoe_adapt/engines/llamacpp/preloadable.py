"""Whether a program can be given our library by LD_PRELOAD: what its ELF file, and those it needs, say of themselves.

Interposing works on calls between shared objects. So the program has to be dynamically linked, somebody has to call
libllama from outside of it, and libllama has to call ggml's scheduler from outside of that. The format is that of the
System V ABI (elf(5)); nothing of a file is run or loaded.
"""

from __future__ import annotations

import os
import stat
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from remoe_adapt._support import printable
from remoe_adapt.errors import ConfigError

# Whose call tells which rows a batch has, in old and new builds, and whose call takes the callback.
_BATCHES, _CALLBACK = frozenset({"llama_decode", "llama_process"}), "ggml_backend_sched_set_eval_callback"
_OURS = frozenset({*_BATCHES, _CALLBACK})
_PT_DYNAMIC, _PT_INTERP, _SHT_DYNSYM = 2, 3, 11
_DT_NEEDED, _DT_STRTAB, _DT_STRSZ, _DT_RPATH, _DT_RUNPATH = 1, 5, 10, 15, 29
_SYMBOL, _HEADER = struct.Struct("<IBBHQQ"), struct.Struct("<HHIQQQIHHHHHH")
_PROGRAM, _SECTION = struct.Struct("<IIQQQQQQ"), struct.Struct("<IIQQQQIIQQ")
# Tables of a llama.cpp build take some MiB; a file that claims more is none.
_MOST_BYTES, _MOST_ENTRIES, _MOST_FILES = 64 << 20, 4096, 64
_MACHINES = {"x86_64": 62, "aarch64": 183}


@dataclass(frozen=True)
class _Elf:
    """needed: names of libraries; folders: where they are looked for; missing: of our symbols, those that others give;
    is_program: a loader runs it."""

    needed: tuple[str, ...]
    folders: tuple[Path, ...]
    missing: frozenset[str]
    is_program: bool


def check_preloadable(program: Path) -> None:
    """Raises ConfigError, with the reason, for a program in which the prior could not be."""
    if not sys.platform.startswith("linux"):
        raise ConfigError(f"{printable(program)}: a prior can be preloaded on Linux alone.")
    try:
        facts = program.stat()
    except OSError as error:
        raise ConfigError(f"{printable(program)} cannot be read ({error.strerror}): give a llama-server.") from error
    if not stat.S_ISREG(facts.st_mode) or not os.access(program, os.X_OK):
        raise ConfigError(f"{printable(program)} is no program that may be run: give a llama-server.")
    if facts.st_mode & (stat.S_ISUID | stat.S_ISGID):
        raise ConfigError(f"{printable(program)} runs as another user, and Linux then preloads nothing.")
    found = _read(program)
    if not found.is_program:
        raise ConfigError(
            f"{printable(program)} is linked statically, so nothing comes between it and llama.cpp: use a build with "
            "shared libraries (-DBUILD_SHARED_LIBS=ON, as the official Linux archives)."
        )
    missing = frozenset[str]().union(*(each.missing for each in _with_libraries(program, found)))
    if not missing & _BATCHES or _CALLBACK not in missing:
        lacks = "calls llama.cpp" if not missing & _BATCHES else "takes ggml's scheduler"
        raise ConfigError(
            f"nothing in {printable(program)} or the libraries beside it {lacks} from a shared library: it is no "
            "llama-server, or llama.cpp is linked into it. Use a build with shared libraries (-DBUILD_SHARED_LIBS=ON)."
        )


def _with_libraries(program: Path, first: _Elf) -> Iterator[_Elf]:
    """It and the libraries that are found as the loader finds them, those of the system's own folders left out."""
    given = [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(":") if folder]
    seen, waiting = {program.resolve()}, [(program.resolve(), first)]
    while waiting and len(seen) <= _MOST_FILES:
        _, elf = waiting.pop()
        yield elf
        for name in elf.needed:
            path = next((folder / name for folder in (*given, *elf.folders) if (folder / name).is_file()), None)
            if path is None or path.resolve() in seen:
                continue
            seen.add(path.resolve())
            waiting.append((path.resolve(), _read(path)))


def _read(path: Path) -> _Elf:
    try:
        with path.open("rb") as file:
            return _parse(file, path.resolve().parent)
    except OSError as error:
        raise ConfigError(f"{printable(path)} cannot be read ({error.strerror}): give a llama-server.") from error
    except (struct.error, ValueError, IndexError) as error:
        raise ConfigError(f"{printable(path)} is no program of this machine ({printable(error)}).") from error


def _parse(file: BinaryIO, folder: Path) -> _Elf:
    magic = file.read(16)
    if magic[:4] != b"\x7fELF":
        raise ValueError("it is no ELF file; give the program itself, not a script that starts it")
    if magic[4:6] != b"\x02\x01":
        raise ValueError("not 64 bits, little-endian")
    header = _HEADER.unpack(file.read(_HEADER.size))
    machine, program_at, section_at, program_size, programs, section_size, sections = (
        header[1], header[4], header[5], *header[8:12]
    )  # fmt: skip
    wanted = _MACHINES.get(os.uname().machine)
    if wanted is not None and machine != wanted:
        raise ValueError("it is for another processor")
    if (programs and program_size != _PROGRAM.size) or (sections and section_size != _SECTION.size):
        raise ValueError("its tables are of another size")
    segments = list(_PROGRAM.iter_unpack(_piece(file, program_at, programs * _PROGRAM.size)))
    tables = list(_SECTION.iter_unpack(_piece(file, section_at, sections * _SECTION.size)))
    dynamic = next((segment for segment in segments if segment[0] == _PT_DYNAMIC), None)
    if dynamic is None:
        return _Elf((), (), frozenset(), False)
    entries = list(struct.iter_unpack("<QQ", _piece(file, dynamic[2], dynamic[5] // 16 * 16)))[:_MOST_ENTRIES]
    values = dict(entries)
    # The table of names is known by its address in memory.
    at, size = values.get(_DT_STRTAB, 0), values.get(_DT_STRSZ, 0)
    offset = next((s[2] + at - s[3] for s in segments if s[0] == 1 and s[3] <= at < s[3] + s[5]), None)
    names = _piece(file, at if offset is None else offset, size)
    runpath = [_text(names, value) for tag, value in entries if tag in (_DT_RPATH, _DT_RUNPATH)]
    folders = [
        Path(each.replace("$ORIGIN", str(folder)).replace("${ORIGIN}", str(folder)))
        for path in runpath
        for each in path.split(":")
        if each
    ]
    return _Elf(
        tuple(_text(names, value) for tag, value in entries if tag == _DT_NEEDED),
        tuple(folders),
        _missing(file, tables, names),
        any(segment[0] == _PT_INTERP for segment in segments),
    )


def _missing(file: BinaryIO, tables: list[tuple[int, ...]], names: bytes) -> frozenset[str]:
    """Of the symbols that matter here, those that the file takes from others."""
    table = next((section for section in tables if section[1] == _SHT_DYNSYM), None)
    if table is None:
        raise ValueError("it has no table of symbols any more")
    data = _piece(file, table[4], table[5] // _SYMBOL.size * _SYMBOL.size)
    undefined = (name for name, _, _, section, _, _ in _SYMBOL.iter_unpack(data) if not section and name)
    return frozenset(text for at in undefined if (text := _text(names, at)) in _OURS)


def _piece(file: BinaryIO, at: int, size_bytes: int) -> bytes:
    if size_bytes > _MOST_BYTES:
        raise ValueError(f"a table of {size_bytes} bytes")
    file.seek(at)
    data = file.read(size_bytes)
    if len(data) != size_bytes:
        raise ValueError("it is cut short")
    return data


def _text(names: bytes, at: int) -> str:
    end = names.find(b"\0", at, at + 4096)
    if not 0 <= at < len(names) or end < 0:
        raise ValueError("a name outside of its table")
    return names[at:end].decode("utf-8", "replace")
