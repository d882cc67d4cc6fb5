"""The tiled kernels of experts against their definition: interpreted on a CPU, for real on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pool_cases import CODINGS, DEVICE, GPT_OSS, PLAIN, assert_near, choices, slot_matrices
from remoe_adapt.triton_kernels.experts_reference import experts_reference
from remoe_adapt.triton_kernels.slots import DONE, Activation
from torch import Tensor

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

from remoe_adapt.triton_kernels.experts import experts_forward
from remoe_adapt.triton_kernels.experts_many import blocks_of

# Triton's interpreter multiplies the bits of bf16 instead of its numbers.
HALF = torch.float16 if DEVICE == "cpu" else torch.bfloat16


def check(
    coding: dict[str, Any], tokens: int, chosen: int, inner: int, width: int, dtype: torch.dtype,
    activation: Activation = PLAIN, bias: bool = False, slots: int = 5,
) -> None:  # fmt: skip
    """Kernels against definition on random experts."""
    generator = torch.Generator().manual_seed(tokens + 10 * chosen + inner + width)
    pool = slot_matrices(generator, slots, {"up": (2 * inner, width), "down": (width, inner)}, bias=bias, **coding)
    x_TD = torch.randn(tokens, width, generator=generator).to(DEVICE, dtype)
    slots_TC, weights_TC = choices(generator, tokens, chosen, slots)
    args = (x_TD, slots_TC, weights_TC, pool["up"], pool["down"], activation)
    ours, expected = experts_forward(*args), experts_reference(*args)
    assert ours is not None and expected is not None
    # Numbers of a matrix have the type of the hidden states; the tensor cores of a GPU sum in an order of their own.
    assert_near(ours, expected, rtol=1e-4)


@pytest.mark.parametrize("name", list(CODINGS))
def test_every_coding(name: str) -> None:
    """Slots that several tokens chose, rows and columns that fill no tile."""
    group = CODINGS[name].get("group", 32)
    check(CODINGS[name], 9, 2, max(group, 96), 160 if group == 32 else 2 * group, torch.float32, slots=3)


@pytest.mark.parametrize("name", ["fp16", "int4"])
def test_hidden_states_of_two_bytes(name: str) -> None:
    check(CODINGS[name], 20, 2, 64, 64, HALF, slots=2)


def test_activations_and_biases() -> None:
    check(CODINGS["fp32"], 9, 1, 24, 16, torch.float32, GPT_OSS, bias=True, slots=2)


def test_blocks_hold_every_pair_once_and_no_two_slots() -> None:
    generator = torch.Generator().manual_seed(0)
    slots_TC, _ = choices(generator, 57, 3, 7, missing=0.2)
    slots_TC[:3, 0] = DONE
    blocks = blocks_of(slots_TC, 16, 7)
    chosen_P = slots_TC.flatten()
    seen: list[int] = []
    for first in blocks.firsts.tolist():
        if first < 0:
            continue
        slot = chosen_P[blocks.order[first]]
        pairs = [pair for pair in blocks.order[first : first + 16].tolist() if chosen_P[pair] == slot]
        assert slot >= 0
        seen += pairs
    assert sorted(seen) == (chosen_P >= 0).nonzero().flatten().tolist()


@pytest.mark.parametrize("slots", [[0], [-1] * 4, [3] * 40, list(range(40))])
def test_blocks_of_few_and_of_equal_slots(slots: list[int]) -> None:
    slots_TC = torch.tensor([slots], dtype=torch.int32, device=DEVICE)
    blocks = blocks_of(slots_TC, 16, 40)
    counts = [-(-slots.count(slot) // 16) for slot in set(slots) if slot >= 0]
    assert int((blocks.firsts >= 0).sum()) == sum(counts)


def test_hits_first_and_misses_later_have_the_same_bits() -> None:
    """However the choices are split, the sum is that of all at once, bit for bit."""
    generator = torch.Generator().manual_seed(3)
    pool = slot_matrices(generator, 4, {"up": (64, 32), "down": (32, 32)}, bias=True, **CODINGS["int4_asymmetric"])
    x_TD = torch.randn(9, 32, generator=generator).to(DEVICE)
    slots_TC, weights_TC = choices(generator, 9, 2, 4, missing=0.2)

    def forward(slots_TC: Tensor, **more: Any) -> Tensor | None:
        return experts_forward(x_TD, slots_TC, weights_TC, pool["up"], pool["down"], PLAIN, **more)

    expected_TD = forward(slots_TC)
    hit_TC = slots_TC % 2 == 0
    pairs_TCD = torch.full((9, 2, 32), torch.nan, device=DEVICE)
    assert forward(torch.where(hit_TC, slots_TC, -1), pairs_TCD=pairs_TCD, last=False) is None
    ours_TD = forward(torch.where(hit_TC, DONE, slots_TC), pairs_TCD=pairs_TCD)
    assert ours_TD is not None and torch.equal(ours_TD, expected_TD)


def test_no_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    pool = slot_matrices(generator, 2, {"up": (64, 32), "down": (32, 32)}, **CODINGS["int4"])
    nothing = torch.empty(0, 32, device=DEVICE), torch.empty(0, 2, dtype=torch.int32, device=DEVICE)
    ours = experts_forward(*nothing, nothing[1].float(), pool["up"], pool["down"], PLAIN)
    assert ours is not None and ours.shape == (0, 32)


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(CODINGS))
@pytest.mark.parametrize(("tokens", "chosen", "inner", "width"), [(9, 8, 768, 2048), (700, 6, 1408, 2048)])
def test_real_shapes_on_a_gpu(name: str, tokens: int, chosen: int, inner: int, width: int) -> None:
    if inner % CODINGS[name].get("group", 32) == width % CODINGS[name].get("group", 32) == 0:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            check(CODINGS[name], tokens, chosen, inner, width, dtype, bias=True, slots=40)
