"""Reads exactly one expert of a checkpoint into memory that is ours, as the layout of slots wants it.

Where the tensors lie, and how they become parameters, is the plan's matter (plan.py).
"""

from __future__ import annotations

import abc
import hashlib
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt.checkpoints import Extent, open_checkpoint
from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.blocks_layout import BlocksLayout
from remoe_adapt.expert_cache.direct_io import BLOCK, ExtentReader, Reader
from remoe_adapt.expert_cache.encoding import FLOATS, Encoding
from remoe_adapt.expert_cache.layouts import Layout, ParamsLayout
from remoe_adapt.expert_cache.memory import Blocks
from remoe_adapt.expert_cache.places import ALIGNMENT
from remoe_adapt.expert_cache.plan import Group, Plan, plan_checkpoint
from remoe_adapt.expert_cache.pool import Parts, Pools, views
from remoe_adapt.expert_cache.types import Slot

# Of each tensor's bytes so many go into a fingerprint.
_FINGERPRINT_BYTES = 4096


def _parts(extents: Sequence[Extent], whole: Tensor) -> list[tuple[Extent, Tensor]]:
    """The extents, one after another, as parts of a tensor of their type."""
    pieces = whole.view(-1).split([extent.size // extent.dtype.itemsize for extent in extents])
    return list(zip(extents, pieces, strict=True))


def fingerprint_of(reader: ExtentReader, extents: Iterable[Extent]) -> str:
    """A hash of types, shapes and first bytes of tensors, in the order of their names and places."""
    found = hashlib.sha256()
    for extent in sorted(extents, key=lambda extent: (extent.tensor, extent.offset)):
        part = torch.empty(min(extent.size, _FINGERPRINT_BYTES), dtype=torch.uint8)
        reader.fill([(replace(extent, size=part.nbytes), part)])
        found.update(f"{extent.dtype} {extent.shape}".encode())
        found.update(part.numpy().tobytes())
    return found.hexdigest()


def dense_fingerprint(plan: Plan, extents: Mapping[str, Extent]) -> str:
    """Ties a copy of the dense part to a checkpoint: `fingerprint_of` all its tensors that are of no expert.

    plan: of its experts.
    extents: of all tensors of the checkpoint, by name.
    """
    experts = {e.tensor for groups in plan.groups for group in groups for s in group.sources for e in s.extents}
    dense = [extent for name, extent in extents.items() if name not in experts]
    reader = ExtentReader(extent.path for extent in dense)
    try:
        return fingerprint_of(reader, dense)
    finally:
        reader.close()


class FileStore(abc.ABC):
    """What stores of experts in files share: which experts there are, the files' reader, and the memory that it fills.

    `layers` are the names of the experts modules in model order; `num_experts`, `expert_bytes` (of one) and `params`
    (names) go with them.
    """

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    params: tuple[tuple[str, ...], ...]
    layout: Layout

    def __init__(self, paths: Iterable[Path], direct_io: bool, reader: Reader) -> None:
        # `_blocks` is for what is in no slot yet.
        self._reader, self._blocks = ExtentReader(paths, direct_io=direct_io, reader=reader), Blocks()
        self.direct_io, self.close = self._reader.direct_io, self._reader.close

    @property
    def total_bytes(self) -> int:
        """What all experts take in memory."""
        return sum(count * size for count, size in zip(self.num_experts, self.expert_bytes, strict=True))

    def _block(self, parts: Parts, size: int) -> dict[str, Tensor]:
        """These parts in memory of their own, one block for all: they come and go together, and each mapping counts."""
        return views(self._blocks.take(size), parts)

    @abc.abstractmethod
    def read(self, layer: int, expert: int) -> Slot:
        """What a slot holds of one expert, by name: tensors that own their memory.

        Raises ExpertReadError, after several attempts.
        """

    def give_back(self) -> None:
        """Memory that is kept for the next reads goes to the system."""
        self._blocks.give_back()
        if self.layout.places is not None:
            self.layout.places.give_back()


class ExpertStore(FileStore):
    """Reads experts of a checkpoint folder; any number of threads at once.

    folder: of the checkpoint.
    model: built from the folder's configuration, on the meta device, in the dtype that experts shall have, and prepared
        by the encoding.
    encoding: of the experts in the files.
    plan: of the experts; None: that of the folder's safetensors files.
    layout: makes the layout of slots from the plan; None: slots hold the parameters as the model has them.
    direct_io: past the page cache (O_DIRECT), where the file system has it; else buffered, which is logged once.
    reader: reads the files, as os.preadv does.

    Raises ConfigError when the folder is no safetensors checkpoint of this model or lacks experts, ExpertReadError for
    a truncated file, UncacheableError for experts that the layout cannot hold.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        encoding: Encoding = FLOATS,
        *,
        plan: Plan | None = None,
        layout: Callable[[Plan], Layout] | None = None,
        direct_io: bool = False,
        reader: Reader = os.preadv,
    ) -> None:
        self.folder = Path(folder)
        if plan is None:
            extents = open_checkpoint(self.folder)
            encoding.check_files(self.folder, extents.values())
            plan = plan_checkpoint(self.folder, model, extents)
        self.plan = plan
        self.layers, self.num_experts = plan.layers, plan.num_experts
        self._paths = plan.paths
        self.layout = ParamsLayout(plan, encoding) if layout is None else layout(plan)
        self.layout.probe()
        self._likes = likes = [self.layout.parts(layer) for layer in range(len(self.layers))]
        # Of slots without places, made for the first of them: most layouts have places.
        self._pools: Pools | None = None
        self._making = threading.Lock()
        super().__init__(self._paths, direct_io, reader)
        self.params = tuple(tuple(parts) for parts in likes)
        self.expert_bytes = tuple(sum(part.nbytes for part in parts.values()) for parts in likes)

    def read(self, layer: int, expert: int) -> Slot:
        # Slots outlive the inference mode of the thread that happens to ask for them, so they are ordinary tensors.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            if (holds := self.layout.holds) != "own":
                return self._slot(layer, *self._pieces(layer, expert, as_stored=holds == "stored"))
            return self._blocked(layer, expert)

    def _blocked(self, layer: int, expert: int) -> Slot:
        """Blocks are read to their places in the slot; what must become blocks first goes by way of other memory."""
        layout, groups = self.layout, self.plan.groups[layer]
        if not isinstance(layout, BlocksLayout) or not any(group.are_blocks for group in groups):
            return layout.filled(layer, self._stored(layer, expert))
        assert layout.places is not None
        slot, parts, rest = layout.places.slot(layer), list[tuple[Extent, Tensor]](), list[Group]()
        for group in groups:
            if not group.are_blocks:
                rest.append(group)
                continue
            extents = [source.of(expert, self.num_experts[layer]) for source in group.sources]
            for band in layout.coded(layer)[group.params[0]].bands:
                mine = [extents.pop(0)]
                # A band is one tensor of the file, or several of one type.
                while sum(extent.size for extent in mine) < slot[band.name].nbytes:
                    mine.append(extents.pop(0))
                parts += _parts(mine, slot[band.name])
        self._reader.fill(parts)
        if rest:
            for name, part in layout.in_blocks(layer, self._stored(layer, expert, rest)).items():
                slot[name].copy_(part)
        return slot

    def give_back(self) -> None:
        super().give_back()
        if self._pools is not None:
            self._pools.give_back()

    def stored(self, layer: int, expert: int) -> dict[str, Tensor]:
        """One expert as the files have it: codes and scales by the endings of their names, floats as parameters."""
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            return self._stored(layer, expert)

    def like(self, layer: int) -> dict[str, Tensor]:
        """What a slot of this layer holds, by name, on the meta device."""
        return self._likes[layer]

    def sample(self, layer: int, expert: int, count: int) -> dict[str, Tensor]:
        """The first numbers of each part of an expert's slot, at most `count`, flat; raises as `read`."""
        if not isinstance(self.layout, ParamsLayout):
            return {name: part.flatten()[:count].clone() for name, part in self.read(layer, expert).items()}
        found: dict[str, Tensor] = {}
        for group in self.plan.groups[layer]:
            # Only a conversion knows where the first numbers come from, so the expert is read whole.
            if group.order is None:
                whole = self.read(layer, expert)
                found |= {name: whole[name].flatten()[:count].clone() for name in group.params}
                continue
            first = group.sources[group.order[0]].of(expert, self.num_experts[layer])
            part = torch.empty(min(count, first.size // first.dtype.itemsize), dtype=first.dtype, device="cpu")
            self._reader.fill([(replace(first, shape=tuple(part.shape), size=part.nbytes), part)])
            found[group.params[0]] = part.to(self._likes[layer][group.params[0]].dtype)
        return found

    def fingerprint(self, layer: int) -> str:
        """Ties copies of a layer in any encoding to these files: a hash of the first bytes that its first and its last
        expert have there, which every training changes; raises as `read`."""
        count = self.num_experts[layer]
        experts = sorted({0, count - 1})
        sources = [source for group in self.plan.groups[layer] for source in group.sources]
        return fingerprint_of(self._reader, (source.of(expert, count) for expert in experts for source in sources))

    def state(self) -> list[list[Any]]:
        """Name, size and time of change (ns) of each file that experts are in (JSON-ready)."""
        stats = [(path.name, path.stat()) for path in sorted(self._paths)]
        return [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]

    def _stored(self, layer: int, expert: int, groups: Sequence[Group] | None = None) -> dict[str, Tensor]:
        straight, found = self._pieces(layer, expert, as_stored=True, groups=groups)
        if straight:
            parts, size = _laid(straight)
            found |= self._block(parts, size)
            self._fill(straight, found)
        return found

    def _slot(self, layer: int, straight: list[_Wanted], made: Mapping[str, Tensor]) -> Slot:
        """A slot with what is read straight into it, and what was made of other reads."""
        slot: Slot
        if self.layout.places is not None:
            slot = self.layout.places.slot(layer)
        else:
            parts, at = _laid(straight)
            likes = self._likes[layer]
            for name in made:
                at += -at % ALIGNMENT
                parts[name] = at, tuple(likes[name].shape), likes[name].dtype
                at += likes[name].nbytes
            slot = self._anywhere(layer, parts, at)
        self._fill(straight, slot)
        for name, value in made.items():
            slot[name].copy_(value)
        return slot

    def _anywhere(self, layer: int, parts: Parts, size: int) -> Slot:
        """These parts in a slot that no kernel looks for: of the pool, or beside it where more slots are kept than the
        pool has."""
        with self._making:
            if self._pools is None:
                # Each part may begin anywhere in a block of its file.
                sizes = [sum(part.nbytes + BLOCK for part in layer.values()) for layer in self._likes]
                self._pools = Pools(sizes, self.num_experts)
        try:
            return self._pools.of(layer).slot(parts)
        except ConfigError:
            return self._block(parts, size)

    def _fill(self, straight: list[_Wanted], into: Mapping[str, Tensor]) -> None:
        self._reader.fill([part for name, _, extents in straight for part in _parts(extents, into[name])])

    def _pieces(
        self, layer: int, expert: int, *, as_stored: bool, groups: Sequence[Group] | None = None
    ) -> tuple[list[_Wanted], dict[str, Tensor]]:
        """What of an expert can be read as it is, and the rest, read and converted.

        as_stored: codes are left as they are; else they become parameters.
        groups: of the layer; None: all.
        """
        count = self.num_experts[layer]
        found: dict[str, Tensor] = {}
        straight: list[_Wanted] = []
        for group in self.plan.groups[layer] if groups is None else groups:
            if group.is_coded and as_stored:
                for source, (ending, like) in zip(group.sources, group.on_meta().items(), strict=True):
                    straight.append((ending, like, [source.of(expert, count)]))
            elif group.straight:
                straight.append(self._wanted(group, layer, expert))
            else:
                found |= self._converted(group, layer, expert)
        return sorted(straight, key=lambda entry: (entry[2][0].path, entry[2][0].offset)), found

    def _wanted(self, group: Group, layer: int, expert: int) -> _Wanted:
        assert group.order is not None
        pieces = [source.of(expert, self.num_experts[layer]) for source in group.sources]
        (param,) = group.params
        return param, self.plan.likes[layer][param], [pieces[place] for place in group.order]

    def _converted(self, group: Group, layer: int, expert: int) -> dict[str, Tensor]:
        likes, count = self.plan.likes[layer], self.num_experts[layer]
        pieces = [source.of(expert, count) for source in group.sources]
        like = likes[group.params[0]]
        # The pieces in their order are the parameter, but in another type: read together, then converted.
        if group.order is not None:
            whole = self._blocks.empty(tuple(like.shape), pieces[0].dtype)
            self._reader.fill(_parts([pieces[place] for place in group.order], whole))
            return {group.params[0]: whole.to(like.dtype)}
        tensors = [
            self._blocks.empty(source.shape(), piece.dtype) for piece, source in zip(pieces, group.sources, strict=True)
        ]
        self._reader.fill(zip(pieces, tensors, strict=True))
        # Codes are no numbers yet: in the parameter's type they would lose digits before they are converted.
        made = group.convert(tensors if group.is_coded else [part.to(like.dtype) for part in tensors])
        return {name: made[name].to(likes[name].dtype) for name in group.params}


def _laid(straight: list[_Wanted]) -> tuple[dict[str, tuple[int, tuple[int, ...], torch.dtype]], int]:
    """Where these lie in memory of their own, and its size: in the order of the file, and at addresses that are its
    offsets modulo the block size, unless that would spoil the alignment of the tensors. So most of them are read
    straight into it."""
    found, at = {}, 0
    for name, like, extents in straight:
        offset = extents[0].offset
        step, phase = (ALIGNMENT, 0) if offset % ALIGNMENT else (BLOCK, offset % BLOCK)
        at += (phase - at) % step
        found[name] = at, tuple(like.shape), like.dtype
        at += like.nbytes
    return found, at


# Name, shape and type (on the meta device) of a tensor, and the extents that are it, one after another.
_Wanted = tuple[str, Tensor, list[Extent]]
