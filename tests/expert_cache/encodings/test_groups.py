"""Groups of integers are the numbers that they say, also as ggml blocks, which gguf-py reads alike."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.encodings.blocks import Q4_0, Q4_1, Q8_0, BlockType, dequantise
from remoe_adapt.expert_cache.encodings.groups import Groups, q8_0_of

gguf = pytest.importorskip("gguf")


def numbers(blocks_NB: Tensor, kind: BlockType, cols: int) -> Tensor:
    """What gguf-py reads, and this package the same."""
    read = torch.from_numpy(gguf.quants.dequantize(blocks_NB.numpy(), gguf.GGMLQuantizationType(kind.number)))
    assert torch.equal(dequantise(blocks_NB, kind, cols), read[:, :cols])
    return read[:, :cols]


def codes(*shape: int, bits: int = 4, signed: bool = False, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.int16)
    return (drawn - (1 << (bits - 1))).to(torch.int8) if signed else drawn.to(torch.uint8)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(1)) * 0.01 + 1e-3).to(dtype).float()


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize(("cols", "groups"), [(64, 2), (256, 2), (96, 1), (48, 1)])
def test_symmetric_codes_are_q4_0_to_the_last_bit(bits: int, cols: int, groups: int) -> None:
    given = Groups(codes(5, cols, bits=bits, signed=True), scales(5, groups), None, bits)
    kind, blocks_NB = given.to_blocks()
    assert kind == Q4_0 == given.block_type() and blocks_NB.shape == (5, kind.row_bytes(cols))
    assert torch.equal(numbers(blocks_NB, kind, cols), given.dequantise())


@pytest.mark.parametrize("signed", [False, True])
def test_codes_with_minima_are_q4_1_up_to_the_rounding_of_the_minima(signed: bool) -> None:
    minima = -scales(5, 4) * torch.randint(0, 16, (5, 4), generator=torch.Generator().manual_seed(2))
    given = Groups(codes(5, 128, signed=signed), scales(5, 4), minima, 4)
    kind, blocks_NB = given.to_blocks()
    assert kind == Q4_1
    wanted = given.dequantise()
    # Half a unit in the last place of fp16, of the largest minimum.
    bar = 2.0**-11 * (minima.abs().max() + 8 * scales(5, 4).max())
    assert (numbers(blocks_NB, kind, 128) - wanted).abs().max() <= bar
    assert (numbers(blocks_NB, kind, 128) - wanted).norm() < 1e-3 * wanted.norm()


def test_unsigned_codes_without_minima_are_q4_1() -> None:
    given = Groups(codes(3, 64), scales(3, 2), None, 4)
    kind, blocks_NB = given.to_blocks()
    assert kind == Q4_1 and torch.equal(numbers(blocks_NB, kind, 64), given.dequantise())


@pytest.mark.parametrize(("cols", "groups"), [(64, 2), (256, 2), (48, 1)])
def test_symmetric_codes_of_8_bits_are_q8_0_to_the_last_bit(cols: int, groups: int) -> None:
    given = Groups(codes(5, cols, bits=8, signed=True), scales(5, groups), None, 8)
    assert int(given.codes_NK.min()) == -128
    kind, blocks_NB = given.to_blocks()
    assert kind == Q8_0 and torch.equal(numbers(blocks_NB, kind, cols), given.dequantise())


@pytest.mark.parametrize(
    "given",
    [
        Groups(codes(5, 64, bits=8), scales(5, 2), -128 * scales(5, 2), 8),
        # Groups of 16: two of them in a block.
        Groups(codes(5, 64), scales(5, 4), -8 * scales(5, 4), 4),
        Groups(codes(5, 64, signed=True), scales(5, 4), None, 4),
    ],
    ids=["8 bits with minima", "groups of 16", "symmetric groups of 16"],
)
def test_what_fits_no_blocks_is_quantised_anew(given: Groups) -> None:
    kind, blocks_NB = given.to_blocks()
    wanted = given.dequantise()
    assert kind == Q8_0 == given.block_type()
    assert (numbers(blocks_NB, kind, 64) - wanted).norm() < 6e-3 * wanted.norm()


def test_q8_0_of_numbers() -> None:
    values = torch.randn(7, 96, generator=torch.Generator().manual_seed(3))
    values[2] = 0
    values[3, :32] = 1e-9
    found = numbers(q8_0_of(values), Q8_0, 96)
    assert (found - values).norm() < 6e-3 * values.norm() and bool((found[2] == 0).all())
    # Each number is off by half a unit of its block, and by the rounding of the unit.
    unit = values.view(7, 3, 32).abs().amax(-1, keepdim=True) / 127
    assert bool(((found - values).view(7, 3, 32).abs() <= unit * 0.57 + 1e-8).all())


def test_columns_in_another_order() -> None:
    order = torch.randperm(64, generator=torch.Generator().manual_seed(4))
    given = Groups(codes(5, 64, signed=True), scales(5, 2), None, 4, order)
    plain = Groups(given.codes_NK, given.scales_NG, None, 4).dequantise()
    assert torch.equal(given.dequantise()[:, order], plain)
    _, blocks_NB = given.to_blocks()
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(x @ given.dequantise().T, x[:, order] @ numbers(blocks_NB, Q4_0, 64).T)


def test_a_type_may_be_asked_for() -> None:
    given = Groups(codes(5, 64, signed=True), scales(5, 2), None, 4)
    for kind in (Q4_0, Q4_1, Q8_0):
        made, blocks_NB = given.to_blocks(kind)
        wanted = given.dequantise()
        assert made == kind and (numbers(blocks_NB, kind, 64) - wanted).norm() < 6e-3 * wanted.norm()
    asymmetric = Groups(codes(5, 64), scales(5, 2), -scales(5, 2), 4)
    for wrong, kind in ((asymmetric, Q4_0), (Groups(codes(5, 64, bits=8), scales(5, 2), None, 8), Q4_1)):
        with pytest.raises(ExpertReadError, match=f"do not fit {kind.name}: use q"):
            wrong.to_blocks(kind)


def test_kinds_and_sizes_are_told_on_the_meta_device() -> None:
    for given in (
        Groups(codes(5, 64, signed=True), scales(5, 2), None, 4),
        Groups(codes(5, 64), scales(5, 2), -scales(5, 2), 4),
        Groups(codes(5, 48, bits=8, signed=True), scales(5, 1), None, 8),
        Groups(codes(5, 64, bits=8), scales(5, 2), -scales(5, 2), 8),
    ):
        minima = None if given.minima_NG is None else given.minima_NG.to("meta")
        meta = Groups(given.codes_NK.to("meta"), given.scales_NG.to("meta"), minima, given.bits)
        kind, blocks_NB = given.to_blocks()
        found, told = meta.to_blocks()
        assert found == kind and told.shape == blocks_NB.shape and told.dtype == torch.uint8


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e6])
def test_scales_that_ggml_cannot_hold_are_refused(number: float) -> None:
    given: Any = Groups(codes(5, 64, signed=True), torch.full((5, 2), number), None, 4)
    with pytest.raises(ExpertReadError, match="beyond fp16"):
        given.to_blocks()
