"""Which stored tensors make up each parameter of each expert, and the conversion that puts them together.

Names and layouts are those of transformers: its conversion mapping says which tensors of the files make up which
parameter of the model, and its converters, run on one expert, put them together. So every layout that `from_pretrained`
reads is read here, without a table of names: experts in tensors of their own, packed, fused, sharded, quantised.
"""

from __future__ import annotations

import copy
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from remoe_adapt.checkpoints import Extent, stored_sources
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.encodings import Band

# The number of the expert in the name of a tensor that is its alone.
_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True, slots=True)
class Source:
    """What one expert needs of the files: a tensor for each expert, or one with a row for each (`packed`).

    ending: of the tensors' names, behind the expert: "gate_proj.weight_scale", "down_proj_blocks".
    """

    pattern: str
    ending: str
    extents: tuple[Extent, ...]
    packed: bool

    def of(self, expert: int, num_experts: int) -> Extent:
        return self.extents[0].row(expert, num_experts) if self.packed else self.extents[expert]

    def shape(self) -> tuple[int, ...]:
        """The shape of one expert's part, as a converter takes it."""
        shape = self.extents[0].shape
        return (1, *shape[1:]) if self.packed else shape


@dataclass(frozen=True, slots=True)
class Group:
    """Sources that one conversion turns into parameters of an expert.

    params: their names.
    convert: makes them of the sources' tensors, each with one row: what `from_pretrained` would make, but for the type.
    order: the parameter is the sources one after another in this order; None: it is not so simple.
    straight: so, and of the parameter's type.
    is_coded: the sources are codes and scales.
    blocks: makes bands of ggml blocks of coded sources, by their endings, for one parameter; None where nothing does.
    are_blocks: the sources are these very blocks, one after another.
    """

    params: tuple[str, ...]
    sources: tuple[Source, ...]
    convert: Callable[[Sequence[Tensor]], dict[str, Tensor]]
    order: tuple[int, ...] | None
    straight: bool
    is_coded: bool = False
    blocks: Callable[[Mapping[str, Tensor]], list[Band]] | None = None
    are_blocks: bool = False

    def on_meta(self) -> dict[str, Tensor]:
        """One expert's tensors by the endings of their names, on the meta device."""
        return {
            source.ending: torch.empty(
                source.shape()[1:] if source.packed else source.shape(), dtype=source.extents[0].dtype, device="meta"
            )
            for source in self.sources
        }


@dataclass(frozen=True, slots=True)
class Plan:
    """The experts of a checkpoint; every list has an entry for each layer.

    where: names the checkpoint in messages.
    layers: names of the experts modules, in model order.
    likes: the parameters of one expert as the model has them, by name, on the meta device.
    transposed: whether its matrices are [inputs, outputs].
    """

    where: Path
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    likes: list[dict[str, Tensor]]
    transposed: tuple[bool, ...]
    groups: list[list[Group]] = field(default_factory=list)

    def converted(self, group: Group, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The parameters of a group, made of an expert's stored tensors: floats are there already."""
        if not group.is_coded:
            return stored
        pieces = [stored[s.ending][None] if s.packed else stored[s.ending] for s in group.sources]
        # Operations may take the device of new tensors from torch's default: a model may be in the making.
        with torch.device(pieces[0].device):
            return group.convert(pieces)

    @property
    def paths(self) -> set[Path]:
        """The files that experts are in."""
        return {e.path for groups in self.groups for group in groups for s in group.sources for e in s.extents}


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name in model order, whose experts transformers' experts interface can compute."""
    # transformers' decorator of experts classes sets these; there is no base class to ask for.
    marks = ("is_transposed", "has_gate", "has_bias", "num_experts")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)}


def empty_plan(where: Path, model: PreTrainedModel) -> Plan:
    """The experts modules of a model on the meta device, without groups yet.

    Raises UncacheableError when it has none, or one whose parameters are not a row for each expert.
    """
    modules = experts_modules(model)
    if not modules:
        raise UncacheableError(
            f"{type(model).__name__}: its experts cannot be cached, they do not go through transformers' experts "
            "interface. Load it with from_pretrained."
        )
    num_experts = tuple(int(cast(int, module.num_experts)) for module in modules.values())
    likes = []
    for name, count, module in zip(modules, num_experts, modules.values(), strict=True):
        params = dict(module.named_parameters(recurse=False))
        if odd := [f"{param} {tuple(value.shape)}" for param, value in params.items() if len(value) != count]:
            raise UncacheableError(f"{name}: {', '.join(odd)} is not one row for each of {count} experts.")
        likes.append({param: value[0] for param, value in params.items()})
    transposed = tuple(bool(module.is_transposed) for module in modules.values())
    return Plan(where, tuple(modules), num_experts, likes, transposed)


def plan_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    extents: dict[str, Extent],
    quantizer: Any = None,
    blocks: Callable[[Mapping[str, Tensor]], list[Band]] | None = None,
) -> Plan:
    """The plan of a safetensors checkpoint.

    folder: names it.
    model: on the meta device; its experts modules say what a parameter is.
    extents: every tensor of the files.
    quantizer: of transformers, made with dequantize=True, for a quantised checkpoint.
    blocks: makes ggml blocks of the stored tensors of a parameter of such a checkpoint.

    Raises ConfigError when the files do not make up this model's experts, UncacheableError for layers that share them.
    """
    plan = empty_plan(folder, model)
    _Planner(plan, model, extents, quantizer, blocks).fill()
    return plan


class _OneExpert:
    """The model as a converter sees it that works on one expert instead of all."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        # A converter looks at the parameter that it makes: here it makes one row.
        return self._model.get_parameter(name)[:1]


class _Planner:
    """Fills a plan with groups; see `plan_checkpoint`."""

    def __init__(
        self,
        plan: Plan,
        model: PreTrainedModel,
        extents: dict[str, Extent],
        quantizer: Any,
        blocks: Callable[[Mapping[str, Tensor]], list[Band]] | None,
    ) -> None:
        self._plan, self._model, self._extents = plan, model, extents
        self._quantizer, self._blocks = quantizer, blocks
        self._one_expert: Any = _OneExpert(model)
        # What `_order` found, by conversion and shapes of its sources.
        self._orders: dict[tuple[object, ...], tuple[int, ...] | None] = {}

    def fill(self) -> None:
        plan, model = self._plan, self._model
        meta, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
        sources, by_pattern = stored_sources(model, meta, self._extents, self._quantizer)
        found = {
            name: {pattern: [self._extents[key] for key in keys] for pattern, keys in by_source.items()}
            for name, by_source in sources.items()
        }
        for layer, (prefix, likes) in enumerate(zip(plan.layers, plan.likes, strict=True)):
            groups = []
            for name in (f"{prefix}.{param}" for param in likes):
                if name in found:
                    groups.append(self._group(layer, name, found[name], by_pattern))
            missing = sorted(set(likes) - {param for group in groups for param in group.params})
            if missing and f"{prefix}.{missing[0]}" in tied:
                raise UncacheableError(
                    f"{prefix}.{missing[0]} is {tied[f'{prefix}.{missing[0]}']} once more: layers that share experts "
                    "cannot be cached. Load it with from_pretrained."
                )
            if missing:
                raise ConfigError(f"{plan.where} has no weights for {prefix}.{missing[0]}: is it this model's folder?")
            plan.groups.append(groups)

    def _group(
        self, layer: int, name: str, by_source: dict[str | None, list[Extent]], by_pattern: dict[str, WeightConverter]
    ) -> Group:
        plan = self._plan
        count, prefix, likes = plan.num_experts[layer], f"{plan.layers[layer]}.", plan.likes[layer]
        sources = []
        for pattern, extents in by_source.items():
            shape = extents[0].shape
            packed = len(extents) == 1 and shape[:1] == (count,) and (count > 1 or pattern is None or len(shape) > 2)
            if not packed and (pattern is None or len(extents) != count or any(e.shape != shape for e in extents)):
                raise ConfigError(
                    f"{plan.where}: {len(extents)} tensors, as {extents[0].tensor} {shape}, do not make up the "
                    f"{count} experts of {name}: are all files there, and of this model?"
                )
            sources.append(Source(pattern or "", _ending(extents[0].tensor, packed), tuple(extents), packed))
        # All patterns of one parameter belong to one conversion.
        patterns = [pattern for pattern in by_source if pattern is not None]
        converter = by_pattern[patterns[0]] if patterns else None
        group = tuple(sources)

        def convert(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
            made = self._convert(converter, name, group, tensors)
            return {key.removeprefix(prefix): value[0] for key, value in made.items()}

        param = name.removeprefix(prefix)
        if self._quantizer is not None and dequantises(converter):
            # Such a conversion computes with the values of its sources: it cannot be tried without them.
            return Group((param,), group, convert, None, False, is_coded=True, blocks=self._blocks)
        # On the meta device first: a layout that cannot be cut into experts is refused when the model is loaded.
        made = convert([torch.empty(source.shape(), device="meta") for source in group])
        for made_param, value in made.items():
            if made_param not in likes or value.shape != likes[made_param].shape:
                raise ConfigError(
                    f"{plan.where}: {prefix}{made_param} cannot be read expert by expert (one is {[1, *value.shape]})."
                )
        order = self._order(converter, name, group, len(made))
        straight = order is not None and sources[0].extents[0].dtype == likes[param].dtype
        return Group(tuple(made), group, convert, order, straight)

    def _convert(
        self, converter: WeightConverter | None, name: str, sources: Sequence[Source], tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What the sources of one expert become, by full name, each with one row."""
        if converter is None:
            return {name: tensors[0]}
        # A converter keeps the tensors that were added to it, so each use has a copy of its own. The quantizer that
        # its operations point to is large, and shared.
        converter = copy.deepcopy(converter, {id(self._quantizer): self._quantizer})
        for source, tensor in zip(sources, tensors, strict=True):
            converter.add_tensor(name, name, source.pattern, cast(Any, tensor))
        made = converter.convert(name, model=self._one_expert, config=self._one_expert.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def _order(
        self, converter: WeightConverter | None, name: str, sources: tuple[Source, ...], outputs: int
    ) -> tuple[int, ...] | None:
        """The order in which the sources, one after another, are the output; None where it is not so simple."""
        if outputs != 1 or len({source.extents[0].dtype for source in sources}) != 1:
            return None
        if converter is None:
            return (0,)
        # The conversion is tried on the numbers 0, 1, 2 ...: where they come out shows where the sources go. Layers
        # whose sources have the same names and shapes share the answer.
        key = (id(converter), *((source.pattern, source.shape()) for source in sources))
        if key not in self._orders:
            sizes = [torch.Size(source.shape()).numel() for source in sources]
            starts = [0, *itertools.accumulate(sizes)]
            numbers = torch.arange(starts[-1], dtype=torch.int64)
            parts = numbers.split(sizes)
            tensors = [part.view(source.shape()) for part, source in zip(parts, sources, strict=True)]
            (output,) = self._convert(converter, name, sources, tensors).values()
            order = sorted(range(len(sources)), key=lambda place: int((output.flatten() == starts[place]).nonzero()[0]))
            same = torch.equal(output.flatten(), torch.cat([parts[place] for place in order]))
            self._orders[key] = tuple(order) if same else None
        return self._orders[key]


def dequantises(converter: WeightConverter | None) -> bool:
    """Whether one of a conversion's operations makes numbers of codes: transformers' are named so, and ours are."""
    return converter is not None and any("Dequant" in type(op).__name__ for op in converter.operations)


def _ending(tensor: str, packed: bool) -> str:
    """What a tensor's name says behind the expert: "gate_proj.weight", or the last name of a tensor of all experts."""
    return tensor.rpartition(".")[2] if packed else _NUMBER.split(tensor)[-1]
