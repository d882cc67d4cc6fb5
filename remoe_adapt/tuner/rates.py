"""Learning rates in units of a router's own scale: one number fits models of any width and initialisation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from remoe_adapt.errors import ConfigError
from remoe_adapt.tuner.layer import RemoeLayer

# The learning rate of `remoe train`, in units of a router's own scale.
WORKING_RATE = 0.3


def router_rates(layers: Iterable[RemoeLayer]) -> list[tuple[nn.Parameter, float]]:
    """(parameter, rate per unit of learning rate) of every trainable delta parameter.

    A router's input x has norm sqrt(D), so its logits W x spread by rms(W) sqrt(D). The first step of Adam at rate a
    moves every entry of a parameter by a, so the logits by a D at most: a = rms(W) / sqrt(D) makes that one spread.
    A low-rank delta B A moves alike: A, of rms 1 / sqrt(D), has the rate 1 / D; B, whose input A x has r entries of
    rms 1, has rms(W) sqrt(D) / r.
    """
    rates: list[tuple[nn.Parameter, float]] = []
    for layer in layers:
        weight_ED = layer.original_weight_ED.detach().float()
        # Of the original weight: a merged or live one would change the rate with the strength.
        rms, columns = float(weight_ED.square().mean().sqrt()), weight_ED.shape[1]
        for name, parameter in layer.named_parameters():
            if not parameter.requires_grad:
                continue
            if name.startswith("remoe_delta."):
                rates.append((parameter, rms / math.sqrt(columns)))
            elif name.startswith("remoe_A."):
                rates.append((parameter, 1.0 / columns))
            elif name.startswith("remoe_B."):
                rates.append((parameter, rms * math.sqrt(columns) / parameter.shape[1]))
    return rates


def relative_rates(model: nn.Module, layers: Iterable[RemoeLayer]) -> list[tuple[nn.Parameter, float]]:
    """`router_rates`, for a model that trains nothing else.

    Raises ConfigError when other parameters of `model` are trainable: such a rate means nothing for them.
    """
    rates = router_rates(layers)
    ours = {id(parameter) for parameter, _ in rates}
    others = [n for n, p in model.named_parameters() if p.requires_grad and id(p) not in ours]
    if others:
        raise ConfigError(
            f"{len(others)} other parameters are trainable too, first {others[0]}, and a learning rate relative to a "
            "router means nothing for them: freeze them, or use router_relative_lr=False"
        )
    return rates


def slowest_reach(layers: Iterable[RemoeLayer], groups: Sequence[dict[str, Any]], steps: int) -> float | None:
    """How far `steps` steps of Adam at the rates of an optimizer's groups can move a router's logits, as a share of
    their spread, for the router that moves least. None when these groups train no router."""
    # A scheduler with warm-up has set the present rate to nearly 0 when training begins.
    found = {id(p): float(group.get("initial_lr", group["lr"])) for group in groups for p in group["params"]}
    reach = [steps * found[id(p)] / rate for p, rate in router_rates(layers) if id(p) in found and rate]
    return min(reach, default=None)
