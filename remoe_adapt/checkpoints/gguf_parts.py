"""The parts of a split GGUF, which must be one model: each in its place, none twice, none of another model."""

from __future__ import annotations

from collections.abc import Sequence

from remoe_adapt._support import printable
from remoe_adapt.checkpoints.gguf_file import GgufFile

ARCHITECTURE_KEY = "general.architecture"
NUMBER_KEY, COUNT_KEY, TENSORS_KEY = SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")
# `split_gguf` writes two digests into every part: of the model that was split, and of its original routers. Without
# them, parts of two fine-tunings of one base could be mixed, as they agree in format and sizes.
MODEL_KEY, ROUTERS_KEY = DIGEST_KEYS = ("remoe.split.model", "remoe.split.routers")


def check_parts(files: Sequence[GgufFile]) -> None:
    """Raises the files' `error` when they, in the order of their names, are not the parts of one split model."""
    _check_places(files)
    first, seen = files[0], dict[str, GgufFile]()
    for file in files:
        for tensor in file.tensors:
            if other := seen.get(tensor.name):
                where = f"{printable(other.path)} and {printable(file.path)}"
                raise first.error(f"tensor {printable(tensor.name)} is in {where}: they are not parts of one model.")
            seen[tensor.name] = file
    for file in files[1:]:
        for key in (ARCHITECTURE_KEY, *DIGEST_KEYS):
            # Parts by other tools carry none of our keys; they are held to places, names and counts alone.
            if key in first.entries and key in file.entries and first.entries[key] != file.entries[key]:
                raise first.error(
                    f"{printable(file.path)} is of another model than {printable(first.path)} ({key} differs): fetch "
                    "the parts of one model."
                )
    for file in files:
        if (total := file.number(TENSORS_KEY, len(seen))) != len(seen):
            raise first.error(
                f"{printable(file.path)} is of a model split into {total} tensors, the parts here hold {len(seen)}: "
                "they are not parts of one model."
            )


def _check_places(files: Sequence[GgufFile]) -> None:
    # A model of one file may say that it is part 0 of 1.
    named_as_part = len(files) > 1 or files[0].entries.keys() & {NUMBER_KEY, COUNT_KEY}
    for place, file in enumerate(files if named_as_part else ()):
        if missing := [key for key in (NUMBER_KEY, COUNT_KEY) if key not in file.entries]:
            raise file.error(f"{printable(file.path)} has no {missing[0]}: it is no part of a split GGUF.")
        found = (file.number(NUMBER_KEY, 0), file.number(COUNT_KEY, 0))
        if found != (place, len(files)):
            raise file.error(
                f"{printable(file.path)} is part {found[0] + 1} of {found[1]} by its metadata, not {place + 1} of "
                f"{len(files)}: give each part its own name back, as in NAME-00001-of-{found[1]:05d}.gguf."
            )
