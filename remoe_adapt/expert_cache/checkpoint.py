"""Checkpoints of models: where each is, how it is made, what its experts are stored as, and how its dense part comes.

Three kinds: floats (or what a registered encoding makes of them), codes in safetensors files, and GGUF files.
"""

from __future__ import annotations

import abc
import copy
import json
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from remoe_adapt._support import printable
from remoe_adapt.checkpoints import (
    HUB_OPTIONS,
    Extent,
    auto_class,
    check_place,
    checkpoint_dtype,
    checkpoint_folder,
    gguf_path,
    is_gguf,
    open_checkpoint,
    read_config,
)
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.blocks_layout import BlocksLayout
from remoe_adapt.expert_cache.dense import Encoded, model_of
from remoe_adapt.expert_cache.device_layout import DeviceLayout, Kernels, SlotKernels, layout_for, slot_kernels
from remoe_adapt.expert_cache.encoding import FLOATS, Encoding, encoding_of
from remoe_adapt.expert_cache.encodings import Band, Format, TorchInt4, dense_modules, format_of, ggml
from remoe_adapt.expert_cache.gguf import DenseParameter, ExpertGroup, GgufCheckpoint, LazyParameter
from remoe_adapt.expert_cache.layouts import Layout, StoredLayout
from remoe_adapt.expert_cache.plan import Group, Plan, Source, empty_plan, experts_modules, plan_checkpoint

# Default dtype and classes of experts change for the whole process while a model is made.
LOADING = threading.Lock()
# How quantised experts may be computed.
ARITHMETICS = ("auto", "fast", "exact")
# Makes the layout of slots of a plan.
MakeLayout = Callable[[Plan], Layout]


@dataclass(frozen=True)
class Checkpoint:
    """A model in safetensors files, of floats.

    name: as it was given.
    dtype: of its weights in memory.
    encoding: of its experts.
    header_alone: its files may end behind their headers: sizes are asked for, and no weights.
    """

    name: str
    folder: Path
    config: PretrainedConfig
    dtype: torch.dtype
    trust: Mapping[str, Any]
    encoding: Encoding = FLOATS
    header_alone: bool = False
    # Whether `load` leaves tensors in mapped files.
    is_mapped: ClassVar[bool] = True

    @property
    def loader(self) -> Any:
        """The auto class that makes it."""
        return auto_class(self.config)

    def skeleton(self) -> PreTrainedModel:
        """The model on the meta device; under LOADING. Raises UncacheableError when no auto class makes it."""
        try:
            # A copy, because from_config writes its choices into the configuration that it is given.
            with torch.device("meta"):
                model = self.loader.from_config(self.plain_config(), dtype=self.dtype, **self.trust)
        except Exception as error:  # config.json may hold anything
            reason = str(error).partition("\n")[0].partition(" Model type should be")[0] or type(error).__name__
            raise UncacheableError(
                f"{printable(self.name)!r} cannot be made without its weights ({printable(reason)})."
            ) from error
        assert isinstance(model, PreTrainedModel)
        self.encoding.prepare(model)
        return model

    def plain_config(self) -> PretrainedConfig:
        """A copy of the configuration of a model of floats."""
        return copy.deepcopy(self.config)

    def entries(self) -> dict[str, Any]:
        """The config.json of a model of floats, in the type that its weights have in memory."""
        config = self.plain_config()
        config.dtype = self.dtype
        found: dict[str, Any] = json.loads(config.to_json_string())
        return found

    def plan(self, skeleton: PreTrainedModel) -> Plan | None:
        """Where its experts lie; None: in the folder's files, as parameters of the model."""
        return None

    def layout(self, kernels: Kernels | None) -> MakeLayout | None:
        """What slots shall hold; None: the parameters.

        kernels: compute; None: the exact arithmetic.
        """
        # A registered encoding computes its own slots, on a GPU too.
        if not isinstance(kernels, SlotKernels) or self.encoding is not FLOATS:
            return None
        return partial(DeviceLayout, kernels=kernels)

    def blocks(self) -> MakeLayout | None:
        """The layout of blocks that its codes become; None: it has no codes."""
        return None

    def extents(self) -> Mapping[str, Extent]:
        """Every tensor of its files; raises ExpertReadError for damaged ones."""
        return open_checkpoint(self.folder, header_alone=self.header_alone)

    def encoded(self, skeleton: PreTrainedModel) -> dict[str, Encoded]:
        """The modules of the dense part whose weight may stay as it is stored, by name."""
        return {}

    def load(self, skeleton: PreTrainedModel, encoded: Mapping[str, Encoded], **kwargs: Any) -> Any:
        """The model; within `experts_left_out` it has no experts.

        encoded: those of `encoded` that stay in blocks; all others are floats.
        kwargs: options of from_pretrained.
        """
        return self.loader.from_pretrained(self.folder, dtype=self.dtype, **{**self.trust, **kwargs})


@dataclass(frozen=True, kw_only=True)
class CodedCheckpoint(Checkpoint, abc.ABC):
    """A model whose experts are codes."""

    @property
    @abc.abstractmethod
    def method(self) -> str:
        """How they are encoded, as `status()` shows it."""

    def layout(self, kernels: Kernels | None) -> MakeLayout:
        exact = partial(StoredLayout, method=self.method)
        return exact if kernels is None else partial(layout_for, kernels=kernels, exact=exact)

    def blocks(self) -> MakeLayout:
        return partial(BlocksLayout, kernels=None)


@dataclass(frozen=True, kw_only=True)
class QuantisedCheckpoint(CodedCheckpoint):
    """A model in safetensors files, of codes in a format that transformers or we dequantise."""

    format: Format

    @property
    def method(self) -> str:
        return self.format.method

    def plain_config(self) -> PretrainedConfig:
        config = super().plain_config()
        for part in (config.get_text_config(), config):
            if hasattr(part, "quantization_config"):
                del part.quantization_config
        return config

    def plan(self, skeleton: PreTrainedModel) -> Plan:
        extents, quantizer = dict(self.extents()), self.format.quantizer(self.config)
        self.format.check_tensors({name: extent.dtype for name, extent in extents.items()})
        return plan_checkpoint(self.folder, skeleton, extents, quantizer, self.format.blocks)

    def load(self, skeleton: PreTrainedModel, encoded: Mapping[str, Encoded], **kwargs: Any) -> Any:
        return super().load(skeleton, encoded, config=self.format.loading(self.config), **kwargs)


@dataclass(frozen=True, kw_only=True)
class GgufModel(CodedCheckpoint):
    """A model in a GGUF, whole or split. `name` is the path of its (first) file."""

    file: GgufCheckpoint
    # Plan and dense part are made of one look at the file.
    _weights: dict[int, Any] = field(default_factory=dict)
    method = "gguf"
    is_mapped = False

    def _of(self, skeleton: PreTrainedModel) -> Any:
        if id(skeleton) not in self._weights:
            self._weights.clear()
            self._weights[id(skeleton)] = self.file.weights(skeleton, experts_modules(skeleton))
        return self._weights[id(skeleton)]

    def plan(self, skeleton: PreTrainedModel) -> Plan:
        plan = empty_plan(self.file.path, skeleton)
        groups = zip(plan.likes, self._of(skeleton).experts, strict=True)
        plan.groups.extend(
            [[_gguf_group(group, likes[group.param].dtype) for group in found] for likes, found in groups]
        )
        return plan

    def extents(self) -> Mapping[str, Extent]:
        return {name: stored.extent for name, stored in self.file.tensors.items()}

    def encoded(self, skeleton: PreTrainedModel) -> dict[str, Encoded]:
        found = {}
        leave = {*experts_modules(skeleton)}
        for name, (rows, cols) in dense_modules(skeleton, leave).items():
            entry: DenseParameter | None = self._of(skeleton).dense.get(f"{name}.weight")
            blocks = None if entry is None else entry.as_blocks
            if blocks is not None and blocks.kind.values > 1:
                found[name] = Encoded(blocks.kind, rows, cols)
        return found

    def load(self, skeleton: PreTrainedModel, encoded: Mapping[str, Encoded], **kwargs: Any) -> Any:
        # Each is read when transformers asks for it: no more than one of them is in memory twice.
        tensors: dict[str, Any] = {
            name: LazyParameter(entry, None if name.removesuffix(".weight") in encoded else self.dtype)
            for name, entry in self._of(skeleton).dense.items()
        }
        kwargs.pop("trust_remote_code", None)
        return model_of(
            type(skeleton), self.config, tensors, encoded, self.dtype, fast=True, folder=self.folder, **kwargs
        )


def _gguf_group(group: ExpertGroup, dtype: torch.dtype) -> Group:
    sources = tuple(
        # Behind "blk.0.": the same in every layer.
        Source("", extent.tensor.split(".", 2)[-1], (extent,), packed=True)
        for extent in group.extents
    )

    def blocks(pieces: Mapping[str, Tensor]) -> list[Band]:
        return [Band(kind, blocks_NB, None) for kind, blocks_NB in group.blocks(list(pieces.values()))]

    return Group(
        (group.param,),
        sources,
        lambda tensors: {group.param: group.convert(tensors, dtype)},
        None,
        straight=False,
        is_coded=True,
        blocks=blocks if group.has_blocks and not group.is_bias else None,
        are_blocks=group.has_blocks and not group.is_bias and not group.interleaved,
    )


def check_arithmetic(arithmetic: object) -> None:
    """Raises ConfigError for another than those there are."""
    if arithmetic not in ARITHMETICS:
        raise ConfigError(f"arithmetic {arithmetic!r} is not one of {', '.join(ARITHMETICS)}.")


def kernels_for(arithmetic: str, device: torch.device, may_be_codes: bool = True) -> Kernels | None:
    """What computes with experts on this device; None: their model's own function, on floats.

    may_be_codes: False for floats, which a CPU computes by their model's own function in any case.

    Raises ConfigError where "fast" is asked for and there is nothing.
    """
    if arithmetic == "exact" or (device.type == "cpu" and not may_be_codes):
        return None
    kernels: Kernels | None = ggml() if device.type == "cpu" else slot_kernels()
    if kernels is None and device.type == "cpu":
        kernels = TorchInt4.found(is_demanded=arithmetic == "fast")
    if kernels is None and arithmetic == "fast":
        remedy = "remoe-adapt[llamacpp]" if device.type == "cpu" else "triton"
        raise ConfigError(
            f"arithmetic \"fast\": there are no kernels for experts on {device} here (pip install '{remedy}'); give "
            '"exact", or "auto" for whatever there is.'
        )
    return kernels


def find_checkpoint(
    path: str | os.PathLike[str], dtype: str | torch.dtype | None = None, options: Mapping[str, Any] | None = None
) -> Checkpoint:
    """The checkpoint of a folder, a hub id or a GGUF file, fetched if need be; dtype None or "auto": its own.

    options: of from_pretrained, of which those for the hub, `trust_remote_code`, `gguf_file`, and of a GGUF `config`
        count here.

    Raises ConfigError when it is not there or the dtype is none, UncacheableError when it is quantised in a way that
    nobody reads: then no weights have been fetched.
    """
    name, options = os.fspath(path), options or {}
    hub = {key: options[key] for key in HUB_OPTIONS if key in options}
    trust = {key: options[key] for key in ("trust_remote_code",) if key in options}
    if options.get("gguf_file") is not None:
        path = gguf_path(path, options["gguf_file"], **hub)
    if is_gguf(path):
        file = GgufCheckpoint(path, options.get("config"), **hub, **trust)
        own = _dtype(file.dtype if dtype in (None, "auto") else dtype, None, file.path.parent)
        return GgufModel(name, file.path.parent, file.config, own, trust, file=file)
    check_place(path, "model", **hub)
    config = read_config(name, **hub, **trust)
    # Before the weights are fetched: they may be hundreds of gigabytes that nobody can use.
    encoding = encoding_of(config)
    format = None if encoding is not None else format_of(name, config)
    folder = checkpoint_folder(name, **hub)
    dtype = _dtype(dtype, config, folder)
    if format is not None:
        return QuantisedCheckpoint(name, folder, config, dtype, trust, format=format)
    return Checkpoint(name, folder, config, dtype, trust, encoding or FLOATS)


def described_checkpoint(
    path: str | os.PathLike[str], config: PretrainedConfig | str | os.PathLike[str] | None = None
) -> Checkpoint:
    """The checkpoint of a folder or a GGUF file of which configuration or headers alone need be there.

    path: a folder with a config.json, or a GGUF (of a split one the first part), whole or cut off behind its header.
    config: of a GGUF, as `GgufCheckpoint` takes it.

    Where neither the configuration nor files name a type of weights, it is bfloat16. Raises as `find_checkpoint`.
    """
    if is_gguf(path):
        file = GgufCheckpoint(path, config, header_alone=True)
        return GgufModel(
            os.fspath(path), file.path.parent, file.config, file.dtype, {}, header_alone=True, file=file
        )  # fmt: skip
    name, folder = os.fspath(path), Path(path)
    config = read_config(name)
    encoding = encoding_of(config)
    dtype = getattr(config, "dtype", None)
    dtype = dtype if isinstance(dtype, torch.dtype) and dtype.is_floating_point else torch.bfloat16
    if encoding is None:
        format = format_of(name, config)
        assert format is not None
        return QuantisedCheckpoint(name, folder, config, dtype, {}, header_alone=True, format=format)
    return Checkpoint(name, folder, config, dtype, {}, encoding, header_alone=True)


def _dtype(dtype: str | torch.dtype | None, config: Any, folder: Path) -> torch.dtype:
    if dtype is None or dtype == "auto":
        dtype = getattr(config, "dtype", None) or checkpoint_dtype(folder)
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ConfigError(f"dtype {dtype!r} is no floating type of torch: give bfloat16 or float32, for instance.")
    return found
