"""Discovery over every MoE architecture of transformers; reading and re-computing what each router chose."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import HIDDEN, NUM_EXPERTS, TOP_K, moe_folders, tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from remoe_adapt import RemoeConfig
from remoe_adapt.errors import RouterNotFoundError, UnsupportedRouterError
from remoe_adapt.routers.discover import discover_routers, survey_routers
from remoe_adapt.routers.infer import infer_facts
from remoe_adapt.routers.spec import SCORINGS, RouterRef
from remoe_adapt.routers.table import known_facts

# Scoring family -> "folder:routers in its tiny language model/in the class that wraps all it has (where they differ)".
_BY_FAMILY = {
    "sigmoid_bias": (
        "afmoe:3 hy_v3:3 inkling:4 inkling2:4 inkling2_loop:4 laguna:3 lfm2_moe:2 minimax_m2:4 minimax_m3_vl:4 "
        "muse_spark:4 step3p7:1"
    ),
    "topk_softmax": (
        "aria:4 cohere2_moe:4 gpt_oss:4 granitemoe:4 granitemoe_swa:4 granitemoehybrid:4 granitemoeshared:4 "
        "jetmoe:4 openai_privacy_filter:4"
    ),
    "sigmoid_group": (
        "axk1:3 axk2:3 bailing_hybrid:3 beam:1 deepseek_v3:3 deepseek_v32:3 dots1:3 dots3_note:3/6 "
        "exaone_moe:3 glm4_moe:3 glm4_moe_lite:3 glm4v_moe:3 glm5_next:1 glm_moe_dsa:3 hy_v4:3 hy_v4_vl:3 "
        "kimi_linear:3 mimo_v2_flash:3 nemotron_h:1 solar_open:4"
    ),
    "softmax": (
        "dbrx:4 deepseek_ocr2:3 diffusion_gemma:4/8 flex_olmo:4 gemma4:4 hunyuan_v1_moe:4 jamba:2 lara_mini:4 mellum:4 "
        "minimax:4 mixtral:4 olmoe:4 qwen2_moe:4 qwen3_5_moe:4 qwen3_moe:4 qwen3_next:4 qwen3_omni_moe:4/8 "
        "qwen3_vl_moe:4 qwen4_exp:4 switch_transformers:8 unlimited_ocr:3"
    ),
    "softmax_group": "deepseek_v2:3 mistral4:3 mistral_large4:3",
    "sqrt_softplus_bias": "deepseek_v4:1",
    "softmax_bias": "ernie4_5_moe:3 ernie4_5_vl_moe:6 longcat_flash:4 zaya:4",
    "sigmoid": "flint:2 llama4:4",
    "logit_bias_sigmoid": "kolibri1:4",
    "sparsemixer": "phimoe:4",
    "refused": "doge:0 nllb_moe:0",
}
EXPECTED = {
    name: (family, int(counts.split("/")[0]), int(counts.split("/")[-1]))
    for family, entries in _BY_FAMILY.items()
    for name, counts in (entry.split(":") for entry in entries.split())
}
# Layers refused by name: (how many, a word of the reason).
REFUSED = {
    "deepseek_v4": (3, "token id"),
    "doge": (4, "product keys"),
    "jetmoe": (4, "attention"),
    "nllb_moe": (2, "mask"),
}
# Where the sizes differ from the tiny default: rows of the router for zero experts and skips, K fixed by the design.
NUM_CHOICES = {"longcat_flash": 2 * NUM_EXPERTS, "zaya": NUM_EXPERTS + 1}
TOP_1 = {"switch_transformers", "zaya"}
# A second routing, and what they are beside it: the vision tower of one model, with fewer experts in one layer.
OTHER_FAMILIES = {"dots3_note": {"sigmoid_bias"}}

INSTALLED = moe_folders()


def test_every_moe_of_transformers_is_listed() -> None:
    """A new architecture must be added to EXPECTED (an older transformers may lack some)."""
    assert set(INSTALLED) <= set(EXPECTED), f"unlisted: {set(INSTALLED) - set(EXPECTED)}"
    assert len(set(INSTALLED) & set(EXPECTED)) >= 60


@pytest.mark.parametrize("folder", INSTALLED)
@pytest.mark.parametrize("text_only", [True, False], ids=["text", "whole"])
def test_discovers(folder: str, text_only: bool) -> None:
    family, in_text, in_whole = EXPECTED[folder]
    model = tiny_model(folder, text_only=text_only, device="meta")
    survey = survey_routers(model)
    refused, word = REFUSED.get(folder, (0, ""))
    assert len(survey.refs) == (in_text if text_only else in_whole)
    assert len(survey.refused) == refused
    assert all(word in reason for _, reason in survey.refused)
    assert not survey.foreign
    families = {ref.spec.scoring for ref in survey.refs} - OTHER_FAMILIES.get(folder, set())
    assert families == ({family} if in_text else set())
    choices = NUM_CHOICES.get(folder, NUM_EXPERTS)
    for ref in survey.refs:
        spec = ref.spec
        assert spec.scoring in SCORINGS
        assert model.get_submodule(ref.name) is ref.module
        assert ref.weight_ED.shape == (spec.num_rows, spec.hidden_size)
        assert spec.num_experts == choices or (folder == "dots3_note" and spec.num_experts == NUM_EXPERTS // 2)
        assert spec.top_k == (1 if folder in TOP_1 else TOP_K)
        assert spec.num_rows == spec.num_experts + (folder == "inkling") * model_shared_experts(ref)
        assert spec.hidden_size == (16 if folder == "zaya" else HIDDEN)
    if not survey.refs:
        with pytest.raises(UnsupportedRouterError, match=word):
            discover_routers(model)


def model_shared_experts(ref: RouterRef) -> int:
    return int(getattr(ref.module, "n_shared_experts", 0))


def test_inference_agrees_with_the_table_or_refuses() -> None:
    """The rule for unseen classes, held against every class we know: same facts, or no answer; never a wrong one."""
    # Options of a config switch these off, or another entry of the result decides: known only to the table.
    beyond = {"AXK2TopkRouter", "DeepseekOcr2TextTopkRouter", "UnlimitedOcrTextTopkRouter", "InklingTopkRouter"}
    beyond |= {"ZayaRouter", "OpenAIPrivacyFilterTopKRouter"}
    same: set[str] = set()
    for folder in INSTALLED:
        for ref in survey_routers(tiny_model(folder, device="meta")).refs:
            name = type(ref.module).__name__
            known = known_facts(ref.module, ref.block)
            inferred = infer_facts(ref.module, ref.block, ref.spec.num_experts)
            if name in beyond or known is None or not hasattr(inferred, "scoring"):
                continue
            for field in ("scoring", "normalize", "weight_rule", "group_score", "bias", "bias_in_block"):
                assert getattr(inferred, field) == getattr(known, field), (name, field)
            assert inferred.returns == ref.spec.returns
            same.add(name)
    assert len(same) >= 45


class UnseenRouter(nn.Module):
    def __init__(self, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.top_k, self.norm_topk_prob = num_experts, 3, True
        self.proj = nn.Linear(hidden_size, num_experts, bias=False)
        self.load_bias = nn.Buffer(torch.zeros(num_experts))

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = self.proj(hidden_states.flatten(0, -2))
        scores = logits.sigmoid()
        indices = torch.topk(scores + self.load_bias, self.top_k, dim=-1).indices
        weights = scores.gather(-1, indices)
        return indices, weights / weights.sum(-1, keepdim=True), logits


class UnseenBlock(nn.Module):
    """A block as models outside transformers have it: a router beside a list of experts."""

    def __init__(self, router: nn.Module, hidden_size: int, num_experts: int, top_k: int = 3) -> None:
        super().__init__()
        self.num_experts_per_tok = top_k
        self.router = router
        self.experts = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in range(num_experts))

    def forward(self, hidden_states: Tensor) -> Tensor:
        logits = self.router(hidden_states)
        return hidden_states * torch.softmax(logits, dim=-1).amax(-1, keepdim=True)


def test_unseen_router_class_is_read_from_its_source() -> None:
    model = nn.Sequential(UnseenBlock(UnseenRouter(16, 6), 16, 6), UnseenBlock(UnseenRouter(16, 6), 16, 6))
    refs = discover_routers(model)
    assert [ref.name for ref in refs] == ["0.router", "1.router"]
    spec = refs[0].spec
    assert (spec.scoring, spec.num_experts, spec.top_k, spec.weight_name) == ("sigmoid_bias", 6, 3, "proj.weight")
    assert spec.normalize
    refs[0].module.load_bias.normal_()
    out = spec.read(refs[0].module(torch.randn(2, 5, 16)))
    best_TK = refs[0].choice_scores(out.logits_TE).topk(3).indices
    assert torch.equal(best_TK.sort(-1).values, out.ids_TK.sort(-1).values)
    torch.testing.assert_close(out.weights_TK, spec.expert_weights(out.logits_TE, out.ids_TK))


def test_unseen_bare_linear_gate() -> None:
    (ref,) = discover_routers(nn.Sequential(UnseenBlock(nn.Linear(16, 6, bias=False), 16, 6, top_k=2)))
    assert (ref.spec.scoring, ref.spec.top_k, ref.spec.returns) == ("softmax", 2, ("logits",))
    out = ref.spec.read(ref.module(torch.randn(4, 16)))
    assert out.weights_TK is None
    assert torch.equal(out.ids_TK, out.logits_TE.topk(2).indices)


def test_unseen_router_that_ranks_nothing_is_refused() -> None:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(16, 6)

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.mix(hidden_states).softmax(-1)

    with pytest.raises(UnsupportedRouterError, match="ranks nothing"):
        discover_routers(nn.Sequential(UnseenBlock(Soft(), 16, 6)))


@pytest.mark.parametrize("folder", ["qwen2_moe", "minimax_m2", "llama4", "longcat_flash", "jetmoe", "inkling"])
def test_finds_the_same_routers_under_our_own_adapter(folder: str) -> None:
    model = tiny_model(folder)
    before = discover_routers(model)
    adapted = get_peft_model(model, RemoeConfig())
    after = discover_routers(adapted)
    assert [(ref.name, ref.spec) for ref in after] == [(f"base_model.model.{ref.name}", ref.spec) for ref in before]
    assert all(new.module is old.module and new.block is old.block for new, old in zip(after, before, strict=True))
    assert all(adapted.get_submodule(ref.name) is not ref.module for ref in after)


@pytest.mark.parametrize(
    ("folder", "lora"),
    [
        ("qwen3_moe", {"target_parameters": ["mlp.gate.weight"]}),
        ("afmoe", {"target_modules": ["router.gate"]}),
        ("mixtral", {"target_modules": ["q_proj"], "modules_to_save": ["gate"]}),
    ],
)
def test_foreign_layers_on_routers_are_reported(folder: str, lora: dict[str, Any]) -> None:
    model = get_peft_model(tiny_model(folder), LoraConfig(r=2, **lora))
    survey = survey_routers(model)
    assert not survey.refs
    assert len(survey.foreign) == EXPECTED[folder][1]
    with pytest.raises(UnsupportedRouterError, match=r"layers\.\d.*(gate|router)"):
        discover_routers(model)


def test_lora_elsewhere_changes_only_the_prefix() -> None:
    base = tiny_model("qwen3_moe")
    names = [ref.name for ref in discover_routers(base)]
    experts = ["mlp.experts.gate_up_proj"]
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], target_parameters=experts))
    assert [ref.name for ref in discover_routers(model)] == [f"base_model.model.{name}" for name in names]


def test_base_model_without_head() -> None:
    model = tiny_model("olmoe", device="meta")
    names = [ref.name for ref in discover_routers(model)]
    assert [f"model.{ref.name}" for ref in discover_routers(model.model)] == names


def test_only_some_layers_are_moe() -> None:
    model = tiny_model("qwen2_moe", device="meta", mlp_only_layers=[0, 2])
    assert [ref.name for ref in discover_routers(model)] == ["model.layers.1.mlp.gate", "model.layers.3.mlp.gate"]


@pytest.mark.parametrize(
    ("folder", "override", "family"),
    [
        ("deepseek_v3", {"n_group": 1}, "sigmoid_bias"),
        ("deepseek_v2", {"topk_method": "greedy"}, "softmax"),
        ("mistral4", {"n_group": 1}, "softmax"),
        ("cohere2_moe", {"expert_selection_fn": "sigmoid"}, "sigmoid"),
        ("lfm2_moe", {"use_expert_bias": False}, "sigmoid"),
        ("deepseek_v4", {"scoring_func": "sigmoid"}, "sigmoid_bias"),
    ],
)
def test_configuration_changes_the_family(folder: str, override: dict[str, Any], family: str) -> None:
    specs = {ref.spec for ref in discover_routers(tiny_model(folder, device="meta", **override))}
    assert {spec.scoring for spec in specs} == {family}
    assert all(spec.n_group == 1 and spec.group_score is None for spec in specs)


def test_dense_model_has_no_router() -> None:
    config = LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
    with torch.device("meta"), pytest.raises(RouterNotFoundError, match="dense"):
        discover_routers(LlamaForCausalLM(config))


def test_quantised_router_is_refused() -> None:
    model = tiny_model("qwen3_moe")
    for ref in discover_routers(model):
        ref.module.weight = nn.Parameter(ref.weight_ED.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(UnsupportedRouterError, match="float8"):
        discover_routers(model)
