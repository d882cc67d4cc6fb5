"""Bands: the rows of a matrix as ggml blocks, those of one type together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from remoe_adapt.expert_cache.encodings.blocks import BlockType


class Band(NamedTuple):
    """Some rows of a matrix [N, K], in their order.

    kind: how the rows are encoded.
    blocks_NB: uint8, the bytes of each row.
    order_K: int64, for columns that are stored in another order: stored column k is column order_K[k] of the matrix.
        None: as they are.
    """

    kind: BlockType
    blocks_NB: Tensor
    order_K: Tensor | None = None
