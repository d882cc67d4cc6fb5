"""Everything but the experts: which tensors of a GGUF each parameter is made of, and how."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from remoe_adapt._support import printable
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.gguf.architectures import (
    FLAT,
    LATENT,
    LINEAR_INPUTS,
    LOG_NEGATED,
    MINUS_ONE,
    ROTARY,
    ROWS,
    Architecture,
    Rule,
)
from remoe_adapt.expert_cache.gguf.tensors import OTHER_CONFIG, Stored, bytes_of, check_kind, numbers_of

_LAYER = re.compile(r"(?:model\.)?layers\.([0-9]+)\.(.+)", re.DOTALL)
_ENDINGS = (".weight", ".bias")
Step = Callable[[list[Tensor]], Tensor]


@dataclass(frozen=True, slots=True)
class DenseParameter:
    """A parameter or buffer that is no expert's.

    name: in the model's state dict.
    shape: there.
    stored: the tensors that it is made of.
    step: makes it of their fp32 numbers; None: it is the only one of them, up to dimensions of size 1.
    row_order: where its rows are those of its only tensor in another order: row i is row `row_order[i]` of it.
    """

    name: str
    shape: tuple[int, ...]
    stored: tuple[Stored, ...]
    step: Step | None = None
    row_order: Tensor | None = None

    @property
    def as_blocks(self) -> Stored | None:
        """The tensor whose rows of blocks are this matrix's, in `row_order`; None where no single one is."""
        same = self.step is None and len(self.shape) == 2 and self.stored[0].shape == self.shape
        return self.stored[0] if same else None

    def read_blocks(self) -> Tensor:
        """Its rows of blocks, uint8 [rows, row bytes], where `as_blocks` is one. Raises ExpertReadError."""
        assert self.as_blocks is not None
        blocks_NB = bytes_of(self.as_blocks)
        return blocks_NB if self.row_order is None else blocks_NB[self.row_order]

    def read(self, dtype: torch.dtype) -> Tensor:
        """Its numbers: dequantised and put together in fp32, then rounded. Raises ExpertReadError as `numbers_of`."""
        if self.step is not None:
            value = self.step([numbers_of(stored, torch.float32) for stored in self.stored]).to(dtype)
        else:
            value = numbers_of(self.stored[0], dtype)
            if self.row_order is not None:
                value = value[self.row_order]
        return value.reshape(self.shape).contiguous()


class LazyParameter:
    """A dense parameter that is read when from_pretrained takes it out of a state dict, and never kept.

    Indexing gives the whole tensor, whatever the index: transformers asks for all of it.

    dtype: of its numbers; None: its rows of blocks.
    """

    def __init__(self, parameter: DenseParameter, dtype: torch.dtype | None) -> None:
        self._parameter, self._dtype = parameter, dtype
        blocks = None if dtype is not None else parameter.as_blocks
        self.shape = torch.Size(parameter.shape if blocks is None else blocks.extent.shape)

    def get_dtype(self) -> str:
        """As a slice of a safetensors file says it: of floats, or of codes, which nobody must cast."""
        return "U8" if self._dtype is None else "F32"

    def __getitem__(self, _: object) -> Tensor:
        return self._parameter.read_blocks() if self._dtype is None else self._parameter.read(self._dtype)


def dense_by_table(
    model: PreTrainedModel,
    names: Mapping[str, Tensor],
    tensors: Mapping[str, Stored],
    entry: Architecture,
    path: object,
) -> dict[str, DenseParameter]:
    """The parameters in `names`, by our table.

    names: of the state dict, with tensors of their shapes.

    Raises ConfigError when tensors are missing or of other sizes, UncacheableError for parameters that the table does
    not know.
    """
    found = {}
    for name, like in names.items():
        rule, prefix, ending = _rule(entry, name)
        if rule is None:
            raise UncacheableError(
                f"{printable(path)}: which tensor holds {name} of {type(model).__name__} is not known here: load it "
                "with from_pretrained, from its safetensors files."
            )
        found[name] = _dense(model.config, name, tuple(like.shape), rule, prefix, ending, tensors, path)
    return found


def _rule(entry: Architecture, name: str) -> tuple[Rule | None, str, str]:
    """(rule, "blk.N." or "", the ending that its tensors have)."""
    match = _LAYER.fullmatch(name)
    rules, rest, prefix = (entry.layer, match[2], f"blk.{match[1]}.") if match else (entry.top, name, "")
    if rest in rules:
        return rules[rest], prefix, ""
    ending = next((ending for ending in _ENDINGS if rest.endswith(ending)), "")
    return rules.get(rest.removesuffix(ending)) if ending else None, prefix, ending


def _dense(
    config: Any,
    name: str,
    shape: tuple[int, ...],
    rule: Rule,
    prefix: str,
    ending: str,
    tensors: Mapping[str, Stored],
    path: object,
) -> DenseParameter:
    instead = f"{prefix}{rule.instead}{ending}"
    if rule.instead is not None and instead in tensors:
        return _checked(DenseParameter(name, shape, (tensors[instead],)), path)
    wanted = [f"{prefix}{tensor}{ending}" for tensor in rule.tensors]
    fused = _of_fused(config, name, shape, rule, prefix, ending, tensors)
    if missing := [tensor for tensor in wanted if tensor not in tensors and fused is None]:
        raise ConfigError(f"{printable(path)} has no {printable(missing[0])}, of which {name} is made: {OTHER_CONFIG}.")
    stored = (fused,) if fused is not None else tuple(tensors[tensor] for tensor in wanted)
    step: Step | None = None
    order = None
    if rule.step == ROTARY:
        order = _rotary_order(config, name, shape[0], path)
    elif rule.step == LINEAR_INPUTS:
        step = _linear_inputs(config, name, shape, stored, path)
    elif rule.step in _STEPS:
        step = _STEPS[rule.step]
    elif rule.step == LATENT:
        step = _latent
        _check_latent(name, shape, stored, path)
    return _checked(DenseParameter(name, shape, stored, step, order), path)


def _of_fused(
    config: Any, name: str, shape: tuple[int, ...], rule: Rule, prefix: str, ending: str, tensors: Mapping[str, Stored]
) -> Stored | None:
    """Queries, keys or values as rows of the one tensor in which some converters put all three."""
    order = ("attn_q", "attn_k", "attn_v")
    whole = tensors.get(f"{prefix}attn_qkv{ending}")
    if (
        whole is None
        or len(whole.shape) != 2
        or rule.tensors[0] not in order
        or f"{prefix}{rule.tensors[0]}{ending}" in tensors
    ):
        return None
    keys = int(config.num_key_value_heads) * _head_size(config)
    sizes = (whole.shape[0] - 2 * keys, keys, keys)
    place = order.index(rule.tensors[0])
    if sizes[place] != shape[0]:
        return None
    return whole.rows(sum(sizes[:place]), sizes[place])


def _head_size(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _rotary_order(config: Any, name: str, rows: int, path: object) -> Tensor:
    """Rows of each head in two halves, which the file has in pairs.

    https://github.com/ggml-org/llama.cpp, conversion/llama.py, `permute`; this undoes it.
    """
    heads = int(config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads)
    if heads < 1 or rows % (2 * heads):
        raise ConfigError(f"{printable(path)}: {name} has {rows} rows, which {heads} heads cannot share.")
    return torch.arange(rows, device="cpu").view(heads, rows // heads // 2, 2).transpose(1, 2).flatten()


# Of these each number, or whole row, stays on its own.
_STEPS: dict[str, Step] = {
    MINUS_ONE: lambda values: values[0] - 1,
    LOG_NEGATED: lambda values: torch.log(-values[0]),
    FLAT: lambda values: values[0].flatten(),
    ROWS: lambda values: torch.cat(values),
}


def _linear_inputs(config: Any, name: str, shape: tuple[int, ...], stored: tuple[Stored, ...], path: object) -> Step:
    """in_proj_qkvz: of each key head its query, key, values and gates, which the file has one after another.

    https://github.com/ggml-org/llama.cpp, conversion/qwen.py, `Qwen3NextModel.modify_tensors`; this undoes it.
    """
    heads, key_size = int(config.linear_num_key_heads), int(config.linear_key_head_dim)
    values = int(config.linear_num_value_heads) * int(config.linear_value_head_dim)
    rows = [heads * key_size, heads * key_size, values]
    if [piece.shape for piece in stored] != [(sum(rows), shape[1]), (values, shape[1])]:
        raise _unlike(name, shape, stored, path)

    def merge(numbers: list[Tensor]) -> Tensor:
        parts = [*numbers[0].split(rows), numbers[1]]
        return torch.cat([part.view(heads, -1, shape[1]) for part in parts], dim=1).flatten(0, 1)

    return merge


def _latent(values: list[Tensor]) -> Tensor:
    """kv_b_proj [heads * (keys + values), rank] of keys [heads, rank, keys] and values [heads, values, rank]."""
    keys_HRK, values_HVR = values
    return torch.cat([keys_HRK.transpose(1, 2), values_HVR], dim=1).flatten(0, 1)


def _check_latent(name: str, shape: tuple[int, ...], stored: tuple[Stored, ...], path: object) -> None:
    keys, values = stored[0].shape, stored[1].shape
    whole = len(keys) == len(values) == 3 and keys[0] == values[0] and keys[1] == values[2]
    if not whole or (keys[0] * (keys[2] + values[1]), keys[1]) != shape:
        raise _unlike(name, shape, stored, path)


def _checked(parameter: DenseParameter, path: object) -> DenseParameter:
    for stored in parameter.stored:
        check_kind(stored)
    sizes = sum(torch.Size(stored.shape).numel() for stored in parameter.stored)
    alone = len(parameter.stored) == 1 and parameter.step is None
    same = _squeezed(parameter.stored[0].shape) == _squeezed(parameter.shape)
    if sizes != torch.Size(parameter.shape).numel() or (alone and not same):
        raise _unlike(parameter.name, parameter.shape, parameter.stored, path)
    return parameter


def _squeezed(shape: tuple[int, ...]) -> list[int]:
    return [size for size in shape if size != 1]


def _unlike(name: str, shape: tuple[int, ...], stored: tuple[Stored, ...], path: object) -> ConfigError:
    shapes = " and ".join(f"{printable(piece.name)} {list(piece.shape)}" for piece in stored)
    return ConfigError(f"{printable(path)}: {shapes} do not make up {name} {list(shape)}: {OTHER_CONFIG}.")


def dense_by_transformers(
    model: PreTrainedModel, names: Mapping[str, Tensor], tensors: Mapping[str, Stored], mapping: list[Any], path: object
) -> dict[str, DenseParameter]:
    """The parameters in `names`, by transformers' own conversion mapping of this architecture; raises as
    `dense_by_table`."""
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    found: dict[str, DenseParameter] = {}
    for tensor, stored in tensors.items():
        name, pattern = rename_source_key(tensor, renamings, converters)
        if name not in names:
            continue
        step = None if pattern is None else _conversion(by_pattern[pattern], name, pattern, model)
        if name in found or (pattern is not None and len(by_pattern[pattern].source_patterns) > 1):
            raise UncacheableError(f"{printable(path)}: {name} is made of several tensors in a way not known here.")
        found[name] = _checked(DenseParameter(name, tuple(names[name].shape), (stored,), step), path)
    if missing := sorted(names.keys() - found.keys()):
        raise ConfigError(f"{printable(path)} has no tensor for {missing[0]}: {OTHER_CONFIG}.")
    return found


def _conversion(converter: WeightConverter, name: str, pattern: str, model: PreTrainedModel) -> Step:
    def convert(values: list[Tensor]) -> Tensor:
        # A converter keeps the tensors that were added to it, so each use has a copy of its own.
        one = copy.deepcopy(converter)
        one.add_tensor(name, name, pattern, cast(Any, values[0]))
        (made,) = one.convert(name, model=model, config=model.config).values()
        value = made[0] if isinstance(made, list) else made
        assert isinstance(value, Tensor)
        return value

    return convert
