"""What a router chose, read from its output and computed again from its logits, against what its model then used."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from tiny_models import NUM_EXPERTS, TOP_K, moe_folders, tiny_model
from torch import Tensor

from remoe_adapt.errors import UnsupportedRouterError
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.routers.spec import RouterOutput, RouterRef, RouterSpec


def used_experts(ref: RouterRef, loss: Tensor) -> set[int]:
    """Experts whose own weights the loss depends on: the ground truth of one token's routing."""
    spec = ref.spec
    held = spec.num_experts - spec.null_experts
    numbers, params = [], []
    for name, param in ref.block.named_parameters():
        expert = re.search(r"experts\.expert_(\d+)\.", name)
        stacked = param.dim() == 3 and param.shape[0] in (held, spec.num_experts)
        flat = param.dim() == 2 and "experts.mlp." in name
        if stacked or flat or expert:
            numbers.append(int(expert[1]) if expert else None)
            params.append(param)
    used: set[int] = set()
    grads = torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True)
    for number, grad in zip(numbers, grads, strict=True):
        if grad is None:
            continue
        if number is not None:
            used |= {number} if grad.any() else set()
        else:
            rows = grad if grad.dim() == 3 else grad.reshape(held, -1)
            used |= set(rows.flatten(1).abs().sum(1).nonzero().flatten().tolist())
    return used


@pytest.mark.parametrize("folder", [f for f in moe_folders() if f not in ("doge", "nllb_moe")])
def test_reads_the_experts_the_model_used(folder: str) -> None:
    """One token on the CPU: ids = the experts whose weights got a gradient = the K best choice scores."""
    model = tiny_model(folder)
    refs = discover_routers(model)
    seen: dict[str, RouterOutput] = {}
    for ref in refs:
        if ref.correction_bias_E is not None:  # zero at initialisation, which would hide a bias that is left out
            ref.correction_bias_E.data.normal_(0, 0.05)
        ref.module.register_forward_hook(lambda _m, _a, out, ref=ref: seen.update({ref.name: ref.spec.read(out)}))
    token = torch.tensor([[5]])
    inputs: dict[str, Any] = {"decoder_input_ids": token} if model.config.is_encoder_decoder else {}
    loss = model(input_ids=token, use_cache=False, **inputs)[0].float().pow(2).sum()
    assert len(seen) == len(refs) // 2 if folder == "ernie4_5_vl_moe" else len(refs)  # its other half routes images
    for ref in refs:
        if ref.name not in seen:
            continue
        spec, out = ref.spec, seen[ref.name]
        assert out.logits_TE.shape == (1, spec.num_experts)
        assert out.ids_TK.shape == (1, spec.top_k)
        chosen = set(out.ids_TK[0].tolist())
        assert len(chosen) == spec.top_k
        assert {i for i in chosen if i < spec.num_experts - spec.null_experts} == used_experts(ref, loss)
        assert set(ref.choice_scores(out.logits_TE).topk(spec.top_k).indices[0].tolist()) == chosen
        probabilities_TE = spec.probabilities(out.logits_TE)
        torch.testing.assert_close(probabilities_TE.sum(-1), torch.ones(1))
        if spec.weight_rule in ("score", "chosen_softmax", "null_is_zero"):
            if out.weights_TK is not None:
                expected_TK = spec.expert_weights(out.logits_TE, out.ids_TK)
                torch.testing.assert_close(out.weights_TK.float(), expected_TK, atol=1e-5, rtol=1e-4)
        else:
            with pytest.raises(UnsupportedRouterError, match=spec.weight_rule):
                spec.expert_weights(out.logits_TE, out.ids_TK)


def test_reads_many_tokens() -> None:
    model = tiny_model("qwen3_moe")
    ref = discover_routers(model)[1]
    calls: list[tuple[RouterOutput, Tensor]] = []
    outputs: list[RouterOutput] = []
    ref.module.register_forward_hook(lambda _m, _a, out: outputs.append(ref.spec.read(out)))
    ref.block.experts.register_forward_pre_hook(lambda _m, args: calls.append((outputs[-1], args[1])))
    model(input_ids=torch.arange(12).reshape(2, 6))
    ((out, ids_TK),) = calls
    assert out.logits_TE.shape == (12, NUM_EXPERTS)
    assert torch.equal(out.ids_TK, ids_TK)


def test_another_return_contract_is_refused() -> None:
    (ref, *_) = discover_routers(tiny_model("mixtral"))
    with pytest.raises(UnsupportedRouterError, match="returned 2 values, expected 3"):
        ref.spec.read((torch.zeros(1, NUM_EXPERTS), torch.zeros(1, TOP_K)))


@pytest.mark.parametrize("score", ["softmax", "sigmoid", "sqrt_softplus"])
def test_probabilities_by_hand_and_differentiable(score: str) -> None:
    family = {"softmax": "softmax", "sigmoid": "sigmoid_bias", "sqrt_softplus": "sqrt_softplus_bias"}[score]
    spec = RouterSpec(
        scoring=family, num_experts=3, top_k=1, hidden_size=2, weight_name="weight", num_rows=3, score=score
    )
    logits_TE = torch.tensor([[0.0, 1.0, -2.0]], dtype=torch.float64)
    raw = {
        "softmax": logits_TE.exp(),
        "sigmoid": 1 / (1 + (-logits_TE).exp()),
        "sqrt_softplus": (1 + logits_TE.exp()).log().sqrt(),
    }[score]
    torch.testing.assert_close(spec.probabilities(logits_TE).double(), raw / raw.sum(), atol=1e-6, rtol=1e-6)
    leaf = logits_TE.float().requires_grad_()
    (grad,) = torch.autograd.grad(spec.probabilities(leaf)[0, 1], leaf)
    assert grad[0, 1] > 0 > grad[0, 0]
    saturated = spec.probabilities(torch.full((1, 3), -200.0))
    assert torch.isfinite(saturated).all()


def test_groups_are_masked_by_hand() -> None:
    spec = RouterSpec(
        scoring="sigmoid_group", num_experts=6, top_k=2, hidden_size=2, weight_name="weight", num_rows=6,
        score="sigmoid", n_group=3, topk_group=1, group_score="top2", correction_bias_name="bias",
    )  # fmt: skip
    logits_TE = torch.tensor([[3.0, -3.0, 1.0, 1.0, 0.0, 0.0]])
    choice_TE = spec.choice_scores(logits_TE, torch.zeros(6))
    assert choice_TE.isfinite().tolist() == [[False, False, True, True, False, False]]
    biased_TE = spec.choice_scores(logits_TE, torch.tensor([0.0, 1.0, 0.0, 0.0, 0.0, 0.0]))
    assert biased_TE.isfinite().tolist() == [[True, True, False, False, False, False]]
