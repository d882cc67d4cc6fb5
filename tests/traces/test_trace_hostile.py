"""Trace files that somebody made to hurt: one TraceError each, in little memory and time."""

from __future__ import annotations

import io
import json
import os
import random
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_adapt.errors import TraceError
from remoe_adapt.traces.trace import MAX_ARRAY_BYTES, Trace

META = {"num_experts": 8}
EXPERTS = np.arange(8, dtype=np.int16).reshape(1, 1, 8).repeat(50, axis=1)
CSV = "# route_trace v1\n# n_expert=4\nturn,phase,step,layer,slot,expert\n"


def npy(array: Any, *, shape: str | None = None, descr: str | None = None) -> bytes:
    """An .npy member, with another shape or dtype in its header where one is given."""
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), version=(1, 0), allow_pickle=True)
    data = file.getvalue()
    header, body = data[: data.index(b"\n") + 1], data[data.index(b"\n") + 1 :]
    for key, new in (("shape", shape), ("descr", descr)):
        if new is not None:
            begin = header.index(f"'{key}': ".encode()) + len(key) + 4
            end = header.index(b"), }" if key == "shape" else b", 'fortran", begin) + (key == "shape")
            header = header[:begin] + new.encode() + header[end:]
    text = header[10:].rstrip()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return header[:8] + len(text).to_bytes(2, "little") + text + body


def write(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def members(experts: bytes = b"", meta: bytes = b"") -> dict[str, bytes]:
    return {"experts.npy": experts or npy(EXPERTS), "meta.npy": meta or npy(np.array(json.dumps(META)))}


@pytest.fixture
def peak_mib() -> Iterator[Callable[[], float]]:
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1] / (1 << 20)
    tracemalloc.stop()


def refused(path: Path, words: str) -> None:
    with pytest.raises(TraceError) as caught:
        Trace.load(path)
    text = str(caught.value)
    assert path.name in text and words in text and text.isprintable() and len(text) < 1000, text


def test_a_bomb_is_not_inflated(tmp_path: Path, peak_mib: Callable[[], float]) -> None:
    """2 GiB of zeros, deflated to 2 MB by hand: one piece of 1 MiB over and over."""
    path, size = tmp_path / "bomb.npz", 2 << 30
    head = npy(np.zeros((1, 1, 1), np.int16), shape=f"(1, {size // 2}, 1)")[:-2]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        with archive.open("experts.npy", "w", force_zip64=True) as member:
            member.write(head)
            for _ in range(size >> 24):
                member.write(bytes(1 << 24))
        archive.writestr("meta.npy", npy(np.array(json.dumps(META))))
    tracemalloc.reset_peak()
    refused(path, "would take 2048 MiB")
    assert peak_mib() < 40


def test_a_meta_that_would_become_a_million_lists_is_not_read(tmp_path: Path, peak_mib: Callable[[], float]) -> None:
    path = write(tmp_path / "t.npz", members(meta=npy(np.array("[" + "[]," * 2_000_000 + "[]]"))))
    assert path.stat().st_size < 200_000
    tracemalloc.reset_peak()
    refused(path, "'meta' would take 22 MiB")
    assert peak_mib() < 40


@pytest.mark.parametrize(
    "shape", ["(1, 1000000000000, 8)", "(-1, -50, 8)", "(99999999999999999999, 1, 1)", "(2, 50, 8)", "()", "(50,)"]
)
def test_a_shape_that_lies_allocates_nothing(tmp_path: Path, peak_mib: Callable[[], float], shape: str) -> None:
    refused(write(tmp_path / "t.npz", members(npy(EXPERTS, shape=shape))), "experts")
    assert peak_mib() < 5


def test_a_length_that_lies_too_is_found_out(tmp_path: Path, peak_mib: Callable[[], float]) -> None:
    """Shape and the zip's own length agree on 200 MiB, which are not there."""
    path = tmp_path / "t.npz"
    experts = npy(EXPERTS, shape=f"(1, {100 << 20}, 1)")
    write(path, members(experts))
    claimed, real = (200 << 20) + len(experts) - EXPERTS.nbytes, len(experts)
    data = path.read_bytes().replace(real.to_bytes(4, "little"), claimed.to_bytes(4, "little"))
    path.write_bytes(data)
    refused(path, "t.npz")
    assert peak_mib() < 40 and MAX_ARRAY_BYTES > (200 << 20)


def test_a_length_beyond_any_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", members())
    directory = path.read_bytes()
    at = directory.rindex(b"PK\x01\x02", 0, directory.rindex(b"PK\x01\x02"))
    # 0xffffffff: see the zip64 field, which is not there.
    path.write_bytes(directory[: at + 20] + b"\xff" * 8 + directory[at + 28 :])
    refused(path, "t.npz")


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda: members(npy(np.array([{"a": 1}], dtype=object))), "Python objects"),
        (lambda: members(npy(EXPERTS, descr="[('a', '<i2')]")), "int16 array"),
        (lambda: members(npy(EXPERTS.astype(">i2"))), "int16 array"),
        (lambda: members(npy(EXPERTS, descr="'<i2' * 9")), "t.npz"),
        (lambda: members(npy(EXPERTS, descr="'|V0'")), "experts"),
        (lambda: members(b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + bytes(99)), "version 2.0"),
        (lambda: members(b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535), "t.npz"),
        (lambda: members(b"\x93NUMPY\x01\x00\x0a\x00{'descr'\n#"), "t.npz"),
        (lambda: members(b"nothing of the kind"), "t.npz"),
        (lambda: members(npy(EXPERTS - 5)), "outside [0, 8)"),
        (lambda: members(npy(EXPERTS + 30000)), "outside [0, 8)"),
        (lambda: members(meta=npy(np.array("[" * 100_000))), "nested too deeply"),
        (lambda: members(meta=npy(np.array('{"num_experts": ' + "9" * 400 + "}"))), "400 digits"),
        (lambda: members(meta=npy(np.array('{"num_experts": NaN}'))), "NaN"),
        (lambda: members(meta=npy(np.array('{"num_experts": 8, "num_experts": 9}'))), "stands twice"),
        (lambda: members(meta=npy(np.array('{"num_experts": "\\u001b[2J"}'))), "num_experts"),
        (lambda: members(meta=npy(np.array("ab"), descr="'>U2'")), "t.npz"),
        (lambda: {"\x1b[2J.npy": b"", "../../experts.npy": b"", **{f"{n}.npy": b"" for n in range(300)}}, "lacks"),
        (dict, "it has none"),
    ],
)  # fmt: skip
def test_members_of_other_kinds_are_one_error(
    tmp_path: Path, made: Callable[[], dict[str, bytes]], words: str, peak_mib: Callable[[], float]
) -> None:
    refused(write(tmp_path / "t.npz", made()), words)
    assert peak_mib() < 10


def test_names_that_stand_twice_and_other_packings_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "twice.npz", members())
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("experts.npy", npy(EXPERTS))
    refused(path, "2 times")
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        refused(write(tmp_path / "packed.npz", members(), method), "packed by method")


def test_deep_meta_of_a_caller_is_a_trace_error_too() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(TraceError, match="cannot be written as JSON"):
        Trace(EXPERTS, META | {"deep": deep})
    with pytest.raises(TraceError, match=r"meta .*30 digits"):  # it could be saved and never loaded
        Trace(EXPERTS, META | {"note": 10**29})


def test_what_is_no_regular_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.npz")
    refused(tmp_path / "pipe.npz", "no regular file")
    refused(tmp_path, "no regular file")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("0,0,0,0,0,1" + ",1" * 10_000_000, "more than 4096 characters"),
        ("0,0,0,0,0," + "9" * 4000, "run.csv"),
        ("0,0,0,0,0," + "9" * 400, "run.csv"),
        ("0,0,0,0,9223372036854775807,1", "row is missing"),
        ("0,0,0,0,0,9223372036854775807", "more than int16"),
        ("0,0,0,0,0,-1", "more than int16"),
        ("-9223372036854775808,0,0,0,0,5", "outside [0, 4)"),
        ("\n\n \n", "ends after its header"),
        ("# nothing", "run.csv"),
        ("0,0,0,0,0,\x00", "run.csv"),
        ("\x1b[2J,0,0,0,0,1", "run.csv"),
    ],
)
def test_lines_made_to_hurt_are_one_error(tmp_path: Path, body: str, words: str, peak_mib: Callable[[], float]) -> None:
    path = tmp_path / "run.csv"
    path.write_text(CSV + body + "\n")
    tracemalloc.reset_peak()
    refused(path, words)
    assert peak_mib() < 5


def test_a_csv_of_another_encoding_and_a_header_without_end_are_one_error(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    path.write_bytes(CSV.encode() + b"\xff\xfe,0\n")
    refused(path, "run.csv")
    path.write_text("# route_trace v1" + " a=b" * 3_000_000)
    refused(path, "more than 4096 characters")
    path.write_text(CSV.replace("n_expert=4", "n_expert=" + "9" * 300) + "0,0,0,0,0,1\n")
    refused(path, "300 digits")


def test_bytes_changed_at_random_are_a_trace_or_one_error(tmp_path: Path) -> None:
    path = write(tmp_path / "t.npz", members(), zipfile.ZIP_STORED)
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(1500):
        data = bytearray(whole)
        for _ in range(draw.randint(1, 12)):
            data[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(data)
        try:
            Trace.load(path)
        except TraceError as error:
            assert str(error).isprintable()
