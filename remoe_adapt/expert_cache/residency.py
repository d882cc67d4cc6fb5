"""Which experts are in memory, as tensors that a resident prior reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

# Masks begin at multiples of so many floats (64 bytes), as tensors of their own would.
_STEP = 16


class ResidentMasks:
    """`masks`: of each layer a tensor [1, E], 1 where the expert is in memory and 0 elsewhere; never reallocated.

    The cache writes single numbers in RAM. On the CPU the masks are these numbers; for a device `show` copies all of
    them in one call, instead of a kernel for each expert.

    num_experts: of each layer.
    device: of the masks.
    copied: the masks are a copy on the CPU too.
    """

    def __init__(self, num_experts: Sequence[int], device: torch.device, *, copied: bool = False) -> None:
        *starts, end = accumulate((-(-count // _STEP) * _STEP for count in num_experts), initial=0)
        with torch.inference_mode(False):  # ordinary tensors, which may be read in any mode
            self._written = torch.zeros(end)
            self._shown = self._written.to(device, copy=copied)
            places = [slice(start, start + count) for start, count in zip(starts, num_experts, strict=True)]
            self.masks = [self._shown[place].view(1, -1) for place in places]
        numbers = self._written.numpy()
        self._of_layer = [numbers[place] for place in places]
        self._is_stale = False

    def write(self, layer: int, expert: int, is_there: bool) -> None:
        """An expert has come, or goes."""
        self._of_layer[layer][expert] = is_there
        self._is_stale = True

    def show(self) -> None:
        """Bring the masks up to date, after any number of writes."""
        if self._is_stale and self._shown is not self._written:
            with torch.inference_mode(False), torch.no_grad():
                self._shown.copy_(self._written)
        self._is_stale = False

    def is_whole(self, layer: int) -> bool:
        """All experts of this layer are there."""
        return bool(self._of_layer[layer].all())
