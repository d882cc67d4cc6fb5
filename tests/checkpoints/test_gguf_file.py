"""The reader of GGUF files: sizes of its types, and errors of the class that it was opened with."""

from __future__ import annotations

from pathlib import Path

import pytest
from raw_gguf import ARRAY, STRING, U16, U32, RawTensor, raw_model

from remoe_adapt.checkpoints.gguf_file import BLOCKS, GgufFile, shard_paths
from remoe_adapt.checkpoints.gguf_parts import check_parts
from remoe_adapt.errors import ConfigError, ExpertReadError, ExportError, RemoeError
from remoe_adapt.expert_cache.encodings.blocks import block_type

ERRORS: list[type[RemoeError]] = [ExportError, ExpertReadError]


def test_sizes_of_types_are_those_of_the_gguf_package() -> None:
    gguf = pytest.importorskip("gguf", reason="the gguf package's own table (extra: export)")
    theirs = {int(kind): size for kind, size in gguf.GGML_QUANT_SIZES.items()}
    assert theirs.items() <= BLOCKS.items()


def test_encodings_have_the_same_types() -> None:
    found = {number: block_type(number) for number in BLOCKS}
    assert {number: (kind.values, kind.bytes) for number, kind in found.items()} == BLOCKS


@pytest.mark.parametrize("error", ERRORS)
def test_every_fault_is_of_the_class_asked_for(error: type[RemoeError], tmp_path: Path) -> None:
    path = raw_model().write(tmp_path / "m.gguf")
    whole = path.read_bytes()
    twice = raw_model()
    twice.tensors.append(RawTensor("output.weight", (1, 32), bytes(34), 8))
    damaged = {
        "is no GGUF file": b"JUNK" + whole[4:],
        "GGUF versions 2 and 3": whole[:4] + b"\x09\0\0\0" + whole[8:],
        "is not a whole GGUF file": whole[:40],
        "ends at byte": whole[:-40],
        "stands in it twice": twice.written(),
        "no power of two": raw_model().with_entry("general.alignment", U32, 33).written(),
    }
    for words, content in damaged.items():
        path.write_bytes(content)
        with pytest.raises(RemoeError, match=words) as caught:
            GgufFile(path, error)
        assert type(caught.value) is error and str(caught.value).count(path.name) == 1
    with pytest.raises(error, match="cannot be read: No such file"):
        GgufFile(tmp_path / "none.gguf", error)
    odd = raw_model().with_entry("a.number", STRING, b"four").with_entry("a.list", ARRAY, b"\4\0\0\0" + bytes(8))
    opened = GgufFile(odd.write(path), error)
    for key, words in (("a.number", "'four' where a whole number belongs"), ("a.list", "a list where")):
        with pytest.raises(error, match=words):
            opened.number(key, 0)


@pytest.mark.parametrize("error", ERRORS)
def test_faults_of_split_files_too(error: type[RemoeError], tmp_path: Path) -> None:
    places = {"split.no": (U16, 1), "split.count": (U16, 2)}
    for number in (1, 2):
        model = raw_model()
        model.entries |= places
        model.write(tmp_path / f"m-{number:05d}-of-00002.gguf")
    paths = shard_paths(tmp_path / "m-00001-of-00002.gguf", ConfigError)
    with pytest.raises(error, match="is part 2 of 2 by its metadata, not 1"):
        check_parts([GgufFile(path, error) for path in paths])
    paths[1].unlink()
    with pytest.raises(error, match="is not beside it"):
        shard_paths(paths[0], error)
    with pytest.raises(error, match="is a later part"):
        shard_paths(paths[1], error)
