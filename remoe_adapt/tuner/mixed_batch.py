"""One batch, another adapter per sample: `model(**inputs, adapter_names=[...])` at inference.

Every adapter of the batch runs the router on all rows, then each row keeps its own adapter's result: routers are small,
and a row comes out exactly as it would with that adapter alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.func import functional_call

from remoe_adapt.errors import UnsupportedRouterError
from remoe_adapt.libraries import Patches, hook, put_on

if TYPE_CHECKING:
    from remoe_adapt.tuner.layer import RemoeLayer

BASE = "__base__"
_INPUTS = ("input_ids", "inputs_embeds", "inputs", "decoder_input_ids", "decoder_inputs_embeds", "input_features")
# Results that list tokens sorted by expert cannot be put together from several runs.
_SORTED_RETURNS = {"order", "rows", "sorted_weights", "sizes"}


def batch_size(args: Sequence[Any], kwargs: dict[str, Any]) -> int | None:
    """Number of samples a model call is about, or None where its arguments do not say."""
    candidates = [kwargs.get(name) for name in _INPUTS] + list(args)
    return next((value.shape[0] for value in candidates if isinstance(value, Tensor) and value.dim() > 0), None)


@contextmanager
def mixed_batch(
    model: nn.Module, layers: Iterable[RemoeLayer], own_names: set[str], adapter_names: Any, args: Any, kwargs: Any
) -> Iterator[None]:
    """While open, the routers of `model` apply `adapter_names[i]` to sample i ("__base__": none).

    generate may repeat every sample (beams, several returned sequences): names are repeated with them.

    Raises TypeError unless the names are a list; ValueError in training mode, for unknown names, while adapters are
    merged, and when the batch has another length.
    """
    layers = list(layers)
    outer = batch_size(args, kwargs)
    names = _checked(model, layers, own_names, adapter_names, outer)
    current = names

    def on_model(_: nn.Module, call_args: Any, call_kwargs: Any) -> None:
        nonlocal current
        # Where the arguments do not say, each name is taken for one sample.
        samples = batch_size(call_args, call_kwargs) or len(names)
        # Only a call whose own batch was compared above may repeat it; PEFT's task classes hide theirs in forward.
        if samples % len(names) if outer is not None else samples != len(names):
            raise ValueError(_length_message(len(names), samples))
        current = [name for name in names for _ in range(samples // len(names))]

    def on_layer(_: nn.Module, call_args: Any, call_kwargs: Any) -> tuple[Any, Any]:
        return call_args, {**call_kwargs, "adapter_names": current}

    stacks = [model]
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        # generate runs the encoder by itself, on samples not yet repeated.
        get_encoder: Callable[[], nn.Module] = model.get_encoder  # type: ignore[assignment]
        stacks.append(get_encoder())
    copies = [m for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) and own_names & m._adapters]
    with Patches() as patches:
        patches.add(*(hook(stack, "forward_pre", on_model, with_kwargs=True) for stack in stacks))
        patches.add(*(hook(module, "forward_pre", on_layer, with_kwargs=True) for module in [*layers, *copies]))
        yield


def _checked(
    model: nn.Module, layers: list[RemoeLayer], own_names: set[str], adapter_names: Any, samples: int | None
) -> list[str]:
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"`adapter_names` should be a list of adapter names, one per sample, got {adapter_names!r}.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if any(layer.merged for layer in layers):
        raise ValueError(
            "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
        )
    if unknown := sorted(set(adapter_names) - {BASE} - own_names):
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")
    if not adapter_names:
        raise ValueError("`adapter_names` is empty: give one adapter name per sample.")
    if samples is not None and samples != len(adapter_names):
        raise ValueError(_length_message(len(adapter_names), samples))
    return list(adapter_names)


def _length_message(names: int, samples: int) -> str:
    return (
        "Length of `adapter_names` should be the same as the number of inputs, but got "
        f"{names} and {samples} respectively."
    )


def mixed_forward(layer: RemoeLayer, adapter_names: list[str], args: Any, kwargs: dict[str, Any]) -> Any:
    """The router's result with adapter `adapter_names[i]` on the tokens of sample i.

    Tokens may come as [B, T, D] or flattened in sample order, [B * T, D]. Hooks on the router fire once, with the
    mixed result, so recorded router logits are those that were used.

    Raises UnsupportedRouterError for routers whose results are not one row per token.
    """
    if _SORTED_RETURNS & set(layer.spec.returns):
        raise UnsupportedRouterError(
            f"a {type(layer.base_layer).__name__} returns tokens sorted by expert, so samples of one batch cannot use "
            "different adapters: call the model once per adapter."
        )
    known = [name if name in layer.adapters else BASE for name in adapter_names]
    chosen = sorted(set(known))
    if len(chosen) == 1:
        return layer.run([] if chosen[0] == BASE else chosen, args, kwargs)
    router = layer.base_layer
    unhooked = _Unhooked(router)

    def forward(*call_args: Any, **call_kwargs: Any) -> Any:
        results = []
        for name in chosen:
            weight_ED = layer.effective_weight_ED([] if name == BASE else [name])
            weights = {f"router.{layer.spec.weight_name}": weight_ED}
            results.append(functional_call(unhooked, weights, call_args, call_kwargs))
        return _select(results, [[name == adapter for adapter in known] for name in chosen])

    # The router itself is called, so that hooks of others on it see the one mixed result.
    with put_on(router, "forward", forward):
        return router(*args, **kwargs)


class _Unhooked(nn.Module):
    """Calls a router's forward without its hooks, under weights that functional_call puts in place."""

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router, self._run = router, router.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._run(*args, **kwargs)


def _select(results: list[Any], masks: list[list[bool]]) -> Any:
    """Put rows of several results together; `masks[i]` marks the samples that take theirs from `results[i]`."""
    first = results[0]
    if isinstance(first, Tensor):
        samples = len(masks[0])
        if first.dim() == 0 or first.shape[0] % samples:
            raise UnsupportedRouterError(
                f"a router result of shape {list(first.shape)} does not divide into {samples} samples: "
                "call the model once per adapter."
            )
        mixed = first
        for result, mask in zip(results[1:], masks[1:], strict=True):
            rows = torch.tensor(mask, device=first.device).repeat_interleave(first.shape[0] // samples)
            mixed = torch.where(rows.view(-1, *[1] * (first.dim() - 1)), result, mixed)
        return mixed
    if isinstance(first, (tuple, list)):
        return type(first)(_select(list(parts), masks) for parts in zip(*results, strict=True))
    return first
