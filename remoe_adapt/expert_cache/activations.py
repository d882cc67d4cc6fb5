"""What experts modules compute between their two products, found by trying it out."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import nn

from remoe_adapt.triton_kernels.experts_reference import activated
from remoe_adapt.triton_kernels.slots import FUNCTIONS, Activation

# What torch and we keep in every module; the rest is what it computes with.
_OF_ALL = {*vars(nn.Module()), "cached_experts", "_is_hf_initialized"}


class Activations:
    """Of the experts modules of one model: layers are alike, so those that compute with the same are tried once."""

    def __init__(self) -> None:
        self._known: list[tuple[nn.Module, Activation | None]] = []

    def of(self, module: nn.Module) -> Activation | None:
        """As `activation_of`."""
        for other, known in self._known:
            if _are_alike(module, other):
                return known
        found = activation_of(module)
        self._known.append((module, found))
        return found


def _are_alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether both compute the same beside their own parameters, as far as can be told; those below them count."""
    mine, theirs = ({name: v for name, v in vars(each).items() if name not in _OF_ALL} for each in (one, other))
    if type(one) is not type(other) or mine.keys() != theirs.keys():
        return False
    same = all(
        value is theirs[name] or (isinstance(value, bool | int | float | str) and value == theirs[name])
        for name, value in mine.items()
    )
    children, others = dict(one.named_children()), dict(other.named_children())
    return (
        same
        and children.keys() == others.keys()
        and all(_has_no_tensors(child) and _are_alike(child, others[name]) for name, child in children.items())
    )


def _has_no_tensors(module: nn.Module) -> bool:
    return next(itertools.chain(module.parameters(), module.buffers()), None) is None


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
