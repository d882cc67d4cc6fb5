"""What we rely on in transformers' quantizers: that they dequantise, and where ours are found; see `table`."""

from __future__ import annotations

import tempfile
from collections.abc import MutableMapping
from typing import Any, cast

import torch
from torch import nn

from remoe_adapt.libraries.patching import Patches, put_on
from remoe_adapt.libraries.table import hold, relied_on
from remoe_adapt.libraries.tiny import model_class, no_bars, tiny_config, tiny_model


@relied_on(
    "transformers",
    "The quantizers of FP8 and MXFP4, made from settings with dequantize=True, give converters that dequantise first, "
    "to the parameter's type, and that work on the stored tensors of one expert.",
    "expert_cache/encodings/formats.py",
    names="transformers.quantizers.auto.AutoHfQuantizer transformers.quantizers.base.HfQuantizer",
)
def dequantising_quantizers() -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter
    from transformers.quantizers.auto import AutoHfQuantizer

    with torch.device("meta"):
        model = model_class()(tiny_config()).to(torch.bfloat16)
    settings = {"quant_method": "fp8", "weight_block_size": [8, 16], "dequantize": True}
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=True)
    mapping = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    name = "model.layers.0.mlp.experts.down_proj"
    codes = torch.randn(32, 16).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 1)
    stored = {"experts.0.down_proj.weight": codes, "experts.0.down_proj.weight_scale_inv": scales}
    found: list[Any] = []
    for converter in (entry for entry in mapping if isinstance(entry, WeightConverter)):
        patterns = [converter.rename_source_key(f"model.layers.0.mlp.{key}")[1] for key in stored]
        if all(patterns):
            for pattern, tensor in zip(patterns, stored.values(), strict=True):
                cast(Any, converter).add_tensor(name, name, pattern, tensor)
            found.append(converter.convert(name, model=model, config=model.config)[name])
            break
    hold(found, "no converter takes the codes and the scales of an FP8 expert.")
    wanted = (codes.float() * scales.repeat_interleave(8, 0)).bfloat16()
    same = found[0].dtype == torch.bfloat16 and torch.equal(found[0][0], wanted)
    hold(same, "an FP8 expert is not its codes times its scales.")

    quantizer = AutoHfQuantizer.from_config({"quant_method": "mxfp4", "dequantize": True}, pre_quantized=True)
    holder = nn.Module()
    holder.down_proj = nn.Parameter(torch.empty(1, 32, 8, dtype=torch.bfloat16, device="meta"))
    (converter,) = (c for c in quantizer.get_weight_conversions() if c.source_patterns[0].startswith("down_proj"))
    hold(set(converter.source_patterns) == {"down_proj_blocks", "down_proj_scales"}, "MXFP4 is stored otherwise now.")
    # Codes 1 and 2 in each byte are 0.5 and 1; the exponent is less 127.
    for pattern, tensor in (
        ("down_proj_blocks", torch.full((1, 8, 1, 16), 0x21, dtype=torch.uint8)),
        ("down_proj_scales", torch.full((1, 8, 1), 128, dtype=torch.uint8)),
    ):
        converter.add_tensor("down_proj", "down_proj", pattern, tensor)
    (made,) = converter.convert("down_proj", model=holder).values()
    wanted = torch.tensor([1.0, 2.0]).repeat(16)[:, None].expand(32, 8)
    hold(torch.equal(made[0].float(), wanted), "an MXFP4 expert comes out with other numbers, or another way round.")


@relied_on(
    "transformers",
    "from_pretrained finds the quantizer for a configuration's quant_method in two registries, hands it the converters "
    "with their `_original_source_patterns`, casts no tensor before an operation that has an `hf_quantizer`, and takes "
    "the quantisation off where the quantizer's config says `dequantize`.",
    "expert_cache/encodings/quantizers.py expert_cache/encodings/formats.py",
    names="transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING "
    "transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING transformers.quantizers.base.HfQuantizer "
    "transformers.core_model_loading.ConversionOps transformers.utils.quantization_config.QuantizationConfigMixin",
    interposes="the two registries of quantizers, which gain 'remoe_gptq', 'remoe_awq' and 'remoe_compressed_tensors' "
    "when a checkpoint of theirs is read, and 'remoe_blocks' (for good: configurations that do not name them never see "
    "them)",
    patches="expert_cache/encodings/quantizers.py:put_on",
)
def quantizer_registries() -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    for registry in (AUTO_QUANTIZER_MAPPING, AUTO_QUANTIZATION_CONFIG_MAPPING):
        hold(isinstance(registry, MutableMapping), "a registry of quantizers is no mapping any more.")
    seen: list[Any] = []

    class Looking(ConversionOps):
        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def __deepcopy__(self, memo: Any) -> Any:
            return self

        def convert(self, input_dict: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
            tensors = [tensor for value in input_dict.values() for tensor in value]
            seen.extend(tensor.dtype for tensor in tensors)
            dtype = kwargs["model"].get_parameter(kwargs["full_layer_name"]).dtype
            return {key: [tensor.to(dtype) for tensor in value] for key, value in input_dict.items()}

    class Quantizer(HfQuantizer):
        def update_weight_conversions(self, weight_conversions: Any, model: Any = None) -> Any:
            made = []
            for entry in weight_conversions:
                if isinstance(entry, WeightConverter):
                    sources, targets = entry._original_source_patterns, entry._original_target_patterns
                    hold(all(source.endswith(".weight") for source in sources), f"sources of experts are {sources}.")
                    operations = [Looking(self), *entry.operations]
                    entry = WeightConverter([f"{source}$" for source in sources], list(targets), operations)
                made.append(entry)
            return made

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    class Config(QuantizationConfigMixin):
        def __init__(self, quant_method: Any, **_: Any) -> None:
            self.quant_method, self.dequantize = quant_method, True

    model = tiny_model().to(torch.float16)
    placed = Patches(
        put_on(AUTO_QUANTIZER_MAPPING, "remoe_contract", Quantizer),
        put_on(AUTO_QUANTIZATION_CONFIG_MAPPING, "remoe_contract", Config),
    )
    with placed, tempfile.TemporaryDirectory() as folder, no_bars():
        model.save_pretrained(folder)
        config = model.config.__class__.from_pretrained(folder)
        config.quantization_config = {"quant_method": "remoe_contract"}
        loaded = model_class().from_pretrained(folder, config=config, dtype=torch.float32).eval()
    hold(seen and set(seen) == {torch.float16}, f"tensors come to a quantizer's operations as {set(seen)}.")
    hold(getattr(loaded.config, "quantization_config", None) is None, "a dequantised model stays marked as quantised.")
    wanted = dict(model.named_parameters())
    same = all(torch.equal(value, wanted[name].float()) for name, value in loaded.named_parameters())
    hold(same, "a model that came through a quantizer of ours has other weights.")


@relied_on(
    "transformers",
    "A model class's from_pretrained(None, config=..., state_dict=...) hands out tensors as they are, codes too, after "
    "a quantizer has put other modules in their places, and takes things with a shape and get_dtype for tensors that "
    "it indexes.",
    "expert_cache/dense.py expert_cache/gguf/dense.py",
    names="transformers.quantizers.base.HfQuantizer transformers.utils.quantization_config.QuantizationConfigMixin",
)
def tensors_handed_out() -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Quantizer(HfQuantizer):
        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            codes = torch.empty(model.config.vocab_size, 3, dtype=torch.uint8, device="meta")
            model.lm_head.weight = nn.Parameter(codes, requires_grad=False)

        def is_serializable(self) -> bool:
            return False

        @property
        def is_trainable(self) -> bool:
            return True

    class Config(QuantizationConfigMixin):
        def __init__(self, quant_method: Any, **_: Any) -> None:
            self.quant_method = quant_method

    class Later:
        def __init__(self, value: torch.Tensor) -> None:
            self.value, self.shape = value, value.shape

        def get_dtype(self) -> str:
            return "U8" if self.value.dtype == torch.uint8 else "F32"

        def __getitem__(self, _: object) -> torch.Tensor:
            return self.value

    model = tiny_model()
    codes = torch.randint(0, 256, (model.config.vocab_size, 3), dtype=torch.uint8)
    state = {name: Later(value) for name, value in model.state_dict().items()} | {"lm_head.weight": Later(codes)}
    placed = Patches(
        put_on(AUTO_QUANTIZER_MAPPING, "remoe_contract", Quantizer),
        put_on(AUTO_QUANTIZATION_CONFIG_MAPPING, "remoe_contract", Config),
    )
    with placed, no_bars():
        config = tiny_config()
        config.quantization_config = {"quant_method": "remoe_contract"}
        loaded: Any = model_class().from_pretrained(None, config=config, state_dict=state, dtype=torch.float32)
    hold(torch.equal(loaded.lm_head.weight, codes), "codes that are handed to from_pretrained come out changed.")
    wanted = dict(model.named_parameters())
    rest = {name: value for name, value in loaded.named_parameters() if name != "lm_head.weight"}
    hold(all(torch.equal(value, wanted[name]) for name, value in rest.items()), "other weights come out changed.")


@relied_on(
    "transformers",
    "From 5.23 on, a table names for some architectures of GGUF files how each tensor becomes a parameter; older ones "
    "do without it.",
    "expert_cache/gguf/checkpoint.py",
    names="transformers.integrations.gguf.gguf_conversion_mapping.GGUF_ARCHS",
)
def gguf_conversions() -> None:
    try:
        from transformers.integrations.gguf.gguf_conversion_mapping import GGUF_ARCHS
    except ImportError:
        return
    hold(all(callable(build) for build in GGUF_ARCHS.values()), "the table of GGUF architectures has other entries.")
