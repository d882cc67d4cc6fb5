"""Reuse metrics against values counted by hand and against loops that follow the definitions word by word."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from remoe_adapt.errors import TraceError
from remoe_adapt.traces.metrics import (
    eor,
    eor_L,
    load_entropy,
    load_entropy_L,
    reuse_distance,
    switch_rate,
    switch_rate_L,
)
from remoe_adapt.traces.trace import Trace

GOLDEN = Path(__file__).parents[1] / "data" / "golden_trace.npz"


def make(experts: list[Any], num_experts: int, starts: tuple[int, ...] = (0,)) -> Trace:
    return Trace(np.array(experts, dtype=np.int16), {"num_experts": num_experts, "document_starts": list(starts)})


def random_trace(seed: int, starts: tuple[int, ...] = (0,), tokens: int = 300) -> Trace:
    rng = np.random.default_rng(seed)
    return make(rng.random((3, tokens, 11)).argsort(axis=2)[:, :, :4].tolist(), 11, starts)


# One layer, top-2 of 4; overlaps with the previous token: 1, 2 (swapped slots), 0, 1.
BY_HAND = [[[0, 1], [1, 2], [2, 1], [0, 3], [3, 2]]]


def test_by_hand() -> None:
    trace = make(BY_HAND, 4)
    assert eor(trace) == (0.5 + 1 + 0 + 0.5) / 4
    assert switch_rate(trace) == 3 / 4
    load = [2 / 10, 3 / 10, 3 / 10, 2 / 10]
    assert load_entropy(trace) == pytest.approx(-sum(p * math.log(p) for p in load) / math.log(4))


def test_documents_are_not_joined() -> None:
    trace = make(BY_HAND, 4, (0, 2))
    assert eor(trace) == (0.5 + 0 + 0.5) / 3
    assert switch_rate(trace) == 1.0
    assert eor(make(BY_HAND, 4, (0, 1, 3))) == (1 + 0.5) / 2
    assert switch_rate(make(BY_HAND, 4, (0, 1, 3))) == 1 / 2


def test_reuse_distance_by_hand() -> None:
    # Order after each token, newest first: 1 0 | 2 1 0 | 1 2 0 | 3 0 1 2 | 2 3 0 1.
    # Look-ups: 0, 1 first; 1 at 0, 2 first; 2 at 0, 1 at 1; 0 at 2, 3 first; 3 at 0, 2 at 3.
    assert reuse_distance(make(BY_HAND, 4)).histogram_LB.tolist() == [[3, 1, 1, 1, 4]]
    # A new document at token 2 makes 2, 1, 0, 3 first uses again; then 3 is at 0 and 2 at 3 (order 3 0 1 2).
    split = reuse_distance(make(BY_HAND, 4, (0, 2)))
    assert split.histogram_LB.tolist() == [[2, 0, 0, 1, 7]]
    assert split.median == 4
    assert reuse_distance(make(BY_HAND, 4)).median == 2


def test_layers_are_averaged() -> None:
    steady = [[0, 1]] * 5
    trace = make([BY_HAND[0], steady], 4)
    assert eor_L(trace).tolist() == [0.5, 1.0]
    assert eor(trace) == 0.75
    assert switch_rate_L(trace).tolist() == [0.75, 0.0]
    assert switch_rate(trace) == 0.375
    assert load_entropy_L(trace)[1] == pytest.approx(math.log(2) / math.log(4))
    assert reuse_distance(trace).median_L.tolist() == [2, 1]
    assert reuse_distance(trace).median == 1


def test_load_entropy_limits() -> None:
    even = make([[[0, 1], [2, 3]]], 4)
    assert load_entropy(even) == pytest.approx(1.0)
    assert load_entropy(make([[[0], [0]]], 4)) == 0.0
    assert load_entropy(make([[[0], [0]]], 1)) == 1.0


@pytest.mark.parametrize("starts", [(0,), (0, 1, 2, 100, 299), (0, 127, 128, 129, 256), tuple(range(0, 300, 7))])
def test_against_loops(starts: tuple[int, ...]) -> None:
    trace = random_trace(1, starts)
    for layer in range(trace.num_layers):
        tokens = trace.experts[layer].tolist()
        shared = [len(set(tokens[t]) & set(tokens[t - 1])) for t in range(1, trace.num_tokens) if t not in set(starts)]
        assert eor_L(trace)[layer] == pytest.approx(np.mean(shared) / 4, rel=1e-12)
        assert switch_rate_L(trace)[layer] == pytest.approx(np.mean([s < 4 for s in shared]), rel=1e-12)
        histogram = [0] * 12
        newest_first: list[int] = []
        for token, keys in enumerate(tokens):
            if token in starts:
                newest_first = []
            for key in keys:
                histogram[newest_first.index(key) if key in newest_first else 11] += 1
            for key in keys:
                newest_first = [key, *(other for other in newest_first if other != key)]
        assert reuse_distance(trace).histogram_LB[layer].tolist() == histogram


def test_slot_order_matters_only_to_reuse_distance() -> None:
    trace = random_trace(2)
    turned = Trace(np.ascontiguousarray(trace.experts[:, :, ::-1]), trace.meta)
    assert eor(trace) == eor(turned)
    assert switch_rate(trace) == switch_rate(turned)
    assert load_entropy(trace) == load_entropy(turned)
    assert reuse_distance(trace).histogram_LB.tolist() != reuse_distance(turned).histogram_LB.tolist()


def test_all_look_ups_are_counted() -> None:
    trace = random_trace(3)
    histogram_LB = reuse_distance(trace).histogram_LB
    assert histogram_LB.shape == (3, 12)
    assert histogram_LB.sum() == trace.experts.size
    assert reuse_distance(trace).lru_misses_L(11).tolist() == histogram_LB[:, 11].tolist()


def test_no_token_follows_another() -> None:
    for trace in (make([[[0, 1]]], 4), make(BY_HAND, 4, (0, 1, 2, 3, 4))):
        for metric in (eor, switch_rate):
            with pytest.raises(TraceError, match="at least two tokens"):
                metric(trace)
        assert reuse_distance(trace).histogram_LB.sum() == trace.experts.size


def test_golden() -> None:
    trace = Trace.load(GOLDEN)
    # 237 tokens follow another one, of 3 layers, 4 slots.
    assert eor(trace) * 237 * 3 * 4 == pytest.approx(2054)
    assert switch_rate(trace) * 237 * 3 == pytest.approx(579)
    assert round(load_entropy(trace), 6) == 0.936213
    assert reuse_distance(trace).histogram_LB[0].tolist() == [
        *(137, 135, 193, 226, 55, 54, 37, 27, 22),
        *(16, 11, 4, 2, 1, 0, 0, 40),
    ]
