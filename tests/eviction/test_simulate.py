"""Replay: golden counts, the plain reference, published figures, and what is refused."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from remoe_adapt.errors import ConfigError, TraceError
from remoe_adapt.eviction.policy import POLICIES
from remoe_adapt.eviction.replay import (
    cache_capacity,
    count_misses,
    hit_rates,
    layer_rows,
    one_lookup_each,
    replay,
    simulate,
    summarise,
)
from remoe_adapt.traces.trace import Trace

HERE = Path(__file__).parents[1]

# Misses on the golden trace by cache size, one number per layer.
GOLDEN = {
    "lru": {4: [269, 286, 271], 6: [160, 162, 144], 8: [96, 102, 89], 12: [43, 49, 45], 16: [40, 39, 38]},
    "lfu": {4: [323, 309, 277], 6: [168, 181, 168], 8: [92, 95, 100], 12: [48, 48, 47], 16: [40, 39, 38]},
    "lrfu": {4: [314, 313, 271], 6: [160, 159, 154], 8: [89, 93, 89], 12: [43, 46, 44], 16: [40, 39, 38]},
    "markov": {4: [313, 309, 263], 6: [163, 152, 147], 8: [89, 90, 81], 12: [43, 45, 46], 16: [40, 39, 38]},
    "belady": {4: [197, 209, 185], 6: [103, 106, 93], 8: [61, 64, 59], 12: [41, 41, 41], 16: [40, 39, 38]},
}


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


reference = load_module(HERE / "support" / "cache_reference.py")


@pytest.fixture(scope="module")
def golden() -> Trace:
    return Trace.load(HERE / "data" / "golden_trace.npz")


def random_trace(seed: int, layers: int, tokens: int, top_k: int, num_experts: int, starts: tuple[int, ...]) -> Trace:
    """Drifting scores, so that there is reuse; slots in falling order of score."""
    rng = np.random.default_rng(seed)
    score_LE = np.zeros((layers, num_experts))
    chosen = []
    for _ in range(tokens):
        score_LE = 0.7 * score_LE + rng.normal(size=score_LE.shape)
        chosen.append(np.argsort(-score_LE, axis=1)[:, :top_k])
    meta = {"num_experts": num_experts, "document_starts": list(starts)}
    return Trace(np.stack(chosen, axis=1).astype(np.int16), meta)


def test_golden_trace_is_what_its_script_makes(golden: Trace) -> None:
    made = load_module(HERE / "data" / "make_golden_trace.py").make_trace()
    np.testing.assert_array_equal(made.experts, golden.experts)
    assert made.meta == golden.meta


@pytest.mark.parametrize("policy", POLICIES)
def test_golden_misses(golden: Trace, policy: str) -> None:
    sizes = list(GOLDEN[policy])
    assert count_misses(golden, policy, sizes).tolist() == list(GOLDEN[policy].values())
    for size, misses_L in GOLDEN[policy].items():
        starts = golden.document_starts
        assert [replay(ids_TK, policy, size, starts) for ids_TK in golden.experts] == misses_L


@pytest.mark.parametrize("policy", POLICIES)
def test_golden_misses_follow_the_definition(golden: Trace, policy: str) -> None:
    for size in (4, 8):
        tokens = golden.experts[1].tolist()
        assert reference.misses(tokens, policy, size, golden.document_starts) == GOLDEN[policy][size][1]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(12))
def test_random_traces_follow_the_definition(policy: str, seed: int) -> None:
    rng = np.random.default_rng(100 + seed)
    num_experts = int(rng.integers(2, 12))
    top_k = int(rng.integers(1, num_experts + 1))
    tokens = int(rng.integers(1, 60))
    starts = (0, *sorted(int(s) for s in set(rng.integers(1, tokens + 1, size=seed % 4)) if s < tokens))
    trace = random_trace(seed, 2, tokens, top_k, num_experts, starts)
    # Smaller than a token too: a replay has no smallest cache.
    sizes = list(range(1, num_experts + 1))
    expected = [[reference.misses(ids_TK.tolist(), policy, size, starts) for ids_TK in trace.experts] for size in sizes]
    assert count_misses(trace, policy, sizes).tolist() == expected
    assert [[replay(ids_TK, policy, size, starts) for ids_TK in trace.experts] for size in sizes] == expected


@pytest.mark.parametrize("policy", POLICIES)
def test_long_replays_agree(policy: str) -> None:
    """Long enough that LRFU scales its weights back twice, and that the oldest of them vanish."""
    trace = random_trace(5, 2, 5000, 3, 16, (0, 4700))
    sizes = [3, 5, 9]
    by_objects = [[replay(ids_TK, policy, size, (0, 4700)) for ids_TK in trace.experts] for size in sizes]
    assert count_misses(trace, policy, sizes).tolist() == by_objects


def test_lrfu_scales_its_weights_unnoticed() -> None:
    """Against the recurrence `score = decay * score + use`, which needs no scaling."""
    trace = random_trace(8, 1, 5000, 3, 16, (0,))
    score_E, last_E, resident_E = np.zeros(16), np.full(16, -1), np.zeros(16, dtype=bool)
    misses = 0
    for token, ids_K in enumerate(trace.experts[0]):
        misses += int((~resident_E[ids_K]).sum())
        score_E *= 0.9
        score_E[ids_K] += 1
        last_E[ids_K] = token * 3 + np.arange(3)
        resident_E[ids_K] = True
        order = [expert for expert in np.lexsort((last_E, score_E)) if resident_E[expert]]
        resident_E[order[:-5]] = False
    assert count_misses(trace, "lrfu", [5]).tolist() == [[misses]]


@pytest.mark.parametrize("policy", POLICIES)
def test_many_documents(policy: str) -> None:
    """More (layer, document) pairs than are replayed at once, of unequal lengths."""
    starts = tuple(np.cumsum([0, *([1, 2, 3, 4, 5] * 260)])[:-1].tolist())
    trace = random_trace(6, 2, 3900, 2, 6, starts)
    misses_SL = count_misses(trace, policy, [2, 3])
    assert misses_SL.tolist() == [[replay(ids_TK, policy, s, starts) for ids_TK in trace.experts] for s in (2, 3)]


def test_belady_misses_least_and_larger_caches_never_more(golden: Trace) -> None:
    sizes = list(range(4, 17))
    counts = {policy: count_misses(golden, policy, sizes) for policy in POLICIES}
    for policy, misses_SL in counts.items():
        assert (np.diff(misses_SL, axis=0) <= 0).all(), policy
        assert (counts["belady"] <= misses_SL).all(), policy


def test_sizes_in_bytes(golden: Trace) -> None:
    ids_TK, starts = golden.experts[0], golden.document_starts
    for policy in POLICIES:
        assert replay(ids_TK, policy, 8 * 4096, starts, [4096] * 16) == GOLDEN[policy][8][0]
        assert replay(ids_TK, policy, 9 * 4096 - 1, starts, [4096] * 16) == GOLDEN[policy][8][0]
        # The lower half of the experts twice as large: the budget of 12 holds 6 to 12 of them.
        mixed = replay(ids_TK, policy, 12, starts, [2] * 8 + [1] * 8)
        assert GOLDEN[policy][12][0] <= mixed <= GOLDEN[policy][6][0]
    with pytest.raises(ConfigError, match="size 9 does not fit a cache of 8"):
        replay(ids_TK, "lru", 8, starts, [9] * 16)


def test_simulate_keys_and_values(golden: Trace) -> None:
    result = simulate(golden, ("belady", "lru"), (0.5, 1, 0.25, np.float64(0.05)))
    assert list(result) == [
        *("eor", "switch_rate", "belady@0.5", "belady@1.0", "belady@0.25", "belady@0.05"),
        *("lru@0.5", "lru@1.0", "lru@0.25", "lru@0.05"),
    ]
    lookups = golden.experts.size
    assert result["lru@0.5"] == 1 - sum(GOLDEN["lru"][8]) / lookups
    assert result["belady@0.25"] == 1 - sum(GOLDEN["belady"][4]) / lookups
    # A cache holds at least one token's experts.
    assert result["lru@0.05"] == result["lru@0.25"]
    assert all(type(value) is float for value in result.values())
    assert list(simulate(golden)) == ["eor", "switch_rate", "lru@0.25"]
    assert list(simulate(golden, ("lru", "lru"), (0.25, 0.25))) == ["eor", "switch_rate", "lru@0.25"]
    assert list(simulate(golden, ("lru",), ())) == ["eor", "switch_rate"]


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("seed", range(8))
def test_hit_rates_by_lookup_follow_the_plain_event_by_event_replay(policy: str, seed: int) -> None:
    rng = np.random.default_rng(200 + seed)
    num_experts = int(rng.integers(3, 12))
    top_k = int(rng.integers(1, num_experts))
    tokens = int(rng.integers(2, 40))
    starts = (0, *sorted(int(s) for s in set(rng.integers(1, tokens, size=seed % 3))))
    trace = random_trace(seed, 2, tokens, top_k, num_experts, starts)
    if tokens == len(starts):
        starts = (0,)
        trace = Trace(trace.experts, {"num_experts": num_experts})
    caches = [0.1, 0.5, 0.8]
    rates = hit_rates(trace, (policy,), caches)
    for cache in caches:
        size = cache_capacity(cache, num_experts, top_k)
        misses = sum(reference.misses_by_lookup(ids.tolist(), policy, size, starts) for ids in trace.experts)
        assert rates[f"{policy}@{cache}/lookup"] == 1 - misses / trace.experts.size
        assert rates[f"{policy}@{cache}"] == simulate(trace, (policy,), (cache,))[f"{policy}@{cache}"]


def test_one_expert_a_token_makes_both_hit_rates_one() -> None:
    trace = random_trace(3, 2, 300, 1, 8, (0, 100))
    for policy in POLICIES:
        rates = hit_rates(trace, (policy,), (0.25, 0.5))
        assert rates[f"{policy}@0.25/lookup"] == rates[f"{policy}@0.25"] and 0 < rates[f"{policy}@0.5"] < 1


def test_the_golden_trace_by_lookup_is_that_of_policy_objects(golden: Trace) -> None:
    flat = one_lookup_each(golden)
    decay = 0.9 ** (1 / golden.top_k)
    for policy in POLICIES:
        misses = sum(replay(ids, policy, 8, flat.document_starts, decay=decay) for ids in flat.experts)
        assert hit_rates(golden, (policy,), (0.5,))[f"{policy}@0.5/lookup"] == 1 - misses / golden.experts.size


def test_layers_are_what_the_whole_is_the_mean_of(golden: Trace) -> None:
    rows = layer_rows(golden, ("lru", "lrfu"), (0.25, 0.5))
    whole = summarise(golden, ("lru", "lrfu"), (0.25, 0.5))
    assert [row["layer"] for row in rows] == [0, 1, 2]
    keys = [key for key in rows[0] if key != "layer"]
    assert keys == ["eor", "switch_rate", *hit_rates(golden, ("lru", "lrfu"), (0.25, 0.5)), "load_entropy"]
    for key in keys:
        assert np.mean([row[key] for row in rows]) == pytest.approx(whole[key])
    assert rows[1]["lru@0.5"] == 1 - GOLDEN["lru"][8][1] / (240 * 4)


def test_capacity() -> None:
    assert cache_capacity(0.25, 128, 8) == 32
    assert cache_capacity(0.3, 64, 6) == 19
    assert cache_capacity(0.01, 64, 6) == 6
    assert cache_capacity(1, 64, 6) == 64


@pytest.mark.parametrize("cache", [0, -0.25, 1.01, 25, float("nan"), float("inf"), "0.25", None, True])
def test_bad_cache_fractions(golden: Trace, cache: float) -> None:
    with pytest.raises(ConfigError, match=r"fraction of the experts in \(0, 1\]"):
        simulate(golden, ("lru",), (cache,))


def test_unknown_policy_and_bad_capacity(golden: Trace) -> None:
    with pytest.raises(ConfigError, match="unknown cache policy 'fifo': choose from lru, lfu, lrfu, belady"):
        simulate(golden, ("lru", "fifo"), (0.25,))
    with pytest.raises(ConfigError, match="'fifo'"):
        count_misses(golden, "fifo", [])
    capacities: tuple[Any, ...] = (0, -1, 2.0, True)
    for capacity in capacities:
        with pytest.raises(ConfigError, match="positive int"):
            count_misses(golden, "lru", [capacity])


def test_one_token_has_no_overlap(golden: Trace) -> None:
    with pytest.raises(TraceError, match="at least two tokens"):
        simulate(golden.tokens(1))


def test_summary(golden: Trace) -> None:
    summary = summarise(golden, ("lru", "belady"), (0.5,))
    figures = simulate(golden, ("lru", "belady"), (0.5,))
    assert {key: summary[key] for key in figures} == figures
    assert summary["misses"] == {"lru@0.5": sum(GOLDEN["lru"][8]), "belady@0.5": sum(GOLDEN["belady"][8])}
    assert summary["capacity"] == {"lru@0.5": 8, "belady@0.5": 8}
    assert (summary["layers"], summary["tokens"], summary["documents"], summary["lookups"]) == (3, 240, 3, 2880)
    assert (summary["model"], summary["phase"]) == ("synthetic", None)
    assert list(summary)[:7] == ["model", "phase", "layers", "tokens", "documents", "num_experts", "top_k"]


def test_published_figures(shared_dir: Path) -> None:
    """The figures of the traces' README, computed there by an independent script."""
    trace = Trace.load(shared_dir / "traces" / "qwen3-30b-a3b" / "routing-lab_code.npz").tokens(1500)
    result = simulate(trace, ("lru", "belady"), (0.125, 0.25, 0.5))
    assert {key: round(value, 4) for key, value in result.items() if key != "switch_rate"} == {
        "eor": 0.4723,
        "lru@0.125": 0.6393,
        "lru@0.25": 0.8249,
        "lru@0.5": 0.9550,
        "belady@0.125": 0.7910,
        "belady@0.25": 0.9126,
        "belady@0.5": 0.9770,
    }
