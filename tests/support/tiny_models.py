"""Tiny random models of every MoE architecture in transformers, built from its config class with shrunken sizes.

Sizes are shrunk by attribute name, so most architectures need no entry of their own; OVERRIDES holds the rest.
"""

from __future__ import annotations

import importlib
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

NUM_EXPERTS, TOP_K, HIDDEN, LAYERS, VOCAB = 8, 2, 32, 4, 96

_BY_SIZE: tuple[tuple[int, str], ...] = (
    (HIDDEN, "hidden_size moe_hidden_size d_model n_embd embed_dim hidden_dim expert_ffn_hidden_size out_hidden_size"),
    (48, "intermediate_size ffn_hidden_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim"),
    (16, "moe_intermediate_size expert_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank"),
    (LAYERS, "num_hidden_layers num_layers n_layers encoder_layers decoder_layers num_decoder_layers depth"),
    (
        4,
        "linear_num_value_heads num_attention_heads num_heads "
        "n_heads encoder_attention_heads decoder_attention_heads qk_rope_head_dim",
    ),
    (
        2,
        "n_group linear_num_heads linear_num_key_heads index_n_heads "
        "num_key_value_heads num_global_key_value_heads kv_n_heads eos_token_id",
    ),
    (
        8,
        "head_dim kv_channels v_head_dim qk_nope_head_dim d_kv "
        "index_head_dim zero_expert_num linear_head_dim linear_key_head_dim linear_value_head_dim",
    ),
    (NUM_EXPERTS, "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts"),
    (TOP_K, "num_experts_per_tok num_experts_per_token moe_topk moe_top_k moe_k top_k_experts"),
    (1, "topk_group first_k_dense_replace n_shared_experts num_nextn_predict_layers bos_token_id"),
    (VOCAB, "vocab_size vocab_size_per_layer_input text_vocab_size unpadded_vocab_size"),
    (64, "max_position_embeddings"),
    (0, "pad_token_id"),
)
SIZES = {name: size for size, names in _BY_SIZE for name in names.split()}

# What names cannot tell: switches that turn the MoE on, lists as long as the model, sizes tied to one another. A key
# applies to every (sub)configuration that has the field; "Class.field" to that class whether it declares it or not.
OVERRIDES: dict[str, dict[str, Any]] = {
    "dbrx": {
        "DbrxAttentionConfig.rope_theta": 10000.0,
        "DbrxAttentionConfig.clip_qkv": 8.0,
        "DbrxFFNConfig.hidden_size": HIDDEN,
    },
    "deepseek_ocr2": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "doge": {"is_moe": True, "num_experts": 16},
    "dots3_note": {
        "num_key_value_heads": 4,
        "adapter_in_dim": HIDDEN,
        "adapter_out_dim": HIDDEN,
        "adapter_input_size": HIDDEN,
        "Dots3NoteVisionConfig.pyramid_num_routed": [-1, 4, 8, 8],
    },
    "ernie4_5_vl_moe": {
        "Ernie4_5_VLMoeTextConfig.moe_intermediate_size": [16, 16],
        "Ernie4_5_VLMoeTextConfig.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [1, 1, 2],
        },
    },
    "gemma4": {"enable_moe_block": True},
    "glm4v_moe": {
        "Glm4vMoeTextConfig.rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "mrope_section": [1, 1, 0],
        }
    },
    "glm5_next": {"qk_rope_head_dim": 0},
    "granitemoehybrid": {"mamba_n_heads": 4},
    "hy_v4_vl": {
        "HYV4VLConfig.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
        "HYV4VLTextConfig.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
    },
    # With fewer layers its vision tower needs scipy.
    "inkling": {"InklingVisionConfig.num_hidden_layers": 24, "InklingVisionConfig.n_layers": 24},
    "inkling2": {"text_hidden_size": HIDDEN},
    "inkling2_loop": {"vision_config": {"model_type": "inkling2_vision", "text_hidden_size": HIDDEN}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 4},
    "qwen3_omni_moe": {
        "Qwen3OmniMoeTalkerTextConfig.shared_expert_intermediate_size": 16,
        "Qwen3OmniMoeTalkerConfig.spatial_merge_size": 2,
    },
    "qwen4_exp": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "step3p7": {"sliding_window": 16},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


def _models_root() -> Path:
    return Path(inspect.getfile(transformers)).parent / "models"


@cache
def moe_folders() -> tuple[str, ...]:
    """Model folders of transformers whose modeling file records router logits or defines a router class."""
    marks = re.compile(r'"router_logits":|^class \w*(?:TopK\w*|Topk|Top1|Top2)(?:Router|Gat(?:e|ing))\(', re.MULTILINE)
    return tuple(
        file.parent.name for file in sorted(_models_root().glob("*/modeling_*.py")) if marks.search(file.read_text())
    )


def tiny_config(config_class: type[PretrainedConfig], overrides: dict[str, Any]) -> PretrainedConfig:
    """An instance of `config_class` with every known size shrunk, sub-configurations included."""
    known = {*inspect.signature(config_class.__init__).parameters, *getattr(config_class, "__dataclass_fields__", ())}
    known |= set(config_class.attribute_map)
    values: dict[str, Any] = {}
    for name, sub_class in config_class.sub_configs.items():
        if inspect.isclass(sub_class) and issubclass(sub_class, PretrainedConfig) and sub_class is not PretrainedConfig:
            values[name] = tiny_config(sub_class, overrides)
    for name, value in (SIZES | overrides).items():
        owner, _, field = name.rpartition(".")
        if field in known if not owner else owner == config_class.__name__:
            values[field] = value
    if "kv_lora_rank" in known and "num_key_value_heads" in values:  # latent attention has one head count
        values["num_key_value_heads"] = values["num_attention_heads"]
    return config_class(**values)


@cache
def model_class(folder: str, *, text_only: bool) -> type[PreTrainedModel]:
    """The language model of a folder, or (`text_only=False`) the class that wraps everything it has."""
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    classes = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and "PreTrained" not in name
    ]
    whole = ("ForConditionalGeneration", "ForBlockDiffusion", "ForCausalLM", "ForTokenClassification")
    text = ("ForCausalLM", "TextModel", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")
    for ending in text if text_only else whole:
        fitting = [c for c in classes if c.__name__.endswith(ending) and c.__module__ == module.__name__]
        if fitting:
            return min(fitting, key=lambda c: len(c.__name__))
    raise LookupError(f"no model class in transformers.models.{folder}")


def tiny_model(
    folder: str, *, text_only: bool = True, device: str = "cpu", seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A tiny random model of one architecture in eval mode: 4 layers, 8 experts, top-2, hidden size 32, vocabulary 96.

    `overrides` are configuration fields, applied as OVERRIDES are.
    """
    cls = model_class(folder, text_only=text_only)
    config = tiny_config(cls.config_class, OVERRIDES.get(folder, {}) | overrides)
    torch.manual_seed(seed)
    with torch.device(device):
        return cls(config).eval()
