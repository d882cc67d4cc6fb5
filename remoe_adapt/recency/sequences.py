"""Who knows the sequences: hooks on the text model that give each forward's tokens the recency they continue.

Routers see flattened tokens. The model's own call tells batch, length, padding and KV cache; the state hangs on the
cache object and follows its reordering, repetition, selection and cropping. It starts anew at length 0.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt._support import say_once
from remoe_adapt.errors import RouterError
from remoe_adapt.gating import PADDING, RESTART
from remoe_adapt.libraries import (
    Patches,
    become,
    cache_argument,
    cache_length,
    can_carry_state,
    carry,
    handed_cache,
    hook,
    is_counted,
    returned_cache,
)
from remoe_adapt.recency.prior import RecencyPrior
from remoe_adapt.recency.state import RecencyState

_STATE = "remoe_recency"


class SequenceHooks(Patches):
    """Hooks on `text_model(model, ...)`.

    place_prior: called before a forward that is to be gated, so that the prior is where the routers are.
    """

    def __init__(self, text: nn.Module, prior: RecencyPrior, place_prior: Callable[[], None]) -> None:
        self._prior, self._place_prior = prior, place_prior
        names = list(inspect.signature(text.forward).parameters)
        self._position = {name: index for index, name in enumerate(names)}
        self._cache_name = cache_argument(text.forward)
        super().__init__(
            hook(text, "forward_pre", self._before, with_kwargs=True),
            hook(text, "forward", self._after, with_kwargs=True),
        )

    def _argument(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in kwargs:
            return kwargs[name]
        position = self._position.get(name, len(args))
        return args[position] if position < len(args) else None

    def _handed_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = self._cache_name
        if name is not None and (name in kwargs or self._position[name] < len(args)):
            return self._argument(name, args, kwargs)
        return handed_cache(kwargs)

    def _before(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        shown = self._argument("input_ids", args, kwargs)
        if shown is None:
            shown = self._argument("inputs_embeds", args, kwargs)
        if not isinstance(shown, Tensor) or shown.dim() < 2:
            return
        sequences, length = shown.shape[:2]
        cache = self._handed_cache(args, kwargs)
        if sequences == length == 1 and cache is not None and (known := self._known(cache)) is not None:
            self._prior.begin(1, 1, None, known)
            return
        self._place_prior()
        mask = self._argument("attention_mask", args, kwargs)
        positions = self._argument("position_ids", args, kwargs) if mask is None and cache is None else None
        followed = cache is None or can_carry_state(cache)
        if not followed and self._prior.needs_history:
            raise RouterError(
                f"the recency prior {self._prior.mode!r} cannot follow a KV cache of type {type(cache).__name__}: "
                'decode with one of transformers\' own (DynamicCache), or use the prior "resident", which needs none.'
            )
        past = 0 if cache is None or not followed else _length(cache)
        # The columns of a paged cache's mask are no positions, so it tells no padding.
        flags_T = None if length == 1 or not followed else _flags(mask, positions, sequences, length, past)
        told_BS = self._prior.running.flags_BS
        if told_BS is not None and told_BS.shape == (sequences, length):
            told_T = told_BS.reshape(-1)
            flags_T = told_T if flags_T is None else flags_T | told_T.to(flags_T.device)
        state = None
        if cache is not None and self._prior.needs_history:
            state = _state_of(cache, self._prior, sequences, past)
            if torch.compiler.is_compiling():
                state.forget()  # a history that grows would compile every step anew
        self._prior.begin(sequences, sequences * length, flags_T, state)

    def _known(self, cache: Any) -> RecencyState | None:
        """The state of this cache where all gains are 0 and a token simply comes next: nothing else is to be asked."""
        state: RecencyState | None = getattr(cache, _STATE, None)
        if state is None or not state.is_counted or torch.compiler.is_compiling() or not self._prior.is_idle():
            return None
        return state if state.is_next(self._prior, cache.get_seq_length()) else None

    def _after(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        tokens = self._prior.running.tokens
        if tokens is not None and tokens.state is None:
            made = returned_cache(output)
            if made is not None and can_carry_state(made):
                state = tokens.made_state(is_counted(_length(made), made))
                if state is not None:
                    attach(made, state)
        self._prior.end()


def text_model(model: nn.Module, router: str) -> nn.Module | None:
    """The innermost module around this router that is called with tokens (`inputs_embeds` or `input_ids`)."""
    path = router.split(".")[:-1]
    above = [model.get_submodule(".".join(path[:depth])) for depth in range(len(path), -1, -1)]
    for name in ("inputs_embeds", "input_ids"):
        for module in above:
            if name in inspect.signature(module.forward).parameters:
                return module
    return None


def _flags(mask: Any, positions: Any, sequences: int, length: int, past: int | Tensor | None) -> Tensor | None:
    """Flags of the new tokens; None where nothing is flagged.

    A 2-D mask tells the padding. A prepared 4-D one (or several, by kind of layer) does too, as tokens that do not see
    themselves, and packed rows, as tokens that do not see the one before. Without a mask, positions that start at 0
    again tell packed rows, as they do to transformers.
    """
    if isinstance(mask, dict):
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[2] == length:
        # A static cache has its free places at the end.
        first = past if isinstance(past, Tensor) or past == 0 else mask.shape[3] - length
        flagged_BS = _flags_4d(mask[:, 0], first)
        flagged_BS = flagged_BS.expand(sequences, length)
    elif isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == sequences and mask.shape[1] >= length:
        flagged_BS = (mask[:, -length:] == 0).to(torch.uint8) * PADDING
    elif mask is None and isinstance(positions, Tensor) and positions.dim() == 2 and positions.shape[1] == length:
        flagged_BS = (positions == 0).to(torch.uint8).mul(RESTART).expand(sequences, length)
        flagged_BS = torch.cat([torch.zeros_like(flagged_BS[:, :1]), flagged_BS[:, 1:]], dim=1)  # it starts anyway
    else:
        return None
    # On an accelerator nothing may be read back, and the fused scan does not mind.
    if flagged_BS.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(flagged_BS.any()):
        return None
    return flagged_BS.reshape(-1)


def _flags_4d(mask_BSN: Tensor, first: int | Tensor) -> Tensor:
    """Flags [B, S] by what each token may attend to among N, of which the new ones begin at `first`."""
    if mask_BSN.dtype.is_floating_point:  # added to the attention scores
        seen_BSN = mask_BSN > torch.finfo(mask_BSN.dtype).min / 2
    else:
        seen_BSN = mask_BSN != 0
    rows_S = torch.arange(mask_BSN.shape[1], device=mask_BSN.device)
    at_S = (rows_S + first).clamp(0, mask_BSN.shape[2] - 1)
    itself_BS, previous_BS = seen_BSN[:, rows_S, at_S], seen_BSN[:, rows_S, (at_S - 1).clamp(min=0)]
    follows_BS = torch.cat([torch.zeros_like(itself_BS[:, :1]), itself_BS[:, :-1]], dim=1)
    restart_BS = itself_BS & follows_BS & ~previous_BS
    return (~itself_BS).to(torch.uint8) * PADDING + restart_BS.to(torch.uint8) * RESTART


def _state_of(cache: Any, prior: RecencyPrior, sequences: int, length: int | Tensor | None) -> RecencyState:
    """The state that this cache carries, brought to the cache's length; a new one where there is none."""
    state: RecencyState | None = getattr(cache, _STATE, None)
    moved = state is not None and (state.prior is not prior or state.placement != prior.placement)
    if state is not None and moved and not state.bind(prior):
        state = None
    if state is not None and state.sequences != sequences:
        say_once(f"a KV cache of {state.sequences} sequences is used for {sequences}: their recency starts anew.")
        state = None
    if state is None:
        # A cache for compiled steps is never cropped.
        past = length if is_counted(length, cache) else None
        state = prior.new_state(sequences, past or 0, is_counted=past is not None)
        attach(cache, state)
        return state
    if isinstance(length, Tensor):  # a static cache: whether it is empty is known on the device only
        state.keep_if(length != 0)
    elif length == 0:
        state.reset()
    elif length is not None and length < state.length:
        state.crop(length)
    elif length is not None and length > state.length:  # a forward without the prior, or one that failed
        state.advance(length - state.length, None)
    return state


def _length(cache: Any) -> int | Tensor | None:
    state = getattr(cache, _STATE, None)
    return cache_length(cache, as_number=state is not None and state.is_counted)


def attach(cache: Any, state: RecencyState) -> None:
    """Hang the state on a cache object, whose class becomes one that takes the state along."""
    if not isinstance(cache, _CarriesState) and not torch.compiler.is_compiling():
        become(cache, _CarriesState)
    carry(cache, _STATE, state)


# A mixin before the cache's class: its methods are found first, and `super()` is the class that the cache had.
class _CarriesState:
    """What a KV cache's class becomes: its batch operations reach the recency too, and copies and pickles keep it."""

    def crop(self: Any, *args: Any, **kwargs: Any) -> None:
        super().crop(*args, **kwargs)  # type: ignore[misc]
        state = getattr(self, _STATE, None)
        if state is not None and state.history is None:
            say_once("a KV cache is cropped whose past choices are not kept (compiled steps): its recency starts anew.")
            state.reset()

    def reorder_cache(self: Any, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._remoe("select", beam_idx)

    def batch_select_indices(self: Any, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._remoe("select", indices)

    def batch_repeat_interleave(self: Any, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._remoe("repeat", repeats)

    def _remoe(self, what: str, argument: Any) -> None:
        state = getattr(self, _STATE, None)
        if state is not None:
            getattr(state, what)(argument)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # The class is made at run time, so a pickle names the one that it is made of.
        return _rebuilt, (type(self).__bases__[-1],), self.__dict__


def _rebuilt(base: Any) -> Any:
    cache = base.__new__(base)
    become(cache, _CarriesState)
    return cache
