"""One forward at a time: copies, compilation, autocast, and that whatever does not agree is found and left alone."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from peft import get_peft_model
from tiny_models import moe_folders, tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt import RemoeConfig
from remoe_adapt.gating.reference import topk_gating
from remoe_adapt.gating.router_forward import PlainGate, RouterForward, router_forward, verify
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.routers.spec import RouterRef, RouterSpec

DIM = 32
KINDS = [
    "qwen3_moe",
    "mixtral",
    "deepseek_v3",
    "gpt_oss",
    "ernie4_5_moe",
    "llama4",
    "gemma4",
    "laguna",
    "hunyuan_v1_moe",
]


def last_router(folder: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> RouterRef:
    if folder not in moe_folders():
        pytest.skip("this transformers does not have it")
    return discover_routers(tiny_model(folder, **overrides).to(dtype))[-1]


def installed(folder: str) -> tuple[RouterRef, RouterForward]:
    ref = last_router(folder)
    forward = router_forward(ref)
    assert isinstance(forward, RouterForward), forward
    ref.module.forward = forward
    return ref, forward


@pytest.mark.parametrize("folder", KINDS)
def test_compiles_in_one_graph(folder: str) -> None:
    torch._dynamo.reset()  # all kinds of routers run one function, of which only so many variants are kept
    ref, forward = installed(folder)
    hidden_TD = torch.randn(3, DIM)
    with torch.no_grad():
        compiled = torch.compile(ref.module, fullgraph=True, backend="eager")(hidden_TD)
        torch.testing.assert_close(compiled, forward(hidden_TD), atol=1e-6, rtol=0)
        ref.weight_ED.mul_(-1.0)
        again = torch.compile(ref.module, fullgraph=True, backend="eager")(hidden_TD)
    torch.testing.assert_close(again, forward(hidden_TD), atol=1e-6, rtol=0)


@pytest.mark.parametrize("folder", ["qwen3_moe", "hunyuan_v1_moe", "gemma4"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_routes_by_its_own_weights(folder: str, how: str) -> None:
    ref, forward = installed(folder)
    module = copy.deepcopy(ref.module) if how == "deepcopy" else pickle.loads(pickle.dumps(ref.module))  # noqa: S301
    assert module.forward is not forward
    assert module.forward.module is module
    hidden_TD = torch.randn(3, DIM)
    before = ref.module(hidden_TD)
    assert all(torch.equal(a, b) for a, b in zip(module(hidden_TD), before, strict=True))
    with torch.no_grad():
        module.get_parameter(ref.spec.weight_name).mul_(-1.0)
    assert all(torch.equal(a, b) for a, b in zip(ref.module(hidden_TD), before, strict=True))
    assert not torch.equal(module(hidden_TD)[0], before[0])


@pytest.mark.parametrize("folder", ["ernie4_5_moe", "flint", "qwen3_moe", "deepseek_v3", "afmoe"])
def test_under_autocast(folder: str) -> None:
    ref, forward = installed(folder)
    del ref.module.forward
    tokens = torch.randn(1, 5, DIM) if folder == "afmoe" else torch.randn(5, DIM)
    args = (tokens, *([ref.correction_bias_E] if ref.spec.correction_bias_in_block else []))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        stock, own = ref.module(*args), forward(*args)
    assert [x.dtype for x in own] == [x.dtype for x in stock]
    assert stock[0].dtype == (torch.float32 if folder in ("ernie4_5_moe", "flint", "afmoe") else torch.bfloat16)
    torch.testing.assert_close(own[0], stock[0], atol=0, rtol=0)


def test_the_selection_bias_by_position_or_name() -> None:
    _, forward = installed("afmoe")
    hidden, bias_E = torch.randn(1, 5, DIM), torch.randn(8)
    by_position, by_name = forward(hidden, bias_E), forward(hidden, expert_bias=bias_E)
    assert all(torch.equal(a, b) for a, b in zip(by_position, by_name, strict=True))
    with pytest.raises(TypeError, match="unexpected arguments: mask"):
        forward(hidden, mask=bias_E)


class Fused(PlainGate):
    """Product and gate at once."""

    def __init__(self) -> None:
        self.dtypes: list[torch.dtype] = []

    def launch(  # type: ignore[override]
        self, layer: int, hidden_TD: Tensor, weight_ED: Tensor, linear_bias_E: Tensor | None, k: int, spec: RouterSpec,
        bias_E: Tensor | None, linear_fp32: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        if linear_fp32:
            hidden_TD, weight_ED = hidden_TD.float(), weight_ED.float()
        logits_TE = F.linear(hidden_TD, weight_ED, linear_bias_E)
        self.dtypes.append(logits_TE.dtype)
        return logits_TE, *self.gate(layer, logits_TE, k, spec, bias_E)


@pytest.mark.parametrize(("folder", "fused"), [("gpt_oss", "bfloat16"), ("deepseek_v3", "float32"), ("laguna", "")])
def test_one_launch_takes_the_product_too(folder: str, fused: str) -> None:
    ref = last_router(folder, torch.bfloat16)
    forward = router_forward(ref)
    assert isinstance(forward, RouterForward)
    hidden_TD = torch.randn(3, DIM, dtype=torch.bfloat16)
    plain = [forward(hidden_TD), forward(hidden_TD[:1])]
    forward.steps = fused_gate = Fused()
    routed = [forward(hidden_TD), forward(hidden_TD[:1])]
    torch.testing.assert_close(routed, plain, atol=0, rtol=0)
    assert fused_gate.dtypes == ([getattr(torch, fused)] * 2 if fused else [])
    with torch.autocast("cpu", torch.bfloat16):
        forward(hidden_TD[:1])
    assert len(fused_gate.dtypes) == 2 * bool(fused)


@pytest.mark.parametrize(
    ("folder", "change", "word"),
    [
        ("deepseek_v3", {"product": "native"}, r"logits are torch.float32 .* expected torch.bfloat16"),
        ("qwen3_moe", {"product": "fp32"}, "logits are torch.bfloat16"),
        ("granitemoe", {"product": "fp32"}, "its logits differ"),
        ("mixtral", {"weights_dtype": "logits"}, "weights are torch.float32"),
        ("granitemoe", {"weights_dtype": "fp32"}, "weights are torch.bfloat16"),
        ("gemma4", {"before": ("norm",)}, "differ"),
        ("gemma4", {"before": ("scale", "scalar_root_size")}, "differ"),
        ("gemma4", {"expert_factor": None}, "failed with UnsupportedRouterError"),
        ("laguna", {"logit_cap": None}, "its logits differ"),
        ("muse_spark", {"logit_factor": None}, "its logits differ"),
    ],
)
def test_a_wrong_fact_is_found(folder: str, change: dict[str, Any], word: str) -> None:
    overrides = {"laguna": {"moe_router_logit_softcapping": 2.0}, "muse_spark": {"output_multiplier": 0.5}}
    ref = last_router(folder, torch.bfloat16, **overrides.get(folder, {}))
    forward = router_forward(ref)
    assert isinstance(forward, RouterForward)
    reason = verify(type(forward)(ref.module, ref.spec, replace(forward.facts, **change)), ref)
    assert reason is not None
    assert re.search(word, reason), reason


@pytest.mark.parametrize(
    ("folder", "change", "word"),
    [
        ("qwen3_moe", {"normalize": True}, "weights differ"),
        ("ernie4_5_moe", {"scoring": "softmax", "correction_bias_name": None}, "chooses other experts"),
        ("laguna", {"scoring": "sigmoid", "correction_bias_name": None}, "chooses other experts"),
        ("minimax_m2", {"correction_bias_name": None, "correction_bias_in_block": False}, "failed with TypeError"),
        ("deepseek_v3", {"group_score": "max"}, "chooses other experts"),
        ("deepseek_v3", {"scaling": 3.0}, "weights differ"),
        ("mixtral", {"top_k": 3}, "weights are"),
        ("llama4", {"returns": ("logits", "dense_weights")}, "differ"),
    ],
)
def test_a_wrong_spec_is_found(folder: str, change: dict[str, Any], word: str) -> None:
    ref, _ = installed(folder)
    del ref.module.forward
    reason = router_forward(replace(ref, spec=replace(ref.spec, **change)))
    assert isinstance(reason, str)
    assert word in reason


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_weight_before_training_proves_nothing_by_itself(value: float) -> None:
    ref = last_router("laguna")
    ref.weight_ED.data.fill_(value)
    # Groups do not matter here: they only make facts that were not tried before.
    wrong = replace(ref.spec, scoring="sigmoid", correction_bias_name=None, topk_group=2 if value else 3)
    reason = router_forward(replace(ref, spec=wrong))
    assert isinstance(reason, str)
    assert "chooses other experts" in reason
    assert isinstance(router_forward(ref), RouterForward)
    assert torch.equal(ref.weight_ED.nan_to_num(0.0), torch.zeros_like(ref.weight_ED))


def test_a_class_that_changed_keeps_its_forward() -> None:
    ref, _ = installed("qwen3_moe")
    del ref.module.forward
    stock = type(ref.module)

    class Louder(stock):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            logits_TE, weights_TK, ids_TK = super().forward(hidden_states)
            return logits_TE, weights_TK * 2, ids_TK

    class Noisy(stock):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            noise = torch.rand_like(hidden_states) if self.training else 0.0
            return super().forward(hidden_states + noise)

    class InPlace(stock):  # type: ignore[misc, valid-type]
        def forward(self, hidden_states: Tensor) -> Any:
            return super().forward(hidden_states.mul_(2.0))

    for cls, word in ((Louder, "weights differ"), (Noisy, r"\(in training\)"), (InPlace, "input in place")):
        ref.module.__class__ = cls
        reason = router_forward(ref)
        assert isinstance(reason, str)
        assert re.search(word, reason), reason


def test_trying_leaves_no_trace() -> None:
    ref = discover_routers(tiny_model("deepseek_v2"))[0]
    ref.module.train()
    calls: list[str] = []
    for module in ref.module.modules():
        module.register_forward_hook(lambda *_: calls.append("hook"))
    weight_ED, random_state = ref.weight_ED.detach().clone(), torch.get_rng_state()
    forward = router_forward(replace(ref, spec=replace(ref.spec, scaling=1.5)))  # not tried before
    assert isinstance(forward, str)
    assert not calls
    assert ref.module.training
    assert "forward" not in vars(ref.module)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(ref.weight_ED, weight_ED)


class Unseen(nn.Module):
    """A class as models outside transformers have it: fp32 product, weights as the input, entries in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 6, 2
        self.weight = nn.Parameter(torch.randn(6, DIM))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.float(), self.weight.float())
        weights, indices = logits.softmax(-1).topk(self.top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return indices, weights.to(hidden_states.dtype), logits


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router = Unseen()
        self.experts = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(6))


def test_an_unseen_class_is_tried_with_every_dtype_rule() -> None:
    (ref,) = discover_routers(nn.Sequential(Block().to(torch.bfloat16)))
    forward = router_forward(ref)
    assert isinstance(forward, RouterForward), forward
    assert (forward.facts.product, forward.facts.weights_dtype) == ("fp32", "hidden")
    hidden_TD = torch.randn(7, DIM, dtype=torch.bfloat16)
    torch.testing.assert_close(forward(hidden_TD), ref.module(hidden_TD))


def test_an_adapter_in_fp32_does_not_tell_the_dtype() -> None:
    """Its delta comes before the experts of this block, whose dtype is the input's."""
    adapted = get_peft_model(tiny_model("mixtral").to(torch.bfloat16), RemoeConfig())
    forwards = [router_forward(ref) for ref in discover_routers(adapted)]
    assert all(isinstance(forward, RouterForward) for forward in forwards)


def test_under_hooks_of_accelerate() -> None:
    """They keep the class's forward where it can be exchanged; anybody else's forward is not ours to judge."""
    (ref, *_) = discover_routers(tiny_model("qwen3_moe"))
    hidden_TD = torch.randn(3, DIM)
    before = ref.module(hidden_TD)
    add_hook_to_module(ref.module, AlignDevicesHook(io_same_device=True))
    forward = router_forward(ref)
    assert isinstance(forward, RouterForward), forward
    ref.module._old_forward = forward
    torch.testing.assert_close(ref.module(hidden_TD), before)


def test_what_cannot_be_tried_keeps_its_forward() -> None:
    (ref, *_) = discover_routers(tiny_model("qwen3_moe", device="meta"))
    assert router_forward(ref) == "not verified: its weights are on the meta device"
    (ref, *_) = discover_routers(tiny_model("qwen3_moe"))
    ref.module.forward = topk_gating
    assert router_forward(ref) == "its forward is already replaced by topk_gating"
