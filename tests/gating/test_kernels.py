"""The gate and scan kernels against the definition: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product

import pytest
import torch
from kernel_cases import (
    BY_LOGIT,
    CHOSEN,
    DEVICE,
    DTYPES,
    EXPERTS,
    FAMILIES,
    MODES,
    OTHERS,
    TOKENS,
    bias_of,
    check,
    copied,
    hard_logits,
    launch,
    prior_of,
    spec_of,
)  # fmt: skip

from remoe_adapt.gating.cost import divides
from remoe_adapt.gating.reference import PADDING, PriorStep, topk_gating

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
# NumPy, which interprets the kernels, warns of the infinities and NaN that some rows hold on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

# Whose weights are over a sum, which in mode cost is that of the router's own choice.
DIVIDING = [name for name in (*FAMILIES, *OTHERS) if (spec := spec_of(name, 60)) is not None and divides(spec)]
SIZES = [(e, k) for e, k in product(EXPERTS, CHOSEN) if k <= e]


def _sample() -> list[tuple[str, int, int, int, torch.dtype, str]]:
    """Every family with every kind of mode, the rest drawn; large sizes seldom, as an interpreter takes long over them.

    Modes that differ in their numbers alone take turns.
    """
    drawn = random.Random(20)
    small, large = [s for s in SIZES if s[0] <= 64], [s for s in SIZES if s[0] > 64]
    cases = []
    for at, (name, mode) in enumerate(product(FAMILIES, ("none", "history", "resident", "cost"))):
        if mode in ("history", "resident"):
            mode = {"history": ("ema", "last"), "resident": ("resident", "resident_rows")}[mode][at // 4 % 2]
        experts, k = drawn.choice(small if drawn.random() < 0.7 else large)
        if spec_of(name, experts) is None:
            experts = 60
        cases.append((name, drawn.choice((1, 7, 7, 33)), experts, k, drawn.choice(DTYPES), mode))
    return cases


@pytest.mark.parametrize(("name", "tokens", "experts", "k", "dtype", "mode"), _sample())
def test_gate(name: str, tokens: int, experts: int, k: int, dtype: torch.dtype, mode: str) -> None:
    check(name, tokens, experts, k, dtype, mode)


@pytest.mark.parametrize(("experts", "k"), [(160, 6), (1024, 32), (1000, 3), (1, 1)])
def test_other_sizes(experts: int, k: int) -> None:
    for name in ("softmax", "softmax_group_max") if experts == 160 else ("softmax_renormalised",):
        check(name, 3, experts, k, torch.float32, "ema")


def test_rows_share_programs() -> None:
    check("softmax", 257, 64, 2, torch.bfloat16, "none")


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "experts"), [(n, e) for n, e in product(FAMILIES, EXPERTS) if spec_of(n, e)])
def test_gate_of_all_sizes_on_a_gpu(name: str, experts: int) -> None:
    """A case per number of experts, for compiling takes longest here and processes of pytest-xdist share cases."""
    for i, size in enumerate(SIZES):
        for tokens in TOKENS if size[0] == experts else ():
            check(name, tokens, *size, DTYPES[i % 3], MODES[i % 6])


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), list(product(FAMILIES, DTYPES)))
def test_gate_of_all_sizes_and_dtypes(name: str, dtype: torch.dtype) -> None:
    for i, (experts, k) in enumerate(SIZES):
        for tokens in TOKENS:
            check(name, tokens, experts, k, dtype, MODES[i % 6])


def test_no_tokens() -> None:
    spec = spec_of("softmax", 8)
    assert spec is not None
    logits_TE = torch.empty(0, 8, device=DEVICE)
    weights_TK, ids_TK = launch(logits_TE, 2, spec, None, None)
    assert weights_TK.shape == ids_TK.shape == (0, 2)
    recency_BE = torch.ones(2, 8, device=DEVICE)
    prior = PriorStep(recency_BE, torch.tensor(1.0, device=DEVICE), 0.5)
    assert launch(logits_TE, 2, spec, prior, None)[1].shape == (0, 2)
    assert torch.equal(recency_BE, torch.ones_like(recency_BE))


@pytest.mark.parametrize("view", ["columns", "rows", "transposed"])
def test_strided_logits(view: str) -> None:
    spec = spec_of("softmax", 13)
    assert spec is not None
    shape = {"columns": (7, 26), "rows": (14, 13), "transposed": (13, 7)}[view]
    base = torch.randn(shape, device=DEVICE)
    logits_TE = {"columns": base[:, ::2], "rows": base[1::2], "transposed": base.T}[view]
    for prior in (None, prior_of("ema", 7, 13, 0, flagged=True)):
        expected = topk_gating(logits_TE, 6, spec, copied(prior))
        for ours, theirs in zip(launch(logits_TE, 6, spec, prior, None, 8), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_logits_that_differ_in_their_last_bits_only() -> None:
    """The ranking keeps an expert's number in these bits, and must notice."""
    generator = torch.Generator().manual_seed(1)
    order_TE = torch.rand(8, 60, generator=generator).argsort(dim=-1)
    for sign, groups_of in ((1.0, 1), (-1.0, 1), (1.0, 4), (-1.0, 7)):
        logits_TE = (sign * (1.0 + (order_TE // groups_of) * 2.0**-23)).to(DEVICE)
        for name, mode in (("softmax", "none"), ("softmax", "last")):
            spec = spec_of(name, 60)
            assert spec is not None
            prior = prior_of(mode, 8, 60, 3, flagged=False)
            expected_TK = topk_gating(logits_TE, 8, spec, copied(prior))[1]
            assert torch.equal(launch(logits_TE, 8, spec, prior, None, 8)[1], expected_TK)


@pytest.mark.parametrize("boundary", [5, 8])
def test_one_clash_at_the_last_rank(boundary: int) -> None:
    """Values far apart, but for the last chosen and the first left out (or two of the chosen)."""
    logits_TE = torch.arange(60, 0, -1, dtype=torch.float32, device=DEVICE).repeat(2, 1)
    logits_TE[0, boundary] = logits_TE[0, boundary - 1] * (1 + 2.0**-23)
    spec = spec_of("softmax", 60)
    assert spec is not None
    expected_TK = topk_gating(logits_TE, 8, spec)[1]
    assert expected_TK[0, boundary - 1] == boundary
    assert torch.equal(launch(logits_TE, 8, spec, None, None)[1], expected_TK)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_and_nearly_equal_values_in_one_row(dtype: torch.dtype) -> None:
    """Ties of 16-bit logits need no second pass; with values beside them that differ in their last bits, they do."""
    spec = spec_of("softmax", 64)
    assert spec is not None
    generator = torch.Generator().manual_seed(2)
    logits_TE = torch.randint(0, 6, (16, 64), generator=generator).to(DEVICE, dtype)
    recency_TE = torch.rand(16, 64, generator=generator).mul(3).floor()
    recency_TE[::2] += torch.rand(8, 64, generator=generator).mul(2.0**-18)  # moves no further than the last bits
    recency_TE[5:9] = 0.0
    for k in (1, 2, 8):
        for gain in (0.0, 0.2):
            prior = PriorStep(recency_TE.to(DEVICE), torch.tensor(gain, device=DEVICE), None)
            expected_TK = topk_gating(logits_TE, k, spec, prior)[1]
            assert torch.equal(launch(logits_TE, k, spec, prior, None, 16)[1], expected_TK)


@pytest.mark.parametrize("name", FAMILIES)
def test_gain_zero_is_no_prior_bit_for_bit(name: str) -> None:
    spec = spec_of(name, 60)
    assert spec is not None
    logits_TE, bias_E = hard_logits(7, 60, torch.float32, 5), bias_of(spec)
    prior = prior_of("ema" if name == "softmax" else "cost", 7, 60, 0, flagged=True)
    assert prior is not None
    still = replace(prior, gain=torch.zeros((), device=DEVICE))
    ours, plain = (launch(logits_TE, 6, spec, p, bias_E, 8) for p in (still, None))
    definition = topk_gating(logits_TE, 6, spec, copied(still), bias_E=bias_E)
    for found, expected in zip(definition, topk_gating(logits_TE, 6, spec, bias_E=bias_E), strict=True):
        assert torch.equal(found.nan_to_num(-1.0), expected.nan_to_num(-1.0))
    assert torch.equal(ours[1], plain[1])
    assert torch.equal(ours[0].view(torch.int32), plain[0].view(torch.int32))


@pytest.mark.parametrize(
    ("name", "sequences", "steps", "experts", "k", "dtype", "mode"),
    [
        ("softmax", 3, 11, 13, 2, torch.float32, "ema"),
        ("softmax_renormalised", 2, 9, 60, 6, torch.bfloat16, "last"),
        ("chosen_softmax", 1, 7, 128, 8, torch.float16, "ema"),
        ("sigmoid_group", 2, 5, 64, 6, torch.float32, "ema"),
        ("softmax_bias", 2, 5, 8, 1, torch.float32, "last"),
        ("logit_bias_sigmoid", 4, 2, 60, 8, torch.float32, "cost"),
        ("chosen_softmax", 1, 7, 60, 8, torch.bfloat16, "cost"),
    ],
)
@pytest.mark.parametrize("flagged", [False, True])
def test_scan(
    name: str, sequences: int, steps: int, experts: int, k: int, dtype: torch.dtype, mode: str, flagged: bool
) -> None:
    spec = spec_of(name, experts)
    assert spec is not None
    logits_TE, bias_E = hard_logits(sequences * steps, experts, dtype, 9), bias_of(spec)
    prior = prior_of(mode, sequences * steps, experts, 2, flagged, rows=sequences)
    ours = copied(prior)
    weights_TK, ids_TK = launch(logits_TE, k, spec, ours, bias_E)
    expected_TK, expected_ids_TK = topk_gating(logits_TE, k, spec, prior, bias_E=bias_E)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=2e-5, atol=1e-6, equal_nan=True)
    assert prior is not None and ours is not None
    assert torch.equal(ours.recency_BE, prior.recency_BE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVIDING)
def test_weights_where_held_experts_took_the_place_of_others(name: str, dtype: torch.dtype) -> None:
    """Mode cost: in histories of a token each, rows that are only read, and one for all."""
    for rows, decay in ((32, 0.95), (32, None), (1, None)):
        _check_cost(name, dtype, 32, rows, decay, least_changed=6)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("softmax_bias", torch.float32),
        ("sigmoid_group_eps", torch.bfloat16),
        ("logit_bias_sigmoid", torch.bfloat16),
        ("chosen_softmax", torch.float32),
        ("null_experts_of_softmax", torch.float32),
    ],
)
def test_weights_of_a_scan_where_held_experts_took_the_place_of_others(name: str, dtype: torch.dtype) -> None:
    _check_cost(name, dtype, 12, 2, 0.95, least_changed=2)


def _check_cost(
    name: str, dtype: torch.dtype, tokens: int, rows: int, decay: float | None, *, least_changed: int
) -> None:
    """Kernel against definition, where so many tokens or more are not the router's own choice.

    Padding, and a gain of 0, to the bit as by the same kernel without a prior, which a bonus of 0 is.
    """
    spec = spec_of(name, 60)
    assert spec is not None
    logits_TE, bias_E = hard_logits(tokens, 60, dtype, 7), bias_of(spec)
    prior = prior_of("cost", tokens, 60, 2, flagged=True, rows=rows)
    assert prior is not None and prior.flags_T is not None
    prior = replace(prior, gain=torch.tensor(0.3, device=DEVICE), decay=decay)
    expected_TK, expected_ids_TK = topk_gating(logits_TE, 6, spec, copied(prior), bias_E=bias_E)
    own_TK = topk_gating(logits_TE, 6, spec, bias_E=bias_E)[1]
    is_changed_T = (expected_ids_TK.sort(dim=-1).values != own_TK.sort(dim=-1).values).any(dim=-1)
    assert int(is_changed_T.sum()) >= least_changed
    weights_TK, ids_TK = launch(logits_TE, 6, spec, copied(prior), bias_E, 32)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=2e-5, atol=1e-6, equal_nan=True)
    still = replace(prior, gain=torch.zeros((), device=DEVICE))
    plain_TK, plain_ids_TK = launch(logits_TE, 6, spec, copied(replace(still, share=None)), bias_E, 32)
    still_TK, still_ids_TK = launch(logits_TE, 6, spec, copied(still), bias_E, 32)
    is_padding_T = prior.flags_T.bitwise_and(PADDING) != 0
    assert bool(is_padding_T.any())
    for found, expected in (
        (still_ids_TK, plain_ids_TK),
        (still_TK.view(torch.int32), plain_TK.view(torch.int32)),
        (ids_TK[is_padding_T], plain_ids_TK[is_padding_T]),
        (weights_TK.view(torch.int32)[is_padding_T], plain_TK.view(torch.int32)[is_padding_T]),
    ):
        assert torch.equal(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("name", BY_LOGIT)
def test_long_scan_on_a_gpu(name: str) -> None:
    spec = spec_of(name, 128)
    assert spec is not None
    logits_TE, bias_E = torch.randn(8 * 257, 128, device=DEVICE), bias_of(spec)
    prior = prior_of("ema", 8 * 257, 128, 4, flagged=True, rows=8)
    ours = copied(prior)
    weights_TK, ids_TK = launch(logits_TE, 8, spec, ours, bias_E)
    expected_TK, expected_ids_TK = topk_gating(logits_TE, 8, spec, prior, bias_E=bias_E)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=2e-5, atol=1e-6)


def test_a_recency_of_another_shape_is_refused() -> None:
    spec = spec_of("softmax", 8)
    assert spec is not None
    prior = PriorStep(torch.zeros(3, 8, device=DEVICE), torch.tensor(1.0, device=DEVICE), None)
    with pytest.raises(ValueError, match="recency"):
        launch(torch.zeros(4, 8, device=DEVICE), 2, spec, prior, None)
