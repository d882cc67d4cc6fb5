"""A layer's experts computed as a cache computes them, before there are weights: for whoever wants to time it.

Everything is what a loaded model has: layout of the slots, kernels, look-ups, the experts' class. Only the slots hold
numbers of no meaning, and experts share them where a model has more than are worth their memory.
"""

from __future__ import annotations

import copy
import itertools
import random
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.expert_cache.blocks_layout import BandsLayout
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.encodings import BlockType, dequantise
from remoe_adapt.expert_cache.experts import CachedExperts
from remoe_adapt.expert_cache.layouts import Layout
from remoe_adapt.expert_cache.plan import Plan
from remoe_adapt.expert_cache.types import Slot

# Numbers of the size that weights have: processors take longer with tiny ones, and large ones become infinite.
_WEIGHT = 1 / 64
# Bytes of scales and codes that are no blocks of ggml.
_CODE = 0x3C
_CPU = torch.device("cpu")
# Numbers from one expert's weights to the next: kernels want tensors to begin at 16 bytes.
_STEP = 16


class ExpertTrial:
    """Decodes one token after another through the experts of some layers, all of which are in slots.

    modules: the experts modules in model order, on the meta device.
    num_experts: by layer.
    top_k: how many of them a token chooses, by layer.
    layout: of the slots; one of its own.
    dtype: of hidden states.
    memory_bytes: of different slots; they are two at least.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        num_experts: Sequence[int],
        top_k: Sequence[int],
        layout: Layout,
        dtype: torch.dtype,
        memory_bytes: int,
    ) -> None:
        if layout.places is None:
            layout.place(None)
        source = _Slots(layout, num_experts, memory_bytes)
        self.cache = cache = ExpertCache(source, source.total_bytes)
        turns, there = [], 0
        for layer, (module, count, chosen) in enumerate(zip(modules, num_experts, top_k, strict=True)):
            cache.lease(layer, range(count)).release()
            experts = CachedExperts(cache, layer, dtype, _CPU, layout)
            turns.append((experts, _own(module, {}), _choices(count, chosen, layer)))
            there += count
            # Layers take turns until every slot has had one.
            if there >= source.slots:
                break
        self._turns = itertools.cycle(turns)
        self._x_TD = _hidden(layout.plan, dtype)

    def run(self) -> Tensor:
        """[1, D]: what the next layer's experts make of a token."""
        experts, module, choices = next(self._turns)
        ids_TK = next(choices)
        with torch.inference_mode():
            return experts.run(module, self._x_TD, ids_TK, _weights(ids_TK, self._x_TD.dtype))


class WholeTrial:
    """The same of transformers' own experts of floats, by the function that they have by default.

    module: of a layer, on the meta device.
    plan: whose first layer it is.
    top_k: how many a token chooses.
    dtype: of hidden states and weights.
    memory_bytes: of different weights; experts overlap where they are more.
    """

    def __init__(self, module: nn.Module, plan: Plan, top_k: int, dtype: torch.dtype, memory_bytes: int) -> None:
        count, sizes = plan.num_experts[0], {name: like.numel() for name, like in plan.likes[0].items()}
        params = {}
        for name, like in plan.likes[0].items():
            size, most = sizes[name], memory_bytes * sizes[name] // sum(sizes.values()) // like.element_size()
            # Multiples of what kernels want tensors to begin at.
            step = (
                max(_STEP, min(size, (most - size) // max(1, count - 1)) // _STEP * _STEP)
                if size % _STEP == 0
                else size
            )
            numbers = torch.full((size + step * (count - 1),), _WEIGHT, dtype=like.dtype)
            row = torch.empty(like.shape, device="meta").stride()
            params[name] = nn.Parameter(numbers.as_strided((count, *like.shape), (step, *row)), requires_grad=False)
        self._module, self._choices = _own(module, params), _choices(count, top_k, 0)
        self._x_TD = _hidden(plan, dtype)

    def run(self) -> Tensor:
        """[1, D]: what the experts make of a token."""
        ids_TK = next(self._choices)
        with torch.inference_mode():
            found: Tensor = self._module(self._x_TD, ids_TK, _weights(ids_TK, self._x_TD.dtype))
            return found


class _Slots:
    """An ExpertSource of as many different slots of each size as its memory holds; reads take turns with them."""

    def __init__(self, layout: Layout, num_experts: Sequence[int], memory_bytes: int) -> None:
        self._layout, plan = layout, layout.plan
        self.layers, self.num_experts = plan.layers, tuple(num_experts)
        parts = [layout.parts(layer) for layer in range(len(plan.layers))]
        self.expert_bytes = tuple(sum(part.nbytes for part in layer.values()) for layer in parts)
        self.total_bytes = sum(n * size for n, size in zip(self.num_experts, self.expert_bytes, strict=True))
        self.slots = max(2, min(sum(self.num_experts), memory_bytes // max(self.expert_bytes)))
        self._made: dict[int, list[Slot]] = {}
        self._reads, self._lock = itertools.count(), threading.Lock()

    def read(self, layer: int, expert: int) -> Slot:
        # A cache reads in several threads, which would make more slots between them than were asked for.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            made, number = self._made.setdefault(self.expert_bytes[layer], []), next(self._reads)
            if len(made) < self.slots:
                made.append(self._layout.packed(layer, _contents(self._layout, layer)))
            return made[number % len(made)]

    def give_back(self) -> None:
        return None


def _contents(layout: Layout, layer: int) -> dict[str, Tensor]:
    """An expert as a pack has it."""
    found: dict[str, Tensor] = {}
    coded = layout.coded(layer) if isinstance(layout, BandsLayout) else {}
    for param in coded.values():
        for band in param.bands:
            shape = band.rows, band.kind.row_bytes(param.cols)
            found[band.name] = torch.full(shape, byte_of(band.kind), dtype=torch.uint8)
            if band.order is not None:
                found[band.order] = torch.randperm(param.cols)
    for name, like in (layout.parts(layer) if not coded else layout.plan.likes[layer]).items():
        if name not in coded and name not in found:
            found[name] = _filled(like)
    return found


def byte_of(kind: BlockType) -> int:
    """The byte of which blocks of this type are worth numbers of the size of weights."""
    blocks_NB = torch.arange(256, dtype=torch.uint8)[:, None].expand(256, kind.bytes).contiguous()
    sizes_N = dequantise(blocks_NB, kind, kind.values).abs().mean(1)
    return int((sizes_N.log() - torch.tensor(_WEIGHT).log()).abs().nan_to_num(nan=torch.inf).argmin())


def _filled(like: Tensor) -> Tensor:
    if like.is_floating_point() and like.element_size() > 1:
        return torch.full(like.shape, _WEIGHT, dtype=like.dtype)
    if like.element_size() > 1:  # places of something
        return torch.zeros(like.shape, dtype=like.dtype)
    return torch.full((like.numel(),), _CODE, dtype=torch.uint8).view(like.dtype).view(like.shape)


def _own(module: nn.Module, params: dict[str, nn.Parameter]) -> nn.Module:
    """A copy of an experts module that has these parameters, and on the CPU whatever else it computes with."""
    copied: nn.Module = object.__new__(type(module))
    children = {name: copy.deepcopy(child).to_empty(device="cpu") for name, child in module.named_children()}
    for child in children.values():
        for tensor in itertools.chain(child.parameters(), child.buffers()):
            tensor.data.copy_(_filled(tensor))
    fields = vars(copied)
    fields.update(vars(module), _parameters=params, _modules=children, training=False)
    return copied


def _choices(count: int, chosen: int, seed: int) -> Iterator[Tensor]:
    """Ids [1, K] of different experts: each comes back once all others have had their turn."""
    order = list(range(count))
    random.Random(seed).shuffle(order)
    for first in itertools.count(step=chosen):
        yield torch.tensor([[order[(first + at) % count] for at in range(chosen)]])


def _hidden(plan: Plan, dtype: torch.dtype) -> Tensor:
    likes: Mapping[str, Any] = plan.likes[0]
    # [outputs, inputs] of the matrix that experts multiply with first, or the other way round.
    first = likes.get("gate_up_proj", likes.get("up_proj"))
    width = first.shape[0] if plan.transposed[0] else first.shape[1]
    return torch.randn(1, width, generator=torch.Generator().manual_seed(0)).to(dtype)


def _weights(ids_TK: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.full(ids_TK.shape, 1 / ids_TK.shape[1], dtype=dtype)
