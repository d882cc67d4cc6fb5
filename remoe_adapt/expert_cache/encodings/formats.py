"""The quantised checkpoints that are read as they are, an entry for each `quant_method`, and refusals of the others."""

from __future__ import annotations

import abc
import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.quantizers.base import HfQuantizer

from remoe_adapt.errors import ExpertReadError, UncacheableError
from remoe_adapt.expert_cache.encodings import block_scaled, integer_codes
from remoe_adapt.expert_cache.encodings.blocks import BF16, F16, F32, MXFP4, Q8_0, BlockType
from remoe_adapt.expert_cache.encodings.quantizers import Storing, register

# The stored tensors of one parameter of one expert, by the ending of their names.
Pieces = Mapping[str, Tensor]
_REMEDY = (
    "give the checkpoint that it was made from, or its GPTQ, AWQ, FP8 or GGUF version, or pack the original with "
    "`remoe pack --bits 4`"
)
_FLOATS = {torch.float32: F32, torch.float16: F16, torch.bfloat16: BF16}


class Band(NamedTuple):
    """Rows of a parameter as ggml blocks.

    kind: of the blocks.
    blocks_NB: uint8 [N, kind.row_bytes(K)].
    order_K: int64, the parameter's columns in the order in which the blocks have them; None: as they are.
    """

    kind: BlockType
    blocks_NB: Tensor
    order_K: Tensor | None


class Format(abc.ABC):
    """How the experts and linear modules of one checkpoint are quantised.

    name: of the checkpoint, for errors.
    settings: its quantization_config.

    Raises UncacheableError for settings that cannot be read.
    """

    method: str

    def __init__(self, name: str, settings: Mapping[str, Any]) -> None:
        self.name, self.settings = name, dict(settings)
        self._check()

    def _check(self) -> None:  # noqa: B027 (most formats have no setting that cannot be read)
        """Raise UncacheableError for settings that cannot be read."""

    def refusal(self, what: str) -> UncacheableError:
        """This checkpoint cannot be read because of `what`."""
        return UncacheableError(
            f"{self.name!r} is quantised ({self.method}) with {what}, which is not read: {_REMEDY}."
        )

    def check_tensors(self, dtypes: Mapping[str, torch.dtype]) -> None:  # noqa: B027 (most names are the model's matter)
        """Raise UncacheableError for a checkpoint whose tensors are not what the method says.

        dtypes: of all its tensors, by name.
        """

    @abc.abstractmethod
    def _loading_settings(self) -> dict[str, Any]:
        """The quantization_config with which transformers dequantises."""

    def loading(self, config: PretrainedConfig) -> PretrainedConfig:
        """A copy of the configuration with which `from_pretrained(folder, config=...)` dequantises the model."""
        copied: Any = copy.deepcopy(config)
        text = copied.get_text_config()
        if hasattr(text, "quantization_config"):
            del text.quantization_config
        # transformers wants a dict here, as config.json has it.
        copied.quantization_config = self._loading_settings()
        made: PretrainedConfig = copied
        return made

    def quantizer(self, config: PretrainedConfig) -> HfQuantizer:
        """For `get_model_conversion_mapping(model, hf_quantizer=...)`: converters that dequantise first.

        config: of the checkpoint.

        Each of them takes the stored tensors of one expert or of all, in the types that they have in the files.
        """
        made: HfQuantizer = AutoHfQuantizer.from_config(self._loading_settings(), pre_quantized=True)
        made.validate_environment()
        return made

    def blocks(self, pieces: Pieces) -> list[Band]:
        """One parameter of one expert as bands of rows of ggml blocks, one band for each stored matrix, in their order.

        pieces: its stored tensors, by the ending of their names ("gate_proj.weight_packed", "gate_up_proj_blocks"),
            perhaps with a first dimension of 1; matrices in the order in which the parameter has them. On the meta
            device, to learn kinds and sizes, which shapes and settings alone decide.

        Raises ExpertReadError for tensors that do not fit together or hold what cannot be.
        """
        matrices: dict[str, dict[str, Tensor]] = {}
        for ending, tensor in pieces.items():
            stem, part = self._split(ending)
            matrices.setdefault(stem, {})[part] = tensor[0] if tensor.ndim > 2 and len(tensor) == 1 else tensor
        return [self._band(stem, parts) for stem, parts in matrices.items()]

    @abc.abstractmethod
    def on_meta(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """The stored tensors of a matrix [rows, cols], as the settings have it: `blocks` takes them, and their bytes
        are what it takes in the files. For sizes where there are no files.

        dtype: of scales whose type the settings leave open.

        Raises UncacheableError for settings that say too little.
        """

    def _groups(self, cols: int, size: object) -> int:
        """How many groups of so many columns a row has; -1 and None: one."""
        if size in (None, -1):
            return 1
        if type(size) is not int or size < 1:
            raise self.refusal(f"group size {size!r}")
        return -(-cols // size)

    def _split(self, ending: str) -> tuple[str, str]:
        """(the matrix that a stored tensor belongs to, which tensor of it this is)."""
        stem, _, part = ending.rpartition(".")
        return stem, part

    def _band(self, stem: str, parts: Pieces) -> Band:
        weight = parts.get("weight")
        if len(parts) == 1 and weight is not None and weight.ndim == 2 and weight.dtype in _FLOATS:
            return Band(_FLOATS[weight.dtype], weight.contiguous().view(torch.uint8), None)
        return self._quantised_band(stem, parts)

    @abc.abstractmethod
    def _quantised_band(self, stem: str, parts: Pieces) -> Band: ...


class _Mxfp4(Format):
    """E2M1 numbers with a power of two for 32 of a row, as gpt-oss has them; ggml has the very same."""

    method = "mxfp4"

    def _loading_settings(self) -> dict[str, Any]:
        return self.settings | {"dequantize": True}

    def _split(self, ending: str) -> tuple[str, str]:
        stem, _, part = ending.rpartition("_")
        return stem, part

    def on_meta(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
        groups = self._groups(cols, MXFP4.values)
        return {
            "matrix_blocks": _meta((rows, groups, MXFP4.values // 2), torch.uint8),
            "matrix_scales": _meta((rows, groups), torch.uint8),
        }

    def _quantised_band(self, stem: str, parts: Pieces) -> Band:
        blocks_NGH, scales_NG = block_scaled.checked_pair(stem, parts, "blocks", "scales")
        return Band(*block_scaled.mxfp4_blocks(stem, blocks_NGH, scales_NG), None)


class _Fp8(Format):
    """E4M3 numbers with a scale for each tile, and experts of E2M1 numbers with one for 32 of a row."""

    method = "fp8"

    def _loading_settings(self) -> dict[str, Any]:
        return self.settings | {"dequantize": True}

    # The second and third are names that transformers takes for the first.
    _scales = ("weight_scale_inv", "scale", "qscale_weight")
    # Of a tile, where the settings do not say it.
    _tile: Any = (128, 128)
    _scale_dtype = torch.float32

    def on_meta(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
        tile = self.settings.get("weight_block_size", self._tile)
        if tile is not None and (not isinstance(tile, list | tuple) or len(tile) != 2):
            raise self.refusal(f"weight_block_size {tile!r}")
        shape = (1, 1) if tile is None else (self._groups(rows, tile[0]), self._groups(cols, tile[1]))
        return {
            "matrix.weight": _meta((rows, cols), torch.float8_e4m3fn),
            f"matrix.{self._scales[0]}": _meta(shape, self._scale_dtype),
        }

    def check_tensors(self, dtypes: Mapping[str, torch.dtype]) -> None:
        # transformers would take codes without scales for the weights themselves.
        for name, dtype in dtypes.items():
            if dtype == torch.float8_e5m2:
                raise self.refusal(f"{name} in E5M2")
            if dtype == torch.float8_e4m3fn and name.endswith(".weight"):
                stem = name.removesuffix("weight")
                if not any(stem + scales in dtypes for scales in self._scales):
                    raise self.refusal(f"{name} without {stem}{self._scales[0]}")

    def _quantised_band(self, stem: str, parts: Pieces) -> Band:
        scales = next((part for part in parts if part in self._scales), self._scales[0])
        weight_NK, scales_RC = block_scaled.checked_pair(stem, parts, "weight", scales)
        return Band(*block_scaled.tile_blocks(stem, weight_NK, scales_RC), None)


class _Mxfp8(_Fp8):
    """FP8 with a power of two for 32 of a row, under a name of its own."""

    method = "mxfp8"
    _tile = (1, 32)
    _scale_dtype = torch.uint8


class _Integers(Format):
    """Codes in words, which transformers cannot dequantise, or not all of them."""

    storing: Storing
    # Endings of names that come together: of the codes, then of what belongs to them.
    needed: tuple[str, ...]

    def _loading_settings(self) -> dict[str, Any]:
        return {"quant_method": register(self.method, self.storing), "settings": self.settings}

    def check_tensors(self, dtypes: Mapping[str, torch.dtype]) -> None:
        codes, *others = self.needed
        for name in dtypes:
            stem, _, part = name.rpartition(".")
            missing = [other for other in others if part == codes and f"{stem}.{other}" not in dtypes]
            if missing:
                raise self.refusal(f"{name} without {stem}.{missing[0]}")

    def _one_of(self, key: str, allowed: tuple[Any, ...], default: Any) -> Any:
        value = self.settings.get(key, default)
        if value not in allowed or isinstance(value, bool) != isinstance(allowed[0], bool):
            raise self.refusal(f"{key} {value!r}")
        return value


class _Gptq(_Integers):
    """Integer codes in groups, as AutoGPTQ and GPTQModel write them: (code - zero) * scale.

    Act-order (desc_act) and overrides of single modules (dynamic) are in the tensors themselves.
    """

    method = "gptq"
    needed = ("qweight", "qzeros", "scales")
    storing = Storing(
        ("qweight", "qzeros", "scales", "g_idx"),
        lambda name, parts, settings, dtype, of_expert: integer_codes.gptq(
            name, parts, zero_offset=_zero_offset(settings)
        ).dequantise(dtype),
    )

    def _check(self) -> None:
        self._one_of("bits", (2, 4, 8), None)
        self._one_of("pack_dtype", ("int32",), "int32")
        layout = self.settings.get("checkpoint_format", self.settings.get("format", "gptq"))
        if layout not in ("gptq", "gptq_v2") or self.settings.get("is_marlin_format"):
            raise self.refusal(f"checkpoint_format {layout!r}")
        overrides = self.settings.get("dynamic") or {}
        if not isinstance(overrides, Mapping):
            raise self.refusal(f"dynamic {overrides!r}")
        changed = [entry for entry in overrides.values() if isinstance(entry, Mapping)]
        if odd := [entry["bits"] for entry in changed if entry.get("bits", 4) not in (2, 4, 8)]:
            raise self.refusal(f"{odd[0]} bits for single modules (dynamic)")
        every = [self.settings, *changed]
        # What blocks an expert has must not depend on which module it is.
        self._is_symmetric = all(entry.get("sym", True) for entry in every)
        self._is_ordered = any(entry.get("desc_act", False) for entry in every)

    def on_meta(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
        bits, groups = self.settings["bits"], self._groups(cols, self.settings.get("group_size", -1))
        return {
            "matrix.qweight": _meta((cols * bits // 32, rows), torch.int32),
            "matrix.qzeros": _meta((groups, rows * bits // 32), torch.int32),
            "matrix.scales": _meta((groups, rows), torch.float16),
            "matrix.g_idx": _meta((cols,), torch.int32),
        }

    def _quantised_band(self, stem: str, parts: Pieces) -> Band:
        codes = integer_codes.gptq(
            stem, parts, zero_offset=_zero_offset(self.settings), is_symmetric=self._is_symmetric
        )
        if codes.group_K is not None and not self._is_ordered:
            raise ExpertReadError(
                f"{stem}: g_idx orders the columns, though the configuration says desc_act: false. Set desc_act to "
                "true in config.json."
            )
        kind, blocks_NB, order_K = codes.to_blocks()
        if order_K is None and self._is_ordered:
            order_K = torch.arange(codes.cols, device=blocks_NB.device)
        return Band(kind, blocks_NB, order_K)


def _meta(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _zero_offset(settings: Mapping[str, Any]) -> int:
    return int(settings.get("checkpoint_format", settings.get("format", "gptq")) == "gptq")


class _Awq(_Integers):
    """Codes of 4 bits in groups, as AutoAWQ writes them ("gemm"): (code - zero) * scale."""

    method = "awq"
    needed = ("qweight", "qzeros", "scales")
    storing = Storing(
        ("qweight", "qzeros", "scales"),
        lambda name, parts, settings, dtype, of_expert: integer_codes.awq(name, parts).dequantise(dtype),
    )

    def _check(self) -> None:
        bits = self.settings.get("bits", self.settings.get("w_bit", 4))
        if bits != 4:
            raise self.refusal(f"bits {bits!r}")
        layout = self.settings.get(
            "version", self.settings.get("checkpoint_format", self.settings.get("format", "gemm"))
        )
        # The others are kernels' own orders of the same codes, but for those that read "gemm" files.
        if str(layout).lower() not in ("gemm", "exllama", "ipex"):
            raise self.refusal(f"version {layout!r}")
        self._is_symmetric = self.settings.get("zero_point", True) is False

    def on_meta(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
        groups = self._groups(cols, self.settings.get("group_size", self.settings.get("q_group_size", -1)))
        return {
            "matrix.qweight": _meta((cols, rows // 8), torch.int32),
            "matrix.qzeros": _meta((groups, rows // 8), torch.int32),
            "matrix.scales": _meta((groups, rows), torch.float16),
        }

    def _quantised_band(self, stem: str, parts: Pieces) -> Band:
        return Band(*integer_codes.awq(stem, parts, is_symmetric=self._is_symmetric).to_blocks())


class _CompressedTensors(_Integers):
    """What llm-compressor writes: packed integers, int8 and FP8.

    Read without the compressed-tensors package, bit for bit as it dequantises: the product is rounded to the type of
    the scales, but that of FP8 experts is not, as transformers has it.
    """

    method = "compressed-tensors"
    needed = ("weight_packed", "weight_scale")
    storing = Storing(
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight"),
        lambda name, parts, settings, dtype, of_expert: _compressed_matrix(name, parts, settings, dtype, of_expert),
    )

    def _check(self) -> None:
        groups = _config_groups(self.settings)
        if groups is None or self.settings.get("quantization_status", "compressed") != "compressed":
            raise self.refusal("no groups of compressed weights (config_groups, quantization_status)")
        for group in groups:
            weights = group.get("weights")
            layout = group.get("format") or self.settings.get("format")
            if layout not in _COMPRESSED_LAYOUTS:
                raise self.refusal(f"format {layout!r}")
            if not isinstance(weights, Mapping) or weights.get("num_bits") not in _COMPRESSED_LAYOUTS[layout]:
                raise self.refusal(f"weights {weights!r}")
            if weights.get("strategy") not in ("group", "channel", "tensor", "block"):
                raise self.refusal(f"strategy {weights.get('strategy')!r}")
            if weights.get("actorder") in ("group", "dynamic"):
                raise self.refusal(f"actorder {weights['actorder']!r}")
            if layout != "pack-quantized" and not weights.get("symmetric", True):
                raise self.refusal(f"zero points in format {layout!r}")
        sparsity = self.settings.get("sparsity_config") or {}
        if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
            raise self.refusal(f"sparsity_config {sparsity.get('format')!r}")
        if self.settings.get("transform_config"):
            raise self.refusal("transform_config")

    def on_meta(self, rows: int, cols: int, dtype: torch.dtype) -> dict[str, Tensor]:
        groups = _config_groups(self.settings) or []
        # As `_packed` takes it: the group whose targets speak of experts.
        groups.sort(key=lambda group: not any("experts" in str(target) for target in group.get("targets") or ()))
        weights, layout = groups[0]["weights"], groups[0].get("format") or self.settings.get("format")
        strategy, bits = weights["strategy"], weights["num_bits"]
        if strategy == "block":
            tile = weights.get("block_structure")
            if not isinstance(tile, list) or len(tile) != 2:
                raise self.refusal(f"block_structure {tile!r}")
            shape = self._groups(rows, tile[0]), self._groups(cols, tile[1])
        else:
            size = weights.get("group_size") if strategy == "group" else None
            shape = (1 if strategy == "tensor" else rows, self._groups(cols, size))
        scales = _meta(shape, dtype)
        if layout != "pack-quantized":
            codes = torch.int8 if layout == "int-quantized" else torch.float8_e4m3fn
            return {"matrix.weight": _meta((rows, cols), codes), "matrix.weight_scale": scales}
        found = {
            "matrix.weight_packed": _meta((rows, -(-cols * bits // 32)), torch.int32),
            "matrix.weight_scale": scales,
            "matrix.weight_shape": _meta((2,), torch.int64),
        }
        if not weights.get("symmetric", True):
            found["matrix.weight_zero_point"] = _meta((-(-rows * bits // 32), shape[1]), torch.int32)
        return found

    def _quantised_band(self, stem: str, parts: Pieces) -> Band:
        if "weight_packed" in parts:
            return Band(*_packed(stem, parts, self.settings).to_blocks())
        weight_NK, scales_RC = block_scaled.checked_pair(stem, parts, "weight", "weight_scale")
        if weight_NK.dtype == torch.int8:
            return Band(Q8_0, block_scaled.int8_blocks(stem, weight_NK, scales_RC), None)
        return Band(*block_scaled.tile_blocks(stem, weight_NK, scales_RC), None)


# The layouts that are read, and the bits that a code may have there.
_COMPRESSED_LAYOUTS = {
    "pack-quantized": (2, 4, 8), "float-quantized": (8,), "int-quantized": (8,), "naive-quantized": (8,),
}  # fmt: skip


def _config_groups(settings: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    groups = settings.get("config_groups")
    found = list(groups.values()) if isinstance(groups, Mapping) else []
    return found if found and all(isinstance(group, Mapping) for group in found) else None


def _packed(name: str, parts: Pieces, settings: Mapping[str, Any]) -> integer_codes.Codes:
    """The codes of a packed matrix; its bits are those of a group of modules whose words fit its shape."""
    groups = _config_groups(settings) or []
    # transformers takes the group whose targets speak of experts for theirs.
    groups.sort(key=lambda group: not any("experts" in str(target) for target in group.get("targets") or ()))
    integers = [group["weights"] for group in groups if group["weights"].get("type", "int") == "int"]
    words, shape = parts["weight_packed"], parts.get("weight_shape")
    if shape is not None and not shape.is_meta and shape.numel() == 2 and words.ndim == 2:
        fitting = [w for w in integers if -(-int(shape.flatten()[1]) * w["num_bits"] // 32) == words.shape[1]]
        integers = fitting or integers
    if not integers:
        raise ExpertReadError(f"{name}.weight_packed: no group of config_groups has integer weights.")
    if not integers[0].get("symmetric", True) and "weight_zero_point" not in parts:
        raise ExpertReadError(f"{name} has no weight_zero_point: is the checkpoint whole?")
    return integer_codes.packed(name, parts, integers[0]["num_bits"])


def _compressed_matrix(
    name: str, parts: Pieces, settings: Mapping[str, Any], dtype: torch.dtype, of_expert: bool
) -> Tensor:
    if "weight_packed" in parts:
        return _packed(name, parts, settings).dequantise(dtype, through=parts["weight_scale"].dtype)
    weight_NK, scales_RC = block_scaled.checked_pair(name, parts, "weight", "weight_scale")
    values_NK = block_scaled.tile_values(name, weight_NK, scales_RC)
    is_exact = of_expert and weight_NK.dtype != torch.int8
    return values_NK.to(torch.float32 if is_exact else scales_RC.dtype).to(dtype)


_FORMATS: dict[str, type[Format]] = {
    kind.method: kind for kind in (_Mxfp4, _Fp8, _Mxfp8, _Gptq, _Awq, _CompressedTensors)
}


def format_of(name: str, config: PretrainedConfig) -> Format | None:
    """How a checkpoint is quantised; None: it holds plain numbers.

    name: of the checkpoint, for errors.
    config: its configuration, whose quantization_config, or that of its text part, may be a dict or an object.

    Raises UncacheableError for a method that is not read, and for settings of one that cannot be.
    """
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings is None:
            continue
        entries = dict(settings if isinstance(settings, Mapping) else vars(settings))
        method = entries.get("quant_method")
        method = str(getattr(method, "value", method) or "")
        if entries.get("load_in_4bit") or entries.get("load_in_8bit"):
            method = "bitsandbytes"
        if (kind := _FORMATS.get(method)) is None:
            raise UncacheableError(
                f"{name!r} is quantised ({method or 'no method named'}), which the expert cache does not read: "
                f"{_REMEDY}."
            )
        return kind(name, entries | {"quant_method": method})
    return None
