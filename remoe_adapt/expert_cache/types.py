"""What an expert cache and its users share: where experts come from, what a slot is, what is counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Protocol

from torch import Tensor

from remoe_adapt.device_profile import CACHE_SCOPES, parse_size
from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction import ONLINE

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


def counted(counters: Sequence[LayerCounters], layers: bool) -> dict[str, Any]:
    """Sums of the counters, and the hit rate; with `layers` those of each layer too. Quick without: it is asked for
    several times a second."""
    found: dict[str, Any] = {name: sum([getattr(layer, name) for layer in counters]) for name in _COUNTED}
    uses = found["hits"] + found["misses"]
    found["hit_rate"] = found["hits"] / uses if uses else 0.0
    if layers:
        found["layers"] = [{name: getattr(layer, name) for name in _COUNTED} for layer in counters]
    return found


def check_options(policy: str, scope: str, threads: int) -> None:
    """Raises ConfigError for a policy, a scope or a number of reading threads that there is not."""
    for what, value, known in (("policy", policy, tuple(ONLINE)), ("scope", scope, CACHE_SCOPES)):
        if value not in known:
            raise ConfigError(f"expert cache {what} {value!r} is not one of {', '.join(known)}.")
    if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
        raise ConfigError(f"threads {threads!r}: give the number of reads at a time, at least 1.")


def check_budget(what: str, value: object) -> None:
    """Raises ConfigError for anything but a size, a number of bytes or a share of all experts."""
    if isinstance(value, str):
        try:
            parse_size(value)
        except ConfigError as error:
            raise ConfigError(f"{what}: {error}; or a share of all experts, as 0.25") from error
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(
            f"{what} {value!r}: give a size, as '2GiB', a number of bytes, or a share of all experts, as 0.25; other "
            "settings of the cache are options of their own (policy=, prefetch= ...)."
        )
    elif isinstance(value, float) and not 0.0 < value <= 1.0:
        raise ConfigError(f"{what} {value!r}: a share of all experts is above 0 and at most 1.0.")


def budget_in_bytes(value: str | int | float, total_bytes: int) -> int:
    """Of a size as "2GiB", a number of bytes, or a share (a float) of `total_bytes`; checked by `check_budget`."""
    if isinstance(value, str):
        return parse_size(value)
    return int(value * total_bytes) if isinstance(value, float) else value


def shares_of(budget_bytes: int, source: ExpertSource, domains: Sequence[Sequence[int]]) -> list[int]:
    """The part of a budget that each of these groups of layers has, in proportion to its experts.

    Raises ConfigError when a group could not hold one expert of each of its layers.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise ConfigError(f"expert cache budget {budget_bytes!r}: give a number of bytes.")
    if budget_bytes < (needed := least_budget(source, domains)):
        raise ConfigError(f"expert cache budget {budget_bytes} bytes cannot hold one expert: give at least {needed}.")
    weights = _weights(source, domains)
    return [budget_bytes * weight // sum(weights) for weight in weights]


def domains_of(source: ExpertSource, scope: str) -> list[list[int]]:
    """The groups of layers that share a limit."""
    layers = list(range(len(source.layers)))
    return [layers] if scope == "global" else [[layer] for layer in layers]


def least_budget(source: ExpertSource, domains: Sequence[Sequence[int]]) -> int:
    """The smallest budget in bytes of which each group's part holds one expert of each of its layers."""
    weights = _weights(source, domains)
    largest = [max(source.expert_bytes[layer] for layer in layers) for layers in domains]
    return max(-(-size * sum(weights) // weight) for size, weight in zip(largest, weights, strict=True))


def _weights(source: ExpertSource, domains: Sequence[Sequence[int]]) -> list[int]:
    return [sum(source.num_experts[layer] * source.expert_bytes[layer] for layer in layers) for layers in domains]
