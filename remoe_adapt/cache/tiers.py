"""The experts held in memory: slots under a budget in bytes, filled from storage, given up by a policy.

One policy rules all layers, or each layer has its own share of the budget. A lease holds the experts that are computed
with now; what is leased is never evicted. Experts may be read ahead of their lease, while no lease waits for a read.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from torch import Tensor

from remoe_adapt.cache.ahead import ReadAheads
from remoe_adapt.cache.arrivals import AbandonedError, Arrival, read_all
from remoe_adapt.cache.policy import Policy
from remoe_adapt.cache.residency import Residency
from remoe_adapt.cache.shares import Shares
from remoe_adapt.cache.slots import ExpertSource, Key, LayerCounters, Lease, Slot, check_options, counted
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
        self._shares = Shares(source, budget_bytes, policy, scope)
        self._policies, self._pins = self._shares.policies, self._shares.pins
        self._held = [0 for _ in source.layers]
        self._slots: dict[Key, Slot] = {}
        self._counters = [LayerCounters() for _ in source.layers]
        self._residency = Residency(source.num_experts)
        self._threads = threads
        self._nothing_under_way()
        mend_after_fork(self)

    def _nothing_under_way(self) -> None:
        self._changed = threading.Condition()
        self._loading: dict[Key, Arrival] = {}
        self._pins.clear()
        self._ahead, self._waiting = ReadAheads(), 0
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expert-read")
        self._ahead_pool = ThreadPoolExecutor(AHEAD_THREADS, thread_name_prefix="expert-read-ahead")

    def after_fork(self) -> None:
        """In the child: what the parent's threads were reading, computing with or about to change is nobody's."""
        for key in [key for policy in self._policies for key in policy if key not in self._slots]:
            self._shares.policy_of(key[0]).discard(key)
        self._slots = {key: slot for key, slot in self._slots.items() if key in self._shares.policy_of(key[0])}
        self._held = [sum(at == layer for at, _ in self._slots) for layer in range(len(self._held))]
        self._nothing_under_way()
        self._settle()

    def __deepcopy__(self, memo: object) -> ExpertCache:
        """A copied model computes on the same slots."""
        return self

    @property
    def budget_bytes(self) -> int:
        """In force: a smaller one counts once `resize` has brought the slots below it."""
        return self._shares.budget_bytes

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
            shares, ahead = self._shares, self._ahead
            if ahead.expected and not continues:
                self._cancel(ahead.settle(layer, wanted))
            while True:
                most = max(1, shares.limit_of(layer) // self.source.expert_bytes[layer])
                keys = [(layer, expert) for expert in wanted[:most]]
                if shares.fits(layer, keys):
                    break
                if not self._cancel(shares.beside(layer, ahead.queued)):
                    self._changed.wait()
            self._pins.update(keys)
            shares.policy_of(layer).touch(keys, shares.tick(layer, continues))
            missing, awaited, slots = self._begin(layer, keys)
            counters = self._counters[layer]
            counters.hits += len(keys) - len(missing)
            counters.misses += len(missing)
            counters.prefetch_hits += ahead.use(keys)
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
            shares, size, ahead = self._shares, self.source.expert_bytes[layer], self._ahead
            policy, limit = shares.policy_of(layer), shares.limit_of(layer)
            keys = [(layer, expert) for expert in experts]
            ahead.expected.update(keys)
            for key in keys:
                if key in policy:
                    continue
                reading = sum(self.source.expert_bytes[at] for at, _ in shares.beside(layer, ahead.reading))
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
            policy = self._shares.policy_of(layer)
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
        self._give_back()

    def resize(self, budget_bytes: int, *, wait: bool = True) -> None:
        """Another budget from now on. What no longer fits goes at once, what is leased when its lease ends, and its
        memory goes back to the system.

        wait: return when all of it has gone; a thread must not while it has a lease open. Else the last lease in the
        way brings the budget into force.

        Raises ConfigError as the constructor; the budget is unchanged then.
        """
        with self._changed:
            before = self.resident_bytes
            limits = self._shares.ask(budget_bytes)
            self._cancel(list(self._ahead.queued))
            self._settle()
            while wait and not self._shares.settled and self._shares.limits is limits:  # else a later call took over
                self._changed.wait()
        if self.resident_bytes < before:
            self._give_back()

    def stats(self, *, layers: bool = True) -> dict[str, Any]:
        """JSON-ready: settings, what is resident, counters summed up and, unless turned off, those of each layer
        (`layers`). `asked_bytes`: the budget in force, or the smaller one that leases are in the way of. `below`: the
        same of the tier below; None without one.
        """
        with self._changed:
            sizes = {"budget_bytes": self.budget_bytes, "asked_bytes": self._shares.asked_bytes}
            found = sizes | {"resident_bytes": self.resident_bytes} | counted(self._counters, layers)
        below = None if self.below is None else self.below.stats(layers=layers)
        return {"policy": self.policy, "scope": self.scope, **found, "below": below}

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
            self._shares.unpin(keys)
            settled = self._settle()
            self._changed.notify_all()
        if settled:
            self._give_back()

    # Under the lock

    def _begin(self, layer: int, keys: list[Key]) -> tuple[list[Key], dict[Key, Arrival], dict[int, Slot]]:
        """Of these pinned experts: those that the caller is to read, all that are still to come, and the others."""
        policy, size, ahead = self._shares.policy_of(layer), self.source.expert_bytes[layer], self._ahead
        missing = [key for key in keys if key not in policy or key in ahead.queued]
        for key in missing:
            if key in ahead.queued:  # has its room, and now the read is this lease's own
                ahead.forget(key)
                self._shares.unpin((key,))
            else:
                self._make_room(policy, size)
                policy.admit(key, size)
                self._loading[key] = Arrival()
        awaited = {key: self._loading[key] for key in keys if key in self._loading} if self._loading else {}
        return missing, awaited, {key[1]: self._slots[key] for key in keys if key not in awaited}

    def _settle(self) -> bool:
        """Go on to the budget asked for as far as leases allow; whether it has come into force."""
        if self._shares.settled:
            return False
        self._drop(self._shares.settle())
        self._changed.notify_all()
        return self._shares.settled

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
            self._shares.unpin((key,))
            del self._loading[key]
            self._shares.policy_of(key[0]).discard(key)
        return bool(keys)

    def _drop(self, keys: Iterable[Key]) -> None:
        for key in keys:
            if self._slots.pop(key, None) is not None:
                self._held[key[0]] -= 1
                self._ahead.unused.discard(key)
                self._residency.set(key, 0.0)

    # Without it

    def _give_back(self) -> None:
        self.source.give_back()
        return_freed_memory()

    def _await(self, layer: int, missing: list[Key], awaited: dict[Key, Arrival]) -> dict[int, Slot]:
        started, reads, slots = time.perf_counter(), len(missing), dict[int, Slot]()
        try:
            while awaited:
                read_all(self._fetch, [(key, awaited[key]) for key in missing], self._pool)
                failures = {key: future.exception() for key, future in awaited.items()}  # waits
                lost = [key for key, failure in failures.items() if isinstance(failure, AbandonedError)]
                slots |= {key[1]: awaited[key].result() for key in awaited if key not in lost}
                missing, awaited = [], {}
                if lost:  # whoever read them was interrupted
                    with self._changed:
                        missing, awaited, there = self._begin(layer, lost)
                    slots |= there
        except BaseException:  # an interrupt, perhaps: nobody may wait for what nobody reads
            for key in missing:
                if awaited[key].claim() and not awaited[key].done():
                    self._arrive(key, awaited[key], None, AbandonedError())
            raise
        finally:
            with self._changed:
                stall_s = time.perf_counter() - started
                self._counters[layer].stall_s += stall_s
                if reads:
                    self.miss_s += _MISS_S_RATE * (stall_s / reads - self.miss_s)
                self._waiting -= 1
                self._changed.notify_all()
        return slots

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
        if future.done() or not future.claim():
            return
        again = True
        while again:
            slot, failure, interrupt = None, None, None
            try:
                slot = self.source.read(*key)
            except Exception as error:  # whoever waits for it gets it
                failure = error
            except BaseException as error:  # this thread's alone
                failure, interrupt = AbandonedError(), error
            with self._changed:
                # Somebody waits for what was read ahead, and gets a read of its own.
                again = slot is None and interrupt is None and ahead and self._pins[key] > 1
                if ahead:
                    self._ahead.end(key, came=slot is not None)
                    self._shares.unpin((key,))
                    ahead = False
                    self._counters[key[0]].prefetched += slot is not None
                if not again:
                    self._arrive(key, future, slot, failure)
                self._settle()
            if interrupt is not None:
                raise interrupt

    def _arrive(self, key: Key, future: Arrival, slot: Slot | None, failure: BaseException | None) -> None:
        with self._changed:
            current, policy = self._loading.get(key) is future, self._shares.policy_of(key[0])
            if slot is None and current:
                policy.discard(key)
                self._drop([key])
            elif slot is not None and key in policy:  # it is, unless whoever asked was interrupted
                self._held[key[0]] += key not in self._slots
                self._slots[key] = slot
                self._counters[key[0]].bytes += self.source.expert_bytes[key[0]]
                self._residency.set(key, 1.0)
            if current:
                del self._loading[key]
            self._changed.notify_all()
        if slot is None:
            future.set_exception(failure)
        else:
            future.set_result(slot)
