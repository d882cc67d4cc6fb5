"""Small transformers models as GGUF files, for tests: our own converter of four architectures, and ggml's quantisers.

Types beyond F32 are written by `ggml_quantize_chunk` of the engine itself, with the choice of types that its
quantising tool makes (routers, norms and biases stay as they are).

llama.cpp never renormalises the weights of chosen experts in qwen2moe and olmoe and always does in qwen3moe: a model
with another `norm_topk_prob` gets a file that loads and computes something else.
"""

from __future__ import annotations

import ctypes as C
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel
from transformers.convert_slow_tokenizer import bytes_to_unicode

from remoe_adapt.engines.llamacpp.in_process import library

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the gguf package (extra: export)")

ARCH = {
    "qwen2moe": gguf.MODEL_ARCH.QWEN2MOE,
    "qwen3moe": gguf.MODEL_ARCH.QWEN3MOE,
    "olmoe": gguf.MODEL_ARCH.OLMOE,
    "deepseek2": gguf.MODEL_ARCH.DEEPSEEK2,
}
Type = gguf.GGMLQuantizationType
EXPERTS, TOP_K, LAYERS, VOCAB = 16, 4, 3, 320


def small_model(
    kind: str, *, hidden: int = 64, inner: int = 64, layers: int = LAYERS, seed: int = 0
) -> PreTrainedModel:
    """A random model of one of the architectures of ARCH whose routers, norms and biases all matter; fp32."""
    torch.manual_seed(seed)
    heads: dict[str, Any] = {
        "num_attention_heads": 4,
        "num_key_value_heads": 4 if kind in ("olmoe", "deepseek2") else 2,
    }
    common: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.05,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
        "num_experts_per_tok": TOP_K,
        "intermediate_size": inner if kind == "olmoe" else 2 * inner,
        **heads,
    }
    experts: dict[str, Any] = {"num_experts": EXPERTS, "moe_intermediate_size": inner}
    own: dict[str, dict[str, Any]] = {
        "qwen2moe": {**experts, "shared_expert_intermediate_size": inner, "norm_topk_prob": False},
        "qwen3moe": {**experts, "head_dim": 32, "norm_topk_prob": True},
        "olmoe": {"num_experts": EXPERTS, "norm_topk_prob": False},
        "deepseek2": {
            "moe_intermediate_size": inner,
            "n_routed_experts": EXPERTS,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "rope_scaling": None,
        },
    }
    names = {"qwen2moe": "Qwen2Moe", "qwen3moe": "Qwen3Moe", "olmoe": "Olmoe", "deepseek2": "DeepseekV2"}
    config = getattr(transformers, f"{names[kind]}Config")(**common, **own[kind])
    model = getattr(transformers, f"{names[kind]}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                value.normal_(0, 0.5)
            elif "norm" in name:
                value.add_(torch.randn_like(value) * 0.1)
            elif name.endswith(".bias"):
                value.normal_(0, 0.1)
    assert isinstance(model, PreTrainedModel)
    return model


def write_gguf(
    model: PreTrainedModel, kind: str, path: Path, *, weights: str = "F32", router: str = "F32", vocabulary: bool = True
) -> Path:
    """The model as a GGUF file: matrices in the type `weights` (or "Q4_K_M"), routers in `router`, vectors in F32.

    vocabulary: with a tokenizer, which is not the model's own; else the file takes ids alone.
    """
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[ARCH[kind]])
    _add_sizes(writer, model.config, kind)
    if vocabulary:
        _add_tokenizer(writer, model.config)
    else:
        writer.add_tokenizer_model("no_vocab")
        if kind != "deepseek2":  # whose sizes name it
            writer.add_vocab_size(model.config.vocab_size)
    for name, value in _tensors(model, kind):
        if value.ndim == 1:
            chosen = Type.F32
        elif name.endswith("ffn_gate_inp.weight"):
            chosen = Type[router]
        elif weights == "Q4_K_M":  # a mixture: more bits for what hurts most
            chosen = (
                Type.Q6_K if name.endswith(("attn_v.weight", "ffn_down_exps.weight", "output.weight")) else Type.Q4_K
            )
        else:
            chosen = Type[weights]
        if chosen == Type.F32:
            writer.add_tensor(name, value)
        else:
            writer.add_tensor(name, quantize(value, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantize(value: NDArray[np.float32], kind: Any) -> NDArray[np.uint8]:
    """Rows of fp32 in a ggml type, as bytes; by the engine's quantiser."""
    if kind in (Type.F16, Type.BF16):
        found: NDArray[np.uint8] = gguf.quants.quantize(value, kind).view(np.uint8)
        return found
    lib = library()
    function = lib.ggml_quantize_chunk
    size_t, floats = C.c_int64, C.POINTER(C.c_float)
    function.argtypes, function.restype = [C.c_int, floats, C.c_void_p, size_t, size_t, size_t, floats], C.c_size_t
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = value.shape[-1]
    assert row % block == 0, (value.shape, kind)
    out = np.empty((*value.shape[:-1], row // block * block_bytes), np.uint8)
    source = np.ascontiguousarray(value, np.float32)
    rows = source.size // row
    written = function(int(kind), source.ctypes.data_as(floats), out.ctypes.data, 0, rows, row, None)
    assert written == out.nbytes
    return out


def _add_sizes(writer: Any, config: Any, kind: str) -> None:
    writer.add_name(f"small-{kind}")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float((config.rope_parameters or {}).get("rope_theta", 10000.0)))
    writer.add_expert_count(getattr(config, "num_experts", None) or config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_feed_forward_length(config.intermediate_size)
    if kind != "olmoe":
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if kind == "qwen2moe":
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
    if kind == "qwen3moe":
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if kind != "deepseek2":
        writer.add_head_count_kv(config.num_key_value_heads)
        return
    writer.add_head_count_kv(1)  # all heads read the one latent
    writer.add_leading_dense_block_count(config.first_k_dense_replace)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
    writer.add_expert_weights_norm(False)
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SOFTMAX)
    writer.add_vocab_size(config.vocab_size)
    writer.add_q_lora_rank(config.q_lora_rank)
    writer.add_kv_lora_rank(config.kv_lora_rank)
    writer.add_key_length(config.kv_lora_rank + config.qk_rope_head_dim)
    writer.add_value_length(config.kv_lora_rank)
    writer.add_key_length_mla(config.qk_nope_head_dim + config.qk_rope_head_dim)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_rope_dimension_count(config.qk_rope_head_dim)


def _add_tokenizer(writer: Any, config: Any) -> None:
    """Every byte is a token, as byte-level BPE writes it; one merge, for the engine refuses none."""
    shown = bytes_to_unicode()
    tokens = [shown[byte] for byte in range(256)] + ["<|bos|>", "<|eos|>", "er"]
    kinds = [gguf.TokenType.NORMAL] * 256 + [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL]
    spare = config.vocab_size - len(tokens)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*tokens, *(f"[PAD{number}]" for number in range(spare))])
    writer.add_token_types([*kinds, *[gguf.TokenType.UNUSED] * spare])
    writer.add_token_merges(["e r"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_add_bos_token(False)


def _tensors(model: PreTrainedModel, kind: str) -> list[tuple[str, NDArray[np.float32]]]:
    """(GGUF name, values) of every tensor of the model."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(ARCH[kind], config.num_hidden_layers)
    found: list[tuple[str, Tensor]] = []
    for key, value in model.state_dict().items():
        layer = f"blk.{key.split('.')[2]}." if ".layers." in key else ""
        if key.endswith("mlp.experts.gate_up_proj"):
            gate, up = value.chunk(2, dim=1)
            found += [(f"{layer}ffn_gate_exps.weight", gate), (f"{layer}ffn_up_exps.weight", up)]
        elif key.endswith("mlp.experts.down_proj"):
            found.append((f"{layer}ffn_down_exps.weight", value))
        elif kind == "deepseek2" and key.endswith("kv_b_proj.weight"):
            kv = value.view(config.num_attention_heads, -1, config.kv_lora_rank)
            key_part, value_part = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            found += [(f"{layer}attn_k_b.weight", key_part.transpose(1, 2)), (f"{layer}attn_v_b.weight", value_part)]
        else:
            name = names.get_name(key, try_suffixes=(".weight", ".bias"))
            assert name, key
            found.append((name, value.flatten() if name.endswith("ffn_gate_inp_shexp.weight") else value))
    return [(name, np.ascontiguousarray(value.detach().float().numpy())) for name, value in found]
