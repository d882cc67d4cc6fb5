"""The recency prior of a model: its gains and residency on the device, and the state of each sequence.

Shapes: L routers, B sequences, S new tokens of each, E experts, K chosen. The state lives beside the KV cache of its
sequences (`gating/sequences.py`); gates move it on in place.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError
from remoe_adapt.gating.reference import PADDING, RESTART, PriorStep

MODES = ("last", "ema", "resident")
DECAY = 0.7
MAX_GAIN = 16.0
# What a token leaves behind is forgotten below this.
_FORGOTTEN = 1e-12
# Per-step tensors of chosen experts that are joined into one.
_JOIN = 256


class _Here(threading.local):
    """What a thread runs now."""

    tokens: Tokens | None = None


class RecencyPrior:
    """mode: "last" (the previous token's experts), "ema" (a decayed mean of uses), "resident" (what the cache holds).

    routers: (device, number of experts) of each, in model order. `gains` are L fp32 scalar tensors, written by
    `set_gains` or by the dial; `residency` are L tensors [1, E] fp32 in [0, 1] that an expert cache writes.

    Raises ConfigError for an unknown mode or a decay outside [0, 1).
    """

    def __init__(self, mode: str, routers: Sequence[tuple[torch.device, int]], decay: float = DECAY) -> None:
        check_prior(mode, 0.0, decay)
        self.mode, self.decay = mode, 0.0 if mode == "last" else decay
        with torch.inference_mode(False):  # ordinary tensors, which may be written in any mode
            self.gains = _scalars([0.0] * len(routers), [device for device, _ in routers])
            self.residency = [torch.zeros((1, experts), device=device) for device, experts in routers]
        self.placed = 0
        self.resident_steps = self._resident_steps()
        self.here = _Here()
        self._trained: Tokens | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start outside any forward."""
        return {name: value for name, value in vars(self).items() if name not in ("here", "_trained")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, here=_Here(), _trained=None)

    def set_gains(self, gain: float | Sequence[float]) -> None:
        """One gain for all layers, or one each. Raises ConfigError for a wrong number or value."""
        values = [gain] * len(self.gains) if isinstance(gain, int | float) else list(gain)
        if len(values) != len(self.gains):
            raise ConfigError(f"{len(values)} recency gains for {len(self.gains)} routers: give one for each.")
        for value in values:
            check_prior(self.mode, value, self.decay)
        for tensor, value in zip(self.gains, values, strict=True):
            tensor.fill_(value)

    def place(self, devices: Sequence[torch.device]) -> None:
        """Move gains and residency, each to its router's device; states follow when they are next used."""
        with torch.inference_mode(False):
            self.gains = _scalars([float(gain) for gain in self.gains], devices)
            self.residency = [mask.to(device) for mask, device in zip(self.residency, devices, strict=True)]
        self.placed += 1
        self.resident_steps = self._resident_steps()

    def _resident_steps(self) -> list[PriorStep]:
        return [PriorStep(mask, gain, None) for mask, gain in zip(self.residency, self.gains, strict=True)]

    def zeros(self, layer: int, sequences: int) -> Tensor:
        """Recency [B, E] of a router before the first token."""
        with torch.inference_mode(False):
            mask_1E = self.residency[layer]
            return torch.zeros((sequences, mask_1E.shape[1]), device=mask_1E.device)

    def gains_read(self) -> list[float]:
        """The gains as numbers, read at once; empty on an accelerator, which would be waited for."""
        whole = self.gains[0]._base
        return whole.tolist() if whole is not None and whole.is_cpu and len(whole) == len(self.gains) else []

    def new_state(self, sequences: int, past: int = 0, *, croppable: bool = True) -> RecencyState:
        """Nothing used yet, after `past` tokens of which nothing is known."""
        recency = [self.zeros(layer, sequences) for layer in range(len(self.gains))]
        return RecencyState(self, recency, past, croppable=croppable)

    # The tokens that this thread runs now

    @property
    def tokens(self) -> Tokens | None:
        """What the forward under way runs; gates ask it."""
        return self.here.tokens or self._trained

    def begin(self, tokens: Tokens) -> None:
        """A forward of this thread starts."""
        self.here.tokens = tokens
        # Gradient checkpointing runs layers again in backward, from a thread of its own.
        self._trained = tokens if tokens.state is None and torch.is_grad_enabled() else None

    def end(self) -> None:
        """It has ended."""
        tokens, self.here.tokens = self.here.tokens, None
        if tokens is not None and tokens.pending and tokens.state is not None:
            tokens.state.move(tokens.pending)


class Tokens:
    """The tokens of one forward: `count` = B * S of them, row-major; `flags_T` as in PriorStep.

    state: the recency they continue, moved on in place; None: each router starts at zero whenever it is asked.
    """

    def __init__(
        self, prior: RecencyPrior, sequences: int, count: int, flags_T: Tensor | None, state: RecencyState | None
    ) -> None:
        self.prior, self.sequences, self.count, self.flags_T, self.state = prior, sequences, count, flags_T, state
        settled = prior.resident_steps if prior.mode == "resident" else state.steps if state is not None else []
        self.steps = settled if flags_T is None else []
        # One token of one sequence: on a CPU its gates leave the recency still, and all move on together at the end.
        self.gains = prior.gains_read() if count == 1 and self.steps and not torch.compiler.is_compiling() else []
        self.single = bool(self.gains)
        self.pending: dict[int, Tensor] = {}
        self._started: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}

    def step(self, layer: int) -> PriorStep:
        """The prior for this router's gate."""
        if self.steps:
            return self.steps[layer]
        prior = self.prior
        gain = prior.gains[layer]
        flags_T = None if self.flags_T is None else self.flags_T.to(gain.device)
        if prior.mode == "resident":
            return PriorStep(prior.residency[layer], gain, None, flags_T)
        if self.state is not None:
            return PriorStep(self.state.recency[layer], gain, prior.decay, flags_T)
        self._started[layer] = prior.zeros(layer, self.sequences)
        return PriorStep(self._started[layer], gain, prior.decay, flags_T)

    def chose(self, layer: int, ids_TK: Tensor) -> None:
        """Remember what a router chose, for a cache that is cropped later."""
        if self.state is None:
            self._chosen[layer] = ids_TK
        elif self.state.chosen is not None:
            self.state.chosen[layer].append(ids_TK)

    def made_state(self) -> RecencyState | None:
        """The state after these tokens where they began without one; None when no router was asked."""
        if self.state is not None or not self._started:
            return None
        state = self.prior.new_state(self.sequences)
        for layer, started_BE in self._started.items():
            state.recency[layer].copy_(started_BE)
        state.advance(self.count // self.sequences, self.flags_T)
        state.chosen = [[self._chosen.get(layer)] for layer in range(len(state.recency))]
        return state


class RecencyState:
    """The recency [B, E] of each router after `length` tokens (padding counted) of B sequences.

    `chosen` holds, per router, what was chosen since token `past`, forward by forward as `flags` do, so that `crop` can
    go back; None where that is not kept (`length` stands still then). A router that a forward did not ask (it took an
    early exit, or other experts serve its kind of token) has None there: its recency did not move.
    """

    def __init__(self, prior: RecencyPrior, recency: list[Tensor], past: int = 0, *, croppable: bool = True) -> None:
        self.prior, self.past, self.length = prior, past, past
        self.chosen: list[list[Tensor | None]] | None = [[] for _ in recency] if croppable else None
        self.flags: list[Tensor | int] = []
        self._has_gaps = False
        self._hold(recency)

    def _hold(self, recency: list[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            alike = len({(recency_BE.shape, recency_BE.device) for recency_BE in recency}) == 1
            # In one piece where that goes, so that a token moves all of it at once.
            self._whole_LBE = torch.stack(recency) if alike else None
        self.recency = recency if self._whole_LBE is None else list(self._whole_LBE.unbind())
        self.placed, self.sequences = self.prior.placed, len(recency[0])
        decay = self.prior.decay
        self.steps = [PriorStep(part, gain, decay) for part, gain in zip(self.recency, self.prior.gains, strict=True)]

    def move(self, chosen: dict[int, Tensor]) -> None:
        """Take in what the routers chose for one token of one sequence: ids [1, K] by layer."""
        decay = self.prior.decay
        widths = {ids_1K.shape[-1] for ids_1K in chosen.values()}
        if self._whole_LBE is not None and len(chosen) == len(self.recency) and len(widths) == 1:
            ids_LK = torch.cat([chosen[layer] for layer in range(len(chosen))])
            whole_LE = self._whole_LBE.view(len(chosen), -1)
            share = whole_LE.new_full((1, 1), 1.0 - decay).expand(ids_LK.shape)
            whole_LE.mul_(decay).scatter_add_(1, ids_LK, share)
        else:
            for layer, ids_1K in chosen.items():
                recency_1E = self.recency[layer]
                recency_1E.mul_(decay).scatter_add_(1, ids_1K, recency_1E.new_full(ids_1K.shape, 1.0 - decay))
        if self.chosen is not None:
            for layer, ids_1K in chosen.items():
                self.chosen[layer].append(ids_1K)

    def bind(self, prior: RecencyPrior) -> bool:
        """Go on under another prior object (a copy of the cache has a copied one), if it means the same."""
        alike = (prior.mode, prior.decay) == (self.prior.mode, self.prior.decay)
        if not alike or [r.shape[1] for r in self.recency] != [mask.shape[1] for mask in prior.residency]:
            return False
        self.prior = prior
        self._hold([r.to(mask.device) for r, mask in zip(self.recency, prior.residency, strict=True)])
        return True

    def advance(self, tokens: int, flags_T: Tensor | None) -> None:
        """S more tokens of each sequence are on their way."""
        if self.chosen is None:
            return
        if len(self.flags) > _JOIN:
            self._join()
        self._mark_gaps()
        self.length += tokens
        self.flags.append(tokens if flags_T is None else flags_T.reshape(self.sequences, -1))

    def forget(self) -> None:
        """Keep no history from now on."""
        self.chosen, self.flags = None, []

    def reset(self) -> None:
        """Back to length 0, in place."""
        for recency_BE in self.recency:
            recency_BE.zero_()
        self.past, self.length, self.flags, self._has_gaps = 0, 0, [], False
        self.chosen = None if self.chosen is None else [[] for _ in self.recency]

    def keep_if(self, flag: Tensor) -> None:
        """Back to nothing used where this scalar on the device is False."""
        for part in self.recency if self._whole_LBE is None else [self._whole_LBE]:
            part.mul_(flag.to(part))

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order (a sequence may come more than once)."""
        same = len(rows) == self.sequences
        if self.chosen is not None and self.flags:
            self._join()
            self.chosen = [[None if ids is None else ids[rows.to(ids.device)] for ids in parts] for parts in self.chosen]
            self.flags = [part if isinstance(part, int) else part[rows.to(part.device)] for part in self.flags]
        kept = [recency_BE[rows.to(recency_BE.device)] for recency_BE in self.recency]
        if same:
            for recency_BE, kept_BE in zip(self.recency, kept, strict=True):
                recency_BE.copy_(kept_BE)
        else:
            self._hold(kept)

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, copies side by side."""
        rows = torch.arange(self.sequences, device=self.recency[0].device)
        self.select(rows.repeat_interleave(times))

    def crop(self, length: int) -> None:
        """Back to the state after the first `length` tokens."""
        if self.chosen is None or length <= self.past:
            self.reset()
            self.past = self.length = length
            return
        kept, decay = length - self.past, self.prior.decay
        self._join()
        flagged = isinstance(self.flags[0], Tensor)
        self.flags = [part[:, :kept] if isinstance(part, Tensor) else kept for part in self.flags]
        self.chosen = [[None if ids is None else ids[:, :kept] for ids in parts] for parts in self.chosen]
        self.length = length
        remembered = 1 if decay == 0.0 else math.ceil(math.log(_FORGOTTEN) / math.log(decay))
        first = 0 if flagged or self._has_gaps else max(0, kept - remembered)
        for recency_BE, (ids_BSK,) in zip(self.recency, self.chosen, strict=True):
            recency_BE.zero_()
            for s in range(first, kept if ids_BSK is not None else first):
                self._replay(recency_BE, ids_BSK[:, s], s)

    def _replay(self, recency_BE: Tensor, ids_BK: Tensor, s: int) -> None:
        """`reference._step`'s update by token s, with the choice known (-1: the router was not asked)."""
        decay, flags_BS = self.prior.decay, self.flags[0]
        ids_BK = ids_BK.long()
        if isinstance(flags_BS, int) and not self._has_gaps:
            recency_BE.mul_(decay).scatter_add_(-1, ids_BK, recency_BE.new_full(ids_BK.shape, 1.0 - decay))
            return
        still_B1 = ids_BK[:, :1] < 0
        started_BE = recency_BE.clone()
        if isinstance(flags_BS, Tensor):
            flags_B1 = flags_BS[:, s : s + 1].to(recency_BE.device)
            still_B1 = still_B1 | (flags_B1.bitwise_and(PADDING) != 0)
            started_BE.masked_fill_(flags_B1.bitwise_and(RESTART) != 0, 0.0)
        used_BE = torch.zeros_like(recency_BE).scatter_(-1, ids_BK.clamp(min=0), 1.0 - decay)
        recency_BE.copy_(torch.where(still_B1, started_BE, started_BE * decay + used_BE))

    # The history

    def _mark_gaps(self) -> None:
        for parts in self.chosen or ():
            if len(parts) < len(self.flags):
                parts.extend([None] * (len(self.flags) - len(parts)))
                self._has_gaps = True

    def _join(self) -> None:
        """One part of each instead of one per forward: ids [B, S, K] int16, flags [B, S] or their number."""
        assert self.chosen is not None
        self._mark_gaps()
        counts = [part if isinstance(part, int) else part.shape[1] for part in self.flags]
        self.chosen = [[self._joined(parts, counts)] for parts in self.chosen]
        flags_BS = next((part for part in self.flags if isinstance(part, Tensor)), None)
        if flags_BS is None:
            self.flags = [sum(counts)]
            return
        whole = [
            part if isinstance(part, Tensor) else flags_BS.new_zeros((self.sequences, part)) for part in self.flags
        ]
        self.flags = [torch.cat(whole, dim=1)]

    def _joined(self, parts: list[Tensor | None], counts: list[int]) -> Tensor | None:
        width = next((ids.shape[-1] for ids in parts if ids is not None), None)
        if width is None:
            return None
        shape = (self.sequences, -1, width)
        like = self.recency[0]
        whole = [
            like.new_full((self.sequences, count, width), -1, dtype=torch.int16)
            if ids is None
            else ids.reshape(shape).to(torch.int16)
            for ids, count in zip(parts, counts, strict=True)
        ]
        return torch.cat(whole, dim=1)


def _scalars(values: Sequence[float], devices: Sequence[torch.device]) -> list[Tensor]:
    """Scalar tensors; views of one where all are on one device."""
    if len(set(devices)) == 1:
        return list(torch.tensor(values, device=devices[0]).unbind())
    return [torch.tensor(value, device=device) for value, device in zip(values, devices, strict=True)]


def check_prior(mode: object, gain: object, decay: object) -> None:
    """Raises ConfigError for a mode, gain or decay that cannot be."""
    if mode not in MODES:
        raise ConfigError(f"recency {mode!r} is not one of {', '.join(MODES)}.")
    if not isinstance(gain, int | float) or isinstance(gain, bool) or not 0.0 <= gain <= MAX_GAIN:
        raise ConfigError(
            f"recency gain {gain!r}: give a number from 0 (no prior) to {MAX_GAIN:g}; 0.1 to 0.3 is usual."
        )
    if not isinstance(decay, int | float) or isinstance(decay, bool) or not 0.0 <= decay < 1.0:
        raise ConfigError(f"recency decay {decay!r}: give a number from 0 (the last token alone) to below 1.")
