"""Pools of slots with random experts in every coding, and how near kernels are to their definition."""

from __future__ import annotations

from typing import Any

import torch
from remoe_adapt.triton_kernels.slots import FLOAT, FP8, INT4, INT8, MXFP4, Activation, SlotMatrix
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PLAIN = Activation()
GPT_OSS = Activation(alpha=1.702, limit=7.0, shift=1.0, interleaved=True)
# What the pools of tests hold: a coding and what comes with it.
CODINGS: dict[str, dict[str, Any]] = {
    "bf16": {"kind": FLOAT},
    "fp16": {"kind": FLOAT, "dtype": torch.float16},
    "fp32": {"kind": FLOAT, "dtype": torch.float32},
    "int4": {"kind": INT4},
    "int4_asymmetric": {"kind": INT4, "minima": True},
    "int4_g128_bf16": {"kind": INT4, "group": 128, "scale_dtype": torch.bfloat16},
    "mxfp4": {"kind": MXFP4},
    "int8": {"kind": INT8},
    "int8_minima": {"kind": INT8, "minima": True, "scale_dtype": torch.float32},
    "int8_g16": {"kind": INT8, "group": 16},
    "fp8": {"kind": FP8},
}


def slot_matrices(
    generator: torch.Generator, slots: int, shapes: dict[str, tuple[int, int]], *, kind: str, group: int = 32,
    dtype: torch.dtype = torch.bfloat16, scale_dtype: torch.dtype = torch.float16, minima: bool = False,
    bias: bool = False,
) -> dict[str, SlotMatrix]:  # fmt: skip
    """Matrices of these names and shapes [N, K] in one allocation, the parts of a slot beside one another.

    The dequantised numbers are about as large as a model's, 1 / sqrt(K).
    """
    drawn: dict[str, dict[str, Tensor]] = {}
    for name, (rows, cols) in shapes.items():
        halves = kind == FP8 and name == "up"
        drawn[name] = _drawn(generator, slots, rows, cols, kind, group, dtype, scale_dtype, minima, halves)
        if bias:
            drawn[name]["bias"] = torch.randn(slots, rows, generator=generator).to(dtype)
    parts = [(name, part, tensor) for name, tensors in drawn.items() for part, tensor in tensors.items()]
    # Each part begins at a multiple of 64 bytes, and so does each slot.
    sizes = [-(-tensor[0].nbytes // 64) * 64 for _, _, tensor in parts]
    pool = torch.zeros(slots, sum(sizes), dtype=torch.uint8)
    for (_, _, tensor), end in zip(parts, torch.tensor(sizes).cumsum(0).tolist(), strict=True):
        size = tensor[0].nbytes
        first = end - -(-size // 64) * 64
        pool[:, first : first + size] = tensor.flatten(1).view(torch.uint8)
    pool = pool.to(DEVICE)
    first = 0
    for (name, part, tensor), size in zip(parts, sizes, strict=True):
        view = pool[:, first : first + tensor[0].nbytes].view(tensor.dtype)
        drawn[name][part] = view.unflatten(1, tensor.shape[1:])
        first += size
    return {
        name: SlotMatrix(kind=kind, halves=kind == FP8 and name == "up", **tensors) for name, tensors in drawn.items()
    }


def _drawn(
    generator: torch.Generator, slots: int, rows: int, cols: int, kind: str, group: int, dtype: torch.dtype,
    scale_dtype: torch.dtype, minima: bool, halves: bool,
) -> dict[str, Tensor]:  # fmt: skip
    size = cols**-0.5
    if kind == FLOAT:
        return {"codes": (torch.randn(slots, rows, cols, generator=generator) * size).to(dtype)}
    if kind == FP8:
        blocks = 2 * -(-(rows // 2) // 128) if halves else -(-rows // 128)
        scales = (torch.rand(slots, blocks, -(-cols // 128), generator=generator) + 0.5) * size
        codes = torch.randn(slots, rows, cols, generator=generator)
        # The smallest numbers of the format are among them.
        codes[:, :, ::5] *= 2.0**-8
        return {"codes": codes.to(torch.float8_e4m3fn), "scales": scales}
    if kind == MXFP4:
        codes = torch.randint(0, 256, (slots, rows, cols // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(118, 124, (slots, rows, cols // 32), generator=generator, dtype=torch.uint8)
        return {"codes": codes, "scales": scales}
    if kind == INT4:
        codes = torch.randint(0, 256, (slots, rows, cols // 2), generator=generator, dtype=torch.uint8)
    else:
        codes = torch.randint(-128, 128, (slots, rows, cols), generator=generator, dtype=torch.int8)
    step = size / (4.6 if kind == INT4 else 74.0)
    scales = torch.randn(slots, rows, cols // min(group, cols), generator=generator) * step
    found = {"codes": codes, "scales": scales.to(scale_dtype)}
    if minima:
        lowest = torch.randn(scales.shape, generator=generator) * size
        found["minima"] = lowest.to(scale_dtype)
    return found


def choices(
    generator: torch.Generator, tokens: int, chosen: int, slots: int, missing: float = 0.1
) -> tuple[Tensor, Tensor]:
    """Slots of each token's choices, no slot twice, some without one, and what they count."""
    slots_TC = torch.stack([torch.randperm(slots, generator=generator)[:chosen] for _ in range(tokens)]).int()
    slots_TC[torch.rand(tokens, chosen, generator=generator) < missing] = -1
    weights_TC = torch.rand(tokens, chosen, generator=generator)
    return slots_TC.to(DEVICE), (weights_TC / weights_TC.sum(1, keepdim=True)).to(DEVICE)


def assert_near(ours: Tensor, expected: Tensor, rtol: float = 2e-5) -> None:
    """Equal but for rounding: the error in norm, of each row that is not 0."""
    assert ours.shape == expected.shape and ours.dtype == expected.dtype
    if ours.dtype != torch.float32:
        # One rounding to the dtype between the products, and one at the end.
        rtol = 8 * torch.finfo(ours.dtype).eps
    ours, expected = ours.double(), expected.double()
    assert bool(torch.isfinite(ours).all())
    error_T = (ours - expected).norm(dim=-1)
    assert bool((error_T <= rtol * expected.norm(dim=-1) + 1e-12).all()), error_T / expected.norm(dim=-1)
