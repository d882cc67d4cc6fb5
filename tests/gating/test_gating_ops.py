"""The gating operators: gradients, opcheck, compilation in one graph, and the kernel that also makes the logits."""

from __future__ import annotations

import copy

import pytest
import torch
from kernel_cases import DEVICE, FAMILIES, OTHERS, bias_of, copied, hard_logits, prior_of, spec_of
from torch import Tensor
from torch.nn import functional as F

from remoe_adapt.errors import ConfigError
from remoe_adapt.gating.ops import (
    fused_gating,
    fused_route,
    kernel_rule,
    spec_of_text,
    spec_text,
    unsupported,
    weights_backward,
)
from remoe_adapt.gating.reference import PriorStep, topk_gating
from remoe_adapt.recency_settings import held_experts

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rule_survives_as_text(name: str) -> None:
    spec = spec_of(name, 64)
    assert spec is not None
    logits_TE, bias_E = hard_logits(33, 64, torch.float32, 1), bias_of(spec)
    for ours, theirs in zip(
        topk_gating(logits_TE, 6, spec_of_text(spec_text(spec)), bias_E=bias_E),
        topk_gating(logits_TE, 6, spec, bias_E=bias_E),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [*FAMILIES, *OTHERS])
def test_gradients_are_those_of_the_definition(name: str) -> None:
    spec = spec_of(name, 60)
    assert spec is not None
    bias_E = bias_of(spec)
    grad_TK = torch.randn(9, 6, device=DEVICE)
    for dtype, mode in ((torch.float32, "ema"), (torch.bfloat16, "none"), (torch.float32, "cost")):
        base_TE = (torch.randn(9, 60, device=DEVICE) * 2).to(dtype)
        prior = prior_of(mode, 9, 60, 0, flagged=False, rows=3 if mode != "none" else None)
        grads = []
        for gate in (fused_gating, _by_definition):
            logits_TE = base_TE.clone().requires_grad_()
            weights_TK, _ = gate(logits_TE, 6, spec, copied(prior), bias_E)
            (weights_TK * grad_TK).sum().backward()
            assert logits_TE.grad is not None
            grads.append(logits_TE.grad)
        tolerance = 1e-6 if dtype == torch.float32 else 8e-3
        torch.testing.assert_close(*grads, rtol=1e-4 if dtype == torch.float32 else 8e-3, atol=tolerance)


def test_the_closed_form_passes_gradcheck() -> None:
    """Numerically, in fp32: differences of the definition itself."""
    spec = spec_of("sqrt_softplus_bias", 8)
    assert spec is not None
    logits_TE = torch.linspace(-2, 2, 16).reshape(2, 8)
    ids_TK = torch.tensor([[7, 2], [0, 5]])
    grad_TK = torch.tensor([[0.3, -1.0], [0.7, 0.2]])
    ours_TE = weights_backward(grad_TK, logits_TE, ids_TK, spec)
    for row, column in ((0, 7), (0, 2), (1, 5), (1, 4)):
        step_TE = torch.zeros_like(logits_TE)
        step_TE[row, column] = 1e-2
        up, down = (spec.expert_weights(logits_TE + s * step_TE, ids_TK).mul(grad_TK).sum() for s in (1, -1))
        assert float(ours_TE[row, column]) == pytest.approx(float(up - down) / 2e-2, abs=1e-4)


def _by_definition(
    logits_TE: Tensor, k: int, spec: object, prior: PriorStep | None, bias_E: Tensor | None
) -> tuple[Tensor, Tensor]:
    return topk_gating(logits_TE, k, spec, prior, bias_E=bias_E)  # type: ignore[arg-type]


@pytest.mark.parametrize(("rows", "share"), [(None, None), (4, None), (2, 0.3)])
def test_opcheck_of_the_gates(rows: int | None, share: float | None) -> None:
    spec = spec_of("sigmoid_bias", 8)
    assert spec is not None
    logits_TE, bias_E, rule = torch.randn(4, 8, device=DEVICE), bias_of(spec), spec_text(spec)
    recency_BE = None if rows is None else torch.rand(rows, 8, device=DEVICE)
    gain, flags_T = torch.tensor(0.3, device=DEVICE), torch.tensor([0, 1, 2, 0], dtype=torch.uint8, device=DEVICE)
    args = (bias_E, recency_BE, gain, 0.5, flags_T, share, 2, rule)
    torch.library.opcheck(torch.ops.remoe.topk_gating.default, (logits_TE.clone().requires_grad_(), *args))
    if rows is not None:
        torch.library.opcheck(torch.ops.remoe.topk_gating_.default, (logits_TE, *args))


@pytest.mark.parametrize(("with_prior", "share"), [(False, None), (True, 0.3)])
def test_opcheck_of_the_route(with_prior: bool, share: float | None) -> None:
    spec = spec_of("softmax", 8)
    assert spec is not None
    hidden_TD, weight_ED = torch.randn(3, 16, device=DEVICE), torch.randn(8, 16, device=DEVICE)
    prior = (torch.rand(3, 8, device=DEVICE), torch.tensor(0.3, device=DEVICE), 0.5) if with_prior else (None,) * 3
    args = (*prior, None, share, False, 2, spec_text(spec))
    torch.library.opcheck(torch.ops.remoe.route_.default, (hidden_TD, weight_ED, None, None, *args))


@pytest.mark.parametrize("mode", ["none", "ema", "cost"])
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_with_the_same_result(mode: str, training: bool) -> None:
    spec = spec_of("sigmoid_group", 8)
    assert spec is not None
    bias_E, weight_ED = bias_of(spec), torch.randn(8, 16, device=DEVICE, requires_grad=training)
    prior = prior_of(mode, 6, 8, 0, flagged=False)
    hidden_TD = torch.randn(6, 16, device=DEVICE)

    def route(prior: PriorStep | None) -> tuple[Tensor, Tensor, Tensor]:
        return fused_route(hidden_TD, weight_ED, 2, spec, prior, bias_E)

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager")
    results = []
    for call in (route, compiled):
        own = copied(prior)
        logits_TE, weights_TK, ids_TK = call(own)
        results.append([logits_TE.detach(), weights_TK.detach(), ids_TK])
        if training:
            (gradient,) = torch.autograd.grad(weights_TK.square().sum(), weight_ED)
            results[-1].append(gradient)
        if own is not None:
            results[-1].append(own.recency_BE)
    torch._dynamo.reset()
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)
    if prior is not None:
        assert not torch.equal(results[1][-1], prior.recency_BE)


def test_both_gates_move_the_recency_on_as_the_definition_does() -> None:
    spec = spec_of("softmax", 8)
    assert spec is not None
    logits_TE = torch.randn(6, 8, device=DEVICE)
    for rows, mode in ((6, "ema"), (2, "cost")):
        prior = prior_of(mode, 6, 8, 0, flagged=True, rows=rows)
        assert prior is not None
        priors = [copied(prior) for _ in range(3)]
        fused_gating(logits_TE, 2, spec, priors[0])
        fused_gating(logits_TE.clone().requires_grad_(), 2, spec, priors[1])
        topk_gating(logits_TE, 2, spec, priors[2])
        recencies = [p.recency_BE for p in priors if p is not None]
        torch.testing.assert_close(recencies[0], recencies[2], rtol=0, atol=0)
        torch.testing.assert_close(recencies[1], recencies[2], rtol=0, atol=0)


@pytest.mark.parametrize("tokens", [1, 3, 16])
@pytest.mark.parametrize(
    ("dtype", "linear_fp32"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_product_and_gate_in_one_launch(tokens: int, dtype: torch.dtype, linear_fp32: bool) -> None:
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from remoe_adapt.triton_kernels.route import launch_route

    experts, columns, k = (20, 72, 3) if tokens < 16 else (12, 40, 2)
    spec = spec_of("logit_bias_sigmoid", experts)
    assert spec is not None
    # Small whole numbers: every product and sum is exact, in any order and in every dtype.
    hidden_TD = torch.randint(-2, 3, (tokens, 2 * columns), device=DEVICE).to(dtype)[:, :columns]
    weight_ED = torch.randint(-2, 3, (experts, columns), device=DEVICE).to(dtype)
    linear_bias_E, bias_E = torch.randint(-3, 3, (experts,), device=DEVICE).to(dtype), bias_of(spec)
    prior = prior_of("cost" if tokens == 3 else "ema", tokens, experts, 0, flagged=True)
    assert prior is not None
    own = copy.deepcopy(prior)
    logits_dtype = torch.float32 if linear_fp32 else dtype
    out = (
        torch.full((tokens, experts), torch.nan, dtype=logits_dtype, device=DEVICE),
        torch.full((tokens, k), torch.nan, device=DEVICE),
        torch.full((tokens, k), -999, device=DEVICE),
    )
    logits_TE, weights_TK, ids_TK = launch_route(
        hidden_TD, weight_ED, linear_bias_E, k, kernel_rule(spec_text(spec)), logits_dtype,
        bias_E, own.recency_BE, own.gain, own.decay, own.flags_T, out,
        held_count=None if own.share is None else held_experts(own.share, k, experts),
    )  # fmt: skip
    cast = torch.Tensor.float if linear_fp32 else torch.Tensor.clone
    assert torch.equal(logits_TE, F.linear(cast(hidden_TD), cast(weight_ED), cast(linear_bias_E)))
    expected_TK, expected_ids_TK = topk_gating(logits_TE, k, spec, prior, bias_E=bias_E)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, expected_TK, rtol=2e-5, atol=1e-6)
    assert torch.equal(own.recency_BE, prior.recency_BE)


def test_what_kernels_do_not_take() -> None:
    spec = spec_of("softmax", 64)
    assert spec is not None
    assert unsupported(spec, 8, torch.bfloat16) is None
    assert "33" in str(unsupported(spec, 33, torch.bfloat16))
    assert "float64" in str(unsupported(spec, 8, torch.float64))
    with pytest.raises(ConfigError, match="top-9"):
        fused_gating(torch.zeros(2, 8), 9, spec)
    with pytest.raises(ConfigError, match="recency"):
        fused_gating(torch.zeros(3, 8), 2, spec, PriorStep(torch.zeros(2, 8), torch.tensor(0.0), 0.5))


@pytest.mark.gpu
def test_graphs_replay_route_and_gate() -> None:
    """Captured once, replayed with other contents; the counter must be back at 0 each time."""
    spec = spec_of("softmax", 128)
    assert spec is not None
    hidden_TD = torch.randn(1, 2048, device=DEVICE, dtype=torch.bfloat16)
    weight_ED = torch.randn(128, 2048, device=DEVICE, dtype=torch.bfloat16) * 0.02
    prior = PriorStep(torch.zeros(1, 128, device=DEVICE), torch.tensor(0.5, device=DEVICE), 0.7)
    for _ in range(3):
        fused_route(hidden_TD, weight_ED, 8, spec, prior)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_TE, weights_TK, ids_TK = fused_route(hidden_TD, weight_ED, 8, spec, prior)
    prior.recency_BE.zero_()
    twin = PriorStep(torch.zeros_like(prior.recency_BE), prior.gain, prior.decay)
    for _ in range(20):
        hidden_TD.normal_()
        graph.replay()
        expected_TK, expected_ids_TK = topk_gating(logits_TE, 8, spec, twin)
        assert torch.equal(ids_TK, expected_ids_TK)
        torch.testing.assert_close(weights_TK, expected_TK)
        torch.testing.assert_close(logits_TE, F.linear(hidden_TD, weight_ED), rtol=2e-2, atol=2e-2)
    assert torch.equal(prior.recency_BE, twin.recency_BE)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_the_benchmark_says_why_it_has_no_gpu_rows() -> None:
    from remoe_adapt.bench.gating import gpu_rows, no_gpu

    assert "no CUDA device" in str(no_gpu())
    assert not list(gpu_rows())
