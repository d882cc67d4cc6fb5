"""The recency mode `cost` by itself: what cost.c and cost.py rank is the definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from fake_graph import Graph, Node, node
from llama_engine import skip_without_engine
from numpy.typing import NDArray
from torch import Tensor

from remoe_adapt.engines.llamacpp.prior.cost import HELD_ABOVE, Ranks, held, raised
from remoe_adapt.engines.llamacpp.prior.fallback import best
from remoe_adapt.engines.llamacpp.prior.native import MODES
from remoe_adapt.gating import HELD_ABOVE as ABOVE
from remoe_adapt.gating import cost
from remoe_adapt.gating.reference import PriorStep, topk_gating, update_recency
from remoe_adapt.routers import RouterSpec, best_ids

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from remoe_adapt.engines.llamacpp.in_process import library

E, K, TOKENS, DECAY, SHARE = 24, 4, 60, 0.95, 0.3


@pytest.fixture(scope="module", autouse=True)
def _right_version() -> None:
    skip_without_engine()


@pytest.fixture
def graph() -> Iterator[Graph]:
    made = Graph(library(), trusted=True)
    made.control.mode, made.control.decay, made.control.share = MODES["cost"], DECAY, SHARE
    yield made
    made.close()


def spec(scoring: str, **facts: Any) -> RouterSpec:
    return RouterSpec(
        scoring=scoring, num_experts=E, top_k=K, hidden_size=8, weight_name="weight", num_rows=E, **facts
    )  # fmt: skip


# A router, what the engine calls what it ranks, and what that is.
ROUTERS = {
    "softmax": (spec("softmax"), "SOFT_MAX", Ranks.SOFTMAX),
    "softmax over its sum": (spec("softmax", normalize=True), "SOFT_MAX", Ranks.SOFTMAX),
    "softmax over the chosen": (spec("topk_softmax", weight_rule="chosen_softmax"), "ADD", Ranks.LOGITS),
    "softmax and a bias": (spec("softmax_bias", normalize=True), "ADD", Ranks.SCORES),
    "sigmoid": (spec("sigmoid", score="sigmoid"), "SIGMOID", Ranks.SCORES),
    "sigmoid over its sum": (spec("sigmoid", score="sigmoid", normalize=True), "SIGMOID", Ranks.SCORES),
    "sigmoid and a bias": (spec("sigmoid_bias", score="sigmoid", normalize=True), "ADD", Ranks.SCORES),
    "groups": (
        spec("sigmoid_group", score="sigmoid", normalize=True, n_group=4, topk_group=2, group_score="top2"),
        "ADD", Ranks.SCORES,
    ),
    "logits by their sigmoid": (spec("sigmoid", score="sigmoid"), "MUL", Ranks.BARE_LOGITS),
}  # fmt: skip


def in_the_engine(logits_TE: Tensor, facts: RouterSpec, ranks: Ranks, bias_E: Tensor | None) -> NDArray[np.float32]:
    """What llama.cpp would rank."""
    if ranks == Ranks.SOFTMAX:
        return logits_TE.softmax(-1).numpy()
    return (logits_TE if ranks == Ranks.BARE_LOGITS else facts.choice_scores(logits_TE, bias_E)).numpy()


@pytest.mark.parametrize("name", ROUTERS)
def test_ranking_and_state_are_those_of_the_definition_in_c_and_in_numpy(name: str, graph: Graph) -> None:
    facts, operation, ranks = ROUTERS[name]
    generator = torch.Generator().manual_seed(1)
    bias_E = 0.2 * torch.randn(E, generator=generator) if "bias" in name or "groups" in name else None
    graph.lib.rp_weigh(graph.prior, 0, E, ranks, facts.normalize)
    for gain in (0.0, 0.05, 0.3):
        logits_TE = 1.5 * torch.randn(TOKENS, E, generator=generator)
        scores_TE = in_the_engine(logits_TE, facts, ranks, bias_E)
        recency_1E = torch.zeros(1, E)
        step = PriorStep(recency_1E, torch.tensor(gain), DECAY, None, SHARE)
        _, expected_TK = topk_gating(logits_TE, K, facts, step, bias_E=bias_E)
        order_TE = best_ids(torch.from_numpy(scores_TE), E).numpy()
        graph.control.gain, graph.control.swapped = gain, 0
        graph.rows([0] * TOKENS, range(TOKENS))
        # What a bias was added to, of which weights are.
        before = node("SOFT_MAX" if name.startswith("softmax") else "SIGMOID", facts.scores(logits_TE).numpy())

        def add_source(_: Node, before: Node = before) -> None:
            if operation == "ADD" and ranks == Ranks.SCORES:
                graph.choice.src[0] = before.at

        order_TE32 = order_TE.astype(np.int32)
        found_TK = graph.choose(scores_TE, K, operation=operation, order=order_TE32, change=add_source)
        assert found_TK.tolist() == expected_TK.tolist(), gain
        assert (graph.control.swapped > 0) == (gain > 0) and graph.control.refused_rows == 0
        mine_E = np.zeros(E, np.float32)
        assert graph.lib.rp_get(graph.prior, 0, 0, mine_E.ctypes.data, E) == E
        assert np.array_equal(mine_E, recency_1E[0].numpy())
        if gain:
            assert in_numpy(scores_TE, order_TE, gain, ranks, facts.normalize).tolist() == expected_TK.tolist()


def in_numpy(
    scores_TE: NDArray[np.float32], order_TE: NDArray[np.int64], gain: float, ranks: Ranks, normalise: bool
) -> NDArray[np.int32]:
    recency_E, chosen = np.zeros(E, np.float32), []
    for scores_E, order_E in zip(scores_TE, order_TE, strict=True):
        choice_E = np.log(scores_E) if ranks == Ranks.SOFTMAX else scores_E
        value_E = raised(choice_E, held(recency_E, SHARE, K), order_E[:K].astype(np.int32), gain, ranks, normalise)
        chosen.append(best(value_E, K))
        recency_E = np.float32(DECAY) * recency_E
        recency_E[chosen[-1]] += np.float32(1 - DECAY)
    return np.stack(chosen)


@pytest.mark.parametrize("name", ["softmax over the chosen", "sigmoid", "sigmoid over its sum", "softmax and a bias"])
def test_scores_that_are_no_numbers_rank_as_in_the_definition(name: str, graph: Graph) -> None:
    """Infinities, NaN and zeros of both signs."""
    facts, _, ranks = ROUTERS[name]
    generator = np.random.default_rng(0)
    graph.lib.rp_weigh(graph.prior, 0, E, ranks, facts.normalize)
    for number in range(30):
        scores_TE = generator.normal(size=(20, E)).astype(np.float32) * np.float32(10.0 ** generator.integers(-3, 1))
        for special in (np.inf, -np.inf, np.nan, 0.0, -0.0):
            if generator.random() < 0.3:
                scores_TE[generator.integers(10, 20), generator.integers(0, E, 3)] = special
        gain = (0.02, 0.1, 0.5)[number % 3]
        graph.control.gain = gain
        graph.rows([0] * 20, range(20))
        given_TE, recency_1E, expected = torch.from_numpy(scores_TE.copy()), torch.zeros(1, E), []
        # What is ranked stands for the logits: of those scores their own router makes others.
        plain_TE, raised_TE = cost.ranks(given_TE, given_TE, K, facts, torch.tensor(gain))
        for plain_1E, raised_1E in zip(plain_TE.split(1), raised_TE.split(1), strict=True):
            expected.append(best_ids(torch.where(cost.held(recency_1E, SHARE, K), raised_1E, plain_1E), K))
            update_recency(recency_1E, expected[-1], DECAY)
        order_TE = best_ids(given_TE, E).numpy().astype(np.int32)
        operation = "SIGMOID" if ranks == Ranks.SCORES else "ADD"
        found_TK = graph.choose(scores_TE, K, operation=operation, order=order_TE.copy())
        assert found_TK.tolist() == torch.cat(expected).tolist() and graph.control.refused_rows == 0, (number, gain)
        with np.errstate(all="ignore"):
            assert in_numpy(given_TE.numpy(), order_TE, gain, ranks, facts.normalize).tolist() == found_TK.tolist()


def test_a_cache_of_any_share_is_held_as_in_the_definition(graph: Graph) -> None:
    """Shares that are no whole number of experts, below the chosen and above those ever used; equals among them."""
    facts, generator = ROUTERS["softmax"][0], torch.Generator().manual_seed(3)
    graph.lib.rp_weigh(graph.prior, 0, E, Ranks.SOFTMAX, False)
    graph.control.gain = 0.3
    for share in (0.01, 0.29, 1 / 3, 0.7, 7 / 24, 1.0):
        # Groups of experts that come and go together are equals.
        logits_TE = torch.randn(TOKENS, E // 2, generator=generator).repeat_interleave(2, dim=1)
        _, expected_TK = topk_gating(
            logits_TE, K, facts, PriorStep(torch.zeros(1, E), torch.tensor(0.3), DECAY, None, share)
        )
        graph.control.share = share
        graph.rows([0] * TOKENS, range(TOKENS))
        assert graph.choose(logits_TE.softmax(-1).numpy(), K, operation="SOFT_MAX").tolist() == expected_TK.tolist()


def test_what_counts_as_held_ends_where_the_definition_ends_it(graph: Graph) -> None:
    """An expert of a thousand tokens ago, in a cache that has room for all."""
    graph.lib.rp_weigh(graph.prior, 0, E, Ranks.SCORES, False)
    graph.control.gain, graph.control.share = 16.0, 1.0
    scores_TE = np.tile(np.linspace(1, 2, E, dtype=np.float32), (1100, 1))
    scores_TE[0] = scores_TE[0, ::-1]
    recency_1E = torch.zeros(1, E)
    chosen = []
    for choice_1E in torch.from_numpy(scores_TE.copy()).split(1):
        is_held_1E = cost.held(recency_1E, 1.0, K)
        chosen.append(best_ids(torch.where(is_held_1E, choice_1E + 16.0, choice_1E), K))
        update_recency(recency_1E, chosen[-1], DECAY)
    graph.rows([0] * 1100, range(1100))
    assert graph.choose(scores_TE, K).tolist() == torch.cat(chosen).tolist()
    assert HELD_ABOVE == ABOVE
    for least, is_held in ((HELD_ABOVE, True), (np.nextafter(np.float32(HELD_ABOVE), np.float32(0)), False)):
        assert held(np.array([least, 0, 0], np.float32), 1.0, 1)[0] == is_held
