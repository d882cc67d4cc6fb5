"""Checkpoint folders as others leave them: which files count, what they may name, and what a full disk leaves."""

from __future__ import annotations

import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import peak_memory
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tiny, skeleton, stock
from tiny_families import tiny_family
from tiny_family import byte_tokenizer
from torch import Tensor

from remoe_adapt import Family, get_remoe_model
from remoe_adapt.checkpoints.load import load_with_tokenizer
from remoe_adapt.checkpoints.safetensors_files import INDEX, SINGLE, file_extents, open_checkpoint
from remoe_adapt.engines.base import BaseFiles
from remoe_adapt.engines.merged import export_merged
from remoe_adapt.engines.peft_lora import export_lora
from remoe_adapt.errors import ConfigError, ExpertReadError, RemoeError, WriteError
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore
from remoe_adapt.expert_cache.load import load_with_expert_cache, pack_experts
from remoe_adapt.expert_cache.pack import MANIFEST, PackedStore
from remoe_adapt.training.run import train_family

IDS = torch.randint(3, 96, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """one: a checkpoint in one file; many: another one of the same model in shards; family: of the first."""
    home = tmp_path_factory.mktemp("saved")
    save_tiny(home / "one", "qwen2_moe", shards="1GB")
    save_tiny(home / "many", "qwen2_moe")
    for path in (home / "many").glob("*.safetensors"):
        save_file({name: value * 1.5 for name, value in load_file(path).items()}, path, {"format": "pt"})
    tiny_family(stock(home / "one"), home / "family", (1.0,))
    return home


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=IDS).logits
    return found


def layout(name: str, saved: Path, folder: Path) -> Path:
    shutil.copytree(saved / ("many" if name == "left-over shard" else "one"), folder)
    if name == "left-over shard":
        shutil.copy(saved / "one" / SINGLE, folder / "model-00099-of-00099.safetensors")
        return folder
    shutil.copy(saved / "many" / INDEX, folder)
    if name != "stale index":
        for shard in (saved / "many").glob("*.safetensors"):
            shutil.copy(shard, folder)
    if name.startswith("named"):
        config = json.loads((folder / "config.json").read_text())
        config["transformers_weights"] = INDEX if name == "named index" else "other.safetensors"
        shutil.copy(saved / "one" / SINGLE, folder / "other.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", ["both", "stale index", "left-over shard", "named index", "named file"])
def test_files_are_chosen_as_transformers_chooses_them(name: str, saved: Path, tmp_path: Path) -> None:
    folder = layout(name, saved, tmp_path / "model")
    expected = logits(stock(folder))
    of_many = name in ("left-over shard", "named index")
    assert torch.equal(expected, logits(stock(saved / ("many" if of_many else "one"))))
    assert torch.equal(logits(load_with_expert_cache(folder, 0.5)), expected)
    pack_experts(folder, tmp_path / "pack")
    assert torch.equal(logits(load_with_expert_cache(folder, 0.5, storage=tmp_path / "pack")), expected)
    family = Family.load(saved / "family")
    export_merged(folder, family, 0.0, tmp_path / "out", force=True)
    assert torch.equal(logits(stock(tmp_path / "out")), expected)
    assert (tmp_path / "out" / INDEX).exists() == of_many, "an index that does not count is not handed on"


def with_index(saved: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    shutil.copytree(saved / "many", folder)
    index = json.loads((folder / INDEX).read_text())
    changed = change(index)
    (folder / INDEX).write_text(changed if isinstance(changed, str) else json.dumps(index))
    return folder


def naming(name: Any) -> Callable[[dict[str, Any]], None]:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"]["lm_head.weight"] = name

    return change


def refused(folder: Path, tmp_path: Path, saved: Path, error: type[RemoeError] = ExpertReadError) -> str:
    """By everything that reads checkpoints; what the first one says."""
    family, model = Family.load(saved / "family"), skeleton(saved / "one")
    said = []
    for work in (
        lambda: ExpertStore(folder, model),
        lambda: load_with_expert_cache(folder, 0.5),
        lambda: pack_experts(folder, tmp_path / "out" / "pack"),
        lambda: export_merged(folder, family, 1.0, tmp_path / "out" / "merged", force=True),
        lambda: export_lora(folder, family, 1.0, tmp_path / "out" / "lora", force=True),
    ):
        with pytest.raises(error) as caught:
            work()
        said.append(str(caught.value))
    assert not (tmp_path / "out").exists()
    return said[0]


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "a/../../secret.safetensors", "{}/secret.safetensors", "link.safetensors", "\0"]
)
def test_an_index_that_leads_out_of_the_folder_is_refused(name: str, saved: Path, tmp_path: Path) -> None:
    shutil.copy(saved / "one" / SINGLE, tmp_path / "secret.safetensors")
    folder = with_index(saved, tmp_path / "model", naming(name.format(tmp_path)))
    (folder / "link.safetensors").symlink_to("../secret.safetensors")
    if "\0" in name:
        assert "is no safetensors file" in refused(folder, tmp_path, saved)
    else:
        assert "does not lie in this folder" in refused(folder, tmp_path, saved)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (naming("pytorch_model.bin"), "is no safetensors file"),
        (naming("loop.safetensors"), "does not lie in this folder"),
        (naming("folder.safetensors"), "is no file"),
        (naming(7), "not the index of a checkpoint"),
        (lambda index: index.update(weight_map=[1]), "not the index of a checkpoint"),
        (lambda index: "[" * 100_000, "nested too deeply"),
        (lambda index: '{"weight_map": ' + "9" * 400 + "}", "400 digits"),
        (lambda index: '{"weight_map": {"a": "b", "a": "c"}}', "stands twice"),
    ],
)
def test_a_damaged_index_is_one_clear_error(change: Any, words: str, saved: Path, tmp_path: Path) -> None:
    folder = with_index(saved, tmp_path / "model", change)
    (folder / "loop.safetensors").symlink_to("loop.safetensors")
    (folder / "folder.safetensors").mkdir()
    assert words in refused(folder, tmp_path, saved)


def test_a_tensor_in_two_shards_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = with_index(saved, tmp_path / "model", naming("again.safetensors"))
    save_file({"lm_head.weight": torch.zeros(96, 32)}, folder / "again.safetensors", {"format": "pt"})
    assert "tensor lm_head.weight is in" in refused(folder, tmp_path, saved)


def test_configurations_of_anybody_are_one_clear_error(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "one", folder)
    whole = json.loads((folder / "config.json").read_text())
    for content in (
        "[" * 100_000,
        json.dumps(whole).replace('"hidden_size": 32', f'"hidden_size": {"9" * 400}'),
        json.dumps(whole | {"hidden_size": "many"}),
        json.dumps(whole | {"num_attention_heads": 0}),
        json.dumps(whole | {"transformers_weights": "../one/model.safetensors"}),
        json.dumps(whole | {"transformers_weights": "pytorch_model.bin"}),
        json.dumps(whole | {"model_type": ["\x1b[31m"]}),
        "[]",
    ):
        (folder / "config.json").write_text(content)
        assert "\x1b" not in refused_by_loading(folder, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": "many"},
        {"hidden_size": 48},
        {"num_attention_heads": 0},
        {"hidden_act": "\x1b[31m"},
        {"model_type": ["qwen2_moe"]},
        {"rope_parameters": 5},
    ],
)
def test_a_model_whose_configuration_is_damaged_is_one_error_on_every_way_in(
    change: dict[str, Any], saved: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "one", folder)
    byte_tokenizer().save_pretrained(folder)
    whole = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(whole | change))
    ways: list[Callable[[], object]] = [
        lambda: get_remoe_model(folder, monitor=False),
        lambda: load_with_tokenizer(folder),
        lambda: train_family(folder, [folder / "text.txt"], (1.0,), tmp_path / "family", progress=False, device="cpu"),
    ]
    (folder / "text.txt").write_text("word " * 500)
    for way in ways:
        with pytest.raises(RemoeError) as caught:
            way()
        assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "family").exists()


def refused_by_loading(folder: Path, tmp_path: Path) -> str:
    for work in (
        lambda: load_with_expert_cache(folder, 0.5),
        lambda: pack_experts(folder, tmp_path / "out" / "pack"),
        lambda: BaseFiles(folder),
    ):
        with pytest.raises(RemoeError) as caught:
            work()
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def write_header(file: Path, header: Any, data: bytes = bytes(64), length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return file


def entry(first: Any, end: Any, dtype: Any = "F32", shape: Any = (8,)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, end]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({"a": entry(0, 32), "b": entry(16, 48)}, "begins at byte"),
        ({"a": entry(0, 32), "b": entry(0, 32)}, "within tensor"),
        ({"a": entry(0, 48, shape=[12]), "e": entry(8, 8, shape=[0]), "b": entry(16, 32, shape=[4])}, "within tensor"),
        ({"a": entry(40, 72)}, "is truncated"),
        ({"a": entry(0, 32, shape=[9])}, "not as long as its shape"),
        ({"a": entry(0, 32, "U8", [8])}, "not as long as its shape"),
        ({"a": entry(0, 32, "F4", [8])}, "not as long as its shape"),
        ({"a": entry(0, 32, "F8_E4M3", [8])}, "not as long as its shape"),
        ({"a": entry(-32, 0)}, "header cannot be read"),
        ({"a": entry(32, 0)}, "header cannot be read"),
        ({"a": entry(False, 32)}, "header cannot be read"),
        ({"a": entry(0.0, 32.0)}, "header cannot be read"),
        ({"a": entry(0, 32, ["F32"])}, "header cannot be read"),
        ({"a": entry(0, 32, shape=[-8, -1])}, "header cannot be read"),
        ({"a": entry(0, 32, shape=[1] * 10_000)}, "header cannot be read"),
        ({"a": entry(0, 32, shape="8")}, "header cannot be read"),
        ({"a": 1}, "header cannot be read"),
        ([1], "header cannot be read"),
        (b'{"a": ' * 50_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 400 + b"}", "header cannot be read"),
        (b"\xff", "header cannot be read"),
        (b'{"a": 1, "a": 2}', "header cannot be read"),
    ],
)
def test_a_header_that_lies_is_refused(header: Any, words: str, tmp_path: Path) -> None:
    file = write_header(tmp_path / SINGLE, header)
    with pytest.raises(ExpertReadError, match=words) as said:
        file_extents(file)
    assert SINGLE in str(said.value)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read as Linux tells them")
def test_lengths_that_lie_take_no_memory(tmp_path: Path) -> None:
    with peak_memory() as peak:
        for length in (90_000_000, 1 << 62, (1 << 64) - 1, 0):
            with pytest.raises(ExpertReadError, match="header cannot be read"):
                file_extents(write_header(tmp_path / SINGLE, {}, length=length))
        huge = {"a": entry(0, 1 << 60, "U8", [1 << 60])}
        with pytest.raises(ExpertReadError, match="is truncated"):
            open_checkpoint(write_header(tmp_path / SINGLE, huge).parent)
        assert peak() < 8e6


def test_files_that_are_none_are_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    for name, words in (("pipe.safetensors", "is no file"), ("none.safetensors", "is missing")):
        with pytest.raises(ExpertReadError, match=words):
            file_extents(tmp_path / name)


@pytest.fixture(scope="module")
def pack(saved: Path) -> Path:
    pack_experts(saved / "one", saved / "pack")
    return saved / "pack"


def damaged(pack: Path, folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """The pack with another header, in as many bytes."""
    shutil.copytree(pack, folder)
    (file,) = folder.glob("*.safetensors")
    content = file.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    change(header)
    text = json.dumps(header, separators=(",", ":")).encode()
    file.write_bytes(content[:8] + text.ljust(start - 8) + content[start:])
    return folder


def test_a_pack_whose_experts_lie_in_each_other_is_refused(saved: Path, pack: Path, tmp_path: Path) -> None:
    source = ExpertStore(saved / "one", skeleton(saved / "one"))
    layer = source.layers[1]

    def move(by: int) -> Callable[[dict[str, Any]], None]:
        def change(header: dict[str, Any]) -> None:
            first, end = header[f"{layer}.1"]["data_offsets"]
            header[f"{layer}.2"]["data_offsets"] = [first + by, end + by]

        return change

    for number, change in enumerate((move(0), move(64), move(1 << 40))):
        folder = damaged(pack, tmp_path / str(number), change)
        with pytest.raises(ExpertReadError, match=r"within tensor|is truncated"):
            PackedStore(folder, source)
        with pytest.raises(ExpertReadError):
            load_with_expert_cache(saved / "one", 0.5, storage=folder)
    twice = tmp_path / "twice"
    shutil.copytree(pack, twice)
    manifest = json.loads((twice / MANIFEST).read_text())
    shutil.copy(twice / manifest["files"][0], twice / "copy.safetensors")
    for files, error in (
        ([*manifest["files"], "copy.safetensors"], ExpertReadError),
        (manifest["files"] * 2, ConfigError),
        (["../twice/" + manifest["files"][0]], ConfigError),
        ("a", ConfigError),
        ([["a"]], ConfigError),
    ):
        (twice / MANIFEST).write_text(json.dumps(manifest | {"files": files}))
        with pytest.raises(error):
            PackedStore(twice, source)
    for odd in ({"layers": [{}]}, {"layers": 1}, {"format": True}, {"model": "\x1b[31m", "layers": []}):
        (twice / MANIFEST).write_text(json.dumps(manifest | odd))
        with pytest.raises(ConfigError) as said:
            PackedStore(twice, source)
        assert "\x1b" not in str(said.value)
    for text in ("[" * 100_000, "9" * 400, "[]"):
        (twice / MANIFEST).write_text(text)
        with pytest.raises(ConfigError):
            PackedStore(twice, source)


def test_links_out_of_the_folder_are_not_handed_on_by_a_merged_export(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "one", folder)
    (tmp_path / "private").write_text("a key")
    (folder / "notes.txt").symlink_to(tmp_path / "private")
    with pytest.raises(ExpertReadError, match=r"'notes\.txt' does not lie in this folder"):
        export_merged(folder, Family.load(saved / "family"), 1.0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """As on a full disk, with another number of the error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("kind", ["merged", "lora", "pack"])
def test_a_disk_that_takes_no_more_is_one_error_and_nothing_is_left(kind: str, saved: Path, tmp_path: Path) -> None:
    family = Family.load(saved / "family")
    work: Any = {
        "merged": lambda out: export_merged(saved / "one", family, 1.0, out),
        "lora": lambda out: export_lora(saved / "one", family, 1.0, out),
        "pack": lambda out: pack_experts(saved / "one", out),
    }[kind]
    for size in (0, 1000):
        with files_of_at_most(size), pytest.raises(WriteError, match="cannot be written"):
            work(tmp_path / "new" / "folders" / "out")
        assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / ("x" * 300), Path("/proc/no/out")):
        with pytest.raises(RemoeError, match="cannot be written"):
            work(out)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    work(tmp_path / "new" / "folders" / "out")


def test_options_that_a_pack_would_ignore_are_refused(saved: Path, tmp_path: Path) -> None:
    for option in ({"variant": "fp16"}, {"subfolder": "a"}, {"use_safetensors": False}):
        with pytest.raises(ConfigError, match=next(iter(option))):
            pack_experts(saved / "one", tmp_path / "out", **option)
        with pytest.raises(ConfigError, match=next(iter(option))):
            load_with_expert_cache(saved / "one", 0.5, **option)
    assert not list(tmp_path.iterdir())
