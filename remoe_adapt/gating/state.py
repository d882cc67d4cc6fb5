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
# An expert that is never used decays to the smallest number there is, which rounding then keeps for ever, and a CPU
# takes a hundred times as long for such numbers. What is cleared is too small to change the sum of any choice value.
_NOTHING, _CLEARED_EVERY = 1e-25, 16
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
        # The length that the recency is up to; the tokens since then are in the history.
        self._taken_in = past
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
        return self._steps

    def _hold(self, recency: list[Tensor]) -> None:
        with torch.inference_mode(False), torch.no_grad():
            alike = len({(recency_BE.shape, recency_BE.device) for recency_BE in recency}) == 1
            # In one piece where that goes, so that a token moves all of it at once.
            self._whole_LBE = torch.stack(recency) if alike else None
        self._share: Tensor | None = None
        self._moved = 0
        self._recency = recency if self._whole_LBE is None else list(self._whole_LBE.unbind())
        self.placed, self.sequences = self.prior.placed, len(recency[0])
        decay = self.prior.decay
        parts = zip(self._recency, self.prior.gains, strict=True)
        self._steps = [PriorStep(part, gain, decay) for part, gain in parts]

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

    def rest(self, chosen: dict[int, Tensor], tokens: int, flags_T: Tensor | None) -> None:
        """S more tokens of each sequence, for which the routers chose without the prior: ids [B * S, K] by layer.

        The recency takes them in as soon as somebody asks for it.
        """
        if self.chosen is not None:
            self._extend(tokens, flags_T)
            self._keep(chosen)
        elif tokens == 1 and flags_T is None:
            self._move(chosen)
        else:
            flags_BS = None if flags_T is None else flags_T.reshape(self.sequences, -1)
            for layer, ids_TK in chosen.items():
                _pass_over(self._recency[layer], ids_TK.reshape(self.sequences, tokens, -1), self.prior.decay, flags_BS)

    def catch_up(self) -> None:
        """The recency is up to date."""
        if self._taken_in < self.length:
            first, self._taken_in = self._taken_in - self.past, self.length
            self._replay(first)

    @property
    def _remembered(self) -> int:
        """Tokens after which nothing is left of one."""
        decay = self.prior.decay
        return 1 if decay == 0.0 else math.ceil(math.log(_FORGOTTEN) / math.log(decay))

    def _parts(self) -> list[Tensor]:
        return self._recency if self._whole_LBE is None else [self._whole_LBE]

    def _keep(self, chosen: dict[int, Tensor]) -> None:
        if self.chosen is not None:
            for layer, ids_TK in chosen.items():
                # Of a prompt's choices, which may be views into whole rankings, only the numbers stay.
                self.chosen[layer].append(ids_TK if len(ids_TK) == 1 else ids_TK.to(torch.int16))

    def _move(self, chosen: dict[int, Tensor]) -> None:
        """By one token of each sequence: ids [B, K] by layer."""
        whole_LBE, decay = self._whole_LBE, self.prior.decay
        if whole_LBE is not None and len(chosen) == len(self._recency):
            if self._share is None:
                widths = {ids_BK.shape[-1] for ids_BK in chosen.values()}  # a router's K stays
                share = whole_LBE.new_full((1, 1, 1), 1.0 - decay)
                self._share = share.expand(*whole_LBE.shape[:2], *widths) if len(widths) == 1 else None
            if self._share is not None:
                ids_LBK = torch.cat([chosen[layer] for layer in range(len(chosen))]).view(self._share.shape).long()
                whole_LBE.mul_(decay).scatter_add_(-1, ids_LBK, self._share)
                self._moved += 1
                if self._moved % _CLEARED_EVERY == 0:
                    torch.threshold_(whole_LBE, _NOTHING, 0.0)
                return
        for layer, ids_BK in chosen.items():
            recency_BE = self._recency[layer]
            share_BK = recency_BE.new_full((1, 1), 1.0 - decay).expand(ids_BK.shape)
            recency_BE.mul_(decay).scatter_add_(-1, ids_BK.long(), share_BK)

    def bind(self, prior: RecencyPrior) -> bool:
        """Go on under another prior object (a copy of the cache has a copied one), if it means the same."""
        alike = (prior.mode, prior.decay) == (self.prior.mode, self.prior.decay)
        if not alike or [r.shape[1] for r in self.recency] != [mask.shape[1] for mask in prior.residency]:
            return False
        self.prior = prior
        self._hold([r.to(mask.device) for r, mask in zip(self.recency, prior.residency, strict=True)])
        return True

    def advance(self, tokens: int, flags_T: Tensor | None) -> None:
        """S more tokens of each sequence are on their way, and gates will move the recency on."""
        self.catch_up()
        if self.chosen is not None:
            self._extend(tokens, flags_T)
            self._taken_in = self.length

    def _extend(self, tokens: int, flags_T: Tensor | None) -> None:
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
        for part in self._parts():
            part.zero_()
        self.past = self.length = self._taken_in = 0
        self.flags, self._has_gaps = [], False
        self.chosen = None if self.chosen is None else [[] for _ in self._recency]

    def keep_if(self, flag: Tensor) -> None:
        """Back to nothing used where this scalar on the device is False."""
        self.catch_up()
        for part in self._parts():
            part.mul_(flag.to(part))

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order (a sequence may come more than once)."""
        same = len(rows) == self.sequences
        if self.chosen is not None and self.flags:
            self._join()
            self.chosen = [[ids if ids is None else ids[rows.to(ids.device)]] for (ids,) in self.chosen]
            self.flags = [part if isinstance(part, int) else part[rows.to(part.device)] for part in self.flags]
        kept = [recency_BE[rows.to(recency_BE.device)] for recency_BE in self._recency]
        if same:
            for recency_BE, kept_BE in zip(self._recency, kept, strict=True):
                recency_BE.copy_(kept_BE)
        else:
            self._hold(kept)

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, copies side by side."""
        rows = torch.arange(self.sequences, device=self._recency[0].device)
        self.select(rows.repeat_interleave(times))

    def crop(self, length: int) -> None:
        """Back to the state after the first `length` tokens."""
        if self.chosen is None or length <= self.past:
            self.reset()
            self.past = self.length = self._taken_in = length
            return
        kept = length - self.past
        self._join()
        self.flags = [part[:, :kept] if isinstance(part, Tensor) else kept for part in self.flags]
        self.chosen = [[ids if ids is None else ids[:, :kept]] for (ids,) in self.chosen]
        self.length, self._taken_in = length, self.past
        for part in self._parts():
            part.zero_()

    def _replay(self, first: int) -> None:
        """Take in the tokens of the history from `first` on, with the choice known."""
        self._join()
        assert self.chosen is not None
        flags_BS, kept = self.flags[0], self.length - self.past
        if isinstance(flags_BS, int) and not self._has_gaps:  # one by one, as gates do, so that no bit differs
            begin = max(first, kept - self._remembered)
            if begin > first:
                for part in self._parts():
                    part.zero_()
            for s in range(begin, kept):
                self._move({layer: ids[:, s] for layer, (ids,) in enumerate(self.chosen) if ids is not None})
            return
        later_BS = flags_BS[:, first:] if isinstance(flags_BS, Tensor) else None
        for recency_BE, (ids_BSK,) in zip(self._recency, self.chosen, strict=True):
            if ids_BSK is not None:
                _pass_over(recency_BE, ids_BSK[:, first:], self.prior.decay, later_BS)

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


def _pass_over(recency_BE: Tensor, ids_BSK: Tensor, decay: float, flags_BS: Tensor | None) -> None:
    """Those of S tokens at once, but for rounding, with flags as in PriorStep. Ids of -1: the router was not asked."""
    real_BS = ids_BSK[..., 0] >= 0
    if flags_BS is not None:
        flags_BS = flags_BS.to(recency_BE.device)
        real_BS = real_BS & (flags_BS.bitwise_and(PADDING) == 0)
    count_BS = real_BS.to(recency_BE.dtype).cumsum(dim=-1)
    share_BS = (1.0 - decay) * decay ** (count_BS[:, -1:] - count_BS) * real_BS
    kept_B1 = decay ** count_BS[:, -1:]
    if flags_BS is not None:
        restarts_BS = (flags_BS.bitwise_and(RESTART) != 0).to(recency_BE.dtype).cumsum(dim=-1)
        share_BS = share_BS * (restarts_BS == restarts_BS[:, -1:])
        kept_B1 = kept_B1 * (restarts_BS[:, -1:] == 0)
    shares_BSK = share_BS.unsqueeze(-1).expand(ids_BSK.shape)
    recency_BE.mul_(kept_B1).scatter_add_(-1, ids_BSK.long().clamp(min=0).flatten(1), shares_BSK.flatten(1))
