"""The definition of gating, by hand: ranking, ties, ill values, and the recency prior in each mode."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError
from remoe_adapt.gating.one_token import Scratch, SingleGate
from remoe_adapt.gating.reference import PADDING, RESTART, PriorStep, topk_gating
from remoe_adapt.routers.spec import RouterSpec, best_ids, ranking_keys

INF, NAN = math.inf, math.nan


def spec_of(family: str = "softmax", experts: int = 4, **facts: Any) -> RouterSpec:
    return RouterSpec(
        scoring=family, num_experts=experts, top_k=2, hidden_size=1, weight_name="weight", num_rows=experts, **facts
    )


def prior_of(recency: list[list[float]], gain: float, decay: float | None, flags: list[int] | None = None) -> PriorStep:
    flags_T = None if flags is None else torch.tensor(flags, dtype=torch.uint8)
    return PriorStep(torch.tensor(recency), torch.tensor(gain), decay, flags_T)


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        ([1.0, 3.0, 2.0, 3.0], [1, 3]),
        ([2.0, 2.0, 2.0, 2.0], [0, 1]),
        ([-INF, -INF, -INF, -INF], [0, 1]),
        ([0.0, INF, -INF, INF], [1, 3]),
        ([NAN, 5.0, NAN, 6.0], [0, 2]),
        ([-0.0, 0.0, -1.0, -2.0], [0, 1]),
    ],
)
def test_ranking(values: list[float], ids: list[int]) -> None:
    assert best_ids(torch.tensor([values]), 2).tolist() == [ids]
    _, found_TK = topk_gating(torch.tensor([values]), 2, spec_of())
    assert found_TK.tolist() == [ids]


FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def hard_values(tokens: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Ties, both zeros, both infinities, NaN of either sign, and neighbours that differ in the last bit."""
    generator = torch.Generator().manual_seed(tokens * experts)
    values_TE = torch.randn(tokens, experts, generator=generator).mul(4).round().div(4).to(dtype)
    specials = torch.tensor([NAN, -NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0**-14, -(2.0**-14)], dtype=dtype)
    specials = torch.cat([specials, torch.nextafter(specials[6:7], specials[2:3])])
    drawn_TE = specials[torch.randint(len(specials), values_TE.shape, generator=generator)]
    return torch.where(torch.rand(values_TE.shape, generator=generator) < 0.5, drawn_TE, values_TE)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_rank_as_the_values_do(dtype: torch.dtype) -> None:
    for tokens, experts in ((1, 1), (33, 13), (257, 60), (40, 256)):
        values_TE = hard_values(tokens, experts, dtype)
        keys_TE = ranking_keys(values_TE)
        assert not keys_TE.is_floating_point()
        found_TE = keys_TE.sort(dim=-1, descending=True, stable=True).indices
        assert torch.equal(found_TE, best_ids(values_TE, experts))
        # By hand: NaN first, then by value, equals by index.
        for row, ids in zip(values_TE.tolist(), found_TE.tolist(), strict=True):
            assert ids == sorted(range(experts), key=lambda e, row=row: (row[e] == row[e], -row[e] or 0.0, e))  # type: ignore[misc]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_definition_is_the_same_on_a_gpu(dtype: torch.dtype) -> None:
    for experts in (8, 13, 60, 128, 256):
        for tokens in (1, 7, 33, 257):
            values_TE = hard_values(tokens, experts, dtype)
            assert torch.equal(best_ids(values_TE.cuda(), experts).cpu(), best_ids(values_TE, experts))
            spec = spec_of(experts=experts)
            _, ids_TK = topk_gating(values_TE.cuda(), 2, spec)
            assert torch.equal(ids_TK.cpu(), topk_gating(values_TE, 2, spec)[1])


def test_weights_by_hand() -> None:
    logits_TE = torch.log(torch.tensor([[1.0, 4.0, 2.0, 3.0]]))
    cases: list[tuple[RouterSpec, list[float]]] = [
        (spec_of(), [0.4, 0.3]),
        (spec_of(normalize=True), [4 / 7, 3 / 7]),
        (spec_of("topk_softmax", weight_rule="chosen_softmax"), [4 / 7, 3 / 7]),
        (spec_of("sigmoid", score="sigmoid"), [4 / 5, 3 / 4]),
        (spec_of("sigmoid", score="sigmoid", normalize=True, scaling=2.0), [1.6 / 1.55, 1.5 / 1.55]),
    ]
    for spec, expected in cases:
        weights_TK, ids_TK = topk_gating(logits_TE, 2, spec)
        assert ids_TK.tolist() == [[1, 3]]
        torch.testing.assert_close(weights_TK, torch.tensor([expected]))


def test_the_prior_lifts_by_gain_times_span_and_leaves_the_weights() -> None:
    logits_TE = torch.tensor([[0.0, 10.0, 4.0, 6.0]])
    # Span 10: with gain 0.25 expert 2 reaches 6.5 and passes 6; with 0.2 it draws level and is first by its index.
    for gain, chosen in ((0.25, [1, 2]), (0.2, [1, 2]), (0.19, [1, 3]), (0.0, [1, 3])):
        weights_TK, ids_TK = topk_gating(logits_TE, 2, spec_of(), prior_of([[0.0, 0.0, 1.0, 0.0]], gain, None))
        assert ids_TK.tolist() == [chosen], gain
        torch.testing.assert_close(weights_TK, logits_TE.softmax(-1).gather(-1, ids_TK))


def test_only_finite_values_span() -> None:
    logits_TE = torch.tensor([[-INF, 1.0, 0.0, 0.9]])
    _, ids_TK = topk_gating(logits_TE, 2, spec_of(), prior_of([[1.0, 0.0, 0.95, 0.0]], 1.0, None))
    assert ids_TK.tolist() == [[1, 2]], "span 1, not infinite; and no bonus lifts -inf"
    for hopeless in (-INF, NAN, INF):
        prior = prior_of([[0.5, 0.5, 0.5, 1.0]], 1.0, 0.5)
        _, ids_TK = topk_gating(torch.full((1, 4), hopeless), 2, spec_of(), prior)
        assert ids_TK.tolist() == [[0, 1]]
        assert prior.recency_BE.tolist() == [[0.75, 0.75, 0.25, 0.5]]


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_recency_moves_on_in_place(decay: float) -> None:
    prior = prior_of([[0.0, 0.0, 0.0, 1.0]], 0.0, decay)
    topk_gating(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), 2, spec_of(), prior)
    assert prior.recency_BE.tolist() == [[1 - decay, 1 - decay, 0.0, decay]]


def test_a_scan_is_its_tokens_one_by_one() -> None:
    torch.manual_seed(0)
    logits_BSE = torch.randn(3, 9, 8)
    spec = spec_of(experts=8)
    together = PriorStep(torch.rand(3, 8), torch.tensor(0.4), 0.6)
    apart = PriorStep(together.recency_BE.clone(), together.gain, 0.6)
    weights_TK, ids_TK = topk_gating(logits_BSE.flatten(0, 1), 2, spec, together)
    for s in range(9):
        weights_BK, ids_BK = topk_gating(logits_BSE[:, s], 2, spec, apart)
        assert torch.equal(ids_TK.reshape(3, 9, 2)[:, s], ids_BK)
        assert torch.equal(weights_TK.reshape(3, 9, 2)[:, s], weights_BK)
    assert torch.equal(together.recency_BE, apart.recency_BE)
    _, stock_TK = topk_gating(logits_BSE.flatten(0, 1), 2, spec)
    assert not torch.equal(stock_TK, ids_TK)


def test_padding_leaves_no_trace_and_a_restart_forgets() -> None:
    torch.manual_seed(0)
    text_TE, noise_TE = torch.randn(6, 8), torch.randn(2, 8)
    spec = spec_of(experts=8)

    def fresh(flags: list[int] | None = None) -> PriorStep:
        return prior_of([[0.0] * 8], 0.5, 0.7, flags)

    alone = fresh()
    _, ids_TK = topk_gating(text_TE, 2, spec, alone)
    padded = fresh([PADDING, PADDING, 0, 0, 0, 0, 0, 0])
    _, padded_TK = topk_gating(torch.cat([noise_TE, text_TE]), 2, spec, padded)
    assert torch.equal(padded_TK[2:], ids_TK) and torch.equal(padded.recency_BE, alone.recency_BE)
    assert torch.equal(padded_TK[:2], topk_gating(noise_TE, 2, spec)[1])
    packed = fresh([0, 0, RESTART, 0, 0, 0, 0, 0])
    _, packed_TK = topk_gating(torch.cat([noise_TE, text_TE]), 2, spec, packed)
    assert torch.equal(packed_TK[2:], ids_TK) and torch.equal(packed.recency_BE, alone.recency_BE)


def test_gradients_reach_the_logits_through_the_weights_only() -> None:
    logits_TE = torch.randn(5, 8, requires_grad=True)
    prior = prior_of([[0.0] * 8], 0.5, 0.7)
    weights_TK, ids_TK = topk_gating(logits_TE, 2, spec_of(experts=8), prior)
    (grad,) = torch.autograd.grad(weights_TK.square().sum(), logits_TE)
    again = logits_TE.detach().requires_grad_()
    (expected,) = torch.autograd.grad(again.softmax(-1).gather(-1, ids_TK).square().sum(), again)
    torch.testing.assert_close(grad, expected)
    assert not prior.recency_BE.requires_grad


@pytest.mark.parametrize(
    "spec",
    [
        spec_of(experts=16),
        spec_of(experts=16, normalize=True),
        spec_of("topk_softmax", 16, weight_rule="chosen_softmax", scaling=0.5),
        spec_of("sigmoid_bias", 16, score="sigmoid", normalize=True, correction_bias_name="b"),
        spec_of("logit_bias_sigmoid", 16, score="sigmoid", normalize=True, correction_bias_name="b"),
        spec_of(
            "sigmoid_group", 16, score="sigmoid", n_group=4, topk_group=2, group_score="top2", correction_bias_name="b"
        ),
    ],
    ids=lambda spec: spec.scoring,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("decay", "share"), [(None, None), (0.7, None), (None, 0.4), (0.95, 0.4)])
def test_one_token_is_the_definition_to_the_bit(
    spec: RouterSpec, dtype: torch.dtype, decay: float | None, share: float | None
) -> None:
    torch.manual_seed(0)
    recency_BE = torch.rand(1, 16).where(torch.rand(1, 16) > 0.4, 0.0)
    prior = PriorStep(recency_BE.clone(), torch.tensor(0.3 if share is None else 0.05), decay, None, share)
    bias_E = torch.randn(16) * 0.1 if spec.correction_bias_name else None
    rows: list[Tensor] = [torch.randn(1, 16).to(dtype) for _ in range(40)]
    rows += [torch.randint(-2, 3, (1, 16)).to(dtype) for _ in range(20)]
    rows += [torch.full((1, 16), value, dtype=dtype) for value in (0.0, -INF, NAN)]
    rows[3][0, 5], rows[4][0, 0] = -INF, NAN
    gains, scratch = [float(prior.gain)], Scratch()
    for logits_1E in rows:
        single = SingleGate([prior], gains, scratch)
        before_BE = prior.recency_BE.clone()
        found = single.gate(0, logits_1E, 4, spec, bias_E)
        assert torch.equal(single.chosen[0], found[1])
        assert torch.equal(prior.recency_BE, before_BE), "all routers move on together, after the token"
        expected = topk_gating(logits_1E, 4, spec, prior, bias_E=bias_E)
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0].nan_to_num(-1.0), expected[0].nan_to_num(-1.0))


@pytest.mark.parametrize(
    ("shape", "k", "rows", "what"),
    [((4,), 1, 1, "top-1"), ((2, 4), 5, 1, "top-5"), ((3, 4), 1, 2, "recency"), ((2, 4), 0, 1, "top-0")],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], k: int, rows: int, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        topk_gating(torch.zeros(shape), k, spec_of(), prior_of([[0.0] * 4] * rows, 0.1, 0.5))


def test_nothing_in_nothing_out() -> None:
    weights_TK, ids_TK = topk_gating(torch.zeros(0, 4), 2, spec_of(), prior_of([[0.0] * 4], 0.1, 0.5))
    assert weights_TK.shape == ids_TK.shape == (0, 2) and ids_TK.dtype == torch.int64


def test_one_token_under_a_bias_that_is_trained() -> None:
    spec = spec_of("sigmoid_bias", 8, score="sigmoid")
    bias_E = torch.randn(8, requires_grad=True)
    logits_1E, prior = torch.randn(1, 8), prior_of([[0.5] * 4 + [0.0] * 4], 0.3, None)
    found = SingleGate([prior], [0.3], Scratch()).gate(0, logits_1E, 2, spec, bias_E)
    for own, expected in zip(found, topk_gating(logits_1E, 2, spec, prior, bias_E=bias_E), strict=True):
        assert torch.equal(own, expected)
