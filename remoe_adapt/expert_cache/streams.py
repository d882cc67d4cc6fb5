"""What a tier of slots needs of a device that works in queues (streams): memory, copies, and the order among them.

Copies go to a stream of their own, one after another, beside the kernels of the model; none of these calls waits for
the device unless it says so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

# What a budget that the device has no memory for leaves free: activations come and go beside the slots.
_SPARED_BYTES = 256 << 20


class Event(Protocol):
    """A point in a stream."""

    def query(self) -> bool:
        """Whether all work before it has ended."""
        ...


class Stream(Protocol):
    """A queue of work; `key` tells it from others."""

    @property
    def key(self) -> int: ...


class Streams(Protocol):
    """The queues of one device. device: its name for torch."""

    device: torch.device

    def current(self) -> Stream:
        """What the calling thread queues kernels to."""
        ...

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Stream]) -> Event:
        """Queue copies (to, from), once all that `after` have queued so far has ended; returns the end of them."""
        ...

    def wait(self, stream: Stream, event: Event) -> None:
        """What is queued to this stream from now on begins after the event."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that is queued to it."""
        ...

    def memory(self, slots: int, slot_bytes: int) -> Tensor:
        """uint8 [slots, slot_bytes] with arbitrary contents; raises torch.OutOfMemoryError."""
        ...

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        """Whoever still has this memory may queue work on it to these streams: it goes when they have done that."""
        ...

    def give_back(self) -> None:
        """Memory that nobody has any more goes to the device."""
        ...

    def free_bytes(self) -> int:
        """Memory that slots may take yet."""
        ...

    def pinned(self, numbers: Tensor) -> Tensor:
        """A copy of a CPU tensor that copies to the device need not wait for."""
        ...

    def on_device(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """These numbers, int32, for kernels of the calling thread."""
        ...


class _CudaStream:
    __slots__ = ("key", "stream")

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.stream, self.key = stream, int(stream.cuda_stream)


class CudaStreams:
    """Streams of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._copies = torch.cuda.Stream(device)

    def current(self) -> _CudaStream:
        return _CudaStream(torch.cuda.current_stream(self.device))

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]], after: Iterable[Stream]) -> torch.cuda.Event:
        for stream in after:
            assert isinstance(stream, _CudaStream)
            self._copies.wait_stream(stream.stream)
        with torch.cuda.stream(self._copies):
            for to, source in pairs:
                to.copy_(source, non_blocking=True)
        event = torch.cuda.Event()
        event.record(self._copies)
        return event

    def wait(self, stream: Stream, event: Event) -> None:
        assert isinstance(stream, _CudaStream) and isinstance(event, torch.cuda.Event)
        stream.stream.wait_event(event)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def memory(self, slots: int, slot_bytes: int) -> Tensor:
        return torch.empty((slots, slot_bytes), dtype=torch.uint8, device=self.device)

    def retire(self, memory: Tensor, streams: Iterable[Stream]) -> None:
        memory.record_stream(self._copies)
        for stream in streams:
            assert isinstance(stream, _CudaStream)
            memory.record_stream(stream.stream)

    def give_back(self) -> None:
        with torch.cuda.device(self.device):
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        free: int = torch.cuda.mem_get_info(self.device)[0]
        return max(0, free - _SPARED_BYTES)

    def pinned(self, numbers: Tensor) -> Tensor:
        return numbers.pin_memory()

    def on_device(self, rows: Sequence[Sequence[int]]) -> Tensor:
        # torch keeps pinned memory that it has lent until the copies out of it have ended.
        return torch.tensor(rows, dtype=torch.int32).pin_memory().to(self.device, non_blocking=True)
