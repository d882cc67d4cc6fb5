"""The recency prior of a model: its gains and residency on the device, and the tokens that run under it.

Shapes: L routers, B sequences, S new tokens of each, E experts, K chosen. The state (`recency/state.py`) lives beside
the KV cache of its sequences (`recency/sequences.py`); gates move it on in place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.gating import PriorStep, Scratch
from remoe_adapt.recency.state import RecencyState
from remoe_adapt.recency.tokens import StepTokens, tokens_of
from remoe_adapt.recency_settings import Recency

# Forwards whose backward may still come; of equally many tokens the last one counts.
_TRAINED = 8


class _Running(threading.local):
    """What a thread runs now, and its memory for the gates of single tokens, which take new memory for no step."""

    tokens: StepTokens | None = None

    def __init__(self) -> None:
        self.scratch = Scratch()


class RecencyPrior:
    """mode: "last" (the previous token's experts), "ema" (a decayed mean of uses), "resident" (what the cache holds),
    or another of `recency_settings.MODES`; decay, share: None is the mode's own.

    routers: (device, number of experts) of each, in model order. `gains` are L fp32 scalar tensors, written by
    `set_gains` or by the dial; `residency` are L tensors [1, E] fp32 in [0, 1], zeros until `read_residency`. Whoever
    writes the gains by other ways says so with `know`, or a device is waited for once, and compiled graphs that were
    chosen for gains of 0 (or others) go on.

    Raises ConfigError for an unknown mode, a decay outside [0, 1) or a share outside (0, 1].
    """

    def __init__(
        self, mode: str, routers: Sequence[tuple[torch.device, int]], decay: float | None = None,
        share: float | None = None,
    ) -> None:  # fmt: skip
        settings = Recency.of(mode, 0.0, decay, share)
        self.mode, self.decay, self.needs_history = mode, settings.decay, settings.kind.needs_history
        # As PriorStep has it: None where the bonus is not priced.
        self.share = settings.share if settings.kind.is_priced else None
        with torch.inference_mode(False):  # ordinary tensors, which may be written in any mode
            self.residency = [torch.zeros((1, experts), device=device) for device, experts in routers]
        self.placement = 0
        self._hold([0.0] * len(routers))
        self.running = _Running()
        self._trained: deque[StepTokens] = deque(maxlen=_TRAINED)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start outside any forward."""
        return {name: value for name, value in vars(self).items() if name not in ("running", "_trained")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, running=_Running(), _trained=deque(maxlen=_TRAINED))
        self._hold([float(gain) for gain in self.gains])  # views of one tensor, which copies are not
        self.placement += 1

    def set_gains(self, gain: float | Sequence[float]) -> None:
        """One gain for all layers, or one each. Raises ConfigError for a wrong number or value."""
        values = Recency.of(self.mode, gain, self.decay).gains(len(self.gains))
        for tensor, value in zip(self.gains, values, strict=True):
            tensor.fill_(value)
        self.know(values)

    def know(self, values: Sequence[float]) -> None:
        """`gains` hold these now: they were written by somebody else."""
        self._values, self._is_idle = list(values), not any(values)
        self._read_at = self._writes()

    def place(self, devices: Sequence[torch.device]) -> None:
        """Move gains and residency, each to its router's device; states follow when they are next used."""
        values = self.gains_read()
        with torch.inference_mode(False):
            self.residency = [mask.to(device) for mask, device in zip(self.residency, devices, strict=True)]
        self._hold(values)
        self.placement += 1

    def _hold(self, values: Sequence[float]) -> None:
        """New tensors with these gains, where the residency is."""
        with torch.inference_mode(False):
            self._gains_L, self.gains = _scalars(values, [mask.device for mask in self.residency])
        # Of several devices the first that may run kernels.
        self.device = next((gain.device for gain in self.gains if not gain.is_cpu), torch.device("cpu"))
        self.on_cpu = self.device.type == "cpu"
        self._make_resident_steps()
        self.know(values)

    def read_residency(self, masks: Mapping[int, Tensor]) -> None:
        """From now on the layers named read these tensors [1, E], which an expert cache writes."""
        for layer, mask_1E in masks.items():
            self.residency[layer] = mask_1E
        self._make_resident_steps()

    def _make_resident_steps(self) -> None:
        self.resident_steps = [
            PriorStep(mask, gain, None, None, self.share) for mask, gain in zip(self.residency, self.gains, strict=True)
        ]

    def is_idle(self) -> bool:
        """All gains are 0: every router is that of the base."""
        if not torch.compiler.is_compiling():  # a graph is chosen by what was known before
            self.gains_read()
        return self._is_idle

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

    def new_state(self, sequences: int, past: int = 0, *, is_counted: bool = True) -> RecencyState:
        """Nothing used yet, after `past` tokens of which nothing is known."""
        recency = [self.zeros(layer, sequences) for layer in range(len(self.gains))]
        return RecencyState(self, recency, past, is_counted=is_counted)

    # The tokens that this thread runs now

    def step_of(self, count: int) -> StepTokens | None:
        """The tokens of the forward under way, for a router that sees `count`; None where it sees others."""
        if (tokens := self.running.tokens) is not None:
            return tokens if tokens.count == count else None
        return next((tokens for tokens in self._trained if tokens.count == count), None)

    def begin(self, sequences: int, count: int, flags_T: Tensor | None, state: RecencyState | None) -> None:
        """A forward of this thread starts, with `count` tokens of so many sequences; see `tokens_of`."""
        self.running.tokens = tokens = tokens_of(self, sequences, count, flags_T, state)
        # Gradient checkpointing runs layers again in backward, outside a forward and from a thread of its own.
        if state is None and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._trained.appendleft(tokens)

    def end(self) -> None:
        """It has ended."""
        tokens, self.running.tokens = self.running.tokens, None
        if tokens is not None:
            tokens.end()


def _scalars(values: Sequence[float], devices: Sequence[torch.device]) -> tuple[Tensor | None, list[Tensor]]:
    """Scalar tensors, views of the first one returned where all are on one device."""
    if len(set(devices)) == 1:
        whole_L = torch.tensor(values, device=devices[0])
        return whole_L, list(whole_L.unbind())
    return None, [torch.tensor(value, device=device) for value, device in zip(values, devices, strict=True)]
