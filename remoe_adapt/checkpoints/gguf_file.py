"""GGUF files as byte ranges: where every tensor lies, and the header's entries as they stand.

The gguf package reads the same files as objects; over the vocabulary of a real model that takes 7 s, and its writer
encodes every entry anew. Here entries stay bytes, which copies them exactly.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): magic, version, number of tensors, number of
entries; entries (key, type, value); tensors (name, dimensions from the fastest on, type, offset); padding; data.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from remoe_adapt._support import is_file, printable
from remoe_adapt.errors import ExportError, RemoeError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT_KEY, DEFAULT_ALIGNMENT = "general.alignment", 32
# Value types of an entry: number -> struct format; 8 is a string, 9 an array.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
UINT16, INT32 = 2, 5
# A header that claims more than this is refused before memory is taken for it. The largest headers of today, with
# vocabularies of 260,000 tokens, have 20 MB.
MAX_HEADER_BYTES, MAX_ITEMS, _MAX_TEXTS, _MAX_DIMENSIONS, _MAX_ALIGNMENT = 128 << 20, 1 << 17, 1 << 22, 4, 1 << 20
# Tensor types as ggml numbers them: number -> (values of a block, bytes of a block).
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 40), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
    40: (64, 36), 41: (128, 18),
}  # fmt: skip
_SHARD = re.compile(r"(?P<stem>.*)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.gguf", re.DOTALL)
_TensorInfo = tuple[str, tuple[int, ...], int, int]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor of one file: `shape` from the slowest dimension on, `type` as ggml numbers it, `offset` in the file,
    `size` in bytes, `span` to the next tensor or the end (so padding counts)."""

    path: Path
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    size: int
    span: int


class GgufFile:
    """One GGUF file, opened by its header alone.

    `values` are the entries that are no arrays; `entries` the bytes of every entry by key, in order; `tensors` in the
    header's order; `header_digest` stands for every byte before the data.

    error: what is raised; ExportError unless a reader of weights says otherwise.
    header_alone: the file may end anywhere behind its header: its sizes are asked for, and no weights.

    Raises `error` when it cannot be read, is no GGUF file, is of another version or byte order, is cut off anywhere
    (also inside its last tensor), or claims what cannot be: keys or tensors twice, tensors that overlap or are of
    unknown types, counts and lengths beyond the file or all reason. Memory: the header, at most MAX_HEADER_BYTES.
    """

    def __init__(self, path: Path, error: type[RemoeError] = ExportError, *, header_alone: bool = False) -> None:
        self.path, self.error, self._header_alone = path, error, header_alone
        try:
            with path.open("rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                self._parse(_Reader(file, self.size))
        except RemoeError:  # some of them are errors of the system too
            raise
        except OSError as fault:
            raise error(f"{printable(path)} cannot be read: {fault.strerror or fault}.") from fault
        except (struct.error, UnicodeDecodeError, EOFError, OverflowError) as fault:
            reason = printable(fault)
            raise error(f"{printable(path)} is not a whole GGUF file ({reason}): fetch it again.") from fault

    def number(self, key: str, default: int) -> int:
        """The whole number, not negative, that an entry holds. Raises `error` when it holds something else."""
        value = self.values.get(key, default)
        if key in self.entries and (key not in self.values or type(value) is not int or value < 0):
            raise self._odd(key, "a whole number")
        return int(value)

    def text(self, key: str, default: str) -> str:
        """The text that an entry holds. Raises `error` when it holds something else."""
        value = self.values.get(key, default)
        if key in self.entries and not (key in self.values and isinstance(value, str)):
            raise self._odd(key, "text")
        return str(value)

    def _odd(self, key: str, wanted: str) -> RemoeError:
        found = printable(repr(self.values[key])) if key in self.values else "a list"
        return self._damaged(f"{printable(key)} is {found} where {wanted} belongs")

    def _damaged(self, fault: str) -> RemoeError:
        return self.error(f"{printable(self.path)}: {fault}: is the file damaged?")

    def _cut_off(self, where: str) -> RemoeError:
        return self.error(f"{printable(self.path)} ends at byte {self.size}, {where}: fetch it again.")

    def _parse(self, reader: _Reader) -> None:
        if (magic := reader.take(4)) != MAGIC:
            raise self.error(f"{printable(self.path)} is no GGUF file: it starts with {magic!r}.")
        version, num_tensors, num_entries = reader.unpack("I"), reader.unpack("Q"), reader.unpack("Q")
        if version not in VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            kind = "a big-endian file" if swapped else f"version {version}"
            raise self.error(f"{printable(self.path)} is {kind}; GGUF versions 2 and 3, little-endian, are supported.")
        if max(num_tensors, num_entries) > MAX_ITEMS:
            raise self._damaged(f"it claims {num_tensors} tensors and {num_entries} entries")
        self.entries: dict[str, bytes] = {}
        self.values: dict[str, Any] = {}
        for _ in range(num_entries):
            start = reader.position
            key, kind = reader.text(), reader.unpack("I")
            if key in self.entries:
                raise self._damaged(f"the entry {printable(key)} stands in it twice")
            value = reader.value(kind)
            # As bytes, so that a copied header is the same to the bit, whatever the entry's type.
            self.entries[key] = reader.slice(start)
            if kind != _ARRAY:
                self.values[key] = value
        infos: list[_TensorInfo] = []
        for _ in range(num_tensors):
            name, dimensions = reader.text(), reader.unpack("I")
            if dimensions > _MAX_DIMENSIONS:
                raise self._damaged(f"tensor {printable(name)} has {dimensions} dimensions")
            # ggml counts dimensions from the fastest on, torch from the slowest.
            shape = tuple(reader.unpack("Q") for _ in range(dimensions))[::-1]
            infos.append((name, shape, reader.unpack("I"), reader.unpack("Q")))
        # An undo file is recognised by this digest, which no change of routers touches.
        self.header_digest = hashlib.sha256(reader.slice(0)).hexdigest()
        self.alignment = self.number(ALIGNMENT_KEY, DEFAULT_ALIGNMENT)
        # A power of two has one bit set; other alignments are refused by llama.cpp as well.
        if self.alignment & (self.alignment - 1) or not 1 <= self.alignment <= _MAX_ALIGNMENT:
            raise self._damaged(f"alignment {self.alignment} is no power of two up to {_MAX_ALIGNMENT}")
        self.tensors = self._placed(infos, reader.position + -reader.position % self.alignment)

    def _placed(self, infos: list[_TensorInfo], data: int) -> list[GgufTensor]:
        """The tensors, once it is certain that each lies in the file, whole and apart from all others."""
        names: set[str] = set()
        sizes = []
        for name, shape, kind, offset in infos:
            if name in names:
                raise self._damaged(f"tensor {printable(name)} stands in it twice")
            names.add(name)
            if offset % self.alignment:
                raise self._damaged(f"tensor {printable(name)} starts at {offset}, no multiple of {self.alignment}")
            sizes.append(self._size_of(name, shape, kind))
        # As long as the header says, where the data is not looked at.
        whole = max((offset + size for (*_, offset), size in zip(infos, sizes, strict=True)), default=0) + data
        file_bytes = max(self.size, whole) if self._header_alone else self.size
        if infos and data + max(offset for *_, offset in infos) >= file_bytes:
            raise self._cut_off("before its last tensor")
        # By place in the file: an overlap can only be with the neighbour.
        order = sorted(range(len(infos)), key=lambda number: infos[number][3])
        spans = [0] * len(infos)
        for number, successor in zip(order, [*order[1:], None], strict=bool(order)):
            name, start = printable(infos[number][0]), data + infos[number][3]
            end = file_bytes if successor is None else data + infos[successor][3]
            spans[number] = end - start
            if start + sizes[number] > file_bytes:
                raise self._cut_off(f"inside tensor {name}, which goes on to byte {start + sizes[number]}")
            if successor is not None and start + sizes[number] > end:
                raise self._damaged(f"tensors {name} and {printable(infos[successor][0])} overlap")
        return [
            GgufTensor(self.path, name, shape, kind, data + offset, size, span)
            for (name, shape, kind, offset), size, span in zip(infos, sizes, spans, strict=True)
        ]

    def _size_of(self, name: str, shape: tuple[int, ...], kind: int) -> int:
        if kind not in BLOCKS:
            raise self.error(
                f"{printable(self.path)}: tensor {printable(name)} is of ggml type {kind}, which is not known here, so "
                "it cannot be told whether the file is whole: use a newer remoe-adapt, or a GGUF of another type."
            )
        values, block_bytes = BLOCKS[kind]
        if 0 in shape:
            raise self._damaged(f"tensor {printable(name)} is empty")
        if shape and shape[-1] % values:
            raise self._damaged(f"the rows of tensor {printable(name)} are {shape[-1]} long, no multiple of {values}")
        return prod(shape) * block_bytes // values


def shard_paths(path: Path, error: type[RemoeError] = ExportError) -> list[Path]:
    """All files of a split GGUF of which `path` is the first, or just `path`.

    Raises `error` for another part than the first, for a number that cannot be, or when a part is missing.
    """
    match = _SHARD.fullmatch(path.name)
    if not match:
        return [path]
    number, count, shown = int(match["number"]), int(match["count"]), printable(path)
    if not 1 <= number <= count:
        raise error(f"{shown} is named part {number} of {count}, which cannot be: give the file its name back.")
    if number != 1:
        first = printable(shard_name(match["stem"], 1, count))
        raise error(f"{shown} is a later part of a split GGUF: give the first, {first}.")
    paths = [path]
    for later in range(2, count + 1):
        paths.append(part := path.with_name(shard_name(match["stem"], later, count)))
        if not is_file(part):
            name = printable(part.name)
            raise error(f"{shown} is a split GGUF whose part {name} is not beside it: fetch it too.")
    return paths


def shard_name(stem: str, number: int, count: int) -> str:
    """File name of part `number` (from 1 on) as llama.cpp looks for it."""
    return f"{stem}-{number:05d}-of-{count:05d}.gguf"


def text_entry(key: str, value: str) -> bytes:
    """An entry with text."""
    return _text_bytes(key) + struct.pack("<I", _STRING) + _text_bytes(value)


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
            return self.take(self.unpack("Q")).decode(errors="replace")
        if kind != _ARRAY:
            return self.unpack(self._code(kind))
        # Vocabularies are arrays of 260,000 texts; reading them into objects takes seconds and nobody here asks for
        # them.
        of, count = self.unpack("I"), self.unpack("Q")
        if of == _STRING:
            self._pass_texts(count)
        elif of == _ARRAY:
            raise EOFError(f"a list of lists at byte {self.position}, which no engine reads")
        else:
            size = count * struct.calcsize(self._code(of))
            self._need(size)
            self.position += size
        return None

    def _pass_texts(self, count: int) -> None:
        if count > _MAX_TEXTS:
            raise EOFError(f"a list of {count} texts at byte {self.position}")
        # Local names: this loop runs once for each word of the vocabulary.
        unpack, data, position = struct.Struct("<Q").unpack_from, self._data, self.position
        for _ in range(count):
            if position + 8 > len(data):
                self.position = position
                self._need(8)
            position += 8 + unpack(data, position)[0]
        self.position = position
        # The last text may end beyond what has been read, and then the file is cut off.
        self._need(0)

    def slice(self, start: int) -> bytes:
        return bytes(memoryview(self._data)[start : self.position])

    def _need(self, size: int) -> None:
        end = self.position + size
        if end <= len(self._data):
            return
        # Before the reading, so that a forged length of exabytes allocates nothing.
        if end > self._size:
            raise EOFError(f"it ends at byte {self._size} inside its header")
        if end > MAX_HEADER_BYTES:
            raise EOFError(f"its header is longer than {MAX_HEADER_BYTES >> 20} MiB")
        while len(self._data) < end:
            piece = self._file.read(max(self._PIECE_BYTES, end - len(self._data)))
            if not piece:
                raise EOFError(f"it ends at byte {len(self._data)} inside its header")
            self._data += piece

    def _code(self, kind: int) -> str:
        if kind not in _SCALARS:
            raise EOFError(f"unknown value type {kind} at byte {self.position}")
        return _SCALARS[kind]
