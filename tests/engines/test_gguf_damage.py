"""GGUF files that lie: cut off, overlapping, doubled, mixed, of odd types. One error each, and nothing is written."""

from __future__ import annotations

import os
import random
import shutil
import struct
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from raw_gguf import (
    ARRAY,
    BOOL,
    EXPERTS,
    F32,
    HIDDEN,
    I32,
    LAYERS,
    STRING,
    U16,
    U32,
    U64,
    RawGguf,
    RawTensor,
    entry,
    raw_family,
    raw_model,
    router,
    weights,
)

from remoe_adapt.checkpoints.gguf_file import GgufFile
from remoe_adapt.engines.gguf.patch import export_gguf, patch_in_place, undo_in_place
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.errors import ConfigError, ExportError, FamilyError, RemoeError, UnsupportedRouterError
from remoe_adapt.family.family import Family


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return raw_family(tmp_path / "family")


def refusal(path: Path, kind: type[RemoeError] = ExportError) -> str:
    """What is said of a file that no one may use."""
    with pytest.raises(kind) as caught:
        GgufModel(path)
    message = str(caught.value)
    assert message.isprintable()
    return message


def test_a_file_cut_inside_its_last_tensor_is_refused_and_missing_padding_is_not(tmp_path: Path) -> None:
    path = raw_model().write(tmp_path / "m.gguf")
    whole, last = path.read_bytes(), GgufFile(path).tensors[-1]
    for cut in (1, 2, last.size - 1):
        path.write_bytes(whole[: last.offset + last.size - cut])
        assert "inside tensor output.weight" in refusal(path)
    path.write_bytes(whole[: last.offset + last.size])
    assert len(GgufModel(path).weights) == LAYERS
    path.write_bytes(whole[: last.offset])
    assert "before its last tensor" in refusal(path)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (RawTensor("output.weight", (1, 32), b"", 8, 32), "overlap"),
        (RawTensor("output.weight", (1, 32), b"x" * 34, 8, 1 << 62), "before its last tensor"),
        (RawTensor("output.weight", (1 << 40, 32), b"x" * 34, 8), "inside tensor output.weight"),
        (RawTensor("output.weight", (1, 32), b"x" * 34, 8, 17), "no multiple of 32"),
        (RawTensor("output.weight", (1, 33), b"x" * 64, 8), "no multiple of 32"),
        (RawTensor("output.weight", (0, 32), b"", 8, 64), "output.weight is empty"),
        (RawTensor("output.weight", (1, 32), b"x" * 34, 99), "ggml type 99, which is not known"),
        (RawTensor("output.weight", (1, 1, 1, 1, 32), b"x" * 34, 8), "5 dimensions"),
        (RawTensor(router(0), (EXPERTS, HIDDEN), b"x" * 128), f"{router(0)} stands in it twice"),
        (RawTensor(router(7), (EXPERTS, HIDDEN), b"x" * 128), f"has {router(7)}, its metadata says 2 layers"),
        (RawTensor("blk.0.exp_probs_b.bias", (HIDDEN,), b"x" * 32), r"exp_probs_b.bias is [8], its metadata says [4]"),
    ],
)
def test_a_tensor_that_cannot_be_is_refused(tmp_path: Path, tensor: RawTensor, words: str) -> None:
    model = raw_model()
    model.tensors[-1] = tensor
    assert words in refusal(model.write(tmp_path / "m.gguf"))


def test_a_router_has_one_name(tmp_path: Path) -> None:
    """Names of other spelling are no second router of the layer, whichever comes last."""
    for number in ("01", "\u0661", "1" * 5000):
        model = raw_model()
        model.tensors.append(RawTensor(f"blk.{number}.ffn_gate_inp.weight", (EXPERTS, HIDDEN), b"\0" * 128))
        found = GgufModel(model.write(tmp_path / "m.gguf")).weights_ED()
        assert all(torch.equal(found[layer], weight) for layer, weight in enumerate(weights()))


def test_quantised_selection_biases_are_refused_by_name(tmp_path: Path) -> None:
    model = raw_model()
    model.tensors.append(RawTensor("blk.0.exp_probs_b.bias", (32,), b"x" * 34, 8))
    assert "exp_probs_b.bias is quantised" in refusal(model.write(tmp_path / "m.gguf"), UnsupportedRouterError)


NUMBERS = struct.pack("<IQ2I", U32, 2, 2, 2)
EMPTY = struct.pack("<IQ", U32, 0)


@pytest.mark.parametrize("key", ["general.alignment", "qwen2moe.block_count", "qwen2moe.expert_count",
                                 "qwen2moe.embedding_length", "qwen2moe.nextn_predict_layers"])  # fmt: skip
@pytest.mark.parametrize(
    "value",
    [(ARRAY, NUMBERS), (ARRAY, EMPTY), (F32, 2.0), (F32, float("nan")), (BOOL, True), (STRING, b"2"), (I32, -2)],
)
def test_a_number_of_another_type_is_refused_by_its_key(tmp_path: Path, key: str, value: tuple[int, Any]) -> None:
    assert f"{key} is" in refusal(raw_model().with_entry(key, *value).write(tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("general.architecture", (U32, 3), "general.architecture is 3 where text belongs"),
        ("general.architecture", (ARRAY, NUMBERS), "general.architecture is a list where text belongs"),
        ("general.type", (F32, 1.0), "general.type is 1.0 where text belongs"),
        ("general.type", (STRING, b"\x1b[2Jmodel"), "is of the type"),
        ("general.alignment", (U32, 0), "alignment 0"),
        ("general.alignment", (U32, 48), "alignment 48"),
        ("general.alignment", (U64, 1 << 62), "alignment"),
        ("qwen2moe.nextn_predict_layers", (U32, 3), "of which 3 predict"),
        ("qwen2moe.block_count", (U64, 1), "its metadata says 1 layers"),
        ("qwen2moe.expert_count", (U64, 1 << 63), "its metadata says"),
        ("split.count", (U16, 2), "has no split.no"),
    ],
)
def test_metadata_that_cannot_be_is_refused(tmp_path: Path, key: str, value: tuple[int, Any], words: str) -> None:
    assert words in refusal(raw_model().with_entry(key, *value).write(tmp_path / "m.gguf"))


def test_whole_numbers_of_other_widths_are_read(tmp_path: Path) -> None:
    model = raw_model().with_entry("qwen2moe.block_count", U64, LAYERS).with_entry("general.alignment", U16, 32)
    assert len(GgufModel(model.write(tmp_path / "m.gguf")).weights) == LAYERS


def nested(depth: int) -> bytes:
    return struct.pack("<IQ", ARRAY, 1) * depth


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"counts": (1 << 63, 1)}, "claims"),
        ({"counts": (1, 1 << 63)}, "claims"),
        ({"counts": (4, 100)}, "not a whole GGUF file"),
        ({"entries": {"a": (ARRAY, struct.pack("<IQ", STRING, 1 << 60))}}, "texts at byte"),
        ({"entries": {"a": (ARRAY, struct.pack("<IQ", F32, 1 << 61))}}, "inside its header"),
        ({"entries": {"a": (ARRAY, struct.pack("<IQ", F32, 1 << 35))}}, "longer than 128 MiB"),
        ({"entries": {"a": (ARRAY, struct.pack("<IQQ", STRING, 1, 1 << 63))}}, "inside its header"),
        ({"entries": {"a": (ARRAY, struct.pack("<IQ", 77, 1))}}, "unknown value type 77"),
        ({"entries": {"a": (ARRAY, nested(100_000))}}, "list of lists"),
        ({"entries": {}, "counts": (0, 1), "more": struct.pack("<Q", 1 << 63)}, "inside its header"),
        ({"entries": {}, "counts": (0, 1), "more": struct.pack("<Q", 1 << 34)}, "longer than 128 MiB"),
        ({"entries": {}, "counts": (0, 2), "more": entry("a", U32, 1) * 2}, "entry a stands in it twice"),
        ({"entries": {}, "counts": (0, 1), "more": struct.pack("<Q", 2) + b"\xff\xff" + b"\0" * 8}, "not a whole GGUF"),
    ],
)
def test_lying_counts_and_lengths_take_no_memory(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = replace(raw_model(), **change).write(tmp_path / "m.gguf")
    os.truncate(path, 1 << 40)  # a hole: what is claimed could be there
    tracemalloc.start()
    message = refusal(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert words in message and peak < 32 << 20


def test_big_endian_files_are_named_as_such(tmp_path: Path) -> None:
    data = raw_model().written()
    (tmp_path / "m.gguf").write_bytes(data[:4] + data[4:8][::-1] + data[8:])
    assert "big-endian" in refusal(tmp_path / "m.gguf")


def test_text_of_others_is_printed_without_its_escapes(tmp_path: Path, family: Family) -> None:
    model = raw_model()
    model.tensors[-1].name = "\x1b]0;owned\x07output"
    path = model.write(tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes()[:-31])
    assert "owned" in refusal(path)
    assert "stands in it twice" in refusal(
        replace(raw_model(), counts=(0, 2), entries={}, more=entry("\x1b[1m", U32, 1) * 2).write(path)
    )
    odd = raw_model().with_entry("general.architecture", STRING, b"\x1b[31mqwen2moe")
    for key in ("block_count", "expert_count", "embedding_length"):
        odd.entries[f"\x1b[31mqwen2moe.{key}"] = odd.entries[f"qwen2moe.{key}"]
    result = export_gguf(odd.write(path), family, 1.0, tmp_path / "out.gguf")
    assert result["architecture"].isprintable() and "31mqwen2moe" in result["architecture"]


def test_routers_that_are_not_finite_are_refused_before_anything_is_written(tmp_path: Path, family: Family) -> None:
    model = raw_model()
    values = weights()[1].clone()
    values[2, 3] = float("nan")
    model.tensors[2].data = values.numpy().tobytes()
    path = model.write(tmp_path / "m.gguf")
    for work in (lambda: patch_in_place(path, family, 1.0, force=True),
                 lambda: export_gguf(path, family, 1.0, tmp_path / "o.gguf", force=True)):  # fmt: skip
        with pytest.raises(ExportError, match=rf"{router(1)} has values that are not finite"):
            work()
    halves = raw_model()
    for tensor, weight in zip(halves.tensors[1:3], weights(), strict=True):
        tensor.data, tensor.kind = weight.half().numpy().tobytes(), 1
    huge = raw_family(tmp_path / "huge", scale=1e5)
    with pytest.raises(FamilyError, match=r"infinite or NaN in torch\.float16"):
        patch_in_place(halves.write(path), huge, 1.0, force=True)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == halves.written()


class Parts:
    """Two models, split by us and as llama.cpp's own tool splits."""

    def __init__(self, folder: Path, family: Family) -> None:
        self.ours = self._split(raw_model(), folder / "ours", family)
        self.others = self._split(raw_model(seed=5), folder / "others", family)

    def _split(self, model: RawGguf, folder: Path, family: Family) -> list[Path]:
        source = model.write(folder / "source.gguf")
        result = split_gguf(source, family, 0.0, folder / "m.gguf", force=True)
        return [folder / name for name in result["files"]]


def stock_split(folder: Path, change: Callable[[list[RawGguf]], Any] = lambda _: None) -> Path:
    """As llama.cpp's tool does it: all metadata in the first part, numbers alone in the second."""
    whole = raw_model()
    parts = [replace(whole, tensors=whole.tensors[:2]), RawGguf(tensors=whole.tensors[2:])]
    for number in (0, 1):
        places = {"split.no": (U16, number), "split.count": (U16, 2), "split.tensors.count": (I32, 4)}
        parts[number] = replace(parts[number], entries=parts[number].entries | places)
    change(parts)
    for number, part in enumerate(parts, start=1):
        part.write(folder / f"m-{number:05d}-of-00002.gguf")
    return folder / "m-00001-of-00002.gguf"


def test_splits_by_llama_cpp_are_read(tmp_path: Path, family: Family) -> None:
    first = stock_split(tmp_path)
    found = GgufModel(first).weights_ED()
    assert all(torch.equal(found[layer], weight) for layer, weight in enumerate(weights()))
    before = [path.read_bytes() for path in sorted(tmp_path.glob("*.gguf"))]
    patch_in_place(first, family, 1.0)
    assert len(list(tmp_path.glob("*.remoe-undo"))) == 2
    undo_in_place(first)
    assert [path.read_bytes() for path in sorted(tmp_path.glob("*.gguf"))] == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda parts: parts.__setitem__(1, parts[0]), "is part 1 of 2 by its metadata, not 2 of 2"),
        (lambda parts: parts.reverse(), "is part 2 of 2 by its metadata, not 1 of 2"),
        (lambda parts: parts.__setitem__(slice(None), [raw_model(), raw_model()]), "has no split.no"),
        (lambda parts: parts[1].entries.pop("split.no"), "has no split.no"),
        (lambda parts: parts[1].entries.pop("split.count"), "has no split.count"),
        (lambda parts: parts[1].entries.update({"split.count": (U16, 3)}), "part 2 of 3 by its metadata"),
        (lambda parts: parts[1].entries.update({"split.no": (STRING, b"1")}), "split.no is '1' where a whole number"),
        (lambda parts: parts[1].tensors.append(parts[0].tensors[1]), f"tensor {router(0)} is in"),
        (lambda parts: parts[1].tensors.append(parts[0].tensors[0]), "tensor token_embd.weight is in"),
        (lambda parts: parts[1].tensors.pop(), "split into 4 tensors, the parts here hold 3"),
        (
            lambda parts: parts[1].entries.update({"general.architecture": (STRING, b"olmoe")}),
            "of another model.*general.architecture",
        ),
    ],
)  # fmt: skip
def test_parts_that_are_not_of_one_model_are_refused(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    message = refusal(stock_split(tmp_path, change))
    assert all(word in message for word in words.split(".*"))


def test_our_parts_of_different_models_are_not_mixed(tmp_path: Path, family: Family) -> None:
    parts = Parts(tmp_path, family)
    assert [path.stat().st_size for path in parts.ours] == [path.stat().st_size for path in parts.others]
    shutil.copy(parts.others[1], parts.ours[1])
    assert "remoe.split.model differs" in refusal(parts.ours[0])


def test_splitting_is_the_same_each_time_and_copies_of_a_strength_go_with_the_rest(
    tmp_path: Path, family: Family
) -> None:
    parts = Parts(tmp_path / "one", family)
    again = Parts(tmp_path / "two", family)
    assert [path.read_bytes() for path in parts.ours] == [path.read_bytes() for path in again.ours]
    stronger = export_gguf(parts.ours[0], family, 1.0, tmp_path / "s100" / "m.gguf")
    assert len(GgufModel(stronger["out"]).files) == 2


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("m-00001-of-00000.gguf", "part 1 of 0, which cannot be"),
        ("m-00000-of-00002.gguf", "part 0 of 2, which cannot be"),
        ("m-00003-of-00002.gguf", "part 3 of 2, which cannot be"),
        ("m-00002-of-00003.gguf", "later part"),
        ("m-00001-of-99999.gguf", "part m-00002-of-99999.gguf is not beside it"),
        ("m-00001-of-00002\n.gguf", None),
    ],
)
def test_numbers_in_names_that_cannot_be_are_refused(tmp_path: Path, name: str, words: str | None) -> None:
    path = raw_model().write(tmp_path / name)
    if words is None:
        assert len(GgufModel(path).files) == 1
    else:
        assert words in refusal(path)


def test_a_part_under_another_name_is_refused(tmp_path: Path) -> None:
    first = stock_split(tmp_path)
    for name in ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"):
        shutil.copy(tmp_path / name, tmp_path / "alone.gguf")
        assert "give each part its own name back" in refusal(tmp_path / "alone.gguf")
    first.unlink()
    assert "is no file" in refusal(first, ConfigError)


def test_parts_of_other_alignments_keep_theirs_when_split(tmp_path: Path, family: Family) -> None:
    def change(parts: list[RawGguf]) -> None:
        del parts[0].entries["general.alignment"]
        parts[1].entries["general.alignment"] = (U32, 64)
        parts[1].alignment = 64

    first = stock_split(tmp_path, change)
    result = split_gguf(first, family, 0.0, tmp_path / "new" / "m.gguf")
    before, after = ({t.name: t for f in GgufModel(p).files for t in f.tensors} for p in (first, result["out"]))
    assert before.keys() == after.keys()
    for name, old in before.items():
        data = [t.path.read_bytes()[t.offset : t.offset + t.size] for t in (old, after[name])]
        assert data[0] == data[1]


ODD_NUMBERS = (0, 1, 2, 31, 33, 255, 1 << 16, (1 << 32) - 1, 1 << 40, (1 << 63) - 1, 1 << 63, (1 << 64) - 1)


def mutated(drawn: random.Random, data: bytes) -> bytes:
    """Up to three changes: bits, bytes, numbers, cuts, repetitions and gaps, mostly in the header."""
    found = bytearray(data)
    for _ in range(drawn.choice((1, 1, 2, 3))):
        place = drawn.randrange(min(len(found), drawn.choice((600, 600, len(data)))) or 1)
        how = drawn.randrange(6)
        if how == 0 and found:
            found[place] ^= 1 << drawn.randrange(8)
        elif how == 1:
            found[place : place + 8] = struct.pack("<Q", drawn.choice(ODD_NUMBERS))
        elif how == 2:
            found[place : place + 4] = struct.pack("<I", drawn.choice(ODD_NUMBERS) & 0xFFFFFFFF)
        elif how == 3:
            del found[drawn.randrange(len(found) or 1) :]
        elif how == 4:
            found[place:place] = found[place : place + drawn.randrange(1, 64)]
        else:
            del found[place : place + drawn.randrange(1, 40)]
    return bytes(found)


def test_a_mutated_file_is_exported_right_or_refused_with_one_error(tmp_path: Path, family: Family) -> None:
    whole, drawn = raw_model().written(), random.Random(12)
    path, out = tmp_path / "m.gguf", tmp_path / "out.gguf"
    exported = 0
    tracemalloc.start()
    for _ in range(400):
        data = mutated(drawn, whole)
        path.write_bytes(data)
        try:
            export_gguf(path, family, 1.0, out, force=True)
        except RemoeError as error:
            assert str(error).isprintable() and list(tmp_path.iterdir()) == [path]
            continue
        model, new = GgufModel(path), out.read_bytes()
        base = dict(zip(family.points[0].deltas, model.weights_ED().values(), strict=True))
        expected = bytearray(data)
        for tensor, live in zip(model.weights.values(), family.live(1.0, base).values(), strict=True):
            expected[tensor.offset : tensor.offset + tensor.size] = live.numpy().tobytes()
        assert new == bytes(expected)
        out.unlink()
        exported += 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 20 < exported < 380 and peak < 32 << 20
