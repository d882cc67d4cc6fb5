"""Packed experts: a copy of a model's experts with all parameters of one in one aligned piece of a file.

A pack is a folder of safetensors files, whose data starts at a multiple of BLOCK, and `experts.json`, which says how
they are to be understood. For each expert there is one tensor of bytes, `<experts module>.<expert>`, a multiple of
BLOCK long; in it lie the parameters as the model has them, one after another, at multiples of ALIGNMENT. So one read
brings an expert, straight to where it is computed with.
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

from remoe_adapt.cache.blocks import Blocks
from remoe_adapt.cache.reading import BLOCK, ExtentReader, Reader
from remoe_adapt.cache.shards import Extent, file_inside, tensors_of
from remoe_adapt.cache.store import ALIGNMENT, ExpertStore
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.untrusted import printable, read_json

FORMAT, MANIFEST = 1, "experts.json"
# Numbers of each parameter of the first and the last expert of every layer that are compared with the checkpoint.
SAMPLE = 2048


@dataclass(frozen=True, slots=True)
class PackedParam:
    """Of one expert; `offset` in its piece, bytes."""

    shape: tuple[int, ...]
    dtype: str
    offset: int


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One experts module; `bytes` of each expert's piece."""

    name: str
    experts: int
    bytes: int
    params: Mapping[str, PackedParam]

    @classmethod
    def of(cls, source: ExpertStore, layer: int) -> PackedLayer:
        """As it is packed from this store."""
        params, at = {}, 0
        for name, like in source.like(layer).items():
            params[name] = PackedParam(tuple(like.shape), str(like.dtype).removeprefix("torch."), at)
            at = round_up(at + like.nbytes, ALIGNMENT)
        return cls(source.layers[layer], source.num_experts[layer], round_up(at, BLOCK), params)


class PackedStore:
    """Reads experts of a pack; any number of threads at once. Stands where the ExpertStore of the checkpoint would.

    folder: of the pack.
    source: the store of the checkpoint that the pack must be a copy of.
    direct_io, reader: as for ExpertStore.

    Raises ConfigError when the folder is no pack or one of another model, type or fine-tuning, ExpertReadError for
    files that are missing, truncated or cannot be read.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        source: ExpertStore,
        *,
        direct_io: bool = False,
        reader: Reader = os.preadv,
    ) -> None:
        self.folder = Path(folder)
        self.layers, self.num_experts, self.params = source.layers, source.num_experts, source.params
        self.expert_bytes, self.total_bytes = source.expert_bytes, source.total_bytes
        self._likes = [source.like(layer) for layer in range(len(self.layers))]
        self._packed = [PackedLayer.of(source, layer) for layer in range(len(self.layers))]
        manifest = read_manifest(self.folder)
        self._check(manifest, source)
        self._extents = self._find(manifest["files"])
        paths = {extent.path for extents in self._extents for extent in extents}
        self._reader = ExtentReader(paths, direct_io=direct_io, reader=reader)
        self.direct_io, self.close = self._reader.direct_io, self._reader.close
        self._blocks = Blocks()
        self._compare(manifest, source)

    def read(self, layer: int, expert: int) -> dict[str, Tensor]:
        """As `ExpertStore.read`."""
        with torch.inference_mode(False), torch.no_grad():
            extent, params = self._extents[layer][expert], self._packed[layer].params
            block = self._blocks.take(extent.size)
            self._reader.fill([(extent, torch.frombuffer(block, dtype=torch.uint8))])
            return {
                name: torch.frombuffer(
                    block, dtype=like.dtype, count=like.numel(), offset=params[name].offset
                ).view(like.shape)
                for name, like in self._likes[layer].items()
            }  # fmt: skip

    def give_back(self) -> None:
        """As `ExpertStore.give_back`."""
        self._blocks.give_back()

    def use_blocks(self, blocks: Blocks) -> None:
        """Read into this memory from now on."""
        self._blocks = blocks

    def _check(self, manifest: dict[str, Any], source: ExpertStore) -> None:
        wanted = [as_json(layer) for layer in self._packed]
        if manifest["layers"] == wanted:
            return
        what = f"{self.folder} is a pack of {manifest['model']}"
        if len(manifest["layers"]) == len(wanted):
            found, mine = next(
                (a, b) for a, b in zip(manifest["layers"], wanted, strict=True) if a != b
            )  # fmt: skip
            dtypes = [sorted({param["dtype"] for param in one["params"].values()}) for one in (found, mine)]
            if _without_dtypes(found) == _without_dtypes(mine):
                raise ConfigError(
                    f"{what} in {printable(', '.join(dtypes[0]))}, the model is to be loaded in "
                    f"{', '.join(dtypes[1])}: choose the pack's type with dtype=, or pack again with --dtype."
                )
            what += f" ({printable(found['name'])}: {found['experts']} experts, {printable(_shapes(found))})"
            raise ConfigError(
                f"{what}, not of {source.folder} ({mine['name']}: {mine['experts']} experts, {_shapes(mine)}): "
                "give the pack of this model, or make it with `remoe pack`."
            )
        raise ConfigError(
            f"{what} with {len(manifest['layers'])} layers of experts, {source.folder} has {len(wanted)}: give the "
            "pack of this model, or make it with `remoe pack`."
        )

    def _find(self, files: Sequence[str]) -> list[list[Extent]]:
        extents = tensors_of(file_inside(self.folder, file) for file in files)
        found = []
        for layer in self._packed:
            names = [f"{layer.name}.{expert}" for expert in range(layer.experts)]
            for name in names:
                if name not in extents or extents[name].size != layer.bytes:
                    raise ExpertReadError(f"{self.folder}: {name} is missing or not {layer.bytes} bytes: pack again.")
            found.append([extents[name] for name in names])
        return found

    def _compare(self, manifest: dict[str, Any], source: ExpertStore) -> None:
        """A fine-tuned sibling has the same shapes and other numbers."""
        for layer, (packed, extents) in enumerate(zip(self._packed, self._extents, strict=True)):
            for expert in sorted({0, packed.experts - 1}):
                for name, there in source.sample(layer, expert, SAMPLE).items():
                    here, param, extent = torch.empty_like(there), packed.params[name], extents[expert]
                    cut = replace(
                        extent,
                        shape=tuple(here.shape),
                        dtype=here.dtype,
                        offset=extent.offset + param.offset,
                        size=here.nbytes,
                    )
                    self._reader.fill([(cut, here)])
                    if not torch.equal(here.view(torch.uint8), there.view(torch.uint8)):
                        raise ConfigError(
                            f"{self.folder} (a pack of {manifest['model']}) has other numbers than {source.folder} in "
                            f"{name} of expert {expert} of {packed.name}: it is of another training of this model. "
                            "Give this one's pack, or make it with `remoe pack`."
                        )


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `experts.json` says; raises ConfigError when it is not there or not understood."""
    file = folder / MANIFEST
    if not file.is_file():
        raise ConfigError(
            f"{printable(folder)} is no folder of packed experts (no {MANIFEST}): make it with `remoe pack`."
        )
    try:
        manifest: dict[str, Any] = read_json(file)
        number, files = manifest["format"], manifest["files"]
        whole = isinstance(manifest["model"], str) and isinstance(files, list) and len(set(files)) == len(files)
        whole = whole and all(isinstance(name, str) and Path(name).name == name for name in files)
        manifest["model"] = printable(manifest["model"])
        for layer in manifest["layers"]:
            whole = whole and isinstance(layer["name"], str) and isinstance(layer["experts"], int)
            for param in layer["params"].values():
                whole = whole and isinstance(param["shape"], list) and isinstance(param["dtype"], str)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{printable(file)} is not whole ({printable(error)}): pack again.") from error
    if type(number) is not int or number != FORMAT:
        raise ConfigError(
            f"{printable(file)} is of format {printable(repr(number))}, this version reads {FORMAT}: pack again."
        )
    if not whole:
        raise ConfigError(f"{printable(file)} is not whole: pack again.")
    return manifest


def as_json(layer: PackedLayer) -> dict[str, Any]:
    """As it stands in `experts.json`."""
    entry: dict[str, Any] = json.loads(json.dumps(asdict(layer)))
    return entry


def round_up(number: int, step: int) -> int:
    """To a multiple of `step`."""
    return -(-number // step) * step


def _without_dtypes(entry: dict[str, Any]) -> list[Any]:
    params = {name: param["shape"] for name, param in entry["params"].items()}
    return [entry["name"], entry["experts"], params]


def _shapes(entry: dict[str, Any]) -> str:
    return ", ".join(f"{name} {param['shape']}" for name, param in entry["params"].items())
