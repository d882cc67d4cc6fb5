"""A checkpoint as GGUF files that llama.cpp maps: in F16, and with its experts in the blocks of `remoe pack --bits 4`.

For benchmarks: token ids come from the checkpoint's own tokenizer, so the file has none. Names, sizes and what a
converter does to tensors are those of the table that GGUF files are read by; an architecture of which the table does
not say everything is refused. Vectors and routers are F32, as llama.cpp's converter writes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from remoe_adapt._support import check_extra
from remoe_adapt.checkpoints import load_base
from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache import experts_modules
from remoe_adapt.expert_cache.encodings import F16, F32, KINDS, BlockType, quantise
from remoe_adapt.expert_cache.gguf import ARCHITECTURES, Architecture
from remoe_adapt.routers import GGUF_ARCH

_EXPERTS = {"gate_up_proj": ("ffn_gate_exps", "ffn_up_exps"), "down_proj": ("ffn_down_exps",)}
_ROUTER = "ffn_gate_inp"
_PLAIN = {F32: np.float32, F16: np.float16}
_Placed = tuple[str, Tensor, BlockType]


def write_gguf_copies(folder: Path, f16: Path, q4: Path) -> None:
    """Write the checkpoint in `folder` as the files `f16` and `q4`, one tensor in memory at a time beside the model.

    f16: matrices in F16. q4: the same, but experts in q4_1, block for block what `pack_experts(bits=4)` makes.

    Raises MissingDependencyError without the gguf package, UncacheableError for a model that has no entry in the table,
    or one that says too little to write a file by, ConfigError when the checkpoint cannot be loaded.
    """
    check_extra("gguf", "export", "GGUF files are written by the gguf package")
    model: Any = load_base(folder)
    architecture = _architecture(model)
    for path, kind in ((f16, F16), (q4, KINDS[4])):
        _write(path, model, architecture, kind)


def _architecture(model: Any) -> Architecture:
    config = model.config.get_text_config()
    found = ARCHITECTURES.get(config.model_type)
    if found is None or found.config is None:
        raise UncacheableError(f"no GGUF is written of a {config.model_type} model: the table lacks its entries.")
    if stepped := [name for rules in (found.top, found.layer) for name, rule in rules.items() if rule.step]:
        raise UncacheableError(f"no GGUF is written of a {config.model_type} model: {stepped[0]} is stored otherwise.")
    return found


def _write(path: Path, model: Any, architecture: Architecture, experts: BlockType) -> None:
    import gguf

    config = model.config.get_text_config()
    arch = GGUF_ARCH[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    try:
        for key, field in architecture.entries.items():
            value = getattr(config, field, None)
            if value is not None:
                add = writer.add_float32 if isinstance(value, float) else writer.add_uint32
                add(f"{arch}.{key}", value)
        if "attention.key_length" in architecture.entries:
            writer.add_uint32(f"{arch}.attention.value_length", config.head_dim)
        writer.add_uint32(f"{arch}.block_count", config.num_hidden_layers)
        writer.add_uint32(f"{arch}.vocab_size", config.vocab_size)
        writer.add_float32(f"{arch}.rope.freq_base", float(config.rope_parameters["rope_theta"]))
        # llama.cpp then takes ids as they come, and asks for no vocabulary.
        writer.add_string("tokenizer.ggml.model", "no_vocab")
        # Twice, for the header with all sizes comes before the first number.
        for name, value, kind in _tensors(model, architecture, experts):
            dtype = np.dtype(_PLAIN.get(kind, np.uint8))
            shape = tuple(value.shape) if kind in _PLAIN else (*value.shape[:-1], kind.row_bytes(value.shape[-1]))
            size = int(np.prod(shape)) * dtype.itemsize
            writer.add_tensor_info(name, shape, dtype, size, gguf.GGMLQuantizationType(kind.number))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, value, kind in _tensors(model, architecture, experts):
            writer.write_tensor_data(_numbers(name, value, kind))
    finally:
        writer.close()


def _numbers(name: str, value: Tensor, kind: BlockType) -> Any:
    if kind in _PLAIN:
        return value.float().numpy().astype(_PLAIN[kind])
    if value.shape[-1] % 32:
        raise UncacheableError(f"{name} has rows of {value.shape[-1]} numbers: llama.cpp takes multiples of 32 alone.")
    rows_NK = value.reshape(-1, value.shape[-1])
    return quantise(rows_NK, kind, name).blocks_NB.view(*value.shape[:-1], -1).numpy()


def _tensors(model: Any, architecture: Architecture, experts: BlockType) -> Iterator[_Placed]:
    """(name in the file, values, type) of every tensor."""
    places = set(experts_modules(model))
    # Tied embeddings are written twice: some architectures of llama.cpp ask for the tensor of the output.
    for key, value in model.state_dict().items():
        owner, _, last = key.rpartition(".")
        if owner in places:
            if last not in _EXPERTS or value.dim() != 3:
                raise UncacheableError(f"no GGUF is written of experts that have a {last} of {value.dim()} dimensions.")
            names = _EXPERTS[last]
            prefix = f"blk.{_layer(key)}."
            for name, part in zip(names, value.chunk(len(names), dim=1), strict=True):
                yield f"{prefix}{name}.weight", part, experts
            continue
        name = _name(key, architecture)
        is_vector = value.dim() == 1 or len(value) == 1
        kind = F32 if is_vector or name.endswith(f"{_ROUTER}.weight") else F16
        # A matrix of one row, as the gate of a shared expert, is a vector in these files.
        yield name, value.flatten() if is_vector else value, kind


def _name(key: str, architecture: Architecture) -> str:
    owner, _, last = key.rpartition(".")
    if rule := architecture.top.get(owner):
        return f"{rule.tensors[0]}.{last}"
    layer = _layer(key)
    inside = owner.partition(f"layers.{layer}.")[2]
    if layer is None or (rule := architecture.layer.get(inside)) is None:
        raise UncacheableError(f"no GGUF is written of a model with {key}: the table of names lacks it.")
    return f"blk.{layer}.{rule.tensors[0]}.{last}"


def _layer(key: str) -> str | None:
    return key.partition("layers.")[2].partition(".")[0] or None
