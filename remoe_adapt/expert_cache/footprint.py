"""What a model takes in memory and in storage, format by format, from its configuration and headers alone.

A format is a checkpoint as it is stored, or what `remoe pack` makes of it. Everything is counted on the meta device,
with the code that loads and packs models: its blocks, its parts of a piece, its choice of what is encoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_adapt._support import printable
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.block_products import CodedBand, CodedLayer, CodedParam
from remoe_adapt.expert_cache.blocks_layout import coded_layers
from remoe_adapt.expert_cache.budget import bytes_of_dense
from remoe_adapt.expert_cache.checkpoint import (
    LOADING,
    Checkpoint,
    CodedCheckpoint,
    GgufModel,
    QuantisedCheckpoint,
    kernels_for,
)
from remoe_adapt.expert_cache.dense import Encoded
from remoe_adapt.expert_cache.device_layout import Kernels, layout_for
from remoe_adapt.expert_cache.encoding import FLOATS, Encoding
from remoe_adapt.expert_cache.encodings import (
    KINDS,
    BlockType,
    EncodedEmbedding,
    EncodedLinear,
    block_type,
    encode_dense,
)
from remoe_adapt.expert_cache.experts import check_experts
from remoe_adapt.expert_cache.layouts import Layout, ParamsLayout
from remoe_adapt.expert_cache.pack import DENSE, PackedLayer, read_manifest
from remoe_adapt.expert_cache.pack_sources import DensePart, quantised_params, quantised_parts
from remoe_adapt.expert_cache.plan import Plan, empty_plan, experts_modules
from remoe_adapt.expert_cache.trial import ExpertTrial, WholeTrial
from remoe_adapt.routers import survey_routers


@dataclass(frozen=True, slots=True)
class Parameters:
    """How many parameters a model has. chosen_NL: by layer of experts, how many a token uses; num_experts_L beside it.

    embedding: of the table of input embeddings, of which a token takes one row; 0 where the head is the same table.
    """

    total: int
    experts: int
    embedding: int
    layers: int
    num_experts_L: tuple[int, ...]
    chosen_L: tuple[int, ...]
    experts_L: tuple[int, ...]

    @property
    def active(self) -> int:
        """Those that a token uses: the dense part, the table of embeddings too, and the experts chosen for it."""
        chosen = zip(self.experts_L, self.chosen_L, self.num_experts_L, strict=True)
        return self.total - self.experts + sum(params * top_k // count for params, top_k, count in chosen)


@dataclass(frozen=True, slots=True)
class Footprint:
    """A model in one format; layers, num_experts and expert_bytes as an `ExpertSource` has them.

    bits, dense_bits: of `remoe pack`; None: as stored.
    expert_bytes: of a slot, by layer. piece_bytes: what is read for one expert, by layer.
    dense_bytes: in memory. workspace_bytes: of an expert that is dequantised on use.
    stored_bytes: of the checkpoint's files as they are, or of the pack with its dense part if that is in it.
    read_bytes: of the dense part that a token multiplies with, by kind ("bfloat16", "q8_0" ...). dense_matrices: how
        many there are of these, by kind and (outputs, inputs).
    make_layout: of the slots that loading would choose here.
    """

    bits: int | None
    dense_bits: int | None
    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    piece_bytes: tuple[int, ...]
    dense_bytes: int
    workspace_bytes: int
    stored_bytes: int
    read_bytes: Mapping[str, int]
    dense_matrices: Mapping[tuple[str, int, int], int]
    make_layout: Callable[[], Layout] = field(compare=False, repr=False)

    @property
    def total_bytes(self) -> int:
        """What all experts take in memory."""
        return sum(count * size for count, size in zip(self.num_experts, self.expert_bytes, strict=True))


def parameters_of(checkpoint: Checkpoint) -> Parameters:
    """Counts the parameters of a checkpoint's model. Raises as `Footprints`."""
    with LOADING:
        skeleton = checkpoint.skeleton()
    modules = experts_modules(skeleton)
    experts = [sum(param.numel() for param in module.parameters()) for module in modules.values()]
    routers = survey_routers(skeleton)
    top_k = {ref.name.rpartition(".")[0]: ref.spec.top_k for ref in routers.usable()}
    plan = empty_plan(checkpoint.folder, skeleton)
    # A router lies beside its experts module, or in the block that holds both.
    chosen = []
    for at, name in enumerate(plan.layers):
        parent = name.rpartition(".")[0]
        found = top_k.get(parent, list(top_k.values())[min(at, len(top_k) - 1)])
        chosen.append(found)
    table = _own_table(skeleton)
    return Parameters(
        sum(param.numel() for param in skeleton.parameters()), sum(experts), 0 if table is None else table.numel(),
        _depth(skeleton), plan.num_experts, tuple(chosen), tuple(experts),
    )  # fmt: skip


class Footprints:
    """What a checkpoint's model takes, in any format; what formats share is counted once.

    has_files: the headers of all its files are there, and tell how codes are stored; else the configuration does.
    on_codes: there are kernels for codes on the CPU, so that the dense part stays in codes where it has them, and
        experts of a quantised checkpoint become blocks; else the dense part is floats, and they stay as stored.
    """

    def __init__(self, checkpoint: Checkpoint, *, has_files: bool = False, on_codes: bool = True) -> None:
        self._checkpoint, self._has_files, self._on_codes = checkpoint, has_files, on_codes
        with LOADING:
            self._skeleton = checkpoint.skeleton()
        check_experts(experts_modules(self._skeleton))
        self._plan = empty_plan(checkpoint.folder, self._skeleton)
        self._dense: dict[int | None, _Dense] = {}

    def of(self, bits: int | None = None, dense_bits: int | None = None) -> Footprint:
        """As stored, or as `pack_experts` makes it of these bits.

        Raises UncacheableError for models whose experts cannot be cached, ConfigError and ExpertReadError for files
        that are not this model's.
        """
        experts = self._stored() if bits is None else _quantised(self._plan, KINDS[bits])
        if dense_bits is not None and bits is None:
            experts.pack()
        if dense_bits not in self._dense:
            self._dense[dense_bits] = self._dense_part(dense_bits)
        dense = self._dense[dense_bits]
        in_files = dense.nbytes if bits is None and dense_bits is None else dense.packed_bytes
        return self._footprint(bits, dense_bits, experts, dense, in_files)

    def of_pack(self, folder: Path) -> Footprint:
        """A pack that is there. Raises ConfigError for one of another model."""
        manifest = read_manifest(folder)
        experts, entries = _packed(self._plan, manifest["layers"], folder), manifest["dense"]
        dense = self._dense_part(None, entries or None)
        in_files = (folder / DENSE).stat().st_size if (folder / DENSE).is_file() else 0
        return self._footprint(None, None, experts, dense, in_files)

    def trial(
        self,
        found: Footprint,
        chosen_L: Sequence[int],
        memory_bytes: int,
        *,
        whole: bool = False,
    ) -> ExpertTrial | WholeTrial:
        """Experts of this format to time.

        found: by one of these methods.
        chosen_L: by layer of experts, how many a token uses.
        memory_bytes: for different experts.
        whole: as transformers has them in memory; of floats alone.
        """
        modules, plan, dtype = list(experts_modules(self._skeleton).values()), self._plan, self._checkpoint.dtype
        if whole:
            return WholeTrial(modules[0], plan, chosen_L[0], dtype, memory_bytes)
        return ExpertTrial(
            modules, plan.num_experts, chosen_L, found.make_layout(), dtype, memory_bytes
        )  # fmt: skip

    def _footprint(
        self, bits: int | None, dense_bits: int | None, experts: _Experts, dense: _Dense, in_files: int
    ) -> Footprint:
        plan = self._plan
        pieces = sum(count * size for count, size in zip(plan.num_experts, experts.piece_bytes, strict=True))
        workspace = max(sum(like.nbytes for like in likes.values()) for likes in plan.likes) if experts.is_coded else 0
        return Footprint(
            bits, dense_bits, plan.layers, plan.num_experts, tuple(experts.slot_bytes), tuple(experts.piece_bytes),
            dense.nbytes, workspace, pieces + in_files, dense.read_bytes, dense.matrices, experts.make_layout,
        )  # fmt: skip

    def _stored(self) -> _Experts:
        checkpoint = self._checkpoint
        if isinstance(checkpoint, GgufModel) or (self._has_files and isinstance(checkpoint, QuantisedCheckpoint)):
            return _coded(checkpoint, checkpoint.plan(self._skeleton), self._on_codes)
        if isinstance(checkpoint, QuantisedCheckpoint):
            return _described(self._plan, checkpoint, self._on_codes)
        return _floats(self._plan, checkpoint.encoding)

    def _dense_part(self, dense_bits: int | None, entries: Mapping[str, dict[str, Any]] | None = None) -> _Dense:
        """entries: of a pack, instead of bits."""
        with LOADING:
            # One of its own, since modules of it are encoded.
            skeleton = self._checkpoint.skeleton()
            modules = experts_modules(skeleton)
            packed_bytes = 0
            if dense_bits is not None:
                part = DensePart(skeleton, self._plan, {}, KINDS.get(dense_bits))
                shapes, entries = part.tensors().values(), part.entries()
                packed_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
            encoded = self._checkpoint.encoded(skeleton) if entries is None else _encoded(entries)
            if self._on_codes:
                encode_dense(skeleton, encoded)
        return _Dense(bytes_of_dense(skeleton, modules), packed_bytes, *_products(skeleton, modules))


def footprint(
    checkpoint: Checkpoint,
    bits: int | None = None,
    dense_bits: int | None = None,
    *,
    has_files: bool = False,
    on_codes: bool = True,
) -> Footprint:
    """What a checkpoint's model takes in one format; see `Footprints`."""
    return Footprints(checkpoint, has_files=has_files, on_codes=on_codes).of(bits, dense_bits)


class _Dense(NamedTuple):
    """Bytes of a dense part in memory, in a pack's file, and of what a token multiplies with by kind; its matrices."""

    nbytes: int
    packed_bytes: int
    read_bytes: dict[str, int]
    matrices: dict[tuple[str, int, int], int]


def _encoded(entries: Mapping[str, dict[str, Any]]) -> dict[str, Encoded]:
    return {
        name.removesuffix(".weight"): Encoded(block_type(entry["codec"]), entry["rows"], entry["cols"])
        for name, entry in entries.items()
    }


class _Experts:
    """Bytes of an expert of each layer, in a slot and as it is read; and what makes the layout of slots.

    coded: the layers' codes, as far as they are known to become blocks.
    """

    def __init__(self, plan: Plan, *, is_coded: bool) -> None:
        self.slot_bytes: list[int] = []
        self.piece_bytes: list[int] = []
        self.is_coded = is_coded
        self.coded: list[CodedLayer] = []
        self.make_layout: Callable[[], Layout] = lambda: _layout_of(plan, self.coded)
        self._parts: list[Mapping[str, Tensor]] = []

    def add(self, parts: Mapping[str, Tensor], piece_bytes: int | None = None, coded: CodedLayer | None = None) -> None:
        """A layer: the parts of a slot on the meta device, and what is read (None: the same)."""
        size = sum(part.nbytes for part in parts.values())
        self._parts.append(parts)
        self.coded.append(coded or {})
        self.slot_bytes.append(size)
        self.piece_bytes.append(size if piece_bytes is None else piece_bytes)

    def pack(self) -> None:
        """From here on they lie in a pack, in pieces of whole blocks."""
        layers = [{name: (tuple(part.shape), part.dtype) for name, part in parts.items()} for parts in self._parts]
        self.piece_bytes = [PackedLayer.of("", 1, parts, {}).bytes for parts in layers]


def _layout_of(plan: Plan, coded: Sequence[CodedLayer]) -> Layout:
    """As a model on the CPU would have it, of codes that are known."""
    try:
        return layout_for(plan, _kernels(), coded)
    except UncacheableError:  # the kernels here do not know these codes
        return layout_for(plan, None, coded)


def _layout_of_files(checkpoint: CodedCheckpoint, plan: Plan) -> Layout:
    """The same, of codes in files."""
    layout = checkpoint.layout(_kernels())(plan)
    layout.probe()
    return layout


def _kernels() -> Kernels | None:
    return kernels_for("auto", torch.device("cpu"))


def _floats(plan: Plan, encoding: Encoding) -> _Experts:
    found = _Experts(plan, is_coded=False)
    found.make_layout = partial(ParamsLayout, plan, encoding)
    for likes in plan.likes:
        found.add(likes)
    return found


def _quantised(plan: Plan, kind: BlockType) -> _Experts:
    """As `remoe pack --bits` has them."""
    found = _Experts(plan, is_coded=True)
    layers = zip(plan.layers, plan.num_experts, plan.likes, plan.transposed, strict=True)
    for name, count, likes, turned in layers:
        params = quantised_params(likes, kind, turned=turned)
        parts = quantised_parts(likes, params)
        packed = PackedLayer.of(name, count, parts, params)
        found.add(
            {part: torch.empty(shape, dtype=dtype, device="meta") for part, (shape, dtype) in parts.items()},
            packed.bytes,
            packed.coded(),
        )
    return found


def _packed(plan: Plan, layers: Sequence[PackedLayer], folder: Path) -> _Experts:
    """As a pack that is there has them. Raises ConfigError for that of another model."""
    modules = zip(plan.layers, plan.num_experts, plan.likes, strict=True)
    ours = [(name, count, sorted(likes)) for name, count, likes in modules]
    if [(layer.name, layer.experts, sorted(layer.params)) for layer in layers] != ours:
        raise ConfigError(f"{printable(folder)} is a pack of another model than {printable(plan.where)}: give its own.")
    found = _Experts(plan, is_coded=any(layer.encoded for layer in layers))
    if not found.is_coded:
        found.make_layout = partial(ParamsLayout, plan, FLOATS)
    for layer in layers:
        places = layer.slot_parts().values()
        parts = {str(at): torch.empty(shape, dtype=dtype, device="meta") for at, (_, shape, dtype) in enumerate(places)}
        found.add(parts, layer.bytes, layer.coded())
    return found


def _coded(checkpoint: CodedCheckpoint, plan: Plan | None, on_codes: bool) -> _Experts:
    """The codes of files, whose headers are there."""
    assert plan is not None
    found = _Experts(plan, is_coded=True)
    found.make_layout = partial(_layout_of_files, checkpoint, plan)
    for likes, groups, coded in zip(plan.likes, plan.groups, coded_layers(plan), strict=True):
        sources = [source for group in groups for source in group.sources]
        # A row of a tensor with one for each expert, or a tensor of its own.
        read = sum(source.extents[0].size // (source.extents[0].shape[0] if source.packed else 1) for source in sources)
        parts: dict[str, Tensor] = {}
        for group in groups:
            in_blocks = on_codes and group.params[0] in coded
            if in_blocks:
                parts |= coded[group.params[0]].parts()
            else:
                parts |= group.on_meta() if group.is_coded else {name: likes[name] for name in group.params}
        found.add(parts, read, coded)
    return found


def _described(plan: Plan, checkpoint: QuantisedCheckpoint, on_codes: bool) -> _Experts:
    """Codes as the configuration describes them."""
    found = _Experts(plan, is_coded=True)
    format = checkpoint.format
    for likes, turned in zip(plan.likes, plan.transposed, strict=True):
        stored: dict[str, Tensor] = {}
        blocks: dict[str, Tensor] = {}
        coded: dict[str, CodedParam] = {}
        for name, like in likes.items():
            if like.ndim != 2:
                stored[name] = blocks[name] = like
                continue
            rows, cols = reversed(like.shape) if turned else like.shape
            pieces = format.on_meta(rows, cols, checkpoint.dtype)
            stored |= {f"{name}.{part}": piece for part, piece in pieces.items()}
            (band,) = format.blocks(pieces)
            order = None if band.order_K is None else f"{name}.order"
            coded[name] = CodedParam((CodedBand(name, band.kind, rows, order),), cols)
            blocks |= coded[name].parts()
        read = sum(part.nbytes for part in stored.values())
        found.add(blocks if on_codes else stored, read, coded)
    return found


def _own_table(model: PreTrainedModel) -> Tensor | None:
    """The table of input embeddings, where nothing else computes with it."""
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return None
    users = [module for module in model.modules() if getattr(module, "weight", None) is weight]
    return weight if len(users) == 1 and isinstance(weight, Tensor) else None


def _depth(model: PreTrainedModel) -> int:
    layers = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(layers, int) or layers < 1:
        raise UncacheableError(f"{type(model).__name__} does not say how many layers it has (num_hidden_layers).")
    return layers


def _products(
    model: PreTrainedModel, experts: Mapping[str, nn.Module]
) -> tuple[dict[str, int], dict[tuple[str, int, int], int]]:
    """What of the dense part one token multiplies with: bytes by kind; and matrices by kind, rows and columns."""
    table = _own_table(model)
    seen = {id(param) for module in experts.values() for param in module.parameters(recurse=False)}
    found: Counter[str] = Counter()
    matrices: Counter[tuple[str, int, int]] = Counter()
    for module in model.modules():
        encoded = module if isinstance(module, EncodedLinear | EncodedEmbedding) else None
        for name, param in module.named_parameters(recurse=False):
            if id(param) in seen or param is table:
                continue
            seen.add(id(param))
            is_encoded = encoded is not None and name == "weight"
            kind = encoded.kind.name if encoded is not None and is_encoded else _name(param.dtype)
            found[kind] += param.nbytes
            if param.ndim == 2:
                rows, cols = encoded.shape if encoded is not None and is_encoded else param.shape
                matrices[kind, rows, cols] += 1
    return dict(found), dict(matrices)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
