"""From a router's call inside a model to its terms of the objective, and from adapters to the weights of the terms."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt.errors import ConfigError
from remoe_adapt.gating import RouterForward
from remoe_adapt.objective import IGNORED_LABEL, LossWeights, RouterTerms, router_terms
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer

# (the wrapped router, its arguments, its keywords, what it returned) of one call in a forward.
RouterCall = tuple[RemoeLayer, tuple[Any, ...], dict[str, Any], Any]

# Attribute of a base model that holds its AttachedObjective (attached.py).
ATTACHED = "_remoe_objective"


def terms_of_call(
    call: RouterCall, result: Any, name: str, documents_BT: Tensor, weights: LossWeights, alpha: float
) -> RouterTerms:
    """Terms of one call: the distribution from `result`, the chosen experts from what the model went on with.

    Raises ConfigError when the router, called `name`, saw other tokens than the batch has or has no gradient.
    """
    layer, args, kwargs, output = call
    logits_TE, ids_TK = layer.spec.read(result).logits_TE, layer.spec.read(output).ids_TK
    rows, home = documents_BT.shape, documents_BT.device
    # An encoder's router sees other tokens than the labels have: pairs of neighbours would be formed of strangers.
    if len(logits_TE) != documents_BT.numel():
        raise ConfigError(
            f"router {name} saw {len(logits_TE)} tokens of a batch of {rows[0]} x {rows[1]}: it does not route "
            "the text itself, so leave it out with exclude_modules"
        )
    if torch.is_grad_enabled() and not logits_TE.requires_grad:
        raise ConfigError(
            "no gradient reaches the routers: re-entrant gradient checkpointing loses it, so pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
    log_probs_BTE = _log_probabilities(layer, logits_TE).view(*rows, -1)
    # The base's own distribution on the same input, which L_Trust holds the adapter to.
    with torch.no_grad(), without_jitter(layer):
        # Under a recency prior only the choice would differ, which is not asked for here and takes a scan.
        gated = vars(layer.base_layer).get("forward")
        run = gated.plain if isinstance(gated, RouterForward) else layer.base_layer
        reference = layer.spec.read(run(*args, **kwargs))
        reference_BTE = _log_probabilities(layer, reference.logits_TE).view(*rows, -1)
    documents_BT = documents_BT.to(logits_TE.device)  # the layers of a large model may be on several devices
    terms = router_terms(log_probs_BTE, ids_TK.view(*rows, -1), reference_BTE, documents_BT, weights, alpha)
    return RouterTerms(terms.loss.to(home), terms.kl.to(home), terms.eor.to(home))


@contextmanager
def without_jitter(layer: RemoeLayer) -> Iterator[None]:
    """The router in eval mode: no noise on its input, and none written a second time into what it shares."""
    modes = [(module, module.training) for module in layer.base_layer.modules()]
    layer.base_layer.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _log_probabilities(layer: RemoeLayer, logits_TE: Tensor) -> Tensor:
    if layer.spec.score == "softmax":
        return logits_TE.to(torch.promote_types(logits_TE.dtype, torch.float32)).log_softmax(dim=-1)
    # A sigmoid may be 0, and its logarithm would end every gradient in NaN.
    return layer.spec.probabilities(logits_TE).clamp_min(torch.finfo(torch.float32).tiny).log()


def row_shares(labels_BT: Tensor, num_items: Tensor | int | None) -> tuple[Tensor, Tensor | int]:
    """Each row's share [B] of the optimizer step's label tokens, and their number."""
    # Without the first label of a row, which no token predicts.
    count_B = (labels_BT[:, 1:] != IGNORED_LABEL).sum(dim=1)
    items = count_B.sum().clamp_min(1) if num_items is None else num_items
    return count_B / items, items


def weights_of(configs: Mapping[str, RemoeConfig]) -> LossWeights:
    """The weights that these adapters, active at the same time, have in common.

    Raises ConfigError when they differ, or there is none.
    """
    found = {
        LossWeights(
            reuse=config.reuse_weight,
            smooth=config.smooth_weight,
            lag=config.lag_weight,
            window=config.ws_weight,
            kl=config.kl_weight,
            distill_share=config.distill_share,
        )
        for config in configs.values()
    }
    if len(found) == 1:
        return found.pop()
    if found:
        raise ConfigError(f"adapters {sorted(configs)} are active with different loss weights: set_adapter one of them")
    raise ConfigError(
        "no active REMOE adapter in this model: call get_peft_model(base, RemoeConfig(reuse_weight=...)) first"
    )


def active_configs(model: nn.Module, layers: Iterable[RemoeLayer]) -> dict[str, RemoeConfig]:
    """Configurations of the adapters that are active in these layers, wherever in the model they are kept."""
    # Asked of the layers: another tuner's unload takes configurations off the base.
    active = {name for layer in layers for name in layer.active_adapters if name in layer.adapters}
    holders = [getattr(module, "peft_config", None) for module in model.modules()]
    return {
        name: config
        for held in holders
        if isinstance(held, dict)
        for name, config in held.items()
        if name in active and isinstance(config, RemoeConfig)
    }
