"""GGUF files as byte ranges: where every tensor lies, and the header's entries as they stand.

The gguf package reads the same files as objects; over the vocabulary of a real model that takes 7 s, and its writer
encodes every entry anew. Here entries stay bytes, which copies them exactly.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, number of tensors, number of
entries; entries (key, type, value); tensors (name, dimensions from the fastest on, type, offset); padding; data.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoe_adapt.errors import ExportError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
# Value types of an entry: number -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
UINT16, INT32 = 2, 5
_MAX_DIMENSIONS = 4
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of one file: `shape` from the slowest dimension on, `type` as ggml numbers it, `offset` in the file,
    `span` to the next tensor or the end (so padding counts)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    span: int


class GgufFile:
    """One GGUF file, opened by its header alone.

    `values` are the entries that are no arrays; `entries` the bytes of every entry by key, in order; `tensors` in file
    order; `header_digest` stands for names, shapes, types and offsets.

    Raises ExportError when it is no GGUF file, is truncated, or of another version or byte order.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.size = path, path.stat().st_size
        try:
            with path.open("rb") as file:
                self._parse(_Reader(file, self.size))
        except (struct.error, UnicodeDecodeError, EOFError, OverflowError) as error:
            raise ExportError(f"{path} is not a whole GGUF file ({error}): fetch it again.") from error

    def _parse(self, reader: _Reader) -> None:
        if (magic := reader.take(4)) != MAGIC:
            raise ExportError(f"{self.path} is no GGUF file: it starts with {magic!r}.")
        version, num_tensors, num_entries = reader.unpack("I"), reader.unpack("Q"), reader.unpack("Q")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            kind = "a big-endian file" if swapped else f"version {version}"
            raise ExportError(f"{self.path} is {kind}; GGUF versions 2 and 3, little-endian, are supported.")
        self.entries: dict[str, bytes] = {}
        self.values: dict[str, Any] = {}
        for _ in range(num_entries):
            start = reader.position
            key, kind = reader.text(), reader.unpack("I")
            value = reader.value(kind)
            self.entries[key] = reader.slice(start)
            if kind != _ARRAY:
                self.values[key] = value
        infos = []
        for _ in range(num_tensors):
            name, dimensions = reader.text(), reader.unpack("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ExportError(f"{self.path}: tensor {name} has {dimensions} dimensions: is the file damaged?")
            shape = tuple(reader.unpack("Q") for _ in range(dimensions))[::-1]
            infos.append((name, shape, reader.unpack("I"), reader.unpack("Q")))
        self.header_digest = hashlib.sha256(repr((reader.position, infos)).encode()).hexdigest()
        self.alignment = int(self.values.get(ALIGNMENT_KEY, DEFAULT_ALIGNMENT))
        if self.alignment < 1:
            raise ExportError(f"{self.path}: alignment {self.alignment} is impossible: is the file damaged?")
        data = reader.position + -reader.position % self.alignment
        starts = [data + offset for *_, offset in infos]
        ends = [*sorted(starts)[1:], self.size]
        span = {start: end - start for start, end in zip(sorted(starts), ends, strict=bool(starts))}
        self.tensors = [
            GgufTensor(self.path, name, shape, kind, start, span[start])
            for (name, shape, kind, _), start in zip(infos, starts, strict=True)
        ]
        if starts and max(starts) >= self.size:
            raise ExportError(f"{self.path} ends at byte {self.size}, before its last tensor: fetch it again.")


def shard_paths(path: Path) -> list[Path]:
    """All files of a split GGUF of which `path` is the first, or just `path`.

    Raises ExportError for another shard than the first, or when one is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match["count"])
    paths = [path.with_name(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf") for number in range(1, count + 1)]
    if path != paths[0]:
        raise ExportError(f"{path} is a later part of a split GGUF: give the first, {paths[0].name}.")
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ExportError(f"{path} is a split GGUF whose part {missing[0]} is not beside it: fetch it too.")
    return paths


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of part `number` (from 1 on) as llama.cpp looks for it."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def entry_bytes(key: str, kind: int, value: int) -> bytes:
    """An entry with an integer value."""
    return _text_bytes(key) + struct.pack("<I" + _SCALARS[kind], kind, value)


def header_bytes(entries: list[bytes], tensors: list[tuple[str, tuple[int, ...], int, int]], alignment: int) -> bytes:
    """Header of a GGUF file up to its data: entries as bytes; tensors as (name, shape, type, offset in the data)."""
    parts = [MAGIC, struct.pack("<IQQ", VERSIONS[-1], len(tensors), len(entries)), *entries]
    for name, shape, kind, offset in tensors:
        parts.append(_text_bytes(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape)))
        parts.append(struct.pack("<IQ", kind, offset))
    header = b"".join(parts)
    return header + b"\0" * (-len(header) % alignment)


def _text_bytes(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


class _Reader:
    """Little-endian values one after another; reads the file in pieces as it needs them."""

    _PIECE_BYTES = 1 << 22

    def __init__(self, file: Any, size: int) -> None:
        self._file, self._size = file, size
        self._data = bytearray()
        self.position = 0

    def take(self, size: int) -> bytes:
        self._need(size)
        data = bytes(memoryview(self._data)[self.position : self.position + size])
        self.position += size
        return data

    def unpack(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self._need(size)
        (value,) = struct.unpack_from("<" + code, self._data, self.position)
        self.position += size
        return value

    def text(self) -> str:
        return self.take(self.unpack("Q")).decode()

    def value(self, kind: int) -> Any:
        """The value of an entry; arrays are passed over."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.unpack(self._code(kind))
        of, count = self.unpack("I"), self.unpack("Q")
        if of == _STRING:
            unpack, data = struct.Struct("<Q").unpack_from, self._data
            for _ in range(count):
                self._need(8)
                size: int = unpack(data, self.position)[0]
                self._need(8 + size)
                self.position += 8 + size
        elif of == _ARRAY:
            for _ in range(count):
                self.value(_ARRAY)
        else:
            size = count * struct.calcsize(self._code(of))
            self._need(size)
            self.position += size
        return None

    def slice(self, start: int) -> bytes:
        return bytes(memoryview(self._data)[start : self.position])

    def _need(self, size: int) -> None:
        end = self.position + size
        if end <= len(self._data):
            return
        if end > self._size:
            raise EOFError(f"it ends at byte {self._size} inside its header")
        while len(self._data) < end:
            piece = self._file.read(max(self._PIECE_BYTES, end - len(self._data)))
            if not piece:
                raise EOFError(f"it ends at byte {len(self._data)} inside its header")
            self._data += piece

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise EOFError(f"unknown value type {kind} at byte {self.position}")
        return _SCALARS[kind]
