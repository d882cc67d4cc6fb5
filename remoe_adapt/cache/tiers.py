"""The experts held in memory: slots under a budget in bytes, filled from storage, given up by a policy.

One policy rules all layers, or each layer has its own share of the budget. A lease holds the experts that are computed
with now; what is leased is never evicted. Experts may be read ahead of their lease, while no lease waits for a read.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from remoe_adapt.cache.ahead import ReadAheads
from remoe_adapt.cache.arrivals import Arrival, read_all
from remoe_adapt.cache.policy import Policy
from remoe_adapt.cache.residency import Residency
from remoe_adapt.cache.simulate import make_policy
from remoe_adapt.cache.slots import ExpertSource, Key, LayerCounters, Lease, Slot, check_options, counted, shares_of
from remoe_adapt.errors import ConfigError
from remoe_adapt.forks import mend_after_fork
from remoe_adapt.host_memory import return_freed_memory

READ_THREADS = 4
# Read-aheads at a time. What a wrong one costs ends with it, so few are begun.
AHEAD_THREADS = 2
# Read-aheads, waiting and under way, take no more of a budget than this part.
_AHEAD_PART = 2
_MISS_S_RATE = 0.1


class ExpertCache:
    """Slots for at most `budget_bytes` of a source's experts; any number of threads at once.

    policy: "lru", "lfu" or "lrfu". scope: "global", one budget over all layers, or "layer", each layer its share.
    threads: reads at a time. below: the tier that the source reads from, for `stats` and `clear`. released: called in
    the thread that gives a lease back, before anything of it can be evicted.

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
        below: ExpertCache | None = None,
        released: Callable[[], None] | None = None,
    ) -> None:
        check_options(policy, scope, threads)
        self.source, self.policy, self.scope, self.below = source, policy, scope, below
        # Seconds that a lease waits for each expert it misses, lately.
        self.miss_s = 0.0
        self._released = released
        layers = range(len(source.layers))
        self._domains = [list(layers)] if scope == "global" else [[layer] for layer in layers]
        self._limits = shares_of(budget_bytes, source, self._domains)
        policies: list[Policy[Key]] = [make_policy(policy, limit) for limit in self._limits]
        self._domain_of = [0 if scope == "global" else layer for layer in layers]
        self._policies, self._budget_bytes = policies, budget_bytes
        self._held = [0 for _ in layers]
        self._slots: dict[Key, Slot] = {}
        self._tokens, self._last_layer = [0] * len(self._domains), [-1] * len(self._domains)
        self._counters = [LayerCounters() for _ in layers]
        self._residency = Residency(source.num_experts)
        self._threads = threads
        self._nothing_under_way()
        mend_after_fork(self)

    def _nothing_under_way(self) -> None:
        self._changed = threading.Condition()
        self._loading: dict[Key, Arrival] = {}
        self._pins: Counter[Key] = Counter()
        self._ahead, self._waiting = ReadAheads(), 0
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expert-read")
        self._ahead_pool = ThreadPoolExecutor(AHEAD_THREADS, thread_name_prefix="expert-read-ahead")

    def after_fork(self) -> None:
        """In the child: what the parent's threads were reading, computing with or about to change is nobody's."""
        for key in [key for policy in self._policies for key in policy if key not in self._slots]:
            self._policies[self._domain_of[key[0]]].discard(key)
        self._slots = {key: slot for key, slot in self._slots.items() if key in self._policies[self._domain_of[key[0]]]}
        self._held = [sum(at == layer for at, _ in self._slots) for layer in range(len(self._held))]
        self._nothing_under_way()

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
        wanted = list(experts)
        with self._changed:
            domain, ahead = self._domain_of[layer], self._ahead
            policy, size = self._policies[domain], self.source.expert_bytes[layer]
            if ahead.expected and not continues:
                self._cancel(ahead.settle(layer, wanted))
            while True:
                keys = [(layer, expert) for expert in wanted[: max(1, self._limits[domain] // size)]]
                if self._fits(domain, keys):
                    break
                if not self._cancel([key for key in ahead.queued if self._domain_of[key[0]] == domain]):
                    self._changed.wait()
            missing = [key for key in keys if key not in policy or key in ahead.queued]
            self._pins.update(keys)
            policy.touch(keys, self._tick(layer, continues))
            for key in missing:
                if key in ahead.queued:  # has its room, and now the read is this lease's own
                    ahead.forget(key)
                    self._unpin((key,))
                else:
                    self._make_room(policy, size)
                    policy.admit(key, size)
                    self._loading[key] = Arrival()
            counters = self._counters[layer]
            counters.hits += len(keys) - len(missing)
            counters.misses += len(missing)
            counters.prefetch_hits += ahead.use(keys)
            awaited = {key: self._loading[key] for key in keys if key in self._loading} if self._loading else {}
            slots = {key[1]: self._slots[key] for key in keys if key not in awaited}
            self._waiting += bool(awaited)
        if awaited:
            try:
                slots |= self._await(layer, missing, awaited)
            except BaseException:
                self.unpin(keys)
                raise
        return Lease(self.unpin, keys, slots)

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Read those of these experts that are missing, in their order, before a lease asks for them. Never waits.

        Until the layer's next lease none of them is evicted for another one's sake; that lease calls off the reads that
        it does not want and that have not begun. Nothing is read that needs the room of a leased or expected expert,
        or half of the budget. A read that fails leaves no trace: a lease reads again, and raises.
        """
        with self._changed:
            domain, size, ahead = self._domain_of[layer], self.source.expert_bytes[layer], self._ahead
            policy, limit = self._policies[domain], self._limits[domain]
            keys = [(layer, expert) for expert in experts]
            ahead.expected.update(keys)
            for key in keys:
                if key in policy:
                    continue
                reading = sum(self.source.expert_bytes[at] for at, _ in ahead.reading if self._domain_of[at] == domain)
                if policy.capacity != limit or reading + size > limit // _AHEAD_PART:
                    break
                try:
                    self._drop(policy.make_room(size, self._pins.keys() | ahead.expected))
                except ConfigError:
                    break
                policy.admit(key, size)
                self._loading[key] = Arrival()
                self._pins[key] += 1
                ahead.queue(key)
                try:
                    self._ahead_pool.submit(self._read_ahead, key)
                except RuntimeError:  # it can have no thread
                    self._cancel([key])

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """Those of these experts that are neither there nor being read, in their order."""
        with self._changed:
            policy = self._policies[self._domain_of[layer]]
            return [expert for expert in experts if (layer, expert) not in policy]

    def is_whole(self, layer: int) -> bool:
        """All experts of this layer are there."""
        return self._held[layer] == self.source.num_experts[layer]

    def clear(self) -> None:
        """Drop all experts that are not leased, here and in the tiers below; their memory goes back to the system.

        Counters and the policy's memory of uses stay.
        """
        with self._changed:
            self._cancel(list(self._ahead.queued))
            begun = set(self._ahead.begun)
            while begun & self._ahead.begun:
                self._changed.wait()
            self._ahead.expected.clear()
            for policy in self._policies:
                for key in [key for key in policy if key not in self._pins]:
                    policy.discard(key)
                    self._drop([key])
        if self.below is not None:
            self.below.clear()
        self.source.give_back()
        return_freed_memory()

    def resize(self, budget_bytes: int) -> None:
        """Another budget from now on. What no longer fits goes at once (what is leased, when its lease ends; this waits
        for that), and its memory goes back to the system.

        Raises ConfigError as the constructor; the budget is unchanged then.
        """
        limits = shares_of(budget_bytes, self.source, self._domains)
        before = self.resident_bytes
        with self._changed:
            self._limits = limits
            self._cancel(list(self._ahead.queued))
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

    def stats(self, *, layers: bool = True) -> dict[str, Any]:
        """JSON-ready: settings, what is resident, counters summed up and, unless turned off, those of each layer
        (`layers`). `below`: the same of the tier below; None without one.
        """
        with self._changed:
            sizes = {"budget_bytes": self._budget_bytes, "resident_bytes": self.resident_bytes}
            found = {"policy": self.policy, "scope": self.scope, **sizes} | counted(self._counters, layers)
        return found | {"below": None if self.below is None else self.below.stats(layers=layers)}

    def reset_stats(self) -> None:
        """Counters start again at 0, those of the tiers below too; slots and the policy's memory of uses stay."""
        with self._changed:
            self._counters = [LayerCounters() for _ in self._counters]
        if self.below is not None:
            self.below.reset_stats()

    def show_residency(self, tensors: Sequence[Tensor], layers: Sequence[int] | None = None) -> None:
        """Keep 1 where an expert is in its slot and 0 elsewhere in these [1, E] tensors, in place, until the next call.

        layers: the layer of each; None: one for each, in order. No tensors end it.

        Raises ConfigError when numbers or shapes do not fit.
        """
        with self._changed:
            self._residency.follow(tensors, layers, self._slots)

    def unpin(self, keys: Sequence[Key]) -> None:
        """End of a lease; called by it."""
        if self._released is not None:
            self._released()
        with self._changed:
            self._unpin(keys)
            self._changed.notify_all()

    # Under the lock

    def _unpin(self, keys: Iterable[Key]) -> None:
        for key in keys:
            self._pins[key] -= 1
            if self._pins[key] <= 0:
                del self._pins[key]

    def _fits(self, domain: int, keys: list[Key]) -> bool:
        """Whether these can be leased beside what is leased and read ahead now."""
        capacity, limit = self._policies[domain].capacity, self._limits[domain]
        return (not self._pins and capacity == limit) or self._pinned_bytes(domain, keys) <= min(limit, capacity)

    def _make_room(self, policy: Policy[Key], size: int) -> None:
        if self._ahead.expected:
            try:
                self._drop(policy.make_room(size, self._pins.keys() | self._ahead.expected))
                return
            except ConfigError:  # what is expected yields to what is asked for
                pass
        self._drop(policy.make_room(size, self._pins))

    def _cancel(self, keys: list[Key]) -> bool:
        """Call off read-aheads that have not begun; whether there were any."""
        for key in keys:
            self._changed.notify_all()
            self._ahead.forget(key)
            self._unpin((key,))
            del self._loading[key]
            self._policies[self._domain_of[key[0]]].discard(key)
        return bool(keys)

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
                self._held[key[0]] -= 1
                self._ahead.unused.discard(key)
                self._residency.set(key, 0.0)

    # Without it

    def _await(self, layer: int, missing: list[Key], awaited: dict[Key, Arrival]) -> dict[int, Slot]:
        started = time.perf_counter()
        try:
            read_all(self._fetch, [(key, awaited[key]) for key in missing], self._pool)
            for future in awaited.values():
                future.exception()  # waits
        except BaseException as error:  # an interrupt: nobody may wait for what nobody reads
            for key in missing:
                if awaited[key].claim() or (key == missing[0] and not awaited[key].done()):
                    self._arrive(key, awaited[key], None, error)
            raise
        finally:
            with self._changed:
                stall_s = time.perf_counter() - started
                self._counters[layer].stall_s += stall_s
                if missing:
                    self.miss_s += _MISS_S_RATE * (stall_s / len(missing) - self.miss_s)
                self._waiting -= 1
                self._changed.notify_all()
        return {key[1]: future.result() for key, future in awaited.items()}

    def _read_ahead(self, key: Key) -> None:
        with self._changed:
            while self._waiting and key in self._ahead.queued:
                self._changed.wait()
            if key not in self._ahead.queued:
                return
            self._ahead.begin(key)
            future = self._loading[key]
        self._fetch(key, future, ahead=True)

    def _fetch(self, key: Key, future: Arrival, *, ahead: bool = False) -> None:
        if not future.claim():
            return
        while True:
            slot, failure = None, None
            try:
                slot = self.source.read(*key)
            except BaseException as error:  # whoever waits for it gets it
                failure = error
            with self._changed:
                again = slot is None and ahead and self._pins[key] > 1  # somebody waits, and gets a read of its own
                if ahead:
                    self._ahead.end(key, came=slot is not None)
                    self._unpin((key,))
                    ahead = False
                    self._counters[key[0]].prefetched += slot is not None
                if not again:
                    self._arrive(key, future, slot, failure)
                    return

    def _arrive(self, key: Key, future: Arrival, slot: Slot | None, failure: BaseException | None) -> None:
        with self._changed:
            if self._loading.get(key) is future:
                del self._loading[key]
            policy = self._policies[self._domain_of[key[0]]]
            if slot is None:
                policy.discard(key)
            elif key in policy:  # it is, unless whoever asked was interrupted
                self._held[key[0]] += key not in self._slots
                self._slots[key] = slot
                self._counters[key[0]].bytes += self.source.expert_bytes[key[0]]
                self._residency.set(key, 1.0)
            self._changed.notify_all()
        if slot is None:
            future.set_exception(failure)
        else:
            future.set_result(slot)
