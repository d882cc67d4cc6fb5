"""Recency mode cost in the definition of gating: its formula by another hand, what is held, and what gets no bonus."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import FAMILIES, bias_of, hard_logits, spec_of
from numpy.typing import NDArray

from remoe_adapt.eviction.policy import LRFU
from remoe_adapt.gating.cost import held, ranks
from remoe_adapt.gating.reference import PADDING, RESTART, PriorStep, topk_gating
from remoe_adapt.recency_settings import held_experts

K, E = 3, 8


def by_numpy(kind: str, z_E: NDArray[Any], bias_E: NDArray[Any], gain: float, held_E: NDArray[Any]) -> NDArray[Any]:
    """By what one token's experts rank, from the words of `recency_settings.Cost`: w + gain."""
    score_E = np.exp(z_E) / np.exp(z_E).sum() if kind.startswith("softmax") else 1 / (1 + np.exp(-z_E))
    choice_E = score_E + (bias_E if kind == "sigmoid_bias" else 0)
    whole = np.sort(choice_E)[-K:].sum() if kind in ("softmax_normalised", "sigmoid_bias") else 1.0
    # A weight is a score over the sum of the chosen: so is the ranked score of a router with a bias.
    weight_E = choice_E / whole
    return np.where(held_E, weight_E + gain, weight_E)


@pytest.mark.parametrize(
    ("kind", "facts"),
    [
        ("softmax", {"scoring": "softmax"}),
        ("softmax_normalised", {"scoring": "softmax", "normalize": True}),
        ("sigmoid_bias", {"scoring": "sigmoid_bias", "score": "sigmoid", "normalize": True}),
    ],
)
def test_the_formula_by_another_hand(kind: str, facts: dict[str, Any]) -> None:
    from remoe_adapt.routers.spec import RouterSpec

    spec = RouterSpec(num_experts=E, top_k=K, hidden_size=1, weight_name="", num_rows=E, **facts)
    generator = np.random.default_rng(0)
    changed = 0
    for gain in (0.02, 0.1, 0.3):
        for _ in range(50):
            z_E, bias_E, held_E = (
                generator.normal(size=E) * 2,
                generator.normal(size=E) * 0.3,
                generator.random(E) > 0.5,
            )
            prior = PriorStep(torch.tensor(held_E)[None].float(), torch.tensor(gain), None, None, share=1.0)
            logits_1E, bias = torch.tensor(z_E, dtype=torch.float32)[None], torch.tensor(bias_E, dtype=torch.float32)
            _, ids_1K = topk_gating(logits_1E, K, spec, prior, bias_E=bias if kind == "sigmoid_bias" else None)
            ranked_E = by_numpy(kind, z_E, bias_E, gain, held_E)
            # By what they rank, for held experts of hardly any weight are equal in fp32.
            np.testing.assert_allclose(ranked_E[ids_1K[0]], np.sort(ranked_E)[::-1][:K], rtol=1e-5)
            plain_E = by_numpy(kind, z_E, bias_E, gain, np.zeros(E, bool))
            changed += set(ids_1K[0].tolist()) != set(np.argsort(-plain_E)[:K].tolist())
    assert changed > 20


def test_a_worked_example() -> None:
    """Weights .5, .3, .2 of the best three: an expert of .1 that is held ranks as one of .1 + .09, below .2."""
    spec = spec_of("softmax_renormalised", 4)
    assert spec is not None
    logits_1E = torch.tensor([[0.5, 0.3, 0.2, 0.1]]).log()
    for gain, expected in ((0.09, [0, 1, 2]), (0.11, [0, 1, 3])):
        prior = PriorStep(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), torch.tensor(gain), None, None, share=0.25)
        weights_1K, ids_1K = topk_gating(logits_1E, 3, spec, prior)
        assert ids_1K[0].tolist() == expected
        # Those that stay weigh what they weighed.
        torch.testing.assert_close(weights_1K[0], logits_1E[0, ids_1K[0]].exp() * spec.scaling)
    plain_1E, raised_1E = ranks(logits_1E, logits_1E, 3, spec, torch.tensor(0.15))
    assert plain_1E[0, 3].item() == pytest.approx(math.log(0.1 / 0.15))
    assert raised_1E[0, 3].item() == pytest.approx(math.log(0.25 / 0.15))


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_that_stay_weigh_what_they_weighed(name: str) -> None:
    spec = spec_of(name, 60)
    assert spec is not None
    logits_TE, bias_E = 2 * torch.randn(40, 60, generator=torch.Generator().manual_seed(0)), bias_of(spec)
    logits_TE, bias_E = logits_TE.to(hard_logits(1, 60, torch.float32, 0).device), bias_E
    held_BE = (torch.rand(1, 60, generator=torch.Generator().manual_seed(1)) > 0.7).float().to(logits_TE.device)
    prior = PriorStep(held_BE, torch.tensor(0.3, device=logits_TE.device), None, None, 1.0)
    (weights_TK, ids_TK), (own_TK, own_ids_TK) = (
        topk_gating(logits_TE, 6, spec, p, bias_E=bias_E) for p in (prior, None)
    )
    stays_TKK = ids_TK[:, :, None] == own_ids_TK[:, None, :]
    changed = 0
    for t in range(len(logits_TE)):
        for i, j in stays_TKK[t].nonzero().tolist():
            assert weights_TK[t, i].item() == pytest.approx(own_TK[t, j].item(), rel=1e-5)
        changed += not bool(stays_TKK[t].any(dim=-1).all())
    assert changed > 5


def test_held_are_the_most_lately_used_with_all_equals_at_the_end() -> None:
    recency_BE = torch.tensor([[0.5, 0.2, 0.2, 0.1, 0.0, 0.0], [0.3, 0.0, 0.0, 0.0, 0.0, 1e-30]])
    assert held(recency_BE, 0.4, 1).tolist() == [[True, True, True, False, False, False], [True] + [False] * 5]
    assert held(recency_BE, 0.1, 1)[0].tolist() == [True] + [False] * 5
    assert held(recency_BE, 0.1, 4)[0].tolist() == [True] * 4 + [False] * 2, "never fewer than a token takes"
    assert held(recency_BE, 1.0, 1)[0].tolist() == [True] * 4 + [False] * 2


@pytest.mark.parametrize("share", [0.25, 0.6])
def test_held_is_what_an_lrfu_cache_of_that_size_holds(share: float) -> None:
    """At every token; but for experts that are equal to the last one held, of which a cache drops some."""
    spec = spec_of("softmax", 16)
    assert spec is not None
    torch.manual_seed(0)
    # Favourites that change, so that there is something to hold on to.
    logits_TE = torch.randn(300, 16) + 1.5 * torch.randn(10, 16).repeat_interleave(30, dim=0)
    prior = PriorStep(torch.zeros(1, 16), torch.tensor(0.1), 0.95, None, share)
    capacity = held_experts(share, 2, 16)
    cache: LRFU[int] = LRFU(capacity, 0.95)
    equal = 0
    for logits_1E in logits_TE.split(1):
        recency_E = prior.recency_BE[0]
        ours = set(held(prior.recency_BE, share, 2)[0].nonzero().flatten().tolist())
        cached = set(cache)
        last = min((float(recency_E[expert]) for expert in ours), default=0.0)
        assert cached <= ours and all(float(recency_E[expert]) == pytest.approx(last) for expert in ours - cached)
        equal += bool(ours - cached)
        _, ids_1K = topk_gating(logits_1E, 2, spec, prior)
        cache.step(ids_1K[0].tolist())
    assert equal < 30


@pytest.mark.parametrize("name", FAMILIES)
def test_gain_zero_is_no_prior_to_the_bit(name: str) -> None:
    spec = spec_of(name, 60)
    assert spec is not None
    logits_TE, bias_E = hard_logits(33, 60, torch.float32, 3), bias_of(spec)
    recency_BE = torch.rand(3, 60, device=logits_TE.device)
    prior = PriorStep(recency_BE, torch.zeros((), device=logits_TE.device), 0.95, None, 0.25)
    found, plain = (topk_gating(logits_TE, 6, spec, p, bias_E=bias_E) for p in (prior, None))
    assert torch.equal(found[1], plain[1])
    assert torch.equal(found[0].view(torch.int32), plain[0].view(torch.int32))


@pytest.mark.parametrize("name", FAMILIES)
def test_experts_rise_with_the_gain_and_stay_where_they_are_no_numbers(name: str) -> None:
    spec = spec_of(name, 60)
    assert spec is not None
    logits_TE, bias_E = hard_logits(33, 60, torch.float32, 4), bias_of(spec)
    choice_TE = spec.choice_scores(logits_TE, bias_E).float()
    is_odd_TE = ~choice_TE.isfinite()
    before_TE = torch.zeros_like(choice_TE)
    for gain in (0.0, 1e-6, 0.05, 0.3, 16.0):
        plain_TE, raised_TE = ranks(choice_TE, logits_TE, 6, spec, torch.tensor(gain, device=logits_TE.device))
        assert torch.equal(plain_TE[is_odd_TE].nan_to_num(), choice_TE[is_odd_TE].nan_to_num())
        assert torch.equal(raised_TE[is_odd_TE].nan_to_num(), choice_TE[is_odd_TE].nan_to_num())
        found_TE = torch.where(is_odd_TE, 0.0, raised_TE - plain_TE)
        assert bool(found_TE.isfinite().all()) and bool((found_TE >= before_TE - 1e-4).all())
        before_TE = found_TE
    assert bool((before_TE > 0).any())


@pytest.mark.parametrize("name", ["softmax", "softmax_renormalised", "sigmoid"])
def test_held_experts_far_below_the_gain_keep_the_order_of_their_weights(name: str) -> None:
    """Logits that a sum with the gain would round to one number."""
    spec = spec_of(name, 60)
    assert spec is not None
    logits_1E = torch.linspace(-2, -70, 60) if name != "sigmoid" else torch.linspace(0, -6, 60)
    choice_1E = spec.choice_scores(logits_1E[None], None)
    for gain in (0.05, 0.3, 16.0):
        _, raised_1E = ranks(choice_1E, logits_1E[None], 6, spec, torch.tensor(gain))
        steps_E = raised_1E[0].diff()
        assert bool((steps_E <= 0).all())
        assert name == "sigmoid" or bool((steps_E < 0).all())


def test_padding_has_no_bonus_and_restarts_hold_nothing() -> None:
    spec = spec_of("softmax", 8)
    assert spec is not None
    logits_TE = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    flags_T = torch.tensor([0, PADDING, RESTART, 0], dtype=torch.uint8)
    prior = PriorStep(torch.eye(8)[7:].clone(), torch.tensor(16.0), 0.95, flags_T, 0.25)
    _, ids_TK = topk_gating(logits_TE, 2, spec, prior)
    _, plain_TK = topk_gating(logits_TE, 2, spec)
    assert 7 in ids_TK[0].tolist()
    assert torch.equal(ids_TK[1:3], plain_TK[1:3])
    assert set(ids_TK[3].tolist()) == set(ids_TK[2].tolist())
