"""The definition of what the experts' kernels compute, in plain torch: the tests' reference, and what a CPU runs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .slots import DONE, FLOAT, FP8, FP8_BLOCK, GELU, GELU_TANH, INT4, INT8, MXFP4, SILU, Activation, SlotMatrix

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def dequantised(matrix: SlotMatrix, slot: int) -> Tensor:
    """The numbers of one slot's matrix, fp32 [N, K]."""
    codes = matrix.codes[slot]
    if matrix.kind == FLOAT:
        return codes.float()
    assert matrix.scales is not None
    scales = matrix.scales[slot]
    if matrix.kind == FP8:
        rows = matrix.rows // 2 if matrix.halves else matrix.rows
        blocks = -(-rows // FP8_BLOCK)
        parts = [
            scales_BC.repeat_interleave(FP8_BLOCK, 0)[:rows].repeat_interleave(FP8_BLOCK, 1)[:, : matrix.cols]
            for scales_BC in scales.split(blocks)
        ]
        return codes.float() * torch.cat(parts)
    if matrix.kind == INT8:
        codes_NK = codes.float()
    else:
        codes_NK = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1).float()
    if matrix.kind == MXFP4:
        codes_NK = torch.tensor(_E2M1, device=codes.device)[codes_NK.long()]
        scales_NG = torch.ldexp(torch.ones_like(scales, dtype=torch.float32), scales.int() - 127)
    else:
        scales_NG = scales.float()
    if matrix.minima is not None:
        minima_NG = matrix.minima[slot].float()
    else:
        minima_NG = scales_NG * (-8.0 if matrix.kind == INT4 else 0.0)
    grouped_NGK: Tensor = codes_NK.unflatten(1, (-1, matrix.group))
    return (grouped_NGK * scales_NG.unsqueeze(-1) + minima_NG.unsqueeze(-1)).flatten(1)


def activated(rows: Tensor, activation: Activation) -> Tensor:
    """What comes between the products: [..., 2I] of the first to [..., I] for the second."""
    gate, up = (rows[..., 0::2], rows[..., 1::2]) if activation.interleaved else rows.chunk(2, dim=-1)
    if activation.limit is not None:
        gate, up = gate.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    if activation.function == SILU:
        gate = gate * torch.sigmoid(activation.alpha * gate)
    elif activation.function in (GELU, GELU_TANH):
        gate = F.gelu(gate, approximate="tanh" if activation.function == GELU_TANH else "none")
    else:
        gate = F.relu(gate)
    return gate * (up + activation.shift)


def experts_reference(
    x_TD: Tensor, slots_TC: Tensor, weights_TC: Tensor, up: SlotMatrix, down: SlotMatrix, activation: Activation,
    pairs_TCD: Tensor | None = None, last: bool = True,
) -> Tensor | None:  # fmt: skip
    """Weighted sum of the chosen experts, [T, D] in the dtype of `x_TD`; all arithmetic in fp32.

    x_TD: hidden states.
    slots_TC: the slot of each choice, int32; SKIP: it counts nothing; DONE: its output lies in `pairs_TCD`.
    weights_TC: what each choice counts.
    up: the first product's matrix [2I, D].
    down: the second product's matrix [D, I].
    activation: what comes between them.
    pairs_TCD: fp32, the outputs of choices.
    last: false: write the outputs of the choices that have a slot to `pairs_TCD`, and return None.
    """
    outputs_TCD = torch.zeros(*slots_TC.shape, down.rows, device=x_TD.device)
    for slot in slots_TC.unique().tolist():
        tokens, choices = (slots_TC == slot).nonzero(as_tuple=True)
        if slot == DONE:
            assert pairs_TCD is not None
            outputs_TCD[tokens, choices] = pairs_TCD[tokens, choices]
        elif slot >= 0:
            rows = x_TD[tokens].float() @ dequantised(up, slot).T
            if up.bias is not None:
                rows = rows + up.bias[slot].float()
            # Between the products stands the dtype of the model, as in the model itself.
            hidden = activated(rows, activation).to(x_TD.dtype).float()
            outputs = hidden @ dequantised(down, slot).T
            outputs_TCD[tokens, choices] = outputs if down.bias is None else outputs + down.bias[slot].float()
    if last:
        counted_TC = torch.where(slots_TC == -1, 0.0, weights_TC.float())
        return (outputs_TCD * counted_TC.unsqueeze(-1)).sum(1).to(x_TD.dtype)
    assert pairs_TCD is not None
    has_slot_TC = slots_TC >= 0
    pairs_TCD[has_slot_TC] = outputs_TCD[has_slot_TC]
    return None
