"""An existing GGUF with the routers of one strength: as a copy, in place, or split so that a strength costs little."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from remoe_adapt._support import disk_faults, is_file, printable
from remoe_adapt.checkpoints import GgufFile, shard_name
from remoe_adapt.engines import OnBytes, clone_or_copy, ignore_bytes, left_out, link_or_copy, new_files, write_at
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.undo import Undo, undo_path
from remoe_adapt.errors import ConfigError, ExportError
from remoe_adapt.family import Family

Base = str | os.PathLike[str] | None
NOTHING_LEFT = "nothing of it was left behind; make room there, or give another place"
AS_IT_WAS = "it is as it was; make room there, or export a copy to another place"


def export_gguf(
    source: str | os.PathLike[str],
    family: Family,
    strength: float,
    out: str | os.PathLike[str],
    *,
    base: Base = None,
    force: bool = False,
    on_bytes: OnBytes = ignore_bytes,
    on_total: OnBytes = ignore_bytes,
) -> dict[str, Any]:
    """Write `out`: the GGUF `source` with the router weights that `Family.live` gives, every other byte as it is.

    Of a split GGUF only the parts that hold routers are written, under `out`'s name with the part's number; the others
    are hard links. The copy shares the source's blocks where the file system can.

    After an error nothing is left of what was written. Raises ConfigError when a file to write exists, ExportError when
    one cannot be written, else as `GgufModel`, `GgufModel.check` and `GgufModel.live`.
    """
    model = GgufModel(source)
    pieces = model.live(family, strength, model.check(family, base, force=force))
    # Everything above refuses before a byte is written.
    targets = _targets(Path(out), len(model.files))
    on_total(sum(file.size for file in model.files))
    how = {}
    with disk_faults(targets[0], ExportError, NOTHING_LEFT), new_files(targets) as drafts:
        # Backwards, so that the small part with the routers is written when the large ones are there.
        for file, target, draft in reversed(list(zip(model.files, targets, drafts, strict=True))):
            if file.path in pieces:
                how[target.name] = clone_or_copy(file.path.resolve(), draft, on_bytes)
                write_at(draft, model.placed(pieces[file.path], file.path))
            else:
                how[target.name] = link_or_copy(file.path, draft, on_bytes)
    return export_facts(model, family, strength, targets[0]) | {"files": how}


def patch_in_place(
    source: str | os.PathLike[str], family: Family, strength: float, *, base: Base = None, force: bool = False
) -> dict[str, Any]:
    """Replace the routers inside `source`; an undo file beside it holds the originals, whatever is patched how often.

    It is on the disk before the first change, so after a kill the next call, or `undo_in_place`, puts things right
    (`recovered` says that there was something to). From one strength to another the way leads over the originals, so
    that no more than those and one patch are ever mixed. Strength 0 restores the base and removes the undo file. A
    process that has the file memory-mapped sees the new routers at once. After an error, or Ctrl-C, file and undo file
    are as they were.

    Raises ConfigError when the file is a link or has several names (another program's store would change with it;
    unless `force`), or is being patched by another process, ExportError when the disk does not take it, else as
    `GgufModel`, `GgufModel.check` and `GgufModel.live`.
    """
    path = Path(source)
    with disk_faults(path, ExportError, AS_IT_WAS), locked(path):
        model = GgufModel(source)
        if not force:
            refuse_links(model.files)
        pieces = model.live(family, strength, model.check(family, base, force=force))
        # Asked now, because putting the originals back makes every state "original".
        torn = any(undo.state(file) in ("torn", "live") for file, undo in model.undone())
        changed = [file for file in model.files if file.path in pieces]
        kept = []
        with _all_or_nothing(model):
            for file, undo in model.undone():
                undo.put(file, undo.originals)
                if strength == 0.0:
                    undo.remove()
            for file in changed if strength else ():
                # All undo files are on the disk before the first change: a kill between two parts can then be put
                # right.
                undo = Undo.write(file, model.originals(file.path), pieces[file.path], strength)
                kept.append(str(undo.path))
            for file in changed if strength else ():
                write_at(file.path, model.placed(pieces[file.path], file.path))
    return export_facts(model, family, strength, path) | {"undo": kept, "recovered": torn}


def undo_in_place(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Give `source` its original routers back, also after an interrupted patch, and remove the undo file.

    Raises ConfigError when there is no undo file, ExportError when it is not this file's or the disk does not take the
    originals, else as `GgufModel`.
    """
    path = Path(source)
    with disk_faults(path, ExportError, AS_IT_WAS), locked(path):
        model = GgufModel(source)
        if not model.undos:
            raise ConfigError(f"{printable(path)} has no undo file beside it: it was not patched in place.")
        states = {file.path.name: undo.state(file) for file, undo in model.undone()}
        with _all_or_nothing(model):
            for file, undo in model.undone():
                undo.put(file, undo.originals)
                undo.remove()
    return {"out": str(source), "strength": 0.0, "was": states}


@contextmanager
def _all_or_nothing(model: GgufModel) -> Iterator[None]:
    """After an error inside, routers and undo files are as they were found (where a kill had torn them, the originals).

    Raises ExportError when even that fails.
    """
    # Read before the block runs, because afterwards the file no longer tells what it held.
    found = [(file, pieces) for file in model.files if (pieces := model.originals(file.path))]
    patched = [(file, undo) for file, undo in model.undone() if undo.state(file) == "patched"]
    try:
        yield
    except BaseException as error:
        try:
            for file, originals in found:
                write_at(file.path, model.placed(originals, file.path))
                undo = model.undos.get(file.path)
                if undo is None:
                    undo_path(file.path).unlink(missing_ok=True)
                # The undo file was replaced by the block; its old contents are what the file must be undone by.
                elif Undo.beside(file, {name: len(data) for name, data in originals.items()}) != undo:
                    Undo.write(file, undo.originals, undo.new, undo.strength)
            # A file that was patched when we came is patched again, as the originals above have overwritten that.
            for file, undo in patched:
                undo.put(file, undo.new or undo.originals)
        except OSError as second:
            raise ExportError(
                f"{printable(model.path)} could be neither changed ({printable(error)}) nor put back "
                f"({printable(second)}): run `remoe export gguf {printable(model.path)} --undo` when the disk works."
            ) from error
        raise


def export_facts(model: GgufModel, family: Family, strength: float, out: Path) -> dict[str, Any]:
    """What every export of a model's routers tells of itself."""
    return {
        "out": str(out),
        "base": family.base_id,
        "strength": strength,
        "architecture": printable(model.architecture),
        "routers": len(model.weights),
        "router_bytes": sum(len(data) for file in model.files for data in model.originals(file.path).values()),
        **left_out(family, strength),
    }


def part_paths(out: Path, count: int) -> list[Path]:
    """The files of a split GGUF that is called `out`, with or without a part's number."""
    stem = re.sub(r"(-\d{5}-of-\d{5})?\.gguf$", "", out.name)
    return [out.with_name(shard_name(stem, number, count)) for number in range(1, count + 1)]


def _targets(out: Path, count: int) -> list[Path]:
    if out.suffix != ".gguf":
        raise ConfigError(f"{printable(out)} must end in .gguf: engines know the format by that.")
    return [out] if count == 1 else part_paths(out, count)


def refuse_links(files: Iterable[GgufFile]) -> None:
    """Raises ConfigError when one of them is a link or has several names, which would all change."""
    for file in files:
        # The hub's cache and other programs' stores link models; changing the bytes here would change their model.
        if file.path.is_symlink() or file.path.stat().st_nlink > 1:
            raise ConfigError(
                f"{printable(file.path)} is a link or has several names, and all of them would change: export a copy, "
                "or pass --force if they shall."
            )


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """The file open for reading and writing, and nobody else's to patch meanwhile.

    Raises ConfigError when there is no such file or another process has the lock, ExportError when it is read-only.
    """
    if not is_file(path):
        raise ConfigError(f"{printable(path)} is no file: give a GGUF model (of a split one, its first part).")
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(path.open("r+b"))
            # The kernel drops the lock when its holder dies, so a kill leaves nothing to clean up.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{printable(path)} is being patched by another process: try again when it has ended."
            ) from error
        except OSError as error:
            raise ExportError(
                f"{printable(path)} cannot be written to ({error.strerror}): export a copy instead."
            ) from error
        yield file.fileno()
