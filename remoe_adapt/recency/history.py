"""What the routers chose for the tokens of a KV cache, kept so that the recency can go back when the cache is cropped.

Shapes: L routers, B sequences, S tokens of each, K chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# Forwards, and single tokens behind them, that are kept one by one before they are joined.
_JOINED_AT = 256


class Forward(NamedTuple):
    """S tokens of each sequence: flags [B, S] as in PriorStep, or None; ids [B * S, K] by layer.

    A router that the forward did not ask (it took an early exit, or other experts serve its kind of token) has no ids:
    its recency did not move.
    """

    tokens: int
    flags_BS: Tensor | None
    ids: Mapping[int, Tensor]


class History:
    """The forwards of L routers, in order.

    has_gaps: some router was not asked in some forward; known after `join`.
    """

    def __init__(self, layers: int) -> None:
        self._layers = layers
        self._forwards: list[Forward] = []
        # Single tokens for which every router was asked, [L * B, K], after the forwards: one tensor for a token takes
        # new memory once, where one for each router would push the weights out of the processor's cache.
        self._tokens: list[Tensor] = []
        self.has_gaps = False

    def append(self, tokens: int, flags_BS: Tensor | None, ids: Mapping[int, Tensor]) -> None:
        """Add a forward; `ids` may be filled until the next one comes."""
        if tokens > 0:
            self._stack_tokens()
            if len(self._forwards) > _JOINED_AT:
                self.join()
            self._forwards.append(Forward(tokens, flags_BS, ids))

    def append_token(self, ids_NK: Tensor) -> None:
        """Add one token of each sequence: what the first router chose for them, then the second, ids [L * B, K]."""
        self._tokens.append(ids_NK)
        if len(self._tokens) > _JOINED_AT:
            self.join()

    def join(self) -> Forward:
        """All forwards as one, ids [B, S, K] int16, -1 where a router was not asked; routers never asked have none."""
        self._stack_tokens()
        self.has_gaps |= any(len(forward.ids) < self._layers for forward in self._forwards)
        parts = {layer: self._joined_ids(layer) for layer in range(self._layers)}
        ids = {layer: ids_BSK for layer, ids_BSK in parts.items() if ids_BSK is not None}
        joined = Forward(sum(forward.tokens for forward in self._forwards), self._joined_flags(), ids)
        self._forwards = [joined]
        return joined

    def crop(self, tokens: int) -> None:
        """Keep the first `tokens` of each sequence."""
        _, flags_BS, ids = self.join()
        flags_BS = None if flags_BS is None else flags_BS[:, :tokens]
        self._forwards = [Forward(tokens, flags_BS, {layer: ids_BSK[:, :tokens] for layer, ids_BSK in ids.items()})]

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order."""
        if self._forwards or self._tokens:
            tokens, flags_BS, ids = self.join()
            flags_BS = None if flags_BS is None else flags_BS[rows.to(flags_BS.device)]
            kept = {layer: ids_BSK[rows.to(ids_BSK.device)] for layer, ids_BSK in ids.items()}
            self._forwards = [Forward(tokens, flags_BS, kept)]

    def _stack_tokens(self) -> None:
        if self._tokens:
            ids_NSK = torch.stack(self._tokens, dim=1).to(torch.int16)
            self._forwards.append(Forward(len(self._tokens), None, dict(enumerate(ids_NSK.chunk(self._layers)))))
            self._tokens = []

    def _joined_ids(self, layer: int) -> Tensor | None:
        parts = [
            None if (ids := forward.ids.get(layer)) is None else ids.reshape(-1, forward.tokens, ids.shape[-1])
            for forward in self._forwards
        ]
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        whole = [
            like.new_full((len(like), forward.tokens, like.shape[-1]), -1, dtype=torch.int16)
            if part is None
            else part.to(torch.int16)
            for part, forward in zip(parts, self._forwards, strict=True)
        ]
        return torch.cat(whole, dim=1)

    def _joined_flags(self) -> Tensor | None:
        like = next((forward.flags_BS for forward in self._forwards if forward.flags_BS is not None), None)
        if like is None:
            return None
        whole = [
            like.new_zeros((len(like), forward.tokens)) if forward.flags_BS is None else forward.flags_BS
            for forward in self._forwards
        ]
        return torch.cat(whole, dim=1)
