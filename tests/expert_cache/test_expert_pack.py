"""Packs: experts copied to be read in one piece each, or one clear error; never another model's numbers."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import Faults, save_tiny, skeleton, stock
from typer.testing import CliRunner

from remoe_adapt import load_with_expert_cache
from remoe_adapt.cli.app import app
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache.checkpoint_store import ALIGNMENT, ExpertStore
from remoe_adapt.expert_cache.direct_io import ATTEMPTS, BLOCK
from remoe_adapt.expert_cache.load import pack_experts
from remoe_adapt.expert_cache.pack import MANIFEST, PackedStore
from remoe_adapt.expert_cache.pack_sources import FloatExperts
from remoe_adapt.expert_cache.packing import write_pack

# Experts in tensors of their own, packed with biases, interleaved.
LAYOUTS = ("qwen2_moe", "gpt_oss", "inkling2")
SMALL = 70_000


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("packs")
    for name in LAYOUTS:
        source = store_of(save_tiny(root / name, name))
        write_pack(FloatExperts(source), root / f"{name}.pack", model_id=name, shard_bytes=SMALL)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def folder(folders: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(folders["qwen2_moe"], tmp_path / "model")


@pytest.fixture
def pack(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Which a test may spoil."""
    return shutil.copytree(folders["qwen2_moe.pack"], tmp_path / "pack")


def store_of(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertStore:
    return ExpertStore(folder, skeleton(folder, dtype))


def contents(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pack.iterdir()}


def assert_equal(one: ExpertStore, other: PackedStore) -> None:
    for layer, count in enumerate(one.num_experts):
        for expert in range(count):
            expected, found = one.read(layer, expert), other.read(layer, expert)
            assert found.keys() == expected.keys()
            for name, value in found.items():
                assert value.dtype == expected[name].dtype and torch.equal(value, expected[name])
                assert value.is_contiguous() and value.data_ptr() % ALIGNMENT == 0


@pytest.mark.parametrize("direct_io", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pack_holds_what_the_checkpoint_does(name: str, direct_io: bool, folders: dict[str, Path]) -> None:
    source = store_of(folders[name])
    packed = PackedStore(folders[f"{name}.pack"], source, direct_io=direct_io)
    assert (packed.layers, packed.num_experts, packed.params) == (source.layers, source.num_experts, source.params)
    assert (packed.expert_bytes, packed.total_bytes) == (source.expert_bytes, source.total_bytes)
    assert_equal(source, packed)


def test_its_files_are_plain_safetensors_of_whole_blocks(folders: dict[str, Path]) -> None:
    pack = folders["qwen2_moe.pack"]
    manifest = json.loads((pack / MANIFEST).read_text())
    assert manifest["model"] == "qwen2_moe" and len(manifest["files"]) > 1
    assert sorted(path.name for path in pack.iterdir()) == sorted([MANIFEST, *manifest["files"]])
    names = []
    for name in manifest["files"]:
        file = pack / name
        assert (8 + int.from_bytes(file.read_bytes()[:8], "little")) % BLOCK == 0 == file.stat().st_size % BLOCK
        with safe_open(file, "pt") as opened:
            names += opened.keys()
            piece = opened.get_tensor(next(iter(opened.keys())))
            assert piece.dtype == torch.uint8 and piece.numel() % BLOCK == 0
    assert sorted(names) == sorted(f"{m['name']}.{n}" for m in manifest["layers"] for n in range(m["experts"]))


def test_packs_of_format_1_are_read(folders: dict[str, Path], pack: Path) -> None:
    manifest = json.loads((pack / MANIFEST).read_text())
    for layer in manifest["layers"]:
        layer["params"] = layer.pop("parts")
    old = {key: manifest[key] for key in ("model", "files", "layers")} | {"format": 1}
    (pack / MANIFEST).write_text(json.dumps(old))
    source = store_of(folders["qwen2_moe"])
    assert_equal(source, PackedStore(pack, source))


def test_a_miss_is_one_direct_read_into_its_place(folders: dict[str, Path]) -> None:
    reads: list[tuple[int, int]] = []

    def watching(fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        reads.extend((np.frombuffer(buffer, np.uint8).ctypes.data, offset) for buffer in buffers)
        return os.preadv(fd, buffers, offset)

    store = PackedStore(
        folders["qwen2_moe.pack"], store_of(folders["qwen2_moe"]), direct_io=True, reader=watching
    )  # fmt: skip
    if not store.direct_io:
        pytest.skip("the file system of the temporary folder has no direct I/O")
    reads.clear()
    read = store.read(2, 3)
    assert [address for address, _ in reads] == [read["gate_up_proj"].data_ptr()] and reads[0][1] % BLOCK == 0


def test_models_decode_from_a_pack(folders: dict[str, Path]) -> None:
    ids = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))
    for name in LAYOUTS:
        model: Any = load_with_expert_cache(folders[name], 0.25, storage=folders[f"{name}.pack"], direct_io=True)
        assert isinstance(model.expert_cache.source, PackedStore)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, stock(folders[name])(input_ids=ids).logits)


def test_the_command_packs_in_a_dtype_and_refuses_what_is_there(folder: Path, tmp_path: Path) -> None:
    out, run = tmp_path / "some" / "pack", CliRunner().invoke
    made = run(app, ["pack", str(folder), str(out), "--dtype", "bfloat16", "--json"])
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert (result["model"], result["dtypes"], result["experts"]) == ("model", ["bfloat16"], 32)
    assert result["bytes"] == sum(path.stat().st_size for path in out.glob("*.safetensors"))
    source = store_of(folder, torch.bfloat16)
    assert_equal(source, PackedStore(out, source))
    with pytest.raises(ConfigError, match=r"in bfloat16, the model is to be loaded in float32: choose .* dtype="):
        load_with_expert_cache(folder, storage=out)
    assert load_with_expert_cache(folder, storage=out, dtype="bfloat16").dtype == torch.bfloat16

    again = run(app, ["pack", str(folder), str(out)])
    assert again.exit_code == 2 and "give another folder, or --overwrite" in again.output
    assert run(app, ["pack", str(folder), str(out), "--overwrite"]).exit_code == 0
    assert_equal(store_of(folder), PackedStore(out, store_of(folder)))
    assert [path.name for path in out.parent.iterdir()] == ["pack"]
    for taken in (folder, tmp_path):
        with pytest.raises(ConfigError, match="is there and no pack"):
            pack_experts(folder, taken, overwrite=True)
    with pytest.raises(ConfigError, match="cannot be found"):
        pack_experts("nobody/no-such-model", tmp_path / "x", local_files_only=True)


def test_packs_of_other_models_are_refused(folders: dict[str, Path], folder: Path, tmp_path: Path) -> None:
    pack = folders["qwen2_moe.pack"]
    for shape, words in (
        ({"moe_intermediate_size": 24}, r"pack of qwen2_moe .*\[32, 32\].*, not of .*\[48, 32\]"),
        ({"num_experts": 4}, "8 experts.* 4 experts"),
        ({"num_hidden_layers": 2}, "with 4 layers of experts, .* has 2"),
    ):
        other = save_tiny(tmp_path / "other", "qwen2_moe", **shape)
        with pytest.raises(ConfigError, match=words):
            PackedStore(pack, store_of(other))
        shutil.rmtree(other)
    weights = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    tuned = next(name for name in weights if "layers.2.mlp.experts.7.down_proj" in name)
    weights[tuned] = weights[tuned] + 1e-3
    for file in folder.glob("model*"):
        file.unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ConfigError, match=r"other numbers .* down_proj of expert 7 of model\.layers\.2\.mlp\.experts"):
        load_with_expert_cache(folder, storage=pack)


def test_folders_that_are_no_whole_pack_are_refused(folders: dict[str, Path], pack: Path, tmp_path: Path) -> None:
    source, manifest = store_of(folders["qwen2_moe"]), json.loads((pack / MANIFEST).read_text())
    with pytest.raises(ConfigError, match="no folder of packed experts"):
        PackedStore(tmp_path, source)
    for spoiled, words in (
        ({"format": 3}, "is of format 3, this version reads 1, 2"),
        ({"files": ["../other.safetensors"]}, "is not whole"),
        ({"layers": None}, "is not whole"),
    ):
        (pack / MANIFEST).write_text(json.dumps(manifest | spoiled))
        with pytest.raises(ConfigError, match=words):
            PackedStore(pack, source)
    (pack / MANIFEST).write_text(json.dumps(manifest | {"files": manifest["files"][1:]}))
    with pytest.raises(ExpertReadError, match=r"model\.layers\.0\.mlp\.experts\.0 is missing"):
        PackedStore(pack, source)
    (pack / MANIFEST).write_text(json.dumps(manifest))
    last = pack / manifest["files"][-1]
    os.truncate(last, last.stat().st_size - 1)
    with pytest.raises(ExpertReadError, match=f"{last.name} is truncated: tensor"):
        PackedStore(pack, source)
    last.unlink()
    with pytest.raises(ExpertReadError, match=f"{last.name} is missing"):
        PackedStore(pack, source)


@pytest.mark.parametrize("direct_io", [False, True])
def test_faults_while_reading_are_retried_or_named(folders: dict[str, Path], pack: Path, direct_io: bool) -> None:
    source, faults = store_of(folders["qwen2_moe"]), Faults(os.preadv)
    store = PackedStore(pack, source, direct_io=direct_io, reader=faults)
    expected = source.read(1, 5)
    faults.plan = {faults.reads + n: fault for n, fault in enumerate(("eio", "short", "end"))}
    assert all(torch.equal(value, expected[name]) for name, value in store.read(1, 5).items())
    before, faults.always = faults.reads, "eio"
    with pytest.raises(
        ExpertReadError, match=r"safetensors: tensor model\.layers\.1\.mlp\.experts\.5 .* at byte \d+ \(In"
    ):
        store.read(1, 5)
    assert faults.reads - before == ATTEMPTS
    faults.always = ""
    files = sorted(pack.glob("*.safetensors"))
    os.truncate(files[0], BLOCK)
    with pytest.raises(ExpertReadError, match="the file ends there"):
        store.read(0, 1)
    for file in files:
        file.unlink()
    assert all(torch.equal(value, source.read(3, 7)[name]) for name, value in store.read(3, 7).items())
    store.close()
    with pytest.raises(ExpertReadError, match="the store is closed"):
        store.read(3, 7)


KILLED = """
import sys, time
from remoe_adapt.expert_cache.load import pack_experts
import remoe_adapt.expert_cache.packing
done = 0
def slowly(count):
    global done
    done += count
    print(done, flush=True)
    time.sleep(0.02)
remoe_adapt.expert_cache.packing.write_pack.__kwdefaults__["shard_bytes"] = int(sys.argv[3])
pack_experts(sys.argv[1], sys.argv[2], on_bytes=slowly)
"""


def test_a_killed_run_leaves_nothing_half_and_the_next_goes_on(
    folders: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "out", sum(map(len, contents(folders["qwen2_moe.pack"]).values()))
    run = subprocess.Popen(
        [sys.executable, "-c", KILLED, folder, out, str(SMALL)], stdout=subprocess.PIPE, text=True,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    assert run.stdout is not None and run.stderr is not None
    while int(run.stdout.readline() or whole) < whole // 2:
        pass
    os.kill(run.pid, signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL, run.stderr.read()
    run.stdout.close()
    run.stderr.close()
    draft = tmp_path / ".out.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in draft.glob("*.safetensors")}
    assert finished and not out.exists()
    write_pack(FloatExperts(store_of(folder)), out, model_id="qwen2_moe", shard_bytes=SMALL)
    assert not draft.exists()
    assert_equal(store_of(folder), PackedStore(out, store_of(folder)))
    # Its model was called otherwise: nothing of it is used. Under the same name it is.
    assert all((out / name).stat().st_mtime_ns > then for name, then in finished.items())
    out.rename(draft)
    shutil.copy(draft / MANIFEST, draft / "plan.json")
    plan = json.loads((draft / MANIFEST).read_text()) | {"source": store_of(folder).state()}
    (draft / "plan.json").write_text(json.dumps(plan))
    for file in list(draft.glob("*.safetensors")):
        (draft / f"{file.name}.losses.json").write_text("{}")
    kept = {path.name: path.stat().st_mtime_ns for path in draft.glob("*.safetensors")}
    lost = sorted(kept)[1]
    (draft / lost).unlink()
    counted: list[int] = []
    made = write_pack(
        FloatExperts(store_of(folder)), out, model_id="qwen2_moe", shard_bytes=SMALL, on_start=counted.append,
        on_bytes=counted.append,
    )  # fmt: skip
    assert counted[0] == sum(counted[1:]) == made["bytes"]
    assert {name for name, then in kept.items() if (out / name).stat().st_mtime_ns != then} == {lost}
    assert contents(out) == contents(folders["qwen2_moe.pack"])


def test_a_disk_that_is_full_or_becomes_so(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = store_of(folder), tmp_path / "out"
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(ConfigError, match=r"needs \S+ KiB more on the disk of .*, which has 1000 B free"):
            write_pack(FloatExperts(source), out, model_id="x")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    reserved = os.posix_fallocate

    def full(fd: int, start: int, size: int) -> None:
        if len(list(tmp_path.glob(".out.partial/*.safetensors"))) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserved(fd, start, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"became full; what was packed has been removed. The pack takes \S+ KiB"):
        write_pack(FloatExperts(source), out, model_id="x", shard_bytes=SMALL)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_one_process_packs_at_a_time(folder: Path, tmp_path: Path) -> None:
    draft = tmp_path / ".out.partial"
    draft.mkdir()
    other = os.open(draft, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(ConfigError, match="another process packs into"):
        write_pack(FloatExperts(store_of(folder)), tmp_path / "out", model_id="x")
    os.close(other)
    write_pack(FloatExperts(store_of(folder)), tmp_path / "out", model_id="x")
