"""What an expert cache and its users share: where experts come from, what a slot is, what is counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Protocol

from torch import Tensor

from remoe_adapt.errors import ConfigError

# (layer, expert)
Key = tuple[int, int]
# One expert's parameters, by name.
Slot = Mapping[str, Tensor]


class ExpertSource(Protocol):
    """What experts are read from: a store, or the tier below. Any number of threads at once."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]

    def read(self, layer: int, expert: int) -> Slot:
        """One expert, in memory of its own."""
        ...

    def give_back(self) -> None:
        """Memory that is kept for the next reads goes to the system."""
        ...


@dataclass(slots=True)
class LayerCounters:
    """Of one layer. Look-ups are `hits` + `misses`.

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


def each(layers: Sequence[LayerCounters]) -> list[dict[str, Any]]:
    """Counters of each layer."""
    return [{name: getattr(counters, name) for name in _COUNTED} for counters in layers]


def total(layers: Sequence[LayerCounters]) -> dict[str, Any]:
    """Sums of the counters, and the hit rate; quick enough to be asked for several times a second."""
    sums = {name: sum([getattr(counters, name) for counters in layers]) for name in _COUNTED}
    uses = sums["hits"] + sums["misses"]
    return {"hit_rate": sums["hits"] / uses if uses else 0.0, **sums}


class Lease:
    """Experts that stay while the lease is open: `slots` maps each to its parameters. A context manager."""

    def __init__(self, unpin: Callable[[list[Key]], None], keys: list[Key], slots: dict[int, Slot]) -> None:
        self._unpin, self._keys, self.slots = unpin, keys, slots

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give the experts back; once is enough."""
        keys, self._keys, self.slots = self._keys, [], {}
        self._unpin(keys)


def shares_of(budget_bytes: int, source: ExpertSource, domains: Sequence[Sequence[int]]) -> list[int]:
    """The part of a budget that each of these groups of layers has, in proportion to its experts.

    Raises ConfigError when a group could not hold one expert of each of its layers.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise ConfigError(f"expert cache budget {budget_bytes!r}: give a number of bytes.")
    sizes = source.expert_bytes
    weights = [sum(source.num_experts[layer] * sizes[layer] for layer in layers) for layers in domains]
    limits = [budget_bytes * weight // sum(weights) for weight in weights]
    largest = [max(sizes[layer] for layer in layers) for layers in domains]
    if any(limit < size for limit, size in zip(limits, largest, strict=True)):
        needed = max(-(-size * sum(weights) // weight) for size, weight in zip(largest, weights, strict=True))
        raise ConfigError(f"expert cache budget {budget_bytes} bytes cannot hold one expert: give at least {needed}.")
    return limits
