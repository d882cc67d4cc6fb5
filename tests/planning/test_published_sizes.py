"""Published configurations, and nothing else of these models: the sizes that their makers publish."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import pytest

from remoe_adapt.expert_cache.checkpoint import described_checkpoint
from remoe_adapt.expert_cache.footprint import Footprints, footprint, parameters_of

DATA = Path(__file__).parent / "data"


class Published(NamedTuple):
    """In billions. with_table: whether the figure of active parameters counts the table of input embeddings."""

    total: float
    active: float
    with_table: bool
    step: float = 0.1
    experts: int = 128
    top_k: int = 8


# Model cards and papers; gpt-oss: arXiv:2508.10925, table 1 ("active" counts the unembedding, not the embedding);
# DeepSeek-V3: README_WEIGHTS.md (36.6B with the output head).
PUBLISHED = {
    "qwen3-30b-a3b": Published(30.5, 3.3, True),
    "gpt-oss-20b": Published(20.91, 3.61, False, experts=32, top_k=4),
    "gpt-oss-120b": Published(116.83, 5.13, False, top_k=4),
    "deepseek-v2-lite": Published(15.7, 2.4, False, experts=64, top_k=6),
    "deepseek-v3": Published(671, 36.6, False, experts=256),
    "glm-4.5-air": Published(106, 12, False, step=1),
    "olmoe-1b-7b": Published(6.9, 1.3, True, experts=64),
    "qwen1.5-moe-a2.7b": Published(14.3, 2.7, True, experts=60, top_k=4),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_are_published(name: str) -> None:
    published = PUBLISHED[name]
    found = parameters_of(described_checkpoint(DATA / name))
    active = found.active - (0 if published.with_table else found.embedding)
    assert found.total / 1e9 == pytest.approx(published.total, rel=0.01)
    # Some are cut off and not rounded, so that a digit of theirs may be one more.
    assert abs(active / 1e9 - published.active) < max(0.02 * published.active, published.step)
    assert set(found.num_experts_L) == {published.experts} and set(found.chosen_L) == {published.top_k}


@pytest.mark.parametrize(("name", "gigabytes"), [("gpt-oss-20b", 13.76), ("gpt-oss-120b", 65.25)])
def test_codes_that_a_configuration_describes_take_what_the_published_files_take(name: str, gigabytes: float) -> None:
    # Bytes of the safetensors files of the repositories: 12.8 and 60.8 GiB by the model card.
    assert footprint(described_checkpoint(DATA / name)).stored_bytes / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_the_largest_is_counted_in_every_format() -> None:
    counted = Footprints(described_checkpoint(DATA / "deepseek-v3"))
    stored, packed = counted.of(), counted.of(4)
    routed = 58 * 256 * 3 * 7168 * 2048
    # FP8 becomes q8_0, 34 bytes for 32 numbers; q4_1 takes 20. Slots hold blocks, files codes with a scale for a tile.
    assert stored.total_bytes == routed * 34 // 32 and packed.total_bytes == routed * 20 // 32
    tiles = 58 * 256 * 3 * (7168 // 128) * (2048 // 128)
    assert sum(n * size for n, size in zip(stored.num_experts, stored.piece_bytes, strict=True)) == routed + 4 * tiles
    assert packed.dense_bytes == stored.dense_bytes
