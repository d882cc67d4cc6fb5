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

NUM_EXPERTS, TOP_K, HIDDEN, LAYERS = 8, 2, 32, 4

_BY_SIZE: dict[Any, str] = {
    HIDDEN: "hidden_size d_model n_embd embed_dim hidden_dim expert_ffn_hidden_size out_hidden_size",
    48: "intermediate_size ffn_hidden_size d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim",
    16: "moe_intermediate_size expert_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank",
    LAYERS: "num_hidden_layers num_layers n_layers encoder_layers decoder_layers num_decoder_layers depth",
    4: "num_attention_heads num_heads n_heads encoder_attention_heads decoder_attention_heads qk_rope_head_dim",
    2: "num_key_value_heads num_global_key_value_heads kv_n_heads moe_topk",
    8: "head_dim kv_channels v_head_dim qk_nope_head_dim d_kv",
    NUM_EXPERTS: "num_experts num_local_experts n_routed_experts moe_num_experts num_moe_experts",
    TOP_K: "num_experts_per_tok moe_topk moe_top_k top_k_experts",
    1: "n_group topk_group first_k_dense_replace n_shared_experts num_nextn_predict_layers",
    96: "vocab_size",
    64: "max_position_embeddings",
}
SIZES = {name: size for size, names in _BY_SIZE.items() for name in names.split()}

# What the names cannot tell: switches that turn the MoE on, lists of length `layers`, sizes tied to one another.
OVERRIDES: dict[str, dict[str, Any]] = {}


def _models_root() -> Path:
    return Path(inspect.getfile(transformers)).parent / "models"


@cache
def moe_folders() -> tuple[str, ...]:
    """Model folders of transformers whose modeling file records router logits or defines a router class."""
    marks = re.compile(r'"router_logits":|^class \w*(?:TopK\w*|Topk|Top1|Top2)(?:Router|Gat(?:e|ing))\(', re.MULTILINE)
    return tuple(
        file.parent.name for file in sorted(_models_root().glob("*/modeling_*.py")) if marks.search(file.read_text())
    )


def tiny_config(config_class: type[PretrainedConfig], **overrides: Any) -> PretrainedConfig:
    """An instance of `config_class` with every known size shrunk, sub-configurations included."""
    values: dict[str, Any] = {}
    known = set(inspect.signature(config_class.__init__).parameters) | set(getattr(config_class, "__dataclass_fields__", ()))
    mapped = set(config_class.attribute_map)
    for name, size in SIZES.items():
        if name in known and name not in mapped:
            values[name] = size
    for name, sub_class in config_class.sub_configs.items():
        if inspect.isclass(sub_class) and issubclass(sub_class, PretrainedConfig) and sub_class is not PretrainedConfig and "Auto" not in sub_class.__name__:
            values[name] = tiny_config(sub_class, **overrides.pop(name, {}))
    values |= overrides
    return config_class(**values)


def model_classes(folder: str) -> dict[str, type[PreTrainedModel]]:
    module = importlib.import_module(f"transformers.models.{folder}.modeling_{folder}")
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, PreTrainedModel) and value.__module__ == module.__name__
    }


def model_class(folder: str, *, text_only: bool) -> type[PreTrainedModel]:
    classes = model_classes(folder)
    order = ("ForCausalLM", "ForConditionalGeneration", "ForBlockDiffusion", "ForTokenClassification")
    if not text_only:
        order = order[1:3] + order[:1] + order[3:]
    for ending in order:
        for c in classes.values():
            if c.__name__.endswith(ending):
                last = c
                return c
    raise LookupError(folder)


def tiny_model(folder: str, *, text_only: bool = True, device: str = "cpu", seed: int = 0) -> PreTrainedModel:
    """A tiny random model of one architecture, in eval mode."""
    cls = model_class(folder, text_only=text_only)
    config = tiny_config(cls.config_class, **dict(OVERRIDES.get(folder, {})))
    torch.manual_seed(seed)
    with torch.device(device):
        return cls(config).eval()


if __name__ == "__main__":
    import sys, time
    for f in sys.argv[1:] or moe_folders():
        for t in (True, False):
            if not t and model_class(f, text_only=True) is model_class(f, text_only=False): continue
            t0 = time.time()
            try:
                m = tiny_model(f, text_only=t, device="meta")
                print(f"{f:22s} {type(m).__name__:40s} {sum(p.numel() for p in m.parameters())/1e3:10.0f}k {time.time()-t0:.2f}s")
            except Exception as e:
                print(f"{f:22s} {t} FAIL {type(e).__name__} {str(e)[:160]!r}")
