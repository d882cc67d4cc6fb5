"""What an expert cache and its users share: where experts come from, what a slot is, what is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from remoe_adapt.device_profile import CACHE_SCOPES
from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction import ONLINE, make_policy

# (layer, expert)
Key = tuple[int, int]
# One expert's parameters, by name.
Slot = Mapping[str, Tensor]


class ExpertSource(Protocol):
    """What experts are read from: a store, or the tier below. Any number of threads at once.

    A source that brings several experts at once for less than one after the other is a `BatchSource` too.
    """

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]

    def read(self, layer: int, expert: int) -> Slot:
        """One expert, in memory of its own."""
        ...

    def give_back(self) -> None:
        """Memory that is kept for the next reads goes to the system."""
        ...


@runtime_checkable
class BatchSource(Protocol):
    """Reads all that a look-up misses in one call, in the thread that looks up. Stores on the CPU have threads."""

    def read_many(self, layer: int, experts: Sequence[int]) -> Mapping[int, Slot]:
        """These experts of one layer, each in memory of its own, by number.

        When it raises, the experts are read one by one, so that each failure is that of its expert; where none fails,
        the look-up raises what this did.
        """
        ...


@runtime_checkable
class TierSource(Protocol):
    """A source whose slots lie in memory of its own, of a fixed size, which a device fills and reads in an order of its
    own: a GPU. The cache over it tells how many slots there shall be, and which thread computes with which of them.
    """

    slot_bytes: tuple[int, ...]

    def leased(self, slots: Mapping[int, Slot]) -> dict[int, Slot]:
        """The calling thread queues kernels that read these slots from now on, until it gives them back. What is in
        them may still be under way. Returns what it computes with, while the lease holds the slots."""
        ...

    def late(self, slots: Mapping[int, Slot]) -> frozenset[int]:
        """Those of these slots, as a cache holds them, that are under way and not waited for."""
        ...

    def wait_for(self, slots: Mapping[int, Slot]) -> None:
        """What the calling thread queues from now on begins once these slots are there."""
        ...

    def fit(self, slots: Mapping[int, int], movable: Mapping[Key, Slot]) -> Fitted:
        """Have so many slots of each size (bytes), and no memory for more.

        movable: the slots that nobody computes with. They may get other numbers, or be lost.
        """
        ...


@dataclass(frozen=True, slots=True)
class Fitted:
    """What became of a tier's memory.

    whole: it is as it was asked for; else slots that are computed with are in the way, or the device has no more.
    slots: how many it has, by size; fewer than asked for only where the device has no more.
    lost: the experts whose contents are gone.
    """

    whole: bool
    slots: Mapping[int, int]
    lost: tuple[Key, ...] = ()


@dataclass(slots=True)
class LayerCounters:
    """What is counted of one layer. Look-ups are `hits` + `misses`.

    prefetch_hits: those hits whose bytes were read ahead, at their first look-up; under way still, the wait counts as
    stall. prefetched: experts read ahead. bytes: read, ahead or not, as they are in memory. stall_s: seconds that
    leases waited for reads.
    """

    hits: int = 0
    misses: int = 0
    prefetch_hits: int = 0
    prefetched: int = 0
    bytes: int = 0
    stall_s: float = 0.0


_COUNTED = tuple(field.name for field in fields(LayerCounters))


def counted(counters: Sequence[LayerCounters], layers: bool) -> dict[str, Any]:
    """Sums of the counters, and the hit rate; with `layers` those of each layer too. Quick without: it is asked for
    several times a second."""
    found: dict[str, Any] = {name: sum([getattr(layer, name) for layer in counters]) for name in _COUNTED}
    uses = found["hits"] + found["misses"]
    found["hit_rate"] = found["hits"] / uses if uses else 0.0
    if layers:
        found["layers"] = [{name: getattr(layer, name) for name in _COUNTED} for layer in counters]
    return found


def check_options(policy: str, scope: str, threads: int, decay: float | None = None) -> None:
    """Raises ConfigError for a policy, a scope, a number of reading threads or a decay that there is not."""
    for what, value, known in (("policy", policy, tuple(ONLINE)), ("scope", scope, CACHE_SCOPES)):
        if value not in known:
            raise ConfigError(f"expert cache {what} {value!r} is not one of {', '.join(known)}.")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads {threads!r}: give the number of reads at a time, at least 1.")
    if decay is not None:
        if "decay" not in ONLINE[policy].takes:
            raise ConfigError(f"expert cache decay {decay!r}: policy {policy!r} has none; leave it out, or take lrfu.")
        make_policy(policy, 1, decay=decay)  # it refuses what it cannot take
