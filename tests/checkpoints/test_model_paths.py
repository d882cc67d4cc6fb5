"""What is given as a model: a folder, or an id of the hub; a mistyped path is never looked for in the network."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from tiny_checkpoints import save_tiny

from remoe_adapt.checkpoints.load import (
    check_place,
    checkpoint_folder,
    gguf_path,
    is_gguf,
    is_path,
    load_base,
    load_tokenizer,
    load_with_tokenizer,
)
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.engines.base import BaseFiles
from remoe_adapt.errors import ConfigError, FamilyError
from remoe_adapt.expert_cache.checkpoint import find_checkpoint
from remoe_adapt.expert_cache.load import pack_experts
from remoe_adapt.training.run import train_family

TEXT = Path(__file__).parents[1] / "data" / "readings-squeeze.jsonl"

PATHS = ["./no/such", "no/such/folder", "/no/such", "~/models/no-such", "../no", "no\\such", "a/", "."]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every name that somebody looks up in the network, which there is none of."""
    names: list[Any] = []

    def refuse(host: Any, *_: Any, **__: Any) -> Any:
        names.append(host)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return names


@pytest.mark.parametrize("text", [*PATHS[:-1], "here/foo-bar"])
@pytest.mark.parametrize(
    "load",
    [
        load_base,
        load_with_tokenizer,
        load_tokenizer,
        find_checkpoint,
        checkpoint_folder,
        BaseFiles,
        lambda text: get_remoe_model(text, expert_cache=0.5),
        lambda text: pack_experts(text, "out"),
        lambda text: train_family(text, [TEXT], [1.0], "out"),
    ],
)
def test_a_mistyped_path_is_said_at_once(
    load: Callable[[Any], object], text: str, tmp_path: Path, asked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    for given in (text, Path("no/path")):
        with pytest.raises(ConfigError, match="no such folder") as said:
            load(given)
        assert repr(os.fspath(given)) in str(said.value) or "\\" in text
    assert not asked and [path.name for path in tmp_path.iterdir()] == ["here"]


def test_what_can_only_be_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(is_path(text) for text in PATHS)
    assert not any(is_path(text) for text in ("owner/name", "gpt2", "a.b/c-d_e"))
    (tmp_path / "owner").mkdir()
    assert is_path("owner/name") and is_path("x" * 5000 + "/a/b") and not is_path("x" * 5000)


def test_an_id_of_the_hub_is_asked_for_once_and_quickly(asked: list[Any]) -> None:
    for load in (load_base, load_with_tokenizer, find_checkpoint, BaseFiles):
        with pytest.raises(ConfigError, match=r"'somebody/no-such' cannot be found: .* the hub cannot be asked"):
            load("somebody/no-such")
    assert 1 <= len(asked) <= 8


def test_offline_nobody_is_asked(asked: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=r"'somebody/no-such' cannot be found: .* not in the hub's cache"):
        load_base("somebody/no-such")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(FamilyError, match="not in the hub's cache"):
        check_place("gpt2-no", "family", error=FamilyError, local_files_only=True, cache_dir=tmp_path)
    assert not asked


def test_names_that_are_no_ids_and_files_are_said(tmp_path: Path, asked: list[Any]) -> None:
    for text in ("no such model", "x" * 5000, "na\x1b[31mme", "null\0"):
        with pytest.raises(ConfigError, match="give one of them") as said:
            load_base(text)
        assert "\x1b" not in str(said.value) and "\0" not in str(said.value) and len(str(said.value)) < 600
    file = tmp_path / "model.bin"
    file.write_bytes(b"what")
    with pytest.raises(ConfigError, match="it is a file"):
        load_base(file)
    assert not asked


def test_a_gguf_is_known_by_its_name_or_its_first_bytes(tmp_path: Path, asked: list[Any]) -> None:
    named, by_bytes, other = tmp_path / "a.gguf", tmp_path / "blob", tmp_path / "c.bin"
    for path, content in ((named, b""), (by_bytes, b"GGUF\3"), (other, b"GGU")):
        path.write_bytes(content)
    assert is_gguf(named) and is_gguf(os.fspath(by_bytes)) and not is_gguf(other)
    assert not any(is_gguf(what) for what in (tmp_path, "owner/name-GGUF", tmp_path / "no.gguf", None, 3, "null\0"))
    for load in (load_base, load_with_tokenizer, checkpoint_folder):
        with pytest.raises(ConfigError, match="is a GGUF, which load_with_expert_cache and get_remoe_model alone read"):
            load(named)
    check_place(named, "model", gguf=True)
    assert gguf_path(tmp_path, "a.gguf") == named
    wrong: Any
    for wrong in ("b.gguf", "c.bin", "../a.gguf", 3):
        with pytest.raises(ConfigError, match=r"gguf_file .* give the name|has no GGUF b\.gguf"):
            gguf_path(tmp_path, wrong)
    assert not asked


def test_a_folder_wins_over_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]) -> None:
    save_tiny(tmp_path / "owner" / "name", "qwen2_moe")
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint("owner/name").folder == Path("owner/name") and not asked
