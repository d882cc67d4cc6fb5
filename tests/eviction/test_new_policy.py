"""A policy is one class: registered here, it is known by its name to replays, to the live cache and to profiles."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from remoe_adapt.device_profile.profile import load_profile
from remoe_adapt.errors import ConfigError, ProfileError
from remoe_adapt.eviction.policy import LRU, ONLINE, POLICIES, Policy, register
from remoe_adapt.eviction.replay import count_misses, replay, simulate
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.types import check_options
from remoe_adapt.traces.trace import Trace

PROFILE = """\
name: mine
description: a test device
memory: {budget: 5.5GiB, reserve: 1GiB}
expert_cache: {budget: 0.25, policy: mru}
strength: {curve: [[0.0, 0.0], [1.0, 1.0]]}
"""


class MRU(Policy[Any]):
    """Drops the most recently used."""

    name = "mru"

    def _value(self, key: Any) -> float:
        return -float(self._last_use[key])


class Source:
    """Four experts of one layer, 4 bytes each."""

    layers, num_experts, expert_bytes = ("experts",), (4,), (4,)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        return {"w": torch.full((1,), float(expert))}

    def give_back(self) -> None:
        """Nothing is kept."""


@pytest.fixture
def registered() -> Iterator[None]:
    register(MRU)
    yield
    del POLICIES["mru"], ONLINE["mru"]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(PROFILE)
    return path


@pytest.mark.usefixtures("registered")
def test_a_registered_policy_is_replayed_by_its_name() -> None:
    ids = np.random.default_rng(0).integers(0, 4, (2, 60, 1)).astype(np.int16)
    trace = Trace(ids, {"num_experts": 4, "document_starts": [0, 25]})
    misses_SL = count_misses(trace, "mru", [1, 2, 3])
    assert misses_SL.tolist() == [[replay(ids_TK, "mru", size, (0, 25)) for ids_TK in ids] for size in (1, 2, 3)]
    found = simulate(trace, ["lru", "mru"], [0.5])
    assert found["mru@0.5"] == 1 - misses_SL[1].sum() / 120 != found["lru@0.5"]


@pytest.mark.usefixtures("registered")
def test_a_registered_policy_runs_a_live_cache() -> None:
    def resident(policy: str) -> list[tuple[int, int]]:
        cache = ExpertCache(Source(), 8, policy=policy)
        for expert in (0, 1, 2):
            cache.lease(0, [expert]).release()
        return list(cache.resident())

    assert resident("mru") == [(0, 0), (0, 2)] and resident(LRU.name) == [(0, 1), (0, 2)]


@pytest.mark.usefixtures("registered")
def test_a_registered_policy_can_stand_in_a_profile(profile: Path) -> None:
    assert load_profile(profile).expert_cache.policy == "mru"
    check_options(load_profile(profile).expert_cache.policy, "global", 1)


def test_an_unregistered_policy_is_refused_everywhere(profile: Path) -> None:
    trace = Trace(np.zeros((1, 2, 1), np.int16), {"num_experts": 4})
    with pytest.raises(ConfigError, match="'mru': choose from lru, lfu, lrfu, belady"):
        simulate(trace, ["mru"])
    with pytest.raises(ConfigError, match="policy 'mru' is not one of lru, lfu, lrfu"):
        ExpertCache(Source(), 8, policy="mru")
    with pytest.raises(ProfileError, match="not one of lru, lfu, lrfu"):
        load_profile(profile)
