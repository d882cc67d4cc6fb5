"""Undo files that lie, and what is left after kills, interrupts and disks that do not take a write."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killed import killed_at_write
from raw_gguf import STRING, RawTensor, raw_family, raw_model, router, weights
from safetensors.numpy import load_file, save_file

from remoe_adapt.checkpoints.gguf_file import GgufFile
from remoe_adapt.engines.gguf.live import LiveRouters
from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.engines.gguf.patch import export_gguf, patch_in_place, undo_in_place
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.gguf.undo import Undo, undo_path
from remoe_adapt.errors import ConfigError, ExportError, RemoeError
from remoe_adapt.family.family import Family


@pytest.fixture
def family(tmp_path: Path) -> Family:
    return raw_family(tmp_path / "family")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return raw_model().write(tmp_path / "m.gguf")


def originals(seed: int = 0) -> dict[str, bytes]:
    return {router(layer): weight.numpy().tobytes() for layer, weight in enumerate(weights(seed))}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused_everywhere(path: Path, family: Family, words: str) -> None:
    """Nobody uses the undo file beside it, and no byte changes."""
    folder = path.parent
    before = files(folder)
    for work in (
        lambda: undo_in_place(path),
        lambda: patch_in_place(path, family, 1.0, force=True),
        lambda: patch_in_place(path, family, 0.0, force=True),
        lambda: export_gguf(path, family, 1.0, folder / "out.gguf", force=True),
        lambda: export_gguf_lora(path, family, folder / "loras", force=True),
    ):
        with pytest.raises(ExportError, match=words) as caught:
            work()
        assert str(caught.value).isprintable()
    assert files(folder) == before


NEW = originals(seed=3)
LIES: dict[str, tuple[dict[str, bytes], dict[str, bytes] | None, str]] = {
    "any tensor": ({"token_embd.weight": bytes(34)}, {"token_embd.weight": bytes(34)}, "is a router of the one"),
    "any length": ({name: bytes(300) for name in NEW}, {name: bytes(300) for name in NEW}, "not .2, 128. bytes"),
    "one tensor more": (
        {**NEW, "token_embd.weight": bytes(34)},
        {**originals(), "token_embd.weight": bytes(34)},
        "is a router of the one",
    ),
    "a router less": ({router(0): NEW[router(0)]}, {router(0): originals()[router(0)]}, "is a router of the one"),
    "bytes that are not there": (NEW, originals(seed=4), "neither the originals nor what it says replaced them"),
    "live beside a whole model": (NEW, None, "not those that the model was split with"),
    "routers of another shape of the same name": (
        {"\x1b[2J" + name: data for name, data in NEW.items()},
        {"\x1b[2J" + name: data for name, data in NEW.items()},
        "is a router of the one",
    ),
    "values that are not finite": (
        {name: np.full(32, np.nan, np.float32).tobytes() for name in NEW},
        originals(),
        "not finite",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_undo_file_changes_nothing(model: Path, family: Family, lie: str) -> None:
    """As a hub repository could ship it: every digest in it is right."""
    old, new, words = LIES[lie]
    Undo.write(GgufFile(model), old, new, float("nan") if new is None else 1.0)
    refused_everywhere(model, family, words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda arrays, facts: facts.update(format="remoe-undo 1"), "no undo file of this version"),
        (lambda arrays, facts: facts.update(header="0" * 64), "belongs to another file"),
        (lambda arrays, facts: facts.update(size="1"), "belongs to another file"),
        (lambda arrays, facts: facts.pop("digest"), "cannot be read"),
        (lambda arrays, facts: facts.update(digest="0" * 64), "not those that were written"),
        (lambda arrays, facts: facts.update(strength="7"), "not those that were written"),
        (lambda arrays, facts: facts.update(strength="much"), "cannot be read"),
        (lambda arrays, facts: facts.update(kind="live"), "not .1, 128. bytes"),
        (lambda arrays, facts: arrays.update({router(0): arrays[router(0)].view(np.float32)}), "not .2, 128. bytes"),
        (lambda arrays, facts: arrays[router(0)].__setitem__((0, 0), 77), "not those that were written"),
    ],
)
def test_a_changed_undo_file_is_not_used(
    model: Path, family: Family, change: Callable[[Any, Any], Any], words: str
) -> None:
    patch_in_place(model, family, 1.0)
    path = undo_path(model)
    from safetensors import safe_open

    with safe_open(path, framework="np") as stored:
        facts = stored.metadata()
    arrays = load_file(path)
    change(arrays, facts)
    save_file(arrays, path, metadata=facts)
    refused_everywhere(model, family, words)


def test_what_is_no_undo_file_is_not_used(model: Path, family: Family) -> None:
    path = undo_path(model)
    deep = b"[" * 100_000
    for data in (b"", b"not safetensors", (len(deep)).to_bytes(8, "little") + deep, (1 << 62).to_bytes(8, "little")):
        path.write_bytes(data)
        refused_everywhere(model, family, "cannot be read")
    path.unlink()
    path.mkdir()
    refused_everywhere(model, family, "cannot be read")
    path.rmdir()
    path.symlink_to("absent")
    refused_everywhere(model, family, "cannot be read")
    path.unlink()
    os.mkfifo(path)
    refused_everywhere(model, family, "cannot be read")
    path.unlink()
    path.touch()
    os.truncate(path, 1 << 40)
    with pytest.raises(ExportError, match="larger than the routers"):
        undo_in_place(model)


def test_an_undo_file_is_not_used_for_a_model_that_took_the_name_since(model: Path, family: Family) -> None:
    """Of the same sizes and metadata: a newer training of it. The old routers must not get into it."""
    patch_in_place(model, family, 1.0)
    raw_model(seed=5).write(model)
    refused_everywhere(model, family, "belongs to another file")
    raw_model().with_entry("general.version", STRING, b"2").write(model)
    refused_everywhere(model, family, "belongs to another file")
    undo_path(model).unlink()
    assert len(GgufModel(model).weights) == 2


WRITES = 2  # one for each router


@pytest.mark.parametrize("write", range(2 * WRITES))
@pytest.mark.parametrize("before", [0.0, 0.5])
@pytest.mark.parametrize("then", ["patch", "undo"])
def test_a_kill_at_any_write_leads_to_one_of_two_states(
    model: Path, family: Family, write: int, before: float, then: str
) -> None:
    base = model.read_bytes()
    if before:
        patch_in_place(model, family, before)
    killed = killed_at_write(write, lambda: patch_in_place(model, family, 1.0))
    assert killed == (write < (2 if before else 1) * WRITES)
    if then == "patch":
        patch_in_place(model, family, 1.0)
        clean = raw_model().write(model.with_name("clean.gguf"))
        patch_in_place(clean, family, 1.0)
        assert model.read_bytes() == clean.read_bytes()
    undo_in_place(model)
    assert model.read_bytes() == base and not undo_path(model).exists()


@contextmanager
def interrupted_at_write(number: int) -> Iterator[None]:
    """Ctrl-C in the os.pwrite of this number (from 0 on), half of it written."""
    real, left = os.pwrite, [number]

    def write(fd: int, data: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] == -1:
            real(fd, bytes(data)[: len(data) // 2], offset)
            raise KeyboardInterrupt
        return real(fd, data, offset)

    os.pwrite = write
    try:
        yield
    finally:
        os.pwrite = real


def state(path: Path) -> tuple[Any, ...]:
    """Names of all files, and what the model and its undo file hold."""
    return sorted(files(path.parent)), path.read_bytes(), GgufModel(path).undos


@pytest.mark.parametrize("write", range(2 * WRITES))
def test_after_an_interrupt_everything_is_as_it_was(model: Path, family: Family, write: int) -> None:
    for works in (
        (lambda: patch_in_place(model, family, 0.5),),
        (lambda: patch_in_place(model, family, 1.0), lambda: undo_in_place(model)),
    ):
        for work in works:
            before = state(model)
            with interrupted_at_write(write):
                try:
                    work()
                except KeyboardInterrupt:
                    assert state(model) == before
        patch_in_place(model, family, 0.5)


@contextmanager
def no_file_beyond(size: int) -> Iterator[None]:
    """The system refuses to write behind this byte of any file (EFBIG), as a full disk would."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("room", [0, 100, 400])
def test_a_full_disk_leaves_nothing_of_an_export(model: Path, family: Family, room: int) -> None:
    split = Path(split_gguf(model, family, 0.0, model.parent / "split" / "m.gguf")["out"])
    before, folder = files(model.parent), model.parent / "new" / "folders"
    for work in (
        lambda: export_gguf(model, family, 1.0, folder / "o.gguf"),
        lambda: export_gguf(split, family, 1.0, folder / "o.gguf"),
        lambda: split_gguf(model, family, 1.0, folder / "o.gguf"),
        lambda: export_gguf_lora(model, family, folder),
        lambda: patch_in_place(model, family, 1.0),
    ):
        with no_file_beyond(room), pytest.raises(ExportError, match=r"File too large"):
            work()
        assert files(model.parent) == before and not (model.parent / "new").exists()


def test_loras_come_all_or_not_at_all_and_what_was_there_stays(model: Path, family: Family) -> None:
    folder = model.parent / "loras"
    folder.mkdir()
    (folder / "s100.gguf").write_bytes(b"mine")
    with pytest.raises(ConfigError, match=r"s100\.gguf exists already"):
        export_gguf_lora(model, family, folder)
    with pytest.raises(ConfigError, match="must differ"):
        export_gguf_lora(model, family, folder, strengths=[0.1234567, 0.1234568])
    deltas = {name: torch.full_like(delta, 3e38) for name, delta in family.points[0].deltas.items()}
    huge = Family(family.path, "huge", family.fingerprint, (family.points[0], replace(family.points[1], deltas=deltas)))
    with pytest.raises(ExportError, match=r"at strength 0\.9 is too large for fp32"):
        export_gguf_lora(model, huge, folder, strengths=[0.5, 0.9], rank=1)
    assert files(folder) == {"s100.gguf": b"mine"}


@pytest.mark.parametrize("place", ["m.gguf/o.gguf", "n" * 300 + ".gguf", "p" * 300 + "/o.gguf", "/proc/nowhere/o.gguf"])
def test_places_that_cannot_be_written_to_are_one_error(model: Path, family: Family, place: str) -> None:
    out = model.parent / place
    before = files(model.parent)
    for work in (
        lambda: export_gguf(model, family, 1.0, out),
        lambda: split_gguf(model, family, 1.0, out),
        lambda: export_gguf_lora(model, family, out),
    ):
        with pytest.raises(RemoeError):
            work()
    assert files(model.parent) == before


def test_a_disk_that_fails_in_mid_patch_says_how_to_go_on(family: Family, tmp_path: Path) -> None:
    far = raw_model()
    far.tensors.insert(2, RawTensor("between.weight", (1 << 14,), bytes(1 << 16)))
    path = far.write(tmp_path / "far.gguf")
    before = path.read_bytes()
    with no_file_beyond(1 << 15), pytest.raises(ExportError, match=r"neither changed .* nor put back .*--undo"):
        patch_in_place(path, family, 1.0)
    assert undo_path(path).exists()
    undo_in_place(path)
    assert path.read_bytes() == before


def test_names_that_no_disk_can_hold_are_no_file(family: Family, tmp_path: Path) -> None:
    for work in (
        lambda: GgufModel(tmp_path / ("x" * 300 + ".gguf")),
        lambda: undo_in_place(tmp_path / ("x" * 300 + ".gguf")),
        lambda: LiveRouters(tmp_path / ("x" * 300 + ".gguf"), family),
    ):
        with pytest.raises(ConfigError, match="is no file"):
            work()


class TestLive:
    @pytest.fixture
    def first(self, model: Path, family: Family) -> Path:
        return Path(split_gguf(model, family, 0.0, model.parent / "split" / "m.gguf")["out"])

    def test_a_lying_live_undo_file_changes_nothing(self, first: Path, family: Family) -> None:
        """It can be anything that was written last, so the originals are what the header says they are."""
        Undo.write(GgufFile(first), NEW, None, float("nan"))
        refused_everywhere(first, family, "not those that the model was split with")
        with pytest.raises(ExportError, match="not those that the model was split with"):
            LiveRouters(first, family)

    def test_a_kill_in_any_write_of_it_is_undone(self, first: Path, family: Family) -> None:
        base = first.read_bytes()

        def swap() -> None:
            routers = LiveRouters(first, family)
            routers.write(0.25)
            routers.write(1.0)
            routers.close()

        for number in range(3 * WRITES):
            assert killed_at_write(number, swap)
            assert undo_in_place(first)["was"] == {first.name: "live"}
            assert first.read_bytes() == base
        assert not killed_at_write(3 * WRITES, swap)

    def test_a_split_at_another_strength_is_refused(self, model: Path, first: Path, family: Family) -> None:
        for name in (first.name, first.name.replace("00001-of", "00002-of")):
            assert (first.parent / name).is_file()
        stronger = split_gguf(model, family, 0.5, model.parent / "s050" / "m.gguf")["out"]
        with pytest.raises(ConfigError, match=r"split at another strength.*--split --strength 0"):
            LiveRouters(stronger, family)

    def test_a_file_that_took_the_name_meanwhile_is_left_alone(self, first: Path, family: Family) -> None:
        routers = LiveRouters(first, family)
        routers.write(1.0)
        held = first.open("rb")
        other = raw_model(seed=5).written()
        replacement = first.with_name("new")
        replacement.write_bytes(other)
        replacement.replace(first)
        routers.write(0.5)
        routers.close()
        assert first.read_bytes() == other and not undo_path(first).exists()
        with held:
            left = held.read()
        tensors = GgufFile(first.with_name("m-00002-of-00002.gguf"))
        assert tensors.tensors and all(data in left for data in originals().values())

    def test_a_disk_that_does_not_take_the_undo_file_changes_nothing(self, first: Path, family: Family) -> None:
        before = files(first.parent)
        routers = LiveRouters(first, family)
        with no_file_beyond(100), pytest.raises(ExportError, match="File too large"):
            routers.write(1.0)
        assert files(first.parent) == before
        routers.write(1.0)
        with no_file_beyond(100), pytest.raises(ExportError, match=r"File too large.*--undo"):
            routers.close(keep=False)
        undo_in_place(first)  # the lock is free
        assert files(first.parent) == before


def test_names_beside_it_that_look_like_drafts_are_no_hindrance(model: Path, family: Family, tmp_path: Path) -> None:
    """As a repository may hold them: no process has such a number, and links are not followed."""
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "mine").write_text("mine")
    (tmp_path / f".{undo_path(model).name}.{'9' * 40}.tmp").write_text("x")
    (tmp_path / f".{undo_path(model).name}.999999999.tmp").symlink_to(kept)
    patch_in_place(model, family, 1.0)
    undo_in_place(model)
    assert (kept / "mine").read_text() == "mine"


def test_an_interrupt_leaves_nothing_of_an_export(model: Path, family: Family) -> None:
    split = Path(split_gguf(model, family, 0.0, model.parent / "split" / "m.gguf")["out"])
    before, out = files(model.parent), model.parent / "new" / "o.gguf"

    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    for work in (
        lambda: export_gguf(model, family, 1.0, out, on_bytes=interrupt),
        lambda: export_gguf(split, family, 1.0, out, on_bytes=interrupt),
        lambda: split_gguf(model, family, 1.0, out, on_bytes=interrupt),
    ):
        with pytest.raises(KeyboardInterrupt):
            work()
        assert files(model.parent) == before and not out.parent.exists()
