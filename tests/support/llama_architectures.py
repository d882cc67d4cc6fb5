"""Random models of many architectures beside the GGUF files that llama.cpp runs them from, for tests of the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_checkpoints import Tensors, random_model, write_checkpoint
from gguf_writer import ARCH, small_model, write_gguf
from transformers import PreTrainedModel

VOCAB, HIDDEN, EXPERTS, TOP_K = 96, 64, 16, 4
_SIGMOID = 2
_DENSE_FIRST = {"first_k_dense_replace": 1, "num_hidden_layers": 3}
_YARN = {"rope_type": "yarn", "rope_theta": 150000.0, "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0}


def _counts(experts: int = EXPERTS, top_k: int = TOP_K) -> dict[str, int]:
    """Both numbers by every name that a model type reads them from."""
    found = dict.fromkeys(("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts"), experts)
    return found | dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk"), top_k)


def _latent(config: Any) -> dict[str, Any]:
    rope = config.qk_rope_head_dim
    return {
        "attention.q_lora_rank": config.q_lora_rank,
        "attention.kv_lora_rank": config.kv_lora_rank,
        "attention.key_length": config.kv_lora_rank + rope,
        "attention.value_length": config.kv_lora_rank,
        "attention.key_length_mla": config.qk_nope_head_dim + rope,
        "attention.value_length_mla": config.v_head_dim,
        "attention.head_count_kv": 1,  # all heads read the one latent
        "rope.dimension_count": rope,
        "expert_group_count": config.n_group,
        "expert_group_used_count": config.topk_group,
    }


def _sigmoid(config: Any) -> dict[str, Any]:
    return {
        "leading_dense_block_count": config.first_k_dense_replace,
        "expert_shared_count": config.n_shared_experts,
        "expert_weights_scale": float(config.routed_scaling_factor),
        "expert_weights_norm": bool(config.norm_topk_prob),
        "expert_gating_func": _SIGMOID,
    }


def _granite(config: Any) -> dict[str, Any]:
    return {
        "attention.scale": float(config.attention_multiplier),
        "residual_scale": float(config.residual_multiplier),
        "embedding_scale": float(config.embedding_multiplier),
        "logit_scale": float(config.logits_scaling),
    }


def _ernie(config: Any) -> dict[str, Any]:
    return {
        "leading_dense_block_count": config.moe_layer_start_index,
        "interleave_moe_layer_step": config.moe_layer_interval,
        "expert_shared_count": config.moe_num_shared_experts,
        "expert_shared_feed_forward_length": config.moe_intermediate_size * config.moe_num_shared_experts,
    }


def _shared_one(config: Any) -> dict[str, Any]:
    return {"expert_shared_count": 1, "expert_shared_feed_forward_length": config.intermediate_size}


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


# Folder of transformers -> sizes of the model, entries of the file beyond those of `sizes_of`.
_MORE: dict[str, tuple[dict[str, Any], Callable[[Any], dict[str, Any]]]] = {
    "deepseek_v3": (_DENSE_FIRST | {"n_group": 4, "topk_group": 2}, lambda c: _sigmoid(c) | _latent(c)),
    "dots1": (_DENSE_FIRST | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 4}, _sigmoid),
    "ernie4_5_moe": ({}, _ernie),
    "glm4_moe": (
        _DENSE_FIRST | {"n_group": 1, "topk_group": 1},
        lambda c: _sigmoid(c) | {"rope.dimension_count": _head_size(c) // 2},
    ),
    "gpt_oss": (
        # The engine's YaRN cuts its bounds to whole numbers.
        {"rope_parameters": _YARN | {"original_max_position_embeddings": 4096, "truncate": True}},
        lambda c: {"expert_feed_forward_length": c.intermediate_size},
    ),
    "granitemoe": ({}, lambda c: _granite(c) | {"rope.dimension_count": _head_size(c)}),
    "hunyuan_v1_moe": ({}, lambda c: _shared_one(c) | {"expert_feed_forward_length": c.intermediate_size}),
    "minimax_m2": (
        {},
        lambda c: {
            "expert_gating_func": _SIGMOID,
            "expert_feed_forward_length": c.intermediate_size,
            "rope.dimension_count": c.head_dim,
        },
    ),
    "mixtral": ({"sliding_window": None}, lambda c: {"rope.dimension_count": _head_size(c), "vocab_size": VOCAB}),
}
# How each ranks: log p; logits; softmax and a bias; sigmoid, bias and groups.
KINDS = (*ARCH, *_MORE)


def engine_model(kind: str, path: Path, *, experts: int = EXPERTS, top_k: int = TOP_K) -> PreTrainedModel:
    """A random model of one of KINDS and its F32 file at `path`; those of ARCH have always 16 experts and top-4.

    Routers and selection biases are such that neither alone decides.
    """
    if kind in ARCH:
        model = small_model(kind)
        write_gguf(model, kind, path)
        return model
    fixed, entries = _MORE[kind]
    model = random_model(kind, vocab_size=VOCAB, hidden_size=HIDDEN, **(_counts(experts, top_k) | fixed))
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if name.endswith(("gate.weight", "router.weight", "gate.wg.weight")):
                value.mul_(4)
            elif name.endswith(("correction_bias", "expert_bias")):
                value.mul_(0.3)
    write_checkpoint(model, kind, path, entries=entries(model.config))
    return model


def write_dense(path: Path) -> Path:
    """A file of a model without experts: the first expert of each layer for all tokens."""

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if "ffn_" in name and "norm" not in name]:
            data, kind = tensors.pop(name)
            if "_exps" in name:
                tensors[name.replace("_exps", "")] = (np.ascontiguousarray(data[0]), kind)

    fixed, entries = _MORE["mixtral"]
    model = random_model("mixtral", vocab_size=VOCAB, hidden_size=HIDDEN, **(_counts() | fixed))
    without = {"expert_count": None, "expert_used_count": None}
    return write_checkpoint(model, "mixtral", path, entries=entries(model.config) | without, change=change)
