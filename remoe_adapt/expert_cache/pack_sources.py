"""What can be packed of a checkpoint: its experts as they are, its experts in blocks of ggml, and its dense part.

Of a parameter's matrix the rows are in blocks that belong to its outputs, so that a product with a vector takes whole
blocks; where the model has it the other way round (`is_transposed`), it is turned first.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from remoe_adapt.checkpoints import Extent
from remoe_adapt.expert_cache.block_products import CodedBand
from remoe_adapt.expert_cache.blocks_layout import BlocksLayout
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore, dense_fingerprint
from remoe_adapt.expert_cache.encodings import BlockType, dense_modules, quantise
from remoe_adapt.expert_cache.pack import GGML, PackedParam, PackedStore
from remoe_adapt.expert_cache.packing import Piece
from remoe_adapt.expert_cache.plan import Plan
from remoe_adapt.routers import survey_routers

# Weights with fewer rows stay as they are: gates of a shared expert, heads of a few classes. They decide, as routers
# do, and take no room.
_LEAST_ROWS = 32


def quantised_params(likes: Mapping[str, torch.Tensor], kind: BlockType, *, turned: bool) -> dict[str, PackedParam]:
    """How each parameter of an expert is encoded in blocks of `kind`: matrices in one band of rows, the others as they
    are.

    likes: the parameters, by name. turned: matrices are [inputs, outputs].
    """
    found = {}
    for name, like in likes.items():
        if like.ndim != 2:
            found[name] = PackedParam()
            continue
        rows, cols = reversed(like.shape) if turned else like.shape
        found[name] = PackedParam(GGML, rows, cols, (CodedBand(name, kind, rows),), turned)
    return found


def quantised_parts(
    likes: Mapping[str, torch.Tensor], params: Mapping[str, PackedParam]
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and type of each part of an expert that is encoded so."""
    found = {name: (tuple(like.shape), like.dtype) for name, like in likes.items()}
    for name, param in params.items():
        for band in param.bands:
            found[name] = ((param.rows, band.kind.row_bytes(param.cols)), torch.uint8)
    return found


class FloatExperts:
    """The parameters of the model as the store reads them, bit for bit."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.layers, self.num_experts = store.layers, store.num_experts

    def parts(self, layer: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Each parameter is one part."""
        return {name: (tuple(like.shape), like.dtype) for name, like in self.store.like(layer).items()}

    def params(self, layer: int) -> dict[str, PackedParam]:
        """All floats."""
        return {name: PackedParam() for name in self.store.params[layer]}

    def fingerprint(self, layer: int) -> str | None:
        """None: the numbers are compared."""
        return None

    def read(self, layer: int, expert: int) -> Piece:
        """One expert; raises ExpertReadError."""
        return Piece(self.store.read(layer, expert), {})

    def state(self) -> Any:
        """Of the checkpoint's files."""
        return self.store.state()

    def check(self, folder: Path) -> None:
        """Raises ConfigError or ExpertReadError for a pack that is none of this store."""
        PackedStore(folder, self.store).close()


class QuantisedExperts(FloatExperts):
    """Every matrix in blocks of one type; what is no matrix, as a bias, stays as it is.

    store: reads the experts, in whatever float type.
    kind: of the blocks, Q4_1 or Q8_0.
    """

    def __init__(self, store: ExpertStore, kind: BlockType) -> None:
        super().__init__(store)
        self.kind = kind

    def parts(self, layer: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """A matrix is one part of blocks."""
        return quantised_parts(self.store.like(layer), self.params(layer))

    def params(self, layer: int) -> dict[str, PackedParam]:
        """One band of rows for each matrix."""
        return quantised_params(self.store.like(layer), self.kind, turned=self.store.plan.transposed[layer])

    def fingerprint(self, layer: int) -> str | None:
        """Of the numbers before they were encoded."""
        return self.store.fingerprint(layer)

    def read(self, layer: int, expert: int) -> Piece:
        """One expert; raises ExpertReadError, and ConfigError for numbers that no block can hold."""
        parts, losses = dict(self.store.read(layer, expert)), {}
        for name, param in self.params(layer).items():
            if param.codec == GGML:
                matrix_NK = parts[name].t() if param.transposed else parts[name]
                made = quantise(matrix_NK, self.kind, f"{name} of expert {expert} of {self.layers[layer]}")
                parts[name], losses[name] = made.blocks_NB, (made.error, made.norm)
        return Piece(parts, losses)


class StoredExperts(FloatExperts):
    """The codes of a quantised checkpoint as blocks of ggml: their own where ggml has them, else the nearest.

    store: reads the experts, into slots of blocks.
    """

    def __init__(self, store: ExpertStore) -> None:
        super().__init__(store)
        assert isinstance(store.layout, BlocksLayout)
        self._layout = store.layout

    def params(self, layer: int) -> dict[str, PackedParam]:
        """A band of rows for each part of blocks."""
        coded, plan = self._layout.coded(layer), self.store.plan
        found = {name: PackedParam() for name in plan.likes[layer]}
        for name, param in coded.items():
            rows = sum(band.rows for band in param.bands)
            found[name] = PackedParam(GGML, rows, param.cols, param.bands, plan.transposed[layer])
        return found

    def fingerprint(self, layer: int) -> str | None:
        """Of the codes before they became blocks."""
        return self.store.fingerprint(layer)

    def read(self, layer: int, expert: int) -> Piece:
        """One expert; raises ExpertReadError."""
        stored, plan = self.store.stored(layer, expert), self.store.plan
        slot, losses = self._layout.filled(layer, stored), {}
        with torch.no_grad():
            exact: dict[str, torch.Tensor] = {}
            for group in plan.groups[layer]:
                exact |= plan.converted(group, stored)
            for name in self._layout.coded(layer):
                wanted = exact[name].float()
                found = self._layout.weight(layer, slot, name).float()
                losses[name] = float((found - wanted).square().sum()), float(wanted.square().sum())
        return Piece(dict(slot), losses)


class DensePart:
    """The weights of a model's linear layers and embeddings in blocks, everything else but its experts as it is.

    Routers stay as they are, with the gates of shared experts, norms, biases, and whatever is of a class that is
    neither nn.Linear nor nn.Embedding, see `dense_modules`.

    model: with its dense part loaded, on the CPU; or on the meta device, for sizes.
    plan: of its experts.
    extents: of all tensors of the checkpoint, by name.
    kind: of the blocks; None: all as it is.
    """

    def __init__(
        self, model: PreTrainedModel, plan: Plan, extents: Mapping[str, Extent], kind: BlockType | None
    ) -> None:
        self._plan, self._extents, self._kind = plan, extents, kind
        self._entries: dict[str, dict[str, Any]] = {}
        # state_dict lists tied weights under each of their names: the first one counts.
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        experts = tuple(f"{name}." for name in plan.layers)
        self._tensors = {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in tied and not name.startswith(experts)
        }
        if kind is None:
            return
        for module, (rows, cols) in dense_modules(model, {*plan.layers, *_routers(model)}).items():
            name = f"{module}.weight"
            if rows >= _LEAST_ROWS and name in self._tensors:
                self._entries[name] = {"codec": kind.name, "rows": rows, "cols": cols}

    def entries(self) -> dict[str, dict[str, Any]]:
        """Of the weights in blocks: codec, rows and cols by name."""
        return self._entries

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and type by name."""
        return {
            name: (self._block_shape(name), torch.uint8)
            if name in self._entries
            else (tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
        }

    def fingerprint(self) -> str:
        """Of all tensors of the checkpoint that are of no expert."""
        return dense_fingerprint(self._plan, self._extents)

    def read(self, name: str) -> Piece:
        """One tensor; raises ConfigError for numbers that no block can hold."""
        if name not in self._entries or self._kind is None:
            return Piece({name: self._tensors[name]}, {})
        made = quantise(self._tensors[name], self._kind, name)
        return Piece({name: made.blocks_NB}, {name: (made.error, made.norm)})

    def _block_shape(self, name: str) -> tuple[int, int]:
        entry = self._entries[name]
        assert self._kind is not None
        return entry["rows"], self._kind.row_bytes(entry["cols"])


def _routers(model: PreTrainedModel) -> set[str]:
    found = survey_routers(model)
    return {ref.name for ref in found.refs} | {name for name, _ in (*found.refused, *found.foreign)}
