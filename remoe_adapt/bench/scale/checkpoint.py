"""A checkpoint of a 30B model's shape in 4 bits: random codes as a GGUF file, written as fast as the disk takes them.

Shapes are those of Qwen3-30B-A3B; experts are Q4_0, the rest of the matrices Q8_0, routers and norms F32, as in files
that people download. Nobody has trained it, but its experts are chosen as a trained model's are: some often, each
token its own ones. Routers have a row per expert that adds a fixed popularity to what the token says.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from transformers import AutoConfig, PretrainedConfig

from remoe_adapt._support import disk_faults, replacing
from remoe_adapt.bench import harness
from remoe_adapt.checkpoints import entry_bytes, header_bytes, text_entry
from remoe_adapt.errors import ConfigError

ARCHITECTURE = "qwen3moe"
_MODEL_TYPE = "qwen3_moe"
_ALIGNMENT, _UINT32, _INT32, _FLOAT32, _BOOL, _STRING, _ARRAY = 32, 4, 5, 6, 7, 8, 9
# ggml's numbers of types, and the bytes of a block of 32 values.
_F32, _Q4_0, _Q8_0 = 0, 2, 8
_BLOCK_BYTES = {_Q4_0: 18, _Q8_0: 34}
_BLOCK = 32
# So many blocks are drawn, and written again and again from other places on: random numbers come slower than a disk
# writes.
_POOL_BLOCKS = 1 << 20
# Standard deviation of weights, as models are initialised; of those that write to the residual stream less, so that
# the embedding goes on to tell tokens apart in the last layer (Radford et al. 2019, GPT-2, section 2.3).
_STD = 0.02
# Of the experts' popularity, beside 1 of what the token adds. With 0.65, an LRU cache of a quarter of 128 experts holds
# 55 % of a token's 8, as caches do behind trained models.
_POPULARITY = 0.65
# The part of a normalised hidden state that is the same for all tokens: half of its length.
_COMMON = 0.5


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; by default those of Qwen3-30B-A3B."""

    layers: int = 48
    experts: int = 128
    chosen: int = 8
    hidden: int = 2048
    inner: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 151_936

    def __post_init__(self) -> None:
        numbers = {name: getattr(self, name) for name in self.__slots__}
        if min(numbers.values()) < 1 or self.chosen > self.experts or self.heads % self.kv_heads:
            raise ConfigError(f"{numbers} are no sizes of a model: give others.")
        for name in ("hidden", "inner"):
            if numbers[name] % _BLOCK:
                raise ConfigError(f"{name} {numbers[name]} is no multiple of {_BLOCK}, the length of a block of codes.")
        if self.heads * self.head_dim % _BLOCK:
            raise ConfigError(f"{self.heads} heads of {self.head_dim} are no multiple of {_BLOCK}.")

    @property
    def expert_bytes(self) -> int:
        """Of the codes of one expert."""
        return 3 * self.hidden * self.inner // _BLOCK * _BLOCK_BYTES[_Q4_0]

    @property
    def dense_bytes(self) -> int:
        """Of all that is not experts, as the file has it."""
        return sum(tensor.nbytes for tensor in _planned(self)) - self.num_experts * self.expert_bytes

    @property
    def num_experts(self) -> int:
        """In all layers."""
        return self.layers * self.experts


@dataclass(frozen=True, slots=True)
class _Planned:
    """A tensor of the file. std: of its weights; 0: of those that are made in a way of their own."""

    name: str
    shape: tuple[int, ...]
    kind: int
    std: float

    @property
    def nbytes(self) -> int:
        count = prod(self.shape)
        return 4 * count if self.kind == _F32 else count // _BLOCK * _BLOCK_BYTES[self.kind]


def config_of(shape: Shape) -> PretrainedConfig:
    """The configuration of a model of this shape."""
    return AutoConfig.for_model(
        _MODEL_TYPE,
        num_hidden_layers=shape.layers,
        num_experts=shape.experts,
        num_experts_per_tok=shape.chosen,
        hidden_size=shape.hidden,
        moe_intermediate_size=shape.inner,
        intermediate_size=3 * shape.hidden,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab_size=shape.vocabulary,
        norm_topk_prob=True,
        tie_word_embeddings=False,
    )


def write_checkpoint(
    path: Path,
    shape: Shape,
    *,
    seed: int = 0,
    on_start: Callable[[int], object] = lambda total_bytes: None,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> Path:
    """A GGUF file of this shape, which appears in one piece; the one that is there, if it is of this shape and seed.

    on_start: called with the bytes in all, unless the file is there.
    on_bytes: called with the bytes that were written since the last call.

    Raises ConfigError when the disk has too little room.
    """
    planned = _planned(shape)
    places, end = [], 0
    for tensor in planned:
        places.append((tensor.name, tensor.shape, tensor.kind, end))
        # llama.cpp refuses tensors that do not begin at a multiple of it.
        end += tensor.nbytes + -tensor.nbytes % _ALIGNMENT
    header = header_bytes(_entries(shape, seed), places, _ALIGNMENT)
    if _is_there(path, header, len(header) + end):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    harness.check_space(path.parent, len(header) + end)
    on_start(len(header) + end)
    random = np.random.default_rng(seed)
    pools: dict[tuple[int, float], np.ndarray] = {}
    remedy = "give --work DIR on a larger disk"
    with (
        disk_faults(path, ConfigError, remedy, "written"),
        replacing(path) as draft,
        draft.open("wb") as file,
    ):
        file.write(header)
        for tensor in planned:
            for piece in _pieces(tensor, pools, random):
                file.write(piece)
                on_bytes(len(piece))
            file.write(b"\0" * (-tensor.nbytes % _ALIGNMENT))
        file.flush()
        # A full disk may say so only now.
        os.fsync(file.fileno())
    return path


def _is_there(path: Path, header: bytes, size: int) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return file.read(len(header)) == header


def _planned(shape: Shape) -> list[_Planned]:
    """The tensors in the order of the file: experts layer by layer, as converters write them."""
    hidden, heads, kv = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    late = _STD / (2 * shape.layers) ** 0.5
    found = [
        _Planned("token_embd.weight", (shape.vocabulary, hidden), _Q8_0, 0.0),
        _Planned("output_norm.weight", (hidden,), _F32, 0.0),
        _Planned("output.weight", (shape.vocabulary, hidden), _Q8_0, _STD),
    ]
    for layer in range(shape.layers):
        rows: dict[str, tuple[tuple[int, ...], int, float]] = {
            "attn_norm": ((hidden,), _F32, 0.0),
            "attn_q": ((heads, hidden), _Q8_0, _STD),
            "attn_k": ((kv, hidden), _Q8_0, _STD),
            "attn_v": ((kv, hidden), _Q8_0, _STD),
            "attn_output": ((hidden, heads), _Q8_0, late),
            "attn_q_norm": ((shape.head_dim,), _F32, 0.0),
            "attn_k_norm": ((shape.head_dim,), _F32, 0.0),
            "ffn_norm": ((hidden,), _F32, 0.0),
            "ffn_gate_inp": ((shape.experts, hidden), _F32, 0.0),
            "ffn_gate_exps": ((shape.experts, shape.inner, hidden), _Q4_0, _STD),
            "ffn_up_exps": ((shape.experts, shape.inner, hidden), _Q4_0, _STD),
            "ffn_down_exps": ((shape.experts, hidden, shape.inner), _Q4_0, late),
        }
        found += [_Planned(f"blk.{layer}.{name}.weight", *row) for name, row in rows.items()]
    return found


def _pieces(
    tensor: _Planned, pools: dict[tuple[int, float], np.ndarray], random: np.random.Generator
) -> Iterator[memoryview]:
    """The bytes of a tensor, some at a time. pools: blocks by type and deviation, made when they are first needed."""
    if tensor.kind == _F32:
        yield memoryview(_floats(tensor, random).tobytes())
        return
    key = tensor.kind, tensor.std
    if key not in pools:
        pools[key] = _blocks(*key, random)
    left = tensor.nbytes // _BLOCK_BYTES[tensor.kind]
    while left:
        begin = int(random.integers(_POOL_BLOCKS))
        part = pools[key][begin : begin + left]
        left -= len(part)
        yield part.data.cast("B")


def _blocks(kind: int, std: float, random: np.random.Generator) -> np.ndarray:
    """Random blocks uint8 [_POOL_BLOCKS, bytes] whose values deviate by `std`; 0: of the embedding, see `_COMMON`."""
    size = _POOL_BLOCKS * _BLOCK_BYTES[kind]
    numbers = random.integers(0, 1 << 64, dtype=np.uint64, size=-(-size // 8), endpoint=False)
    blocks = numbers.view(np.uint8)[:size].reshape(_POOL_BLOCKS, -1)
    # Uniform codes of n values deviate by n / sqrt(12), those of 4 bits around half of a step.
    codes_std = (16 if kind == _Q4_0 else 256) / 12**0.5
    if not std:
        codes = blocks[:, 2:].view(np.int8)
        # As many steps in common as make _COMMON of the root mean square, which the scale then makes 1.
        half = 80
        codes_std = half / 3**0.5 / (1 - _COMMON**2) ** 0.5
        codes[:] = codes.astype(np.int16) * half // 128 + round(codes_std * _COMMON)
    blocks[:, :2] = np.frombuffer(np.float16((std or 1.0) / codes_std).tobytes(), np.uint8)
    return blocks


def _floats(tensor: _Planned, random: np.random.Generator) -> np.ndarray:
    """fp32: ones for norms; for routers, popularity along the common direction and noise in all of them."""
    if len(tensor.shape) == 1:
        return np.ones(tensor.shape, np.float32)
    experts, hidden = tensor.shape
    # A hidden state has the length sqrt(hidden) and the mean _COMMON, so its logits have the deviations 1 and
    # _POPULARITY.
    noise_ED = random.standard_normal((experts, hidden), dtype=np.float32) / hidden**0.5
    popularity_E1 = random.standard_normal((experts, 1), dtype=np.float32) * _POPULARITY
    weight_ED: np.ndarray = noise_ED + popularity_E1 / (_COMMON * hidden)
    return weight_ED.astype(np.float32)


def _entries(shape: Shape, seed: int) -> list[bytes]:
    sizes = {
        "block_count": shape.layers,
        "context_length": 32_768,
        "embedding_length": shape.hidden,
        "feed_forward_length": 3 * shape.hidden,
        "attention.head_count": shape.heads,
        "attention.head_count_kv": shape.kv_heads,
        "attention.key_length": shape.head_dim,
        "attention.value_length": shape.head_dim,
        "expert_count": shape.experts,
        "expert_used_count": shape.chosen,
        "expert_feed_forward_length": shape.inner,
        "vocab_size": shape.vocabulary,
    }
    floats = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6}
    return [
        text_entry("general.architecture", ARCHITECTURE),
        text_entry("general.name", f"random codes, seed {seed}"),
        entry_bytes("general.quantization_version", _UINT32, 2),
        *(entry_bytes(f"{ARCHITECTURE}.{key}", _UINT32, value) for key, value in sizes.items()),
        *(_key(f"{ARCHITECTURE}.{key}") + struct.pack("<If", _FLOAT32, value) for key, value in floats.items()),
        *_tokenizer(shape.vocabulary),
    ]


def _tokenizer(vocabulary: int) -> list[bytes]:
    """As many tokens as the vocabulary has: nobody encodes text with it, but engines refuse a model without one."""
    words = [f"token{number}" for number in range(vocabulary)]
    return [
        text_entry("tokenizer.ggml.model", "gpt2"),
        text_entry("tokenizer.ggml.pre", "qwen2"),
        _key("tokenizer.ggml.tokens") + struct.pack("<IIQ", _ARRAY, _STRING, vocabulary) + b"".join(map(_key, words)),
        _key("tokenizer.ggml.token_type")
        + struct.pack("<IIQ", _ARRAY, _INT32, vocabulary)
        + np.ones(vocabulary, np.int32).tobytes(),
        _key("tokenizer.ggml.merges") + struct.pack("<IIQ", _ARRAY, _STRING, 1) + _key("to ken"),
        entry_bytes("tokenizer.ggml.bos_token_id", _UINT32, vocabulary - 1),
        entry_bytes("tokenizer.ggml.eos_token_id", _UINT32, vocabulary - 1),
        entry_bytes("tokenizer.ggml.add_bos_token", _BOOL, 0),
    ]


def _key(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data
