"""Which experts are in memory, as tensors that a resident prior reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

# Masks begin at multiples of so many floats (64 bytes), as tensors of their own would.
_MASK_STEP = 16


class ResidentMasks:
    """`masks` has a tensor [1, E] for each layer: 1 where the expert is in memory, 0 elsewhere; never reallocated.

    A resident prior reads them. The cache writes single numbers in RAM. On the CPU the masks are these numbers; for a
    device `show` copies all of them in one call, instead of a kernel for each expert.

    num_experts: how many each layer has.
    device: where the masks are.
    copied: the masks are a copy on the CPU too.
    """

    def __init__(self, num_experts: Sequence[int], device: torch.device, *, copied: bool = False) -> None:
        *starts, end = accumulate((-(-count // _MASK_STEP) * _MASK_STEP for count in num_experts), initial=0)
        # Tensors that are made in inference mode could not be read outside it.
        with torch.inference_mode(False):
            self._written = torch.zeros(end)
            self._shown = self._written.to(device, copy=copied)
            places = [slice(start, start + count) for start, count in zip(starts, num_experts, strict=True)]
            self.masks = [self._shown[place].view(1, -1) for place in places]
        # A tensor would take much longer to write a single number, once for each expert that comes or goes.
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
