"""The recency mode `cost` in numpy, as cost.c has it: what held experts rank by, and what the graph says of weights.

The definition is `gating/cost.py`. Shapes: E experts, K chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.recency_settings import held_experts

# A recency below it is none, as to the kernels (triton_kernels/rule.py), which are not imported: they need torch.
HELD_ABOVE = 1e-25
NO_WEIGHTS = "the graph does not tell what the weights of the chosen experts are, by which the mode cost ranks"
# Below it an exponential has too few digits left to order experts: what they rank by goes on as a hyperbola.
_PRICE_FLOOR = np.float32(-20)
_PRICE_TAIL = np.float32(10 * math.exp(-40))
_Floats = NDArray[np.float32]


class Ranks(IntEnum):
    """What a layer ranks, and so what the weight of an expert is; as in prior.h."""

    UNKNOWN = 0
    SOFTMAX = 1
    LOGITS = 2
    SCORES = 3
    BARE_LOGITS = 4


@dataclass(slots=True)
class Weighing:
    """What becomes of a layer's weights, followed node by node.

    at: the node that holds them now; 0 once they were used. ranked, scores: the tensors that are ranked, and that the
    weights are gathered from. is_normalised: they are divided by their sum. is_softmax_after: they are a softmax over
    the chosen.
    """

    ranked: int
    at: int = 0
    scores: int = 0
    ranks: Ranks = Ranks.UNKNOWN
    is_normalised: bool = False
    is_softmax_after: bool = False

    def follow(self, address: int, node: Any, operation: bytes, of: Callable[[int], tuple[bytes, int]]) -> None:
        """One more node of the graph; of: the operation of another one, and the address of its first source."""
        if not self.at or self.at not in node.src[:2]:
            return
        if operation in (b"RESHAPE", b"VIEW", b"CONT", b"SCALE"):
            self.at = address
        elif operation == b"SUM_ROWS":
            return
        elif operation == b"DIV" and node.src[0] == self.at:
            self.is_normalised, self.at = True, address
        elif operation == b"SOFT_MAX":
            self.is_softmax_after, self.at = True, address
        else:
            if operation == b"MUL":
                self.ranks = self._found(of)
            self.at = 0

    def _found(self, of: Callable[[int], tuple[bytes, int]]) -> Ranks:
        scores = self.scores
        while scores and of(scores)[0] == b"RESHAPE":
            scores = of(scores)[1]
        if not scores or not self.ranked:
            return Ranks.UNKNOWN
        operation, logits = of(scores)
        if operation not in (b"SOFT_MAX", b"SIGMOID", b"SQRT"):
            return Ranks.LOGITS if self.ranked == scores and self.is_softmax_after else Ranks.UNKNOWN
        if self.is_softmax_after:
            return Ranks.UNKNOWN
        if operation == b"SOFT_MAX":
            return Ranks.SOFTMAX if self.ranked == scores else Ranks.SCORES
        if self.ranked != logits:
            return Ranks.SCORES
        return Ranks.BARE_LOGITS if operation == b"SIGMOID" else Ranks.UNKNOWN


def held(recency_E: _Floats, share: float, k: int) -> NDArray[np.bool_]:
    """[E]: the experts that an LRFU cache of this share would hold, equals at its end all of them."""
    count = held_experts(share, k, len(recency_E))
    least = np.partition(recency_E, -count)[-count]
    held_E: NDArray[np.bool_] = recency_E >= np.maximum(least, np.float32(HELD_ABOVE))
    return held_E


def raised(
    choice_E: _Floats, held_E: NDArray[np.bool_], ids_K: NDArray[np.int32], gain: float, ranks: Ranks, normalise: bool
) -> _Floats:
    """What experts rank by [E], as `rank_by_cost` of cost.c has it.

    choice_E: what is ranked, a softmax by its logarithm. ids_K: the best of it. normalise: weights are divided by their
    sum.
    """
    with np.errstate(all="ignore"):
        is_raised_E = held_E & np.isfinite(choice_E)
        if ranks in (Ranks.SOFTMAX, Ranks.LOGITS):
            base = np.log(np.float32(gain))
            if normalise or ranks == Ranks.LOGITS:
                best_K = choice_E[ids_K]
                base += best_K.max() + np.log(np.exp(best_K - best_K.max()).sum(dtype=np.float32))
            if not np.isfinite(base):
                return choice_E
            by_E = choice_E - base
            raised_E = np.float32(0.5) * np.log1p(np.exp(np.float32(2) * by_E))
            raised_E = np.where(by_E < _PRICE_FLOOR, _PRICE_TAIL / -by_E, raised_E)
            found_E: _Floats = np.where(is_raised_E & (by_E < 10), raised_E, by_E)
            return found_E
        if ranks == Ranks.BARE_LOGITS:
            choice_E = np.float32(1) / (np.float32(1) + np.exp(-choice_E))
            is_raised_E = held_E
        scale = np.float32(gain)
        if normalise:
            scale *= np.abs(choice_E[ids_K].sum(dtype=np.float32))
        square = scale * scale
        if not (scale > 0 and np.isfinite(square)):
            return choice_E
        more_E = choice_E * (choice_E / (np.sqrt(square + choice_E * choice_E) + scale))
        return np.where(is_raised_E, scale + np.where(choice_E > 0, more_E, choice_E), choice_E)
