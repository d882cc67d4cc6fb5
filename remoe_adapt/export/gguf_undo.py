"""The undo file beside a GGUF that is patched in place: the original routers, on the disk before the first write.

It is the journal too. Whatever is killed when, the originals are whole in it, and the file's routers are one of
"original", "patched" (as the undo file says), "torn" (part of each), which the next patch or undo ends, or "live":
whatever `LiveRouters` wrote last, whole or in part, for it writes faster than undo files can follow.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from remoe_adapt.errors import ExportError
from remoe_adapt.export.files import read_at, replace_file, sync, write_at
from remoe_adapt.export.gguf_file import GgufFile, GgufTensor

_SUFFIX, _FORMAT = ".remoe-undo", "remoe-undo 1"
_LIVE = "live"


@dataclass(frozen=True)
class Undo:
    """The original bytes of tensors of one GGUF file by name, the digest of what replaces them, at which strength (nan
    where that changes)."""

    path: Path
    originals: Mapping[str, bytes]
    target: str
    strength: float

    @classmethod
    def beside(cls, file: GgufFile) -> Undo | None:
        """The undo file of a GGUF, or None. Raises ExportError when it is another file's, or damaged."""
        path = undo_path(file.path)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="np") as stored:
                facts = stored.metadata() or {}
                originals = {name: stored.get_tensor(name).tobytes() for name in stored.keys()}  # noqa: SIM118
            if facts["format"] != _FORMAT:
                raise KeyError(facts["format"])
            same = (facts["size"], facts["header"]) == (str(file.size), file.header_digest)
            target, strength = facts["target"], float(facts["strength"])
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise ExportError(f"{path} cannot be read ({error}): it is no undo file of this version.") from error
        if not same:
            raise ExportError(
                f"{path} belongs to another file than {file.path.name}, which must have been replaced since: remove "
                "the undo file if you do not need the old one back."
            )
        return cls(path, originals, target, strength)

    @classmethod
    def write(
        cls, file: GgufFile, originals: Mapping[str, bytes], new: Mapping[str, bytes] | None, strength: float
    ) -> Undo:
        """Record what will be replaced and by what (None: by one thing after another); returns when that is on the
        disk."""
        undo = cls(undo_path(file.path), dict(originals), _LIVE if new is None else digest(new), strength)
        facts = {
            "format": _FORMAT,
            "size": str(file.size),
            "header": file.header_digest,
            "target": undo.target,
            "strength": repr(strength),
        }
        arrays = {name: np.frombuffer(data, np.uint8) for name, data in undo.originals.items()}
        replace_file(undo.path, save(arrays, metadata=facts))
        return undo

    def state(self, file: GgufFile) -> str:
        """ "original", "patched", "torn" or "live"."""
        now = {t.name: bytes(read_at(t.path, t.offset, len(self.originals[t.name]))) for t in self._tensors(file)}
        if now == dict(self.originals):
            return "original"
        if self.target == _LIVE:
            return "live"
        return "patched" if digest(now) == self.target else "torn"

    def restore(self, file: GgufFile) -> None:
        """Put the originals back, then remove the undo file."""
        write_at(file.path, [(tensor.offset, self.originals[tensor.name]) for tensor in self._tensors(file)])
        self.remove()

    def remove(self) -> None:
        self.path.unlink()
        sync(self.path.parent)

    def _tensors(self, file: GgufFile) -> list[GgufTensor]:
        return [tensor for tensor in file.tensors if tensor.name in self.originals]


def undo_path(path: Path) -> Path:
    """Where the undo file of a GGUF is."""
    return path.with_name(path.name + _SUFFIX)


def digest(pieces: Mapping[str, bytes]) -> str:
    """One hash of tensors' bytes, in the order of their names."""
    total = hashlib.sha256()
    for name in sorted(pieces):
        total.update(pieces[name])
    return total.hexdigest()
