"""Whether an adapter's tensors, in a file or in memory, are what one model needs: checked before any is copied."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

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
from remoe_adapt.tuner.stored import StoredAdapter, StoredTensor, StoredValues


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
    # Names and sizes first: a file that does not fit is refused before any of its data is read.
    _check(adapter.tensors, {**_deltas(config.rank, targets), **copies}, where)
    with adapter.values() as values:
        _check_values(values, by_router(adapter.tensors), targets, copies, where)


def check_given(
    tensors: Mapping[str, Tensor], config: RemoeConfig, model: nn.Module, targets: Mapping[str, Tensor]
) -> None:
    """The same of a state dict that takes the place of a file. Raises AdapterCorruptError."""
    where = "the state dict"
    plain = _without_prefix(tensors, PEFT_PREFIX, where)
    copies = _copied_modules(config, model)
    _check(plain, {**_deltas(config.rank, targets), **copies}, where)
    _check_values(plain, by_router(plain), targets, copies, where)


@torch.no_grad()
def copy_modules(
    model: nn.Module, adapter_name: str, given: Mapping[str, Tensor] | None, stored: StoredAdapter | None
) -> None:
    """Write the `modules_to_save` of a checked state dict, or else of a checked file, into a model that has the adapter
    without PEFT's prefix."""
    targets = {f"{name}.{source}": tensor for name, source, _, tensor in _copies(model, adapter_name)}
    if given is not None:
        plain = {plain_key(key): value for key, value in given.items()}
        for key, target in targets.items():
            target.copy_(plain[key])
    elif targets and stored is not None:
        with stored.values() as values:
            for key, target in targets.items():
                target.copy_(values[key])


def _copies(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, str, str, Tensor]]:
    """(wrapper, key in a file, key in the wrapper, tensor) of the adapter's copies of `modules_to_save`."""
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            held = module.state_dict()
            for source, path in module.adapter_state_dict_load_map(adapter_name).items():
                yield name, source, path, held[path]


def check_loaded(
    given: Mapping[str, Tensor], tensors: Mapping[str, Tensor], model: nn.Module, adapter_name: str
) -> None:
    """The same of a state dict on its way into a model that has the adapter already: whatever route it came by, this is
    all that is copied into the model.

    given: as it came.
    tensors: with keys that carry the adapter's name.

    Raises AdapterCorruptError.
    """
    where = f"the state dict for adapter {adapter_name!r}"
    if len(tensors) != len(given):  # two keys went to one place in the model
        raise AdapterCorruptError(
            f"{where} holds a tensor twice, with and without the adapter's name: one of them is not meant. Save the "
            "adapter again."
        )
    layers = {name: module for name, module in model.named_modules() if isinstance(module, RemoeLayer)}
    ending = f".{adapter_name}"
    deltas = {
        f"{name}.{path}": parameter
        for name, layer in layers.items()
        for path, parameter in layer.named_parameters()
        if path.startswith(layer.adapter_layer_names) and path.endswith(ending)
    }
    copies = {f"{name}.{path}": tensor for name, _, path, tensor in _copies(model, adapter_name)}
    # Injected without a PeftModel, a model has no prefix while stored keys may; PEFT strips it after this.
    prefix = "" if any(key.startswith(PEFT_PREFIX) for key in deltas) else PEFT_PREFIX
    found = _without_prefix(tensors, prefix, where)
    _check(found, {**deltas, **copies}, where)
    plain = {key.removesuffix(ending) if key in deltas else key: value for key, value in found.items()}
    originals = {name: layer.original_weight_ED for name, layer in layers.items()}
    _check_values(plain, by_router(key.removesuffix(ending) for key in deltas), originals, copies, where)


@torch.no_grad()
def check_sum(layers: Iterable[RemoeLayer], adapter_names: Sequence[str]) -> None:
    """Adapters that are finite each may not be together. Raises AdapterCorruptError."""
    for layer in layers:
        names = [name for name in adapter_names if name in layer.adapters]
        weight_ED = layer.original_weight_ED
        # One alone was checked when it was loaded; without values there is nothing to add.
        if len(names) < 2 or weight_ED.is_meta or stays_usable(weight_ED, layer.effective_weight_ED(names)):
            continue
        raise AdapterCorruptError(
            f"adapters {', '.join(names)} together make a router's logits infinite or NaN: use one at a time, or a sum "
            "with smaller weights (add_weighted_adapter)."
        )


def _without_prefix(tensors: Mapping[str, Tensor], prefix: str, where: str) -> dict[str, Tensor]:
    plain = {key.removeprefix(prefix): value for key, value in tensors.items()}
    if len(plain) != len(tensors):
        raise AdapterCorruptError(f"{where} holds a tensor twice, with and without 'base_model.model.'.")
    return plain


def _check(found: Mapping[str, Tensor | StoredTensor], expected: Mapping[str, Tensor], where: str) -> None:
    """Names, shapes and types, of which no value is read."""
    for key, value in found.items():
        # A state dict is what a caller made, and may hold anything.
        if not isinstance(value, (Tensor, StoredTensor)):
            raise AdapterCorruptError(f"{printable(key)} in {where} is no tensor.")
    shapes, dtypes = ({key: getattr(t, name) for key, t in expected.items()} for name in ("shape", "dtype"))
    check_shapes({key: tensor.shape for key, tensor in found.items()}, shapes, where)
    check_types({key: tensor.dtype for key, tensor in found.items()}, dtypes, where)


def _check_values(
    values: Mapping[str, Tensor] | StoredValues,
    kinds_of: Mapping[str, Sequence[str]],
    targets: Mapping[str, Tensor],
    copies: Mapping[str, Tensor],
    where: str,
) -> None:
    """One router at a time, because a file need not fit into memory whole."""
    for router, kinds in kinds_of.items():
        check_router(router, targets[router], {kind: values[f"{router}.{kind}"] for kind in kinds}, where)
    for key, parameter in copies.items():
        check_finite(key, values[key].to(parameter.dtype), where)


def _deltas(rank: int | None, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's tensors of each router, without values."""
    expected = {}
    for name, (rows, columns) in ((name, weight_ED.shape) for name, weight_ED in targets.items()):
        low_rank = {"remoe_A": (rank or 0, columns), "remoe_B": (rows, rank or 0)}
        for kind, shape in ({"remoe_delta": (rows, columns)} if rank is None else low_rank).items():
            expected[f"{name}.{kind}"] = torch.empty(shape, device="meta")
    return expected


def _copied_modules(config: RemoeConfig, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the modules that `modules_to_save` names, by PEFT's rule."""
    expected: dict[str, Tensor] = {}
    names = tuple(config.modules_to_save or ())
    # What is inside a copy has the same endings as what it copies, and would be counted twice.
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper))
    for path, module in model.named_modules(remove_duplicate=False):
        if names and path.endswith(names) and not (inside and path.startswith(inside)):
            whole = module.original_module if isinstance(module, ModulesToSaveWrapper) else module
            held = whole.state_dict().items()
            expected |= {f"{path}.{key}": value for key, value in held if isinstance(value, Tensor)}
    return expected
