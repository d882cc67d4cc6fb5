"""Router product and gate in one launch, for the few tokens of a decode step.

Programs over expert rows write logits; the one that arrives last at a counter gates. The counter goes back to 0 there,
so a captured graph replays. Ranked are the logits as written, so rounded to the output's dtype, as stock routers do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gate import LAUNCH, gate_rows, ranking, row_stride, scalars, weighing
from .rule import Rule

MAX_TOKENS = 16


@triton.jit(do_not_specialize=["gain", "flags", "held_count"])
def route_kernel(
    num_tokens, hidden, stride_ht, weight, stride_we, linear_bias, arrived, logits, bias, recency, stride_b, gain,
    flags, weights, ids, decay, added, held_count, fill, eps, scaling,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_T: tl.constexpr, LAST: tl.constexpr,
    SCORE: tl.constexpr, RANK: tl.constexpr, GROUPS: tl.constexpr, NUM: tl.constexpr, KEPT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, CHOSEN_SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr,
    NULL_FROM: tl.constexpr, MOVES: tl.constexpr, CAN_CLASH: tl.constexpr, PRICE: tl.constexpr,
):  # fmt: skip
    """Program i computes rows i * BLOCK_R and on of the logits; the last to finish gates all tokens."""
    columns_1D = tl.arange(0, BLOCK_D)[None, :]
    for first in range(0, num_tokens, BLOCK_T):
        tokens_T1 = first + tl.arange(0, BLOCK_T)[:, None]
        real_T1 = tokens_T1 < num_tokens
        for row in tl.static_range(BLOCK_R):
            # Beyond the last expert the last is done again: the same value, stored twice.
            expert = tl.minimum(tl.program_id(0) * BLOCK_R + row, E - 1)
            products_TD = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
            # Unrolled: all loads of a row are in flight at once.
            for start in tl.static_range(0, D, BLOCK_D):
                inside_1D = start + columns_1D < D
                weight_1D = tl.load(
                    weight + expert.to(tl.int64) * stride_we + start + columns_1D, mask=inside_1D, other=0.0
                )
                hidden_TD = tl.load(
                    hidden + tokens_T1 * stride_ht + start + columns_1D, mask=inside_1D & real_T1, other=0.0
                )
                weight_TD = tl.broadcast_to(weight_1D.to(tl.float32), (BLOCK_T, BLOCK_D))
                products_TD = tl.fma(weight_TD, hidden_TD.to(tl.float32), products_TD)
            sum_T1 = tl.sum(products_TD, axis=1, keep_dims=True)
            if linear_bias is not None:
                sum_T1 += tl.load(linear_bias + expert).to(tl.float32)
            tl.store(logits + tokens_T1 * E + expert, sum_T1.to(logits.dtype.element_ty), mask=real_T1)
    # All threads have stored; then one releases what they stored to whoever arrives later, and acquires theirs.
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1:
        tl.atomic_xchg(arrived, 0, sem="relaxed", scope="gpu")
        for first in range(0, num_tokens, BLOCK_T):
            rows_T1 = first + tl.arange(0, BLOCK_T)[:, None].to(tl.int64)
            gate_rows(
                rows_T1, num_tokens, logits, E, 1, bias, recency, stride_b, gain, flags, weights, ids,
                decay, added, held_count, fill, eps, scaling, E, K, BLOCK_K, BLOCK_T, LAST, SCORE, RANK, GROUPS, NUM,
                KEPT, BLOCK_G, BLOCK_M, CHOSEN_SOFTMAX, NORMALIZE, NULL_FROM, MOVES, CAN_CLASH, PRICE,
            )  # fmt: skip


class _Counters:
    """Zeroed int32 counters of a device, handed out in turn, so that launches in flight together have their own.

    Captured launches keep theirs for every replay: these come from a part that other launches never use. A first call
    that is being captured gets a counter whose zeroing is captured with it.
    """

    RUNNING, CAPTURED = 256, 4096

    def __init__(self) -> None:
        self._kept: dict[torch.device, tuple[tuple[Tensor, ...], torch.cuda.Event, int]] = {}
        self._turn = 0

    def next(self, device: torch.device) -> Tensor:
        if device.type != "cuda":
            return torch.zeros(1, dtype=torch.int32, device=device)
        capturing = torch.cuda.is_current_stream_capturing()
        stream = torch.cuda.current_stream(device)
        if device not in self._kept:
            if capturing:
                return torch.zeros(1, dtype=torch.int32, device=device)
            # Sixteen bytes apart: pointers that differ in alignment would be compiled for one by one.
            zeros = torch.zeros(4 * (self.RUNNING + self.CAPTURED), dtype=torch.int32, device=device)
            self._kept[device] = zeros.split(4), stream.record_event(), stream.stream_id
        counters, zeroed, zeroed_on = self._kept[device]
        if not capturing and stream.stream_id != zeroed_on:
            stream.wait_event(zeroed)
        self._turn += 1
        return counters[self.RUNNING + self._turn % self.CAPTURED if capturing else self._turn % self.RUNNING]


_counters = _Counters()


def fits_route(hidden_TD: Tensor, weight_ED: Tensor) -> bool:
    """Whether `launch_route` takes these: at most 16 tokens, rows contiguous."""
    return hidden_TD.shape[0] <= MAX_TOKENS and hidden_TD.stride(1) == 1 and weight_ED.stride(1) == 1


def launch_route(
    hidden_TD: Tensor, weight_ED: Tensor, linear_bias_E: Tensor | None, k: int, rule: Rule, logits_dtype: torch.dtype,
    bias_E: Tensor | None = None, recency_BE: Tensor | None = None, gain: Tensor | None = None,
    decay: float | None = None, flags_T: Tensor | None = None,
    out: tuple[Tensor, Tensor, Tensor] | None = None, held_count: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Logits [T, E] of `logits_dtype`, weights fp32 [T, K], ids int64 [T, K] for 1 <= T <= 16 tokens.

    hidden_TD, weight_ED: fp32, fp16 or bf16, last stride 1; products and sums in fp32. The rest as for `launch_gate`.

    A warp per program, and up to 256 experts a row of the weight per program: neither product nor gate waits for other
    warps, one wave of programs fills the device, and a row is in flight at once. Four tokens share a row's loads.
    """
    tokens, columns = hidden_TD.shape
    num_experts = weight_ED.shape[0]
    if out is None:
        device = hidden_TD.device
        logits_TE = torch.empty((tokens, num_experts), dtype=logits_dtype, device=device)
        weights_TK = torch.empty((tokens, k), dtype=torch.float32, device=device)
        ids_TK = torch.empty((tokens, k), dtype=torch.int64, device=device)
    else:
        logits_TE, weights_TK, ids_TK = out
    if tokens == 0:
        return logits_TE, weights_TK, ids_TK
    block_r = max(1, triton.next_power_of_2(num_experts) // 256)
    # Sixteen bytes a thread and load.
    block_d = min(triton.next_power_of_2(columns), 32 * 16 // weight_ED.element_size())
    facts = {**ranking(rule, num_experts, k, logits_TE.dtype, recency_BE is not None, held_count), **weighing(rule)}
    route_kernel[(triton.cdiv(num_experts, block_r),)](
        tokens, hidden_TD, hidden_TD.stride(0), weight_ED, weight_ED.stride(0), linear_bias_E,
        _counters.next(hidden_TD.device), logits_TE, bias_E, recency_BE, row_stride(recency_BE), gain, flags_T,
        weights_TK, ids_TK, *scalars(rule, decay, held_count),
        D=columns, BLOCK_D=block_d, BLOCK_R=block_r, BLOCK_T=min(4, triton.next_power_of_2(tokens)),
        MOVES=recency_BE is not None and decay is not None, num_warps=1, **facts, **LAUNCH,
    )  # fmt: skip
    return logits_TE, weights_TK, ids_TK
