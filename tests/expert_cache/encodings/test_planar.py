"""ggml blocks in the planes that the experts' kernels read: the same numbers, and kernels that compute with them."""

from __future__ import annotations

import pytest
import torch
from remoe_adapt.triton_kernels.experts_reference import dequantised, experts_reference
from remoe_adapt.triton_kernels.slots import FLOAT, INT4, INT8, Activation, SlotMatrix
from torch import Tensor

from remoe_adapt.errors import UncacheableError
from remoe_adapt.expert_cache.encodings import blocks as types
from remoe_adapt.expert_cache.encodings.blocks import DECODED, BlockType, dequantise
from remoe_adapt.expert_cache.encodings.planar import planar_from_blocks, planar_kind

EXACT = (
    types.F32, types.F16, types.BF16, types.Q4_0, types.Q4_1, types.Q5_0, types.Q5_1, types.Q8_0, types.IQ4_NL,
    types.MXFP4,
)  # fmt: skip
# Scales of these are products, which fp16 rounds.
ROUNDED = tuple(DECODED.difference(EXACT))


def random_blocks(kind: BlockType, rows: int, cols: int) -> Tensor:
    """Blocks of random codes, whose scales are numbers of a size that models have."""
    blocks_NB = torch.randint(0, 256, (rows, kind.row_bytes(cols)), dtype=torch.uint8)
    if kind.values == 1:
        floats = {types.F32: torch.float32, types.F16: torch.float16, types.BF16: torch.bfloat16}[kind]
        return torch.randn(rows, cols).to(floats).view(torch.uint8)
    blocks = blocks_NB.view(-1, kind.bytes)
    if kind == types.MXFP4:
        blocks[:, 0] = torch.randint(110, 130, (len(blocks),))
        return blocks_NB
    # Where a block has its scales of two bytes: at the end in three types.
    places = {types.Q2_K: (80, 82), types.Q3_K: (108,), types.Q6_K: (208,)}.get(kind, (0,))
    if kind in (types.Q4_1, types.Q5_1, types.Q4_K, types.Q5_K):
        places = (0, 2)
    for place in places:
        halfs = (torch.randn(len(blocks)) * 0.01).half()
        blocks[:, place : place + 2] = halfs.view(-1, 1).view(torch.uint8)
    return blocks_NB


def matrix_of(kind: BlockType, blocks_NB: Tensor, cols: int) -> SlotMatrix:
    """The planes of such rows as the only slot of a pool."""
    planar = planar_from_blocks(kind, blocks_NB, cols)
    parts = {name: getattr(planar, name) for name in ("codes", "scales", "minima")}
    return SlotMatrix(kind=planar.kind, **{name: None if part is None else part[None] for name, part in parts.items()})


@pytest.mark.parametrize("kind", sorted(DECODED, key=lambda kind: kind.number), ids=lambda kind: kind.name)
def test_planes_hold_the_numbers_of_the_blocks(kind: BlockType) -> None:
    blocks_NB = random_blocks(kind, 5, 512)
    expected_NK = dequantise(blocks_NB, kind, 512)
    ours_NK = dequantised(matrix_of(kind, blocks_NB, 512), 0)
    if kind in EXACT:
        assert torch.equal(ours_NK, expected_NK)
    else:
        # Rounded are the scale and, where there is one, the minimum.
        assert float((ours_NK - expected_NK).norm() / expected_NK.norm()) < 2**-11


@pytest.mark.parametrize(
    ("kind", "planes", "bits"),
    [
        (types.Q2_K, INT4, 6.0), (types.Q3_K, INT4, 5.0), (types.Q4_0, INT4, 4.5), (types.Q4_K, INT4, 5.0),
        (types.Q5_K, INT8, 9.0), (types.Q6_K, INT8, 9.0), (types.Q8_0, INT8, 8.5), (types.IQ4_XS, INT8, 8.5),
        (types.BF16, FLOAT, 16.0),
    ],
)  # fmt: skip
def test_planes_take_so_many_bits_a_number(kind: BlockType, planes: str, bits: float) -> None:
    planar = planar_from_blocks(kind, random_blocks(kind, 2, 256), 256)
    size = sum(part.nbytes for part in (planar.codes, planar.scales, planar.minima) if part is not None)
    assert planar.kind == planar_kind(kind, 256) == planes and 8 * size / 512 == bits


@pytest.mark.parametrize("kind", [types.Q5_1, types.Q6_K, types.IQ4_NL], ids=lambda kind: kind.name)
def test_columns_that_fill_no_block_are_dropped(kind: BlockType) -> None:
    """A row of 96 columns, in blocks of 32 or of 256."""
    blocks_NB = random_blocks(kind, 3, 96)
    expected_NK = dequantise(blocks_NB, kind, 96)
    torch.testing.assert_close(dequantised(matrix_of(kind, blocks_NB, 96), 0), expected_NK, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", [types.Q3_K, types.Q6_K, types.Q5_1, types.Q2_K], ids=lambda kind: kind.name)
def test_kernels_compute_with_these_planes(kind: BlockType) -> None:
    """Of the types with groups of 16, minima, and codes beside zero."""
    pytest.importorskip("triton", reason="Triton has wheels for Linux only")
    from remoe_adapt.triton_kernels.experts import Tiling, experts_forward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    up, down = (matrix_of(kind, random_blocks(kind, rows, cols), cols) for rows, cols in ((128, 96), (96, 64)))
    x_TD, slots_TC = 0.01 * torch.randn(1, 96, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    args = (x_TD, slots_TC, slots_TC + 1.0, _to(up, device), _to(down, device), Activation())
    ours = experts_forward(*args, tilings=(Tiling(8, 4, 4, 2), Tiling(32, 32, 1, 1)))
    expected = experts_reference(*args)
    assert ours is not None and expected is not None
    assert float((ours - expected).norm() / expected.norm()) < 2e-5


def _to(matrix: SlotMatrix, device: str) -> SlotMatrix:
    parts = {name: getattr(matrix, name) for name in ("codes", "scales", "minima")}
    return SlotMatrix(
        kind=matrix.kind, **{name: None if part is None else part.to(device) for name, part in parts.items()}
    )


def test_what_has_no_planes() -> None:
    assert planar_kind(types.Q8_0, 48) is None and planar_kind(types.block_type("tq1_0"), 256) is None
    with pytest.raises(UncacheableError, match="have no planes"):
        planar_from_blocks(types.Q8_0, torch.zeros(1, 68, dtype=torch.uint8), 48)
    with pytest.raises(UncacheableError, match="damaged"):
        planar_from_blocks(types.Q8_0, torch.zeros(1, 35, dtype=torch.uint8), 32)
    with pytest.raises(UncacheableError, match="q4_0 blocks hold no codes of up to eight bits"):
        types.byte_groups(torch.zeros(1, 18, dtype=torch.uint8), types.Q4_0, 32)
