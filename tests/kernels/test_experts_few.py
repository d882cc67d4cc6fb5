"""The gather-GEMV kernels of experts against their definition: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool_cases import CODINGS, DEVICE, GPT_OSS, PLAIN, assert_near, choices, slot_matrices
from remoe_adapt.triton_kernels.experts_reference import experts_reference
from remoe_adapt.triton_kernels.slots import DONE, Activation
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from remoe_adapt.triton_kernels.experts import Tiling, experts_forward

# Few programs with large tiles: an interpreted instruction takes as long for one number as for a thousand.
WIDE = (Tiling(lanes=8, rows=4, warps=4, chunks=2), Tiling(lanes=8, rows=32, warps=1, chunks=2))


def check(
    coding: dict[str, Any], tokens: int, chosen: int, inner: int, width: int, dtype: torch.dtype,
    activation: Activation = PLAIN, tilings: Any = WIDE, bias: bool = False, slots: int = 5,
) -> None:  # fmt: skip
    """Kernels against definition on random experts."""
    generator = torch.Generator().manual_seed(tokens + 10 * chosen + inner + width)
    shapes = {"up": (2 * inner, width), "down": (width, inner)}
    pool = slot_matrices(generator, slots, shapes, bias=bias, **coding)
    x_TD = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    slots_TC, weights_TC = choices(generator, tokens, chosen, slots)
    args = (x_TD, slots_TC, weights_TC, pool["up"], pool["down"], activation)
    ours, expected = experts_forward(*args, tilings=tilings), experts_reference(*args)
    assert ours is not None and expected is not None
    assert_near(ours, expected)


@pytest.mark.parametrize("name", list(CODINGS))
def test_every_coding(name: str) -> None:
    """Three choices of which the threads compute four at a time, rows and columns that fill no tile."""
    group = CODINGS[name].get("group", 32)
    check(CODINGS[name], 1, 3, max(group, 96), 160 if group == 32 else 2 * group, torch.float32)


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("int4", torch.bfloat16), ("fp16", torch.half)])
def test_hidden_states_of_two_bytes(name: str, dtype: torch.dtype) -> None:
    check(CODINGS[name], 1, 2, 64, 64, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CODINGS))
@pytest.mark.parametrize("shape", [(1, 8, 768, 2048), (8, 6, 1408, 2048), (3, 4, 288, 96)])
def test_real_shapes_on_a_gpu(name: str, shape: tuple[int, int, int, int]) -> None:
    """The table's tilings on what they are for."""
    tokens, chosen, inner, width = shape
    if inner % CODINGS[name].get("group", 32) == width % CODINGS[name].get("group", 32) == 0:
        for dtype in (torch.bfloat16, torch.float32):
            check(CODINGS[name], tokens, chosen, inner, width, dtype, tilings=None, bias=True, slots=24)


@pytest.mark.parametrize("name", ["bf16", "int4", "int8"])
def test_the_tilings_of_the_table(name: str) -> None:
    check(CODINGS[name], 1, 2, 64, 32, torch.bfloat16, tilings=None)


def test_rounds_that_do_not_fill_the_loop() -> None:
    """Three rounds over the columns, two or four of which are one of the loop."""
    check(CODINGS["mxfp4"], 1, 2, 192, 384, torch.bfloat16, tilings=(Tiling(4, 4, 2, 4, 2), Tiling(8, 64, 1, 1, 4)))


@pytest.mark.parametrize(
    "activation",
    [GPT_OSS, Activation(function="gelu"), Activation(function="gelu_tanh", limit=1.0), Activation(function="relu")],
)
def test_activations_and_biases(activation: Activation) -> None:
    check(CODINGS["fp32"], 1, 2, 24, 16, torch.float32, activation, bias=True)


def test_several_tokens() -> None:
    check(CODINGS["int4"], 3, 2, 64, 64, torch.bfloat16, tilings=(WIDE[0], Tiling(8, 64, 1, 2)))


@pytest.mark.parametrize("columns", [(12, 20), (7, 9)])
def test_floats_of_any_width(columns: tuple[int, int]) -> None:
    check(CODINGS["fp32"], 1, 2, *columns, torch.float32)


@pytest.mark.parametrize("name", ["fp32", "int4_asymmetric"])
def test_hits_first_and_misses_later_have_the_same_bits(name: str) -> None:
    """However the choices are split, the sum is that of all at once, bit for bit."""
    generator = torch.Generator().manual_seed(3)
    pool = slot_matrices(generator, 4, {"up": (64, 32), "down": (32, 32)}, bias=True, **CODINGS[name])
    x_TD = torch.randn(1, 32, generator=generator).to(DEVICE)
    slots_TC, weights_TC = choices(generator, 1, 4, 4, missing=0.0)
    slots_TC[0, 2] = -1

    def forward(slots_TC: Tensor, **more: Any) -> Tensor | None:
        return experts_forward(x_TD, slots_TC, weights_TC, pool["up"], pool["down"], PLAIN, tilings=WIDE, **more)

    expected_TD = forward(slots_TC)
    for hits in ([True, False, True, False], [True] * 4):
        hit_TC = torch.tensor([hits], device=DEVICE)
        pairs_TCD = torch.full((1, 4, 32), torch.nan, device=DEVICE)
        assert forward(torch.where(hit_TC, slots_TC, -1), pairs_TCD=pairs_TCD, last=False) is None
        later_TC = torch.where(hit_TC & (slots_TC >= 0), DONE, slots_TC)
        ours_TD = forward(later_TC, pairs_TCD=pairs_TCD)
        assert ours_TD is not None and torch.equal(ours_TD, expected_TD)
        reference_TCD = torch.zeros_like(pairs_TCD)
        args = (x_TD, torch.where(hit_TC, slots_TC, -1), weights_TC, pool["up"], pool["down"], PLAIN)
        experts_reference(*args, reference_TCD, last=False)
        assert_near(pairs_TCD[hit_TC & (slots_TC >= 0)], reference_TCD[hit_TC & (slots_TC >= 0)])
