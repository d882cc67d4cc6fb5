"""Experts read from checkpoints: the very bytes that transformers loads, or one clear error."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import Faults, save_tiny, skeleton, stock
from tiny_models import tiny_model

from remoe_adapt.checkpoints.safetensors_files import Extent
from remoe_adapt.errors import ConfigError, ExpertReadError, RemoeError, UncacheableError
from remoe_adapt.expert_cache.checkpoint import find_checkpoint
from remoe_adapt.expert_cache.checkpoint_store import ALIGNMENT, ExpertStore
from remoe_adapt.expert_cache.direct_io import ATTEMPTS, CHUNK, ExtentReader

# Experts in tensors of their own, under other names, packed with biases, interleaved, without gate, packed.
LAYOUTS = ("qwen2_moe", "mixtral", "gpt_oss", "inkling2", "nemotron_h", "granitemoe")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: save_tiny(root / name, name) for name in LAYOUTS}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """One file, which a test may spoil."""
    return save_tiny(tmp_path / "qwen2_moe", "qwen2_moe", shards="1GB")


def assert_reads_what_is_loaded(store: ExpertStore, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    model = stock(folder, dtype=dtype)
    for layer, name in enumerate(store.layers):
        params = dict(model.get_submodule(name).named_parameters(recurse=False))
        for expert in range(store.num_experts[layer]):
            read = store.read(layer, expert)
            assert read.keys() == params.keys()
            for param, value in read.items():
                assert value.dtype == dtype and torch.equal(value, params[param][expert])
                assert value.is_contiguous() and value.untyped_storage().nbytes() == value.nbytes
                assert value.data_ptr() % ALIGNMENT == 0
            assert sum(value.nbytes for value in read.values()) == store.expert_bytes[layer]


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_expert_is_as_transformers_loads_it(name: str, direct_io: bool, folders: dict[str, Path]) -> None:
    store = ExpertStore(folders[name], skeleton(folders[name]), direct_io=direct_io)
    assert len(list(folders[name].glob("*.safetensors"))) > 1
    assert_reads_what_is_loaded(store, folders[name])
    assert store.total_bytes == sum(n * b for n, b in zip(store.num_experts, store.expert_bytes, strict=True))


def test_another_dtype_is_cast_as_transformers_casts(folders: dict[str, Path]) -> None:
    for name in ("qwen2_moe", "inkling2"):
        store = ExpertStore(folders[name], skeleton(folders[name], torch.bfloat16))
        assert_reads_what_is_loaded(store, folders[name], torch.bfloat16)


def test_only_the_bytes_of_that_expert_are_read(folders: dict[str, Path]) -> None:
    lengths: list[int] = []

    def counting(fd: int, buffers: object, offset: int) -> int:
        lengths.append(sum(len(buffer) for buffer in buffers))  # type: ignore[attr-defined]
        return os.preadv(fd, buffers, offset)  # type: ignore[call-overload, no-any-return]

    for name in LAYOUTS:
        store = ExpertStore(folders[name], skeleton(folders[name]), reader=counting)
        lengths.clear()
        store.read(0, 3)
        assert sum(lengths) == store.expert_bytes[0], name


def test_what_is_read_is_ordinary_and_owned(folder: Path) -> None:
    store = ExpertStore(folder, skeleton(folder))
    with torch.inference_mode(), torch.device("meta"):
        read = store.read(0, 0)
    assert all(not value.is_inference() and value.is_cpu for value in read.values())
    before = {name: value.clone() for name, value in read.items()}
    with (folder / "model.safetensors").open("r+b") as file:  # a mapped view would change with the file
        file.seek(-100_000, os.SEEK_END)
        file.write(b"\xff" * 100_000)
    assert all(torch.equal(value, before[name]) for name, value in read.items())


def test_memory_is_used_again_once_nothing_holds_it_and_given_back(folder: Path) -> None:
    store = ExpertStore(folder, skeleton(folder))
    first = store.read(0, 0)
    places, held = {value.data_ptr() // 4096 for value in first.values()}, first["down_proj"].t()
    kept = held.clone()
    del first
    second = store.read(0, 1)
    assert places.isdisjoint(value.data_ptr() // 4096 for value in second.values())
    assert torch.equal(held, kept), "a view holds its expert's bytes"
    assert all(torch.equal(value, ExpertStore(folder, skeleton(folder)).read(0, 1)[n]) for n, value in second.items())
    del held
    assert not places.isdisjoint(value.data_ptr() // 4096 for value in store.read(0, 2).values())
    del second
    store.give_back()
    assert store._pools is not None
    assert not store._blocks._free and not any(pool.free_bytes for pool in store._pools.pools.values())


def test_a_store_whose_layout_has_places_makes_no_pools_of_its_own(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    store = ExpertStore(folder, skeleton(folder))
    store.layout.place(None)
    assert store.read(0, 1) and store._pools is None
    store.give_back()


def test_many_threads_read_at_once(folders: dict[str, Path]) -> None:
    for direct_io in (False, True):
        store = ExpertStore(folders["qwen2_moe"], skeleton(folders["qwen2_moe"]), direct_io=direct_io)
        keys = [(layer, expert) for layer in range(len(store.layers)) for expert in range(store.num_experts[layer])]
        alone = [store.read(*key) for key in keys]
        with ThreadPoolExecutor(8) as pool:
            together = list(pool.map(store.read, *zip(*keys * 4, strict=True)))
        for number, read in enumerate(together):
            assert all(torch.equal(value, alone[number % len(keys)][name]) for name, value in read.items())


def test_direct_reads_of_any_size_and_place_are_whole(tmp_path: Path) -> None:
    file = tmp_path / "bytes"
    content = torch.randint(0, 256, (2 * CHUNK + 5000,), dtype=torch.uint8)
    file.write_bytes(content.numpy().tobytes())
    reader = ExtentReader([file], direct_io=True)
    if not reader.direct_io:
        pytest.skip("the file system of the temporary folder has no direct I/O")
    for offset, size in ((0, 1), (0, CHUNK), (1, CHUNK), (4095, 2), (4096, 4096), (777, 2 * CHUNK), (5000, 2 * CHUNK)):
        found = torch.empty(size, dtype=torch.uint8)
        reader.fill([(Extent(file, "x", torch.uint8, (size,), offset, size), found)])
        assert torch.equal(found, content[offset : offset + size])


def addresses(buffers: Sequence[memoryview]) -> Iterator[tuple[int, int]]:
    return ((np.frombuffer(buffer, np.uint8).ctypes.data, len(buffer)) for buffer in buffers)


@pytest.mark.parametrize(("step", "root"), [(None, None), (8, "/dev/shm")])
def test_whole_blocks_are_read_straight_into_their_place(
    tmp_path: Path, step: int | None, root: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(tempfile.mkdtemp(dir=root or tmp_path)) if root is None or os.access(root, os.W_OK) else tmp_path
    try:
        file, size = folder / "bytes", 4 * CHUNK
        content = np.random.default_rng(0).integers(0, 256, size + 20_000, dtype=np.uint8)
        file.write_bytes(content.tobytes())
        if step is not None:  # devices that take memory anywhere, as NVMe does
            monkeypatch.setattr("remoe_adapt.expert_cache.direct_io._memory_step", lambda path: step)
        straight: list[int] = []

        def watching(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
            straight.append(sum(n for at, n in addresses(buffers) if low <= at < low + size))
            return os.preadv(fd, buffers, offset)

        reader = ExtentReader([file], direct_io=True, reader=watching)
        if not reader.direct_io:
            pytest.skip(f"{folder} has no direct I/O")
        for offset in (0, 4096 + 64) if step is None else (0, 8, 5000):
            memory = torch.empty(size + 8192, dtype=torch.uint8)
            phase = (offset if step is None else 64) - memory.data_ptr()
            found = memory[phase % 4096 :][:size]
            low = found.data_ptr()
            straight.clear()
            halves = [(Extent(file, "x", torch.uint8, (n,), offset + at, n), found[at : at + n])
                      for at, n in ((0, size // 2), (size // 2, size // 2))]  # fmt: skip
            reader.fill(halves)
            assert np.array_equal(found.numpy(), content[offset : offset + size])
            assert len(straight) == 1 and size - 4 * 4096 <= straight[0] <= size
    finally:
        shutil.rmtree(folder)


@pytest.mark.parametrize("direct_io", [False, True])
def test_failed_and_short_reads_are_tried_again(folder: Path, direct_io: bool) -> None:
    faults = Faults(os.preadv, {0: "eio", 1: "short", 2: "end", 4: "eio", 5: "short"})
    store = ExpertStore(folder, skeleton(folder), direct_io=direct_io, reader=faults)
    for expert in (5, 6):
        plain = ExpertStore(folder, skeleton(folder)).read(1, expert)
        assert all(torch.equal(value, plain[name]) for name, value in store.read(1, expert).items())
    assert faults.reads >= 7


@pytest.mark.parametrize(("fault", "reason"), [("eio", "Input/output error"), ("end", "the file ends there")])
def test_an_error_that_stays_names_file_tensor_and_offset(folder: Path, fault: str, reason: str) -> None:
    faults = Faults(os.preadv)
    store = ExpertStore(folder, skeleton(folder), reader=faults)
    faults.always = fault
    with pytest.raises(ExpertReadError, match=rf"model\.safetensors.*experts\.5\..*at byte \d+ .{reason}") as caught:
        store.read(1, 5)
    assert faults.reads == ATTEMPTS
    assert isinstance(caught.value, RemoeError) and isinstance(caught.value, OSError)
    faults.always = ""
    assert store.read(1, 5)


def test_a_truncated_file_is_refused_when_it_is_opened(folder: Path) -> None:
    file, model = folder / "model.safetensors", skeleton(folder)
    os.truncate(file, file.stat().st_size - 1)
    with pytest.raises(ExpertReadError, match=r"model\.safetensors is truncated: tensor .* ends at byte \d+"):
        ExpertStore(folder, model)
    os.truncate(file, 100)
    with pytest.raises(ExpertReadError, match="not a whole safetensors file"):
        ExpertStore(folder, model)


@pytest.mark.parametrize("direct_io", [False, True])
def test_a_file_that_is_truncated_later_is_noticed(folder: Path, direct_io: bool) -> None:
    store = ExpertStore(folder, skeleton(folder), direct_io=direct_io)
    os.truncate(folder / "model.safetensors", 10_000)
    with pytest.raises(ExpertReadError, match="the file ends there"):
        for expert in range(8):
            store.read(3, expert)


def test_a_deleted_file_is_read_on(folder: Path) -> None:
    store = ExpertStore(folder, skeleton(folder))
    before = store.read(2, 2)
    (folder / "model.safetensors").unlink()
    assert all(torch.equal(value, before[name]) for name, value in store.read(2, 2).items())
    store.close()
    with pytest.raises(ExpertReadError, match="the store is closed"):
        store.read(2, 2)


def test_folders_that_are_no_such_checkpoint_are_refused(folder: Path, tmp_path: Path) -> None:
    model, file = skeleton(folder), folder / "model.safetensors"
    with pytest.raises(ConfigError, match=r"neither model\.safetensors nor"):
        ExpertStore(tmp_path, model)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "gone.safetensors"}}))
    with pytest.raises(ExpertReadError, match=r"gone\.safetensors is missing"):
        ExpertStore(tmp_path, model)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ExpertReadError, match="not the index of a checkpoint"):
        ExpertStore(tmp_path, model)
    weights = load_file(file)
    lost = next(name for name in weights if "layers.1.mlp.experts.3." in name)
    save_file({name: value for name, value in weights.items() if name != lost}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"7 tensors, as .*experts\.0.* do not make up the 8 experts"):
        ExpertStore(folder, model)
    save_file({name: value for name, value in weights.items() if ".layers.2." not in name}, file, {"format": "pt"})
    with pytest.raises(ConfigError, match=r"no weights for model\.layers\.2\.mlp\.experts"):
        ExpertStore(folder, model)


def quantised(kind: str, name: str, value: torch.Tensor) -> dict[str, torch.Tensor]:
    """A tensor as these methods store it."""
    if "experts" not in name or value.ndim < 2:
        return {name: value}
    if kind == "fp8":
        return {name: value.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1)}
    if kind == "mxfp4":
        return {f"{name}_blocks": value.to(torch.uint8), f"{name}_scales": torch.ones(1, dtype=torch.uint8)}
    if kind == "packed":
        stem = name.removesuffix(".weight")
        return {f"{stem}.qweight": value.to(torch.int32), f"{stem}.scales": torch.ones(1, dtype=torch.float16)}
    return {name: value.to(torch.int8)}


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "packed", "int8"])
def test_quantised_experts_are_refused_before_a_byte_of_them_is_read(kind: str, folder: Path) -> None:
    file, faults = folder / "model.safetensors", Faults(os.preadv)
    weights = {k: v for name, value in load_file(file).items() for k, v in quantised(kind, name, value).items()}
    save_file(weights, file, {"format": "pt"})
    with pytest.raises(UncacheableError, match=r"experts\.\d+\..* is quantised; .* Give it the checkpoint that this"):
        ExpertStore(folder, skeleton(folder), reader=faults)
    assert faults.reads == 0


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("bitsandbytes", r"\(bitsandbytes\).*give the checkpoint that it was made from"),
        ("torchao", r"\(torchao\).*give the checkpoint that it was made from"),
        ("hqq", r"\(hqq\).*give the checkpoint that it was made from"),
    ],
)
def test_a_configuration_that_says_so_is_refused_before_weights_are_fetched(
    method: str, words: str, folder: Path
) -> None:
    (folder / "model.safetensors").unlink()
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UncacheableError, match=words):
        find_checkpoint(folder)


def test_layers_that_share_experts_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "shared"
    tiny_model("diffusion_gemma", text_only=False).save_pretrained(folder)
    with pytest.raises(UncacheableError, match=r"experts.* once more: layers that share experts cannot be cached"):
        ExpertStore(folder, skeleton(folder))


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "deepseek_ocr2", "gemma4"])
def test_experts_below_a_vision_model_are_read(name: str, tmp_path: Path) -> None:
    tiny_model(name, text_only=False).save_pretrained(tmp_path)
    store = ExpertStore(tmp_path, skeleton(tmp_path))
    assert all("language_model" in layer for layer in store.layers)
    assert_reads_what_is_loaded(store, tmp_path)


def test_files_of_a_hub_cache_are_links_and_large_ones_have_large_offsets(folder: Path, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    for path in (blobs, snapshot):
        path.mkdir(parents=True)
    for path in folder.iterdir():
        (snapshot / path.name).symlink_to(shutil.copy(path, blobs / f"of-{path.name}"))
    file = blobs / "of-model.safetensors"
    content, hole = file.read_bytes(), 5 << 30
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + hole for offset in entry["data_offsets"]]
    text = json.dumps(header).encode()
    with file.open("wb") as whole:  # sparse: a tensor more than 4 GiB long before the others
        whole.write(len(text).to_bytes(8, "little") + text)
        whole.seek(hole, os.SEEK_CUR)
        whole.write(content[start:])
    for direct_io in (False, True):
        store = ExpertStore(snapshot, skeleton(snapshot), direct_io=direct_io)
        expected = ExpertStore(folder, skeleton(folder)).read(3, 6)
        assert all(torch.equal(value, expected[param]) for param, value in store.read(3, 6).items())
