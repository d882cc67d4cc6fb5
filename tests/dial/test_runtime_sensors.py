"""Sensors of the expert cache and the GPU: on a real model that decodes with a small cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_tiny

from remoe_adapt.device_profile.profile import MemoryProfile, load_profile
from remoe_adapt.dial.sensors import CacheUse, GpuMemory, model_sensors
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.load import load_with_expert_cache
from remoe_adapt.pressure.governor import Governor


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_with_expert_cache(save_tiny(tmp_path_factory.mktemp("tiny"), "qwen2_moe"), 0.5)


@pytest.fixture
def cache(model: Any) -> ExpertCache:
    found: ExpertCache = model.expert_cache
    found.reset_stats()
    return found


def decode(model: Any, tokens: int) -> None:
    with torch.no_grad():
        for token in range(tokens):
            model(input_ids=torch.tensor([[token % 30]]))


def test_rates_of_the_cache_are_differences_of_its_counters(model: Any, cache: ExpertCache) -> None:
    use = CacheUse(cache)
    first = use.read(10.0)
    assert first.value("cache.budget") == cache.budget_bytes and "cache.read" in first.missing
    idle = use.read(10.2)
    assert idle.value("cache.read") == 0.0 and idle.missing["cache.miss_rate"] == "no token was decoded lately"
    decode(model, 8)
    found, stats = use.read(10.4), cache.stats()
    assert stats["misses"] > 0
    assert found.value("cache.miss_rate") == stats["misses"] / (stats["hits"] + stats["misses"])
    assert found.value("cache.read") == pytest.approx(stats["bytes"] / 0.4)
    assert found.value("cache.stall_share") == pytest.approx(min(1.0, stats["stall_s"] / 0.4))
    assert found.value("cache.resident") == stats["resident_bytes"]


def test_the_window_forgets(model: Any, cache: ExpertCache) -> None:
    use = CacheUse(cache)
    use.read(1.0)
    decode(model, 4)
    assert (use.read(1.2).value("cache.read") or 0) > 0
    assert [use.read(1.2 + step / 5).value("cache.read") == 0.0 for step in range(1, 8)] == [False] * 4 + [True] * 3


def test_counters_and_clocks_that_go_back_start_anew(model: Any, cache: ExpertCache) -> None:
    use = CacheUse(cache)
    use.read(1.0)
    decode(model, 4)
    use.read(2.0)
    cache.reset_stats()
    assert "cache.read" in use.read(3.0).missing
    assert use.read(4.0).value("cache.read") == 0.0
    assert "cache.read" in use.read(3.5).missing


def test_a_budget_set_by_hand_is_the_whole_one_from_then_on(cache: ExpertCache) -> None:
    use, whole = CacheUse(cache), cache.budget_bytes
    use.read(1.0)
    use.resize("cache", whole // 2)
    try:
        assert use.read(2.0).value("cache.allowed") == whole
        for by_hand in (whole // 4, whole // 2, whole):
            cache.resize(by_hand)
            found = use.read(3.0)
            assert found.value("cache.budget") == found.value("cache.allowed") == by_hand
    finally:
        cache.resize(whole)


def test_a_governor_that_wants_everything_gets_all_but_one_expert(model: Any, cache: ExpertCache) -> None:
    use, whole = CacheUse(cache), cache.budget_bytes
    use.read(1.0)
    try:
        use.resize("cache", 8)
        assert cache.budget_bytes == max(cache.source.expert_bytes)
        assert use.read(2.0).value("cache.allowed") == whole
        decode(model, 2)
    finally:
        cache.resize(whole)


def test_the_budget_before_the_governor_s_moves_is_the_whole_one(cache: ExpertCache) -> None:
    use, whole = CacheUse(cache), cache.budget_bytes
    use.read(1.0)
    use.resize("cache", whole // 2)
    try:
        found = use.read(2.0)
        assert found.value("cache.budget") == whole // 2 and found.value("cache.allowed") == whole
        use.allowed_bytes = whole // 2
        assert use.read(3.0).value("cache.allowed") == whole // 2
        with pytest.raises(ConfigError, match="no tier 'below'"):
            use.resize("below", whole)
    finally:
        cache.resize(whole)


def test_a_governor_shrinks_a_real_cache_and_gives_it_back(model: Any, cache: ExpertCache) -> None:
    decode(model, 30)
    whole, use = cache.budget_bytes, CacheUse(cache)
    sensors = model_sensors(model, cache_use=use)
    assert {sensor.name for sensor in sensors.sensors} == {"memory", "cgroup", "psi", "process", "cache"}
    profile = load_profile("orin-8gb")
    governor = Governor(sensors, profile, resize=use.resize)
    # Weights, torch and Python take more than this budget: memory is lacking, whatever this machine has.
    governor.profile = replace(profile, memory=MemoryProfile(budget_bytes=1, reserve_bytes=1))
    decisions = [governor.tick(0.0, 0.0)]
    for step in range(1, 6):
        decisions.append(governor.tick(step / 5, decisions[-1].strength))
    assert cache.budget_bytes == int(profile.expert_cache.floor * whole) and decisions[-1].strength == 1.0
    assert "budget is" in decisions[0].reason and "shrinks to" in decisions[0].reason
    governor.profile = replace(profile, memory=MemoryProfile(budget_bytes=None, reserve_bytes=1))
    for step in range(6, int((profile.recovery_s + 2) * 5)):
        decisions.append(governor.tick(step / 5, decisions[-1].strength))
    assert cache.budget_bytes == whole and decisions[-1].strength == 0.0


def test_a_gpu_that_is_not_there_is_a_reason() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    reading = GpuMemory().read(1.0)
    assert not reading.measures and "CUDA" in reading.missing["gpu"]


@pytest.mark.parametrize(
    ("integrated", "compatible", "unified"), [(1, "", 1.0), (0, "nvidia,tegra234", 1.0), (0, "pc", 0.0)]
)
def test_gpu_memory_and_who_shares_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, integrated: int, compatible: str, unified: float
) -> None:
    (tmp_path / "device-tree").mkdir()
    (tmp_path / "device-tree/compatible").write_text(compatible)
    facts = SimpleNamespace(is_integrated=integrated)
    for name, value in {"is_available": True, "mem_get_info": (3, 8), "memory_allocated": 2, "memory_reserved": 5,
                        "get_device_properties": facts}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    reading = GpuMemory(proc=tmp_path).read(1.0)
    found = {name.removeprefix("gpu."): measure.value for name, measure in reading.measures.items()}
    assert found == {"free": 3, "total": 8, "allocated": 2, "reusable": 3, "unified": unified}


@pytest.mark.gpu
def test_a_real_gpu_tells_what_tensors_take() -> None:
    before = GpuMemory().read(1.0)
    held = torch.empty(64 << 20, dtype=torch.uint8, device="cuda")
    after = GpuMemory().read(2.0)
    assert (after.value("gpu.allocated") or 0) - (before.value("gpu.allocated") or 0) >= held.numel()
    assert 0 < (after.value("gpu.free") or 0) < (after.value("gpu.total") or 0)
