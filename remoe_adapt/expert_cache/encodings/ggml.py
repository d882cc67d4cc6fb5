"""Products with ggml's blocks by ggml's own CPU kernels, called through ctypes in the pinned wheel xllamacpp.

The kernels round activations to eight bits in blocks of 32, as llama.cpp always does: a product differs from the exact
one by some thousandths of its norm. For types of blocks of 256 they round in blocks of 256, where the largest value of
more of them sets the step. What that costs a model's logits, and where it is more than the hundredth that is promised,
docs/concepts/encodings.md says. There products are computed twice, with the rounded activations and with what rounding
took from them, and are off by less than a ten-thousandth: those of experts with types of blocks of 256, and all of
`matmul`, since every token takes every matrix of the dense part.

`ggml()` gives None where the kernels cannot be used, and says why once.

A graph of ggml's is built once for each shape and kept; a call puts in the addresses of its tensors and computes.
"""

from __future__ import annotations

import ctypes as C
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from remoe_adapt._support import mend_after_fork, printable, say_once
from remoe_adapt.errors import ConfigError, RemoeError, UncacheableError
from remoe_adapt.expert_cache.encodings import blocks
from remoe_adapt.expert_cache.encodings.blocks import (
    BF16,
    DECODED,
    F16,
    F32,
    Q8_0,
    BlockType,
    block_type,
    check_blocks,
)
from remoe_adapt.expert_cache.encodings.ggml_library import (
    I32_NUMBER,
    Context,
    load_library,
    renew_mutex,
    same_blocks,
)
from remoe_adapt.expert_cache.encodings.ggml_library import Tensor as Struct

_PLAIN = {F32: torch.float32, F16: torch.float16, BF16: torch.bfloat16}
# Graphs that wait for their next use: of that many shapes, and none with more memory of its own than this.
_MAX_SHAPES, _MAX_KEPT_BYTES = 32, 4 << 20
# What one call of mul_mat_id may take: it keeps a list of all pairs for each slot of the pool.
_MAX_WORK_BYTES = 32 << 20
# Below that many bytes of weights a second thread costs more than it computes.
_BYTES_OF_A_THREAD = 1 << 18
# From that many tokens of a slot on, its matrix is dequantised and multiplied by torch: ggml's kernels compute each
# token for itself. Measured with AVX2, 1536 x 2048, one thread.
_MANY_TOKENS = 32
# A product is wrong, not just rounded, from this relative error on; one that is computed twice, from the other one.
_TOLERANCE, _TOLERANCE_OF_TWICE = 0.03, 1e-3
# What rounding took away is computed with so many times as large: the fp16 scales of its blocks would lose it.
_REST_SCALE = 256.0
# Types whose kernels round activations in blocks of 256, to q8_K; others round them to q8_0, or to q8_1 of its codes.
_ROUNDED_IN_256 = frozenset(kind for kind in DECODED if kind.values == 256)
_Q8_K = block_type("q8_K")
_INT32 = torch.int32
# The process that has imported this.
_HOME = os.getpid()


@dataclass(frozen=True, slots=True)
class PoolMatrix:
    """The same matrix of every slot of a pool: that of slot n begins at `address` + n * `slot_bytes`.

    address: of slot 0's, in this process; the offset in the slot counts in. Whoever owns the memory keeps it.
    slots: how many there are.
    slot_bytes: from one slot's to the next one's.
    kind: the type of its blocks.
    rows: outputs of the matrix, one after another without gaps.
    cols: inputs; the last block of a row is whole.
    """

    address: int
    slots: int
    slot_bytes: int
    kind: BlockType
    rows: int
    cols: int


class _Graph:
    """Products with pools, or with one matrix, in one call of ggml; one thread at a time.

    shapes: (kind, rows, cols, slots) of the first product and, with SwiGLU between, of the second; slots are 0 for a
        matrix without a pool.
    num_tokens, num_choices: of each call.
    each: every choice has its own input.
    threads: of ggml.
    twice: a single product is computed twice for each token: W x = W a + W (x - a) with a = x rounded as ggml's kernels
        do. They find a as it is, and round x - a, which is a hundredth of x.
    """

    def __init__(
        self,
        library: Any,
        shapes: tuple[tuple[BlockType, int, int, int], ...],
        num_tokens: int,
        num_choices: int,
        each: bool,
        threads: int,
        twice: bool,
    ) -> None:
        self._library = library
        self._compute = library.ggml_graph_compute
        self._context = context = Context(library)
        new_3d = library.ggml_new_tensor_3d
        first, cols = shapes[0][0], shapes[0][2]
        padded = first.padded(cols)
        self._is_twice = twice
        columns = num_tokens * (2 if twice else 1)
        inputs = (num_choices if each else 1) if shapes[0][3] else columns
        x = new_3d(context.pointer, F32.number, padded, inputs, columns if shapes[0][3] else 1)
        ids = library.ggml_new_tensor_2d(context.pointer, I32_NUMBER, num_choices, columns)
        self._x, self._ids = x.contents, ids.contents
        self._weights: list[Struct] = []
        between: list[Any] = []
        # Kept: the structs point into them.
        with torch.inference_mode(False):
            # Of zeros, so that columns beyond the matrix count nothing; else the caller's own memory is read.
            self._copied = torch.zeros(inputs * (columns if shapes[0][3] else 1), padded)
            self._inputs = self._copied[:, :cols]
            self._is_padded, self._cols = padded != cols, cols
            if twice:
                rounding = _rounding(first)
                self._round = getattr(library, f"quantize_row_{rounding.name}_ref")
                self._widen = getattr(library, f"dequantize_row_{rounding.name}")
                self._rounded, self._rest = self._copied.chunk(2)
                self._inputs = self._rest[:, :cols]
                self._codes = torch.empty(len(self._rest), rounding.row_bytes(cols), dtype=torch.uint8)
                self._ids_2TC = torch.empty(2, num_tokens, num_choices, dtype=_INT32)
                self._parts_2P = torch.empty(2, num_tokens * num_choices * shapes[-1][1])
            result = x
            for number, (kind, rows, size, slots) in enumerate(shapes):
                if number:
                    result = library.ggml_swiglu(context.pointer, result)
                    between.append(result)
                weight = new_3d(context.pointer, kind.number, kind.padded(size), rows, max(1, slots))
                self._weights.append(weight.contents)
                if slots:
                    result = library.ggml_mul_mat_id(context.pointer, weight, result, ids)
                else:
                    result = library.ggml_mul_mat(context.pointer, weight, result)
                between.append(result)
            self._result = between.pop().contents
            self._between = [torch.empty(library.ggml_nbytes(p), dtype=torch.uint8) for p in between]
            for pointer, memory in zip(between, self._between, strict=True):
                pointer.contents.data = memory.data_ptr()
            self._graph = context.graph()
            library.ggml_build_forward_expand(self._graph, result)
            # Without one of its own, ggml would make a thread pool for each call.
            params = C.create_string_buffer(4096)
            library.ggml_threadpool_params_init(params, threads)
            self._threadpool = library.ggml_threadpool_new(params)
            self._plan = plan = library.ggml_graph_plan(self._graph, threads, self._threadpool)
            if not 1 <= plan.n_threads <= threads or plan.threadpool != self._threadpool:
                raise RemoeError("its plans of a computation have another form")
            self._work = torch.empty(plan.work_size + 64, dtype=torch.uint8)
            plan.work_data = self._work.data_ptr() + -self._work.data_ptr() % 64
        self._plan_pointer = C.byref(plan)
        self.kept_bytes = len(self._work) + self._copied.nbytes + sum(len(memory) for memory in self._between)
        if twice:
            self.kept_bytes += self._codes.nbytes + self._ids_2TC.nbytes + self._parts_2P.nbytes

    def __del__(self) -> None:
        if getattr(self, "_threadpool", None):
            self._library.ggml_threadpool_free(self._threadpool)

    def abandon(self) -> None:
        """In the child of a fork: leave the thread pool as it is, for its threads cannot be waited for."""
        self._threadpool = None

    def put_pools(self, pools: tuple[PoolMatrix, ...]) -> None:
        """The next calls are for these pools, of the shapes that the graph was built for."""
        for weight, pool in zip(self._weights, pools, strict=True):
            weight.data, weight.nb2, weight.nb3 = pool.address, pool.slot_bytes, pool.slot_bytes * pool.slots

    def put_matrix(self, address: int) -> None:
        """The next call is for the matrix that begins there."""
        self._weights[0].data = address

    def run(self, x: Tensor, slots_TC: Tensor | None, result: Tensor) -> None:
        """Compute fp32 results from inputs [..., cols] and int32 slots; none for a matrix without a pool.

        Raises RemoeError when ggml reports an error.
        """
        if self._is_twice:
            self._run_twice(x, slots_TC, result)
            return
        if x.dtype is torch.float32 and not self._is_padded and x.is_contiguous():
            self._x.data = x.data_ptr()
        else:
            self._put_inputs(x)
            self._x.data = self._copied.data_ptr()
        self._start(slots_TC, result)

    def _run_twice(self, x: Tensor, slots_TC: Tensor | None, result: Tensor) -> None:
        self._put_inputs(x)
        rest, codes, rounded, count = self._rest, self._codes.data_ptr(), self._rounded, self._rest.numel()
        self._round(rest.data_ptr(), codes, count)
        self._widen(codes, rounded.data_ptr(), count)
        rest.sub_(rounded).mul_(_REST_SCALE)
        self._x.data = self._copied.data_ptr()
        if slots_TC is not None:
            slots_TC = self._ids_2TC.copy_(slots_TC)
        self._start(slots_TC, self._parts_2P)
        torch.add(self._parts_2P[0], self._parts_2P[1], alpha=1 / _REST_SCALE, out=result.view(-1))

    def _put_inputs(self, x: Tensor) -> None:
        x = x.detach() if x.requires_grad else x
        self._inputs.copy_(x if x.ndim == 2 else x.reshape(-1, self._cols))

    def _start(self, slots_TC: Tensor | None, result: Tensor) -> None:
        self._ids.data = 0 if slots_TC is None else slots_TC.data_ptr()
        self._result.data = result.data_ptr()
        if status := self._compute(self._graph, self._plan_pointer):
            raise RemoeError(f"ggml could not compute a product (status {status}).")


class Ggml:
    """ggml's kernels. Any number of threads may call at once; each call uses torch's number of threads.

    types: the block types whose products passed the self-test.
    """

    def __init__(self, library: Any) -> None:
        self._library = library
        # Shape -> graphs that wait. Lists and dicts change in one step here, so no lock is needed: a graph is taken out
        # for a call, and what two threads put back at the same time stays or is freed.
        self._waiting: OrderedDict[tuple[Any, ...], list[_Graph]] = OrderedDict()
        self._is_child = os.getpid() != _HOME
        self._decoders: dict[BlockType, Callable[..., None]] = {}
        self._encoders: dict[BlockType, Callable[..., int]] = {}
        self.types = frozenset(kind for kind in DECODED if same_blocks(library, kind))
        mend_after_fork(self)
        self.types = frozenset(kind for kind in self.types if self._passes(kind))
        if not self.types:
            raise RemoeError("no type of blocks passed the self-test")

    def after_fork(self) -> None:
        """In the child of a fork: OpenMP's threads are gone, and other threads of the parent may have held a mutex."""
        self._is_child = True
        for graphs in self._waiting.values():
            for graph in graphs:
                graph.abandon()
        self._waiting = OrderedDict()
        renew_mutex(self._library)

    def dequantise(self, blocks_NB: Tensor, kind: BlockType, cols: int) -> Tensor:
        """fp32 [N, cols]; quicker than `blocks.dequantise`, and off it by a rounding at most.

        blocks_NB: uint8 [N, kind.row_bytes(cols)].

        Raises UncacheableError for a type that is not in `types`, and for tensors that are no such rows.
        """
        self._check_type(kind)
        if (decoder := self._decoders.get(kind)) is None:
            return blocks.dequantise(blocks_NB, kind, cols)
        check_blocks(blocks_NB, kind, cols)
        blocks_NB = blocks_NB.contiguous()
        numbers_NK = torch.empty(len(blocks_NB), kind.padded(cols))
        decoder(blocks_NB.data_ptr(), numbers_NK.data_ptr(), numbers_NK.numel())
        return numbers_NK if numbers_NK.shape[1] == cols else numbers_NK[:, :cols].contiguous()

    def quantise(self, weight_NK: Tensor, kind: BlockType) -> Tensor:
        """Blocks uint8 [N, kind.row_bytes(K)] that ggml's own quantiser makes of a weight; rows are padded with zeros.

        weight_NK: floats.

        Raises UncacheableError for a type that is not in `types`, and for a weight that is no finite matrix.
        """
        self._check_type(kind)
        if weight_NK.ndim != 2 or not weight_NK.numel() or not torch.isfinite(weight_NK).all():
            raise UncacheableError(f"A weight of shape {list(weight_NK.shape)} cannot be quantised: it is no matrix of "
                                   "finite numbers. Is the checkpoint damaged?")  # fmt: skip
        if kind in _PLAIN:
            return weight_NK.detach().to(_PLAIN[kind]).contiguous().view(torch.uint8)
        num_rows, cols = weight_NK.shape
        padded_NK = torch.nn.functional.pad(weight_NK.detach().float(), (0, kind.padded(cols) - cols)).contiguous()
        blocks_NB = torch.empty(num_rows, kind.row_bytes(cols), dtype=torch.uint8)
        size = self._encoders[kind](padded_NK.data_ptr(), blocks_NB.data_ptr(), num_rows, padded_NK.shape[1], None)
        if size != blocks_NB.nbytes:
            raise RemoeError(f"ggml made {size} bytes of {kind.name} where {blocks_NB.nbytes} belong.")
        return blocks_NB

    def matmul(self, x_TK: Tensor, blocks_NB: Tensor, kind: BlockType, rows: int) -> Tensor:
        """fp32 [T, N]: x times the transposed matrix, without a gradient.

        x_TK: floats [T, K].
        blocks_NB: uint8 [N, kind.row_bytes(K)].
        rows: N.

        Raises UncacheableError for a type that is not in `types`, and ConfigError for tensors that do not fit.
        """
        self._check_type(kind)
        if x_TK.ndim != 2 or not (x_TK.is_floating_point() and x_TK.is_cpu and blocks_NB.is_cpu):
            raise ConfigError(
                f"Inputs {x_TK.dtype} {list(x_TK.shape)} on {x_TK.device} and blocks on {blocks_NB.device} have no "
                "product by ggml: it takes floats [tokens, columns] in this machine's memory."
            )
        num_tokens, cols = x_TK.shape
        check_blocks(blocks_NB, kind, cols)
        if len(blocks_NB) != rows:
            raise ConfigError(f"{len(blocks_NB)} rows of blocks are given for a matrix of {rows} rows.")
        blocks_NB = blocks_NB.contiguous()
        result_TN = torch.empty(num_tokens, rows)
        if result_TN.numel():
            threads = self._threads(blocks_NB.nbytes)
            key = (kind.number, rows, cols, 0, num_tokens, threads)
            graph = self._take(key)
            if graph is None:
                shapes, twice = ((kind, rows, cols, 0),), kind not in _PLAIN
                graph = _Graph(self._library, shapes, num_tokens, 1, False, threads, twice)
            graph.put_matrix(blocks_NB.data_ptr())
            graph.run(x_TK, None, result_TN)
            self._put_back(key, graph)
            if not _is_finite(result_TN):
                result_TN = torch.nn.functional.linear(x_TK.detach().float(), self.dequantise(blocks_NB, kind, cols))
        return result_TN

    def expert_matmul(self, x: Tensor, slots_TC: Tensor, weights: PoolMatrix) -> Tensor:
        """fp32 [T, C, N]: for each token its inputs times the transposed matrices of the slots that it chose; without
        a gradient.

        x: floats [T, K], one input for all choices of a token, or [T, C, K], one for each.
        slots_TC: integers [T, C], numbers of slots.
        weights: the matrices.

        Raises UncacheableError for a type that is not in `types`, and ConfigError for tensors that do not fit.
        """
        slots_TC = self._checked(x, slots_TC, weights)
        num_tokens, num_choices = slots_TC.shape
        result_TCN = torch.empty(num_tokens, num_choices, weights.rows)
        if num_tokens >= _MANY_TOKENS and _are_many(slots_TC):
            self._by_slot(x, slots_TC, weights, result_TCN)
        elif num_tokens * num_choices:
            self._in_pieces((weights,), x, slots_TC, result_TCN)
            if not _is_finite(result_TCN):
                self._by_slot(x, slots_TC, weights, result_TCN)
        return result_TCN

    def expert_mlp(self, x_TD: Tensor, slots_TC: Tensor, up: PoolMatrix, down: PoolMatrix) -> Tensor:
        """fp32 [T, C, D]: SwiGLU experts, `down` of silu(gate) * up, in one call.

        x_TD: floats [T, D].
        slots_TC: integers [T, C], numbers of slots.
        up: the matrices whose first half of rows is the gate, and the second what it multiplies.
        down: the matrices with half as many columns, in the same slots.

        Raises UncacheableError for a type that is not in `types`, and ConfigError for tensors that do not fit.
        """
        slots_TC = self._checked(x_TD, slots_TC, up)
        self._check_type(down.kind)
        if up.rows != 2 * down.cols or up.slots != down.slots or x_TD.ndim != 2:
            raise ConfigError(
                f"Experts of {up.rows} rows in {up.slots} slots, then {down.cols} columns in {down.slots}, are no "
                f"SwiGLU experts for inputs {list(x_TD.shape)}: the rows are twice the columns."
            )
        # Inner results of a matrix whose last block is not full would need columns of zeros beside them, and products
        # that are computed twice need sums between.
        num_tokens, num_choices = slots_TC.shape
        is_whole = down.cols % down.kind.values == 0 and _ROUNDED_IN_256.isdisjoint((up.kind, down.kind))
        if is_whole and not (num_tokens >= _MANY_TOKENS and _are_many(slots_TC)):
            result_TCD = torch.empty(num_tokens, num_choices, down.rows)
            if num_tokens * num_choices:
                self._in_pieces((up, down), x_TD, slots_TC, result_TCD)
            if _is_finite(result_TCD):
                return result_TCD
        gate_TCI, up_TCI = self.expert_matmul(x_TD, slots_TC, up).chunk(2, dim=-1)
        return self.expert_matmul(torch.nn.functional.silu(gate_TCI) * up_TCI, slots_TC, down)

    def _by_slot(self, x: Tensor, slots_TC: Tensor, weights: PoolMatrix, result_TCN: Tensor) -> None:
        """Compute with one slot after another, each dequantised for all its tokens."""
        matrix_bytes = weights.rows * weights.kind.row_bytes(weights.cols)
        x_PK, result_PN = x.detach().reshape(-1, weights.cols), result_TCN.view(-1, weights.rows)
        pairs_of_a_row = slots_TC.shape[1] if x.ndim == 2 else 1
        slots_P, order_P = slots_TC.view(-1).sort(stable=True)
        numbers, counts = slots_P.unique_consecutive(return_counts=True)
        for slot, pairs_p in zip(numbers.tolist(), order_P.split(counts.tolist()), strict=True):
            memory = (C.c_uint8 * matrix_bytes).from_address(weights.address + slot * weights.slot_bytes)
            blocks_NB = torch.frombuffer(memory, dtype=torch.uint8).view(weights.rows, -1)
            weight_NK = self.dequantise(blocks_NB, weights.kind, weights.cols)
            x_pK = x_PK[pairs_p // pairs_of_a_row].float()
            result_PN[pairs_p] = torch.nn.functional.linear(x_pK, weight_NK)

    def _in_pieces(self, pools: tuple[PoolMatrix, ...], x: Tensor, slots_TC: Tensor, result: Tensor) -> None:
        """Compute with so many tokens at a time that ggml's lists of them stay small."""
        num_tokens, num_choices = slots_TC.shape
        columns = num_choices * (2 if pools[0].kind in _ROUNDED_IN_256 else 1)
        step = max(1, _MAX_WORK_BYTES // (8 * pools[0].slots * columns))
        if num_tokens <= step:
            self._product(pools, x, slots_TC, result)
            return
        for start in range(0, num_tokens, step):
            piece = slice(start, start + step)
            self._product(pools, x[piece], slots_TC[piece], result[piece])

    def _product(self, pools: tuple[PoolMatrix, ...], x: Tensor, slots_TC: Tensor, result: Tensor) -> None:
        num_tokens, num_choices = slots_TC.shape
        first, last, each = pools[0], pools[-1], x.ndim == 3
        threads = self._threads(num_choices * first.rows * first.cols // 2)
        key = (
            first.kind.number, first.rows, first.cols, first.slots, num_tokens, num_choices, each, threads,
            len(pools), last.kind.number, last.rows, last.cols,
        )  # fmt: skip
        graph = self._take(key)
        if graph is None:
            shapes = tuple((pool.kind, pool.rows, pool.cols, pool.slots) for pool in pools)
            twice = first.kind in _ROUNDED_IN_256
            graph = _Graph(self._library, shapes, num_tokens, num_choices, each, threads, twice)
        graph.put_pools(pools)
        graph.run(x, slots_TC, result)
        self._put_back(key, graph)

    def _checked(self, x: Tensor, slots_TC: Tensor, weights: PoolMatrix) -> Tensor:
        """The slots as int32 one after another. Raises as `expert_matmul` says: ggml would read beyond the pool."""
        self._check_type(weights.kind)
        shape, inputs = slots_TC.shape, x.shape
        if (
            len(shape) != 2
            or inputs[0] != shape[0]
            or inputs[-1] != weights.cols
            or not (len(inputs) == 2 or (len(inputs) == 3 and inputs[1] == shape[1]))
            or not (x.is_floating_point() and x.is_cpu and slots_TC.is_cpu)
        ):
            raise ConfigError(
                f"Inputs {x.dtype} {list(inputs)} on {x.device} and slots {list(shape)} on {slots_TC.device} do not "
                f"fit matrices of {weights.cols} columns: ggml takes floats [tokens, columns], or [tokens, choices, "
                "columns], and slots [tokens, choices], in this machine's memory."
            )
        if not slots_TC.is_contiguous():
            slots_TC = slots_TC.contiguous()
        if shape[0] == 1:
            numbers = slots_TC.tolist()[0]
        else:
            numbers = [int(n) for n in slots_TC.aminmax()] if slots_TC.numel() else []
        if numbers and (min(numbers) < 0 or max(numbers) >= weights.slots):
            raise ConfigError(f"Slots {min(numbers)} to {max(numbers)} are asked for; the pool has {weights.slots}.")
        return slots_TC if slots_TC.dtype is _INT32 else slots_TC.to(_INT32)

    def _passes(self, kind: BlockType) -> bool:
        """Whether this type's functions are there, and their results those of exact arithmetic but for rounding."""
        if kind not in _PLAIN:
            encoder = getattr(self._library, f"quantize_{kind.name}", None)
            decoder = getattr(self._library, f"dequantize_row_{kind.name}", None)
            if encoder is None or decoder is None:
                return False
            encoder.argtypes, encoder.restype = [C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_void_p], C.c_size_t
            decoder.argtypes, decoder.restype = [C.c_void_p, C.c_void_p, C.c_int64], None
            self._encoders[kind], self._decoders[kind] = encoder, decoder
            rounding = _rounding(kind).name
            for name in (f"quantize_row_{rounding}_ref", f"dequantize_row_{rounding}"):
                if (function := getattr(self._library, name, None)) is None:
                    return False
                function.argtypes, function.restype = [C.c_void_p, C.c_void_p, C.c_int64], None
        # Three slots with gaps, two tokens that choose two of them; the last block of a row is not full.
        rows, cols, slots = 24, 2 * kind.values + (8 if kind.values > 1 else 64), 3
        random = torch.Generator().manual_seed(kind.number)
        weights_SNK = torch.randn(slots, rows, cols, generator=random)
        matrix_bytes = rows * kind.row_bytes(cols)
        pool_SB = torch.zeros(slots, matrix_bytes + 96, dtype=torch.uint8)
        exact = []
        for slot_B, weight_NK in zip(pool_SB, weights_SNK, strict=True):
            blocks_NB = self.quantise(weight_NK, kind)
            slot_B[32 : 32 + matrix_bytes] = blocks_NB.view(-1)
            exact.append(blocks.dequantise(blocks_NB, kind, cols))
            if not _close(self.dequantise(blocks_NB, kind, cols), exact[-1], 1e-5):
                return False
        x_TK = torch.randn(2, cols, generator=random)
        pool = PoolMatrix(pool_SB.data_ptr() + 32, slots, pool_SB.stride(0), kind, rows, cols)
        slots_TC = torch.tensor([[2, 0], [1, 2]], dtype=_INT32)
        expected_TCN = torch.stack([torch.stack([x_TK[t] @ exact[s].T for s in slots_TC[t]]) for t in range(2)])
        found_TCN = self.expert_matmul(x_TK, slots_TC, pool)
        found_1N = self.matmul(x_TK[:1], pool_SB[1, 32 : 32 + matrix_bytes].view(rows, -1), kind, rows)
        tolerance = _TOLERANCE_OF_TWICE if kind in _ROUNDED_IN_256 else _TOLERANCE
        tolerance_1 = _TOLERANCE if kind in _PLAIN else _TOLERANCE_OF_TWICE
        return _close(found_TCN, expected_TCN, tolerance) and _close(found_1N, x_TK[:1] @ exact[1].T, tolerance_1)

    def _check_type(self, kind: BlockType) -> None:
        if kind not in self.types:
            raise UncacheableError(f"ggml has no products with {kind.name} here: dequantise instead.")

    def _threads(self, weight_bytes: int) -> int:
        # In the child of a fork OpenMP waits for ever for threads that were the parent's.
        if self._is_child or weight_bytes < _BYTES_OF_A_THREAD:
            return 1
        return torch.get_num_threads()

    def _take(self, key: tuple[Any, ...]) -> _Graph | None:
        graphs = self._waiting.get(key)
        try:
            return graphs.pop() if graphs else None
        except IndexError:  # Another thread has taken it since.
            return None

    def _put_back(self, key: tuple[Any, ...], graph: _Graph) -> None:
        if graph.kept_bytes > _MAX_KEPT_BYTES:
            return
        waiting = self._waiting
        waiting.setdefault(key, []).append(graph)
        try:
            waiting.move_to_end(key)
            if len(waiting) > _MAX_SHAPES:
                waiting.popitem(last=False)
        except KeyError:  # Another thread has let go of it since.
            return


def _are_many(slots_TC: Tensor) -> bool:
    """Whether the slots have so many tokens that their matrices are better dequantised."""
    pairs = slots_TC.numel()
    # The cheaper question first: how many slots there are is a sort.
    return pairs >= _MANY_TOKENS and pairs >= _MANY_TOKENS * len(slots_TC.unique())


def _is_finite(result: Tensor) -> bool:
    """Whether a product is to be trusted: kernels keep scales and sums of rounded activations in fp16, in which large
    ones become infinite."""
    return isfinite(result.sum())


def _rounding(kind: BlockType) -> BlockType:
    return _Q8_K if kind in _ROUNDED_IN_256 else Q8_0


def _close(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    return bool((found - expected).norm() <= tolerance * expected.norm())


@cache
def ggml() -> Ggml | None:
    """ggml's kernels, loaded and tested once in a process; None where they cannot be used, which is said once."""
    try:
        return Ggml(load_library())
    except Exception as error:
        say_once(
            f"ggml's kernels are not used ({printable(error)}): "
            "pip install 'remoe-adapt[llamacpp]' brings the version that is known."
        )
        return None
