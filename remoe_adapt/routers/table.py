"""The only table of architecture facts: what a router class does that its attributes do not say.

Keys are router class names of transformers 5.17 - 5.24, read off their forwards. Sizes, K, scaling factors, group
counts and `norm_topk_prob` are not here: they are read from the live module. A class that is not listed is read by
`infer.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import nn

from remoe_adapt.routers.spec import STANDARD_RETURNS


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """How one router class scores, ranks, weighs and returns; field meanings as in RouterSpec.

    `normalize` None means: as the module's `norm_topk_prob` says. `top_k` None means: as module or config say.
    `shared_rows` and `null_experts` name the attribute (router, block or config) that counts them, or are counts.

    The rest is what `gating/router_forward.py` needs beside a RouterSpec to be the class's own forward. `product` takes
    the logits: "native" (as F.linear does), "fp32" (operands cast to fp32), "fp32_result" (native, then cast),
    "fp32_output" (fp32, on a GPU without gradients by one product of half-precision operands), "weight_dtype" (input
    cast to the weight's dtype). `autocast` False: never under autocast. `before` names attributes applied to the input
    in order: a module is called, a tensor or number multiplies. `logit_cap` and `logit_factor` name the number c of
    `c tanh(z / c)` (0: no cap) and of `c z`; `expert_factor` the tensor [E] that multiplies the weights of the chosen.
    `weights_dtype` is that of the returned weights: "logits", "hidden" (as the input) or "fp32".
    """

    scoring: str
    normalize: bool | None = False
    normalize_eps: float = 0.0
    weight_rule: str = "score"
    divide_by_k: bool = False
    top_k: int | None = None
    group_score: str | None = None
    group_fill: float = -math.inf
    bias: str | None = None
    bias_in_block: bool = False
    logit_bias: str | None = None
    shared_rows: str | int = 0
    null_experts: str | int = 0
    returns: tuple[str, ...] = STANDARD_RETURNS
    product: str = "native"
    autocast: bool = True
    before: tuple[str, ...] = ()
    logit_cap: str | None = None
    logit_factor: str | None = None
    expert_factor: str | None = None
    weights_dtype: str = "logits"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a known class is not a router that an adapter can steer."""

    reason: str


_BIAS = "e_score_correction_bias"
_EXPERT_BIAS = "expert_bias"
_TINY = 1e-20

SOFTMAX = Facts(scoring="softmax", normalize=None)
SOFTMAX_RENORMALISED = replace(SOFTMAX, normalize=True)
CHOSEN_SOFTMAX = Facts(scoring="topk_softmax", weight_rule="chosen_softmax")
SIGMOID_GROUP = Facts(
    scoring="sigmoid_group", normalize=None, normalize_eps=_TINY, group_score="top2", bias=_BIAS, product="fp32"
)
SIGMOID_BIAS = Facts(scoring="sigmoid_bias", normalize=True, bias=_BIAS)
SIGMOID_BLOCK_BIAS = replace(SIGMOID_BIAS, bias_in_block=True)
SOFTMAX_GROUP = Facts(scoring="softmax_group", group_score="top2", group_fill=-math.inf)
ERNIE = Facts(
    scoring="softmax_bias",
    normalize=True,
    bias=f"moe_statics.{_BIAS}",
    product="fp32",
    autocast=False,
    weights_dtype="hidden",
)
GEMMA = replace(
    SOFTMAX_RENORMALISED,
    weight_rule="per_expert_scale",
    returns=("probabilities", "weights", "ids"),
    before=("norm", "scale", "scalar_root_size"),
    expert_factor="per_expert_scale",
    weights_dtype="fp32",
)

_GROUPS: tuple[tuple[Facts | Refusal, str], ...] = (
    (
        SOFTMAX,
        "FlexOlmoTopKRouter MellumTopKRouter OlmoeTopKRouter Qwen2MoeTopKRouter Qwen3MoeTopKRouter "
        "Qwen3NextTopKRouter Qwen3OmniMoeThinkerTextTopKRouter Qwen3OmniMoeTalkerTextTopKRouter Qwen4ExpTextTopKRouter",
    ),
    (SOFTMAX_RENORMALISED, "Qwen3_5MoeTopKRouter Qwen3OmniMoeTextTopKRouter Qwen3VLMoeTextTopKRouter"),
    (replace(SOFTMAX_RENORMALISED, weights_dtype="fp32"), "MiniMaxTopKRouter MixtralTopKRouter"),
    (replace(SOFTMAX_RENORMALISED, product="weight_dtype"), "HunYuanMoEV1Gate"),
    (replace(SOFTMAX, normalize=False, weights_dtype="hidden"), "JambaTopKRouter"),
    (replace(SOFTMAX, product="fp32", weights_dtype="hidden"), "LaraMiniTopKRouter"),
    (GEMMA, "Gemma4TextRouter DiffusionGemmaTextRouter"),
    (replace(SOFTMAX, normalize=True, returns=("logits",)), "DbrxRouter"),
    (
        replace(SOFTMAX, normalize=False, weight_rule="capacity", top_k=1, returns=("mask", "weights", "logits")),
        "SwitchTransformersTop1Router",
    ),
    (CHOSEN_SOFTMAX, "AriaTextTopKRouter"),
    (
        replace(CHOSEN_SOFTMAX, product="fp32_result", weights_dtype="hidden"),
        "GraniteMoeTopKRouter GraniteMoeSWATopKRouter GraniteMoeHybridTopKRouter GraniteMoeSharedTopKRouter",
    ),
    (replace(CHOSEN_SOFTMAX, weights_dtype="hidden"), "Cohere2MoeTopKRouter"),
    (replace(CHOSEN_SOFTMAX, logit_bias="bias"), "GptOssTopKRouter"),
    (replace(CHOSEN_SOFTMAX, logit_bias="bias", divide_by_k=True, product="fp32"), "OpenAIPrivacyFilterTopKRouter"),
    (replace(CHOSEN_SOFTMAX, returns=("order", "rows", "sorted_weights", "sizes", "logits")), "JetMoeTopKGating"),
    (ERNIE, "Ernie4_5_MoeTopKRouter Ernie4_5_VLMoeMoeTopKRouter"),
    (
        Facts(scoring="softmax_bias", bias=_BIAS, null_experts="zero_expert_num", product="fp32"),
        "LongcatFlashTopkRouter",
    ),
    (
        Facts(
            scoring="softmax_bias",
            bias="balancing_biases",
            null_experts=1,
            weight_rule="null_is_zero",
            returns=("logits", "weights", "masked_ids", "state"),
        ),
        "ZayaRouter",
    ),
    (
        replace(SOFTMAX_GROUP, group_score="max", product="fp32", weights_dtype="fp32"),
        "DeepseekV2TopkRouter DeepseekOcr2TextTopkRouter UnlimitedOcrTextTopkRouter",
    ),
    (replace(SOFTMAX_GROUP, normalize=None, normalize_eps=_TINY), "Mistral4TopkRouter"),
    (replace(SOFTMAX_GROUP, normalize=True, normalize_eps=_TINY, product="fp32"), "MistralLarge4TextTopkRouter"),
    (
        SIGMOID_GROUP,
        "AXK1TopkRouter BailingHybridTopkRouter BeamTopKRouter DeepseekV3TopkRouter DeepseekV32TopkRouter "
        "Dots1TopkRouter Dots3NoteTextTopkRouter ExaoneMoeTopkRouter Glm4MoeTopkRouter Glm4MoeLiteTopkRouter "
        "Glm4vMoeTextTopkRouter Glm5NextTextTopkRouter GlmMoeDsaTopkRouter HYV4TopkRouter HYV4VLTopkRouter "
        "KimiLinearTopkRouter MiMoV2FlashTopkRouter NemotronHTopkRouter SolarOpenTopkRouter",
    ),
    (replace(SIGMOID_GROUP, group_fill=0.0), "AXK2TopkRouter"),
    (
        replace(SIGMOID_BIAS, product="fp32_result", logit_cap="router_logit_softcapping", weights_dtype="hidden"),
        "LagunaTopKRouter",
    ),
    (replace(SIGMOID_BIAS, product="weight_dtype", weights_dtype="fp32"), "MiniMaxM3VLTopKRouter Step3p7TopKRouter"),
    (
        replace(SIGMOID_BIAS, normalize_eps=1e-15, product="fp32", logit_factor="output_multiplier"),
        "MuseSparkTopkRouter",
    ),
    (replace(SIGMOID_BIAS, normalize_eps=_TINY), "DeepseekV4TopKRouter"),
    (replace(SIGMOID_BIAS, normalize_eps=_TINY, product="fp32"), "Inkling2TopKRouter Inkling2LoopTopKRouter"),
    (replace(SIGMOID_BLOCK_BIAS, product="weight_dtype", weights_dtype="fp32"), "MiniMaxM2TopKRouter"),
    (replace(SIGMOID_BLOCK_BIAS, normalize_eps=_TINY, product="fp32"), "HYV3TopKRouter Dots3NoteVisionTopKRouter"),
    (
        replace(SIGMOID_BLOCK_BIAS, bias=_EXPERT_BIAS, normalize_eps=_TINY, product="fp32_result"),
        "AfmoeTokenChoiceRouter",
    ),
    (replace(SIGMOID_BLOCK_BIAS, bias=_EXPERT_BIAS, normalize=None, normalize_eps=1e-6), "Lfm2MoeTopKRouter"),
    (
        replace(
            SIGMOID_BIAS,
            shared_rows="n_shared_experts",
            weight_rule="joint_shared",
            returns=("logits", "weights", "ids", "shared_weights"),
        ),
        "InklingTopkRouter",
    ),
    (Facts(scoring="logit_bias_sigmoid", normalize=None, bias=_BIAS, product="fp32_output"), "Kolibri1TopKRouter"),
    (Facts(scoring="sigmoid", normalize=None, product="fp32", autocast=False), "FlintTopKRouter"),
    (Facts(scoring="sigmoid", returns=("dense_weights", "logits")), "Llama4Router"),
    (Facts(scoring="sparsemixer", weight_rule="sparsemixer"), "PhimoeTopKRouter"),
    (Refusal("it looks experts up by token id: its weight sets only how much they count"), "DeepseekV4HashRouter"),
    (
        Refusal("transformers reads its 0/1 mask as expert numbers: experts 0 and 1 run whatever it scores"),
        "NllbMoeTop2Router",
    ),
    (
        Refusal("it adds two half-scores per expert (product keys): no row of its weight belongs to one expert"),
        "DogeCDMoE",
    ),
)
_BY_CLASS: dict[str, Facts | Refusal] = {name: facts for facts, names in _GROUPS for name in names.split()}


def _deepseek_v2(router: nn.Module, block: nn.Module, facts: Facts) -> Facts:
    return replace(facts, scoring="softmax", group_score=None) if router.topk_method == "greedy" else facts


def _dbrx(router: nn.Module, block: nn.Module, facts: Facts) -> Facts:
    order = block.moe_normalize_expert_weights
    if order is None or order == 1:
        return replace(facts, normalize=order is not None)
    return replace(facts, normalize=False, weight_rule=f"{order}_norm")


def _cohere2(router: nn.Module, block: nn.Module, facts: Facts) -> Facts:
    if router.expert_selection_fn != "sigmoid":
        return facts
    return replace(facts, scoring="sigmoid", normalize=None, weight_rule="score")


def _score_function(router: nn.Module, block: nn.Module, facts: Facts) -> Facts | Refusal:
    name = type(router.score_fn).__name__
    if name == "Sigmoid":
        return facts
    if name == "SqrtSoftplusActivation":
        return replace(facts, scoring="sqrt_softplus_bias")
    return Refusal(f"its scoring function {name} is not known here")


def _lfm2(router: nn.Module, block: nn.Module, facts: Facts) -> Facts:
    return facts if router.use_expert_bias else replace(facts, scoring="sigmoid", bias=None, bias_in_block=False)


_VARIANTS: dict[str, Callable[..., Facts | Refusal]] = {
    "DbrxRouter": _dbrx,
    "DeepseekV2TopkRouter": _deepseek_v2,
    "DeepseekOcr2TextTopkRouter": _deepseek_v2,
    "UnlimitedOcrTextTopkRouter": _deepseek_v2,
    "Cohere2MoeTopKRouter": _cohere2,
    "DeepseekV4TopKRouter": _score_function,
    "Inkling2TopKRouter": _score_function,
    "Inkling2LoopTopKRouter": _score_function,
    "Lfm2MoeTopKRouter": _lfm2,
}


def known_facts(router: nn.Module, block: nn.Module) -> Facts | Refusal | None:
    """The table's facts for this module's class (or a class it derives from), options of its config applied."""
    for cls in type(router).__mro__:
        facts = _BY_CLASS.get(cls.__name__)
        if facts is not None:
            variant = _VARIANTS.get(cls.__name__)
            return variant(router, block, facts) if variant is not None else facts
    return None


GGUF_ROUTER_WEIGHT = "blk.{layer}.ffn_gate_inp.weight"
GGUF_LOGIT_BIAS = "blk.{layer}.ffn_gate_inp.bias"
GGUF_CORRECTION_BIAS = "blk.{layer}.exp_probs_b.bias"

# `config.model_type` (of the text model) -> `general.architecture` of llama.cpp's converter.
GGUF_ARCH: dict[str, str] = {
    "afmoe": "afmoe",
    "dbrx": "dbrx",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "gemma4_text": "gemma4",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "glm_moe_dsa": "glm-dsa",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "granitemoehybrid": "granitehybrid",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "jamba": "jamba",
    "kimi_linear": "kimi-linear",
    "lfm2_moe": "lfm2moe",
    "llama4_text": "llama4",
    "mimo_v2_flash": "mimo2",
    "minimax_m2": "minimax-m2",
    "mistral4": "mistral4",
    "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_5_moe_text": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_vl_moe_text": "qwen3vlmoe",
}

# Architectures whose graph multiplies by the router without its LoRA, so that one is loaded and silently ignored.
GGUF_LORA_IGNORED = frozenset({"kimi-k3"})

# What vLLM 0.32.0 makes of a PEFT LoRA on the routers, by `config.model_type`, as benchmarks/other_engines.py found it
# on its CPU build: a router that vLLM keeps under another name than transformers does is not found, and vLLM says so
# only where no module of it has the last part of that name.
VLLM_ROUTER_LORA: dict[str, str] = {
    "ernie4_5_moe": "applied",
    "glm4_moe": "applied",
    "gpt_oss": "applied",
    "granitemoe": "refused",
    "mixtral": "ignored",
    "olmoe": "applied",
    "qwen2_moe": "applied",
    "qwen3_moe": "applied",
}

# A stock router of each scoring whose gating follows from its logits: "folder of transformers.models.class".
SCORING_EXAMPLES: tuple[tuple[str, str], ...] = (
    ("softmax", "qwen2_moe.Qwen2MoeTopKRouter"),
    ("softmax, renormalised", "qwen3_5_moe.Qwen3_5MoeTopKRouter"),
    ("topk_softmax", "granitemoe.GraniteMoeTopKRouter"),
    ("topk_softmax, logit bias", "gpt_oss.GptOssTopKRouter"),
    ("softmax_bias", "ernie4_5_moe.Ernie4_5_MoeTopKRouter"),
    ("softmax_group", "deepseek_v2.DeepseekV2TopkRouter"),
    ("sigmoid", "flint.FlintTopKRouter"),
    ("sigmoid_bias", "minimax_m3_vl.MiniMaxM3VLTopKRouter"),
    ("sigmoid_group", "deepseek_v3.DeepseekV3TopkRouter"),
    ("logit_bias_sigmoid", "kolibri1.Kolibri1TopKRouter"),
    ("sqrt_softplus_bias", "deepseek_v4.DeepseekV4TopKRouter"),
)
