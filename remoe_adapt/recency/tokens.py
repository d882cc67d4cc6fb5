"""The tokens of one forward and how its routers choose for them, decided once, when the forward begins.

Three kinds, side by side: `IdleTokens` while all gains are 0, `SingleToken` for a decode step on a CPU, `GatedTokens`
for everything else. Shapes: B sequences, S new tokens of each, T = B * S tokens, K chosen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from remoe_adapt.gating import PriorStep, SingleGate, StepGate, backend, fused_route, gate_of
from remoe_adapt.recency.state import RecencyState
from remoe_adapt.routers import RouterSpec

if TYPE_CHECKING:
    from remoe_adapt.recency.prior import RecencyPrior


class StepTokens(StepGate, Protocol):
    """What hooks and routers ask of a forward's tokens.

    state: the recency that they continue; None: each router starts at zero whenever it is asked.
    """

    state: RecencyState | None

    def end(self) -> None:
        """Move the recency on; the forward has ended, and only gradient checkpointing may ask again."""

    def made_state(self, is_counted: bool) -> RecencyState | None:
        """The state after these tokens where they began without one; None when no router was asked."""


def tokens_of(
    prior: RecencyPrior, sequences: int, count: int, flags_T: Tensor | None, state: RecencyState | None
) -> StepTokens:
    """The tokens of a forward that begins, of the kind that its routers need.

    count: B * S of them, row-major, for B `sequences`. flags_T: as in PriorStep.
    """
    if prior.is_idle():
        return IdleTokens(prior, sequences, count, flags_T, state)
    alone = prior.on_cpu and count == 1 and flags_T is None and (not prior.needs_history or state is not None)
    if alone and not torch.compiler.is_compiling():
        return SingleToken(prior, state)
    return GatedTokens(prior, sequences, count, flags_T, state)


class IdleTokens:
    """Routers choose by themselves, and what they chose is noted for the time when a gain is not 0."""

    gate = launch = None

    def __init__(
        self, prior: RecencyPrior, sequences: int, count: int, flags_T: Tensor | None, state: RecencyState | None
    ) -> None:
        self.prior, self.sequences, self.count, self.flags_T, self.state = prior, sequences, count, flags_T, state
        self._chosen: dict[int, Tensor] = {}
        self._has_ended = False

    def note(self, layer: int, ids_TK: Tensor) -> None:
        """Remember what this router chose."""
        if not self._has_ended:
            # Of a prompt's choices, which may be views into whole rankings, only the numbers stay.
            self._chosen[layer] = ids_TK if self.count == self.sequences else ids_TK.to(torch.int16)

    def end(self) -> None:
        """As StepTokens."""
        if self.state is not None:
            self.state.add(self._chosen, self.count // self.sequences, self.flags_T)
        self._chosen, self._has_ended = {}, True

    def made_state(self, is_counted: bool) -> RecencyState | None:
        """As StepTokens."""
        if self.state is not None or not self._chosen or not self.prior.needs_history:
            return None
        state = self.prior.new_state(self.sequences, is_counted=is_counted)
        state.add(self._chosen, self.count // self.sequences, self.flags_T)
        return state


class SingleToken(SingleGate):
    """One token of one sequence on a CPU: gates leave the recency still, and all of it moves on at the end."""

    count, launch = 1, None

    def __init__(self, prior: RecencyPrior, state: RecencyState | None) -> None:
        steps = prior.resident_steps if state is None else state.steps
        super().__init__(steps, prior.gains_read(), prior.running.scratch)
        self.state = state

    def note(self, layer: int, ids_TK: Tensor) -> None:
        """Remember what this router chose."""
        self.chosen[layer] = ids_TK

    def end(self) -> None:
        """As StepTokens."""
        if self.state is not None:
            self.state.move(self.chosen)
        self.chosen = {}

    def made_state(self, is_counted: bool) -> None:
        """None: a token alone has a state, or the prior needs none."""


class GatedTokens:
    """Any tokens: their gates move the recency on in place, token by token, by kernels where there are any."""

    def __init__(
        self, prior: RecencyPrior, sequences: int, count: int, flags_T: Tensor | None, state: RecencyState | None
    ) -> None:
        self.prior, self.sequences, self.count, self.flags_T, self.state = prior, sequences, count, flags_T, state
        self._gate = gate_of(prior.device)
        # On a CPU nothing is gained, and a compiled graph would hold the product as an operator of ours.
        self.launch = self._launch if not prior.on_cpu and backend(prior.device) == "triton" else None
        self._started: dict[int, Tensor] = {}
        self._chosen = {} if state is None else state.advance(count // sequences, flags_T)
        self._steps = [] if state is None or flags_T is not None else state.steps
        self._has_ended = False

    def gate(
        self, layer: int, logits_TE: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As StepGate."""
        weights_TK, ids_TK = self._gate(logits_TE, k, spec, self._step(layer), bias_E=bias_E)
        self.note(layer, ids_TK)
        return weights_TK, ids_TK

    def _launch(
        self, layer: int, hidden_TD: Tensor, weight_ED: Tensor, linear_bias_E: Tensor | None, k: int, spec: RouterSpec,
        bias_E: Tensor | None, linear_fp32: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        found = fused_route(hidden_TD, weight_ED, k, spec, self._step(layer), bias_E, linear_bias_E, linear_fp32)
        self.note(layer, found[2])
        return found

    def _step(self, layer: int) -> PriorStep:
        """The prior for this router's gate, up to date."""
        if self._steps:
            return self._steps[layer]
        prior = self.prior
        gain = prior.gains[layer]
        flags_T = None if self.flags_T is None else self.flags_T.to(gain.device)
        if not prior.needs_history:
            return PriorStep(prior.residency[layer], gain, None, flags_T, prior.share)
        if self.state is not None:
            return PriorStep(self.state.recency[layer], gain, prior.decay, flags_T, prior.share)
        started_BE = prior.zeros(layer, self.sequences)
        if not self._has_ended:
            self._started[layer] = started_BE
        return PriorStep(started_BE, gain, prior.decay, flags_T, prior.share)

    def note(self, layer: int, ids_TK: Tensor) -> None:
        """Remember what this router chose, for a cache that is cropped later."""
        if not self._has_ended and (self.state is None or self.state.history is not None):
            # Of a prompt's choices, which may be views into whole rankings, only the numbers stay.
            self._chosen[layer] = ids_TK if self.count == self.sequences else ids_TK.to(torch.int16)

    def end(self) -> None:
        """As StepTokens."""
        self._chosen, self._started, self._has_ended = {}, {}, True

    def made_state(self, is_counted: bool) -> RecencyState | None:
        """As StepTokens."""
        if self.state is not None or not self._chosen or not self.prior.needs_history:
            return None
        state = self.prior.new_state(self.sequences, is_counted=is_counted)
        for layer, started_BE in self._started.items():
            state.recency[layer].copy_(started_BE)
        state.advance(self.count // self.sequences, self.flags_T).update(self._chosen)
        return state
