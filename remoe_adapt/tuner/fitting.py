"""Whether an adapter's tensors, in a file or in memory, are what one model needs: checked before any is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from remoe_adapt._support import printable
from remoe_adapt.errors import AdapterCorruptError, ConfigError
from remoe_adapt.routers import PEFT_PREFIX
from remoe_adapt.tuner.checks import (
    by_router,
    check_finite,
    check_router,
    check_shapes,
    check_types,
    plain_key,
    stays_usable,
)
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer
from remoe_adapt.tuner.stored import StoredAdapter


def check_rank(rank: int | None, targets: Mapping[str, Tensor]) -> None:
    """Raises ConfigError for a rank of new tensors that takes far more memory than full deltas [E, D] would."""
    for name, weight_ED in targets.items():
        if rank is not None and rank > max(weight_ED.shape):
            raise ConfigError(
                f"rank={rank}: router {name} is {list(weight_ED.shape)}, so a full delta (rank=None) is smaller; a low "
                f"rank lies below {min(weight_ED.shape)}."
            )


def check_stored(adapter: StoredAdapter, config: RemoeConfig, model: nn.Module, targets: Mapping[str, Tensor]) -> None:
    """The file holds what the routers and `modules_to_save` of `model` need, and nothing else.

    targets: original weights [E, D] of the routers, by name. The file's header is compared first, then it is read a
    router at a time. Raises AdapterCorruptError.
    """
    where = str(adapter.path)
    copies = _copied_modules(config, model)
    expected = {**_deltas(config.rank, targets), **copies}
    check_shapes({key: stored.shape for key, stored in adapter.tensors.items()}, _shapes(expected), where)
    check_types({key: stored.dtype for key, stored in adapter.tensors.items()}, _types(expected), where)
    with adapter.values() as values:
        for router, kinds in by_router(adapter.tensors).items():
            check_router(router, targets[router], {k: values[f"{router}.{k}"] for k in kinds}, where)
        for key, parameter in copies.items():
            check_finite(key, values[key].to(parameter.dtype), where)


def check_given(
    tensors: Mapping[str, Tensor], config: RemoeConfig, model: nn.Module, targets: Mapping[str, Tensor]
) -> None:
    """The same of a state dict that takes the place of a file. Raises AdapterCorruptError."""
    where = "the state dict"
    plain = {plain_key(key): value for key, value in tensors.items()}
    if len(plain) != len(tensors):
        raise AdapterCorruptError(f"{where} holds a tensor twice, with and without 'base_model.model.'.")
    copies = _copied_modules(config, model)
    _check(plain, {**_deltas(config.rank, targets), **copies}, where)
    for router, kinds in by_router(plain).items():
        check_router(router, targets[router], {k: plain[f"{router}.{k}"] for k in kinds}, where)
    for key, parameter in copies.items():
        check_finite(key, plain[key].to(parameter.dtype), where)


@torch.no_grad()
def copy_modules(
    model: nn.Module, adapter_name: str, given: Mapping[str, Tensor] | None, stored: StoredAdapter | None
) -> None:
    """Write the `modules_to_save` of a checked state dict, or else of a checked file, into a model that has the adapter
    without PEFT's prefix."""
    targets = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = module.state_dict()
            for source, path in module.adapter_state_dict_load_map(adapter_name).items():
                targets[f"{name}.{source}"] = held[path]
    if given is not None:
        plain = {plain_key(key): value for key, value in given.items()}
        for key, target in targets.items():
            target.copy_(plain[key])
    elif targets and stored is not None:
        with stored.values() as values:
            for key, target in targets.items():
                target.copy_(values[key])


def check_distinct(given: Mapping[str, Tensor], mapped: Mapping[str, Tensor], adapter_name: str) -> None:
    """No two tensors of a state dict went to one place in the model. Raises AdapterCorruptError."""
    if len(mapped) != len(given):
        raise AdapterCorruptError(
            f"the state dict for adapter {adapter_name!r} holds a tensor twice, with and without the adapter's name: "
            "one of them is not meant. Save the adapter again."
        )


def check_loaded(tensors: Mapping[str, Tensor], model: nn.Module, adapter_name: str) -> None:
    """The same of a state dict whose keys carry the adapter's name, for a model that has the adapter already: whatever
    route it came by, this is all that is copied into the model. Raises AdapterCorruptError."""
    where = f"the state dict for adapter {adapter_name!r}"
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RemoeLayer)}
    ending = f".{adapter_name}"
    deltas: dict[str, Tensor] = {}
    for name, layer in layers.items():
        for path, parameter in layer.named_parameters():
            if path.startswith(layer.adapter_layer_names) and path.endswith(ending):
                deltas[f"{name}.{path}"] = parameter
    copies: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = module.state_dict()
            for path in module.adapter_state_dict_load_map(adapter_name).values():
                copies[f"{name}.{path}"] = held[path]
    # Injected without a PeftModel, a model has no prefix while stored keys may; PEFT strips it after this.
    prefix = "" if any(key.startswith(PEFT_PREFIX) for key in deltas) else PEFT_PREFIX
    found = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if len(found) != len(tensors):
        raise AdapterCorruptError(f"{where} holds a tensor twice, with and without 'base_model.model.'.")
    _check(found, {**deltas, **copies}, where)
    for name, layer in layers.items():
        kinds = [kind for kind in layer.adapter_layer_names if f"{name}.{kind}{ending}" in deltas]
        if kinds:
            parts = {kind: found[f"{name}.{kind}{ending}"] for kind in kinds}
            check_router(name, layer.original_weight_ED, parts, where)
    for key, held_tensor in copies.items():
        check_finite(key, found[key].to(held_tensor.dtype), where)


@torch.no_grad()
def check_sum(layers: Iterable[RemoeLayer], adapter_names: Sequence[str]) -> None:
    """Adapters that are finite each may not be together. Raises AdapterCorruptError."""
    for layer in layers:
        names = [name for name in adapter_names if name in layer.adapters]
        weight_ED = layer.original_weight_ED
        if len(names) < 2 or weight_ED.is_meta or stays_usable(weight_ED, layer.effective_weight_ED(names)):
            continue
        raise AdapterCorruptError(
            f"adapters {', '.join(names)} together make a router's logits infinite or NaN: use one at a time, or a sum "
            "with smaller weights (add_weighted_adapter)."
        )


def _check(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], where: str) -> None:
    for key, value in found.items():
        if not isinstance(value, Tensor):
            raise AdapterCorruptError(f"{printable(key)} in {where} is no tensor.")
    check_shapes(_shapes(found), _shapes(expected), where)
    check_types(_types(found), _types(expected), where)


def _deltas(rank: int | None, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of each router, without values."""
    expected = {}
    for name, weight_ED in targets.items():
        rows, columns = weight_ED.shape
        shapes = (
            {"remoe_delta": (rows, columns)} if rank is None else {"remoe_A": (rank, columns), "remoe_B": (rows, rank)}
        )
        for kind, shape in shapes.items():
            expected[f"{name}.{kind}"] = torch.empty(shape, device="meta")
    return expected


def _copied_modules(config: RemoeConfig, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the modules that `modules_to_save` names, by PEFT's rule."""
    expected: dict[str, Tensor] = {}
    names = tuple(config.modules_to_save or ())
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    for path, module in model.named_modules(remove_duplicate=False):
        if names and path.endswith(names) and not (inside and path.startswith(inside)):
            whole = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            held = whole.state_dict().items()
            expected |= {f"{path}.{key}": value for key, value in held if isinstance(value, Tensor)}
    return expected


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


def _types(tensors: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {key: tensor.dtype for key, tensor in tensors.items()}
