"""Experts that are timed before there are weights compute as those of a loaded model do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_checkpoints import experts_in, random_model, write_checkpoint
from quantised_checkpoints import METHODS, save_quantised
from tiny_checkpoints import save_tiny

from remoe_adapt.expert_cache import Footprints, arithmetic_of, load_with_expert_cache, pack_experts, parameters_of
from remoe_adapt.expert_cache.checkpoint import described_checkpoint
from remoe_adapt.expert_cache.encodings import DECODED, dequantise, ggml
from remoe_adapt.expert_cache.footprint import Footprint
from remoe_adapt.expert_cache.trial import ExpertTrial, byte_of

OF_METHOD = {"mxfp4": "gpt_oss", "fp8": "qwen3_moe"}
ROOM = 1 << 20


def counted(path: Path, **known: Any) -> tuple[Footprints, tuple[int, ...]]:
    checkpoint = described_checkpoint(path)
    return Footprints(checkpoint, on_codes=ggml() is not None, **known), parameters_of(checkpoint).chosen_L


def checked(counts: Footprints, found: Footprint, chosen_L: tuple[int, ...], loaded: Any) -> None:
    """The trial's arithmetic is the loaded model's, and its numbers are of the size of a model's."""
    assert found.make_layout().name == arithmetic_of(loaded)["name"]
    trial = counts.trial(found, chosen_L, ROOM)
    for _ in range(5):
        out_TD = trial.run()
        assert out_TD.shape == (1, loaded.config.hidden_size)
        assert 1e-9 < float(out_TD.abs().mean()) < 1e6


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_floats(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", architecture, dtype=torch.bfloat16)
    counts, chosen_L = counted(folder)
    checked(counts, counts.of(), chosen_L, load_with_expert_cache(folder, 1.0))
    whole = counts.trial(counts.of(), chosen_L, ROOM, whole=True)
    assert torch.isfinite(whole.run()).all() and whole.run().abs().sum() > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_packs_before_and_after_they_are_made(bits: int, tmp_path: Path) -> None:
    folder, pack = save_tiny(tmp_path / "model", "qwen3_moe"), tmp_path / "pack"
    pack_experts(folder, pack, bits=bits)
    loaded = load_with_expert_cache(folder, 1.0, storage=pack)
    counts, chosen_L = counted(folder)
    for found in (counts.of(bits), counts.of_pack(pack)):
        checked(counts, found, chosen_L, loaded)


@pytest.mark.parametrize("method", METHODS)
def test_codes_of_checkpoints(method: str, tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "model", OF_METHOD.get(method, "qwen3_moe"), method)
    counts, chosen_L = counted(folder, has_files=True)
    checked(counts, counts.of(), chosen_L, load_with_expert_cache(folder, 1.0))


@pytest.mark.parametrize("kinds", [("Q4_0", "Q8_0"), ("Q4_K", "Q6_K"), ("MXFP4", "MXFP4")])
def test_blocks_of_gguf(kinds: tuple[str, str], tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256} if "_K" in kinds[0] else {}
    model = random_model("qwen3_moe", **sizes)
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", experts_in(*kinds, dense="Q8_0"))
    counts, chosen_L = counted(path)
    checked(counts, counts.of(), chosen_L, load_with_expert_cache(path, 1.0))


def test_experts_share_slots_beyond_the_memory_for_them(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen3_moe")
    counts, chosen_L = counted(folder)
    found = counts.of()
    trial = counts.trial(found, chosen_L, 3 * found.expert_bytes[0])
    assert isinstance(trial, ExpertTrial)
    cache = trial.cache
    assert len({id(slot) for slot in cache._slots.values()}) == 3
    before = cache.stats()["misses"]
    for _ in range(6):
        trial.run()
    assert cache.stats()["misses"] == before


@pytest.mark.parametrize("kind", sorted(DECODED, key=lambda kind: kind.name), ids=lambda kind: str(kind.name))
def test_blocks_of_one_byte_are_neither_tiny_nor_infinite(kind: Any) -> None:
    row_NB = torch.full((1, kind.bytes), byte_of(kind), dtype=torch.uint8)
    assert 2**-9 < float(dequantise(row_NB, kind, kind.values).abs().mean()) < 0.25
