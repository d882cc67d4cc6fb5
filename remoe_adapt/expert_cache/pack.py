"""Packs: a copy of a model's experts with all parts of one in one aligned piece of a file, as floats or as blocks.

A pack is a folder of safetensors files, whose data starts at a multiple of BLOCK, and `experts.json`, which says how
they are to be understood. For each expert there is one tensor of bytes, `<experts module>.<expert>`, a multiple of
BLOCK long; in it lie its parts, one after another, at multiples of ALIGNMENT, as a slot has them. So one read brings an
expert, straight to where it is computed with. `packing.py` writes packs.

`experts.json`, format 2 (format 1, of floats alone, is read too):

    format, model, tool        2, what the pack is a copy of, and which version of what wrote it
    files                      of the experts
    config                     entries of the model's config.json, as far as the pack is of one that was known
    layers: [{
        name, experts, bytes   the experts module, how many it has, and the bytes of each one's piece
        parts: {part: {shape, dtype, offset}}
        params: {parameter of the module: {
            codec              "float": the part of this name is the parameter; "ggml": a matrix in blocks
            rows, cols         ggml: of the matrix whose rows are in blocks
            bands: [{type, rows, part, group, order}]
                               ggml: consecutive rows, the type of their blocks (one has `group` values), and the part
                               that they are, uint8 [rows, bytes of a row]; order, if given: the part, int64 [cols],
                               that says for columns that are stored in another order which column each is
            transposed         ggml: the parameter is [cols, rows]
        }}
        weight_error: {parameter: relative}
                               |numbers - what the blocks are worth| / |numbers|, over all experts; not of lossless ones
        fingerprint            layers with blocks: what ties them to a checkpoint, see ExpertStore.fingerprint
    }]
    dense: {parameter of the model: {codec, rows, cols, weight_error}}
                               where the dense part is in the pack as well, `dense.safetensors`: its weights in blocks
                               of the type `codec` ("q8_0"), uint8 [rows, bytes of a row] there; every other parameter
                               and buffer is there as it is, under its name in the model, but for tied ones
    dense_fingerprint          as `fingerprint`, of every tensor of the checkpoint that is of no expert
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_adapt._support import printable, read_json
from remoe_adapt.checkpoints import Extent, file_inside, tensors_of
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache.block_products import CodedBand, CodedParam
from remoe_adapt.expert_cache.checkpoint_store import ExpertStore, FileStore
from remoe_adapt.expert_cache.device_layout import Kernels, SlotKernels, layout_for
from remoe_adapt.expert_cache.direct_io import BLOCK, Reader
from remoe_adapt.expert_cache.encodings import block_type
from remoe_adapt.expert_cache.layouts import Layout
from remoe_adapt.expert_cache.places import ALIGNMENT
from remoe_adapt.expert_cache.pool import Parts, views
from remoe_adapt.expert_cache.types import Slot

# The number of the format, the older ones that are read too, and the file that says it.
FORMAT, OLDER, MANIFEST = 2, (1,), "experts.json"
# The dense part, where the pack has it.
DENSE = "dense.safetensors"
# Numbers of each parameter of the first and the last expert of every layer that are compared with the checkpoint.
SAMPLE = 2048
FLOAT, GGML = "float", "ggml"
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A tensor of one expert; `offset` in its piece and in its slot, bytes."""

    shape: tuple[int, ...]
    dtype: str
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class PackedParam:
    """How a parameter of one expert is encoded; see the fields of `experts.json` above."""

    codec: str = FLOAT
    rows: int = 0
    cols: int = 0
    bands: tuple[CodedBand, ...] = ()
    transposed: bool = False

    def shape(self, name: str, parts: Mapping[str, Part]) -> tuple[int, ...]:
        """Of the parameter of this name."""
        if self.codec == FLOAT:
            return parts[name].shape
        return (self.cols, self.rows) if self.transposed else (self.rows, self.cols)

    def names(self, name: str) -> list[str]:
        """Of the parts that the parameter of this name is made of."""
        if self.codec == FLOAT:
            return [name]
        return [part for band in self.bands for part in (band.name, band.order) if part is not None]


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One experts module; `bytes` of each expert's piece."""

    name: str
    experts: int
    bytes: int
    parts: Mapping[str, Part]
    params: Mapping[str, PackedParam]
    fingerprint: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        experts: int,
        parts: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
        params: Mapping[str, PackedParam],
        fingerprint: str | None = None,
    ) -> PackedLayer:
        """A layer whose experts have these parts, laid one after another."""
        laid, at = {}, 0
        for part, (shape, dtype) in parts.items():
            laid[part] = Part(tuple(shape), str(dtype).removeprefix("torch."), at)
            at = round_up(at + laid[part].nbytes, ALIGNMENT)
        return cls(name, experts, round_up(at, BLOCK), laid, dict(params), fingerprint)

    @property
    def encoded(self) -> bool:
        """Whether some parameter is not plain floats."""
        return any(param.codec != FLOAT for param in self.params.values())

    def slot_parts(self) -> Parts:
        """Offset, shape and type of each part, as a slot of a pool is laid out."""
        return {name: (part.offset, part.shape, _DTYPES[part.dtype]) for name, part in self.parts.items()}

    def coded(self) -> dict[str, CodedParam]:
        """The matrices that are in blocks, as a slot's layout has them."""
        return {name: CodedParam(param.bands, param.cols) for name, param in self.params.items() if param.codec == GGML}

    def as_json(self) -> dict[str, Any]:
        """Its entry in `experts.json`."""
        entry: dict[str, Any] = {"name": self.name, "experts": self.experts, "bytes": self.bytes}
        entry["parts"] = {name: asdict(part) for name, part in self.parts.items()}
        entry["params"] = {name: _param_json(param) for name, param in self.params.items()}
        if self.fingerprint is not None:
            entry["fingerprint"] = self.fingerprint
        found: dict[str, Any] = json.loads(json.dumps(entry))
        return found

    @classmethod
    def from_json(cls, entry: Mapping[str, Any], number: int) -> PackedLayer:
        """The layer of an entry of format `number`; raises KeyError, TypeError, ValueError and the like for none."""
        if number == 1:
            entry = {**entry, "parts": entry["params"], "params": {name: {"codec": FLOAT} for name in entry["params"]}}
        parts = {name: _part(part) for name, part in entry["parts"].items()}
        params = {name: _param(param) for name, param in entry["params"].items()}
        fingerprint = entry.get("fingerprint")
        name, experts, size = entry["name"], _count(entry["experts"]), _count(entry["bytes"])
        if not isinstance(name, str) or not isinstance(fingerprint, str | None) or size % BLOCK:
            raise ValueError(f"layer {name!r}")
        layer = cls(name, experts, size, parts, params, fingerprint)
        layer._check()
        return layer

    def _check(self) -> None:
        end = 0
        # In the order of their bytes: an overlap is then one of neighbours.
        for part in sorted(self.parts.values(), key=lambda part: part.offset):
            if part.offset % ALIGNMENT or part.offset < end:
                raise ValueError(f"{self.name}: parts at {part.offset}")
            end = part.offset + part.nbytes
        used = [name for param, packed in self.params.items() for name in packed.names(param)]
        if end > self.bytes or sorted(used) != sorted(self.parts):
            raise ValueError(f"{self.name}: parts up to {end} of {self.bytes}, of {used}")
        for param in self.params.values():
            if param.codec == FLOAT:
                continue
            blocks = [(("uint8"), (band.rows, band.kind.row_bytes(param.cols)), band.name) for band in param.bands]
            orders = [("int64", (param.cols,), band.order) for band in param.bands if band.order is not None]
            wanted = [*blocks, *orders]
            whole = bool(blocks) and sum(band.rows for band in param.bands) == param.rows
            if not whole or any((self.parts[n].dtype, self.parts[n].shape) != (d, s) for d, s, n in wanted):
                raise ValueError(f"{self.name}: blocks of {wanted}")


class PackedStore(FileStore):
    """Reads experts of a pack; any number of threads at once. Stands where the ExpertStore of the checkpoint would.

    folder: of the pack.
    source: the store of the checkpoint that the pack must be a copy of.
    kernels: compute with blocks; None: they are dequantised on use.
    direct_io, reader: as for ExpertStore.

    `packed` has the layers as the pack has them: what lies in a piece, and how it is encoded.

    Raises ConfigError when the folder is no pack or one of another model, type or fine-tuning, ExpertReadError for
    files that are missing, truncated or cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: ExpertStore,
        *,
        kernels: Kernels | None = None,
        direct_io: bool = False,
        reader: Reader = os.preadv,
    ) -> None:
        self.folder, self.plan = Path(folder), source.plan
        self.layers, self.num_experts = source.layers, source.num_experts
        self._likes = source.plan.likes
        self.manifest = manifest = read_manifest(self.folder)
        self.packed: list[PackedLayer] = manifest["layers"]
        self._check(manifest, source)
        self.layout: Layout = source.layout
        if any(packed.encoded for packed in self.packed) or isinstance(kernels, SlotKernels):
            self.layout = layout_for(source.plan, kernels, [packed.coded() for packed in self.packed])
            self.layout.probe()
        parts = [self.layout.parts(layer) for layer in range(len(self.layers))]
        self.params = tuple(tuple(names) for names in parts)
        self.expert_bytes = tuple(sum(part.nbytes for part in layer.values()) for layer in parts)
        self._extents = self._find(manifest["files"])
        super().__init__({extent.path for extents in self._extents for extent in extents}, direct_io, reader)
        # The pieces of all experts of a layer are alike, and a slot is one of them where it can be.
        if self.layout.places is None:
            self.layout.place(None)
        assert self.layout.places is not None
        placed = zip(self.packed, self.layout.places.layers, strict=True)
        self._lies_as_slots = [packed.slot_parts() == places for packed, places in placed]
        self._compare(manifest, source)

    def read(self, layer: int, expert: int) -> Slot:
        with torch.inference_mode(False), torch.no_grad():
            places = self.layout.places
            assert places is not None
            # Where a slot has its parts elsewhere, or floats of another type, they are put there one by one.
            if not self._lies_as_slots[layer]:
                return self.layout.packed(layer, self.read_parts(layer, expert))
            slot = places.slot(layer)
            self.read_into(layer, expert, slot.bytes_B)
            return slot

    def read_parts(self, layer: int, expert: int) -> dict[str, Tensor]:
        """The parts of one expert as the pack has them, in one block of memory; raises as `read`."""
        with torch.inference_mode(False), torch.no_grad():
            block = self._blocks.take(self.packed[layer].bytes)
            self.read_into(layer, expert, torch.frombuffer(block, dtype=torch.uint8))
            return views(block, self.packed[layer].slot_parts())

    def read_into(self, layer: int, expert: int, memory_B: Tensor) -> None:
        """One expert's piece, in one read, to memory of a slot: parts lie there as `slot_parts` says.

        memory_B: uint8, contiguous, on the CPU; it may be shorter than the piece by what follows the last part.

        Raises ExpertReadError as `read`.
        """
        extent = self._extents[layer][expert]
        size = min(extent.size, memory_B.numel())
        self._reader.fill([(replace(extent, shape=(size,), size=size), memory_B[:size])])

    def _check(self, manifest: dict[str, Any], source: ExpertStore) -> None:
        found, count = self.packed, len(source.layers)
        what = f"{self.folder} is a pack of {manifest['model']}"
        remedy = "give the pack of this model, or make it with `remoe pack`."
        if len(found) != count:
            raise ConfigError(f"{what} with {len(found)} layers of experts, {source.folder} has {count}: {remedy}")
        for layer, packed in enumerate(found):
            theirs = {name: list(param.shape(name, packed.parts)) for name, param in packed.params.items()}
            ours = {name: list(like.shape) for name, like in self._likes[layer].items()}
            name, experts = source.layers[layer], source.num_experts[layer]
            if (packed.name, packed.experts, theirs) != (name, experts, ours):
                raise ConfigError(
                    f"{what} ({printable(packed.name)}: {packed.experts} experts, {printable(_shapes(theirs))}), not "
                    f"of {source.folder} ({name}: {experts} experts, {_shapes(ours)}): {remedy}"
                )
            dtypes = {name: str(like.dtype).removeprefix("torch.") for name, like in self._likes[layer].items()}
            # Blocks are worth the same in any type, and what lies beside them is converted.
            if not packed.encoded and any(packed.parts[name].dtype != dtype for name, dtype in dtypes.items()):
                had = ", ".join(sorted({part.dtype for part in packed.parts.values()}))
                raise ConfigError(
                    f"{what} in {printable(had)}, the model is to be loaded in "
                    f"{', '.join(sorted(set(dtypes.values())))}: choose the pack's type with dtype=, or pack again "
                    "with --dtype."
                )

    def _find(self, files: Sequence[str]) -> list[list[Extent]]:
        extents = tensors_of(file_inside(self.folder, file) for file in files)
        found = []
        for layer in self.packed:
            names = [f"{layer.name}.{expert}" for expert in range(layer.experts)]
            for name in names:
                if name not in extents or extents[name].size != layer.bytes:
                    raise ExpertReadError(f"{self.folder}: {name} is missing or not {layer.bytes} bytes: pack again.")
            found.append([extents[name] for name in names])
        return found

    def _compare(self, manifest: dict[str, Any], source: ExpertStore) -> None:
        # A fine-tuned sibling has the same names and shapes; only the numbers tell it apart. Training changes all
        # layers, so the first and the last expert of each are enough.
        for layer, (packed, extents) in enumerate(zip(self.packed, self._extents, strict=True)):
            if packed.encoded:
                if packed.fingerprint != source.fingerprint(layer):
                    raise self._other(manifest, source, f"the experts of {packed.name}")
                continue
            for expert in sorted({0, packed.experts - 1}):
                for name, wanted in source.sample(layer, expert, SAMPLE).items():
                    found, part, extent = torch.empty_like(wanted), packed.parts[name], extents[expert]
                    cut = replace(
                        extent,
                        shape=tuple(found.shape),
                        dtype=found.dtype,
                        offset=extent.offset + part.offset,
                        size=found.nbytes,
                    )
                    self._reader.fill([(cut, found)])
                    # As bytes: NaN is not equal to itself.
                    if not torch.equal(found.view(torch.uint8), wanted.view(torch.uint8)):
                        raise self._other(manifest, source, f"{name} of expert {expert} of {packed.name}")

    def _other(self, manifest: dict[str, Any], source: ExpertStore, where: str) -> ConfigError:
        return ConfigError(
            f"{self.folder} (a pack of {manifest['model']}) has other numbers than {source.folder} in {where}: it is "
            "of another training of this model. Give this one's pack, or make it with `remoe pack`."
        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `experts.json` says, `layers` as PackedLayer; raises ConfigError when it is not there or not understood."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ConfigError(
            f"{printable(folder)} is no folder of packed experts (no {MANIFEST}): make it with `remoe pack`."
        )
    entries = read_json(file)
    number = entries.get("format") if isinstance(entries, dict) else None
    if type(number) is not int or number not in (FORMAT, *OLDER):
        raise ConfigError(
            f"{printable(file)} is of format {printable(repr(number))}, this version reads "
            f"{', '.join(map(str, (*OLDER, FORMAT)))}: pack again."
        )
    try:
        manifest: dict[str, Any] = dict(entries)
        files = manifest["files"]
        whole = isinstance(manifest["model"], str) and isinstance(files, list)
        whole = whole and all(isinstance(name, str) and Path(name).name == name for name in files)
        whole = whole and len(set(files)) == len(files) and isinstance(manifest.get("config", {}), dict)
        manifest["model"] = printable(manifest["model"])
        manifest["layers"] = [PackedLayer.from_json(layer, number) for layer in manifest["layers"]]
        manifest["dense"] = {name: _dense(entry) for name, entry in manifest.get("dense", {}).items()}
    # ConfigError: a type of blocks that is not known.
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise ConfigError(f"{printable(file)} is not whole ({printable(error)}): pack again.") from error
    if not whole:
        raise ConfigError(f"{printable(file)} is not whole: pack again.")
    return manifest


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def _count(value: Any, least: int = 1) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{value!r} is no number from {least} on")
    return value


def _part(entry: Mapping[str, Any]) -> Part:
    if entry["dtype"] not in _DTYPES:
        raise ValueError(f"type {entry['dtype']!r}")
    return Part(tuple(_count(length) for length in entry["shape"]), entry["dtype"], _count(entry["offset"], 0))


def _param(entry: Mapping[str, Any]) -> PackedParam:
    if entry["codec"] == FLOAT:
        return PackedParam()
    if entry["codec"] != GGML or not isinstance(entry["transposed"], bool):
        raise ValueError(f"codec {entry['codec']!r}")
    bands = tuple(
        CodedBand(e["part"], block_type(e["type"]), _count(e["rows"]), e.get("order")) for e in entry["bands"]
    )
    return PackedParam(GGML, _count(entry["rows"]), _count(entry["cols"]), bands, entry["transposed"])


def _param_json(param: PackedParam) -> dict[str, Any]:
    if param.codec == FLOAT:
        return {"codec": FLOAT}
    bands = []
    for name, kind, rows, order in param.bands:
        band = {"type": kind.name, "rows": rows, "part": name, "group": kind.values}
        bands.append(band if order is None else band | {"order": order})
    return {
        "codec": param.codec, "rows": param.rows, "cols": param.cols, "bands": bands, "transposed": param.transposed
    }  # fmt: skip


def _dense(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **entry, "codec": block_type(entry["codec"]).name, "rows": _count(entry["rows"]), "cols": _count(entry["cols"])
    }  # fmt: skip


def _shapes(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
