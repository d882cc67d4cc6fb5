"""The stored tensors of an expert become ggml blocks: the same numbers where a type holds them, near ones elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import StoredParam, reference, save_quantised, stored_experts
from tiny_checkpoints import skeleton
from torch import Tensor
from transformers import AutoConfig

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.encodings.block_scaled import tile_blocks, tile_values
from remoe_adapt.expert_cache.encodings.blocks import BF16, MXFP4, Q4_0, Q4_1, Q8_0, BlockType, dequantise
from remoe_adapt.expert_cache.encodings.formats import Band, Format, format_of

# (architecture, method, settings, type, bar of the relative error; 0: bit for bit)
CASES: list[Any] = [
    ("gpt_oss", "mxfp4", {"shards": 3}, MXFP4, 0),
    ("qwen3_moe", "fp8", {}, Q8_0, 6e-3),
    ("qwen2_moe", "fp8", {"scales": "ue8m0"}, Q8_0, 6e-3),
    ("deepseek_v3", "fp8", {"scales": "bytes"}, Q8_0, 6e-3),
    ("qwen3_moe", "fp8", {"block": (8, 16)}, Q8_0, 8e-3),
    ("deepseek_v4", "fp8", {"scales": "ue8m0", "names": "scale", "experts": "fp4"}, MXFP4, 0),
    ("qwen3_moe", "compressed-tensors", {"symmetric": False}, Q4_1, 3e-3),
    ("qwen3_moe", "compressed-tensors", {"symmetric": False, "bits": 8}, Q8_0, 8e-3),
    ("mixtral", "gptq", {"dtype": torch.float32}, Q4_0, 0),
    ("mixtral", "gptq", {"bits": 2, "dtype": torch.float32}, Q4_0, 0),
    ("qwen3_moe", "gptq", {"sym": False, "shards": 3}, Q4_1, 1e-3),
    ("qwen3_moe", "gptq", {"desc_act": True, "dtype": torch.float32}, Q4_0, 0),
    ("qwen3_moe", "gptq", {"desc_act": True, "sym": False, "checkpoint_format": "gptq_v2"}, Q4_1, 1e-3),
    ("qwen3_moe", "gptq", {"bits": 8, "group_size": -1, "dtype": torch.float32}, Q8_0, 0),
    ("qwen3_moe", "gptq", {"bits": 8, "sym": False}, Q8_0, 8e-3),
    ("qwen3_moe", "gptq", {"group_size": 16}, Q8_0, 8e-3),
    ("mixtral", "awq", {}, Q4_1, 1e-3),
    ("qwen3_moe", "awq", {"zero_point": False, "dtype": torch.float32}, Q4_0, 0),
    ("qwen3_moe", "awq", {"group_size": 16}, Q8_0, 8e-3),
]


def experts(folder: Path, dtype: torch.dtype) -> tuple[Format, list[StoredParam]]:
    config = AutoConfig.from_pretrained(folder)
    found = format_of("x", config)
    assert found is not None
    return found, list(stored_experts(folder, skeleton(folder, dtype), found.quantizer(config)))


def matrix(bands: list[Band], cols: int) -> Tensor:
    """The rows of all bands as numbers, the columns where the parameter has them."""
    rows = []
    for band in bands:
        values_NK = dequantise(band.blocks_NB, band.kind, cols)
        if band.order_K is not None:
            assert sorted(band.order_K.tolist()) == list(range(cols))
            values_NK = values_NK[:, band.order_K.argsort()]
        rows.append(values_NK)
    return torch.cat(rows)


@pytest.mark.parametrize(("architecture", "method", "settings", "kind", "bar"), CASES)
def test_blocks_are_the_rows_of_the_parameter(
    tmp_path: Path, architecture: str, method: str, settings: dict[str, Any], kind: BlockType, bar: float
) -> None:
    folder = save_quantised(tmp_path / "q", architecture, method, **settings)
    model = reference(folder)
    wanted = dict(model.named_parameters())
    found, params = experts(folder, model.dtype)
    is_ordered = settings.get("desc_act", False)
    for param in params:
        value = wanted[param.name][param.expert]
        # Files hold a row for each output, some parameters a column.
        value_NK = value.T if method == "mxfp4" else value
        bands = found.blocks(param.pieces)
        assert {band.kind for band in bands} == {kind}
        assert all((band.order_K is not None) == is_ordered for band in bands)
        read = matrix(bands, value_NK.shape[1])
        if bar:
            assert (read - value_NK.float()).norm() < bar * value_NK.float().norm()
        else:
            assert torch.equal(read.to(value.dtype), value_NK)
        # Without the numbers, kinds and sizes are the same: slots are made before anything is read.
        told = found.blocks({name: tensor.to("meta") for name, tensor in param.pieces.items()})
        assert [(b.kind, b.blocks_NB.shape, b.order_K is None) for b in told] == [
            (b.kind, b.blocks_NB.shape, b.order_K is None) for b in bands
        ]


def of(**settings: Any) -> Format:
    config: Any = type("Config", (), {"quantization_config": settings, "get_text_config": lambda self: self})()
    found = format_of("x", config)
    assert found is not None
    return found


def compressed(bits: int = 4, kind: str = "int", layout: str = "pack-quantized", strategy: str = "channel") -> Format:
    weights = {"num_bits": bits, "type": kind, "symmetric": True, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": weights}
    return of(quant_method="compressed-tensors", format=layout, config_groups={"g": group})


def test_symmetric_packed_codes_are_held_to_the_last_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (16, 8), generator=generator).to(torch.int32)
    for bits, kind in ((4, Q4_0), (8, Q8_0)):
        cols = 8 * 32 // bits
        scale = (torch.rand(16, cols // 32, generator=generator) * 0.01 + 1e-3).bfloat16()
        pieces = {"x.weight_packed": words, "x.weight_scale": scale, "x.weight_shape": torch.tensor([16, cols])}
        (band,) = compressed(bits, strategy="group").blocks(pieces)
        read = dequantise(band.blocks_NB, band.kind, cols)
        codes = torch.stack([(words >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)], -1).view(16, cols)
        wanted = (codes - (1 << (bits - 1))).float() * scale.float().repeat_interleave(32, 1)
        assert band.kind == kind and torch.equal(read, wanted)


def test_int8_and_fp8_of_compressed_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    int8 = torch.randint(-128, 128, (16, 64), generator=generator).to(torch.int8)
    scale = torch.rand(16, 1, generator=generator).bfloat16()
    (band,) = compressed(8, layout="int-quantized").blocks({"x.weight": int8, "x.weight_scale": scale})
    assert torch.equal(dequantise(band.blocks_NB, band.kind, 64), int8.float() * scale.float())
    fp8 = (torch.randn(16, 64, generator=generator) * 50).to(torch.float8_e4m3fn)
    (band,) = compressed(8, "float", "float-quantized").blocks({"x.weight": fp8, "x.weight_scale": scale})
    wanted = fp8.float() * scale.float()
    assert (dequantise(band.blocks_NB, band.kind, 64) - wanted).norm() < 6e-3 * wanted.norm()


def test_weights_that_are_not_quantised_stay_floats() -> None:
    weight = torch.randn(8, 64).bfloat16()
    for found in (of(quant_method="gptq", bits=4), of(quant_method="fp8"), compressed()):
        (band,) = found.blocks({"down_proj.weight": weight})
        assert band.kind == BF16 and torch.equal(dequantise(band.blocks_NB, BF16, 64, torch.bfloat16), weight)


@pytest.mark.parametrize("spread", [100.0, 1.0, 1e-2])
def test_most_fp8_numbers_are_held_as_they_are(spread: float) -> None:
    # The last spread has largest numbers whose factors are beyond fp16.
    generator = torch.Generator().manual_seed(1)
    codes = (torch.randn(64, 256, generator=generator) * spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    codes[3] = 0
    scales = torch.rand(2, 2, generator=generator) / 4 + 0.25
    kind, blocks_NB = tile_blocks("x", codes, scales)
    wanted, read = tile_values("x", codes, scales), dequantise(blocks_NB, kind, 256)
    assert kind == Q8_0 and (read - wanted).norm() < 6e-3 * wanted.norm()
    # Only the unit of a block is rounded where a number is at least an eighth of its largest one.
    large = wanted.abs() >= wanted.abs().unflatten(1, (-1, 32)).amax(-1).repeat_interleave(32, 1) / 8
    assert torch.allclose(read[large], wanted[large], rtol=2.0**-11, atol=0)
    assert bool((read[3] == 0).all())


def test_both_ways_of_fp8_blocks_agree() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(8, 32).repeat(1, 2)
    codes[codes & 127 == 127] = 0
    shuffled = codes.flatten()[torch.randperm(512, generator=torch.Generator().manual_seed(2))].view(8, 64)
    one = torch.ones(1)
    _, quick = tile_blocks("x", shuffled.view(torch.float8_e4m3fn), one)
    # A block of tiny numbers beside them takes all of the matrix the other way.
    tiny = torch.cat((shuffled, torch.full((1, 64), 9, dtype=torch.uint8)))
    _, slow = tile_blocks("x", tiny.view(torch.float8_e4m3fn), one)
    assert torch.equal(quick, slow[:8])


def test_order_of_bands_is_that_of_the_pieces(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "gptq", dtype=torch.float32)
    found, params = experts(folder, torch.float32)
    param = next(param for param in params if "gate_up" in param.name)
    assert [name for name in param.pieces if name.endswith("qweight")] == ["gate_proj.qweight", "up_proj.qweight"]
    gate, up = found.blocks(param.pieces)
    swapped = dict(sorted(param.pieces.items(), reverse=True))
    assert [torch.equal(a.blocks_NB, b.blocks_NB) for a, b in zip(found.blocks(swapped), (up, gate), strict=True)]


# Hostile files


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Format, dict[str, Tensor]]]:
    """A format and the pieces of one expert, by method."""
    found = {}
    for architecture, method, settings in (
        ("gpt_oss", "mxfp4", {}),
        ("qwen3_moe", "fp8", {}),
        ("qwen3_moe", "compressed-tensors", {"symmetric": False}),
        ("qwen3_moe", "gptq", {"desc_act": True}),
        ("qwen3_moe", "awq", {}),
    ):
        folder = save_quantised(tmp_path_factory.mktemp("hostile") / "q", architecture, method, **settings)
        form, params = experts(folder, torch.bfloat16)
        found[method] = (form, next(param for param in params if "down_proj" in param.name).pieces)
    return found


def nan(tensor: Tensor) -> Tensor:
    spoilt = tensor.clone()
    spoilt.view(-1)[1] = float("nan")
    return spoilt


def filled(number: int) -> Any:
    return lambda tensor: torch.full_like(tensor, number)


def short(tensor: Tensor) -> Tensor:
    return tensor[..., :-1].contiguous() if tensor.ndim > 1 else tensor[:-1]


def without(tensor: Tensor) -> None:
    return None


@pytest.mark.parametrize(
    ("method", "piece", "spoil", "words"),
    [
        ("mxfp4", "down_proj_blocks", short, "do not fit together"),
        ("mxfp4", "down_proj_blocks", lambda t: t.float(), "do not fit together"),
        ("mxfp4", "down_proj_scales", filled(255), "no finite number"),
        ("mxfp4", "down_proj_scales", short, "do not fit together"),
        ("mxfp4", "down_proj_scales", without, "has no scales"),
        ("mxfp4", "down_proj_blocks", lambda t: t[:, :0], "do not fit together"),
        ("fp8", "down_proj.weight", lambda t: t.view(torch.uint8) | 127, "do not fit together"),
        ("fp8", "down_proj.weight", lambda t: (t.view(torch.uint8) | 127).view(t.dtype), "no number"),
        ("fp8", "down_proj.weight", lambda t: t[:-3], "do not fit together"),
        ("fp8", "down_proj.weight", lambda t: t[:0], "do not fit together"),
        ("fp8", "down_proj.weight_scale_inv", nan, "no finite number"),
        ("fp8", "down_proj.weight_scale_inv", lambda t: t * float("inf"), "no finite number"),
        ("fp8", "down_proj.weight_scale_inv", without, "has no weight_scale_inv"),
        ("fp8", "down_proj.weight_scale_inv", lambda t: t.long(), "no finite number"),
        ("compressed-tensors", "down_proj.weight_shape", lambda t: t * 2, "weight_shape says"),
        ("compressed-tensors", "down_proj.weight_shape", lambda t: -t, "weight_shape says"),
        ("compressed-tensors", "down_proj.weight_shape", lambda t: t[:1], "weight_shape says"),
        ("compressed-tensors", "down_proj.weight_scale", nan, "not finite"),
        ("compressed-tensors", "down_proj.weight_scale", lambda t: t[:4], r"weight_shape says \[64, 32\]"),
        ("compressed-tensors", "down_proj.weight_zero_point", short, "has shape|do not fit"),
        ("compressed-tensors", "down_proj.weight_zero_point", without, "has no weight_zero_point"),
        ("compressed-tensors", "down_proj.weight_packed", lambda t: t.long(), "do not fit together"),
        ("compressed-tensors", "down_proj.weight_packed", lambda t: t[:0], "is no matrix"),
        ("gptq", "down_proj.g_idx", filled(7), "names group 7 of 1"),
        ("gptq", "down_proj.g_idx", filled(-1), "names group -1 of 1"),
        ("gptq", "down_proj.g_idx", short, "do not fit together"),
        ("gptq", "down_proj.scales", nan, "not finite"),
        ("gptq", "down_proj.scales", lambda t: t * float("inf"), "not finite"),
        ("gptq", "down_proj.scales", lambda t: t[0], "is no matrix"),
        ("gptq", "down_proj.scales", lambda t: t.int(), "do not fit together"),
        ("gptq", "down_proj.scales", without, "has no scales"),
        ("gptq", "down_proj.qzeros", short, "no codes of 2, 4 or 8 bits"),
        ("gptq", "down_proj.qzeros", filled(0), "zero points are not all 8"),
        ("gptq", "down_proj.qweight", short, "do not fit together"),
        ("gptq", "down_proj.qweight", lambda t: t[:, :0], "is no matrix"),
        ("awq", "down_proj.qweight", short, "do not fit together"),
        ("awq", "down_proj.scales", nan, "not finite"),
        ("awq", "down_proj.qzeros", lambda t: t.repeat(2, 1), "no codes of"),
    ],
)
def test_damaged_pieces_are_one_clear_error(
    stored: dict[str, tuple[Format, dict[str, Tensor]]], method: str, piece: str, spoil: Any, words: str
) -> None:
    found, pieces = stored[method]
    spoilt = {name: spoil(value) if name == piece else value for name, value in pieces.items()}
    with pytest.raises(ExpertReadError, match=words) as raised:
        found.blocks({name: value for name, value in spoilt.items() if value is not None})
    assert "down_proj" in str(raised.value) and "\n" not in str(raised.value)


def test_columns_in_an_order_that_the_configuration_denies(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "gptq", desc_act=True)
    _, params = experts(folder, torch.float16)
    denying = of(quant_method="gptq", bits=4, desc_act=False)
    with pytest.raises(ExpertReadError, match="Set desc_act to true"):
        denying.blocks(next(param for param in params if "gate_up" in param.name).pieces)


def test_groups_of_act_order_that_are_not_as_wide_as_others(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "q", "qwen3_moe", "gptq", desc_act=True)
    found, params = experts(folder, torch.float16)
    pieces = dict(next(param for param in params if "gate_up" in param.name).pieces)
    pieces["gate_proj.g_idx"] = torch.zeros_like(pieces["gate_proj.g_idx"])
    with pytest.raises(ExpertReadError, match="makes groups of"):
        found.blocks(pieces)
