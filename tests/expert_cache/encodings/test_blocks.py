"""ggml's blocks as numbers: every decoder against gguf-py's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encodings import (
    DECODED,
    MXFP4,
    Q4_0,
    Q4_K,
    Q8_0,
    BlockType,
    block_type,
    blocks,
    dequantise,
)
from remoe_adapt.expert_cache.encodings.blocks import _CHUNK_VALUES, _TABLE

gguf = pytest.importorskip("gguf", reason="the gguf package's own numbers (extra: export)")

KINDS = sorted(DECODED, key=lambda kind: kind.number)
# Bytes of each block that are fp16 scales or minima: random ones are made finite there.
HALFS = {
    "q4_0": [0], "q4_1": [0, 2], "q5_0": [0], "q5_1": [0, 2], "q8_0": [0], "q2_K": [80, 82], "q3_K": [108],
    "q4_K": [0, 2], "q5_K": [0, 2], "q6_K": [208], "iq4_nl": [0], "iq4_xs": [0], "f16": [0],
}  # fmt: skip


def random_blocks(kind: BlockType, rows: int, cols: int) -> Tensor:
    """uint8 [rows, row bytes] of every bit pattern, but for floats that are not finite."""
    blocks = torch.randint(0, 256, (rows * kind.row_bytes(cols) // kind.bytes, kind.bytes), dtype=torch.uint8)
    for place in HALFS.get(kind.name, []):
        blocks[:, place + 1] &= 0b10111011  # the highest and the lowest bit of the exponent
    if kind is MXFP4:
        blocks[:, 0].clamp_(max=250)
    if kind.name in ("f32", "bf16"):
        blocks[:, -1] &= 0b10111111
    return blocks.view(rows, -1)


def theirs(blocks_NB: Tensor, kind: BlockType) -> Tensor:
    return torch.from_numpy(gguf.dequantize(blocks_NB.numpy(), gguf.GGMLQuantizationType(kind.number)))


def bits(values: Tensor) -> Tensor:
    return values.view(torch.int32)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
@pytest.mark.parametrize("rows", [1, 7, 513])
def test_values_are_those_of_the_gguf_package_bit_for_bit(
    kind: BlockType, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Sixteen rows at a time, and a last chunk that is shorter.
    monkeypatch.setattr(blocks, "_CHUNK_VALUES", 16 * 512)
    blocks_NB = random_blocks(kind, rows, 512)
    expected = theirs(blocks_NB, kind)
    found = dequantise(blocks_NB, kind, 512)
    assert expected.isfinite().all() and found.dtype == torch.float32
    assert torch.equal(bits(found), bits(expected))


def test_every_byte_of_a_small_block_counts() -> None:
    blocks = torch.zeros(1, 34, dtype=torch.uint8)
    blocks[0, :2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    blocks[0, 2:] = torch.arange(240, 272).to(torch.uint8)
    expected = torch.arange(-16, 16).float().unsqueeze(0)
    assert torch.equal(dequantise(blocks, Q8_0, 32), expected)


def test_exponents_of_mxfp4_that_are_subnormal_and_the_largest() -> None:
    exponents = torch.tensor([0, 1, 2, 3, 127, 253], dtype=torch.uint8)
    blocks = torch.cat([exponents.unsqueeze(1), torch.full((6, 16), 0x21, dtype=torch.uint8)], dim=1)
    torch.set_flush_denormal(False)
    try:
        found = dequantise(blocks, MXFP4, 32)
        assert torch.equal(bits(found), bits(theirs(blocks, MXFP4)))
        # Codes 1 and 2 are 0.5 and 1, times two to the exponent less 127.
        assert found[0, 0] == 2.0**-128 and found[4, 16] == 1.0
    finally:
        torch.set_flush_denormal(True)


@pytest.mark.parametrize("cols", [1, 31, 33, 300])
def test_columns_beyond_the_matrix_are_dropped(cols: int) -> None:
    for kind in (Q4_0, Q4_K):
        blocks_NB = random_blocks(kind, 3, cols)
        assert blocks_NB.shape[1] == kind.row_bytes(cols) == kind.padded(cols) // kind.values * kind.bytes
        assert torch.equal(dequantise(blocks_NB, kind, cols), theirs(blocks_NB, kind)[:, :cols])


def test_other_dtypes_are_roundings_of_the_exact_values() -> None:
    blocks_NB = random_blocks(Q4_K, 5, 256)
    exact = dequantise(blocks_NB, Q4_K, 256)
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        assert torch.equal(dequantise(blocks_NB, Q4_K, 256, dtype), exact.to(dtype))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_blocks_may_lie_anywhere_in_memory(kind: BlockType) -> None:
    for rows, gap in ((4, 3), (4, 0), (1, 0)):
        blocks_NB = random_blocks(kind, rows, kind.values)
        storage = torch.zeros(1 + rows * (kind.bytes + gap), dtype=torch.uint8)
        odd = torch.as_strided(storage, (rows, kind.bytes), (kind.bytes + gap, 1), 1)
        odd.copy_(blocks_NB)
        found, expected = dequantise(odd, kind, kind.values), dequantise(blocks_NB, kind, kind.values)
        assert torch.equal(bits(found), bits(expected))


def test_no_rows_are_no_numbers() -> None:
    assert dequantise(torch.zeros(0, 18, dtype=torch.uint8), Q4_0, 32).shape == (0, 32)


def test_names_numbers_and_sizes_are_those_of_the_gguf_package() -> None:
    expected = {(t.name.lower(), int(t), *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    # The table may know more than the installed package.
    assert expected <= {(kind.name.lower(), kind.number, kind.values, kind.bytes) for kind in _TABLE}
    assert len({kind.number for kind in _TABLE}) == len({kind.name for kind in _TABLE}) == len(_TABLE)


def test_types_are_found_by_name_and_by_number() -> None:
    assert block_type("q4_K") is block_type("Q4_K") is block_type(12) is Q4_K
    for unknown in ("q4_2", 4, -1, 1 << 40, ""):
        with pytest.raises(UncacheableError, match="not known here: use a newer remoe-adapt"):
            block_type(unknown)


@pytest.mark.parametrize(
    ("shape", "dtype", "cols"),
    [
        ((2, 17), torch.uint8, 32),
        ((2, 18), torch.uint8, 33),
        ((2, 18), torch.int8, 32),
        ((36,), torch.uint8, 32),
        ((2, 0), torch.uint8, 0),
        ((2, 18), torch.uint8, -32),
    ],
)
def test_tensors_that_are_no_rows_of_blocks_are_refused(shape: tuple[int, ...], dtype: torch.dtype, cols: int) -> None:
    with pytest.raises(UncacheableError, match=rf"does not hold rows of {cols} values as q4_0 blocks"):
        dequantise(torch.zeros(shape, dtype=dtype), Q4_0, cols)


def test_types_without_a_decoder_are_refused_by_name() -> None:
    iq2 = block_type("iq2_xxs")
    with pytest.raises(UncacheableError, match="iq2_xxs cannot be dequantised here: give weights in one of f32, f16"):
        dequantise(torch.zeros(1, 66, dtype=torch.uint8), iq2, 256)


def test_a_scale_that_is_no_number_spoils_its_block_alone() -> None:
    blocks_NB = random_blocks(Q4_0, 1, 64)
    blocks_NB[0, 18:20] = torch.tensor([float("nan")], dtype=torch.float16).view(torch.uint8)
    found = dequantise(blocks_NB, Q4_0, 64)
    assert found[0, :32].isfinite().all() and found[0, 32:].isnan().all()


def test_memory_beside_the_result_is_bounded() -> None:
    # 32 million values: a copy of the codes in fp32 would take 128 MiB.
    blocks_NB = torch.zeros(4096, Q4_0.row_bytes(8192), dtype=torch.uint8)
    with torch.profiler.profile(profile_memory=True) as profile:
        dequantise(blocks_NB, Q4_0, 8192, torch.bfloat16)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    result_bytes = 4096 * 8192 * 2
    assert result_bytes <= peak <= result_bytes + 8 * 4 * _CHUNK_VALUES


def test_numpy_and_torch_agree_on_what_a_half_is() -> None:
    # Every finite fp16, subnormal ones too, is the same fp32 in both: scales rely on it.
    halfs = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    halfs = halfs[np.isfinite(halfs)]
    blocks = torch.from_numpy(halfs).view(torch.uint8).view(1, -1)
    found = dequantise(blocks, block_type("f16"), len(halfs))
    assert torch.equal(bits(found[0]), bits(torch.from_numpy(halfs.astype(np.float32))))
