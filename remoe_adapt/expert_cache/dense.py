"""Makes a model of a dense part that is at hand, parts of it in ggml blocks, by transformers' own door.

A quantizer of ours, registered under a name of its own, puts encoded modules in their places before `from_pretrained`
hands out the tensors; everything else (buffers, ties, initialisation) is transformers' work as ever.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from remoe_adapt.expert_cache.encodings import BlockType, add_quantizer, block_type, encode_dense

_METHOD = "remoe_blocks"


class Encoded(NamedTuple):
    """How a linear or embedding module's weight [rows, cols] is encoded."""

    kind: BlockType
    rows: int
    cols: int


class BlocksConfig(QuantizationConfigMixin):
    """Which modules are encoded.

    modules: name: [type of the blocks, rows, cols].
    fast: compute on the codes where that can be.
    """

    def __init__(self, modules: dict[str, list[Any]], fast: bool, **_: Any) -> None:
        self.quant_method: Any = _METHOD
        self.modules, self.fast = modules, fast


class BlocksQuantizer(HfQuantizer):
    """Encoded modules in the places of others."""

    requires_calibration = False
    quantization_config: BlocksConfig

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        settings = self.quantization_config
        which = {name: (block_type(kind), rows, cols) for name, (kind, rows, cols) in settings.modules.items()}
        # Only after loading does transformers tie weights: a head of floats would get the embedding's bytes then.
        for head, own in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            name, source = head.removesuffix(".weight"), own.removesuffix(".weight")
            if source in which:
                which.setdefault(name, which[source])
        encode_dense(model, which, fast=settings.fast)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> PreTrainedModel:
        # To others it is a model of floats: they would refuse to train or to move one that says it is quantised.
        self.remove_quantization_config(model)  # type: ignore[no-untyped-call]
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


add_quantizer(_METHOD, BlocksConfig, BlocksQuantizer)


def model_of(
    cls: type[PreTrainedModel],
    config: PretrainedConfig,
    tensors: Mapping[str, Any],
    encoded: Mapping[str, Encoded],
    dtype: torch.dtype,
    *,
    fast: bool,
    folder: Path | None = None,
    **kwargs: Any,
) -> PreTrainedModel:
    """A model with these tensors, which it keeps as they are.

    cls, config: of the model.
    tensors: by name of the parameter or buffer; blocks (uint8 [rows, row bytes]) for the weights of encoded modules.
        Something with a shape will do that gives the tensor when it is indexed.
    encoded: by name of the module.
    dtype: of the floats.
    fast: let encoded modules compute on their codes.
    folder: where a generation_config.json may lie.
    kwargs: other options of from_pretrained.
    """
    config = copy.deepcopy(config)
    modules = {name: [entry.kind.name, entry.rows, entry.cols] for name, entry in encoded.items()}
    config.quantization_config = {"quant_method": _METHOD, "modules": modules, "fast": fast}
    found: Any = cls
    model = found.from_pretrained(None, config=config, state_dict=dict(tensors), dtype=dtype, **kwargs)
    assert isinstance(model, PreTrainedModel)
    if folder is not None and (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model
