"""The recency of the sequences of one KV cache: moved on by gates, reordered and cropped with the cache.

Shapes: L routers, B sequences, S tokens of each, E experts, K chosen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remoe_adapt.gating.reference import PADDING, RESTART, PriorStep

if TYPE_CHECKING:
    from remoe_adapt.gating.prior import RecencyPrior

# What a token leaves behind is forgotten below this.
_FORGOTTEN = 1e-12
# Forwards whose choices are kept one by one before they are joined.
_JOIN = 256


class RecencyState:
    """The recency [B, E] of each router after `length` tokens (padding counted) of B sequences.

    `chosen` holds, per router, what was chosen since token `past`, forward by forward as `flags` do, so that `crop` can
    go back; None where that is not kept (`length` stands still then). A router that a forward did not ask (it took an
    early exit, or other experts serve its kind of token) has None there: its recency did not move.
    """

    def __init__(self, prior: RecencyPrior, recency: list[Tensor], past: int = 0, *, croppable: bool = True) -> None:
        self.prior, self.past, self.length = prior, past, past
        self.chosen: list[list[Tensor | None]] | None = [[] for _ in recency] if croppable else None
        self.flags: list[Tensor | int] = []
        self._has_gaps = False
        # Whether the cache tells its length as a number.
        self.is_counted = False
        self._late: list[dict[int, Tensor]] = []  # by layer, token by token
        self._hold(recency)

    @property
    def recency(self) -> list[Tensor]:
        """[B, E] of each router."""
        self.catch_up()
        return self._recency

    @property
    def steps(self) -> list[PriorStep]:
        """The prior of each router for the next token."""
        self.catch_up()
        return self.late_steps

    def _hold(self, recency: list[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            alike = len({(recency_BE.shape, recency_BE.device) for recency_BE in recency}) == 1
            # In one piece where that goes, so that a token moves all of it at once.
            self._whole_LBE = torch.stack(recency) if alike else None
        self._recency = recency if self._whole_LBE is None else list(self._whole_LBE.unbind())
        self.placed, self.sequences = self.prior.placed, len(recency[0])
        decay = self.prior.decay
        # Good for a gain of 0 whenever, for others after `catch_up`.
        parts = zip(self._recency, self.prior.gains, strict=True)
        self.late_steps = [PriorStep(part, gain, decay) for part, gain in parts]

    def is_next(self, prior: RecencyPrior, length: Any) -> bool:
        """Whether one more token of one sequence simply comes after those known, `length` being in the cache."""
        return (
            self.length == length and self.chosen is not None and self.sequences == 1
            and self.prior is prior and self.placed == prior.placed
        )  # fmt: skip

    def move(self, chosen: dict[int, Tensor]) -> None:
        """Take in what the routers chose for one token of one sequence, after `advance`: ids [1, K] by layer."""
        self._keep(chosen)
        self._move(chosen)

    def move_late(self, chosen: dict[int, Tensor]) -> None:
        """`advance` by a token that `is_next`, and `move`: as soon as somebody asks."""
        self._late.append(chosen)
        self.length += 1
        if len(self._late) > _JOIN:
            self.catch_up()

    def catch_up(self) -> None:
        """What was to move late moves now."""
        if not self._late:
            return
        late, self._late = self._late, []
        self.length -= len(late)
        for chosen in late:
            self.advance(1, None)
            self._keep(chosen)
        if len(late) > self._remembered and all(len(chosen) == len(self._recency) for chosen in late):
            late = late[-self._remembered :]
            for part in self._parts():
                part.zero_()
        for chosen in late:
            self._move(chosen)

    @property
    def _remembered(self) -> int:
        """Tokens after which nothing is left of one."""
        decay = self.prior.decay
        return 1 if decay == 0.0 else math.ceil(math.log(_FORGOTTEN) / math.log(decay))

    def _parts(self) -> list[Tensor]:
        return self._recency if self._whole_LBE is None else [self._whole_LBE]

    def _keep(self, chosen: dict[int, Tensor]) -> None:
        if self.chosen is not None:
            for layer, ids_1K in chosen.items():
                self.chosen[layer].append(ids_1K)

    def _move(self, chosen: dict[int, Tensor]) -> None:
        decay = self.prior.decay
        widths = {ids_1K.shape[-1] for ids_1K in chosen.values()}
        if self._whole_LBE is not None and len(chosen) == len(self._recency) and len(widths) == 1:
            ids_LK = torch.cat([chosen[layer] for layer in range(len(chosen))]).long()
            whole_LE = self._whole_LBE.view(len(chosen), -1)
            share = whole_LE.new_full((1, 1), 1.0 - decay).expand(ids_LK.shape)
            whole_LE.mul_(decay).scatter_add_(1, ids_LK, share)
        else:
            for layer, ids_1K in chosen.items():
                recency_1E = self._recency[layer]
                recency_1E.mul_(decay).scatter_add_(1, ids_1K.long(), recency_1E.new_full(ids_1K.shape, 1.0 - decay))

    def bind(self, prior: RecencyPrior) -> bool:
        """Go on under another prior object (a copy of the cache has a copied one), if it means the same."""
        alike = (prior.mode, prior.decay) == (self.prior.mode, self.prior.decay)
        if not alike or [r.shape[1] for r in self.recency] != [mask.shape[1] for mask in prior.residency]:
            return False
        self.prior = prior
        self._hold([r.to(mask.device) for r, mask in zip(self.recency, prior.residency, strict=True)])
        return True

    def advance(self, tokens: int, flags_T: Tensor | None) -> None:
        """S more tokens of each sequence are on their way."""
        self.catch_up()
        if self.chosen is None:
            return
        if len(self.flags) > _JOIN:
            self._join()
        self._mark_gaps()
        self.length += tokens
        self.flags.append(tokens if flags_T is None else flags_T.reshape(self.sequences, -1))

    def forget(self) -> None:
        """Keep no history from now on."""
        self.catch_up()
        self.chosen, self.flags = None, []

    def reset(self) -> None:
        """Back to length 0, in place."""
        self._late = []
        for part in self._parts():
            part.zero_()
        self.past, self.length, self.flags, self._has_gaps = 0, 0, [], False
        self.chosen = None if self.chosen is None else [[] for _ in self._recency]

    def keep_if(self, flag: Tensor) -> None:
        """Back to nothing used where this scalar on the device is False."""
        self.catch_up()
        for part in self._parts():
            part.mul_(flag.to(part))

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order (a sequence may come more than once)."""
        self.catch_up()
        same = len(rows) == self.sequences
        if self.chosen is not None and self.flags:
            self._join()
            self.chosen = [[ids if ids is None else ids[rows.to(ids.device)]] for (ids,) in self.chosen]
            self.flags = [part if isinstance(part, int) else part[rows.to(part.device)] for part in self.flags]
        kept = [recency_BE[rows.to(recency_BE.device)] for recency_BE in self.recency]
        if same:
            for recency_BE, kept_BE in zip(self.recency, kept, strict=True):
                recency_BE.copy_(kept_BE)
        else:
            self._hold(kept)

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, copies side by side."""
        rows = torch.arange(self.sequences, device=self.recency[0].device)
        self.select(rows.repeat_interleave(times))

    def crop(self, length: int) -> None:
        """Back to the state after the first `length` tokens."""
        if self.chosen is None or length <= self.past:
            self.reset()
            self.past = self.length = length
            return
        self.catch_up()
        kept = length - self.past
        self._join()
        flagged = isinstance(self.flags[0], Tensor)
        self.flags = [part[:, :kept] if isinstance(part, Tensor) else kept for part in self.flags]
        self.chosen = [[ids if ids is None else ids[:, :kept]] for (ids,) in self.chosen]
        self.length = length
        first = 0 if flagged or self._has_gaps else max(0, kept - self._remembered)
        for recency_BE, (ids_BSK,) in zip(self.recency, self.chosen, strict=True):
            recency_BE.zero_()
            if ids_BSK is not None:
                for s in range(first, kept):
                    self._replay(recency_BE, ids_BSK[:, s], s)

    def _replay(self, recency_BE: Tensor, ids_BK: Tensor, s: int) -> None:
        """`reference._step`'s update by token s, with the choice known (-1: the router was not asked)."""
        decay, flags_BS = self.prior.decay, self.flags[0]
        ids_BK = ids_BK.long()
        if isinstance(flags_BS, int) and not self._has_gaps:
            recency_BE.mul_(decay).scatter_add_(-1, ids_BK, recency_BE.new_full(ids_BK.shape, 1.0 - decay))
            return
        still_B1 = ids_BK[:, :1] < 0
        started_BE = recency_BE.clone()
        if isinstance(flags_BS, Tensor):
            flags_B1 = flags_BS[:, s : s + 1].to(recency_BE.device)
            still_B1 = still_B1 | (flags_B1.bitwise_and(PADDING) != 0)
            started_BE.masked_fill_(flags_B1.bitwise_and(RESTART) != 0, 0.0)
        used_BE = torch.zeros_like(recency_BE).scatter_(-1, ids_BK.clamp(min=0), 1.0 - decay)
        recency_BE.copy_(torch.where(still_B1, started_BE, started_BE * decay + used_BE))

    # The history

    def _mark_gaps(self) -> None:
        for parts in self.chosen or ():
            if len(parts) < len(self.flags):
                parts.extend([None] * (len(self.flags) - len(parts)))
                self._has_gaps = True

    def _join(self) -> None:
        """One part of each instead of one per forward: ids [B, S, K] int16, flags [B, S] or their number."""
        assert self.chosen is not None
        self._mark_gaps()
        counts = [part if isinstance(part, int) else part.shape[1] for part in self.flags]
        self.chosen = [[self._joined(parts, counts)] for parts in self.chosen]
        flags_BS = next((part for part in self.flags if isinstance(part, Tensor)), None)
        if flags_BS is None:
            self.flags = [sum(counts)]
            return
        whole = [
            part if isinstance(part, Tensor) else flags_BS.new_zeros((self.sequences, part)) for part in self.flags
        ]
        self.flags = [torch.cat(whole, dim=1)]

    def _joined(self, parts: list[Tensor | None], counts: list[int]) -> Tensor | None:
        width = next((ids.shape[-1] for ids in parts if ids is not None), None)
        if width is None:
            return None
        shape = (self.sequences, -1, width)
        like = self.recency[0]
        whole = [
            like.new_full((self.sequences, count, width), -1, dtype=torch.int16)
            if ids is None
            else ids.reshape(shape).to(torch.int16)
            for ids, count in zip(parts, counts, strict=True)
        ]
        return torch.cat(whole, dim=1)
