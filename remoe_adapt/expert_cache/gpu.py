"""A tier of slots on a GPU over one in RAM: experts go from storage to pinned RAM slots, and from there to the GPU.

Both tiers are expert caches with a budget and a policy each; the upper one's source leases experts below and has their
slots copied, all that a look-up misses in one go, on a stream of its own. Nobody waits for a copy but the kernels that
read it. The expert below may be evicted meanwhile; its memory stays until the copy has ended.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.checkpoint_store import FileStore
from remoe_adapt.expert_cache.device_pool import DevicePools, TakenSlot
from remoe_adapt.expert_cache.streams import CudaStreams
from remoe_adapt.expert_cache.types import Fitted, Key, Slot

# The RAM tier is so many times the GPU's budget: it holds what the GPU holds, and as much again for its next misses.
RAM_TO_GPU = 2


class DeviceSource:
    """Reads experts out of a cache `below` into slots of a device. A BatchSource and a TierSource.

    below: the cache that holds them.
    pools: the slots; laid out as the slots of `below` are.
    """

    def __init__(self, below: ExpertCache, pools: DevicePools) -> None:
        source = below.source
        self.layers, self.num_experts, self.expert_bytes = source.layers, source.num_experts, source.expert_bytes
        self.below, self.pools, self.slot_bytes = below, pools, pools.places.slot_bytes
        self._last_layer = -1

    def read(self, layer: int, expert: int) -> Slot:
        """Raises what the tier below raises."""
        return self.read_many(layer, [expert])[expert]

    def read_many(self, layer: int, experts: Sequence[int]) -> Mapping[int, Slot]:
        """Raises what the tier below raises, and ConfigError where no slot is free."""
        # Experts that come one by one, or in groups, are of one token: the policy below must count them as such.
        continues, self._last_layer = layer == self._last_layer, layer
        found, rest = dict[int, TakenSlot](), list(experts)
        with torch.inference_mode(False), torch.no_grad():
            while rest:
                with self.below.lease(layer, rest, continues=continues) as lease:
                    rest = rest[len(lease.slots) :]
                    found |= self.pools.fill(layer, lease.slots)
                continues = True
        return found

    def leased(self, slots: Mapping[int, Slot]) -> dict[int, Slot]:
        """See TierSource."""
        return self.pools.leased(slots)

    def late(self, slots: Mapping[int, Slot]) -> frozenset[int]:
        """See TierSource."""
        return self.pools.late(slots)

    def wait_for(self, slots: Mapping[int, Slot]) -> None:
        """See TierSource."""
        self.pools.wait_for(slots)

    def fit(self, slots: Mapping[int, int], movable: Mapping[Key, Slot]) -> Fitted:
        """See TierSource."""
        return self.pools.fit(slots, movable)

    def give_back(self) -> None:
        """Wait for copies under way, and let go of the RAM that they read."""
        self.pools.settle()


def find_device(device: str | torch.device) -> torch.device:
    """The CPU or a CUDA device that is there, with its number.

    Raises ConfigError.
    """
    with contextlib.suppress(RuntimeError, TypeError):
        found = torch.device(device)
        if found.type == "cpu":
            return torch.device("cpu")
        if found.type == "cuda" and torch.cuda.is_available():
            index = torch.cuda.current_device() if found.index is None else found.index
            if index < torch.cuda.device_count():
                return torch.device("cuda", index)
    raise ConfigError(
        f"device {str(device)!r}: an expert cache is for the CPU or a CUDA device of this machine "
        f"({torch.cuda.device_count()} found)."
    )


def make_cache(
    store: FileStore, budget_bytes: int, *, device: torch.device, ram_budget_bytes: int | None = None, **options: Any
) -> ExpertCache:
    """The expert cache for a model on `device` (of `find_device`): one tier on the CPU, a GPU tier over one in RAM.

    store: what the experts are read from.
    budget_bytes: of the tier that computes.
    ram_budget_bytes: of the pinned RAM below a GPU; None: twice the budget, at most all experts.
    options: policy, scope and threads of ExpertCache; the RAM tier has one budget over all layers.

    Raises ConfigError as ExpertCache, for a RAM budget without a GPU, and for a budget beyond the GPU's free memory.
    """
    if device.type == "cpu":
        if ram_budget_bytes is not None:
            raise ConfigError("ram_budget is for a model on a GPU; on the CPU give budget alone.")
        return ExpertCache(store, budget_bytes, **options)
    # The budget is checked before memory is asked of the device, so that a refusal leaves nothing behind.
    free_bytes: int = torch.cuda.mem_get_info(device)[0]
    if budget_bytes > free_bytes:
        raise ConfigError(
            f"budget: {budget_bytes} bytes of experts on {device}, where {free_bytes} are free; lower it."
        )
    # More RAM than all experts take would stay empty.
    below_bytes = min(RAM_TO_GPU * budget_bytes, store.total_bytes) if ram_budget_bytes is None else ram_budget_bytes
    try:
        below = ExpertCache(store, below_bytes, **options | {"scope": "global"})
    except ConfigError as error:
        raise ConfigError(f"ram_budget: {error}") from error
    # Pinned memory alone is copied by the GPU itself, beside its kernels; from other memory each copy would wait.
    store.layout.place(device)
    assert store.layout.places is not None
    pools = DevicePools(store.layout.places, store.num_experts, CudaStreams(device))
    return ExpertCache(DeviceSource(below, pools), budget_bytes, below=below, device=device, **options)
