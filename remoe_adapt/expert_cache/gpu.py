"""A tier of slots on a GPU over one in RAM: experts go from storage to pinned RAM slots, and from there to the GPU.

Both tiers are expert caches with a budget and a policy each; the upper one's source leases an expert below and copies
it. Copies run on a stream of their own, beside the kernels of the model, and a slot is handed over once its copy has
ended. Two things order memory that is used again: a RAM slot stays leased until its copy has ended, and a copy into
recycled GPU memory waits for the kernels that were queued when it was given back.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.errors import ConfigError
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.checkpoint_store import FileStore
from remoe_adapt.expert_cache.memory import Block, Blocks
from remoe_adapt.expert_cache.types import Slot

# The RAM tier is so many times the GPU's budget: it holds what the GPU holds, and as much again for its next misses.
RAM_TO_GPU = 2


class DeviceSource:
    """Reads experts out of a cache `below` into blocks of another tier.

    below: the cache that holds them.
    blocks: the memory of this tier; None: RAM.
    copies: around the copies of one expert, and over when they are.
    """

    def __init__(
        self,
        below: ExpertCache,
        blocks: Blocks | None = None,
        copies: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        source = below.source
        self.layers, self.num_experts, self.expert_bytes = source.layers, source.num_experts, source.expert_bytes
        self.below, self._blocks, self._copies = below, blocks or Blocks(), copies
        self._last_layer = -1

    def read(self, layer: int, expert: int) -> Slot:
        """Raises what the tier below raises."""
        # A token's misses of one layer come here one by one. The policy below must count them as one token too.
        continues, self._last_layer = layer == self._last_layer, layer
        with (
            torch.inference_mode(False),
            torch.no_grad(),
            self.below.lease(layer, [expert], continues=continues) as lease,
            self._copies(),
        ):
            return {
                name: self._blocks.empty(tuple(param.shape), param.dtype).copy_(param, non_blocking=True)
                for name, param in lease.slots[expert].items()
            }

    def give_back(self) -> None:
        """Memory of this tier that is kept for the next reads goes to its device."""
        self._blocks.give_back()


class PinnedBlock(Block):
    """RAM that a GPU reads by itself: registered in its exact size, which torch's pinned memory would round up.

    Raises ConfigError when the system does not allow it.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        super().__init__(size)
        self._device, self._address = device, 0
        address: int = self.memory.ctypes.data
        with torch.cuda.device(device):
            failed = torch.cuda.cudart().cudaHostRegister(address, size, 0)
        if int(failed):
            raise ConfigError(
                f"{size} more bytes of RAM cannot be pinned for the GPU (CUDA error {int(failed)}): lower ram_budget."
            )
        # Only now, so that `__del__` does not unregister what was refused.
        self._address = address

    def __del__(self) -> None:
        # Memory must be unregistered before it is unmapped. At the end of the process CUDA may be gone, with all of it.
        if getattr(self, "_address", 0) and not sys.is_finalizing():
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(self._address)


class _Lent:
    """Stands for a block in the tensor that uses it: torch holds it as long as that tensor's storage."""

    def __init__(self, memory: Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (memory.numel(),),
            "typestr": "|u1",
            "data": (memory.data_ptr(), False),
            "version": 2,
        }


class DeviceBlock(Block):
    """GPU memory. `freed`: recorded when its last user had queued all that reads it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size = size
        self.memory: Tensor = torch.empty(size, dtype=torch.uint8, device=device)
        self.freed: torch.cuda.Event | None = None

    def lend(self) -> _Lent:
        """For work queued on the current stream."""
        # The host need not wait: the stream does, for the kernels that read the block's last tensor.
        if self.freed is not None:
            torch.cuda.current_stream(self.memory.device).wait_event(self.freed)
        return _Lent(self.memory)


class DeviceBlocks(Blocks):
    """GPU memory for tensors that are written on the current stream, and read on any."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(lambda size: DeviceBlock(size, device))
        self._device = device
        # The last work of each stream that computed with these tensors, by its handle.
        self._computed: dict[int, torch.cuda.Event] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Contiguous, with arbitrary contents; to be written on the current stream."""
        size = torch.Size(shape).numel() * dtype.itemsize
        owner = self.take(max(1, size))
        stream = torch.cuda.current_stream(self._device)
        # Kernels that read the last tensor of this block may still be queued.
        for event in tuple(self._computed.values()):
            stream.wait_event(event)
        return torch.as_tensor(owner, device=self._device)[:size].view(dtype).view(shape)

    def computed(self) -> None:
        """What the current stream has queued so far may read tensors that are given back from now on."""
        stream = torch.cuda.current_stream(self._device)
        event = self._computed.get(stream.cuda_stream)
        # One event a stream is enough: a later record stands for all work before it.
        if event is None:
            event = self._computed[stream.cuda_stream] = torch.cuda.Event()
        event.record(stream)

    def give_back(self) -> None:
        """Free blocks go to the device, once it is idle: its allocator would give them to other streams at once."""
        # Taken away first, as other threads may ask for blocks while this one waits for the device.
        free, self._free = self._free, {}
        if any(free.values()):
            torch.cuda.synchronize(self._device)
            free.clear()
            with torch.cuda.device(self._device):
                torch.cuda.empty_cache()

    def _keep(self, block: Block) -> None:
        # CUDA may be gone already at the end of the process, and records no more events.
        if sys.is_finalizing():
            return
        assert isinstance(block, DeviceBlock)
        # `computed` is not enough: backward gives blocks back from threads of its own, outside any lease.
        block.freed = torch.cuda.current_stream(self._device).record_event()
        super()._keep(block)


class CopyStream:
    """Around copies to a GPU: they run on a stream of their own, and have ended when the block is left."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            try:
                yield
            finally:
                # A blocking event lets the thread sleep: polling would take a core from what computes.
                copied = torch.cuda.Event(blocking=True)
                copied.record(self._stream)
                copied.synchronize()


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
    store.use_blocks(Blocks(partial(PinnedBlock, device=device)))
    blocks = DeviceBlocks(device)
    # `computed` runs before a lease's slots can be evicted, so that no copy overwrites what kernels still read.
    source = DeviceSource(below, blocks, CopyStream(device))
    return ExpertCache(source, budget_bytes, below=below, released=blocks.computed, device=device, **options)
