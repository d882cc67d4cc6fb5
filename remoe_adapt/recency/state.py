"""The recency of the sequences of one KV cache: moved on by gates, reordered and cropped with the cache.

Shapes: L routers, B sequences, S tokens of each, E experts, K chosen.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from remoe_adapt.gating import PADDING, RESTART, PriorStep, update_recency
from remoe_adapt.recency.history import History

if TYPE_CHECKING:
    from remoe_adapt.recency.prior import RecencyPrior

# What a token leaves behind is forgotten below this.
_FORGOTTEN = 1e-12
# The recency of an expert that is never used decays to the smallest number there is, which rounding then keeps for
# ever, and a CPU takes a hundred times as long for such numbers. What is cleared is too small to change the sum of any
# choice value.
_NOTHING, _CLEARED_EVERY = 1e-25, 16


class RecencyState:
    """The recency [B, E] of each router after `length` tokens (padding counted) of B sequences.

    prior: whose gains and decay hold. recency: where it begins, one tensor for each router, kept. past: tokens before,
    of which nothing is known. is_counted: the cache tells its length as a number; then `history` keeps what was chosen
    since token `past`, so that `crop` can go back. Without a history `length` stands still.
    """

    def __init__(self, prior: RecencyPrior, recency: list[Tensor], past: int = 0, *, is_counted: bool = True) -> None:
        self.prior, self.past, self.length, self.is_counted = prior, past, past, is_counted
        self.history = History(len(recency)) if is_counted else None
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
            # In one piece where that goes, so that a token moves all of it at once: rows are the sequences of the
            # first router, then those of the second, as `cat` puts what they chose.
            self._whole_NE = torch.cat(recency) if alike else None
        self._share_NK: Tensor | None = None
        self._moved = 0
        self._recency = recency if self._whole_NE is None else list(self._whole_NE.split(len(recency[0])))
        self.placement, self.sequences = self.prior.placement, len(recency[0])
        decay, share = self.prior.decay, self.prior.share
        parts = zip(self._recency, self.prior.gains, strict=True)
        self._steps = [PriorStep(part, gain, decay, None, share) for part, gain in parts]

    def is_next(self, prior: RecencyPrior, length: Any) -> bool:
        """Whether one more token of one sequence simply comes after those known, `length` being in the cache."""
        return (
            self.length == length and self.history is not None and self.sequences == 1
            and self.prior is prior and self.placement == prior.placement
        )  # fmt: skip

    def advance(self, tokens: int, flags_T: Tensor | None) -> dict[int, Tensor]:
        """S more tokens of each sequence are on their way, and gates will move the recency on.

        Returns where to note what they choose, ids [B * S, K] by layer.
        """
        self.catch_up()
        chosen: dict[int, Tensor] = {}
        self._extend(chosen, tokens, flags_T)
        self._taken_in = self.length
        return chosen

    def move(self, chosen: dict[int, Tensor]) -> None:
        """Move the recency on by one token of each sequence, for which the routers chose ids [B, K] by layer."""
        self.catch_up()
        ids_NK = self._one_tensor(chosen)
        self._extend(chosen, 1, None, ids_NK)
        self._taken_in = self.length
        self._move(chosen, ids_NK)

    def add(self, chosen: dict[int, Tensor], tokens: int, flags_T: Tensor | None) -> None:
        """Take in S more tokens of each sequence, for which the routers chose ids [B * S, K] by layer.

        The recency moves on as soon as somebody asks for it.
        """
        if self.history is not None:
            self._extend(chosen, tokens, flags_T, self._one_tensor(chosen) if tokens == 1 and flags_T is None else None)
        elif tokens == 1 and flags_T is None:
            self._move(chosen, self._one_tensor(chosen))
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
        return self._recency if self._whole_NE is None else [self._whole_NE]

    def _extend(
        self, chosen: dict[int, Tensor], tokens: int, flags_T: Tensor | None, ids_NK: Tensor | None = None
    ) -> None:
        """Lengthen the history; `ids_NK` is what was chosen for one token, in one tensor where that goes."""
        if self.history is None:
            return
        self.length += tokens
        if ids_NK is not None:
            self.history.append_token(ids_NK)
        else:
            self.history.append(tokens, None if flags_T is None else flags_T.reshape(self.sequences, -1), chosen)

    def _one_tensor(self, chosen: dict[int, Tensor]) -> Tensor | None:
        """What all routers chose for one token of each sequence, [L * B, K]; None where they differ in kind."""
        if self._whole_NE is None or len(chosen) != len(self._recency):
            return None
        parts = [chosen[layer] for layer in range(len(chosen))]
        if self._share_NK is None:  # a router's K stays, so this is found out once
            counts = {ids_BK.shape[-1] for ids_BK in parts}
            if len(counts) > 1:
                self._whole_NE = None
                return None
            with torch.inference_mode(False):
                share_11 = self._whole_NE.new_full((1, 1), 1.0 - self.prior.decay)
                self._share_NK = share_11.expand(len(self._whole_NE), counts.pop())
        return torch.cat(parts)

    def _move(self, chosen: dict[int, Tensor], ids_NK: Tensor | None) -> None:
        """By one token of each sequence: ids [B, K] by layer, and in one tensor where that goes."""
        decay, whole_NE = self.prior.decay, self._whole_NE
        if ids_NK is None or whole_NE is None or self._share_NK is None:
            for layer, ids_BK in chosen.items():
                update_recency(self._recency[layer], ids_BK.long(), decay)
            return
        # `update_recency` of all rows, with a share that is not made anew for every token.
        whole_NE.mul_(decay).scatter_add_(-1, ids_NK if ids_NK.dtype is torch.int64 else ids_NK.long(), self._share_NK)
        self._moved += 1
        if self._moved % _CLEARED_EVERY == 0:
            torch.threshold_(whole_NE, _NOTHING, 0.0)

    def bind(self, prior: RecencyPrior) -> bool:
        """Go on under another prior object (a copy of the cache has a copied one), if it means the same."""
        alike = (prior.mode, prior.decay, prior.share) == (self.prior.mode, self.prior.decay, self.prior.share)
        if not alike or [r.shape[1] for r in self.recency] != [mask.shape[1] for mask in prior.residency]:
            return False
        self.prior = prior
        self._hold([r.to(mask.device) for r, mask in zip(self.recency, prior.residency, strict=True)])
        return True

    def forget(self) -> None:
        """Keep no history from now on."""
        self.catch_up()
        self.history = None

    def reset(self, length: int = 0) -> None:
        """Back to nothing used, in place, after `length` tokens of which nothing is known."""
        for part in self._parts():
            part.zero_()
        self.past = self.length = self._taken_in = length
        self.history = None if self.history is None else History(len(self._recency))

    def keep_if(self, flag: Tensor) -> None:
        """Back to nothing used where this scalar on the device is False."""
        self.catch_up()
        for part in self._parts():
            part.mul_(flag.to(part))

    def select(self, rows: Tensor) -> None:
        """Keep these sequences, in this order (a sequence may come more than once)."""
        same = len(rows) == self.sequences
        if self.history is not None:
            self.history.select(rows)
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
        if self.history is None or length <= self.past:
            self.reset(length)
            return
        self.history.crop(length - self.past)
        self.length, self._taken_in = length, self.past
        for part in self._parts():
            part.zero_()

    def _replay(self, first: int) -> None:
        """Take in the tokens of the history from `first` on, with the choice known."""
        assert self.history is not None
        tokens, flags_BS, ids = self.history.join()
        if flags_BS is None and not self.history.has_gaps:  # one by one, as gates do, so that no bit differs
            begin = max(first, tokens - self._remembered)
            if begin > first:
                for part in self._parts():
                    part.zero_()
            for s in range(begin, tokens):
                chosen = {layer: ids_BSK[:, s] for layer, ids_BSK in ids.items()}
                self._move(chosen, self._one_tensor(chosen))
            return
        for layer, ids_BSK in ids.items():
            later_BS = None if flags_BS is None else flags_BS[:, first:]
            _pass_over(self._recency[layer], ids_BSK[:, first:], self.prior.decay, later_BS)


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
