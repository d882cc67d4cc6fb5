"""Where every expert of a checkpoint lies, and how to read exactly one of them into memory that is ours.

Names and layouts are those of transformers: its conversion mapping says which tensors of the files make up which
parameter of the model, and its converters, run on one expert, put them together. So every layout that `from_pretrained`
reads is read here, without a table of names: experts in tensors of their own, packed, fused, sharded.
"""

from __future__ import annotations

import abc
import copy
import hashlib
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter

from remoe_adapt.checkpoints import Extent, open_checkpoint, stored_sources
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.direct_io import BLOCK, ExtentReader, Reader
from remoe_adapt.expert_cache.encoding import FLOATS, Encoding
from remoe_adapt.expert_cache.memory import Blocks

# Parameters lie at multiples of so many bytes, as torch's tensors do: elsewhere some kernels compute other last bits.
ALIGNMENT = 64
# Of each tensor's bytes so many go into a fingerprint.
_FINGERPRINT_BYTES = 4096


@dataclass(frozen=True, slots=True)
class _Source:
    """What one expert needs of the files: a tensor for each expert, or one with a row for each."""

    pattern: str
    extents: tuple[Extent, ...]
    packed: bool

    def of(self, expert: int, num_experts: int) -> Extent:
        return self.extents[0].row(expert, num_experts) if self.packed else self.extents[expert]

    def shape(self) -> tuple[int, ...]:
        """The shape of one expert's part, as a converter takes it."""
        shape = self.extents[0].shape
        return (1, *shape[1:]) if self.packed else shape


@dataclass(frozen=True, slots=True)
class _Group:
    """Sources that one conversion turns into parameters; `order`: the output is the sources one after another.

    `straight`: so, and of the parameter's type.
    """

    name: str
    sources: tuple[_Source, ...]
    converter: WeightConverter | None
    params: tuple[str, ...]
    order: tuple[int, ...] | None
    straight: bool


def _parts(extents: Sequence[Extent], whole: Tensor) -> list[tuple[Extent, Tensor]]:
    """The extents, one after another, as parts of a tensor of their type."""
    pieces = whole.view(-1).split([extent.size // extent.dtype.itemsize for extent in extents])
    return list(zip(extents, pieces, strict=True))


class _OneExpert:
    """The model as a converter sees it that works on one expert instead of all."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def get_parameter(self, name: str) -> Tensor:
        # A converter looks at the parameter that it makes: here it makes one row.
        return self._model.get_parameter(name)[:1]


def experts_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules, by name in model order, whose experts transformers' experts interface can compute."""
    # transformers' decorator of experts classes sets these; there is no base class to ask for.
    marks = ("is_transposed", "has_gate", "has_bias", "num_experts")
    return {name: module for name, module in model.named_modules() if all(hasattr(module, mark) for mark in marks)}


def fingerprint_of(reader: ExtentReader, extents: Iterable[Extent]) -> str:
    """A hash of types, shapes and first bytes of tensors, in the order of their names and places."""
    found = hashlib.sha256()
    for extent in sorted(extents, key=lambda extent: (extent.tensor, extent.offset)):
        part = torch.empty(min(extent.size, _FINGERPRINT_BYTES), dtype=torch.uint8)
        reader.fill([(replace(extent, size=part.nbytes), part)])
        found.update(f"{extent.dtype} {extent.shape}".encode())
        found.update(part.numpy().tobytes())
    return found.hexdigest()


class FileStore(abc.ABC):
    """What stores of experts in files share: which experts there are, the files' reader, and the memory that it fills.

    `layers` are the names of the experts modules in model order; `num_experts`, `expert_bytes` (of one) and `params`
    (names) go with them.
    """

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    params: tuple[tuple[str, ...], ...]

    def __init__(self, paths: Iterable[Path], direct_io: bool, reader: Reader) -> None:
        self._reader, self._blocks = ExtentReader(paths, direct_io=direct_io, reader=reader), Blocks()
        self.direct_io, self.close = self._reader.direct_io, self._reader.close

    @property
    def total_bytes(self) -> int:
        """What all experts take in memory."""
        return sum(count * size for count, size in zip(self.num_experts, self.expert_bytes, strict=True))

    @abc.abstractmethod
    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parameters of one expert, by name: tensors of `param.shape[1:]` that own their memory.

        Raises ExpertReadError, after several attempts.
        """

    def give_back(self) -> None:
        """Memory that is kept for the next reads goes to the system."""
        self._blocks.give_back()

    def use_blocks(self, blocks: Blocks) -> None:
        """Read into this memory from now on."""
        self._blocks = blocks


class ExpertStore(FileStore):
    """Reads experts of a checkpoint folder; any number of threads at once.

    folder: of the checkpoint.
    model: built from the folder's configuration, on the meta device, in the dtype that experts shall have, and prepared
        by the encoding: a slot holds what its experts modules have.
    encoding: of the experts in the files.
    direct_io: past the page cache (O_DIRECT), where the file system has it; else buffered, which is logged once.
    reader: reads the files, as os.preadv does.

    Raises ConfigError when the folder is no safetensors checkpoint of this model or lacks experts, ExpertReadError for
    a truncated file.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        encoding: Encoding = FLOATS,
        *,
        direct_io: bool = False,
        reader: Reader = os.preadv,
    ) -> None:
        modules = experts_modules(model)
        if not modules:
            raise UncacheableError(
                f"{type(model).__name__}: its experts cannot be cached, they do not go through transformers' experts "
                "interface. Load it with from_pretrained."
            )
        self.folder = Path(folder)
        self.layers = tuple(modules)
        self.num_experts = tuple(int(cast(int, module.num_experts)) for module in modules.values())
        self._params = [dict(module.named_parameters(recurse=False)) for module in modules.values()]
        self.params = tuple(tuple(params) for params in self._params)
        for name, count, params in zip(self.layers, self.num_experts, self._params, strict=True):
            if odd := [f"{param} {tuple(value.shape)}" for param, value in params.items() if len(value) != count]:
                raise UncacheableError(f"{name}: {', '.join(odd)} is not one row for each of {count} experts.")
        self.expert_bytes = tuple(
            sum(p[0].numel() * p.element_size() for p in params.values()) for params in self._params
        )
        extents = open_checkpoint(self.folder)
        encoding.check_files(self.folder, extents.values())
        self._one_expert = _OneExpert(model)
        # What `_order` found, by conversion and shapes of its sources.
        self._plain: dict[tuple[object, ...], tuple[int, ...] | None] = {}
        self._groups = self._plan(model, extents)
        self._paths = {e.path for groups in self._groups for g in groups for s in g.sources for e in s.extents}
        super().__init__(self._paths, direct_io, reader)
        # Each parameter may begin anywhere in a block of the file, so each gets one block more.
        self._block_bytes = [
            (-(-size // BLOCK) + len(params)) * BLOCK
            for size, params in zip(self.expert_bytes, self._params, strict=True)
        ]

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        # Slots outlive the inference mode of the thread that happens to ask for them, so they are ordinary tensors.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return self._assemble(layer, expert)

    def like(self, layer: int) -> dict[str, Tensor]:
        """The parameters of one expert of this layer, by name, on the meta device."""
        return {name: param[0] for name, param in self._params[layer].items()}

    def sample(self, layer: int, expert: int, count: int) -> dict[str, Tensor]:
        """The first numbers of each parameter of an expert, at most `count`, flat; raises as `read`."""
        found: dict[str, Tensor] = {}
        for group in self._groups[layer]:
            # Only a conversion knows where the first numbers come from, so the expert is read whole.
            if group.order is None:
                whole = self.read(layer, expert)
                found |= {name: whole[name].flatten()[:count].clone() for name in group.params}
                continue
            first = group.sources[group.order[0]].of(expert, self.num_experts[layer])
            part = torch.empty(min(count, first.size // first.dtype.itemsize), dtype=first.dtype, device="cpu")
            self._reader.fill([(replace(first, shape=tuple(part.shape), size=part.nbytes), part)])
            found[group.params[0]] = part.to(self._params[layer][group.params[0]].dtype)
        return found

    def fingerprint(self, layer: int) -> str:
        """Ties copies of a layer in any encoding to these files: a hash of the first bytes that its first and its last
        expert have there, which every training changes; raises as `read`."""
        count = self.num_experts[layer]
        experts = sorted({0, count - 1})
        sources = [source for group in self._groups[layer] for source in group.sources]
        return fingerprint_of(self._reader, (source.of(expert, count) for expert in experts for source in sources))

    def tensors(self) -> set[str]:
        """The names that all experts' tensors have in the files."""
        return {e.tensor for groups in self._groups for g in groups for s in g.sources for e in s.extents}

    def state(self) -> list[list[Any]]:
        """Name, size and time of change (ns) of each file that experts are in (JSON-ready)."""
        stats = [(path.name, path.stat()) for path in sorted(self._paths)]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _owned(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return self._blocks.empty(tuple(value.shape), dtype).copy_(value)

    def _assemble(self, layer: int, expert: int) -> dict[str, Tensor]:
        params, count = self._params[layer], self.num_experts[layer]
        found: dict[str, Tensor] = {}
        straight: list[tuple[str, list[Extent]]] = []
        for group in self._groups[layer]:
            pieces = [source.of(expert, count) for source in group.sources]
            if group.straight and group.order is not None:
                straight.append((group.params[0], [pieces[place] for place in group.order]))
                continue
            like = params[group.params[0]]
            # The pieces in their order are the parameter, but in another type: read together, then converted.
            if group.order is not None:
                whole = self._blocks.empty(tuple(like.shape[1:]), pieces[0].dtype)
                self._reader.fill(_parts([pieces[place] for place in group.order], whole))
                found[group.params[0]] = self._owned(whole, like.dtype)
                continue
            tensors = [
                self._blocks.empty(source.shape(), piece.dtype)
                for piece, source in zip(pieces, group.sources, strict=True)
            ]
            self._reader.fill(zip(pieces, tensors, strict=True))
            made = self._convert(group.converter, group.name, group.sources, [part.to(like.dtype) for part in tensors])
            found |= {name: self._owned(made[f"{self.layers[layer]}.{name}"][0], like.dtype) for name in group.params}
        return found | self._straight(layer, straight)

    def _straight(self, layer: int, wanted: list[tuple[str, list[Extent]]]) -> dict[str, Tensor]:
        """These parameters in one block, as far as possible read straight into it: in the order of the file, and at
        addresses that are its offsets modulo the block size, unless that would spoil the alignment of the tensors."""
        if not wanted:
            return {}
        # One block for all: the parameters of an expert come and go together, and each mapping counts.
        block = self._blocks.take(self._block_bytes[layer])
        at, found, parts = 0, {}, []
        for param, extents in sorted(wanted, key=lambda entry: (entry[1][0].path, entry[1][0].offset)):
            like, offset = self._params[layer][param], extents[0].offset
            step, phase = (ALIGNMENT, 0) if offset % ALIGNMENT else (BLOCK, offset % BLOCK)
            at += (phase - at) % step
            count = like[0].numel()
            whole = torch.frombuffer(block, dtype=like.dtype, count=count, offset=at).view(like.shape[1:])
            at += count * like.dtype.itemsize
            parts += _parts(extents, whole)
            found[param] = whole
        self._reader.fill(parts)
        return found

    # Planning

    def _plan(self, model: PreTrainedModel, extents: dict[str, Extent]) -> list[list[_Group]]:
        meta, tied = model.state_dict(), getattr(model, "all_tied_weights_keys", None) or {}
        sources, by_pattern = stored_sources(model, meta, extents)
        found = {
            name: {pattern: [extents[key] for key in keys] for pattern, keys in by_source.items()}
            for name, by_source in sources.items()
        }
        plans = []
        for layer, (prefix, params) in enumerate(zip(self.layers, self._params, strict=True)):
            groups = []
            for name in (f"{prefix}.{param}" for param in params):
                if name in found:
                    groups.append(self._group(layer, name, found[name], by_pattern))
            missing = sorted(set(params) - {param for group in groups for param in group.params})
            if missing and f"{prefix}.{missing[0]}" in tied:
                raise UncacheableError(
                    f"{prefix}.{missing[0]} is {tied[f'{prefix}.{missing[0]}']} once more: layers that share experts "
                    "cannot be cached. Load it with from_pretrained."
                )
            if missing:
                raise ConfigError(f"{self.folder} has no weights for {prefix}.{missing[0]}: is it this model's folder?")
            plans.append(groups)
        return plans

    def _group(
        self, layer: int, name: str, by_source: dict[str | None, list[Extent]], by_pattern: dict[str, WeightConverter]
    ) -> _Group:
        count, prefix, params = self.num_experts[layer], f"{self.layers[layer]}.", self._params[layer]
        sources = []
        for pattern, extents in by_source.items():
            shape = extents[0].shape
            packed = len(extents) == 1 and shape[:1] == (count,) and (count > 1 or pattern is None or len(shape) > 2)
            if not packed and (pattern is None or len(extents) != count or any(e.shape != shape for e in extents)):
                raise ConfigError(
                    f"{self.folder}: {len(extents)} tensors, as {extents[0].tensor} {shape}, do not make up the "
                    f"{count} experts of {name}: are all files there, and of this model?"
                )
            sources.append(_Source(pattern or "", tuple(extents), packed))
        # All patterns of one parameter belong to one conversion.
        patterns = [pattern for pattern in by_source if pattern is not None]
        converter = by_pattern[patterns[0]] if patterns else None
        group = tuple(sources)
        # On the meta device first: a layout that cannot be cut into experts is refused when the model is loaded.
        made = self._convert(converter, name, group, [torch.empty(source.shape(), device="meta") for source in group])
        by_param = {key.removeprefix(prefix): value for key, value in made.items()}
        for param, value in by_param.items():
            if param not in params or value.shape != (1, *params[param].shape[1:]):
                raise ConfigError(
                    f"{self.folder}: {prefix}{param} cannot be read expert by expert (one is {list(value.shape)})."
                )
        order = self._order(converter, name, group, len(by_param))
        straight = order is not None and sources[0].extents[0].dtype == params[name.removeprefix(prefix)].dtype
        return _Group(name, group, converter, tuple(by_param), order, straight)

    def _convert(
        self, converter: WeightConverter | None, name: str, sources: Sequence[_Source], tensors: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """What the sources of one expert become, by full name, each with one row."""
        if converter is None:
            return {name: tensors[0]}
        # A converter keeps the tensors that were added to it, so each use has a copy of its own.
        converter = copy.deepcopy(converter)
        for source, tensor in zip(sources, tensors, strict=True):
            converter.add_tensor(name, name, source.pattern, cast(Any, tensor))
        made = converter.convert(name, model=self._one_expert, config=self._one_expert.config)
        return {key: value[0] if isinstance(value, list) else value for key, value in made.items()}

    def _order(
        self, converter: WeightConverter | None, name: str, sources: tuple[_Source, ...], outputs: int
    ) -> tuple[int, ...] | None:
        """The order in which the sources, one after another, are the output; None where it is not so simple."""
        if outputs != 1 or len({source.extents[0].dtype for source in sources}) != 1:
            return None
        if converter is None:
            return (0,)
        # The conversion is tried on the numbers 0, 1, 2 ...: where they come out shows where the sources go. Layers
        # whose sources have the same names and shapes share the answer.
        key = (id(converter), *((source.pattern, source.shape()) for source in sources))
        if key not in self._plain:
            sizes = [torch.Size(source.shape()).numel() for source in sources]
            starts = [0, *itertools.accumulate(sizes)]
            numbers = torch.arange(starts[-1], dtype=torch.int64)
            parts = numbers.split(sizes)
            tensors = [part.view(source.shape()) for part, source in zip(parts, sources, strict=True)]
            (output,) = self._convert(converter, name, sources, tensors).values()
            order = sorted(range(len(sources)), key=lambda place: int((output.flatten() == starts[place]).nonzero()[0]))
            same = torch.equal(output.flatten(), torch.cat([parts[place] for place in order]))
            self._plain[key] = tuple(order) if same else None
        return self._plain[key]
