"""The prior in numpy, for machines without a compiler: the same arithmetic, row by row, in the engine's callback.

Python is asked about every node of the graph, which costs 4 to 7 ms a token in models of 24 to 48 layers, and 8 to 16
ms with the prior itself; C costs 1 to 3 us a layer.
"""

from __future__ import annotations

import ctypes as C
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from remoe_adapt._support import say_once
from remoe_adapt.engines.llamacpp.prior.base import EnginePrior, PriorStatus
from remoe_adapt.engines.llamacpp.prior.cost import HELD_ABOVE, Ranks, held, raised
from remoe_adapt.engines.llamacpp.prior.native import LAYERS, MAX_EXPERTS, NativePrior
from remoe_adapt.engines.llamacpp.prior.weights import (
    NO_SUM,
    NO_WEIGHTS,
    WEIGHTS,
    Divided,
    Nodes,
    Owed,
    Weighing,
    can_renormalise,
    is_reachable,
    kept_part,
    scores_of,
)
from remoe_adapt.errors import MissingDependencyError
from remoe_adapt.recency_settings import Recency

MAX_CHOSEN = 64
MAX_SPAN = np.float32(1e30)
_TOPK = b"ffn_moe_topk-"
_F32, _I32 = 0, 26
_OnEval = C.CFUNCTYPE(C.c_bool, C.c_void_p, C.c_bool, C.c_void_p)
_COUNTERS = ("tokens", "changed_rows", "swapped", "kept", "chosen", "restarts", "rewinds", "refused", "calls", "ns")
# Tokens behind which a use has decayed to nothing, as in prior.c.
_REPLAYED, _FORGOTTEN = 1200, 1e-12


class Head(C.Structure):
    """struct ggml_tensor as far as it is read: sizes ne from the fastest dimension on, strides nb in bytes."""

    _fields_ = (
        ("type", C.c_int32),
        ("buffer", C.c_void_p),
        ("ne", C.c_int64 * 4),
        ("nb", C.c_size_t * 4),
        ("op", C.c_int32),
        ("op_params", C.c_int32 * 16),
        ("flags", C.c_int32),
        ("src", C.c_void_p * 10),
        ("view_src", C.c_void_p),
        ("view_offs", C.c_size_t),
        ("data", C.c_void_p),
        ("name", C.c_char * 64),
    )


def engine_prior(
    engine: Any, sequences: int, recency: Recency, *, renormalise: bool = False, only_c: bool = False
) -> EnginePrior:
    """The prior of a context of so many sequences in llama.cpp's loaded library `engine`; its gain is 0 until `set`.

    renormalise: divide the weights of the chosen experts by their sum, for a model that does in a file whose
    architecture llama.cpp does not. Without a compiler the prior is computed in numpy, which is said once; with only_c
    the MissingDependencyError is raised.
    """
    try:
        return NativePrior(engine, sequences, recency, renormalise=renormalise)
    except MissingDependencyError as error:
        if only_c:
            raise
        say_once(
            "the recency prior in llama.cpp is computed in numpy, which costs 8 to 16 ms a token in models of 24 to 48 "
            f"layers where C costs 0.1 ms: {error}"
        )
        return NumpyPrior(engine, sequences, recency, renormalise=renormalise, why=str(error))


def rank(choice_E: NDArray[np.float32], recency_E: NDArray[np.float32], k: int, gain: float) -> NDArray[np.int32]:
    """Ids [k] of the best of `choice + gain * span * recency`, best first; ties by index, NaN above everything."""
    finite = choice_E[np.isfinite(choice_E)]
    with np.errstate(over="ignore"):
        span = np.float32(finite.max() - finite.min()) if len(finite) else np.float32(0)
    scale = min(span, MAX_SPAN) * np.float32(gain)
    return best(choice_E + recency_E * scale, k)


def best(values_E: NDArray[np.float32], k: int) -> NDArray[np.int32]:
    """Ids [k] of the largest, best first; ties by index, NaN above everything."""
    return np.argsort(-keys(values_E), kind="stable")[:k].astype(np.int32)


def keys(values: NDArray[np.float32]) -> NDArray[np.int64]:
    """Whole numbers that order as the values do: NaN above everything, -0 as 0."""
    bits = values.view(np.int32)
    ordered = np.where(bits < 0, bits ^ np.int32(0x7FFFFFFF), bits)
    ordered = np.where(values == 0, 0, ordered)
    return np.where(np.isnan(values), 0x7FFFFFFF, ordered).astype(np.int64)


class NumpyPrior(EnginePrior):
    """As NativePrior; why: why there is none."""

    def __init__(
        self, engine: Any, sequences: int, recency: Recency, *, renormalise: bool = False, why: str = ""
    ) -> None:
        self._engine, self._sequences, self._renormalise, self._why_numpy = engine, sequences, renormalise, why
        engine.ggml_op_desc.argtypes, engine.ggml_op_desc.restype = [C.c_void_p], C.c_char_p
        self._on_eval = _OnEval(lambda tensor, ask, _user: self.ask(tensor, ask))
        address = C.cast(self._on_eval, C.c_void_p).value
        assert address is not None
        self.callback, self.user_data = address, 0
        self._reason = "" if has_known_layout(engine) else "tensors lie in memory in a way that is not known here"
        self._is_on, self._residents = False, _Residents()
        self._experts: dict[int, int] = {}
        self._pending: dict[int, tuple[int, set[str]]] = {}
        self._weighing: dict[int, Weighing] = {}
        self._nodes = Nodes(Head.from_address, engine.ggml_op_desc)
        self._owed: Owed | None = None
        self._used = dict.fromkeys(_COUNTERS, 0)
        self._batch: list[tuple[int, int, bool]] = []
        self._at: dict[int, int] = {}
        self.reset()
        self.set(replace(recency, gain=0.0))

    def reset(self) -> None:
        self._next = [0] * self._sequences
        self._recency: dict[tuple[int, int], NDArray[np.float32]] = {}
        self._past: dict[tuple[int, int], dict[int, NDArray[np.int32]]] = {}
        self._last: dict[tuple[int, int], NDArray[np.int32]] = {}

    def rows(self, sequences: Sequence[int], positions: Sequence[int]) -> None:
        self._miss_owed()  # of a graph that was broken off, or whose last layer weighs otherwise than it was seen to
        met: set[int] = set()
        self._batch, self._at = [], {}
        for sequence, position in zip(sequences, positions, strict=True):
            restart = False
            if sequence in met:
                restart = position not in (self._next[sequence], self._next[sequence] - 1)
            elif position == 0 or position > self._next[sequence]:
                self._used["restarts"] += position != 0
                self._begin(sequence)
            elif position < self._next[sequence]:
                self._rewind(sequence, position)
            met.add(sequence)
            self._next[sequence] = position + 1
            self._batch.append((sequence, position, restart))

    def settle(self) -> None:
        if not self._reason:
            if not self._experts:
                self._reason = "the model chooses no experts"
            elif any(found != {"GET_ROWS", "MUL_MAT_ID"} for _, found in self._pending.values()):
                self._reason = "weights or products take other ids than those of the ranking"
            elif self.recency.kind.is_priced and any(found.ranks == 0 for found in self._weighing.values()):
                self._reason = NO_WEIGHTS
            elif self.recency.kind.is_priced and any(
                found.divided and not found.can_keep for found in self._weighing.values()
            ):
                self._reason = NO_SUM
        self._is_on = not self._reason
        self.reset()
        self._used = dict.fromkeys(self._used, 0)

    def copy(self, source: int, target: int) -> None:
        self._begin(target)
        for layer in self._experts:
            if (layer, source) in self._recency:
                self._recency[layer, target] = self._recency[layer, source].copy()
                self._past[layer, target] = dict(self._past[layer, source])
                self._last[layer, target] = self._last[layer, source]
        self._next[target] = self._next[source]

    def ask(self, tensor: int, ask: bool) -> bool:
        name = C.string_at(tensor + Head.name.offset, 64).partition(b"\0")[0]
        if self._owed is not None and self._owed.is_here(tensor, self._nodes):
            if not ask:
                self._keep_weights(Head.from_address(tensor))
            return True
        if self._reason:
            return not ask
        if ask and not self._is_on:
            self._prove(tensor, Head.from_address(tensor), self._engine.ggml_op_desc(tensor))
        if self._renormalise and name.startswith(WEIGHTS):
            if not ask and self._engine.ggml_op_desc(tensor) == b"GET_ROWS":
                self._renormalise_weights(Head.from_address(tensor))
            return True
        number = name.removeprefix(_TOPK)
        if number == name or not number.isdigit() or int(number) >= LAYERS:
            return not ask
        if not ask:
            began = time.perf_counter_ns()
            self._serve(int(number), tensor)
            self._used["calls"] += 1
            self._used["ns"] += time.perf_counter_ns() - began
        return True

    def status(self) -> PriorStatus:
        used, layers = self._used, self._layers()
        return PriorStatus(
            acts=self._is_on,
            reason="on" if self._is_on else self._reason or "no graph has been seen to its end yet",
            computed_by="numpy",
            why_numpy=self._why_numpy,
            mode=self.recency.mode,
            gains=self.recency.gains(len(layers)),
            decay=self.recency.decay,
            share=self.recency.share or 0.0,
            layers=layers,
            tokens=used["tokens"],
            changed_rows=used["changed_rows"],
            swapped=used["swapped"],
            eor=used["kept"] / max(used["chosen"], 1),
            restarts=used["restarts"],
            rewinds=used["rewinds"],
            refused_rows=used["refused"],
            lost_rows=0,
            is_blind=self._residents.is_blind,
            microseconds_per_layer=used["ns"] / max(used["calls"], 1) / 1e3,
        )

    def close(self) -> None:
        self.reset()

    def _layers(self) -> tuple[int, ...]:
        return tuple(sorted(self._experts))

    def _write(self, recency: Recency) -> None:
        self._gains = dict(zip(self._layers(), recency.gain, strict=True)) if isinstance(recency.gain, tuple) else None
        self._decay = recency.decay

    def _begin(self, sequence: int) -> None:
        for kept in (self._recency, self._past, self._last):
            for key in [key for key in kept if key[1] == sequence]:
                del kept[key]

    def _rewind(self, sequence: int, position: int) -> None:
        self._used["rewinds"] += 1
        decay = self._decay
        forgotten = HELD_ABOVE if self.recency.kind.is_priced else _FORGOTTEN
        replayed = min(int(np.ceil(np.log(forgotten) / np.log(decay))), _REPLAYED) if decay > 0 else 1
        for layer, experts in self._experts.items():
            past = self._past.get((layer, sequence), {})
            kept = {at: ids_K for at, ids_K in past.items() if at < position}
            self._recency[layer, sequence] = np.zeros(experts, np.float32)
            self._past[layer, sequence] = kept
            self._last.pop((layer, sequence), None)
            for at in range(max(position - replayed, 0), position):
                if at in kept:
                    self._move_on(layer, sequence, kept[at])

    def _move_on(self, layer: int, sequence: int, ids_K: NDArray[np.int32]) -> None:
        recency_E = self._recency[layer, sequence]
        recency_E *= np.float32(self._decay)
        recency_E[ids_K] += np.float32(1 - self._decay)
        self._last[layer, sequence] = ids_K

    def _prove(self, address: int, node: Head, operation: bytes) -> None:
        """The nodes that take the chosen ids come after the choice, and take these and no others."""
        place = {b"GET_ROWS": 1, b"MUL_MAT_ID": 2}.get(operation)
        for layer, (choice, found) in self._pending.items():
            self._weighing[layer].follow(address, self._nodes)
            if place is not None and node.src[place] == choice:
                if place == 2:
                    weights = Head.from_address(node.src[0])
                    if weights.ne[2] != self._experts[layer]:
                        continue
                    self._residents.learn(layer, weights)
                # Factors of the experts may be gathered by the same ids.
                elif node.name.startswith(WEIGHTS):
                    self._weighing[layer].begin(address)
                found.add(operation.decode())

    def _off(self, reason: str) -> None:
        self._reason, self._is_on = self._reason or reason, False

    def _miss_owed(self) -> None:
        """The weights of the choice before were not met: its graph is another than the one that was seen."""
        if self._owed is not None:
            self._owed = None
            self._off(NO_SUM)

    def _keep_weights(self, node: Head) -> None:
        owed, self._owed = self._owed, None
        assert owed is not None
        if not is_reachable(node, len(owed.part_T)):
            self._off(NO_SUM)
            return
        owed.keep(_rows(node, np.float32))

    def _renormalise_weights(self, node: Head) -> None:
        if not can_renormalise(node):
            return
        part_T = np.ones(node.ne[2], np.float32)
        owed = self._owed
        if owed is not None and (owed.at, owed.top, len(owed.part_T)) == (Divided.AT_GATHER, node.src[1], len(part_T)):
            part_T, self._owed = owed.part_T, None
        _renormalise(node, part_T)

    def _scores(self, layer: int, choice_at: int, rows: int) -> Any:
        """What weights are gathered from [T, E], where ids may be rewritten; None, and off, where they may not."""
        weighing = self._weighing[layer]
        if not weighing.ranks:
            self._off(NO_WEIGHTS)
            return None
        at = choice_at
        if weighing.divided:
            at = scores_of(choice_at, self._nodes) if weighing.ranks == Ranks.SCORES else choice_at
            node = Head.from_address(at) if at and weighing.can_keep else None
            if node is None or not is_reachable(node, rows) or node.ne[0] != self._experts[layer]:
                self._off(NO_SUM)
                return None
        return _rows(Head.from_address(at), np.float32)

    def _serve(self, layer: int, tensor: int) -> None:
        self._miss_owed()
        top = Head.from_address(tensor)
        order = Head.from_address(top.view_src or tensor)
        choice_at = order.src[0]
        choice = Head.from_address(choice_at) if choice_at else None
        if choice is None or choice.type != _F32 or top.type != _I32 or choice.ne[1] != top.ne[1]:
            self._off("the ids of the chosen experts are no ranking of float32 scores")
            return
        experts, k = choice.ne[0], top.ne[0]
        if experts > MAX_EXPERTS or (k > MAX_CHOSEN and k != experts):
            self._off("more than 1024 experts, or more than 64 chosen of them")
            return
        self._experts[layer] = experts
        if not self._is_on:
            self._pending[layer] = tensor, set()
            self._weighing[layer] = Weighing(choice_at, top.ne[1], self._renormalise)
        if k == experts:  # a warm-up runs all of them
            return
        ids_TK, scores_TE = _rows(top, np.int32), _rows(choice, np.float32)
        begin = self._at.get(layer, 0)
        self._at[layer] = begin + len(ids_TK)
        if layer == min(self._experts):
            self._used["tokens"] += len(ids_TK)
        gain = self.recency.gain if self._gains is None else self._gains.get(layer, 0.0)
        assert not isinstance(gain, tuple)
        resident_E = None
        if not self.recency.kind.needs_history:
            resident_E = self._residents.look(layer, experts)
            gain = gain if resident_E is not None else 0.0
        is_priced, weighing = self.recency.kind.is_priced, self._weighing[layer]
        weighed_TE: Any = None
        part_T = np.ones(len(ids_TK), np.float32)
        if gain and self._is_on and is_priced:
            weighed_TE = self._scores(layer, choice_at, len(ids_TK))
        if gain and self._is_on and self._engine.ggml_op_desc(choice_at) == b"SOFT_MAX":
            with np.errstate(divide="ignore"):
                ranked_TE = np.log(scores_TE.astype(np.float64)).astype(np.float32)
        else:
            ranked_TE = scores_TE
        for row, ids_K in enumerate(ids_TK):
            sequence, position, restart = self._batch[begin + row] if begin + row < len(self._batch) else (0, -1, False)
            if restart:
                self._past.pop((layer, sequence), None)
                self._recency.pop((layer, sequence), None)
            recency_E = self._recency.setdefault((layer, sequence), np.zeros(experts, np.float32))
            if not _are_best(scores_TE[row], ids_K):
                self._used["refused"] += 1
                continue
            if gain and self._is_on:
                if is_priced:
                    held_E = held(recency_E, self.recency.share or 0.0, k)
                    normalise = weighing.is_normalised or self._renormalise
                    ours_K = best(raised(ranked_TE[row], held_E, ids_K, gain, weighing.ranks, normalise), k)
                    if weighing.divided and not np.array_equal(ours_K, ids_K):
                        part_T[row] = kept_part(weighing.ranks, weighed_TE[row], ours_K, ids_K)
                else:
                    ours_K = rank(ranked_TE[row], recency_E if resident_E is None else resident_E, k, gain)
                self._used["changed_rows"] += not np.array_equal(ours_K, ids_K)
                self._used["swapped"] += k - len(np.intersect1d(ours_K, ids_K))
                ids_K[:] = ours_K
            if (last_K := self._last.get((layer, sequence))) is not None:
                self._used["kept"] += len(np.intersect1d(last_K, ids_K))
                self._used["chosen"] += k
            self._move_on(layer, sequence, ids_K.copy())
            self._past.setdefault((layer, sequence), {})[position] = ids_K.copy()
        if (part_T != 1).any():
            self._owed = Owed(tensor, weighing.divided, part_T)


class _Residents:
    """Which experts are in memory, by mincore: one page in the middle of each expert in each tensor."""

    def __init__(self) -> None:
        self._tensors: dict[int, list[tuple[int, int]]] = {}
        self._mincore = C.CDLL(None).mincore
        self._mincore.argtypes, self.is_blind, self._is_checked = [C.c_void_p, C.c_size_t, C.c_void_p], False, False

    def learn(self, layer: int, weights: Head) -> None:
        kept = self._tensors.setdefault(layer, [])
        if (weights.data, weights.nb[2]) not in kept:
            kept.append((weights.data, weights.nb[2]))

    def look(self, layer: int, experts: int) -> NDArray[np.float32] | None:
        """Residency [E]; None where it is the same of all, or not known."""
        tensors = self._tensors.get(layer, [])
        if tensors and not self._is_checked:
            self._is_checked, self.is_blind = True, not _tells_the_truth(tensors[0][0])
        found_E, seen = np.zeros(experts, np.float32), C.create_string_buffer(1)
        for data, stride in () if self.is_blind else tensors:
            for expert in range(experts):
                at = (data + expert * stride + stride // 2) // mmap.PAGESIZE * mmap.PAGESIZE
                if self._mincore(at, mmap.PAGESIZE, seen) == 0:
                    found_E[expert] += (seen.raw[0] & 1) / len(tensors)
        return found_E if len(set(found_E.tolist())) > 1 else None


def _tells_the_truth(address: int) -> bool:
    """Linux tells of a mapped file only to who owns it or may write it (since 5.2)."""
    maps = Path("/proc/self/maps")
    if not maps.exists():
        return False
    for line in maps.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        span, _mode, _offset, _device, inode, *name = line.split(maxsplit=5)
        start, _, end = span.partition("-")
        if int(start, 16) <= address < int(end, 16):
            if inode == "0":
                return True
            try:
                facts = Path(name[0]).stat()
            except (OSError, IndexError):
                return False
            return facts.st_ino == int(inode) and (
                facts.st_uid == os.geteuid() or os.access(name[0], os.W_OK, effective_ids=True)
            )
    return False


def _are_best(scores_E: NDArray[np.float32], ids_K: NDArray[np.int32]) -> bool:
    """Whether the ids are distinct, in range and those of the largest scores."""
    if len(set(ids_K.tolist())) != len(ids_K) or ids_K.min() < 0 or ids_K.max() >= len(scores_E):
        return False
    key_E = keys(scores_E)
    least = key_E[ids_K].min()
    return int((key_E > least).sum()) == int((key_E[ids_K] > least).sum())


def _rows(tensor: Head, kind: type[np.generic]) -> Any:
    """A matrix of 4-byte values in the engine's memory, [rows, columns]."""
    columns, rows, stride = tensor.ne[0], tensor.ne[1], tensor.nb[1]
    if rows == 0:
        return np.empty((0, columns), kind)
    memory = (C.c_uint8 * ((rows - 1) * stride + columns * 4)).from_address(tensor.data)
    return np.ndarray((rows, columns), kind, memory, strides=(stride, 4))


def _renormalise(weights: Head, part_T: NDArray[np.float32]) -> None:
    k, stride = weights.ne[1], weights.nb[2]
    for row, part in enumerate(part_T):
        memory = (C.c_uint8 * (k * 4)).from_address(weights.data + row * stride)
        weights_K = np.ndarray((k,), np.float32, memory)
        if (total := weights_K.sum()) > 0:
            weights_K /= total
            weights_K *= part


class _InitParams(C.Structure):
    _fields_ = (("mem_size", C.c_size_t), ("mem_buffer", C.c_void_p), ("no_alloc", C.c_bool))


def has_known_layout(engine: Any) -> bool:
    """Whether a ranking and a view of it that ggml makes have their fields where `Head` reads them."""
    kinds: dict[str, tuple[list[Any], Any]] = {
        "ggml_init": ([_InitParams], C.c_void_p),
        "ggml_free": ([C.c_void_p], None),
        "ggml_new_tensor_2d": ([C.c_void_p, C.c_int, C.c_int64, C.c_int64], C.c_void_p),
        "ggml_argsort": ([C.c_void_p, C.c_void_p, C.c_int], C.c_void_p),
        "ggml_view_2d": ([C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_size_t, C.c_size_t], C.c_void_p),
        "ggml_set_name": ([C.c_void_p, C.c_char_p], C.c_void_p),
        "ggml_get_data": ([C.c_void_p], C.c_void_p),
    }
    call: dict[str, Any] = {}
    for name, (arguments, result) in kinds.items():
        try:
            function = getattr(engine, name)
        except AttributeError:
            return False
        function.argtypes, function.restype = arguments, result
        call[name] = function
    context = call["ggml_init"](_InitParams(1 << 20, None, False))
    if not context:
        return False
    scores = call["ggml_new_tensor_2d"](context, _F32, 24, 5)
    order = call["ggml_argsort"](context, scores, 1)
    top_at = call["ggml_view_2d"](context, order, 3, 5, 96, 8)
    call["ggml_set_name"](top_at, b"ffn_moe_topk-3")
    top, sorted_ = Head.from_address(top_at), Head.from_address(order)
    known = (
        top.name == b"ffn_moe_topk-3"
        and top.data == call["ggml_get_data"](top_at) == sorted_.data + 8
        and (top.view_src, top.view_offs, sorted_.view_src, sorted_.src[0]) == (order, 8, None, scores)
        and (list(top.ne), list(top.nb)[:2], top.type) == ([3, 5, 1, 1], [4, 96], _I32)
    )
    call["ggml_free"](context)
    return known
