"""A new adapter as a weighted sum of others: exact, for full and low-rank deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from peft.utils import ModulesToSaveWrapper

from remoe_adapt.errors import AdapterConflictError, AdapterError, ConfigError
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers

if TYPE_CHECKING:
    from remoe_adapt.tuner.model import RemoeModel

COMBINATIONS = ("linear", "cat")


def add_weighted_adapter(
    tuner: RemoeModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    """See `RemoeModel.add_weighted_adapter`."""
    _check(tuner, adapters, weights, adapter_name, combination_type)
    layers = remoe_layers(tuner.model)
    configs = [_config_of(tuner, name) for name in adapters]
    ranks = [config.rank for config in configs]
    low_rank = all(rank is not None for rank in ranks)
    if combination_type == "cat" and not low_rank:
        full = [name for name, rank in zip(adapters, ranks, strict=True) if rank is None]
        raise ConfigError(f"combination_type='cat' joins low-rank adapters, but {full} are full deltas: use 'linear'.")
    saved = _copies(tuner, adapters)
    tuner.peft_config[adapter_name] = replace(
        configs[0],
        target_modules=[name for name, layer in layers.items() if layer.adapters.intersection(adapters)],
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        modules_to_save=sorted({key for names in saved.values() for key in names}) or None,
        rank=sum(rank or 0 for rank in ranks) if low_rank else None,
        init_weights=True,
        # The sum belongs to this model, which checked each part already.
        base_fingerprint=None,
    )
    tuner.inject_adapter(tuner.model, adapter_name)
    with torch.no_grad():
        for layer in layers.values():
            present = [(name, weight) for name, weight in zip(adapters, weights, strict=True) if layer._has(name)]
            if present:
                (_concatenate if low_rank else _sum)(layer, present, adapter_name)
    for module in tuner.model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module._adapters:
            # Exactly one of them has a copy of it: `_copies` has refused two.
            source = next(name for name in adapters if name in module._adapters)
            module.modules_to_save[adapter_name].load_state_dict(module.modules_to_save[source].state_dict())
    # A sum that trained along with its parts would be their sum no more.
    tuner.set_requires_grad(adapter_name, False)


def _config_of(tuner: RemoeModel, adapter_name: str) -> RemoeConfig:
    """The configuration of a REMOE adapter of this model."""
    config = tuner.peft_config[adapter_name]
    assert isinstance(config, RemoeConfig)
    return config


def _sum(layer: RemoeLayer, present: list[tuple[str, float]], adapter_name: str) -> None:
    total_ED = torch.zeros_like(layer.delta_ED(present[0][0]))
    for name, weight in present:
        total_ED += weight * layer.delta_ED(name)
    layer.remoe_delta[adapter_name].copy_(total_ED)


def _concatenate(layer: RemoeLayer, present: list[tuple[str, float]], adapter_name: str) -> None:
    # sum of w_i B_i A_i = [w_1 B_1, w_2 B_2, ...] [A_1; A_2; ...]; rows of adapters absent here stay zero.
    a_RD, b_ER = layer.remoe_A[adapter_name].zero_(), layer.remoe_B[adapter_name].zero_()
    start = 0
    for name, weight in present:
        end = start + layer.remoe_A[name].shape[0]
        a_RD[start:end] = layer.remoe_A[name]
        b_ER[:, start:end] = weight * layer.remoe_B[name]
        start = end


def _check(
    tuner: RemoeModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, combination_type: str
) -> None:
    if isinstance(adapters, str) or not adapters:
        raise ConfigError(f"adapters={adapters!r}: give a list of at least one adapter name.")
    known = tuner.remoe_adapters
    if unknown := [name for name in adapters if name not in known]:
        raise AdapterError(f"no REMOE adapter named {unknown} to combine; this model has {sorted(known)}.")
    if len(weights) != len(adapters):
        raise ConfigError(f"{len(weights)} weights for {len(adapters)} adapters: give one weight per adapter.")
    for weight in weights:
        if not isinstance(weight, (int, float)) or not math.isfinite(weight):
            raise ConfigError(f"weights={list(weights)!r}: every weight must be a finite number.")
    if combination_type not in COMBINATIONS:
        raise ConfigError(f"combination_type={combination_type!r} is unknown: use one of {', '.join(COMBINATIONS)}.")
    if adapter_name in tuner.peft_config:
        raise AdapterConflictError(f"an adapter named {adapter_name!r} exists: delete it, or choose another name.")


def _copies(tuner: RemoeModel, adapters: Sequence[str]) -> dict[str, list[str]]:
    """modules_to_save of each adapter; copies of one module cannot be added up."""
    saved = {name: list(_config_of(tuner, name).modules_to_save or []) for name in adapters}
    for path, module in tuner.model.named_modules():
        if isinstance(module, ModulesToSaveWrapper) and len(both := module._adapters.intersection(adapters)) > 1:
            raise AdapterError(
                f"Cannot add weighted adapters if they target the same module with modules_to_save, but {path} is "
                f"saved by {sorted(both)}."
            )
    return saved
