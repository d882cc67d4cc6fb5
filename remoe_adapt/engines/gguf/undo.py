"""The undo file beside a GGUF that is patched in place: the original routers, on the disk before the first write.

It is the journal too. Whatever is killed when, the originals are whole in it, and the file's routers are one of
"original", "patched" (as the undo file says), "torn" (part of each), which the next patch or undo ends, or "live":
whatever `LiveRouters` wrote last, whole or in part, for it writes faster than undo files can follow.

An undo file may come with a download, so it is held to what a patch of this very file can have left: its header's
digest, exactly its router weights at their exact lengths, and routers in which every byte is the original or the
patched one. A live one is believed only of a split GGUF whose header names the digest of the originals.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import ROUTERS_KEY, GgufFile, GgufTensor
from remoe_adapt.engines import read_at, replace_file, sync, write_at
from remoe_adapt.errors import ExportError

# The number is raised when a reader of today would misread a file of tomorrow.
_SUFFIX, _FORMAT = ".remoe-undo", "remoe-undo 2"
_LIVE = "live"
_MAX_NAMES_BYTES = 16 << 20


@dataclass(frozen=True)
class Undo:
    """The original bytes of the router weights of one GGUF file by name, the bytes that replace them (None: one thing
    after another), at which strength (nan where that changes)."""

    path: Path
    originals: Mapping[str, bytes]
    new: Mapping[str, bytes] | None
    strength: float

    @classmethod
    def beside(cls, file: GgufFile, routers: Mapping[str, int]) -> Undo | None:
        """The undo file of a GGUF, or None; routers: bytes of each router weight in the GGUF by name.

        Raises ExportError when it is another file's, damaged, or changes anything but these routers.
        """
        path = undo_path(file.path)
        if not os.path.lexists(path):
            return None
        try:
            undo = cls._read(path, file, routers)
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            if isinstance(error, ExportError):
                raise
            raise ExportError(
                f"{printable(path)} cannot be read ({printable(error)}): it is no undo file of this version."
            ) from error
        if undo.state(file) == "foreign":
            raise _foreign(path, file, "the routers there are neither the originals nor what it says replaced them")
        return undo

    @classmethod
    def _read(cls, path: Path, file: GgufFile, routers: Mapping[str, int]) -> Undo:
        # Before it is opened: a download may lie about its size, and a pipe would never end.
        if not path.is_file() or path.stat().st_size > 2 * sum(routers.values()) + _MAX_NAMES_BYTES:
            raise ValueError("no file, or larger than the routers")
        with safe_open(path, framework="np") as stored:
            facts, names = stored.metadata() or {}, set(stored.keys())
            if facts["format"] != _FORMAT:
                raise KeyError(facts["format"])
            # A GGUF that was downloaded anew may have the old one's name; its routers must not be overwritten.
            if facts["header"] != file.header_digest or facts["size"] != str(file.size):
                raise _foreign(path, file, "its header is another one")
            if odd := sorted(names ^ routers.keys()):
                raise _foreign(path, file, f"{printable(odd[0])} is a router of the one and not of the other")
            rows = 1 if facts["kind"] == _LIVE else 2
            for name, size in routers.items():
                part = stored.get_slice(name)
                # Shapes are compared before tensors are read, so that a forged one costs no memory.
                if part.get_dtype() != "U8" or part.get_shape() != [rows, size]:
                    found = f"{printable(name)} is {part.get_shape()} there, not [{rows}, {size}] bytes"
                    raise _foreign(path, file, found)
            read = {name: stored.get_tensor(name) for name in routers}
        originals = {name: data[0].tobytes() for name, data in read.items()}
        new = None if rows == 1 else {name: data[1].tobytes() for name, data in read.items()}
        undo = cls(path, originals, new, float(facts["strength"]))
        # A file cut short or edited by hand has another digest; the routers it would bring back are not to be trusted.
        if undo._seal() != facts["digest"] or not (math.isnan(undo.strength) if rows == 1 else 0 <= undo.strength <= 1):
            raise ValueError("its contents are not those that were written")
        if rows == 1 and file.values.get(ROUTERS_KEY) != digest(originals):
            raise _foreign(path, file, "the originals are not those that the model was split with")
        return undo

    @classmethod
    def write(
        cls, file: GgufFile, originals: Mapping[str, bytes], new: Mapping[str, bytes] | None, strength: float
    ) -> Undo:
        """Record what will be replaced and by what (None: by one thing after another); returns when that is on the
        disk."""
        undo = cls(undo_path(file.path), dict(originals), None if new is None else dict(new), strength)
        facts = {
            "format": _FORMAT,
            "kind": _LIVE if new is None else "patch",
            "size": str(file.size),
            "header": file.header_digest,
            "strength": repr(strength),
            "digest": undo._seal(),
        }
        # One row for each set of bytes: the originals, and what replaces them.
        rows = [undo.originals] if undo.new is None else [undo.originals, undo.new]
        arrays = {name: np.stack([np.frombuffer(row[name], np.uint8) for row in rows]) for name in undo.originals}
        replace_file(undo.path, save(arrays, metadata=facts))
        return undo

    def state(self, file: GgufFile) -> str:
        """ "original", "patched", "torn", "live", or "foreign" when the file holds what no patch left there."""
        now = {t.name: bytes(read_at(t.path, t.offset, t.size)) for t in self._tensors(file)}
        if now == self.originals:
            return "original"
        # A live session writes strength after strength, so no single set of bytes is the patched one.
        if self.new is None:
            return "live"
        if now == self.new:
            return "patched"
        # A kill within a write leaves some bytes old and some new. Any third value was written by somebody else.
        return "torn" if all(_mixed(now[n], self.originals[n], self.new[n]) for n in now) else "foreign"

    def put(self, file: GgufFile, pieces: Mapping[str, bytes]) -> None:
        """Write the originals, or what replaces them; returns when that is on the disk."""
        write_at(file.path, [(tensor.offset, pieces[tensor.name]) for tensor in self._tensors(file)])

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
        sync(self.path.parent)

    def _tensors(self, file: GgufFile) -> list[GgufTensor]:
        return [tensor for tensor in file.tensors if tensor.name in self.originals]

    def _seal(self) -> str:
        new = _LIVE if self.new is None else digest(self.new)
        return hashlib.sha256(f"{digest(self.originals)} {new} {self.strength!r}".encode()).hexdigest()


def undo_path(path: Path) -> Path:
    """Where the undo file of a GGUF is."""
    return path.with_name(path.name + _SUFFIX)


def digest(pieces: Mapping[str, bytes]) -> str:
    """One hash of tensors' bytes, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(pieces):
        total.update(pieces[name])
    return total.hexdigest()


def _mixed(now: bytes, original: bytes, new: bytes) -> bool:
    # Byte by byte, since a write may stop anywhere.
    found, one, other = (np.frombuffer(data, np.uint8) for data in (now, original, new))
    return bool(((found == one) | (found == other)).all())


def _foreign(path: Path, file: GgufFile, why: str) -> ExportError:
    return ExportError(
        f"{printable(path)} belongs to another file than {printable(file.path.name)}, which must have been replaced "
        f"since ({why}): remove the undo file if you do not need the old one back."
    )
