"""The order in which experts rank, the same on every device: largest first, NaN above all, equals by lowest index."""

from __future__ import annotations

import torch
from torch import Tensor


def best_ids(values_TE: Tensor, k: int) -> Tensor:
    """Indices [T, k] of the k largest, best first; -0.0 equals 0.0, every NaN equals every other.

    As CPUs sort floats. On other devices whole numbers are sorted: CUDA does not put the NaN of each bf16 row first.
    """
    ranked_TE = values_TE if values_TE.is_cpu else ranking_keys(values_TE)
    return ranked_TE.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def ranking_keys(values: Tensor) -> Tensor:
    """Whole numbers that order as `values` do: int32, int64 for fp64."""
    wide = values if values.dtype is torch.float64 else values.float()
    whole = torch.int64 if wide.dtype is torch.float64 else torch.int32
    bits = wide.view(whole)
    largest = torch.iinfo(whole).max
    keys = torch.where(bits < 0, bits ^ largest, bits)  # the larger a negative number's bits, the smaller it is
    return keys.masked_fill(wide == 0, 0).masked_fill(wide.isnan(), largest)
