"""The recency mode `cost` in numpy, as cost.c has it: what held experts rank by.

The definition is `gating/cost.py`. Shapes: E experts, K chosen.
"""

from __future__ import annotations

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.recency_settings import held_experts

# A recency below it is none, as to the kernels (triton_kernels/rule.py), which are not imported: they need torch.
HELD_ABOVE = 1e-25
# Below it an exponential has too few digits left to order experts: what they rank by goes on as a hyperbola.
_PRICE_FLOOR = np.float32(-40)
_PRICE_TAIL = np.float32(40 * math.exp(-40))
# From it on log(1 + exp x) is x.
_PRICE_TOP = np.float32(20)
_Floats = NDArray[np.float32]


class Ranks(IntEnum):
    """What a layer ranks, and so what the weight of an expert is; as in prior.h."""

    UNKNOWN = 0
    SOFTMAX = 1
    LOGITS = 2
    SCORES = 3
    BARE_LOGITS = 4


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
        if ranks in (Ranks.SOFTMAX, Ranks.LOGITS):
            is_raised_E = held_E & np.isfinite(choice_E)
            exact = np.log(np.float64(np.float32(gain)))
            if normalise or ranks == Ranks.LOGITS:
                best_K = choice_E[ids_K].astype(np.float64)
                exact += best_K.max() + np.log(np.exp(best_K - best_K.max()).sum())
            base = np.float32(exact)
            if not np.isfinite(base):
                return choice_E
            by_E = choice_E - base
            raised_E = np.maximum(by_E, np.float32(0)) + np.log1p(np.exp(-np.abs(by_E)))
            raised_E = np.where(by_E < _PRICE_FLOOR, _PRICE_TAIL / -by_E, raised_E)
            found_E: _Floats = np.where(is_raised_E & (by_E < _PRICE_TOP), raised_E, by_E)
            return found_E
        if ranks == Ranks.BARE_LOGITS:
            choice_E = np.float32(1) / (np.float32(1) + np.exp(-choice_E))
        scale = np.float32(gain)
        if normalise:
            scale = np.float32(np.abs(choice_E[ids_K].sum(dtype=np.float64)) * np.float64(scale))
        if not (scale > 0 and np.isfinite(scale)):
            return choice_E
        return np.where(held_E, choice_E + scale, choice_E)
