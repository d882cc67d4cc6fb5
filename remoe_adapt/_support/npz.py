"""Arrays out of an npz file of others, in bounded memory: what a member claims is checked before it is read."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe_adapt._support.untrusted import printable
from remoe_adapt.errors import RemoeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# What numpy writes; its readers of later versions take a header of 4 GiB.
_NPY_VERSION = (1, 0)
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def read_arrays(source: Path, limits: Mapping[str, int], error: type[RemoeError]) -> list[NDArray[Any]]:
    """The arrays named in `limits`, which says how many bytes each may have, read-only; others are not looked at.

    Raises `error` for an absent array, one of Python objects, one whose header and length disagree, and one beyond its
    limit; what zipfile and numpy raise for damage goes through.
    """
    with source.open("rb") as file, zipfile.ZipFile(file) as archive:
        members = archive.namelist()
        arrays = []
        for name, limit_bytes in limits.items():
            found = members.count(f"{name}.npy")
            if found != 1:
                held = ", ".join(printable(member.removesuffix(".npy")) for member in members[:8])
                what = (
                    f"holds {name!r} {found} times" if found else f"lacks the array {name!r}; it has {held or 'none'}"
                )
                raise error(f"it {what}")
            arrays.append(_read(archive, archive.getinfo(f"{name}.npy"), name, limit_bytes, error))
        return arrays


def _read(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, name: str, limit_bytes: int, error: type[RemoeError]
) -> NDArray[Any]:
    import numpy as np  # here, because this room's face is imported before a command knows that it needs arrays

    if info.compress_type not in _METHODS:
        raise error(f"{name!r} is packed by method {info.compress_type}: numpy writes plain or deflated arrays")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version != _NPY_VERSION:
            raise error(f"{name!r} is of .npy version {'.'.join(map(str, version))}: write it with numpy.savez")
        shape, in_fortran_order, dtype = np.lib.format.read_array_header_1_0(member)
        # numpy would unpickle those, and a pickle runs code.
        if dtype.hasobject:
            raise error(f"{name!r} holds Python objects, which only pickle reads (allow_pickle=False)")
        if min(shape, default=0) < 0:
            raise error(f"{name!r} has the shape {printable(shape)}")
        size_bytes = math.prod(shape) * dtype.itemsize
        header_bytes = member.tell()
        # Compared before anything is allocated: a header may claim more memory than there is.
        if header_bytes + size_bytes != info.file_size:
            raise error(
                f"{name!r} should have {size_bytes} bytes by its shape {printable(shape)} of {printable(dtype)}, the "
                f"file has {info.file_size - header_bytes}"
            )
        if size_bytes > limit_bytes:
            raise error(f"{name!r} would take {size_bytes >> 20} MiB, more than the {limit_bytes >> 20} it may have")
        data = member.read(size_bytes)
        # The archive's directory may be wrong about the length as well; the stream is what counts.
        if len(data) != size_bytes or member.read(1):
            raise error(f"{name!r} ends after {len(data)} of {size_bytes} bytes")
    return np.frombuffer(data, dtype).reshape(shape, order="F" if in_fortran_order else "C")
