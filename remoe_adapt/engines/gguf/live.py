"""The routers of a split GGUF, rewritten under the engines that have its first part mapped: a swap in mid-generation.

The engine is not asked. It reads routers out of the page cache while they are replaced there, so the token that is
under way at a swap may see some layers at the old strength and some at the new one.
"""

from __future__ import annotations

import math
import os
import time
from contextlib import ExitStack
from pathlib import Path

from remoe_adapt._support import disk_faults, printable
from remoe_adapt.checkpoints import ROUTERS_KEY
from remoe_adapt.engines import write_pieces
from remoe_adapt.engines.gguf.patch import Base, locked, refuse_links
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.undo import Undo, digest
from remoe_adapt.errors import ConfigError, ExportError
from remoe_adapt.family import Family

_STAYS = "the originals are in the undo file beside it; `remoe export gguf ... --undo` puts them back"


class LiveRouters:
    """The first part of a split GGUF, held at a strength until `close`; nobody else can patch it till then.

    An undo file with the originals is on the disk before the first change and stays until `close`; after a kill,
    `undo_in_place` or the next one of these puts things right. `spans`: (begin, end) of every router in the file.
    `strength` is None while it is not known, after a kill; `swap_s` is how long the last `write` wrote. read_only: only
    looked at; `write` and `close` are not for it. All writes go to the file that was opened, also when another one has
    taken its name since.

    Raises ConfigError for a file that is not split by `split_gguf` at strength 0, whose first part holds more than
    routers, or that is a link, ExportError (also of `write` and `close`) when the disk fails, else as `locked`,
    `GgufModel` and `GgufModel.check`.
    """

    def __init__(
        self, source: str | os.PathLike[str], family: Family, *, base: Base = None, read_only: bool = False
    ) -> None:
        self._family, self._fd = family, -1
        with ExitStack() as ending, disk_faults(Path(source), ExportError, "give another file"):
            if not read_only:
                self._fd = ending.enter_context(locked(Path(source)))
            self._model = GgufModel(source)
            self._file = self._model.files[0]
            self.path = self._file.path
            self._refuse_what_is_not_apart()
            refuse_links([self._file])
            self._layers = self._model.check(family, base)
            self._originals = self._model.originals(self.path)
            weights = self._model.weights.values()
            self.spans = [(t.offset, t.offset + len(self._originals[t.name])) for t in weights]
            self.swap_s: float | None = None
            undo = self._model.undos.get(self.path)
            found = "original" if undo is None else undo.state(self._file)
            # What a killed session left is torn or live, and of no known strength.
            self.strength = {"original": 0.0, "patched": undo.strength if undo else None}.get(found)
            # From here on the lock is held until `close`; an error above has released it.
            self._ending = ending.pop_all()

    def write(self, strength: float) -> None:
        """Replace all routers, layer by layer, one call each; the page cache has them then, the disk later."""
        pieces = self._model.placed(self._model.live(self._family, strength, self._layers)[self.path], self.path)
        with disk_faults(self.path, ExportError, _STAYS):
            undo = self._model.undos.get(self.path)
            # An undo file of a live session has no one strength, so it holds NaN; one of `patch_in_place` has a number.
            if undo is None or not math.isnan(undo.strength):
                # Before the first byte of a router changes, since a kill in between could not be put right otherwise.
                self._model.undos[self.path] = Undo.write(self._file, self._originals, None, math.nan)
            self.strength = None
            # The strength is unknown until the write has ended: a reader of `strength` must not believe half a swap.
            begin_s = time.perf_counter()
            write_pieces(self._fd, pieces)
        self.swap_s, self.strength = time.perf_counter() - begin_s, strength

    def close(self, keep: bool = False) -> None:
        """Put the originals back, or leave the strength as it is, with its undo file; on the disk, either way."""
        undo = self._model.undos.get(self.path)
        with self._ending, disk_faults(self.path, ExportError, _STAYS):
            # What was live for a while becomes an ordinary patch, so that `--undo` knows what it will find.
            if undo is not None and keep and self.strength:
                new = self._model.live(self._family, self.strength, self._layers)[self.path]
                os.fsync(self._fd)
                Undo.write(self._file, self._originals, new, self.strength)
            elif undo is not None:
                self.strength = None
                write_pieces(self._fd, self._model.placed(self._originals, self.path))
                os.fsync(self._fd)
                undo.remove()
                del self._model.undos[self.path]
                self.strength = 0.0
        self._fd = -1

    def _refuse_what_is_not_apart(self) -> None:
        model = self._model
        routers = {tensor.name for tensor in model.router_tensors()}
        inside = {tensor.name for tensor in self._file.tensors}
        outside = [t.name for t in model.weights.values() if t.path != self.path]
        named = self._file.values.get(ROUTERS_KEY) == digest(model.originals(self.path))
        if len(model.files) < 2 or outside or not inside <= routers or not named:
            why = (
                "is not split" if len(model.files) < 2
                else f"does not hold {outside[0]}" if outside
                else f"holds more than routers ({printable(min(inside - routers))})" if inside - routers
                else "was split at another strength, or by an older version"
            )  # fmt: skip
            raise ConfigError(
                f"{printable(self.path)} {why}: --live rewrites a first part that holds routers alone; make one with "
                "`remoe export gguf MODEL.gguf FAMILY OUT.gguf --split --strength 0`, and start the engine on it."
            )
