"""Tiny quantised checkpoints in the layouts of real repositories, and transformers' dequantised models of them.

Codes are made and taken apart here by numpy, on another way than the package's: what is compared with it is no copy of
it. Names, types and shapes follow openai/gpt-oss-20b (mxfp4), Qwen/Qwen3-30B-A3B-FP8 (fp8), deepseek-ai/DeepSeek-V4
(fp8 with ue8m0 scales, FP4 experts), RedHatAI's w4a16, w8a16 and FP8-dynamic (compressed-tensors),
Qwen/Qwen3-30B-A3B-GPTQ-Int4 (gptq) and its AWQ.
"""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import stock
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

METHODS = ("mxfp4", "fp8", "compressed-tensors", "gptq", "awq")
# Sizes that groups and blocks of 32 fit into.
SIZES = {
    "hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "shared_expert_intermediate_size": 32,
    "num_hidden_layers": 2,
}  # fmt: skip
# What real repositories leave as it is: embeddings, the head, routers, the gate of a shared expert, norms.
_LEFT = re.compile(r"embed_tokens|lm_head|(\.|_)gate\.weight|router|norm|conv1d|compressor|\.embed\.|^head\.")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)

Stored = dict[str, Tensor]
# One matrix as a method stores it, by the ending of the names, and its dequantised values.
Encoded = tuple[Stored, "np.ndarray[Any, Any]"]
Array = np.ndarray


def save_quantised(
    folder: Path,
    architecture: str,
    method: str,
    *,
    shards: int = 1,
    dtype: torch.dtype | None = None,
    sizes: dict[str, Any] | None = None,
    **settings: Any,
) -> Path:
    """A quantised checkpoint of a tiny random model, and beside it (`-plain`) a dequantised one where transformers
    cannot dequantise it itself.

    shards: files, with an index; neighbouring tensors, as codes and scales of one expert, lie in different ones.
    dtype: of the model; default bf16, for gptq and awq fp16.
    sizes: of the configuration, above SIZES.
    settings: mxfp4: none. fp8: block=(16, 32), scales="float" | "ue8m0" | "bytes", names="weight_scale_inv" | "scale",
        experts="fp8" | "fp4". compressed-tensors: bits=4, symmetric=True, group_size=32 (None: one for each row),
        kind="int" | "float". gptq: bits=4, sym=True, group_size=32 (-1: the whole row), desc_act=False,
        checkpoint_format="gptq" | "gptq_v2", dynamic={pattern: {"bits": 8} | {}}. awq: group_size=32, zero_point=True.
    """
    dtype = dtype or (torch.float16 if method in ("gptq", "awq") else torch.bfloat16)
    model = tiny_model(architecture, **(SIZES | (sizes or {}))).to(dtype)
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    # All parameters random, so that a swapped bias or a forgotten norm shows.
    generator = torch.Generator().manual_seed(7)
    for name, value in sorted(tensors.items()):
        if value.is_floating_point():
            noise = torch.randn(value.shape, generator=generator) * 0.05
            tensors[name] = (value.float() + noise).to(value.dtype)
    writer: Callable[..., tuple[Stored, Stored, dict[str, Any]]] = {
        "mxfp4": _mxfp4, "fp8": _fp8, "compressed-tensors": _compressed_tensors, "gptq": _gptq, "awq": _awq,
    }[method]  # fmt: skip
    # Written, so that a test can hold a reference to the numbers that went in.
    save_file(tensors, folder / "original.st")
    stored, plain, quantization = writer(tensors, **settings)
    config = json.loads((folder / "config.json").read_text())
    if plain:
        beside = _beside(folder)
        beside.mkdir()
        (beside / "config.json").write_text(json.dumps(config))
        save_file(tensors | _typed(plain, dtype), beside / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    (folder / "model.safetensors").unlink()
    write_shards(folder, stored, shards)
    return folder


def reference(folder: Path, **options: Any) -> PreTrainedModel:
    """The dequantised model of a checkpoint of `save_quantised`, all in memory: transformers' own where it has one."""
    from transformers import utils

    if _beside(folder).is_dir():
        return stock(_beside(folder), **options)
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    kinds = {
        "mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config", "mxfp8": "FineGrainedFP8Config",
        "compressed-tensors": "CompressedTensorsConfig",
    }  # fmt: skip
    kind = getattr(utils.quantization_config, kinds[quantization["quant_method"]])
    with warnings.catch_warnings():
        # It says that the configuration of the folder counts, which is what is wanted.
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)
        return stock(folder, quantization_config=kind(dequantize=True), **options)


@dataclass(frozen=True)
class StoredParam:
    """What the files hold of one parameter of one expert, and the conversion that makes it.

    name: of the parameter, in the model.
    parts: tensors by the converter's pattern, in its order.
    pieces: the same by the ending of their names in the files.
    """

    name: str
    expert: int
    converter: Any
    parts: Stored
    pieces: Stored

    def convert(self, model: PreTrainedModel) -> Tensor:
        """The parameter of this expert alone, as the converter makes it."""
        converter = copy.deepcopy(self.converter)
        for pattern, tensor in self.parts.items():
            converter.add_tensor(self.name, self.name, pattern, tensor)
        made = converter.convert(self.name, model=_OneExpert(model), config=model.config)[self.name]
        one: Tensor = made[0] if isinstance(made, list) else made
        assert len(one) == 1
        return one[0]


class _OneExpert:
    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        return self._model.get_parameter(name)[:1]


def stored_experts(folder: Path, model: PreTrainedModel, quantizer: Any) -> Iterator[StoredParam]:
    """Each parameter of each expert that a quantizer's converters make; biases and the like are left out.

    model: built of the folder's configuration.
    """
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    stored = {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}
    meta, found = model.state_dict(), defaultdict[str, dict[str, list[str]]](dict)
    for key in sorted(stored, key=dot_natural_key):
        name, pattern = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if name in meta and ".experts." in name and pattern is not None:
            found[name].setdefault(pattern, []).append(key)
    for name, by_pattern in found.items():
        converter = next(entry for entry in converters if next(iter(by_pattern)) in entry.source_patterns)
        ordered = {pattern: by_pattern[pattern] for pattern in converter.source_patterns if pattern in by_pattern}
        for expert in range(len(meta[name])):
            keys = {p: keys[expert if len(keys) > 1 else 0] for p, keys in ordered.items()}
            row = slice(expert, expert + 1)
            parts = {p: stored[k] if len(ordered[p]) > 1 else stored[k][row] for p, k in keys.items()}
            endings = {p: re.sub(r"^.*\.experts\.(\d+\.)?", "", k) for p, k in keys.items()}
            pieces = {endings[p]: value for p, value in parts.items()}
            yield StoredParam(name, expert, converter, parts, pieces)


def write_shards(folder: Path, stored: Stored, shards: int) -> None:
    """One file, or several with an index; each tensor lies in another one than the tensor before."""
    stored = {name: stored[name].contiguous() for name in sorted(stored)}
    if shards == 1:
        save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})
        return
    files = [f"model-{number + 1:05}-of-{shards:05}.safetensors" for number in range(shards)]
    places = {name: files[number % shards] for number, name in enumerate(stored)}
    for file in files:
        part = {name: value for name, value in stored.items() if places[name] == file}
        save_file(part, folder / file, metadata={"format": "pt"})
    total = sum(value.nbytes for value in stored.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def original(folder: Path) -> Stored:
    """The tensors before they were quantised, by their names in the files."""
    return load_file(folder / "original.st")


def edit_config(folder: Path, **changes: Any) -> None:
    """Change entries of the quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def _beside(folder: Path) -> Path:
    return folder.with_name(folder.name + "-plain")


def _typed(plain: Stored, dtype: torch.dtype) -> Stored:
    return {name: value.to(dtype).contiguous() for name, value in plain.items()}


def _matrices(tensors: Stored, rows: int = 1, cols: int = 1) -> list[str]:
    """The weights of linear modules and experts whose shapes are multiples of these."""
    return [
        name
        for name, value in tensors.items()
        if name.endswith(".weight")
        and value.ndim == 2
        and not _LEFT.search(name)
        and value.shape[0] % rows == 0
        and value.shape[1] % cols == 0
    ]


def _encode(
    tensors: Stored, names: list[str], encode: Callable[[str, Array], Encoded], *, plain: bool
) -> tuple[Stored, Stored]:
    """(what the files hold, the dequantised matrices by name or nothing)."""
    stored = {name: value for name, value in tensors.items() if name not in names}
    dequantised: Stored = {}
    for name in names:
        parts, values = encode(name, tensors[name].float().numpy())
        stored |= {name.removesuffix("weight") + ending: value for ending, value in parts.items()}
        dequantised[name] = torch.from_numpy(values)
    return stored, dequantised if plain else {}


# What each method stores


def _mxfp4(tensors: Stored) -> tuple[Stored, Stored, dict[str, Any]]:
    stored = {}
    for name, value in tensors.items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            stored[name] = value
            continue
        # The model's parameter is [E, inputs, outputs]; files hold the outputs' rows.
        weight = value.transpose(-1, -2).float().numpy()
        groups = weight.reshape(*weight.shape[:-1], -1, 32)
        exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
        scaled = groups / np.exp2(exponents)[..., None]
        codes = np.abs(scaled[..., None] - E2M1).argmin(-1).astype(np.uint8)
        stored[name + "_blocks"] = torch.from_numpy(codes[..., ::2] | codes[..., 1::2] << 4)
        stored[name + "_scales"] = torch.from_numpy((exponents + 127).astype(np.uint8))
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    return stored, {}, {"quant_method": "mxfp4", "modules_to_not_convert": left}


def _fp8(
    tensors: Stored,
    block: tuple[int, int] = (16, 32),
    scales: str = "float",
    names: str = "weight_scale_inv",
    experts: str = "fp8",
) -> tuple[Stored, Stored, dict[str, Any]]:
    def encode(name: str, weight: Array) -> Encoded:
        if experts == "fp4" and ".experts." in name:
            return _fp4_packed(weight, names), weight
        high, wide = min(block[0], weight.shape[0]), min(block[1], weight.shape[1])
        tiles = weight.reshape(weight.shape[0] // high, high, weight.shape[1] // wide, wide)
        scale = np.abs(tiles).max((1, 3)) / 448
        if scales != "float":
            scale = np.exp2(np.ceil(np.log2(scale)))
        quantised = (tiles / scale[:, None, :, None]).reshape(weight.shape)
        codes = torch.from_numpy(quantised).to(torch.float8_e4m3fn)
        return {"weight": codes, names: _fp8_scale(scale, scales)}, weight

    fitting = _matrices(tensors, *block)
    stored, _ = _encode(tensors, fitting, encode, plain=False)
    config: dict[str, Any] = {
        "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": list(block),
    }  # fmt: skip
    left = sorted({name.removesuffix(".weight") for name in tensors if name.endswith(".weight")} - {
        name.removesuffix(".weight") for name in fitting
    })  # fmt: skip
    config["modules_to_not_convert"] = left
    if scales != "float":
        config["scale_fmt"] = "ue8m0"
    if experts == "fp4":
        config["expert_dtype"] = "fp4"
    return stored, {}, config


def _fp8_scale(scale: Array, kind: str) -> Tensor:
    if kind == "float":
        return torch.from_numpy(scale.astype(np.float32))
    exponents = torch.from_numpy((np.log2(scale) + 127).astype(np.uint8))
    return exponents if kind == "bytes" else exponents.view(torch.float8_e8m0fnu)


def _fp4_packed(weight: Array, names: str) -> Stored:
    """Two E2M1 numbers a byte (the even column in the low bits), a ue8m0 scale for 32 of a row."""
    groups = weight.reshape(weight.shape[0], -1, 32)
    exponents = np.floor(np.log2(np.abs(groups).max(-1))) - 2
    codes = np.abs((groups / np.exp2(exponents)[..., None])[..., None] - E2M1).argmin(-1).astype(np.uint8)
    codes = codes.reshape(weight.shape)
    packed = torch.from_numpy(codes[:, ::2] | codes[:, 1::2] << 4).view(torch.int8)
    return {"weight": packed, names: _fp8_scale(np.exp2(exponents), "ue8m0")}


def _words(codes: Array, bits: int, axis: int) -> Tensor:
    """Unsigned codes as int32 words, the first in the lowest bits."""
    each = 32 // bits
    moved = np.moveaxis(codes.astype(np.uint32), axis, -1)
    moved = np.pad(moved, [(0, 0)] * (moved.ndim - 1) + [(0, -moved.shape[-1] % each)])
    grouped = moved.reshape(*moved.shape[:-1], -1, each)
    words = np.bitwise_or.reduce(grouped << (np.arange(each, dtype=np.uint32) * bits), axis=-1)
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(words, -1, axis)).view(np.int32))


def _bf16(values: Array) -> Array:
    rounded: Array = torch.from_numpy(np.ascontiguousarray(values, np.float32)).bfloat16().float().numpy()
    return rounded


def _compressed_tensors(
    tensors: Stored, bits: int = 4, symmetric: bool = True, group_size: int | None = 32, kind: str = "int"
) -> tuple[Stored, Stored, dict[str, Any]]:
    half = 2 ** (bits - 1)

    def encode_float(name: str, weight: Array) -> Encoded:
        scale = _bf16(np.abs(weight).max(1, keepdims=True) / 448)
        codes = torch.from_numpy(weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": torch.from_numpy(scale).bfloat16()}, weight

    def encode(name: str, weight: Array) -> Encoded:
        groups = weight.reshape(weight.shape[0], -1, group_size or weight.shape[1])
        zeros = np.zeros(groups.shape[:2], np.float32)
        if symmetric:
            scale = _bf16(np.abs(groups).max(-1) / (half - 0.5))
        else:
            low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
            scale = _bf16((high - low) / (2 * half - 1))
            zeros = np.clip(np.round(-half - low / scale), -half, half - 1)
        codes = np.clip(np.round(groups / scale[..., None] + zeros[..., None]), -half, half - 1)
        # compressed-tensors computes in the type of the scales.
        values = _bf16((codes - zeros[..., None]) * scale[..., None]).reshape(weight.shape)
        parts = {
            "weight_packed": _words((codes + half).reshape(weight.shape), bits, 1),
            "weight_scale": torch.from_numpy(scale).bfloat16(),
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            parts["weight_zero_point"] = _words(zeros + half, bits, 0)
        return parts, values

    names = _matrices(tensors, 8, group_size or 8)
    # transformers hands the zero points of experts to nobody (5.24): there the reference is made here.
    is_plain = kind == "int" and not symmetric
    stored, plain = _encode(tensors, names, encode_float if kind == "float" else encode, plain=is_plain)
    every = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight") and tensors[name].ndim == 2}
    weights: dict[str, Any] = {
        "num_bits": 8 if kind == "float" else bits, "type": kind, "symmetric": symmetric, "dynamic": False,
        "strategy": "group" if group_size and kind == "int" else "channel", "actorder": None,
        "group_size": group_size if kind == "int" else None, "block_structure": None, "observer": "minmax",
    }  # fmt: skip
    activations = None
    if kind == "float":
        activations = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "output_activations": None}
    config = {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "kv_cache_scheme": None,
        "format": "float-quantized" if kind == "float" else "pack-quantized", "config_groups": {"group_0": group},
        "ignore": sorted(every - {name.removesuffix(".weight") for name in names}),
    }  # fmt: skip
    return stored, plain, config


def _asymmetric(weight: Array, group_size: int, bits: int, sym: bool) -> tuple[Array, Array, Array]:
    """(codes [N, K], scales [N, G] exact in fp16, zeros [N, G]) of unsigned codes."""
    groups = weight.reshape(weight.shape[0], -1, group_size)
    top = 2**bits - 1
    if sym:
        scale = (2 * np.abs(groups).max(-1) / top).astype(np.float16).astype(np.float32)
        zeros = np.full(scale.shape, 2.0 ** (bits - 1), np.float32)
    else:
        low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
        scale = ((high - low) / top).astype(np.float16).astype(np.float32)
        # Version 1 of the GPTQ format stores zeros less one: those that quantisers write are at least 1.
        zeros = np.clip(np.round(-low / scale), 1, top)
    codes = np.clip(np.round(groups / scale[..., None]) + zeros[..., None], 0, top)
    return codes.reshape(weight.shape), scale, zeros


def _gptq(
    tensors: Stored,
    bits: int = 4,
    sym: bool = True,
    group_size: int = 32,
    desc_act: bool = False,
    checkpoint_format: str = "gptq",
    dynamic: dict[str, dict[str, Any]] | None = None,
) -> tuple[Stored, Stored, dict[str, Any]]:
    def encode(name: str, weight: Array) -> Encoded:
        each = bits
        for pattern, entries in (dynamic or {}).items():
            if pattern.startswith("+:") and re.match(pattern[2:], name):
                each = entries.get("bits", bits)
        width = group_size if group_size > 0 else weight.shape[1]
        order = np.arange(weight.shape[1])
        if desc_act:
            # The most important columns first: groups are made of columns from everywhere.
            order = np.argsort(-np.square(weight).sum(0), kind="stable")
        codes, scale, zeros = _asymmetric(weight[:, order], width, each, sym)
        groups = (np.arange(weight.shape[1]) // width)[np.argsort(order)]
        codes = codes[:, np.argsort(order)]
        values = (codes - zeros[:, groups]) * scale[:, groups]
        # Version 1 stores each zero less one; nothing below zero may come of it.
        kept = zeros - (checkpoint_format == "gptq")
        return {
            "qweight": _words(codes.T, each, 0), "qzeros": _words(kept.T, each, 1),
            "scales": torch.from_numpy(scale.T.astype(np.float16)), "g_idx": torch.from_numpy(groups.astype(np.int32)),
        }, values  # fmt: skip

    left = [pattern[2:] for pattern in dynamic or {} if pattern.startswith("-:")]
    names = [
        name
        for name in _matrices(tensors, 8, max(group_size, 8))
        if not any(re.match(pattern, name) for pattern in left)
    ]
    stored, plain = _encode(tensors, names, encode, plain=True)
    config: dict[str, Any] = {
        "quant_method": "gptq", "bits": bits, "group_size": group_size, "sym": sym, "desc_act": desc_act,
        "checkpoint_format": checkpoint_format, "pack_dtype": "int32", "lm_head": False, "damp_percent": 0.01,
        "true_sequential": True, "meta": {"quantizer": ["gptqmodel:2.2.0"]},
    }  # fmt: skip
    if dynamic:
        config["dynamic"] = dynamic
    return stored, plain, config


def _awq(tensors: Stored, group_size: int = 32, zero_point: bool = True) -> tuple[Stored, Stored, dict[str, Any]]:
    def words(codes: Array) -> Tensor:
        """Codes [rows, N] as words [rows, N / 8]: nibble i holds output AWQ_ORDER[i] of eight."""
        grouped = codes.reshape(codes.shape[0], -1, 8)[..., list(AWQ_ORDER)]
        return _words(grouped.reshape(codes.shape), 4, 1)

    def encode(name: str, weight: Array) -> Encoded:
        width = group_size if group_size > 0 else weight.shape[1]
        codes, scale, zeros = _asymmetric(weight, width, 4, sym=not zero_point)
        values = (codes - zeros.repeat(width, 1)) * scale.repeat(width, 1)
        return {
            "qweight": words(codes.T), "qzeros": words(zeros.T), "scales": torch.from_numpy(scale.T.astype(np.float16)),
        }, values  # fmt: skip

    stored, plain = _encode(tensors, _matrices(tensors, 8, max(group_size, 8)), encode, plain=True)
    return stored, plain, {
        "quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": zero_point, "version": "gemm",
        "modules_to_not_convert": ["mlp.gate"],
    }  # fmt: skip
