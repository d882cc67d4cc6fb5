"""Policies that rank experts by a score, replayed for all layers, documents and cache sizes side by side.

What LFU, LRFU, Markov and Belady think of an expert depends on the trace alone, not on what a cache holds. So scores
are kept once, for every (layer, document) pair in parallel, and each cache size only cuts its residents back by them.
The misses are those of the policy objects, to the integer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.eviction.markov import (
    COUNT_LIMIT,
    FAST,
    LAG,
    MAX_WIDTH,
    PRIOR,
    ROUND,
    SHARE_OF_FAST,
    SLOW,
    Markov,
)
from remoe_adapt.eviction.policy import LFU, LRFU, LRFU_DECAY, Belady, DecayClock
from remoe_adapt.traces import Trace

# Streams replayed side by side: bounds memory at a few MB per state array, and a matrix for each at 64 MiB in all.
_MAX_STREAMS = 2048
_MAX_PAIRS = 32 << 20
# An LFU score is uses * 2**_SEQUENCE_BITS + time of the last use, so that one integer holds the tie-break too.
_SEQUENCE_BITS = 40
# Below every score of a resident, so that absent experts are the first to be cut.
_ABSENT = np.iinfo(np.int64).min
# Below every next use, with room above it for the time of the last use, which ranks those that are never used again.
_NEVER_AGAIN = -(1 << 60)


def count_scored_misses(
    trace: Trace, policy: str, capacities: Sequence[int], decay: float = LRFU_DECAY
) -> NDArray[np.int64]:
    """Misses of a policy in `SCORES` per cache size and layer, int64 [len(capacities), L].

    policy: its name.
    capacities: cache sizes in experts.
    decay: of lrfu and markov, per token.
    """
    misses_SL = np.zeros((len(capacities), trace.num_layers), dtype=np.int64)
    scores_of = SCORES[policy](trace, decay)
    for streams in _streams(trace):
        for size, misses_R in enumerate(_replay_streams(trace, streams, scores_of(streams), capacities)):
            np.add.at(misses_SL[size], streams.layer_R, misses_R)
    return misses_SL


@dataclass(frozen=True)
class _Streams:
    """R independent replays: one layer of one document each, longest first, so that those alive are a prefix."""

    layer_R: NDArray[np.int64]
    start_R: NDArray[np.int64]
    length_R: NDArray[np.int64]
    num_experts: int

    def __len__(self) -> int:
        return len(self.layer_R)

    def full(self, value: float, dtype: type) -> NDArray[Any]:
        """Flat state, [R * E]."""
        return np.full(len(self) * self.num_experts, value, dtype=dtype)


def _streams(trace: Trace) -> Iterator[_Streams]:
    starts_D = np.asarray(trace.document_starts, dtype=np.int64)
    lengths_D = np.diff(starts_D, append=trace.num_tokens)
    # Longest first: at each step the streams that are alive are the first ones, and a slice takes them without a copy.
    document_R = np.argsort(-lengths_D, kind="stable").repeat(trace.num_layers)
    layer_R = np.tile(np.arange(trace.num_layers), len(starts_D))
    most = max(1, min(_MAX_STREAMS, _MAX_PAIRS // trace.num_experts**2))
    for begin in range(0, len(layer_R), most):
        part = document_R[begin : begin + most]
        yield _Streams(layer_R[begin : begin + most], starts_D[part], lengths_D[part], trace.num_experts)


class _Scores(ABC):
    """What keeping an expert is worth: the least is dropped, and of equals the least recently used.

    `score_F` and `last_use_F` (None where no two scores are equal) are flat over [R, E].
    """

    score_F: NDArray[Any]
    last_use_F: NDArray[np.int64] | None = None

    @abstractmethod
    def use(self, step: int, places_NK: NDArray[np.int64]) -> None:
        """Counts the uses at flat `places_NK` of the N living streams at token `step` of their documents."""


class _UseCounts(_Scores):
    """LFU."""

    def __init__(self, streams: _Streams) -> None:
        self.score_F = streams.full(0, np.int64)

    def use(self, step: int, places_NK: NDArray[np.int64]) -> None:
        uses_NK = (self.score_F[places_NK] >> _SEQUENCE_BITS) + 1
        self.score_F[places_NK] = (uses_NK << _SEQUENCE_BITS) + _times_K(step, places_NK)


class _DecayedUses(_Scores):
    """LRFU, by the arithmetic of `policy.LRFU`, so that both round alike."""

    def __init__(self, streams: _Streams, decay: float) -> None:
        self.score_F = streams.full(0.0, np.float64)
        self.last_use_F: NDArray[np.int64] = streams.full(0, np.int64)
        self._clock = DecayClock(decay)

    def use(self, step: int, places_NK: NDArray[np.int64]) -> None:
        # The clock of `policy.LRFU` scales at the same steps; rounding at others would break ties differently.
        scale = self._clock.advance(step)
        if scale != 1.0:
            self.score_F *= scale
        self.score_F[places_NK] += self._clock.gain
        self.last_use_F[places_NK] = _times_K(step, places_NK)


class _PredictedUses(_Scores):
    """Markov, by the arithmetic of `markov.Markov`, in its order."""

    def __init__(self, streams: _Streams, decay: float) -> None:
        fast, slow = decay**FAST, decay**SLOW
        self.score_F = streams.full(0.0, np.float64)
        self.last_use_F: NDArray[np.int64] = streams.full(0, np.int64)
        self._fast_F, self._slow_F = streams.full(0.0, np.float64), streams.full(0.0, np.float64)
        self._fast_clock, self._slow_clock = DecayClock(fast), DecayClock(slow)
        self._fast_rate, self._slow_rate = 1 - fast, 1 - slow
        self._seen_F: NDArray[np.int64] = streams.full(0, np.int64)
        self._follows_FE = np.zeros((len(self._seen_F), streams.num_experts), dtype=np.uint16)
        # What the last tokens chose, the newest first.
        self._chosen: list[NDArray[np.int64]] = []

    def use(self, step: int, places_NK: NDArray[np.int64]) -> None:
        (alive, top_k), num_experts = places_NK.shape, self._follows_FE.shape[1]
        self._fast_F *= self._fast_clock.advance(step)
        self._slow_F *= self._slow_clock.advance(step)
        self._fast_F[places_NK] += self._fast_clock.gain
        self._slow_F[places_NK] += self._slow_clock.gain
        self.last_use_F[places_NK] = _times_K(step, places_NK)
        worth_NE, prior_N1 = np.zeros((alive, num_experts)), np.ones((alive, 1))
        if top_k <= MAX_WIDTH:
            for chosen_NK in self._chosen:
                self._learn(chosen_NK[:alive], places_NK % num_experts)
            self._chosen = [places_NK, *self._chosen[: LAG - 1]]
            of_counts_N1 = 1.0 / (self._seen_F[places_NK].sum(axis=1, keepdims=True) + PRIOR * top_k)
            for place_N in places_NK.T:
                worth_NE += self._follows_FE[place_N]
            worth_NE *= of_counts_N1
            prior_N1 = PRIOR * top_k * of_counts_N1
        of_slow_N1 = prior_N1 * self._slow_rate / self._slow_clock.gain
        of_fast = SHARE_OF_FAST * self._fast_rate / self._fast_clock.gain
        here = slice(alive * num_experts)
        worth_NE += self._slow_F[here].reshape(alive, -1) * of_slow_N1
        worth_NE += self._fast_F[here].reshape(alive, -1) * of_fast
        self.score_F[here] = (worth_NE + ROUND).ravel()

    def _learn(self, before_NK: NDArray[np.int64], ids_NK: NDArray[np.int64]) -> None:
        full_M = before_NK[self._seen_F[before_NK] >= COUNT_LIMIT]
        self._follows_FE[full_M] >>= 1
        self._seen_F[full_M] >>= 1
        self._seen_F[before_NK] += 1
        self._follows_FE[before_NK[:, :, None], ids_NK[:, None, :]] += 1


class _NextUses(_Scores):
    """Belady."""

    def __init__(self, streams: _Streams, next_use_LTK: NDArray[np.int64]) -> None:
        self.score_F = streams.full(0, np.int64)
        self._streams = streams
        self._next_use_LTK = next_use_LTK

    def use(self, step: int, places_NK: NDArray[np.int64]) -> None:
        alive = len(places_NK)
        next_NK = self._next_use_LTK[self._streams.layer_R[:alive], self._streams.start_R[:alive] + step]
        self.score_F[places_NK] = np.where(next_NK < 0, _NEVER_AGAIN + _times_K(step, places_NK), -next_NK)


def _times_K(step: int, places_NK: NDArray[np.int64]) -> NDArray[np.int64]:
    top_k = places_NK.shape[1]
    return np.arange(step * top_k, (step + 1) * top_k, dtype=np.int64)


def _next_use_LTK(trace: Trace) -> NDArray[np.int64]:
    """Time (token * K + slot) of the next use of each chosen expert, -1 where there is none; int64 [L, T, K].

    A next use in a later document needs no care: within this one it ranks behind all that are of use.
    """
    next_LF = np.full((trace.num_layers, trace.num_tokens * trace.top_k), -1, dtype=np.int64)
    for ids_TK, next_F in zip(trace.experts, next_LF, strict=True):
        ids_F = ids_TK.ravel()
        # Stable, so that the uses of one expert stand one after another in the order of time.
        order_F = np.argsort(ids_F, kind="stable")
        same = ids_F[order_F[1:]] == ids_F[order_F[:-1]]
        next_F[order_F[:-1][same]] = order_F[1:][same]
    return next_LF.reshape(trace.experts.shape)


# By policy: a trace and LRFU's decay -> what makes the scores of some of its streams.
SCORES: dict[str, Callable[[Trace, float], Callable[[_Streams], _Scores]]] = {
    LFU.name: lambda trace, decay: _UseCounts,
    LRFU.name: lambda trace, decay: partial(_DecayedUses, decay=decay),
    Markov.name: lambda trace, decay: partial(_PredictedUses, decay=decay),
    Belady.name: lambda trace, decay: partial(_NextUses, next_use_LTK=_next_use_LTK(trace)),
}


def _replay_streams(trace: Trace, streams: _Streams, scores: _Scores, capacities: Sequence[int]) -> NDArray[np.int64]:
    """Misses of each cache size in each stream, int64 [S, R]."""
    num_experts = trace.num_experts
    misses_SR = np.zeros((len(capacities), len(streams)), dtype=np.int64)
    resident_SF = np.zeros((len(capacities), len(streams) * num_experts), dtype=bool)
    score_RE = scores.score_F.reshape(-1, num_experts)
    last_use_RE = None if scores.last_use_F is None else scores.last_use_F.reshape(-1, num_experts)
    # Streams alive at each step: lengths fall, so those longer than the step are the first ones.
    alive_T = np.searchsorted(-streams.length_R, -np.arange(streams.length_R[0]), side="left")
    row_R = np.arange(len(streams), dtype=np.int64) * num_experts
    for step, alive in enumerate(alive_T.tolist()):
        ids_NK = trace.experts[streams.layer_R[:alive], streams.start_R[:alive] + step]
        places_NK = row_R[:alive, None] + ids_NK
        scores.use(step, places_NK)
        for capacity, resident_F, misses_R in zip(capacities, resident_SF, misses_SR, strict=True):
            missed_N = trace.top_k - np.count_nonzero(resident_F[places_NK], axis=1)
            misses_R[:alive] += missed_N
            resident_F[places_NK] = True
            # Where nothing was missed nothing came in, so only the other streams are cut back.
            rows = np.flatnonzero(missed_N)
            if capacity < num_experts and len(rows):
                resident_RE = resident_F.reshape(-1, num_experts)
                resident_RE[rows] = _cut_back(
                    resident_RE[rows], capacity, score_RE[rows], None if last_use_RE is None else last_use_RE[rows]
                )
    return misses_SR


def _cut_back(
    resident_NE: NDArray[np.bool_], capacity: int, score_NE: NDArray[Any], last_use_NE: NDArray[np.int64] | None
) -> NDArray[np.bool_]:
    """The `capacity` residents of the highest scores, of equals the newest."""
    lowest = _ABSENT if score_NE.dtype == np.int64 else -np.inf
    cut = resident_NE.shape[1] - capacity
    held_NE = np.where(resident_NE, score_NE, lowest)
    # Only the score at the cut is wanted, which partition finds in linear time; a sort would rank the whole row.
    threshold_N1 = np.partition(held_NE, cut, axis=1)[:, cut, None]
    kept_NE: NDArray[np.bool_] = resident_NE & (held_NE >= threshold_N1)
    if last_use_NE is None:
        return kept_NE
    over = np.flatnonzero(np.count_nonzero(kept_NE, axis=1) > capacity)
    if len(over):
        # More residents than fit share the threshold's score: rank all of these few rows by (score, last use).
        order_ME = np.lexsort((last_use_NE[over], held_NE[over]), axis=1)
        dropped_ME = np.zeros((len(over), resident_NE.shape[1]), dtype=bool)
        np.put_along_axis(dropped_ME, order_ME[:, :cut], True, axis=1)
        kept_NE[over] &= ~dropped_ME
    return kept_NE
