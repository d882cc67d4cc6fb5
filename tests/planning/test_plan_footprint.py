"""What is counted before anything is loaded is what loading takes, to the byte, in every format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_checkpoints import experts_in, random_model, write_checkpoint
from quantised_checkpoints import METHODS, save_quantised
from tiny_checkpoints import save_tiny

from remoe_adapt.checkpoints import device_of
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache import expert_cache_of, load_with_expert_cache, pack_experts
from remoe_adapt.expert_cache.checkpoint import described_checkpoint
from remoe_adapt.expert_cache.encodings import ggml
from remoe_adapt.expert_cache.footprint import Footprint, Footprints, footprint

OF_METHOD = {"mxfp4": "gpt_oss", "fp8": "qwen3_moe"}


def taken(path: Path, **options: Any) -> tuple[int, int]:
    """(bytes of the dense part, of all experts in slots) of a model that is loaded."""
    model = load_with_expert_cache(path, 1.0, **options)
    assert device_of(model).type == "cpu"
    cache = expert_cache_of(model)
    assert cache is not None
    dense = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    return dense, sum(n * size for n, size in zip(cache.source.num_experts, cache.source.expert_bytes, strict=True))


def counted(found: Footprint) -> tuple[int, int]:
    return found.dense_bytes, found.total_bytes


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "model", "qwen2_moe", dtype=torch.bfloat16)


def test_floats(floats: Path) -> None:
    assert counted(footprint(described_checkpoint(floats))) == taken(floats)


@pytest.mark.parametrize(("bits", "dense_bits"), [(4, 8), (8, None), (None, 4)])
def test_packs_before_and_after_they_are_made(floats: Path, bits: int | None, dense_bits: int | None) -> None:
    pack = floats.with_name("pack")
    made = pack_experts(floats, pack, bits=bits, dense_bits=dense_bits)
    on_codes = ggml() is not None
    before = footprint(described_checkpoint(floats), bits, dense_bits, on_codes=on_codes)
    after = Footprints(described_checkpoint(floats), on_codes=on_codes).of_pack(pack)
    assert counted(before) == counted(after) == taken(floats, storage=pack)
    assert before.piece_bytes == after.piece_bytes
    # Headers of the files are no weights: they have 4 KiB here.
    headers = 4096 * made["files"] if dense_bits is None else 64 << 10
    assert 0 <= made["bytes"] - before.stored_bytes <= headers


def test_a_pack_of_another_model_is_refused(floats: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "qwen2_moe", num_experts=4)
    pack_experts(other, tmp_path / "pack")
    with pytest.raises(ConfigError, match="a pack of another model"):
        Footprints(described_checkpoint(floats)).of_pack(tmp_path / "pack")


@pytest.mark.parametrize("method", METHODS)
def test_codes_by_their_headers_and_by_the_configuration_alone(method: str, tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "model", OF_METHOD.get(method, "qwen3_moe"), method)
    on_codes = ggml() is not None
    loaded = taken(folder)
    by_headers = footprint(described_checkpoint(folder), has_files=True, on_codes=on_codes)
    assert counted(by_headers) == loaded
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    described = footprint(described_checkpoint(folder), on_codes=on_codes)
    assert described.dense_bytes == loaded[0]
    # The files have a tensor of its own for the gate, with a list of groups or a shape of its own.
    assert described.total_bytes == pytest.approx(loaded[1], rel=0.03)
    # The list is as long as a row: in rows of 64 numbers it is a large part.
    assert sum(described.piece_bytes) == pytest.approx(sum(by_headers.piece_bytes), rel=0.07)


def test_headers_alone_are_enough(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "model", "qwen3_moe", "fp8")
    whole = footprint(described_checkpoint(folder), has_files=True)
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        file.write_bytes(data[: 8 + int.from_bytes(data[:8], "little")])
    assert footprint(described_checkpoint(folder), has_files=True) == whole
    with pytest.raises(ExpertReadError, match="truncated"):
        load_with_expert_cache(folder, 1.0)


@pytest.mark.parametrize("shard", [0, 12])
def test_a_gguf_and_its_header_alone(shard: int, tmp_path: Path) -> None:
    kinds = experts_in("Q4_0", "Q8_0", dense="Q8_0")
    model = random_model("qwen3_moe")
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "model.gguf", kinds, shard=shard)
    whole = footprint(described_checkpoint(path), on_codes=ggml() is not None)
    assert counted(whole) == taken(path)
    # Less than all data of every file: nobody looks at it.
    for file in tmp_path.glob("*.gguf"):
        data = file.read_bytes()
        file.write_bytes(data[: len(data) - len(data) // 4])
    with pytest.raises(ExpertReadError):
        load_with_expert_cache(path, 1.0)
    assert footprint(described_checkpoint(path), on_codes=ggml() is not None) == whole
