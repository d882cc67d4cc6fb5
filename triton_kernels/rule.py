"""What the kernels know of a router: plain numbers, no torch, no triton. Callers translate their own description."""

from __future__ import annotations

import math
from dataclasses import dataclass

SOFTMAX, SIGMOID, SQRT_SOFTPLUS = 0, 1, 2
BY_LOGIT, BY_BIASED_LOGIT, BY_SCORE = 0, 1, 2
NO_GROUPS, GROUP_MAX, GROUP_TOP2 = 0, 1, 2
# Flags of a token.
PADDING, RESTART = 1, 2
# A span of choice values is cut here, so that span * gain * recency stays finite.
MAX_SPAN = 1e30
# How a recency prior prices the experts that it prefers: not at all (its bonus is of the span), by their score, or by
# their score over the sum of the chosen ones.
NO_PRICE, BY_ITSELF, BY_SHARE = 0, 1, 2
# A recency below this is none: no use within some thousand tokens, at a decay of 0.95.
HELD_ABOVE = 1e-25
# x, the logarithm of a weight over the gain: below it log(1 + exp x) goes on as PRICE_TAIL / -x, which meets it there.
PRICE_FLOOR = -40.0
PRICE_TAIL = 40.0 * math.exp(-40.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """How one router scores, ranks and weighs E experts.

    score: what weights are made of. rank: what is ranked (a selection bias is added to all but BY_LOGIT). groups: how
    a group of E / num_groups neighbours is judged; experts outside the best `kept_groups` rank as `fill`.
    chosen_softmax: weights are a softmax over the chosen logits (a renormalised softmax is one, and needs no sum over
    all experts). Else they are the chosen scores, over their sum + `eps` if `normalize`; `null_from` and later experts
    get weight 0 (None: no such experts). All times `scaling`.
    """

    score: int = SOFTMAX
    rank: int = BY_LOGIT
    groups: int = NO_GROUPS
    num_groups: int = 1
    kept_groups: int = 1
    fill: float = float("-inf")
    chosen_softmax: bool = False
    normalize: bool = False
    eps: float = 0.0
    null_from: int | None = None
    scaling: float = 1.0

    @property
    def grouped(self) -> bool:
        """Whether groups drop any expert at all."""
        return self.groups != NO_GROUPS and self.kept_groups < self.num_groups

    @property
    def divides(self) -> bool:
        """Whether weights are divided by the sum of the chosen experts' scores."""
        return self.chosen_softmax or self.normalize
