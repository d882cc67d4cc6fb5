"""The experts held in memory: slots under a budget in bytes, filled from storage, given up by a policy.

Keys are (layer, expert). One policy rules all layers, or each layer has its own share of the budget. A lease holds the
experts that are computed with now; what is leased is never evicted.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor

from remoe_adapt.cache.policy import Policy
from remoe_adapt.cache.simulate import make_policy
from remoe_adapt.errors import ConfigError
from remoe_adapt.host_memory import return_freed_memory

Key = tuple[int, int]
# One expert's parameters, by name.
Slot = Mapping[str, Tensor]

POLICIES = ("lru", "lfu", "lrfu")
SCOPES = ("global", "layer")
READ_THREADS = 4


class ExpertSource(Protocol):
    """What experts are read from; `ExpertStore` is one."""

    layers: tuple[str, ...]
    num_experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]

    def read(self, layer: int, expert: int) -> dict[str, Tensor]: ...

    def give_back(self) -> None: ...


@dataclass(slots=True)
class LayerCounters:
    """Of one layer. `bytes`: read, as they are in memory; `stall_s`: seconds that leases waited for reads."""

    hits: int = 0
    misses: int = 0
    bytes: int = 0
    stall_s: float = 0.0


class Lease:
    """Experts that stay while the lease is open: `slots` maps each to its parameters. A context manager."""

    def __init__(self, cache: ExpertCache, keys: list[Key], slots: dict[int, Slot]) -> None:
        self._cache, self._keys, self.slots = cache, keys, slots

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def release(self) -> None:
        """Give the experts back; once is enough."""
        keys, self._keys, self.slots = self._keys, [], {}
        self._cache.unpin(keys)


class ExpertCache:
    """Slots for at most `budget_bytes` of a source's experts; any number of threads at once.

    policy: "lru", "lfu" or "lrfu". scope: "global", one budget over all layers, or "layer", each layer its share.
    threads: reads at a time.

    Raises ConfigError for an unknown policy or scope, and for a budget that does not hold one expert (of each layer
    with scope "layer").
    """

    def __init__(
        self,
        source: ExpertSource,
        budget_bytes: int,
        *,
        policy: str = "lrfu",
        scope: str = "global",
        threads: int = READ_THREADS,
    ) -> None:
        for what, value, known in (("policy", policy, POLICIES), ("scope", scope, SCOPES)):
            if value not in known:
                raise ConfigError(f"expert cache {what} {value!r} is not one of {', '.join(known)}.")
        if isinstance(threads, bool) or not isinstance(threads, int) or threads < 1:
            raise ConfigError(f"threads {threads!r}: give the number of reads at a time, at least 1.")
        self.source, self.policy, self.scope = source, policy, scope
        layers = range(len(source.layers))
        self._domains = [list(layers)] if scope == "global" else [[layer] for layer in layers]
        self._limits = self._shares(budget_bytes)
        policies: list[Policy[Key]] = [make_policy(policy, limit) for limit in self._limits]
        self._domain_of = [0 if scope == "global" else layer for layer in layers]
        self._policies, self._budget_bytes = policies, budget_bytes
        self._slots: dict[Key, Slot] = {}
        self._loading: dict[Key, Future[Slot]] = {}
        self._pins: Counter[Key] = Counter()
        self._tokens, self._last_layer = [0] * len(self._domains), [-1] * len(self._domains)
        self._counters = [LayerCounters() for _ in layers]
        self._shown: dict[int, list[Tensor]] = {}
        self._changed = threading.Condition()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="expert-read")

    def __deepcopy__(self, memo: object) -> ExpertCache:
        """A copied model computes on the same slots."""
        return self

    @property
    def budget_bytes(self) -> int:
        """In force: a smaller one counts once `resize` has brought the slots below it."""
        return self._budget_bytes

    @property
    def resident_bytes(self) -> int:
        """Of the slots, those that are being filled among them."""
        return sum(policy.used for policy in self._policies)

    def resident(self) -> list[Key]:
        """The (layer, expert) pairs whose bytes are there."""
        with self._changed:
            return sorted(self._slots)

    def lease(self, layer: int, experts: Iterable[int], *, continues: bool = False) -> Lease:
        """The first of these distinct experts, in their order: as many as the budget holds at a time, at least one.

        Those that are missing are read now, in parallel. continues: more experts of the last lease's token. While other
        leases leave too little room this waits, so a thread must not ask while it has a lease open.

        Raises what the source raises, once every read of this call has ended; the cache then holds what could be read.
        """
        with self._changed:
            domain = self._domain_of[layer]
            policy, size = self._policies[domain], self.source.expert_bytes[layer]
            wanted = list(experts)
            while True:
                keys = [(layer, expert) for expert in wanted[: max(1, self._limits[domain] // size)]]
                if self._pinned_bytes(domain, keys) <= min(self._limits[domain], policy.capacity):
                    break
                self._changed.wait()
            missing = [key for key in keys if key not in policy]
            self._pins.update(keys)
            policy.touch(keys, self._tick(layer, continues))
            for key in missing:
                self._drop(policy.make_room(size, self._pins))
                policy.admit(key, size)
                self._loading[key] = Future()
            counters = self._counters[layer]
            counters.hits += len(keys) - len(missing)
            counters.misses += len(missing)
            awaited = {key: self._loading[key] for key in keys if key in self._loading}
            slots = {key[1]: self._slots[key] for key in keys if key not in awaited}
        if awaited:
            try:
                slots |= self._await(layer, missing, awaited)
            except BaseException:
                self.unpin(keys)
                raise
        return Lease(self, keys, slots)

    def resize(self, budget_bytes: int) -> None:
        """Another budget from now on. What no longer fits goes at once (what is leased, when its lease ends; this waits
        for that), and its memory goes back to the system.

        Raises ConfigError as the constructor; the budget is unchanged then.
        """
        limits = self._shares(budget_bytes)
        before = self.resident_bytes
        with self._changed:
            self._limits = limits
            for domain, policy in enumerate(self._policies):
                while self._limits is limits:  # else a later call has taken over
                    held = self._pinned_bytes(domain, ())
                    self._drop(policy.resize(max(limits[domain], held), self._pins))
                    if held <= limits[domain]:
                        break
                    self._changed.wait()
            if self._limits is limits:
                self._budget_bytes = budget_bytes
            self._changed.notify_all()
        if self.resident_bytes < before:
            self.source.give_back()
            return_freed_memory()

    def stats(self) -> dict[str, Any]:
        """JSON-ready: settings, what is resident, counters summed up and (`layers`) for each layer."""
        with self._changed:
            layers = [asdict(counters) for counters in self._counters]
            budget_bytes, resident_bytes = self._budget_bytes, self.resident_bytes
        total = {name: sum(layer[name] for layer in layers) for name in ("hits", "misses", "bytes", "stall_s")}
        uses = total["hits"] + total["misses"]
        return {
            "policy": self.policy,
            "scope": self.scope,
            "budget_bytes": budget_bytes,
            "resident_bytes": resident_bytes,
            "hit_rate": total["hits"] / uses if uses else 0.0,
            **total,
            "layers": layers,
        }

    def reset_stats(self) -> None:
        """Counters start again at 0; slots and the policy's memory of uses stay."""
        with self._changed:
            self._counters = [LayerCounters() for _ in self._counters]

    def show_residency(self, tensors: Sequence[Tensor], layers: Sequence[int] | None = None) -> None:
        """Keep 1 where an expert is in its slot and 0 elsewhere in these [1, E] tensors, in place, until the next call.

        layers: the layer of each; None: one for each, in order. No tensors end it.

        Raises ConfigError when numbers or shapes do not fit.
        """
        places = list(range(len(self.source.layers)))[: len(tensors) or 0] if layers is None else list(layers)
        counts = [self.source.num_experts[layer] for layer in places]
        if [tuple(tensor.shape) for tensor in tensors] != [(1, count) for count in counts]:
            shapes = [list(tensor.shape) for tensor in tensors]
            raise ConfigError(f"residency tensors {shapes} for layers of {counts} experts: give one [1, E] for each.")
        with self._changed, torch.no_grad():
            self._shown = {}
            for layer, tensor in zip(places, tensors, strict=True):
                self._shown.setdefault(layer, []).append(tensor)
                tensor.zero_()
            for key in self._slots:
                self._show(key, 1.0)

    def unpin(self, keys: Sequence[Key]) -> None:
        """End of a lease; called by it."""
        with self._changed:
            for key in keys:
                self._pins[key] -= 1
                if not self._pins[key]:
                    del self._pins[key]
            self._changed.notify_all()

    # Under the lock

    def _shares(self, budget_bytes: int) -> list[int]:
        if isinstance(budget_bytes, bool) or not isinstance(budget_bytes, int):
            raise ConfigError(f"expert cache budget {budget_bytes!r}: give a number of bytes.")
        sizes = self.source.expert_bytes
        weights = [sum(self.source.num_experts[layer] * sizes[layer] for layer in layers) for layers in self._domains]
        limits = [budget_bytes * weight // sum(weights) for weight in weights]
        for layers, limit in zip(self._domains, limits, strict=True):
            largest = max(sizes[layer] for layer in layers)
            if limit < largest:
                needed = max(sizes) if self.scope == "global" else -(-largest * sum(weights) // min(weights))
                raise ConfigError(
                    f"expert cache budget {budget_bytes} bytes cannot hold one expert: give at least {needed}."
                )
        return limits

    def _tick(self, layer: int, continues: bool) -> int:
        """The token that a use by `layer` belongs to, as its policy counts them."""
        domain = self._domain_of[layer]
        if not continues:
            # One policy over all layers: a new token has come when the layers start again.
            self._tokens[domain] += layer <= self._last_layer[domain]
            self._last_layer[domain] = layer
        return self._tokens[domain]

    def _pinned_bytes(self, domain: int, more: Iterable[Key]) -> int:
        pinned = {key for key in self._pins if self._domain_of[key[0]] == domain}.union(more)
        return sum(self.source.expert_bytes[layer] for layer, _ in pinned)

    def _drop(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if self._slots.pop(key, None) is not None:
                self._show(key, 0.0)

    def _show(self, key: Key, value: float) -> None:
        with torch.no_grad():
            for tensor in self._shown.get(key[0], ()):
                tensor[0, key[1]] = value

    # Without it

    def _await(self, layer: int, missing: list[Key], awaited: dict[Key, Future[Slot]]) -> dict[int, Slot]:
        started = time.perf_counter()
        for key in missing[1:]:
            self._pool.submit(self._fetch, key, awaited[key])
        if missing:
            self._fetch(missing[0], awaited[missing[0]])
        wait(awaited.values())
        with self._changed:
            self._counters[layer].stall_s += time.perf_counter() - started
        return {key[1]: future.result() for key, future in awaited.items()}

    def _fetch(self, key: Key, future: Future[Slot]) -> None:
        layer, size = key[0], self.source.expert_bytes[key[0]]
        slot: Slot | None = None
        failure: BaseException | None = None
        try:
            slot = self.source.read(*key)
        except BaseException as error:  # whoever waits for it gets it
            failure = error
        with self._changed:
            if self._loading.get(key) is future:
                del self._loading[key]
            policy = self._policies[self._domain_of[layer]]
            if slot is None:
                policy.discard(key)
            elif key in policy:  # it is, unless whoever asked was interrupted
                self._slots[key] = slot
                self._counters[layer].bytes += size
                self._show(key, 1.0)
        if slot is None:
            future.set_exception(failure)
        else:
            future.set_result(slot)
