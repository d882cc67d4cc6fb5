"""Who may take how much of a cache's budget, what of it is leased, and how far a smaller one has come into force."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType

from torch import nn

from remoe_adapt._support import held_back
from remoe_adapt.device_profile import parse_size
from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction import LRFU_DECAY, Policy, make_policy
from remoe_adapt.expert_cache.types import ExpertSource, Key, Slot, TierSource

# 1 / KV_CACHE_PART of `memory` is left for the KV cache, which grows only once the model runs.
KV_CACHE_PART = 16


class Lease:
    """Experts that stay while the lease is open: `slots` maps each to its parameters. A context manager.

    late: those whose slots nobody may read before `wait`.
    """

    def __init__(self, end: Callable[[Lease], None], tier: TierSource | None = None) -> None:
        self._end, self._tier = end, tier
        self.slots: dict[int, Slot] = {}
        # What keeps the slots of a tier, whose `slots` are views alone.
        self.held: dict[int, Slot] = {}
        self.late: frozenset[int] = frozenset()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def wait(self) -> None:
        """All slots may be read by what this thread queues from now on."""
        if self.late:
            assert self._tier is not None
            self._tier.wait_for(self.held)
            self.late = frozenset()

    def release(self) -> None:
        """Give the experts back; once is enough."""
        with held_back():
            self.slots, self.held, self.late = {}, {}, frozenset()
            self._end(self)


class Shares:
    """Bookkeeping of a cache's budget, under its lock.

    A domain is a group of layers with a policy and a limit in bytes: all of them (scope "global"), or one each. pins:
    how many leases and reads hold an expert. budget_bytes: in force; asked_bytes: the one asked for last, which
    `shrink` brings into force; in_force: it is; requests: how often `ask` was called.

    Raises ConfigError when a domain could not hold one expert of each of its layers.
    """

    def __init__(
        self, source: ExpertSource, budget_bytes: int, policy: str, scope: str, decay: float | None = None
    ) -> None:
        self._source = source
        self._domains = domains_of(source, scope)
        domain_of = {layer: at for at, layers in enumerate(self._domains) for layer in layers}
        self._domain_of = [domain_of[layer] for layer in range(len(source.layers))]
        self.limits = shares_of(budget_bytes, source, self._domains)
        decay = LRFU_DECAY if decay is None else decay
        self.policies: list[Policy[Key]] = [make_policy(policy, limit, decay=decay) for limit in self.limits]
        self.budget_bytes = self.asked_bytes = budget_bytes
        self.in_force, self.requests = True, 0
        # A plain dict: a Counter's methods run in Python, and each look-up pays two of them.
        self.pins: dict[Key, int] = {}
        # By the id of each open lease: itself, its thread, its experts. The reference is weak, so that a lease whose
        # caller was interrupted before it could close it does not keep its experts for ever.
        self._leases: dict[int, tuple[weakref.ref[Lease], int, list[Key]]] = {}
        self._tokens, self._last_layer = [0] * len(self._domains), [-1] * len(self._domains)

    def policy_of(self, layer: int) -> Policy[Key]:
        return self.policies[self._domain_of[layer]]

    def limit_of(self, layer: int) -> int:
        return self.limits[self._domain_of[layer]]

    def with_limit_of(self, layer: int, keys: Iterable[Key]) -> list[Key]:
        """The keys that share this layer's limit."""
        return [key for key in keys if self._domain_of[key[0]] == self._domain_of[layer]]

    def tick(self, layer: int, continues: bool) -> int:
        """The token that a use by `layer` belongs to, as its policy counts them."""
        domain = self._domain_of[layer]
        if not continues:
            # One policy over all layers: a new token has come when the layers start again.
            self._tokens[domain] += layer <= self._last_layer[domain]
            self._last_layer[domain] = layer
        return self._tokens[domain]

    # Leases

    def open(self, lease: Lease, keys: list[Key]) -> None:
        """From now on these experts are held by it."""
        # Ids are used again: an entry of this id is that of a lease that died unclosed.
        if (dead := self._leases.pop(id(lease), None)) is not None:
            self.unpin(dead[2])
        self._leases[id(lease)] = weakref.ref(lease), threading.get_ident(), keys
        self.pin(keys)

    def held_by(self, lease: Lease) -> list[Key]:
        """Its experts; none when it is closed."""
        ref, _, keys = self._leases.get(id(lease), (None, 0, []))
        return keys if ref is not None and ref() is lease else []

    def close(self, lease: Lease) -> None:
        """Its experts are given back; once is enough."""
        if keys := self.held_by(lease):
            del self._leases[id(lease)]
            self.unpin(keys)

    def close_lost(self, *, of_this_thread: bool = False) -> bool:
        """Close leases that nobody has any more.

        of_this_thread: the calling thread's too, which is about to wait for room: it would wait for itself (an
            interrupt kept it from closing them). Their tensors live on as long as it holds them.
        """
        closing = threading.get_ident() if of_this_thread else None
        lost = [at for at, (ref, thread, _) in self._leases.items() if thread == closing or ref() is None]
        for at in lost:
            self.unpin(self._leases.pop(at)[2])
        return bool(lost)

    def slots(self, *, of_budget: bool = True) -> dict[int, int]:
        """How many slots of each size a tier needs, by the bytes of a slot: for what is leased and being read, and for
        as much as the budget holds (`of_budget`).
        """
        assert isinstance(self._source, TierSource)
        found = dict.fromkeys(self._source.slot_bytes, 0)
        for layer, _ in self.pins:
            found[self._source.slot_bytes[layer]] += 1
        if of_budget:
            held = dict.fromkeys(found, 0)
            for limit, layers in zip(self.limits, self._domains, strict=True):
                # The largest experts may be fewer, but never more than all that there are.
                least = min(self._source.expert_bytes[layer] for layer in layers)
                there = sum(self._source.num_experts[layer] for layer in layers)
                held[self._source.slot_bytes[layers[0]]] += min(limit // least, there)
            found = {size: max(count, held[size]) for size, count in found.items()}
        return found

    def close_all(self) -> None:
        """Forget all leases and reads: in the child of a fork nobody closes those of its parent."""
        self._leases.clear()
        self.pins.clear()

    def pin(self, keys: Iterable[Key]) -> None:
        pins = self.pins
        for key in keys:
            pins[key] = pins.get(key, 0) + 1

    def unpin(self, keys: Iterable[Key]) -> None:
        pins = self.pins
        for key in keys:
            left = pins.pop(key, 0) - 1
            if left > 0:
                pins[key] = left

    def fits(self, layer: int, keys: list[Key]) -> bool:
        """Whether these experts of it can be leased beside what is leased and read ahead now."""
        domain = self._domain_of[layer]
        # Nothing is leased and no smaller budget is on its way, as in every step of one thread: no need to count bytes.
        capacity, limit = self.policies[domain].capacity, self.limits[domain]
        return (not self.pins and capacity == limit) or self._pinned_bytes(domain, keys) <= min(limit, capacity)

    def _pinned_bytes(self, domain: int, more: Iterable[Key] = ()) -> int:
        pinned = {key for key in self.pins if self._domain_of[key[0]] == domain}.union(more)
        return sum(self._source.expert_bytes[layer] for layer, _ in pinned)

    # Another budget

    def ask(self, budget_bytes: int) -> int:
        """New leases keep to this budget from now on; the number of the request.

        Raises as the constructor, and changes nothing then.
        """
        self.limits = shares_of(budget_bytes, self._source, self._domains)
        self.asked_bytes, self.in_force = budget_bytes, False
        self.requests += 1
        return self.requests

    def shrink(self) -> list[Key]:
        """Evict down to the budget asked for, as far as leases allow; returns what was evicted."""
        dropped = []
        # As far as the leases allow: what they hold goes when the last of them ends, which shrinks again.
        for domain, (policy, limit) in enumerate(zip(self.policies, self.limits, strict=True)):
            dropped += policy.resize(max(limit, self._pinned_bytes(domain)), self.pins)
        if all(policy.capacity == limit for policy, limit in zip(self.policies, self.limits, strict=True)):
            self.budget_bytes, self.in_force = self.asked_bytes, True
        return dropped


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
    """The bytes of a budget that `check_budget` has passed: a size, bytes, or a share (a float) of `total_bytes`."""
    if isinstance(value, str):
        return parse_size(value)
    return int(value * total_bytes) if isinstance(value, float) else value


def bytes_of_dense(skeleton: nn.Module, experts: Mapping[str, nn.Module]) -> int:
    """Bytes of all parameters and buffers of a model, on the meta device too, but of its experts modules."""
    left_out = {id(param) for module in experts.values() for param in module.parameters(recurse=False)}
    tensors = itertools.chain(skeleton.parameters(), skeleton.buffers())
    return sum(tensor.nbytes for tensor in tensors if id(tensor) not in left_out)


def bytes_for_slots(memory: str | int, dense_bytes: int) -> int:
    """What `memory` leaves for slots beside the KV cache and the dense part.

    memory: a size, or bytes.
    dense_bytes: with the weights of an expert, where these are dequantised.

    Raises ConfigError when it leaves nothing.
    """
    memory_bytes = budget_in_bytes(memory, 0)
    left = memory_bytes - memory_bytes // KV_CACHE_PART - dense_bytes
    if left <= 0:
        raise ConfigError(
            f"memory {memory!r}: the dense part alone takes {dense_bytes / (1 << 20):.0f} MiB, and a sixteenth is left "
            "for the KV cache; give more, or a smaller model."
        )
    return left


def shares_of(budget_bytes: int, source: ExpertSource, domains: Sequence[Sequence[int]]) -> list[int]:
    """The part of a budget that each of these groups of layers has, in proportion to its experts.

    Raises ConfigError when a group could not hold one expert of each of its layers.
    """
    if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
        raise ConfigError(f"expert cache budget {budget_bytes!r}: give a number of bytes.")
    if budget_bytes < (needed := least_budget(source, domains)):
        raise ConfigError(f"expert cache budget {budget_bytes} bytes cannot hold one expert: give at least {needed}.")
    # In proportion to what each group could hold, so that models whose layers differ hit alike in all of them.
    weights = _weights(source, domains)
    return [budget_bytes * weight // sum(weights) for weight in weights]


def domains_of(source: ExpertSource, scope: str) -> list[list[int]]:
    """The groups of layers that share a limit."""
    layers = range(len(source.layers))
    if scope != "global":
        return [[layer] for layer in layers]
    # A tier has a pool for each size of slot: room of one pool is none of another.
    sizes = source.slot_bytes if isinstance(source, TierSource) else [0] * len(layers)
    groups: dict[int, list[int]] = {}
    for layer in layers:
        groups.setdefault(sizes[layer], []).append(layer)
    return list(groups.values())


def least_budget(source: ExpertSource, domains: Sequence[Sequence[int]]) -> int:
    """The smallest budget in bytes of which each group's part holds one expert of each of its layers."""
    weights = _weights(source, domains)
    largest = [max(source.expert_bytes[layer] for layer in layers) for layers in domains]
    # Rounded up: the share of a group is rounded down, and must still hold its largest expert.
    return max(-(-size * sum(weights) // weight) for size, weight in zip(largest, weights, strict=True))


def _weights(source: ExpertSource, domains: Sequence[Sequence[int]]) -> list[int]:
    return [sum(source.num_experts[layer] * source.expert_bytes[layer] for layer in layers) for layers in domains]
