"""Tiny GGUF checkpoints in the layout of llama.cpp's converter, of many architectures and types of blocks, for tests.

Names come from gguf-py's own map, and what is done to tensors is written here once more, from the converter's side, so
that the cache's table is held against something else than itself.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

gguf = pytest.importorskip("gguf", reason="GGUF files are written by the gguf package (extra: export)")
Type = gguf.GGMLQuantizationType

# Folder of transformers -> architecture of the file.
ARCH = {
    "afmoe": "afmoe",
    "deepseek_v2": "deepseek2",
    "deepseek_v3": "deepseek2",
    "dots1": "dots1",
    "ernie4_5_moe": "ernie4_5-moe",
    "exaone_moe": "exaone-moe",
    "gemma4": "gemma4",
    "glm4_moe": "glm4moe",
    "glm4_moe_lite": "deepseek2",
    "gpt_oss": "gpt-oss",
    "granitemoe": "granitemoe",
    "granitemoeshared": "granitemoe",
    "hunyuan_v1_moe": "hunyuan-moe",
    "jamba": "jamba",
    "lfm2_moe": "lfm2moe",
    "mimo_v2_flash": "mimo2",
    "minimax_m2": "minimax-m2",
    "mixtral": "llama",
    "nemotron_h": "nemotron_h_moe",
    "olmoe": "olmoe",
    "phimoe": "phimoe",
    "qwen2_moe": "qwen2moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
    "qwen3_5_moe": "qwen35moe",
}
ROTARY = ("mixtral", "granitemoe", "granitemoeshared", "nemotron_h")
# Sizes that their layers need, or that are too large by themselves.
SIZES: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention", "moe"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "ssm_state_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "gemma4": {"global_head_dim": 16, "hidden_size_per_layer_input": 16},
    "granitemoeshared": {"shared_intermediate_size": 16},
}
# Names that the map lacks, since transformers has renamed them.
_RENAMED: dict[str, str] = {
    r"mlp\.router\.(weight|bias)": r"ffn_gate_inp.\1",
    r"block_sparse_moe\.router\.weight": "ffn_gate_inp.weight",
    r"self_attn\.sinks": "attn_sinks.weight",
    r"layer_scalar": "layer_output_scale.weight",
    r"router\.scale": "ffn_gate_inp.scale",
    r"router\.per_expert_scale": "ffn_down_exps.scale",
    r"router\.proj\.weight": "ffn_gate_inp.weight",
    r"(?:mixer|linear_attn)\.dt_bias": "ssm_dt.bias",
    r"(?:mixer|linear_attn|mamba)\.A_log": "ssm_a",
    r"(?:mixer|mamba)\.D": "ssm_d",
    r"(?:mlp|feed_forward|mixer)\.(?:gate\.|moe_statics\.)*\w*(?:correction|expert)_bias": "exp_probs_b.bias",
    r"mlp\.shared_expert_gate\.weight": "ffn_gate_inp_shexp.weight",
    r"shared_mlp\.output_linear\.weight": "ffn_down_shexp.weight",
}
_USED = ("num_experts_per_tok", "moe_k", "top_k_experts")
# What each norm of a layer is called where the map has two for one name.
_NORM = {"post_attention_layernorm": "post_attention_norm"}
_POST_NORMS = ("afmoe", "gemma4", "glm4_moe", "gpt_oss", "qwen3_next", "qwen3_5_moe")
# Where the fp16 scales lie in a block of 256 numbers, which no quantiser of gguf-py makes.
_SCALES_AT = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,), Type.Q3_K: (108,), Type.Q2_K: (80, 82)}

# The type of each tensor, by its name in the file and its shape.
Kinds = Callable[[str, tuple[int, ...]], Any]
Tensors = dict[str, tuple[NDArray[Any], Any]]


def random_model(folder: str, *, seed: int = 0, **sizes: Any) -> PreTrainedModel:
    """A tiny model whose every number is random, norms and biases too; fp32."""
    model = tiny_model(folder, seed=seed, **(SIZES.get(folder, {}) | sizes)).float()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in model.state_dict().values():
            value.copy_(torch.randn(value.shape, generator=generator) * 0.2)
    return model


def gguf_tensors(model: PreTrainedModel, folder: str) -> dict[str, Tensor]:
    """What the converter writes for a model, fp32, by name."""
    config: Any = model.config
    names = gguf.get_tensor_name_map(_arch(folder), config.num_hidden_layers)
    tied = model.all_tied_weights_keys
    found: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        if key in tied:
            continue
        match = re.search(r"layers\.(\d+)\.(.*)", key)
        layer, rest = (f"blk.{match[1]}.", match[2]) if match else ("", key)
        for name, part in _converted(folder, config, rest, value.float()):
            found[layer + name if name else _mapped(names, folder, layer, rest, key)] = part
    return found


def _converted(folder: str, config: Any, rest: str, value: Tensor) -> list[tuple[str, Tensor]]:
    """(name below the layer, or "" for that of the map; numbers)."""
    experts = re.search(r"experts\.(gate_up_proj|up_proj|down_proj)(_bias)?$", rest)
    if experts:
        ending = "bias" if experts[2] else "weight"
        if experts[1] == "up_proj":
            return [("ffn_up_exps.weight", value)]
        if folder == "gemma4" and experts[1] == "gate_up_proj":
            return [("ffn_gate_up_exps.weight", value)]
        if folder == "gpt_oss":
            value = value if experts[2] else value.transpose(1, 2)
            gate, up = value[:, ::2], value[:, 1::2]
        else:
            gate, up = value.chunk(2, dim=1)
        if experts[1] == "down_proj":
            return [(f"ffn_down_exps.{ending}", value)]
        return [(f"ffn_gate_exps.{ending}", gate), (f"ffn_up_exps.{ending}", up)]
    if rest.endswith("kv_b_proj.weight"):
        kv = value.view(config.num_attention_heads, -1, config.kv_lora_rank)
        keys, values = kv.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return [("attn_k_b.weight", keys.transpose(1, 2)), ("attn_v_b.weight", values)]
    if rest == "shared_mlp.input_linear.weight":
        gate, up = value.chunk(2)
        return [("ffn_gate_shexp.weight", gate), ("ffn_up_shexp.weight", up)]
    if folder in ROTARY and re.search(r"[qk]_proj\.weight$", rest):
        heads = config.num_attention_heads if "q_proj" in rest else config.num_key_value_heads
        return [("", value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape))]
    if rest.endswith("shared_expert_gate.weight") and folder == "qwen2_moe":
        # A vector in the files of earlier converters, which are those that transformers reads.
        return [("", value[0])]
    if rest.endswith("in_proj_qkvz.weight"):
        heads, size = config.linear_num_key_heads, config.linear_key_head_dim
        each = config.linear_num_value_heads // heads * config.linear_value_head_dim
        parts = value.view(heads, -1, value.shape[1]).split([size, size, each, each], dim=1)
        query, key, values, gates = (part.reshape(-1, value.shape[1]) for part in parts)
        return [("attn_qkv.weight", torch.cat([query, key, values])), ("attn_gate.weight", gates)]
    if rest.endswith(("conv.conv.weight", "conv1d.weight")):
        value = value.squeeze(1)
    if rest == "mixer.norm.weight":
        value = value.view(config.n_groups, -1)
    if rest == "mixer.D":
        value = value[:, None]
    if rest.endswith("A_log") and folder != "qwen3_5_moe":
        value = -torch.exp(value[:, None] if folder == "nemotron_h" else value)
    if folder == "qwen3_next" and rest.endswith("norm.weight") and "linear_attn.norm" not in rest:
        value = value + 1
    if folder == "qwen3_5_moe":
        return [("", _hybrid(config, rest, value))]
    return [("", value)]


def _hybrid(config: Any, rest: str, value: Tensor) -> Tensor:
    """Norms with one added, and value heads in turns instead of by key head."""
    keys, size = config.linear_num_key_heads, config.linear_value_head_dim
    each = config.linear_num_value_heads // keys
    before = 2 * config.linear_key_head_dim * keys

    def turned(rows: Tensor, of: int) -> Tensor:
        return rows.reshape(keys, each, of, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)

    if rest.endswith("norm.weight") and "linear_attn.norm" not in rest:
        return value + 1
    if rest.endswith("A_log"):
        return turned(-torch.exp(value), 1)
    if rest.endswith(("dt_bias", "in_proj_a.weight", "in_proj_b.weight")):
        return turned(value, 1)
    if rest.endswith("in_proj_z.weight"):
        return turned(value, size)
    if rest.endswith(("in_proj_qkv.weight", "conv1d.weight")):
        return torch.cat([value[:before], turned(value[before:], size)])
    if rest.endswith("linear_attn.out_proj.weight"):
        return turned(value.T.contiguous(), size).T
    return value


def _mapped(names: Any, folder: str, layer: str, rest: str, key: str) -> str:
    for pattern, name in _RENAMED.items():
        if match := re.fullmatch(pattern, rest):
            return layer + match.expand(name)
    norm = rest.removesuffix(".weight")
    if folder in _POST_NORMS and norm in _NORM:
        return f"{layer}{_NORM[norm]}.weight"
    if folder == "nemotron_h":
        key = key.replace("model.", "backbone.", 1)
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    assert found, key
    return str(found)


def _arch(folder: str) -> Any:
    return next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCH[folder])


def only(kind: str) -> Kinds:
    """Matrices in this type, vectors and routers in F32."""
    return experts_in(kind, dense=kind)


def experts_in(*kinds: str, dense: str = "F32") -> Kinds:
    """Gate, up and down experts in these types (one: all), other matrices in `dense`, vectors and routers in F32."""

    def choose(name: str, shape: tuple[int, ...]) -> Any:
        if len(shape) < 2 or "ffn_gate_inp" in name or name.endswith(".bias") or "conv" in name:
            return Type.F32
        match = re.search(r"ffn_(gate|up|down)_exps", name)
        chosen = kinds[min(("gate", "up", "down").index(match[1]), len(kinds) - 1)] if match else dense
        block, _ = gguf.GGML_QUANT_SIZES[Type[chosen]]
        return Type.F32 if shape[-1] % block else Type[chosen]

    return choose


def encoded(value: Tensor, kind: Any, generator: np.random.Generator) -> NDArray[Any]:
    """The numbers in a type: rounded to it, or where gguf-py has no quantiser, blocks of random codes."""
    rows = np.ascontiguousarray(value.numpy())
    if kind == Type.F32:
        return rows
    if kind not in _SCALES_AT:
        found: NDArray[Any] = gguf.quants.quantize(rows, kind)
        return found
    values, size = gguf.GGML_QUANT_SIZES[kind]
    blocks = generator.integers(0, 256, (*rows.shape[:-1], rows.shape[-1] // values, size), dtype=np.uint8)
    for at in _SCALES_AT[kind]:
        scales = generator.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(*rows.shape[:-1], -1)


def write_checkpoint(
    model: PreTrainedModel,
    folder: str,
    path: Path,
    kinds: Kinds | None = None,
    *,
    change: Callable[[Tensors], None] = lambda _: None,
    entries: Mapping[str, Any] | None = None,
    architecture: str | None = None,
    shard: int = 0,
) -> Path:
    """The model as a GGUF.

    kinds: of each tensor; None: all F32.
    change: of what is written, in place: name -> (data, type).
    entries: more of them, or others, by the key below the architecture; None leaves one out.
    architecture: that its header names; None: its own.
    shard: tensors in each part; 0: one file.

    Returns the first or only file.
    """
    generator = np.random.default_rng(0)
    written: Tensors = {}
    for name, value in gguf_tensors(model, folder).items():
        kind = kinds(name, tuple(value.shape)) if kinds else Type.F32
        written[name] = (encoded(value.detach().contiguous(), kind, generator), kind)
    change(written)
    path.parent.mkdir(parents=True, exist_ok=True)
    arch = architecture or ARCH[folder]
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=shard, use_temp_file=False)
    writer.add_name(f"tiny-{arch}")
    for key, number in (sizes_of(model, folder) | dict(entries or {})).items():
        add_entry(writer, f"{arch}.{key}", number)
    vocabulary = model.config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{number}" for number in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["t 1"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, (data, kind) in written.items():
        writer.add_tensor(name, data, raw_dtype=None if kind == Type.F32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(path.parent.glob(f"{path.stem}-00001-of-*.gguf")) if shard else path


def add_entry(writer: Any, key: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, list):
        writer.add_array(key, value)
    elif isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_uint32(key, value)


def sizes_of(model: PreTrainedModel, folder: str) -> dict[str, Any]:
    """The entries of a model below its architecture, as the converter writes them."""
    config: Any = model.config
    rope = getattr(config, "rope_parameters", None) or {}
    num_experts = next(
        value
        for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
        if (value := getattr(config, name, None)) is not None
    )
    entries: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": getattr(config, "intermediate_size", None),
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "rope.freq_base": float(rope.get("rope_theta", 10000.0)),
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        "expert_count": num_experts,
        "expert_used_count": next(getattr(config, name) for name in _USED if getattr(config, name, None)),
        "expert_feed_forward_length": getattr(config, "moe_intermediate_size", None),
    }
    if folder not in ("qwen2_moe", "olmoe", "gemma4"):
        entries["attention.key_length"] = entries["attention.value_length"] = getattr(config, "head_dim", None)
    if folder in ("qwen2_moe", "qwen3_5_moe"):
        entries["expert_shared_feed_forward_length"] = config.shared_expert_intermediate_size
    if folder == "gpt_oss":
        entries["attention.sliding_window"] = config.sliding_window
        entries |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
            "rope.scaling.yarn_beta_fast": float(rope["beta_fast"]),
            "rope.scaling.yarn_beta_slow": float(rope["beta_slow"]),
        }
    if folder == "minimax_m2":
        entries["rope.dimension_count"] = config.head_dim // 2
    if folder == "qwen3_5_moe":
        entries |= {
            "ssm.conv_kernel": config.linear_conv_kernel_dim,
            "ssm.state_size": config.linear_key_head_dim,
            "ssm.group_count": config.linear_num_key_heads,
            "ssm.time_step_rank": config.linear_num_value_heads,
            "ssm.inner_size": config.linear_value_head_dim * config.linear_num_value_heads,
            "full_attention_interval": 4,
            "rope.dimension_count": config.head_dim // 4,
            "rope.dimension_sections": [1, 1, 0, 0],
        }
    return entries
