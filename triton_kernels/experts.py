"""Experts of a layer straight from a pool of slots: which kernels, and how their threads lie on the matrices."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from .experts_few import BASES, down_kernel, up_kernel
from .experts_many import blocks_of, down_tiles_kernel, sum_kernel, up_tiles_kernel
from .slots import FLOAT, FP8, INT4, INT8, MXFP4, Activation, Coding, SlotMatrix, check_experts

# A product and its sum are one instruction; two would take twice as long.
LAUNCH: dict[str, Any] = {"enable_fp_fusion": True}
# So many tokens are computed as many products with a vector: a tensor core would multiply as often with nothing.
MAX_FEW = 8
# Outputs of pairs that wait for their sum.
_WORKSPACE_BYTES = 256 << 20
# Fewer threads along columns read in shorter pieces, which a tenth of the reads is worth.
_LITTLE_WASTE = 0.1


@dataclass(frozen=True, slots=True)
class Tiling:
    """How the threads of a program lie on a matrix, see `experts_few`.

    lanes: threads along columns, a power of two.
    rows: a thread's own rows (pairs of a gate and an up in the first product), a power of two.
    warps: of a program, whose 32 * warps / lanes other threads lie on rows, or on choices in the second product.
    chunks: neighbouring chunks of eight columns that a thread reads at a time: 1, 2, or 4 for codes of four bits.
    unroll: reads of a row in one round of the loop, so many as are under way together.
    """

    lanes: int
    rows: int
    warps: int
    chunks: int = 1
    unroll: int = 1

    @property
    def others(self) -> int:
        """Threads that lie on other rows or choices."""
        return self.warps * 32 // self.lanes


WITH_MINIMA = "int4, minima"
# First and second product; measured where `benchmarks/run.py pool sweep=true` says so.
TILINGS: dict[str, tuple[Tiling, Tiling]] = {
    FLOAT: (Tiling(128, 1, 4, unroll=2), Tiling(32, 2, 8, unroll=3)),
    INT8: (Tiling(32, 2, 4, 2, 2), Tiling(16, 4, 4, 2, 3)),
    FP8: (Tiling(32, 2, 4, 2, 2), Tiling(16, 4, 4, 2, 3)),
    INT4: (Tiling(32, 2, 4, 4, 2), Tiling(8, 4, 2, 4, 3)),
    # Triton 3.6 would spill one register with more reads under way.
    WITH_MINIMA: (Tiling(32, 2, 4, 4, 2), Tiling(8, 4, 2, 4, 1)),
    MXFP4: (Tiling(32, 2, 4, 4, 2), Tiling(8, 4, 2, 4, 3)),
}
# Tiles of the products of more tokens, for at most so many: a slot has some T * C / E of them.
TILES: tuple[tuple[float, dict[str, int]], ...] = (
    (64, {"BM": 16, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}),
    (256, {"BM": 32, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}),
    (math.inf, {"BM": 64, "BN": 64, "BK": 64, "num_warps": 4, "num_stages": 3}),
)
# Of hidden states of 4 bytes, whose products take three times as many registers.
FP32_TILE = {"BM": 16, "BN": 64, "BK": 32, "num_stages": 2}


@functools.lru_cache(maxsize=1024)
def tiling_of(coding: Coding, choices: int | None = None) -> Tiling:
    """The table's tiling of a matrix, with so many threads along columns that few of them read beyond the last one.

    choices: of a token, for a second product: threads lie on no more.
    """
    named = WITH_MINIMA if coding.kind == INT4 and coding.has_minima else coding.kind
    tiling = TILINGS[named][0 if choices is None else 1]
    if coding.kind != FLOAT:
        tiling = replace(tiling, chunks=min(tiling.chunks, coding.group // 8))
    others = tiling.others if choices is None else min(tiling.others, triton.next_power_of_2(choices))
    lanes, least = tiling.lanes, max(1, 32 // others)
    while lanes // 2 >= max(8, least) and _waste(coding, replace(tiling, lanes=lanes)) > _LITTLE_WASTE:
        lanes //= 2
    if choices is None:
        # Threads that are not needed along columns lie on more rows.
        return replace(tiling, lanes=lanes)
    lanes = max(lanes, least)
    return replace(tiling, lanes=lanes, warps=lanes * others // 32)


def _waste(coding: Coding, tiling: Tiling) -> float:
    """Share of a program's reads that is beyond the last column."""
    return 1.0 - coding.cols / _padded(coding, tiling)


def _padded(coding: Coding, tiling: Tiling) -> int:
    """Columns in whole reads of a program."""
    tile = tiling.lanes * (coding.values if coding.kind == FLOAT else tiling.chunks * 8)
    return -(-coding.cols // tile) * tile


def experts_forward(
    x_TD: Tensor, slots_TC: Tensor, weights_TC: Tensor, up: SlotMatrix, down: SlotMatrix, activation: Activation,
    pairs_TCD: Tensor | None = None, last: bool = True, tilings: tuple[Tiling, Tiling] | None = None,
) -> Tensor | None:  # fmt: skip
    """Weighted sum of the chosen experts, [T, D] in the dtype of `x_TD`: `experts_reference` as kernels.

    Choices may come in turns, as those whose slots are there and those that still arrive: all but the last call leave
    the outputs of their choices in `pairs_TCD`. The sum has the same bits however they are split.

    x_TD: fp32, fp16 or bf16, last stride 1.
    slots_TC: int32, the slot of each choice; SKIP: it counts nothing; DONE: an earlier call computed it.
    weights_TC: what each choice counts, any float.
    up: the first product's matrix [2I, D].
    down: the second product's matrix [D, I].
    activation: what comes between them.
    pairs_TCD: fp32, contiguous; None: there is one call.
    last: false: compute the choices that have a slot, and return None.
    tilings: instead of those of the table, for up to `MAX_FEW` tokens.

    Raises ValueError for shapes that do not fit.
    """
    check_experts(x_TD, slots_TC, weights_TC, up, down)
    tokens, choices = slots_TC.shape
    out_TD = torch.empty_like(x_TD)
    args = (slots_TC.contiguous(), weights_TC.contiguous(), up, down, activation)
    if 0 < tokens <= MAX_FEW:
        tilings = tilings or (tiling_of(up.coding), tiling_of(down.coding, choices))
        _forward_few(x_TD, *args, pairs_TCD, last, tilings, out_TD)
    elif pairs_TCD is not None:
        _forward_many(x_TD, *args, pairs_TCD, last, out_TD)
    elif tokens:
        step = max(MAX_FEW + 1, _WORKSPACE_BYTES // (4 * choices * x_TD.shape[1]))
        for first in range(0, tokens, step):
            some = slice(first, first + step)
            pairs = torch.empty((*slots_TC[some].shape, x_TD.shape[1]), device=x_TD.device)
            _forward_many(x_TD[some], args[0][some], args[1][some], *args[2:], pairs, last, out_TD[some])
    return out_TD if last else None


def _forward_few(
    x_TD: Tensor, slots_TC: Tensor, weights_TC: Tensor, up: SlotMatrix, down: SlotMatrix, activation: Activation,
    pairs_TCD: Tensor | None, last: bool, tilings: tuple[Tiling, Tiling], out_TD: Tensor,
) -> None:  # fmt: skip
    (tokens, choices), rows = slots_TC.shape, out_TD.shape[1]
    plan = _plan_few(up.coding, down.coding, activation, choices, tilings)
    hidden = torch.empty((tokens * choices, plan.width), dtype=x_TD.dtype, device=x_TD.device)
    up_kernel[(plan.up_programs, tokens * choices)](
        plan.up_base, x_TD, x_TD.stride(0), slots_TC, *up.arguments, hidden, **plan.up_facts
    )
    # A call that is the only one reads no pairs, but runs the same binary.
    pairs = torch.empty(4, device=x_TD.device) if pairs_TCD is None else pairs_TCD
    pair_rows, out_rows = (0, rows) if last else (rows, 0)
    down_kernel[(plan.down_programs, tokens)](
        plan.down_base, pair_rows, out_rows, hidden, slots_TC, weights_TC, *down.arguments, pairs, out_TD,
        out_TD.stride(0), **plan.down_facts,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Few:
    """What two launches need beside tensors."""

    width: int
    up_base: int
    up_programs: int
    up_facts: dict[str, Any]
    down_base: int
    down_programs: int
    down_facts: dict[str, Any]


@functools.lru_cache(maxsize=1024)
def _plan_few(up: Coding, down: Coding, activation: Activation, choices: int, tilings: tuple[Tiling, Tiling]) -> _Few:
    first, second = tilings
    width = _padded(down, second)
    up_facts = {
        "C": choices, "INNER": down.cols, "K": up.cols, "WIDTH": width, "DOWN_L": second.lanes,
        "DOWN_CHUNKS": 1 if down.kind == FLOAT else second.chunks, "MASKED": _padded(up, first) != up.cols,
        **_between(activation), **_facts(up), **_threads(first), **LAUNCH,
    }  # fmt: skip
    down_facts = {
        "C": choices, "N": down.rows, "K": down.cols, "WIDTH": width, **_facts(down), **_threads(second), **LAUNCH
    }  # fmt: skip
    return _Few(
        width,
        BASES.get(up.kind, 0),
        triton.cdiv(down.cols, first.rows * first.others),
        up_facts,
        BASES.get(down.kind, 0),
        triton.cdiv(down.rows, second.rows),
        down_facts,
    )


def _forward_many(
    x_TD: Tensor, slots_TC: Tensor, weights_TC: Tensor, up: SlotMatrix, down: SlotMatrix, activation: Activation,
    pairs_TCD: Tensor, last: bool, out_TD: Tensor,
) -> None:  # fmt: skip
    (tokens, choices), (rows, inner) = slots_TC.shape, (down.coding.rows, down.coding.cols)
    tile = next(tile for most, tile in TILES if tokens <= most)
    if x_TD.dtype == torch.float32:
        tile = tile | FP32_TILE
    blocks = blocks_of(slots_TC, tile["BM"], up.slots)
    hidden = torch.empty((tokens * choices, inner), dtype=x_TD.dtype, device=x_TD.device)
    common = (tokens * choices, blocks.order, blocks.firsts)
    up_tiles_kernel[(triton.cdiv(inner, tile["BN"]), len(blocks.firsts))](
        BASES.get(up.kind, 0), *common, x_TD, x_TD.stride(0), slots_TC, *up.arguments, hidden, C=choices, INNER=inner,
        K=up.coding.cols, **_between(activation), **_facts(up.coding), **tile, **LAUNCH,
    )  # fmt: skip
    down_tiles_kernel[(triton.cdiv(rows, tile["BN"]), len(blocks.firsts))](
        BASES.get(down.kind, 0), *common, hidden, slots_TC, *down.arguments, pairs_TCD, N=rows, K=inner,
        **_facts(down.coding), **tile, **LAUNCH,
    )  # fmt: skip
    if last:
        sum_kernel[(tokens, triton.cdiv(rows, 1024))](
            pairs_TCD, slots_TC, weights_TC, out_TD, out_TD.stride(0), C=choices, N=rows, BN=1024, **LAUNCH
        )


def _facts(coding: Coding) -> dict[str, Any]:
    """Compile-time facts of a matrix, by parameter name of the kernels."""
    return {"KIND": coding.kind, "GROUP": coding.group, "HALVES": coding.halves, "VALUES": coding.values}


def _threads(tiling: Tiling) -> dict[str, Any]:
    return {
        "R": tiling.rows, "Q": tiling.others, "L": tiling.lanes, "CHUNKS": tiling.chunks, "UNROLL": tiling.unroll,
        "num_warps": tiling.warps,
    }  # fmt: skip


def _between(activation: Activation) -> dict[str, Any]:
    return {
        "INTERLEAVED": activation.interleaved, "FUNCTION": activation.function, "ALPHA": activation.alpha,
        "LIMIT": activation.limit, "SHIFT": activation.shift,
    }  # fmt: skip
