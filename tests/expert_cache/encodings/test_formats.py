"""Quantised checkpoints in their real layouts are read as transformers dequantises them, whole and expert by expert."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quantised_checkpoints import edit_config, original, reference, save_quantised, stored_experts
from tiny_checkpoints import skeleton
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.utils.quantization_config import Mxfp4Config

from remoe_adapt.checkpoints import auto_class
from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encodings.formats import Format, format_of

needs_compressed_tensors = pytest.mark.skipif(
    importlib.util.find_spec("compressed_tensors") is None, reason="the reference needs compressed-tensors"
)
CASES: list[Any] = [
    ("gpt_oss", "mxfp4", {}),
    ("gpt_oss", "mxfp4", {"shards": 4}),
    ("qwen3_moe", "fp8", {}),
    ("qwen2_moe", "fp8", {"scales": "ue8m0", "shards": 3}),
    ("deepseek_v3", "fp8", {"scales": "bytes"}),
    ("qwen3_moe", "fp8", {"experts": "fp4"}),
    ("deepseek_v4", "fp8", {"scales": "ue8m0", "names": "scale", "experts": "fp4"}),
    pytest.param("qwen3_moe", "compressed-tensors", {"shards": 3}, marks=needs_compressed_tensors),
    pytest.param("mixtral", "compressed-tensors", {"bits": 8, "group_size": None}, marks=needs_compressed_tensors),
    pytest.param("deepseek_v2", "compressed-tensors", {"kind": "float"}, marks=needs_compressed_tensors),
    ("olmoe", "compressed-tensors", {"symmetric": False}),
    ("qwen2_moe", "compressed-tensors", {"symmetric": False, "bits": 8}),
    ("qwen2_moe", "gptq", {"shards": 3}),
    ("qwen3_moe", "gptq", {"sym": False, "dtype": torch.bfloat16}),
    ("mixtral", "gptq", {"desc_act": True}),
    ("olmoe", "gptq", {"desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}),
    ("deepseek_v2", "gptq", {"bits": 8, "sym": False}),
    ("qwen3_moe", "gptq", {"bits": 8, "group_size": -1}),
    ("qwen2_moe", "gptq", {"bits": 2}),
    (
        "qwen3_moe",
        "gptq",
        {"dynamic": {r"+:.*\.layers\.1\..*experts.*": {"bits": 8}, r"-:.*self_attn.*": {}, r"-:.*\.layers\.0\..*": {}}},
    ),
    ("qwen3_moe", "awq", {"shards": 3}),
    ("mixtral", "awq", {"group_size": -1}),
    ("deepseek_v3", "awq", {"zero_point": False, "dtype": torch.float32}),
]


def read(folder: Path) -> tuple[PretrainedConfig, Format]:
    config = AutoConfig.from_pretrained(folder)
    found = format_of("x", config)
    assert found is not None
    return config, found


def loaded(folder: Path, **options: Any) -> PreTrainedModel:
    config, found = read(folder)
    model = auto_class(config).from_pretrained(folder, config=found.loading(config), **options)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.mark.parametrize(("architecture", "method", "settings"), CASES)
def test_experts_are_transformers_dequantised_ones(
    tmp_path: Path, architecture: str, method: str, settings: dict[str, Any]
) -> None:
    folder = save_quantised(tmp_path / "q", architecture, method, **settings)
    wanted = dict(reference(folder).named_parameters())
    config, found = read(folder)
    assert found.method == method
    whole = loaded(folder)
    for name, value in whole.named_parameters():
        assert value.dtype == wanted[name].dtype and torch.equal(value, wanted[name]), name
    assert getattr(whole.config, "quantization_config", None) is None and not getattr(whole, "hf_quantizer", None)
    # One by one, from what the files hold of one expert alone.
    model = skeleton(folder, whole.dtype)
    params = list(stored_experts(folder, model, found.quantizer(config)))
    for param in params:
        one = param.convert(model)
        assert one.dtype == wanted[param.name].dtype and torch.equal(one, wanted[param.name][param.expert]), param.name
    experts = {name for name in wanted if ".experts." in name and "bias" not in name}
    assert {param.name for param in params} == experts and len(params) == 8 * len(experts)


@pytest.mark.parametrize(
    ("method", "settings", "bar"),
    [
        ("fp8", {}, 0.04),
        ("compressed-tensors", {"symmetric": False}, 0.12),
        ("gptq", {"desc_act": True, "sym": False}, 0.12),
        ("gptq", {"bits": 8}, 0.01),
        ("awq", {}, 0.12),
    ],
)
def test_dequantised_weights_are_near_the_original_ones(
    tmp_path: Path, method: str, settings: dict[str, Any], bar: float
) -> None:
    # References and files are made by the same hands: this holds both to the numbers that went in.
    folder = save_quantised(tmp_path / "q", "qwen3_moe", method, dtype=torch.float32, **settings)
    got = dict(loaded(folder, dtype=torch.float32).named_parameters())
    plain = original(folder)
    for name, value in plain.items():
        if ".experts." not in name:
            assert (got[name] - value).norm() < bar * value.norm(), name
    for expert in range(8):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        halves = [plain[f"{prefix}.{half}_proj.weight"] for half in ("gate", "up")]
        wanted = torch.cat(halves)
        found = got["model.layers.1.mlp.experts.gate_up_proj"][expert]
        assert (found - wanted).norm() < bar * wanted.norm()


def test_a_configuration_is_read_from_its_text_part_and_from_objects(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "gpt_oss", "mxfp4")
    config = AutoConfig.from_pretrained(folder)
    settings = config.quantization_config
    assert format_of("x", AutoConfig.for_model("qwen3_moe")) is None
    as_object = copy.deepcopy(config)
    as_object.quantization_config = Mxfp4Config(modules_to_not_convert=["lm_head"])
    nested: Any = SimpleNamespace(get_text_config=lambda: config)
    for given in (config, as_object, nested):
        found = format_of("x", given)
        assert found is not None and found.method == "mxfp4" and found.settings["modules_to_not_convert"]
    assert config.quantization_config is settings, "the caller's configuration stays as it is"
    found = format_of("x", config)
    assert found is not None
    loading = found.loading(config)
    assert loading.quantization_config["dequantize"] and "dequantize" not in config.quantization_config


REMEDY = "give the checkpoint that it was made from, or its GPTQ, AWQ, FP8 or GGUF version"
OTHERS = [
    "bitsandbytes", "torchao", "hqq", "aqlm", "eetq", "quanto", "vptq", "spqr", "higgs", "bitnet", "nvfp4", "modelopt",
    "fbgemm_fp8", "auto-round", "quark", "",
]  # fmt: skip


@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_refused_by_name_with_what_to_do(method: str) -> None:
    config: Any = SimpleNamespace(quantization_config={"quant_method": method}, get_text_config=lambda: config)
    with pytest.raises(UncacheableError) as raised:
        format_of("org/model", config)
    words = str(raised.value)
    assert f"'org/model' is quantised ({method or 'no method named'})" in words and REMEDY in words
    assert "`remoe pack --bits 4`" in words and "\n" not in words


def of_settings(**settings: Any) -> Format | None:
    config: Any = SimpleNamespace(quantization_config=settings, get_text_config=lambda: config)
    return format_of("org/model", config)


def compressed(entry: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
    group = {"targets": ["Linear"], "weights": weights | (entry or {})}
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    } | settings  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"quant_method": "gptq", "bits": 3}, "bits 3"),
        ({"quant_method": "gptq"}, "bits None"),
        ({"quant_method": "gptq", "bits": True}, "bits True"),
        ({"quant_method": "gptq", "bits": 4, "pack_dtype": "int8"}, "pack_dtype 'int8'"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "checkpoint_format"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*up_proj": {"bits": 3}}}, "3 bits for single modules"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": ["x"]}, "dynamic ['x']"),
        ({"quant_method": "awq", "bits": 8}, "bits 8"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version 'gemv'"),
        (compressed(config_groups={}), "no groups of compressed weights"),
        (compressed(config_groups={"group_0": ["Linear"]}), "no groups of compressed weights"),
        (compressed(quantization_status="frozen"), "no groups of compressed weights"),
        (compressed(format="nvfp4-pack-quantized"), "format 'nvfp4-pack-quantized'"),
        (compressed(format="marlin-24"), "format 'marlin-24'"),
        (compressed({"num_bits": 3}), "'num_bits': 3"),
        (compressed({"strategy": "token"}), "strategy 'token'"),
        (compressed({"actorder": "group"}), "actorder 'group'"),
        (compressed({"num_bits": 8, "symmetric": False}, format="int-quantized"), "zero points"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(transform_config={"config_groups": {"v": {}}}), "transform_config"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(UncacheableError) as raised:
        of_settings(**settings)
    assert words in str(raised.value) and REMEDY in str(raised.value) and "'org/model'" in str(raised.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"-:lm_head": {}, "+:.*": {"bits": 8, "group_size": 32}}},
        {"quant_method": "awq", "w_bit": 4, "version": "GEMM"},
        compressed({"actorder": "weight"}),
        compressed({"num_bits": 8, "type": "float", "strategy": "channel"}, format="float-quantized"),
        compressed(sparsity_config={"format": "dense"}, transform_config={}),
    ],
)
def test_settings_as_real_repositories_have_them_are_read(settings: dict[str, Any]) -> None:
    assert of_settings(**settings) is not None


@pytest.mark.parametrize(
    ("settings", "names", "codes"),
    [
        ({"quant_method": "fp8"}, ["weight", "weight_scale_inv"], torch.float8_e4m3fn),
        ({"quant_method": "fp8"}, ["weight", "scale"], torch.float8_e4m3fn),
        ({"quant_method": "gptq", "bits": 4}, ["qweight", "qzeros", "scales"], torch.int32),
        ({"quant_method": "awq", "bits": 4}, ["qweight", "qzeros", "scales"], torch.int32),
        (compressed(), ["weight_packed", "weight_scale"], torch.int32),
    ],
)
def test_codes_without_their_scales_are_refused(settings: dict[str, Any], names: list[str], codes: torch.dtype) -> None:
    found = of_settings(**settings)
    assert found is not None
    dtypes = {f"experts.0.up_proj.{name}": codes if name == names[0] else torch.float32 for name in names}
    dtypes |= {"norm.weight": torch.bfloat16, "experts.0.down_proj.weight": torch.bfloat16}
    found.check_tensors(dtypes)
    for name in names[1:]:
        # As AutoFP8 writes it: a name that transformers does not know.
        other = {("x." if key.endswith(name) else "") + key: dtype for key, dtype in dtypes.items()}
        with pytest.raises(UncacheableError, match=rf"experts.0.up_proj.{names[0]} without experts.0.up_proj."):
            found.check_tensors(other)


def test_other_small_floats_are_refused() -> None:
    found = of_settings(quant_method="fp8")
    assert found is not None
    with pytest.raises(UncacheableError, match=r"x\.weight in E5M2"):
        found.check_tensors({"x.weight": torch.float8_e5m2, "x.weight_scale_inv": torch.float32})


def test_modules_left_out_by_name_are_read_as_they_are(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "gptq", dynamic={r"-:.*experts\.[0-9]*\.down_proj.*": {}})
    wanted = dict(reference(folder).named_parameters())
    config, found = read(folder)
    model = skeleton(folder, torch.float16)
    params = [p for p in stored_experts(folder, model, found.quantizer(config)) if "down_proj" in p.name]
    assert params and all(list(param.pieces) == ["down_proj.weight"] for param in params)
    for param in params:
        assert torch.equal(param.convert(model), wanted[param.name][param.expert])


def test_integer_checkpoints_of_compressed_tensors_need_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "compressed-tensors", symmetric=False)
    monkeypatch.setitem(__import__("sys").modules, "compressed_tensors", None)
    wanted = dict(reference(folder).named_parameters())
    for name, value in loaded(folder).named_parameters():
        assert torch.equal(value, wanted[name])


def test_fp8_under_its_other_name(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "fp8", block=(1, 32), scales="bytes")
    edit_config(folder, quant_method="mxfp8")
    assert read(folder)[1].method == "mxfp8"
    wanted = dict(reference(folder).named_parameters())
    for name, value in loaded(folder).named_parameters():
        assert torch.equal(value, wanted[name])


def test_mixed_bits_of_compressed_tensors_are_told_by_shapes(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "compressed-tensors", symmetric=False, bits=8)
    weights = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
    config = AutoConfig.from_pretrained(folder)
    groups = {
        "group_1": {"targets": ["re:.*lm_head"], "weights": weights},
        **config.quantization_config["config_groups"],
    }
    edit_config(folder, config_groups=groups)
    wanted = dict(reference(folder).named_parameters())
    for name, value in loaded(folder).named_parameters():
        assert torch.equal(value, wanted[name])
