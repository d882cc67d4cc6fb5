"""Reads exactly one expert of a checkpoint into memory that is ours, as the layout of slots wants it.

Where the tensors lie, and how they become parameters, is the plan's matter (plan.py).
"""

from __future__ import annotations

import abc
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt.checkpoints import Extent, open_checkpoint
from remoe_adapt.expert_cache.blocks_layout import BlocksLayout
from remoe_adapt.expert_cache.direct_io import BLOCK, ExtentReader, Reader
from remoe_adapt.expert_cache.encoding import FLOATS, Encoding
from remoe_adapt.expert_cache.layouts import Layout, ParamsLayout
from remoe_adapt.expert_cache.memory import Blocks
from remoe_adapt.expert_cache.plan import Group, Plan, plan_checkpoint
from remoe_adapt.expert_cache.types import Slot

# Parameters lie at multiples of so many bytes, as torch's tensors do: elsewhere some kernels compute other last bits.
ALIGNMENT = 64
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

    def __init__(self, paths: Iterable[Path], direct_io: bool, reader: Reader) -> None:
        self._reader, self._blocks = ExtentReader(paths, direct_io=direct_io, reader=reader), Blocks()
        self.direct_io, self.close = self._reader.direct_io, self._reader.close

    @property
    def total_bytes(self) -> int:
        """What all experts take in memory."""
        return sum(count * size for count, size in zip(self.num_experts, self.expert_bytes, strict=True))

    @abc.abstractmethod
    def read(self, layer: int, expert: int) -> Slot:
        """What a slot holds of one expert, by name: tensors that own their memory.

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
        super().__init__(self._paths, direct_io, reader)
        try:
            self.layout: Layout = ParamsLayout(plan, encoding) if layout is None else layout(plan)
            self.layout.probe()
        except BaseException:
            self.close()
            raise
        likes = [self.layout.parts(layer) for layer in range(len(self.layers))]
        self._likes = likes
        self.params = tuple(tuple(parts) for parts in likes)
        self.expert_bytes = tuple(sum(part.nbytes for part in parts.values()) for parts in likes)

    def read(self, layer: int, expert: int) -> Slot:
        # Slots outlive the inference mode of the thread that happens to ask for them, so they are ordinary tensors.
        with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
            if isinstance(self.layout, ParamsLayout):
                return self._params(layer, expert)
            if isinstance(self.layout, BlocksLayout):
                return self._blocked(self.layout, layer, expert)
            return self.layout.filled(layer, self._stored(layer, expert))

    def _blocked(self, layout: BlocksLayout, layer: int, expert: int) -> Slot:
        """Blocks are read to their places in the slot; what must become blocks first goes by way of other memory."""
        slot, parts = layout.empty(layer), []
        groups = [group for group in self.plan.groups[layer] if not group.are_blocks]
        for group in (group for group in self.plan.groups[layer] if group.are_blocks):
            extents = [source.of(expert, self.num_experts[layer]) for source in group.sources]
            for whole in layout.bytes_of(layer, group.params[0], slot):
                mine, size = [], 0
                # A band is one tensor of the file, or several of one type.
                while size < whole.nbytes:
                    mine.append(extents.pop(0))
                    size += mine[-1].size
                parts += _parts(mine, whole)
        if parts:
            self._reader.fill(parts)
        return layout.filled(layer, self._stored(layer, expert, groups), slot) if groups else slot

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

    def _owned(self, value: Tensor, dtype: torch.dtype) -> Tensor:
        return self._blocks.empty(tuple(value.shape), dtype).copy_(value)

    def _params(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parameters of the model."""
        found: dict[str, Tensor] = {}
        straight: list[_Wanted] = []
        for group in self.plan.groups[layer]:
            if group.straight:
                straight.append(self._wanted(group, layer, expert))
            else:
                found |= self._converted(group, layer, expert)
        return found | self._straight(straight)

    def _stored(self, layer: int, expert: int, groups: Sequence[Group] | None = None) -> dict[str, Tensor]:
        """The tensors of these groups; None: of all."""
        count = self.num_experts[layer]
        found: dict[str, Tensor] = {}
        straight: list[_Wanted] = []
        for group in self.plan.groups[layer] if groups is None else groups:
            if group.is_coded:
                for source, (ending, like) in zip(group.sources, group.on_meta().items(), strict=True):
                    straight.append((ending, like, [source.of(expert, count)]))
            elif group.straight:
                straight.append(self._wanted(group, layer, expert))
            else:
                found |= self._converted(group, layer, expert)
        return found | self._straight(straight)

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
            return {group.params[0]: self._owned(whole, like.dtype)}
        tensors = [
            self._blocks.empty(source.shape(), piece.dtype) for piece, source in zip(pieces, group.sources, strict=True)
        ]
        self._reader.fill(zip(pieces, tensors, strict=True))
        # Codes are no numbers yet: in the parameter's type they would lose digits before they are converted.
        made = group.convert(tensors if group.is_coded else [part.to(like.dtype) for part in tensors])
        return {name: self._owned(made[name], likes[name].dtype) for name in group.params}

    def _straight(self, wanted: list[_Wanted]) -> dict[str, Tensor]:
        """These tensors in one block, as far as possible read straight into it: in the order of the file, and at
        addresses that are its offsets modulo the block size, unless that would spoil the alignment of the tensors."""
        if not wanted:
            return {}
        # One block for all: the parts of an expert come and go together, and each mapping counts. Each of them may
        # begin anywhere in a block of the file, so each gets one block more.
        whole_bytes = sum(like.nbytes for _, like, _ in wanted)
        block = self._blocks.take((-(-whole_bytes // BLOCK) + len(wanted)) * BLOCK)
        at, found, parts = 0, {}, []
        for name, like, extents in sorted(wanted, key=lambda entry: (entry[2][0].path, entry[2][0].offset)):
            offset = extents[0].offset
            step, phase = (ALIGNMENT, 0) if offset % ALIGNMENT else (BLOCK, offset % BLOCK)
            at += (phase - at) % step
            count = like.numel()
            whole = torch.frombuffer(block, dtype=like.dtype, count=count, offset=at).view(like.shape)
            at += count * like.dtype.itemsize
            parts += _parts(extents, whole)
            found[name] = whole
        self._reader.fill(parts)
        return found


# Name, shape and type (on the meta device) of a tensor, and the extents that are it, one after another.
_Wanted = tuple[str, Tensor, list[Extent]]
