"""How much a trace reuses experts: overlap, switches, load, and reuse distance. Documents are never joined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.errors import TraceError
from remoe_adapt.traces.trace import Trace

# So many tokens are ranked at once. Their [tokens, K, E] comparisons fit into a CPU's cache, and larger chunks are
# slower for it.
_CHUNK_TOKENS = 128


def eor(trace: Trace) -> float:
    """Expert overlap ratio: mean over layers and tokens t >= 1 of a document of `|E_t & E_{t-1}| / K`.

    Raises:
        TraceError: no document has a second token.
    """
    return float(eor_L(trace).mean())


def eor_L(trace: Trace) -> NDArray[np.float64]:
    """Expert overlap ratio of each layer, float64 [L]; see `eor`."""
    return np.asarray(_overlap_LP(trace).mean(axis=1) / trace.top_k)


def switch_rate(trace: Trace) -> float:
    """Share of tokens whose set of experts differs from the previous token's, mean over layers.

    Raises:
        TraceError: no document has a second token.
    """
    return float(switch_rate_L(trace).mean())


def switch_rate_L(trace: Trace) -> NDArray[np.float64]:
    """Switch rate of each layer, float64 [L]; see `switch_rate`."""
    return np.asarray((_overlap_LP(trace) < trace.top_k).mean(axis=1))


def load_entropy(trace: Trace) -> float:
    """Mean over layers of `H(expert load) / log E`: 1 when all experts are used alike, 0 when one does everything."""
    return float(load_entropy_L(trace).mean())


def load_entropy_L(trace: Trace) -> NDArray[np.float64]:
    """Load entropy of each layer, float64 [L]; see `load_entropy`. With a single expert its load is even: 1."""
    num_experts = trace.num_experts
    if num_experts == 1:
        return np.ones(trace.num_layers)
    entropy_L = np.empty(trace.num_layers)
    for layer, ids_TK in enumerate(trace.experts):
        load_E = np.bincount(ids_TK.ravel(), minlength=num_experts) / ids_TK.size
        # An unused expert adds 0 to the entropy, but its logarithm would be -inf and the product NaN.
        used = load_E[load_E > 0]
        entropy_L[layer] = -(used * np.log(used)).sum()
    return np.asarray(entropy_L / np.log(num_experts))


@dataclass(frozen=True, eq=False)
class ReuseDistance:
    """Look-ups by reuse distance: `histogram_LB` int64 [L, E + 1].

    A look-up's distance is the number of distinct experts used more recently than the wanted one, as the previous
    token left them. The last bin (distance E) counts first uses in a document.
    """

    histogram_LB: NDArray[np.int64]

    @property
    def median_L(self) -> NDArray[np.int64]:
        """Lower median over all look-ups of each layer, int64 [L]; E where most look-ups are first uses."""
        below_LB = self.histogram_LB.cumsum(axis=1)
        return np.asarray((2 * below_LB < below_LB[:, -1:]).sum(axis=1), dtype=np.int64)

    @property
    def median(self) -> int:
        """Lower median over the look-ups of all layers."""
        return int(ReuseDistance(self.histogram_LB.sum(axis=0, keepdims=True)).median_L[0])

    def lru_misses_L(self, capacity: int) -> NDArray[np.int64]:
        """Misses of a token-atomic LRU cache of `capacity` experts per layer, int64 [L].

        LRU keeps the `capacity` newest experts whatever its size, so an expert is found when fewer than that many are
        newer: the stack property of Mattson et al., Evaluation techniques for storage hierarchies, 1970.
        """
        return np.asarray(self.histogram_LB[:, capacity:].sum(axis=1), dtype=np.int64)


def reuse_distance(trace: Trace) -> ReuseDistance:
    """Reuse distances of all look-ups, counted per layer, in one pass for every cache size."""
    starts_T = _document_start_of_token(trace)
    histograms = [_distance_histogram(ids_TK, trace.num_experts, starts_T) for ids_TK in trace.experts]
    return ReuseDistance(np.stack(histograms))


def _overlap_LP(trace: Trace) -> NDArray[np.int64]:
    """Experts shared with the previous token, for the P tokens that have one in their document."""
    has_previous_T = np.ones(trace.num_tokens, dtype=bool)
    has_previous_T[list(trace.document_starts)] = False
    later = np.flatnonzero(has_previous_T)
    if not len(later):
        raise TraceError(
            f"no token of this trace ({trace.num_tokens} tokens, {len(trace.document_starts)} documents) follows "
            "another one: record at least two tokens of one document"
        )
    overlap_LP = np.zeros((trace.num_layers, len(later)), dtype=np.int64)
    for ids_TK, overlap_P in zip(trace.experts, overlap_LP, strict=True):
        now_PK, before_PK = ids_TK[later], ids_TK[later - 1]
        # Slot by slot: comparing all slots at once would need K times the memory of the trace.
        for slot in range(trace.top_k):
            overlap_P += (now_PK == before_PK[:, slot, None]).any(axis=1)
    return overlap_LP


def _document_start_of_token(trace: Trace) -> NDArray[np.int64]:
    """First token of each token's document, int64 [T]."""
    # The end of the trace closes the last document.
    starts = np.asarray(trace.document_starts, dtype=np.int64)
    return starts.repeat(np.diff(starts, append=trace.num_tokens))


def _distance_histogram(ids_TK: NDArray[np.int16], num_experts: int, starts_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Counts of the reuse distances 0 .. E of one layer, int64 [E + 1]."""
    num_tokens, top_k = ids_TK.shape
    counts = np.zeros(num_experts + 1, dtype=np.int64)
    # The time of each expert's last use, -1 for none. Times are token * K + slot, so later slots count as newer.
    carry_E = np.full(num_experts, -1, dtype=np.int64)
    for begin in range(0, num_tokens, _CHUNK_TOKENS):
        ids_NK = ids_TK[begin : begin + _CHUNK_TOKENS].astype(np.intp)
        size = len(ids_NK)
        times_NK = begin * top_k + np.arange(size * top_k).reshape(size, top_k)
        # Row n is the cache as token n - 1 of the chunk left it, which is what all look-ups of token n see.
        last_NE = np.full((size + 1, num_experts), -1, dtype=np.int64)
        last_NE[0] = carry_E
        np.put_along_axis(last_NE[1:], ids_NK, times_NK, axis=1)
        # An expert that a token does not use keeps the time of its last use.
        np.maximum.accumulate(last_NE, axis=0, out=last_NE)
        carry_E, last_NE = last_NE[-1], last_NE[:-1]
        mine_NK = np.take_along_axis(last_NE, ids_NK, axis=1)
        newer_NK = np.count_nonzero(last_NE[:, None, :] > mine_NK[:, :, None], axis=2)
        # Whatever was used after an expert of this document is of this document too, so no other expert needs a check.
        first_use_NK = mine_NK < starts_T[begin : begin + size, None] * top_k
        counts += np.bincount(np.where(first_use_NK, num_experts, newer_NK).ravel(), minlength=num_experts + 1)
    return counts
