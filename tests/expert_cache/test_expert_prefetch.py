"""Read-aheads of an expert cache and the predictor that posts them: the same logits, honest counters, no harm done."""

from __future__ import annotations

import copy
import gc
import logging
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_support import EXPERTS, LAYERS, Source
from prefetch_support import IDS, always, counted, decoded, in_threads, predictor
from tiny_checkpoints import save_tiny, stock
from waiting import until

from remoe_adapt import get_remoe_model, load_with_expert_cache
from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache import prefetch as prefetching
from remoe_adapt.expert_cache.cache import AHEAD_THREADS, ExpertCache
from remoe_adapt.expert_cache.resident import ResidentMasks
from remoe_adapt.routers.discover import discover_routers

# One for each way of ranking, with a bias inside or beside the router, and with experts that are no experts.
ARCHITECTURES = ("qwen2_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "gpt_oss", "ernie4_5_moe", "qwen3_next")


class Held(Source):
    """Its reads wait until they are let go."""

    def __init__(self) -> None:
        super().__init__()
        self.go = threading.Event()

    def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
        read = super().read(layer, expert)
        assert self.go.wait(10)
        return read


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["qwen2_moe"]


# The cache


def test_what_was_read_ahead_is_a_hit_and_counted_once() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    cache.prefetch(1, [2, 3])
    until(lambda: len(cache.resident()) == 2)
    for _ in range(2):
        with cache.lease(1, [2, 3, 4]) as lease:
            assert [float(lease.slots[expert]["w"][0]) for expert in (2, 3, 4)] == [12.0, 13.0, 14.0]
    assert counted(cache) == (5, 1, 2, 2) and cache.stats()["bytes"] == 3 * source.expert_bytes[1]
    cache.prefetch(1, [2, 3, 4])
    assert len(source.reads) == 3


def test_a_look_up_waits_for_the_read_that_is_under_way() -> None:
    source = Held()
    cache = ExpertCache(source, source.total)
    cache.prefetch(0, [5])
    until(lambda: source.reads)
    threading.Timer(0.05, source.go.set).start()
    cache.lease(0, [5]).release()
    assert counted(cache) == (1, 0, 1, 1) and source.reads == [(0, 5)] and cache.stats()["stall_s"] > 0.03


def test_demands_go_first_and_what_turns_out_wrong_is_called_off() -> None:
    source = Held()
    cache = ExpertCache(source, source.total)
    with ThreadPoolExecutor(2) as pool:
        demand = pool.submit(lambda: cache.lease(0, [0]).release())
        until(lambda: source.reads)
        cache.prefetch(1, [1, 2, 3])
        time.sleep(0.03)
        assert source.reads == [(0, 0)], "no read-ahead begins while a lease waits"
        # Expert 2 is taken over, the others are called off.
        other = pool.submit(lambda: cache.lease(1, [2, 7]).release())
        until(lambda: len(source.reads) == 3)
        source.go.set()
        demand.result(10)
        other.result(10)
    time.sleep(0.02)
    assert sorted(source.reads) == [(0, 0), (1, 2), (1, 7)] and counted(cache) == (0, 3, 0, 0)
    assert cache.resident() == sorted(source.reads)
    cache.resize(max(source.expert_bytes))  # nothing is left pinned


def test_nothing_leased_or_expected_is_evicted_and_half_the_budget_is_left() -> None:
    source = Source()
    size = source.expert_bytes[0]
    cache = ExpertCache(source, 6 * size, policy="lru")
    cache.lease(0, [0, 1, 2, 3, 4, 5]).release()
    with cache.lease(0, [0, 1, 2]):
        cache.prefetch(0, [3, 4, 6, 7])  # there is room for one: 5 goes
        until(lambda: (0, 6) in cache.resident())
        assert cache.resident() == [(0, expert) for expert in (0, 1, 2, 3, 4, 6)]
        cache.lease(0, [7], continues=True).release()  # a demand may: it takes what is only expected
        assert {(0, 0), (0, 1), (0, 2), (0, 7)} < set(cache.resident())
    held = Held()
    cache = ExpertCache(held, 6 * size)
    cache.prefetch(0, range(EXPERTS))
    until(lambda: len(held.reads) == AHEAD_THREADS)
    assert cache.resident_bytes == 3 * size
    held.go.set()


def test_a_read_ahead_that_fails_leaves_no_trace() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    source.broken = {(1, 3)}
    cache.prefetch(1, [3, 4])
    until(lambda: len(source.reads) == 2 and len(cache.resident()) == 1)
    until(lambda: cache.resident_bytes == source.expert_bytes[1])
    with pytest.raises(ExpertReadError, match="expert 3 of layer 1"):
        cache.lease(1, [3])
    assert source.reads.count((1, 3)) == 2, "the lease read again"
    source.broken = set()
    cache.lease(1, [3]).release()
    cache.resize(max(source.expert_bytes))


def test_a_lease_that_waits_for_a_failing_read_ahead_gets_a_read_of_its_own() -> None:
    class Once(Held):
        def read(self, layer: int, expert: int) -> dict[str, torch.Tensor]:
            read = super().read(layer, expert)
            if len(self.reads) == 1:
                raise ExpertReadError("the first time")
            return read

    source = Once()
    cache = ExpertCache(source, source.total)
    cache.prefetch(2, [1])
    until(lambda: source.reads)
    threading.Timer(0.05, source.go.set).start()
    with cache.lease(2, [1]) as lease:
        assert float(lease.slots[1]["w"][0]) == 21.0
    assert source.reads == [(2, 1)] * 2 and cache.resident() == [(2, 1)]


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_threads_read_ahead_resize_and_clear_within_the_budget(scope: str) -> None:
    source = Source(delay_s=0.0002)
    source.cache = cache = ExpertCache(source, source.total // 2, scope=scope, threads=2)

    def step(number: int, random_of: random.Random) -> None:
        layer = number % LAYERS
        with cache.lease(layer, random_of.sample(range(EXPERTS), 2)) as lease:
            cache.prefetch((layer + 1) % LAYERS, random_of.sample(range(EXPERTS), 3))
            for expert, slot in lease.slots.items():
                assert float(slot["w"][0]) == 10 * layer + expert

    with in_threads(step, threads=3, steps=120):
        for number in range(12):
            cache.resize(source.total // (2 + number % 2))
            if number % 3 == 0:
                cache.clear()
            time.sleep(0.003)
    cache.clear()
    stats = cache.stats()
    assert cache.resident() == [] and cache.resident_bytes == 0 and not cache._shares.pins and not cache._loading
    assert stats["hits"] + stats["misses"] == 3 * 120 * 2 and stats["prefetch_hits"] <= stats["prefetched"]


def test_clearing_leaves_what_is_leased_and_the_counters() -> None:
    source = Source()
    cache = ExpertCache(source, source.total)
    cache.lease(0, [1, 2]).release()
    with cache.lease(1, [3]) as lease:
        cache.clear()
        assert cache.resident() == [(1, 3)] and float(lease.slots[3]["w"][0]) == 13.0
        assert cache.resident_masks[0].sum() == 0 and cache.resident_bytes == source.expert_bytes[1]
    assert cache.stats()["misses"] == 3
    cache.lease(0, [1]).release()
    assert cache.stats()["misses"] == 4


@pytest.mark.parametrize("copied", [False, True])
def test_masks_show_every_slot(copied: bool) -> None:
    source = Source()
    cache = ExpertCache(source, source.total // 3, policy="lru")
    if copied:  # as on a device: the masks are a copy of what is written
        cache._resident = ResidentMasks(source.num_experts, torch.device("cpu"), copied=True)
        cache.resident_masks = cache._resident.masks
    random_of = random.Random(0)

    def check() -> None:
        for layer, mask in enumerate(cache.resident_masks):
            held = {expert for at, expert in cache.resident() if at == layer}
            assert mask.tolist() == [[float(expert in held) for expert in range(EXPERTS)]]
            assert cache.is_whole(layer) == (len(held) == EXPERTS)

    check()
    for step in range(200):
        layer = step % LAYERS
        cache.lease(layer, random_of.sample(range(EXPERTS), 2)).release()
        if step % 7 == 0:
            cache.prefetch((layer + 1) % LAYERS, random_of.sample(range(EXPERTS), 2))
            until(lambda: not cache._ahead.reading)
        check()
    for budget in (source.expert_bytes[2], source.total):
        cache.resize(budget)
        check()
    cache.lease(1, range(EXPERTS)).release()
    check()
    cache.clear()
    check()
    assert not any(mask.any() for mask in cache.resident_masks)


# The predictor


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_models_that_read_ahead_compute_the_same_bits(name: str, folders: dict[str, Path]) -> None:
    expected = decoded(stock(folders[name]))
    model = always(load_with_expert_cache(folders[name], 0.4, prefetch=True))
    calls: list[str] = []
    chosen: list[bool] = []

    def compare(router: prefetching._Router, ref: Any) -> None:
        # On the router's own input the prediction is what the router does.
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: Any) -> None:
            calls.append(ref.name)
            ids_TK = ref.spec.read(output).ids_TK
            found = router.predict(inputs[0].reshape(-1, inputs[0].shape[-1]))
            chosen.append(found is not None and torch.tensor(found).sort().values.equal(ids_TK.sort().values))

        ref.module.register_forward_hook(hook)

    for layer, ref in enumerate(discover_routers(model)):
        if layer in predictor(model)._routers:
            compare(predictor(model)._routers[layer], ref)
    assert torch.equal(decoded(model), expected)
    stats = model.expert_cache.stats()
    assert stats["prefetched"] > 0 and stats["resident_bytes"] <= stats["budget_bytes"]
    assert len(calls) == IDS.shape[1] * len(set(calls)), "predictions go past the router's forward"
    assert all(chosen)


def test_batches_beams_and_threads_decode_the_same(folder: Path) -> None:
    reference, model = stock(folder), always(load_with_expert_cache(folder, 0.3, prefetch=True))
    ids = torch.cat([IDS, IDS.flip(1)])
    for options in ({"do_sample": False}, {"num_beams": 3}):
        settings: dict[str, Any] = {"max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": None, **options}
        assert torch.equal(model.generate(ids, **settings), reference.generate(ids, **settings))
    expected = decoded(reference)
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(lambda _: decoded(model), range(4)):
            assert torch.equal(found, expected)
    assert torch.equal(decoded(copy.deepcopy(model)), expected)
    assert model.expert_cache.stats()["prefetched"] > 0


def test_a_predictor_reads_only_while_it_is_right(folder: Path) -> None:
    model = load_with_expert_cache(folder, 0.5, prefetch=True)
    cache, ahead = model.expert_cache, predictor(model)
    router, hidden = ahead._routers[1], torch.randn(1, 32)
    guessed = list(router.ranked(hidden))

    def step(asked: list[int]) -> bool:
        cache.clear()
        before = cache.stats()["prefetched"]
        ahead.read_ahead(0, hidden)
        until(lambda: not cache._ahead.reading)
        ahead.score(1, asked)
        return bool(cache.stats()["prefetched"] > before)

    wrong = [expert for expert in range(8) if expert not in guessed]
    assert step(guessed) and step(wrong)
    assert not any([step(wrong) for _ in range(60)][30:]), "wrong too often"
    assert max(router.scores) < prefetching.MIN_SCORE
    assert any([step(guessed) for _ in range(40 * prefetching.SAMPLED)][-20:]), "sampled all the while"
    # Reads that take many times as long as what they could hide behind pay only when they are nearly always right.
    assert router.threshold(router.window_s * 20) == pytest.approx(0.95) and router.threshold(0.0) == 0.5
    ahead.read_ahead(0, torch.randn(prefetching.MAX_TOKENS + 1, 32))
    assert getattr(ahead._of_thread, "prediction", None) is None


def test_the_live_weight_is_what_predicts(folder: Path) -> None:
    model = get_remoe_model(load_with_expert_cache(folder, 0.4, prefetch=True), recency="ema", recency_gain=0.3)
    base = model.get_base_model()
    router, hidden = predictor(base)._routers[1], torch.randn(4, 32)
    before = router.predict(hidden)
    live = discover_routers(base)[1].weight_ED
    with torch.no_grad():
        live.copy_(-live)
    assert router.predict(hidden) != before
    model.generate(IDS, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    model.controller.close()


def test_the_predictor_keeps_no_model_alive(folder: Path) -> None:
    model = always(load_with_expert_cache(folder, 0.4, prefetch=True))
    decoded(model)
    gone, cache, ahead = weakref.ref(model), model.expert_cache, predictor(model)
    del model
    gc.collect()
    assert gone() is None
    ahead.read_ahead(0, torch.randn(1, 32))
    assert cache.stats()["prefetched"] > 0


def test_faults_of_the_disk_and_a_closed_store_while_reading_ahead(folder: Path) -> None:
    model = always(load_with_expert_cache(folder, 0.4, prefetch=True))
    expected = decoded(stock(folder))
    assert torch.equal(decoded(model), expected)
    model.expert_cache.clear()
    model.expert_cache.source.close()
    with pytest.raises(ExpertReadError, match="closed"):
        decoded(model)
    until(lambda: not model.expert_cache._ahead.reading)
    assert model.expert_cache.resident_bytes == 0


def test_models_whose_routers_are_refused_say_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = stock(folder)
    for ref in discover_routers(model):
        ref.module.weight.data = ref.module.weight.data.to(torch.float8_e4m3fn)
    cache = load_with_expert_cache(folder).expert_cache
    caplog.set_level(logging.WARNING, logger="remoe_adapt")
    assert prefetching.bind_prefetch(model, cache) is None
    assert "read only when they are asked for, not ahead (its weight is quantised" in caplog.text
