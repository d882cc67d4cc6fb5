"""Quantizers of ours for transformers: from_pretrained with one gives the dequantised model of a checkpoint whose codes
are integers, and its converters make the parameters of one expert as well as those of all.

transformers itself reads GPTQ and AWQ by modules of other packages only, and of compressed-tensors it drops the zero
points of experts. Ours are registered under names of their own, so that nobody else meets them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from remoe_adapt.errors import ExpertReadError, UncacheableError
from remoe_adapt.libraries import put_on

_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Storing:
    """How one method stores a matrix.

    endings: of the names of its tensors; an expert that is not quantised has a "weight", whether it is named here or
        not.
    dequantise: (name of the matrix, its tensors by ending, settings, type of the parameter, whether of an expert)
        -> [N, K] of that type; raises ExpertReadError. A floating weight alone never comes here.
    """

    endings: tuple[str, ...]
    dequantise: Callable[[str, Mapping[str, Tensor], Mapping[str, Any], torch.dtype, bool], Tensor]


class DequantisingConfig(QuantizationConfigMixin):
    """Settings of a checkpoint, under our name of its method.

    quant_method: that name.
    settings: of the checkpoint's quantization_config.
    """

    def __init__(self, quant_method: str, settings: dict[str, Any], **_: Any) -> None:
        self.quant_method: Any = quant_method
        self.settings = settings
        # transformers takes the quantisation off a model that was loaded with this attribute set.
        self.dequantize = True


class DequantisingQuantizer(HfQuantizer):
    """Leaves a model as it is built, and dequantises what the files hold."""

    requires_calibration = False
    quantization_config: DequantisingConfig
    storing: Storing

    def update_weight_conversions(
        self, weight_conversions: list[Any], model: PreTrainedModel | None = None
    ) -> list[Any]:
        """The model's converters, each also fed with the codes' tensors and dequantising first, and one for all others.

        model: not handed over before transformers 5.21.
        """
        return [*(self._with_codes(entry) for entry in weight_conversions), *self.get_weight_conversions()]

    def get_weight_conversions(self) -> list[Any]:
        sources = [rf"\.{ending}$" for ending in self.storing.endings]
        return [WeightConverter(sources, ".weight", [Dequantise(self)])]

    def _with_codes(self, entry: Any) -> Any:
        sources = entry._original_source_patterns
        if not isinstance(entry, WeightConverter) or not all(source.endswith(".weight") for source in sources):
            return entry
        # Anchored, since older versions take a pattern for the beginning of a name.
        endings = dict.fromkeys((*self.storing.endings, "weight"))
        fed = [f"{source.removesuffix('weight')}{ending}$" for source in sources for ending in endings]
        operations = [Dequantise(self), *entry.operations]
        options = {"force_cpu": entry.force_cpu} if hasattr(entry, "force_cpu") else {}
        try:
            made = WeightConverter(fed, list(entry._original_target_patterns), operations, **options)
        except ValueError as error:
            raise UncacheableError(
                f"{', '.join(sources)} cannot be dequantised: the model makes several parameters of it. Give the "
                "checkpoint that it was made from."
            ) from error
        made.scope_prefix, made.base_model_prefix = entry.scope_prefix, entry.base_model_prefix
        return made

    def remove_quantization_config(self, model: Any) -> None:
        super().remove_quantization_config(model)  # type: ignore[no-untyped-call]
        # Before transformers 5.21 these would stay, and a later save_pretrained would run them backwards.
        if hasattr(model, "_weight_conversions"):
            del model._weight_conversions

    def is_serializable(self) -> bool:
        """The model that comes of it is a plain one."""
        return True

    @property
    def is_trainable(self) -> bool:
        return True


class Dequantise(ConversionOps):
    """The first operation of a converter: matrices for their tensors."""

    # transformers casts no stored tensor to the parameter's type before an operation with this attribute.
    def __init__(self, hf_quantizer: DequantisingQuantizer) -> None:
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo: dict[int, Any]) -> Dequantise:
        # Converters are copied for each parameter, but nothing here changes.
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: Any = None,
        **_: Any,
    ) -> dict[str, Any]:
        """Matrices by the pattern of their weight, in the type of the parameter; one of a dense module by its name.

        Raises ExpertReadError.
        """
        dtype = model.get_parameter(full_layer_name).dtype
        found: dict[str, dict[str, list[Tensor]]] = {}
        for pattern, value in input_dict.items():
            stem, ending = pattern.removesuffix("$").rpartition(".")[::2]
            found.setdefault(stem, {})[ending] = value if isinstance(value, list) else [value]
        made: dict[str, Any] = {}
        for stem, by_ending in found.items():
            counts = {ending: len(tensors) for ending, tensors in by_ending.items()}
            if len(set(counts.values())) != 1:
                raise ExpertReadError(f"{full_layer_name}: {stem} has {counts} tensors: is the checkpoint whole?")
            is_dense = stem == "\\"
            matrices = [
                self._matrix(
                    full_layer_name.rpartition(".")[0] if is_dense else stem,
                    {ending: tensors[place] for ending, tensors in by_ending.items()},
                    dtype,
                    not is_dense,
                )
                for place in range(next(iter(counts.values())))
            ]
            if is_dense:
                return {full_layer_name: matrices[0]}
            made[f"{stem}.weight$"] = matrices
        return made

    def _matrix(self, name: str, parts: dict[str, Tensor], dtype: torch.dtype, of_expert: bool) -> Tensor:
        if parts.keys() == {"weight"} and parts["weight"].dtype in _FLOATS:
            return parts["weight"].to(dtype)
        quantizer = self.hf_quantizer
        return quantizer.storing.dequantise(name, parts, quantizer.quantization_config.settings, dtype, of_expert)

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def register(method: str, storing: Storing) -> str:
    """Make the method known to transformers under a name of ours, which is returned; once for each."""
    name = "remoe_" + re.sub(r"\W", "_", method)
    if name not in AUTO_QUANTIZER_MAPPING:
        add_quantizer(
            name, DequantisingConfig, type(f"{name}_quantizer", (DequantisingQuantizer,), {"storing": storing})
        )
    return name


def add_quantizer(name: str, config: type[QuantizationConfigMixin], quantizer: type[HfQuantizer]) -> None:
    """From now on transformers finds these by a configuration's `quant_method`; for good."""
    put_on(AUTO_QUANTIZATION_CONFIG_MAPPING, name, config)
    put_on(AUTO_QUANTIZER_MAPPING, name, quantizer)
