"""A GGUF, whole or split, as a checkpoint: its configuration, its dense part, and where each expert lies in it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from remoe_adapt._support import is_file, printable
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.gguf.architectures import ARCHITECTURES
from remoe_adapt.expert_cache.gguf.configuration import architecture_of, configuration, float_type
from remoe_adapt.expert_cache.gguf.dense import DenseParameter, LazyParameter, dense_by_table, dense_by_transformers
from remoe_adapt.expert_cache.gguf.experts import expert_groups
from remoe_adapt.expert_cache.gguf.tensors import OTHER_CONFIG, open_gguf

# Tensors that no model of transformers has: rotations, which it computes; layers that predict further tokens.
_LEFT_OUT = re.compile(r"rope_(freqs|factors_long|factors_short)\.weight|blk\.([0-9]+)\..*", re.DOTALL)


class GgufCheckpoint:
    """A GGUF model, opened by its headers.

    `config` is of the text model; `architecture` as the file names it; `dtype` the one that from_pretrained loads it in
    unless told otherwise; `files` its parts; `tensors` where each of them lies; `num_blocks` its layers, with those
    that predict further tokens.

    path: the file, of a split model its first part.
    config: a configuration, or the folder or hub id of the model that the file was made from. None: a config.json
        beside the file if it is of this architecture and these sizes, else the file's own entries, where they tell
        enough.
    header_alone: the files may end behind their headers: sizes are asked for, and no weights.
    options: of from_pretrained, for the hub.

    Raises ConfigError when there is no such file, or `config` is not of it; UncacheableError for models that have no
    experts or whose entries do not tell the configuration; ExpertReadError for damaged files.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: PretrainedConfig | str | os.PathLike[str] | None = None,
        *,
        header_alone: bool = False,
        **options: Any,
    ) -> None:
        self.path = Path(path)
        if not is_file(self.path):
            raise ConfigError(f"{printable(path)} is no file: give a GGUF model (of a split one, its first part).")
        self.files, self.tensors = open_gguf(self.path, header_alone=header_alone)
        self.architecture = architecture_of(self.files[0])
        self.config = configuration(self.files, self.tensors, config, options)
        # Layers that predict further tokens come last, and no model of transformers has them.
        self.num_blocks = self.files[0].number(f"{self.architecture}.block_count", 0)
        predicting = self.files[0].number(f"{self.architecture}.nextn_predict_layers", 0)
        if self.config.num_hidden_layers != self.num_blocks - predicting:
            raise ConfigError(
                f"{printable(path)} has {self.num_blocks} layers, of which {predicting} predict further tokens, its "
                f"configuration {self.config.num_hidden_layers}: {OTHER_CONFIG}."
            )
        self.dtype = float_type(self.tensors)

    def weights(self, model: PreTrainedModel, experts: Mapping[str, nn.Module]) -> GgufWeights:
        """What each parameter of a model is made of.

        model: of `config`, on the meta device.
        experts: its experts modules by name.

        Raises UncacheableError for an architecture whose tensors are not known for certain, or types that cannot be
        read; ConfigError when tensors are missing, left over, or of other sizes than the configuration says.
        """
        return GgufWeights(self, model, experts)


class GgufWeights:
    """The parameters of a model in a GGUF.

    `experts`: of each experts module, in the order given, the groups of its parameters. `dense`: every other parameter
    and buffer of the state dict by name, but those tied to another.
    """

    def __init__(self, checkpoint: GgufCheckpoint, model: PreTrainedModel, experts: Mapping[str, nn.Module]) -> None:
        path, tensors = checkpoint.path, checkpoint.tensors
        self.path = path
        theirs = {f"{name}.{param}" for name, module in experts.items() for param, _ in module.named_parameters()}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        names = {key: value for key, value in model.state_dict().items() if key not in theirs and key not in tied}
        self.dense = self._dense(checkpoint, model, names)
        self.experts = [expert_groups(_layer_of(name), name, module, tensors, path) for name, module in experts.items()]
        self._check_left(checkpoint, model, bool(tied))

    def read_dense(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """(name, numbers) of each dense parameter, one at a time, in `dtype`. Raises ExpertReadError."""
        for name, parameter in self.dense.items():
            yield name, parameter.read(dtype)

    def state_dict(self, dtype: torch.dtype) -> dict[str, Any]:
        """The dense parameters as `type(model).from_pretrained(None, config=..., state_dict=...)` takes them: each is
        read, in `dtype`, when transformers asks for it."""
        return {name: LazyParameter(parameter, dtype) for name, parameter in self.dense.items()}

    def _dense(
        self, checkpoint: GgufCheckpoint, model: PreTrainedModel, names: Mapping[str, Tensor]
    ) -> dict[str, DenseParameter]:
        model_type = str(checkpoint.config.model_type)
        if (entry := ARCHITECTURES.get(model_type)) is not None:
            return dense_by_table(model, names, checkpoint.tensors, entry, self.path)
        mapping = _mapping(checkpoint.architecture, model.config)
        if mapping is None:
            raise UncacheableError(
                f"{printable(self.path)}: how a GGUF of the architecture {printable(checkpoint.architecture)} stores "
                f"{printable(model_type)} models is not known for certain, and a wrong guess would compute nonsense: "
                f"use the model's safetensors files. Known: {', '.join(sorted(ARCHITECTURES))}."
            )
        return dense_by_transformers(model, names, checkpoint.tensors, mapping, self.path)

    def _check_left(self, checkpoint: GgufCheckpoint, model: PreTrainedModel, tied: bool) -> None:
        used = {extent.tensor for groups in self.experts for group in groups for extent in group.extents}
        used |= {stored.name for parameter in self.dense.values() for stored in parameter.stored}
        blocks, layers = checkpoint.num_blocks, int(checkpoint.config.num_hidden_layers)
        for name in checkpoint.tensors.keys() - used:
            match = _LEFT_OUT.fullmatch(name)
            beyond = match is not None and (match[2] is None or layers <= int(match[2]) < blocks)
            # Some converters write the output although it is the embedding, or keys and values of latent attention
            # twice.
            twice = (tied and name == "output.weight") or re.fullmatch(r".*attn_[kv]_b\.weight", name)
            if not beyond and not twice:
                raise ConfigError(
                    f"{printable(self.path)}: {type(model).__name__} has no place for {printable(name)}: "
                    f"{OTHER_CONFIG}."
                )


def _mapping(architecture: str, config: Any) -> list[Any] | None:
    """transformers' conversion mapping of an architecture, or None."""
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return None
    build = GGUF_ARCHS.get(architecture)
    return None if build is None else list(build(config))


def _layer_of(name: str) -> int:
    match = re.search(r"(?:^|\.)layers\.([0-9]+)\.", name)
    if match is None:
        raise UncacheableError(f"{printable(name)} names no layer: its experts cannot be found in a GGUF.")
    return int(match[1])
