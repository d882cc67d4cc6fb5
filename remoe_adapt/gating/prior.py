"""The recency prior of a model: its gains and residency on the device, and the tokens that run under it.

Shapes: L routers, B sequences, S new tokens of each, E experts, K chosen. The state (`gating/state.py`) lives beside
the KV cache of its sequences (`gating/sequences.py`); gates move it on in place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.gating.reference import PriorStep
from remoe_adapt.gating.state import RecencyState
from remoe_adapt.recency_settings import Recency

# Forwards whose backward may still come; of equally many tokens the last one counts.
_TRAINED = 8


class _Here(threading.local):
    """What a thread runs now."""

    tokens: Tokens | None = None


class RecencyPrior:
    """mode: "last" (the previous token's experts), "ema" (a decayed mean of uses), "resident" (what the cache holds),
    or another of `recency_settings.MODES`; decay: None is the mode's own.

    routers: (device, number of experts) of each, in model order. `gains` are L fp32 scalar tensors, written by
    `set_gains` or by the dial; `residency` are L tensors [1, E] fp32 in [0, 1] that an expert cache writes. Whoever
    writes the gains by other ways says so with `know`, or a device is waited for once, and compiled graphs that were
    chosen for gains of 0 (or others) go on.

    Raises ConfigError for an unknown mode or a decay outside [0, 1).
    """

    def __init__(self, mode: str, routers: Sequence[tuple[torch.device, int]], decay: float | None = None) -> None:
        settings = Recency.of(mode, 0.0, decay)
        self.mode, self.decay, self.needs_history = mode, settings.decay, settings.kind.needs_history
        with torch.inference_mode(False):  # ordinary tensors, which may be written in any mode
            self.residency = [torch.zeros((1, experts), device=device) for device, experts in routers]
        self.placed = 0
        self._hold([0.0] * len(routers))
        self.here = _Here()
        self._trained: deque[Tokens] = deque(maxlen=_TRAINED)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start outside any forward."""
        return {name: value for name, value in vars(self).items() if name not in ("here", "_trained")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, here=_Here(), _trained=deque(maxlen=_TRAINED))
        self._hold([float(gain) for gain in self.gains])  # views of one tensor, which copies are not
        self.placed += 1

    def set_gains(self, gain: float | Sequence[float]) -> None:
        """One gain for all layers, or one each. Raises ConfigError for a wrong number or value."""
        values = Recency.of(self.mode, gain, self.decay).gains(len(self.gains))
        for tensor, value in zip(self.gains, values, strict=True):
            tensor.fill_(value)
        self.know(values)

    def know(self, values: Sequence[float]) -> None:
        """`gains` hold these now: they were written by somebody else."""
        self._values, self._at_rest = list(values), not any(values)
        self._read_at = self._writes()

    def place(self, devices: Sequence[torch.device]) -> None:
        """Move gains and residency, each to its router's device; states follow when they are next used."""
        values = self.gains_read()
        with torch.inference_mode(False):
            self.residency = [mask.to(device) for mask, device in zip(self.residency, devices, strict=True)]
        self._hold(values)
        self.placed += 1

    def _hold(self, values: Sequence[float]) -> None:
        """New tensors with these gains, where the residency is."""
        with torch.inference_mode(False):
            self._gains_L, self.gains = _scalars(values, [mask.device for mask in self.residency])
        self.on_cpu = all(gain.is_cpu for gain in self.gains)
        self.resident_steps = [
            PriorStep(mask, gain, None) for mask, gain in zip(self.residency, self.gains, strict=True)
        ]
        self.know(values)

    def rests(self) -> bool:
        """All gains are 0: every router is that of the base."""
        if not torch.compiler.is_compiling():  # a graph is chosen by what was known before
            self.gains_read()
        return self._at_rest

    def gains_read(self) -> list[float]:
        """The gains as numbers. Tensors count how often they are written, so nothing is read back in vain."""
        if self._writes() != self._read_at:
            self.know([float(gain) for gain in self.gains])
        return self._values

    def _writes(self) -> int:
        return sum(gain._version for gain in self.gains) if self._gains_L is None else self._gains_L._version

    def zeros(self, layer: int, sequences: int) -> Tensor:
        """Recency [B, E] of a router before the first token."""
        with torch.inference_mode(False):
            mask_1E = self.residency[layer]
            return torch.zeros((sequences, mask_1E.shape[1]), device=mask_1E.device)

    def new_state(self, sequences: int, past: int = 0, *, croppable: bool = True) -> RecencyState:
        """Nothing used yet, after `past` tokens of which nothing is known."""
        recency = [self.zeros(layer, sequences) for layer in range(len(self.gains))]
        return RecencyState(self, recency, past, croppable=croppable)

    # The tokens that this thread runs now

    def tokens(self, count: int) -> Tokens | None:
        """The tokens of the forward under way, for a router that sees `count`; None where it sees others."""
        if (tokens := self.here.tokens) is not None:
            return tokens if tokens.count == count else None
        return next((tokens for tokens in self._trained if tokens.count == count), None)

    def begin(self, tokens: Tokens) -> None:
        """A forward of this thread starts."""
        self.here.tokens = tokens
        # Gradient checkpointing runs layers again in backward, outside a forward and from a thread of its own.
        if tokens.state is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._trained.appendleft(tokens)

    def end(self) -> None:
        """It has ended."""
        tokens, self.here.tokens = self.here.tokens, None
        if tokens is not None:
            tokens.end()


class Tokens:
    """The tokens of one forward: `count` = B * S of them, row-major; `flags_T` as in PriorStep.

    state: the recency they continue, moved on in place; None: each router starts at zero whenever it is asked.
    `rests`: all gains are 0, so that routers choose by themselves and `pending` takes what they chose, by layer.
    """

    def __init__(
        self, prior: RecencyPrior, sequences: int, count: int, flags_T: Tensor | None, state: RecencyState | None
    ) -> None:
        self.prior, self.sequences, self.count, self.flags_T, self.state = prior, sequences, count, flags_T, state
        self.rests = prior.rests()
        self.pending: dict[int, Tensor] = {}
        self.gains: list[float] = []
        self.steps: list[PriorStep] = []
        self._started: dict[int, Tensor] = {}
        self._chosen: dict[int, Tensor] = {}
        self.ended = False
        if self.rests:
            return
        # One token of one sequence: on a CPU its gates leave the recency still, and all move on together at the end.
        known = prior.on_cpu and flags_T is None and count == 1 and (not prior.needs_history or state is not None)
        if known and not torch.compiler.is_compiling():
            self.gains = prior.gains_read()
        if state is not None:
            state.advance(count // sequences, flags_T)
            self.steps = state.steps if flags_T is None else []
        elif not prior.needs_history and flags_T is None:
            self.steps = prior.resident_steps

    def step(self, layer: int) -> PriorStep:
        """The prior for this router's gate, up to date."""
        if self.steps:
            return self.steps[layer]
        prior = self.prior
        gain = prior.gains[layer]
        flags_T = None if self.flags_T is None else self.flags_T.to(gain.device)
        if not prior.needs_history:
            return PriorStep(prior.residency[layer], gain, None, flags_T)
        if self.state is not None:
            return PriorStep(self.state.recency[layer], gain, prior.decay, flags_T)
        started_BE = prior.zeros(layer, self.sequences)
        if not self.ended:
            self._started[layer] = started_BE
        return PriorStep(started_BE, gain, prior.decay, flags_T)

    def chose(self, layer: int, ids_TK: Tensor) -> None:
        """Remember what a router chose, for a cache that is cropped later."""
        if self.state is None:
            if not self.ended:
                self._chosen[layer] = ids_TK
        elif self.state.chosen is not None:
            self.state.chosen[layer].append(ids_TK)

    def end(self) -> None:
        """The forward has ended; only gradient checkpointing may ask again."""
        if self.state is not None and self.rests:
            self.state.rest(self.pending, self.count // self.sequences, self.flags_T)
        elif self.state is not None and self.pending:
            self.state.move(self.pending)
        self.pending, self._started, self._chosen, self.ended = {}, {}, {}, True

    def made_state(self) -> RecencyState | None:
        """The state after these tokens where they began without one; None when no router was asked."""
        chosen = self.pending if self.rests else self._chosen
        if self.state is not None or not chosen or not self.prior.needs_history:
            return None
        state = self.prior.new_state(self.sequences)
        if self.rests:
            state.rest(chosen, self.count // self.sequences, self.flags_T)
            return state
        for layer, started_BE in self._started.items():
            state.recency[layer].copy_(started_BE)
        state.advance(self.count // self.sequences, self.flags_T)
        state.chosen = [[chosen[layer]] if layer in chosen else [] for layer in range(len(state.recency))]
        return state


class RestingTokens(Tokens):
    """One token of one sequence while all gains are 0, made in less time: a dial at rest makes one at every token."""

    flags_T, count, sequences, rests, ended = None, 1, 1, True, False
    gains, steps = [], []

    def __init__(self, state: RecencyState) -> None:
        self.prior, self.state, self.pending = state.prior, state, {}


def _scalars(values: Sequence[float], devices: Sequence[torch.device]) -> tuple[Tensor | None, list[Tensor]]:
    """Scalar tensors, views of the first one returned where all are on one device."""
    if len(set(devices)) == 1:
        whole_L = torch.tensor(values, device=devices[0])
        return whole_L, list(whole_L.unbind())
    return None, [torch.tensor(value, device=device) for value, device in zip(values, devices, strict=True)]
