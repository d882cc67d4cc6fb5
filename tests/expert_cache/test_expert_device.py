"""Two tiers of experts, one over the other: on the CPU everything but CUDA's own calls, on a GPU the real thing."""

from __future__ import annotations

import gc
import os
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_support import EXPERTS, LAYERS, Source
from fake_streams import FakeStreams, tier_over, two_tiers
from prefetch_support import always, decoded, in_threads
from tiny_checkpoints import Faults, save_tiny, stock

from remoe_adapt import load_with_expert_cache
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache.device_pool import DevicePools
from remoe_adapt.expert_cache.experts import bind_experts
from remoe_adapt.expert_cache.gpu import find_device, make_cache
from remoe_adapt.expert_cache.memory import Blocks
from remoe_adapt.expert_cache.places import Places
from remoe_adapt.expert_cache.prefetch import bind_prefetch
from remoe_adapt.expert_cache.streams import CudaStreams

IDS = torch.randint(3, 96, (1, 10), generator=torch.Generator().manual_seed(0))
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model") / "model", "qwen2_moe")


def allocated() -> int:
    """Bytes on the device without cuBLAS's workspaces (33 MB each), which the first product on a stream allocates."""
    gc.collect()
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()
    return torch.cuda.memory_allocated()


def over_two_tiers(folder: Path, budget: float, below_budget: float, **options: Any) -> Any:
    """A model on the CPU whose cache is as on a GPU."""
    model: Any = load_with_expert_cache(folder, **options)
    store = model.expert_cache.source
    cache = two_tiers(store, int(budget * store.total_bytes), int(below_budget * store.total_bytes))
    bind_experts(model, cache, model.dtype, store.layout)
    model.__dict__["expert_cache"] = cache
    return model


@pytest.mark.parametrize("prefetch", [False, True])
def test_two_tiers_compute_what_the_stock_model_does(folder: Path, prefetch: bool) -> None:
    expected = decoded(stock(folder), IDS)
    model = over_two_tiers(folder, 0.3, 0.6)
    cache = model.expert_cache
    if prefetch:
        bind_prefetch(model, cache)
        always(model)
    for share in (0.3, 0.15, 1.0):
        cache.resize(int(share * cache.source.below.source.total_bytes))
        assert torch.equal(decoded(model, IDS), expected)
    stats = cache.stats()
    below = stats["below"]
    assert below["below"] is None and below["hits"] + below["misses"] == stats["misses"] + stats["prefetched"]
    assert below["hits"] > 0 and (stats["prefetched"] > 0) == prefetch
    cache.clear()
    assert cache.resident_bytes == cache.below.resident_bytes == 0
    cache.reset_stats()
    assert torch.equal(decoded(model, IDS), expected)
    assert cache.stats()["below"]["misses"] == len(cache.resident()), "each expert came from storage once"


def test_router_adapters_train_through_both_tiers(folder: Path) -> None:
    gradients = []
    for model in (stock(folder), over_two_tiers(folder, 0.1, 0.2)):
        weight = model.get_submodule("model.layers.0.mlp.gate").weight.requires_grad_()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_threads_never_exceed_either_budget(scope: str) -> None:
    source = Source(delay_s=0.0002)
    cache = two_tiers(source, source.total // 3, source.total // 2, scope=scope)
    source.cache = below = cache.below
    assert below is not None

    def step(number: int, random_of: random.Random) -> None:
        layer = number % LAYERS
        with cache.lease(layer, random_of.sample(range(EXPERTS), 2)) as lease:
            cache.prefetch((layer + 1) % LAYERS, random_of.sample(range(EXPERTS), 2))
            assert cache.resident_bytes <= source.total // 2
            for expert, slot in lease.slots.items():
                assert float(slot["w"][0]) == 10 * layer + expert

    with in_threads(step, threads=3, steps=80):
        for number in range(9):
            cache.resize(source.total // (2 + number % 2))
            below.resize(source.total // (3 + number % 3))
            if number % 4 == 3:
                cache.clear()
    cache.clear()
    assert not cache._shares.pins and not below._shares.pins and cache.resident_bytes == below.resident_bytes == 0


def test_faults_leave_both_tiers_consistent(folder: Path) -> None:
    source = Source()
    cache = two_tiers(source, source.total // 2, source.total)
    source.broken = {(1, 3)}
    for _ in range(2):
        with pytest.raises(ExpertReadError, match="expert 3 of layer 1"):
            cache.lease(1, [2, 3])
    assert cache.below is not None and cache.resident() == cache.below.resident() == [(1, 2)]
    source.broken = set()
    cache.lease(1, [2, 3]).release()

    class Broken(FakeStreams):
        def copy(self, pairs: Any, after: Any) -> Any:
            if self.is_full:
                raise torch.OutOfMemoryError("the device is full")
            return super().copy(pairs, after)

        is_full = False

    streams = Broken()
    broken = tier_over(cache.below, source.total, streams)
    broken.lease(0, [0]).release()
    streams.is_full = True
    with pytest.raises(torch.OutOfMemoryError):
        broken.lease(0, [1])
    assert broken.resident() == [(0, 0)] and (0, 1) in cache.below.resident() and not cache.below._shares.pins
    streams.is_full = False
    with broken.lease(0, [0, 1]) as lease:
        assert [float(lease.slots[expert]["w"][0]) for expert in (0, 1)] == [0.0, 1.0]

    faults = Faults(os.preadv)
    model = over_two_tiers(folder, 0.3, 0.5, reader=faults)
    expected = decoded(stock(folder), IDS)
    assert torch.equal(decoded(model, IDS), expected)
    faults.always = "eio"
    model.expert_cache.clear()
    with pytest.raises(ExpertReadError, match="Input/output error"):
        decoded(model, IDS)
    faults.always = ""
    assert torch.equal(decoded(model, IDS), expected)


def test_the_tier_below_counts_tokens_not_experts() -> None:
    source = Source()
    cache = two_tiers(source, source.total // 2, source.total)
    assert cache.below is not None
    for _ in range(3):
        for layer in range(LAYERS):
            cache.lease(layer, [0, 1, 2]).release()
        cache.clear()
    assert cache.below._shares._tokens == [2]


def test_a_block_serves_again_once_nothing_uses_it() -> None:
    blocks = Blocks()
    first = blocks.empty((8, 4), torch.float32)
    address, view = first.data_ptr(), first[2:].t()
    del first
    second = blocks.empty((8, 4), torch.float32)
    assert second.data_ptr() != address, "a view is a use"
    del view
    assert blocks.empty((16, 4), torch.bfloat16).data_ptr() == address


def test_options_of_devices_are_checked(folder: Path) -> None:
    for name in ("cuda:99", "mps", "toaster"):
        with pytest.raises(ConfigError, match="for the CPU or a CUDA device of this machine"):
            load_with_expert_cache(folder, device=name)
    with pytest.raises(ConfigError, match="ram_budget is for a model on a GPU"):
        load_with_expert_cache(folder, ram_budget=0.5)
    model = load_with_expert_cache(folder, device=torch.device("cpu"))
    assert model.expert_cache.stats()["below"] is None
    with pytest.raises(ConfigError, match="choose device= when the model is loaded"):
        rows: Any = model.get_submodule(model.expert_cache.source.layers[0])
        rows(torch.empty(1, 32, device="meta"), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))


class TestOnAGpu:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("prefetch", [False, True])
    @pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
    def test_the_stock_models_bits(self, name: str, prefetch: bool, tmp_path: Path) -> None:
        folder = save_tiny(tmp_path / name, name)
        expected = decoded(stock(folder).to("cuda"), IDS.cuda())  # type: ignore[arg-type]
        model = load_with_expert_cache(
            folder, 0.4, device="cuda", ram_budget=0.6, prefetch=prefetch, arithmetic="exact"
        )
        if prefetch:
            always(model)
        cache = model.expert_cache
        for share in (0.4, 0.2, 1.0):
            cache.resize(int(share * cache.below.source.total_bytes))
            assert torch.equal(decoded(model, IDS.cuda()), expected)
            assert cache.resident_bytes <= cache.budget_bytes
            assert cache.below.resident_bytes <= cache.below.budget_bytes
        assert (cache.stats()["prefetched"] > 0) == prefetch

    def test_memory_of_the_device_is_the_budget(self, tmp_path: Path) -> None:
        sizes = {"hidden_size": 256, "moe_intermediate_size": 1024, "num_experts": 16}
        folder = save_tiny(tmp_path / "big", "qwen2_moe", shards="50MB", **sizes)
        before = allocated()
        model = load_with_expert_cache(folder, 0.5, device="cuda", ram_budget=1.0)
        dense = sum(param.nbytes for param in model.parameters())
        decoded(model, IDS.cuda())
        cache = model.expert_cache
        assert allocated() - before <= 1.02 * (dense + cache.budget_bytes) + (1 << 20)
        cache.resize(max(cache.source.expert_bytes))
        assert allocated() - before <= dense + 2 * cache.budget_bytes + (1 << 20)
        pinned = [tensor for slot in cache.below._slots.values() for tensor in slot.values()]
        assert pinned and all(tensor.is_pinned() for tensor in pinned)
        with pytest.raises(ConfigError, match="bytes of experts on cuda"):
            make_cache(cache.below.source, 1 << 50, device=find_device("cuda"))

    @pytest.mark.parametrize("prefetch", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "gpt_oss"])
    def test_kernels_on_slots(self, name: str, dtype: torch.dtype, prefetch: bool, tmp_path: Path) -> None:
        pytest.importorskip("triton")
        folder = save_tiny(tmp_path / name, name, dtype=dtype)
        expected = decoded(stock(folder, dtype=torch.float32).to("cuda"), IDS.cuda())  # type: ignore[arg-type]
        model = load_with_expert_cache(folder, 0.4, device="cuda", ram_budget=0.6, prefetch=prefetch)
        if prefetch:
            always(model)
        cache = model.expert_cache
        assert cache.arithmetic == "float by triton, fast"
        for share in (0.4, 0.15, 1.0):
            cache.resize(int(share * cache.below.source.total_bytes))
            difference = (decoded(model, IDS.cuda()).float() - expected).norm()
            assert difference <= (1e-4 if dtype == torch.float32 else 5e-2) * expected.norm()

    def test_a_copy_waits_for_kernels_that_read_the_slot(self) -> None:
        device = find_device("cuda")
        places = Places([{"w": torch.empty(1 << 20, device="meta")}], [4], device)
        pools = DevicePools(places, [4], CudaStreams(device))
        pools.fit({places.slot_bytes[0]: 1}, {})
        ones, poison = places.slot(0), places.slot(0)
        ones["w"].fill_(1.0)
        poison["w"].fill_(float("nan"))
        taken = pools.fill(0, {0: ones})
        views = pools.leased(taken)
        pools.wait_for(taken)
        address = views[0]["w"].data_ptr()
        torch.cuda._sleep(200_000_000)
        read = views[0]["w"].clone()
        del taken
        again = pools.fill(0, {1: poison})
        assert again[1]["w"].data_ptr() == address and pools.held == 2, "the same memory, and nobody has waited"
        torch.cuda.synchronize()
        assert bool((read == 1.0).all()) and bool(again[1]["w"].isnan().all())

    @pytest.mark.parametrize("arithmetic", ["exact", "auto"])
    def test_decoding_never_reads_a_slot_that_is_written(
        self, arithmetic: str, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        expected = decoded(stock(folder).to("cuda"), IDS.cuda())  # type: ignore[arg-type]
        copy = CudaStreams.copy

        def poisoned(self: CudaStreams, pairs: Any, after: Any) -> Any:
            pairs = list(pairs)
            nothing = [(to, torch.full_like(to, 255, device="cpu").pin_memory()) for to, _ in pairs[:-1]]
            copy(self, nothing, after)
            return copy(self, pairs, after)

        options: dict[str, Any] = {"device": "cuda", "ram_budget": 0.3, "prefetch": True, "arithmetic": arithmetic}
        model = always(load_with_expert_cache(folder, 0.15, **options))
        decoded(model, IDS.cuda())
        monkeypatch.setattr(CudaStreams, "copy", poisoned)
        for name in model.expert_cache.source.layers:
            model.get_submodule(name).register_forward_pre_hook(lambda *_: torch.cuda._sleep(2_000_000))
        for _ in range(3):
            assert (decoded(model, IDS.cuda()) - expected).norm() <= 1e-4 * expected.norm()

    def test_gradients_are_the_stock_models(self, folder: Path) -> None:
        gradients = []
        for model in (stock(folder).to("cuda"), load_with_expert_cache(folder, 0.1, device="cuda")):  # type: ignore[arg-type]
            weight = model.get_submodule("model.layers.0.mlp.gate").weight.requires_grad_()
            model(input_ids=IDS.cuda(), labels=IDS.cuda()).loss.backward()
            gradients.append(weight.grad)
        assert torch.equal(*gradients)
