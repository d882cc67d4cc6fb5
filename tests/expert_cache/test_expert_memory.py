"""What a process that loads a model through an expert cache takes, from the kernel's own account."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_checkpoints import save_tiny

MEASURE = """
import sys, torch
from remoe_adapt import load_with_expert_cache
from tiny_checkpoints import stock
import transformers.models.auto.modeling_auto, transformers.models.qwen2_moe.modeling_qwen2_moe
def anonymous():
    return sum(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous:")) << 10
torch.set_num_threads(1)
warm = load_with_expert_cache(sys.argv[2])
warm(input_ids=torch.ones(1, 4, dtype=torch.long))
del warm
before = anonymous()
model = load_with_expert_cache(sys.argv[1], 0.25, direct_io=sys.argv[3] == "direct")
for step in range(6):
    with torch.no_grad():
        model(input_ids=torch.randint(3, 96, (1, 16)))
cache = model.expert_cache
dense = sum(p.nbytes for p in model.parameters())
grown = anonymous() - before
assert cache.resident_bytes > 0.9 * cache.budget_bytes
cache.resize(max(cache.source.expert_bytes))
print(grown, dense, cache.stats()["bytes"], int(0.25 * cache.source.total_bytes), anonymous() - before)
"""

SUPPORT = Path(__file__).parents[1] / "support"


@pytest.mark.slow
@pytest.mark.parametrize("io", ["direct", "buffered"])
def test_memory_is_the_dense_part_and_the_slots(tmp_path: Path, io: str) -> None:
    small = save_tiny(tmp_path / "small", "qwen2_moe")
    big = save_tiny(
        tmp_path / "big", "qwen2_moe", shards="50MB", hidden_size=256, moe_intermediate_size=1024, num_experts=16
    )
    assert sum(file.stat().st_size for file in big.glob("*.safetensors")) > 190e6
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, big, small, io],
        capture_output=True, text=True, check=False, env={**os.environ, "PYTHONPATH": str(SUPPORT)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    grown, dense, _, slots, after_shrinking = map(int, run.stdout.split())
    assert grown <= dense + slots + (32 << 20)
    assert after_shrinking <= grown - 0.7 * slots
