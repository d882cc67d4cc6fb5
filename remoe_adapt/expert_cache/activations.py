"""What experts modules compute between their two products, found by trying it out."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from remoe_adapt.triton_kernels.experts_reference import activated
from remoe_adapt.triton_kernels.slots import FUNCTIONS, Activation


def activation_of(module: Any) -> Activation | None:
    """What an experts module computes between its products, if the kernels know it.

    It is tried out, since any class may have its own: with each function that the kernels know, and the limits and
    factors that the module has.
    """
    if not module.has_gate or getattr(module, "has_post_expert_norm", False):
        return None
    floats = {name: value for name, value in vars(module).items() if type(value) in (int, float)}
    limits = [None, *(float(value) for name, value in floats.items() if "limit" in name)]
    alphas = [1.0, *(float(value) for name, value in floats.items() if "alpha" in name)]
    generator = torch.Generator().manual_seed(0)
    # Wide, so that what is cut off shows.
    both = torch.randn(8, 64, generator=generator, device="cpu") * 8.0
    try:
        with torch.no_grad():
            expected = module._apply_gate(both)
    except (RuntimeError, AttributeError, TypeError):  # it computes with more than the rows
        return None
    for interleaved, function, limit, alpha, shift in itertools.product(
        (False, True), FUNCTIONS, limits, alphas, (0.0, 1.0)
    ):
        tried = Activation(function=function, alpha=alpha, limit=limit, shift=shift, interleaved=interleaved)
        if torch.allclose(activated(both, tried), expected, rtol=1e-4, atol=1e-4):
            return tried
    return None
