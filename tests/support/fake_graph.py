"""Nodes of a graph that is none, for what prior.c does with whatever an engine puts before it."""

from __future__ import annotations

import ctypes as C
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt.engines.llamacpp.prior.fallback import Head
from remoe_adapt.engines.llamacpp.prior.native import Control, find_in, functions, symbol

_OPERATIONS = (
    b"NONE", b"ARGSORT", b"VIEW", b"GET_ROWS", b"MUL_MAT_ID", b"SOFT_MAX", b"ADD", b"RESHAPE", b"SUM_ROWS", b"DIV",
    b"MUL", b"SCALE", b"SIGMOID", b"SQRT",
)  # fmt: skip
_BUFFERS = {name: C.create_string_buffer(name) for name in _OPERATIONS}
_OpDesc = C.CFUNCTYPE(C.c_void_p, C.c_void_p)


@_OpDesc
def _op_desc(tensor: int) -> int:
    return C.addressof(_BUFFERS[_OPERATIONS[Head.from_address(tensor).op]])


class Node(Head):
    """A tensor with the rest of its fields."""

    _fields_ = (("extra", C.c_void_p), ("padding", C.c_char * 8))

    @property
    def at(self) -> int:
        return C.addressof(self)


def operation_of(tensor: Node) -> bytes:
    return _OPERATIONS[tensor.op]


def node(operation: str, values: NDArray[Any] | None = None, *, name: str = "", sources: Sequence[Node] = ()) -> Node:
    """values: rows of numbers, float32 or int32."""
    made = Node(op=_OPERATIONS.index(operation.encode()), name=name.encode())
    made.ne[:] = (1, 1, 1, 1)
    made.nb[:] = (4, 4, 4, 4)
    if values is not None:
        made.type = 0 if values.dtype == np.float32 else 26
        shape = values.shape[::-1]
        made.ne[: len(shape)] = shape
        made.nb[:4] = [values.strides[::-1][min(place, len(shape) - 1)] for place in range(4)]
        made.data = values.ctypes.data
    for place, source in enumerate(sources):
        made.src[place] = source.at
    made.kept = (values, *sources)
    return made


class Graph:
    """One prior in C and the nodes of one layer's choice."""

    def __init__(self, engine: Any, sequences: int = 1, *, trusted: bool = False) -> None:
        self.lib = functions()
        self.prior = self.lib.rp_new(sequences, None)
        self.control: Control = self.lib.rp_ctl(self.prior).contents
        self.lib.rp_backend(self.prior, C.cast(_op_desc, C.c_void_p), None, None, None)
        self.lib.rp_probe(self.prior, find_in(lambda name: symbol(engine, name)), None)
        self.lib.rp_trust(self.prior, trusted)

    def close(self) -> None:
        self.lib.rp_free(self.prior)

    def why(self) -> str:
        return str(self.lib.rp_why(self.control.status).decode())

    def rows(self, sequences: Sequence[int], positions: Sequence[int], outputs: Sequence[int] | None = None) -> None:
        rows = np.array([sequences, positions], np.int32)
        flags = None if outputs is None else np.array(outputs, np.int8)
        self.lib.rp_rows(
            self.prior, len(sequences), rows[0].ctypes.data, rows[1].ctypes.data,
            None if flags is None else flags.ctypes.data,
        )  # fmt: skip

    def call(self, tensor: Node, ask: bool) -> bool:
        return bool(self.lib.rp_cb(tensor.at, ask, self.prior))

    def choose(
        self,
        scores_TE: NDArray[np.float32],
        k: int,
        *,
        layer: int = 0,
        operation: str = "ADD",
        order: NDArray[np.int32] | None = None,
        change: Callable[[Node], None] = lambda _: None,
    ) -> NDArray[np.int32]:
        """Serve one layer: the ids [T, K] as they are afterwards. order: in the place of the true ranking."""
        if order is None:
            order = np.argsort(-scores_TE, axis=1, kind="stable").astype(np.int32)
        self.choice = node(operation, scores_TE)
        self.order = node("ARGSORT", order, sources=[self.choice])
        self.top = node("VIEW", order, name=f"ffn_moe_topk-{layer}", sources=[self.order])
        self.top.ne[0], self.top.view_src = k, self.order.at
        change(self.top)
        if self.call(self.top, True):
            self.call(self.top, False)
        return order[:, :k].copy()

    def consume(self, weights: NDArray[np.float32], *, ids: Node | None = None) -> None:
        """Ask about the nodes that take the chosen ids: weights [E, OUT, IN] of the experts."""
        ids = ids or self.top
        matrices, inputs = node("NONE", weights), node("NONE", np.zeros((1, 1), np.float32))
        self.kept = node("GET_ROWS", sources=[self.choice, ids]), node("MUL_MAT_ID", sources=[matrices, inputs, ids])
        for consumer in self.kept:
            self.call(consumer, True)

    def weigh(self, scores: Node, operations: Sequence[str], *, layer: int = 0) -> None:
        """Ask about the nodes between the scores that weights are gathered from and the products' results, each of
        which takes the one before it; after `consume`."""
        flat = node("RESHAPE", sources=[scores])
        # More than one prior may follow them.
        chain = [node("GET_ROWS", name=f"ffn_moe_weights-{layer}", sources=[flat, self.top])]
        for operation in operations:
            others = [node("NONE")] if operation in ("DIV", "MUL") else []
            chain.append(node(operation, sources=[chain[-1], *others]))
        for one in chain:
            self.call(one, True)
        self.chain = chain
