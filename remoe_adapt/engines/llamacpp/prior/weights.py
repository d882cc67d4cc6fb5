"""What the weights of chosen experts are and what they are divided by, in numpy, as weights.c has it.

The definition is `kept_part` of `gating/cost.py`. Shapes: T rows, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.engines.llamacpp.prior.cost import Ranks

NO_WEIGHTS = "the graph does not tell what the weights of the chosen experts are, by which the mode cost ranks"
NO_SUM = "the graph divides weights of chosen experts by a sum that the mode cost cannot reach"
WEIGHTS = b"ffn_moe_weights-"
_F32 = 0
# Operations that leave the weights of a row in proportion.
_IN_PROPORTION = (b"RESHAPE", b"VIEW", b"CONT", b"SCALE")
_Floats = NDArray[np.float32]


class Divided(IntEnum):
    """Where weights are divided by the sum of the chosen experts' scores."""

    NOWHERE = 0
    AT_SUM = 1
    AT_SOFTMAX = 2
    AT_GATHER = 3


@dataclass(frozen=True, slots=True)
class Nodes:
    """The engine's graph: the tensor at an address, and what its operation is called."""

    at: Callable[[int], Any]
    operation: Callable[[int], bytes]

    def source(self, address: int, passed: tuple[bytes, ...]) -> int:
        """The first node, from this one back along first sources, that is none of these operations; 0 without one."""
        while address and self.operation(address) in passed:
            address = self.at(address).src[0] or 0
        return address


@dataclass(slots=True)
class Weighing:
    """What becomes of a layer's weights, followed node by node.

    rows: how many there are. renormalise: we divide them by their sum. at: the node that holds them now; 0 once they
    were used. ranked, gathered: the tensor that is ranked, and the node that gathers weights. is_normalised: they are
    divided by their sum. is_softmax_after: they are a softmax over the chosen. can_keep: what they are divided by can
    be corrected.
    """

    ranked: int
    rows: int = 1
    renormalise: bool = False
    at: int = 0
    gathered: int = 0
    ranks: Ranks = Ranks.UNKNOWN
    is_normalised: bool = False
    is_softmax_after: bool = False
    can_keep: bool = False
    sum_at: int = 0
    is_sum_reachable: bool = False

    @property
    def divided(self) -> Divided:
        if self.is_normalised:
            return Divided.AT_SUM
        if self.ranks == Ranks.LOGITS:
            return Divided.AT_SOFTMAX
        return Divided.AT_GATHER if self.renormalise else Divided.NOWHERE

    def begin(self, address: int) -> None:
        """The node that gathers weights was met."""
        self.at = self.gathered = address

    def follow(self, address: int, nodes: Nodes) -> None:
        """One more node of the graph."""
        if not self.at:
            return
        node, operation = nodes.at(address), nodes.operation(address)
        if self.sum_at and node.src[0] == self.sum_at and operation in (*_IN_PROPORTION, b"CLAMP", b"ADD"):
            self.sum_at = address
            return
        if self.at not in node.src[:2]:
            return
        if operation in _IN_PROPORTION:
            self.at = address
        elif operation == b"SUM_ROWS":
            self.sum_at, self.is_sum_reachable = address, is_reachable(node, self.rows)
        elif operation == b"DIV" and node.src[0] == self.at:
            # Of two divisions the second undoes what is done to the sum of the first.
            is_by_sum = bool(self.sum_at) and node.src[1] == self.sum_at
            self.can_keep = not self.is_normalised and is_by_sum and self.is_sum_reachable
            self.is_normalised, self.at = True, address
        elif operation == b"SOFT_MAX":
            self.can_keep = is_reachable(node, self.rows)
            self.is_softmax_after, self.at = True, address
        else:
            if operation == b"MUL":
                self._conclude(nodes)
            self.at = 0

    def _conclude(self, nodes: Nodes) -> None:
        gathered = nodes.at(self.gathered)
        scores = nodes.source(gathered.src[0] or 0, (b"RESHAPE",))
        self.ranks = self._found(scores, nodes)
        if self.divided == Divided.AT_GATHER:
            self.can_keep = can_renormalise(gathered)
        if self.ranks == Ranks.SCORES and scores_of(self.ranked, nodes) != scores:
            self.can_keep = False

    def _found(self, scores: int, nodes: Nodes) -> Ranks:
        if not scores or not self.ranked:
            return Ranks.UNKNOWN
        operation = nodes.operation(scores)
        if operation not in (b"SOFT_MAX", b"SIGMOID", b"SQRT"):
            return Ranks.LOGITS if self.ranked == scores and self.is_softmax_after else Ranks.UNKNOWN
        if self.is_softmax_after:
            return Ranks.UNKNOWN
        if operation == b"SOFT_MAX":
            return Ranks.SOFTMAX if self.ranked == scores else Ranks.SCORES
        if self.ranked != nodes.at(scores).src[0]:
            return Ranks.SCORES
        return Ranks.BARE_LOGITS if operation == b"SIGMOID" else Ranks.UNKNOWN


@dataclass(slots=True)
class Owed:
    """A choice whose weights are yet to be corrected, later in the same graph: by part [T] of each row."""

    top: int
    at: Divided
    part_T: _Floats

    def is_here(self, address: int, nodes: Nodes) -> bool:
        """Whether a node is that in which they are. It is told by what it is made of, so that no node of another layer
        or graph passes for it."""
        wanted = {Divided.AT_SUM: b"SUM_ROWS", Divided.AT_SOFTMAX: b"SOFT_MAX"}.get(self.at)
        if nodes.operation(address) != wanted:
            return False
        passed = (*_IN_PROPORTION, b"SOFT_MAX") if self.at == Divided.AT_SUM else _IN_PROPORTION
        gathered = nodes.source(nodes.at(address).src[0] or 0, passed)
        if not gathered or nodes.operation(gathered) != b"GET_ROWS":
            return False
        node = nodes.at(gathered)
        return bool(node.src[1] == self.top and node.name.startswith(WEIGHTS))

    def keep(self, rows_TN: _Floats) -> None:
        """Corrects the rows of the node."""
        part_T1 = self.part_T[:, None]
        if self.at == Divided.AT_SUM:
            # Where our experts' scores are all 0, so are their weights, whatever they are divided by.
            rows_TN /= np.where(part_T1 > 0, part_T1, np.float32(1))
        else:
            rows_TN *= part_T1


def scores_of(ranked: int, nodes: Nodes) -> int:
    """The scores that what is ranked was made of, by a bias or a choice of groups; 0: not found."""
    for _ in range(16):
        if not ranked or nodes.operation(ranked) in (b"SIGMOID", b"SOFT_MAX", b"SQRT"):
            return ranked
        ranked = nodes.at(ranked).src[0] or 0
    return 0


def kept_part(ranks: Ranks, scores_E: _Floats, ids_K: NDArray[np.int32], own_K: NDArray[np.int32]) -> np.float32:
    """The sum of the chosen experts' scores over that of the engine's own; 1 where it is no number.

    scores_E: logits where weights are a softmax over the chosen ones, or a sigmoid of them.
    """
    with np.errstate(all="ignore"):
        values_E = scores_E.astype(np.float64)
        if ranks == Ranks.LOGITS:
            values_E = np.exp(values_E - values_E[own_K].max())
        elif ranks == Ranks.BARE_LOGITS:
            values_E = 1 / (1 + np.exp(-values_E))
        part = np.float32(values_E[ids_K].sum() / values_E[own_K].sum())
    return part if np.isfinite(part) else np.float32(1)


def is_reachable(node: Any, rows: int) -> bool:
    """Whether rows of float32 can be read and written."""
    shape = (node.type, node.nb[0], *node.ne[1:4])
    return bool(node.data) and shape == (_F32, 4, rows, 1, 1)


def can_renormalise(node: Any) -> bool:
    return bool(node.data) and (node.type, node.ne[0], node.nb[1]) == (_F32, 1, 4)
