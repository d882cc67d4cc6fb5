"""The routers of a base model, found and read in its files: the model itself is never loaded.

Its class is built on the meta device (no weights), which says what the routers are called; transformers' own
conversion mapping says what the files call them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import (
    Extent,
    checkpoint_dtype,
    checkpoint_folder,
    open_checkpoint,
    read_config,
    stored_sources,
)
from remoe_adapt.engines.files import read_at
from remoe_adapt.errors import ExpertReadError, ExportError, FamilyError, FingerprintMismatchError
from remoe_adapt.expert_cache import LOADING, Checkpoint
from remoe_adapt.family import Family
from remoe_adapt.routers import RouterSpec, discover_routers, fingerprint_of_weights


@dataclass(frozen=True, slots=True)
class StoredRouter:
    """A router of the base: its path in the model, its facts, where its weight and its selection bias are stored."""

    name: str
    spec: RouterSpec
    weight: Extent
    correction_bias: Extent | None


class BaseFiles:
    """A base in a folder or by hub id, opened for export; `skeleton` is its model without weights.

    Raises ConfigError when there is no such model, RouterNotFoundError or UnsupportedRouterError as
    `discover_routers`, ExportError when a router's weight is not stored as it is, ExpertReadError for damaged files.
    """

    def __init__(self, base: str | os.PathLike[str]) -> None:
        self.folder = checkpoint_folder(base)
        self.config: Any = read_config(self.folder)
        # A checkpoint with quantised experts can be exported too, because its routers are stored in full precision.
        dtype = getattr(self.config, "dtype", None) or checkpoint_dtype(self.folder)
        with LOADING:
            # Only one model at a time is built without weights: transformers changes classes of the process meanwhile.
            self.skeleton = Checkpoint(os.fspath(base), self.folder, self.config, dtype, {}).skeleton()
        self.extents = open_checkpoint(self.folder)
        stored = self._stored()
        self.routers = tuple(
            StoredRouter(
                ref.name,
                ref.spec,
                self._weight(f"{ref.name}.{ref.spec.weight_name}", tuple(ref.weight_ED.shape), stored),
                # Biases are compared and never written, so a missing one is no error here.
                next(iter(stored.get(_bias_name(ref.name, ref.spec), ())), (None, None))[1],
            )
            for ref in discover_routers(self.skeleton)
        )

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Router weights [E, D] in the stored dtype, by router name in model order."""
        return {router.name: read_tensor(router.weight) for router in self.routers}

    def loaded_dtype(self, router: StoredRouter) -> torch.dtype:
        """What from_pretrained makes of the weight by default; some models keep their routers in fp32."""
        return self.skeleton.get_parameter(f"{router.name}.{router.spec.weight_name}").dtype

    def check(self, family: Family, *, force: bool = False) -> None:
        """Raises FingerprintMismatchError when the family was made for another base (unless `force`), FamilyError
        when its deltas do not fit these routers, ExportError when it has none."""
        family.check_has_adapters("written into a checkpoint")
        # Values decide and not names: a fine-tuning of the base has the same ones.
        found = fingerprint_of_weights(self.weights.values())
        if found != family.fingerprint and not force:
            raise FingerprintMismatchError(
                f"family {family.path} was made for {family.base_id!r} ({family.fingerprint[:19]}...), {self.folder} "
                f"is another base ({found[:19]}...): give that base, or --force if you know that they fit."
            )
        for name, delta_ED in family.points[0].deltas.items() if family.points else ():
            weight_ED = self.weights.get(name)
            if weight_ED is None or weight_ED.shape != delta_ED.shape:
                has = "no such router" if weight_ED is None else f"{list(weight_ED.shape)} there"
                raise FamilyError(
                    f"family {family.path} changes router {name} by {list(delta_ED.shape)}, {self.folder} has {has}."
                )

    def _stored(self) -> dict[str, list[tuple[str | None, Extent]]]:
        """Parameter of the model -> (pattern of the conversion it goes through, or None; tensor of the files)."""
        sources, _ = stored_sources(self.skeleton, self.skeleton.state_dict(), self.extents)
        return {
            name: [(pattern, self.extents[key]) for pattern, keys in by_source.items() for key in keys]
            for name, by_source in sources.items()
        }

    def _weight(self, name: str, shape: tuple[int, ...], stored: dict[str, list[tuple[str | None, Extent]]]) -> Extent:
        found = stored.get(name, [])
        if not found:
            raise ExportError(f"{self.folder} has no tensor for {name}: are all its files there?")
        pattern, extent = found[0]
        # A weight that is split, merged or transposed while it is loaded has no bytes of its own that could be
        # replaced.
        if len(found) > 1 or pattern is not None or extent.shape != shape:
            raise ExportError(
                f"{self.folder} stores {name} {list(shape)} as {len(found)} tensor(s), first {extent.tensor} "
                f"{list(extent.shape)}: only routers that are stored as they are can be replaced. Load the model, "
                "save_pretrained it to another folder and export from there."
            )
        if not extent.dtype.is_floating_point:
            raise ExportError(f"{self.folder}: {extent.tensor} is quantised; export from a base whose routers are not.")
        return extent


def read_tensor(extent: Extent) -> Tensor:
    """A tensor of a safetensors file, in memory of its own. Raises ExpertReadError when it cannot be read."""
    try:
        data = read_at(extent.path, extent.offset, extent.size)
    except OSError as error:
        raise ExpertReadError(f"{extent.path}: tensor {printable(extent.tensor)} cannot be read ({error}).") from error
    return torch.frombuffer(data, dtype=extent.dtype).reshape(extent.shape)


def tensor_bytes(tensor: Tensor) -> bytes:
    """The bytes of a tensor as safetensors and GGUF store them."""
    # Through uint8, because numpy has no bfloat16.
    data: bytes = tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()
    return data


def _bias_name(router: str, spec: RouterSpec) -> str:
    """Full name of the selection bias; empty where there is none."""
    if spec.correction_bias_name is None:
        return ""
    return f"{router.rpartition('.')[0] if spec.correction_bias_in_block else router}.{spec.correction_bias_name}"
