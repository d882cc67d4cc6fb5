"""The experts held in memory: slots under a budget in bytes, filled from storage, given up by a policy.

One policy rules all layers, or each layer has its own share of the budget. A lease holds the experts that are computed
with now; what is leased is never evicted. Experts may be read ahead of their lease, while no lease waits for a read.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from remoe_adapt._support import (
    HeldCondition,
    handle_pending,
    held_back,
    mend_after_fork,
    return_freed_memory,
    say_once,
    size_text,
)
from remoe_adapt.errors import ConfigError
from remoe_adapt.eviction import LRFU, LRFU_DECAY, Policy
from remoe_adapt.expert_cache.budget import Lease, Shares, budget_in_bytes, check_budget
from remoe_adapt.expert_cache.reads import AbandonedError, Arrival, ReadAheads, outcome, read_all
from remoe_adapt.expert_cache.resident import ResidentMasks
from remoe_adapt.expert_cache.types import (
    BatchSource,
    ExpertSource,
    Key,
    LayerCounters,
    Slot,
    TierSource,
    check_options,
    counted,
)

READ_THREADS = 4
# A wrong read-ahead that has begun takes the device until it ends, so there are few of them at a time.
AHEAD_THREADS = 2
# Read-aheads, queued and under way, take at most 1 / _AHEAD_PART of a budget.
_AHEAD_PART = 2
# `miss_s` is a mean over about the last 1 / _MISS_S_RATE waits.
_MISS_S_RATE = 0.1


class ExpertCache:
    """Slots for at most `budget_bytes` of a source's experts; any number of threads at once.

    One lock (`_changed`) guards what is held and awaited. A method whose name ends in `_locked` is called with the lock
    held; the others take it themselves, and none waits for a read while it has it.

    `resident_masks` has a tensor [1, E] for each layer, kept up to date in place: 1 where the expert is in its slot, 0
    elsewhere.

    source: where experts are read from; of a BatchSource, all that a look-up misses in one call.
    budget_bytes: of all slots.
    policy: "lru", "lfu", "lrfu" or "markov".
    scope: "global", one budget over all layers, or "layer", each layer its share.
    decay: of policies that have one, per token; None: the policy's own, or what a recency prior prefers by (`follow`).
    threads: reads at a time.
    below: the tier that the source reads from, for `stats` and `clear`.
    device: of `resident_masks`; None: the CPU.

    Raises ConfigError for an unknown policy or scope, a decay of another policy, and a budget that does not hold one
    expert (of each layer with scope "layer").
    """

    def __init__(
        self,
        source: ExpertSource,
        budget_bytes: int,
        *,
        policy: str = "lrfu",
        scope: str = "global",
        threads: int = READ_THREADS,
        decay: float | None = None,
        below: ExpertCache | None = None,
        device: torch.device | None = None,
    ) -> None:
        check_options(policy, scope, threads, decay)
        self.source, self.policy, self.scope, self._threads = source, policy, scope, threads
        self._decay, self.below = decay, below
        self._batches = source if isinstance(source, BatchSource) else None
        # Whether the tier's memory is as the budget has it: brought there before anything is read into it.
        self._tier = source if isinstance(source, TierSource) else None
        self._is_fitted = self._tier is None
        # What the slots are computed with, for `stats`; "" until a model is bound, and in tiers below.
        self.arithmetic = ""
        # How long a lease has lately waited for each expert that it missed.
        self.miss_s = 0.0
        self._shares = Shares(source, budget_bytes, policy, scope, decay)
        self._counters = [LayerCounters() for _ in source.layers]
        self._slots: dict[Key, Slot] = {}
        self._resident = ResidentMasks(source.num_experts, device or torch.device("cpu"))
        self.resident_masks = self._resident.masks
        self._start()
        mend_after_fork(self)

    def __deepcopy__(self, memo: object) -> ExpertCache:
        """A copied model computes on the same slots."""
        return self

    @property
    def budget_bytes(self) -> int:
        """The budget in force: a smaller one counts once `resize` has brought the slots below it."""
        return self._shares.budget_bytes

    @property
    def resident_bytes(self) -> int:
        """What the slots take, those that are being filled among them."""
        return sum(policy.used for policy in self._shares.policies)

    def resident(self) -> list[Key]:
        """The (layer, expert) pairs whose bytes are there."""
        with self._changed:
            return sorted(self._slots)

    def lease(self, layer: int, experts: Iterable[int], *, continues: bool = False, early: bool = False) -> Lease:
        """The first of these distinct experts, in their order: as many as the budget holds at a time, at least one.

        Those that are missing are read now, in parallel. While leases of other threads leave too little room this
        waits; those of this thread are given back before.

        layer: the layer's place in the source.
        experts: their numbers, distinct.
        continues: they are of the same token as the last lease.
        early: return while experts are still under way to a device: the lease names them as `late`, and its `wait` must
            come before what reads them.

        Raises what the source raises, once every read of this call has ended; the cache then holds what could be read.
        A signal whose handler raises (Ctrl-C) does so once the read under way in this thread has ended.
        """
        wanted, lease, begun = list(experts), Lease(self._end, self._tier), dict[Key, Arrival]()
        try:
            # An interrupt between a pin and its lease would leave experts that nobody can evict any more.
            with held_back():
                try:
                    awaited = self._open(lease, layer, wanted, continues, begun)
                    if awaited:
                        lease.slots |= self._await(layer, awaited, begun)
                    if self._tier is not None:
                        lease.held = lease.slots
                        lease.slots = self._tier.leased(lease.held)
                        if early:
                            lease.late = self._tier.late(lease.held)
                        else:
                            self._tier.wait_for(lease.held)
                    handle_pending()
                except BaseException:
                    self._abandon(lease, begun)
                    raise
        except BaseException:  # a signal may come after `_abandon` can catch it
            lease.release()
            raise
        return lease

    def prefetch(self, layer: int, experts: Iterable[int]) -> None:
        """Read those of these experts that are missing, in their order, before a lease asks for them. Never waits.

        Until the layer's next lease none of them is evicted for another one's sake; that lease calls off the reads that
        it does not want and that have not begun. Nothing is read that needs the room of a leased or expected expert,
        or half of the budget. A read that fails leaves no trace: a lease reads again, and raises.
        """
        with self._changed:
            if not self._is_fitted:
                self._fit_locked()
            shares, size, ahead = self._shares, self.source.expert_bytes[layer], self._ahead
            policy, limit = shares.policy_of(layer), shares.limit_of(layer)
            keys = [(layer, expert) for expert in experts]
            ahead.expected.update(keys)
            for key in keys:
                if key in policy:
                    continue
                reading = sum(self.source.expert_bytes[at] for at, _ in shares.with_limit_of(layer, ahead.reading))
                if policy.capacity != limit or reading + size > limit // _AHEAD_PART:
                    break
                try:
                    self._drop_locked(policy.make_room(size, shares.pins.keys() | ahead.expected))
                except ConfigError:
                    break
                policy.admit(key, size)
                self._loading[key] = Arrival()
                shares.pin((key,))
                ahead.queue(key)
                try:
                    self._ahead_pool.submit(self._read_ahead, key)
                except RuntimeError:  # it can have no thread
                    self._cancel_locked([key])

    def missing(self, layer: int, experts: Iterable[int]) -> list[int]:
        """The experts among these that are neither there nor being read, in their order."""
        with self._changed:
            policy = self._shares.policy_of(layer)
            return [expert for expert in experts if (layer, expert) not in policy]

    def is_whole(self, layer: int) -> bool:
        """All experts of this layer are there."""
        return self._resident.is_whole(layer)

    def clear(self) -> None:
        """Drop all experts that are not leased, here and in the tiers below; their memory goes back to the system.

        Counters and the policy's memory of uses stay.
        """
        with self._changed:
            self._shares.close_lost()
            self._cancel_locked(list(self._ahead.queued))
            # Reads that have begun cannot be called off. Those that begin meanwhile are not waited for, or a busy model
            # would keep this call for ever.
            begun = set(self._ahead.begun)
            while begun & self._ahead.begun:
                self._changed.wait()
            self._ahead.expected.clear()
            for policy in self._shares.policies:
                for key in [key for key in policy if key not in self._shares.pins]:
                    policy.discard(key)
                    self._drop_locked([key])
            self._resident.show()
            if self._tier is not None:
                self._tier.fit(self._shares.slots(of_budget=False), {})
                self._is_fitted = False
        # Copies that are under way hold memory of the tier below.
        self._give_back()
        if self.below is not None:
            self.below.clear()

    def resize(self, budget: str | int | float, *, wait: bool = True) -> None:
        """Another budget from now on: a size as "2GiB", bytes, or a share of all experts (a float above 0, up to 1.0).

        What no longer fits goes at once, what is leased when its lease ends, and its memory goes back to the system.
        wait: return when all of it has gone; leases of this thread are given back then. Else the last lease in the way
        brings the budget into force.

        Raises ConfigError as the constructor, and for what is no such budget; it is unchanged then.
        """
        check_budget("expert cache budget", budget)
        experts = zip(self.source.num_experts, self.source.expert_bytes, strict=True)
        budget_bytes = budget_in_bytes(budget, sum(count * size for count, size in experts))
        with self._changed:
            before = self.resident_bytes
            request = self._shares.ask(budget_bytes)
            self._is_fitted = self._tier is None
            self._cancel_locked(list(self._ahead.queued))
            self._shrink_locked()
            # A later call asks for another budget: this one's never comes into force then.
            while wait and not self._shares.in_force and self._shares.requests == request:
                self._wait_for_room_locked()
            if not self._is_fitted:
                self._fit_locked()
        if self.resident_bytes < before:
            self._give_back()

    def follow(self, decay: float | None) -> None:
        """Evict by the decay by which a recency prior prefers experts, so that what it prefers is what stays; None: by
        the policy's own again.

        Nothing happens where a decay was given to the constructor, or the policy is not lrfu. What is resident stays,
        and uses so far weigh what they weigh now. The tiers below follow too.

        Raises ConfigError for a decay outside [0.5, 1].
        """
        with self._changed:
            for policy in self._shares.policies:
                if self._decay is None and isinstance(policy, LRFU):
                    policy.set_decay(LRFU_DECAY if decay is None else decay)
        if self.below is not None:
            self.below.follow(decay)

    def stats(self, *, layers: bool = True) -> dict[str, Any]:
        """JSON-ready: settings, what is resident, counters summed up and, unless turned off, those of each layer
        (`layers`). `asked_bytes`: the budget in force, or the smaller one that leases are in the way of.
        `arithmetic`: what the slots are computed with, and whether that is exact; "" where no model is. `below`: the
        same of the tier below; None without one.
        """
        with self._changed:
            sizes = {"budget_bytes": self.budget_bytes, "asked_bytes": self._shares.asked_bytes}
            found = sizes | {"resident_bytes": self.resident_bytes} | counted(self._counters, layers)
        below = None if self.below is None else self.below.stats(layers=layers)
        settings = {"policy": self.policy, "scope": self.scope, "arithmetic": self.arithmetic}
        return settings | found | {"below": below}

    def reset_stats(self) -> None:
        """Counters start again at 0, those of the tiers below too; slots and the policy's memory of uses stay."""
        with self._changed:
            self._counters = [LayerCounters() for _ in self._counters]
        if self.below is not None:
            self.below.reset_stats()

    def after_fork(self) -> None:
        """Begin anew in the child of a fork, where nobody ends the reads of the parent's threads or closes leases."""
        # The threads that would fill these slots are in the parent.
        for key in [key for policy in self._shares.policies for key in policy if key not in self._slots]:
            self._shares.policy_of(key[0]).discard(key)
        # An eviction that was under way has left the policy already, and perhaps not the slots.
        known = {key for policy in self._shares.policies for key in policy}
        self._drop_locked([key for key in self._slots if key not in known])
        self._start()
        self._shrink_locked()

    def _start(self) -> None:
        """Begin with a new lock and new threads, without leases, and without reads under way."""
        self._changed = HeldCondition()
        self._loading: dict[Key, Arrival] = {}
        self._shares.close_all()
        # Leases that wait for a read now. Read-aheads begin only while there are none, since they would share the disk.
        self._waiting = 0
        self._ahead = ReadAheads()
        # Read-aheads have threads of their own, so that a queue of them never stands before what a lease waits for.
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expert-read")
        self._ahead_pool = ThreadPoolExecutor(AHEAD_THREADS, thread_name_prefix="expert-read-ahead")

    def _open(
        self, lease: Lease, layer: int, wanted: list[int], continues: bool, begun: dict[Key, Arrival]
    ) -> dict[Key, Arrival]:
        """Lease what the budget holds; returns the experts still to come. The caller reads those in `begun`."""
        with self._changed:
            shares, ahead = self._shares, self._ahead
            shares.close_lost()
            # A second group of one token's experts is no new look-up: what was predicted is still to be asked for.
            if ahead.expected and not continues:
                self._cancel_locked(ahead.look_up(layer, wanted))
            while True:
                if not self._is_fitted:
                    self._fit_locked()
                most = max(1, shares.limit_of(layer) // self.source.expert_bytes[layer])
                keys = [(layer, expert) for expert in wanted[:most]]
                if shares.fits(layer, keys):
                    break
                # Guesses make room before anybody waits for it.
                if not self._cancel_locked(shares.with_limit_of(layer, ahead.queued)):
                    self._wait_for_room_locked()
            shares.open(lease, keys)
            shares.policy_of(layer).touch(keys, shares.tick(layer, continues))
            awaited, lease.slots = self._begin_locked(layer, keys, begun)
            counters = self._counters[layer]
            counters.hits += len(keys) - len(begun)
            counters.misses += len(begun)
            if ahead.unused:
                counters.prefetch_hits += ahead.use(keys)
            self._waiting += bool(awaited)
        return awaited

    def _await(self, layer: int, awaited: dict[Key, Arrival], begun: dict[Key, Arrival]) -> dict[int, Slot]:
        """The slots of these experts once they have come. Raises what the first failed read raises."""
        # `begun` changes below; the time is shared out among the reads that this lease began with.
        started, reads, slots = time.perf_counter(), len(begun), dict[int, Slot]()
        try:
            while awaited:
                if self._batches is not None:
                    self._fetch_many(self._batches, layer, begun)
                else:
                    read_all(self._fetch, list(begun.items()), self._pool)
                # All are waited for, also behind a failed one: once this call has ended no read of it goes on.
                failures = {key: outcome(arrival) for key, arrival in awaited.items()}
                lost = [key for key, failure in failures.items() if isinstance(failure, AbandonedError)]
                slots |= {key[1]: awaited[key].result() for key in awaited if key not in lost}
                begun.clear()
                awaited = {}
                if lost:  # the threads that read them were interrupted: this lease reads them
                    with self._changed:
                        awaited, there = self._begin_locked(layer, lost, begun)
                    slots |= there
        finally:
            with self._changed:
                stall_s = time.perf_counter() - started
                self._counters[layer].stall_s += stall_s
                if reads:
                    self.miss_s += _MISS_S_RATE * (stall_s / reads - self.miss_s)
                self._waiting -= 1
                self._resident.show()
                self._changed.notify_all()
        return slots

    def _abandon(self, lease: Lease, begun: dict[Key, Arrival]) -> None:
        """Undo a lease, from its first pin on: nobody shall wait for what nobody reads."""
        with self._changed:
            # Those that another thread has claimed come to an end in it, and the slots stay for whoever asks next.
            for key, arrival in begun.items():
                if arrival.claim() and not arrival.done():
                    self._arrive_locked(key, arrival, AbandonedError())
            for key in self._shares.held_by(lease):
                if key not in self._slots and key not in self._loading:
                    self._shares.policy_of(key[0]).discard(key)
        lease.release()

    def _end(self, lease: Lease) -> None:
        """A lease calls it when it is released; once is enough."""
        with self._changed:
            self._shares.close(lease)
            has_shrunk = self._shrink_locked()
            if not self._is_fitted:
                self._fit_locked()
            self._changed.notify_all()
        if has_shrunk:
            self._give_back()

    def _give_back(self) -> None:
        self.source.give_back()
        return_freed_memory()

    def _wait_for_room_locked(self) -> None:
        # A thread that waited for a lease of its own, or for one that nobody holds any more, would wait for ever.
        if self._shares.close_lost(of_this_thread=True):
            self._shrink_locked()
            self._changed.notify_all()
        else:
            self._changed.wait()

    def _begin_locked(
        self, layer: int, keys: list[Key], begun: dict[Key, Arrival]
    ) -> tuple[dict[Key, Arrival], dict[int, Slot]]:
        """The leased experts still to come (the caller reads those in `begun`), and the slots of the others."""
        # All are there, as in most look-ups. (While reads are under way, a slot may be about to be read anew.)
        if not self._loading:
            slots = self._slots
            there = {key[1]: slots[key] for key in keys if key in slots}
            if len(there) == len(keys):
                return {}, there
        if not self._is_fitted:
            self._fit_locked()
        policy, size, ahead = self._shares.policy_of(layer), self.source.expert_bytes[layer], self._ahead
        for key in ahead.queued.intersection(keys):  # its room is made already, and this lease takes the read over
            begun[key] = self._loading[key]
            ahead.forget(key)
            self._shares.unpin((key,))
        missing = [key for key in keys if key not in policy]
        # At once, unless some of what is predicted has to yield: then no more of it than must.
        at_once = missing and not ahead.expected
        if at_once:
            self._make_room_locked(policy, size * len(missing))
        for key in missing:
            if not at_once:
                self._make_room_locked(policy, size)
            policy.admit(key, size)
            begun[key] = self._loading[key] = Arrival()
        awaited = {key: self._loading[key] for key in keys if key in self._loading} if self._loading else {}
        return awaited, {key[1]: self._slots[key] for key in keys if key not in awaited}

    def _make_room_locked(self, policy: Policy[Key], size: int) -> None:
        if self._ahead.expected:
            try:
                self._drop_locked(policy.make_room(size, self._shares.pins.keys() | self._ahead.expected))
                return
            except ConfigError:  # what is predicted yields to what is asked for
                pass
        self._drop_locked(policy.make_room(size, self._shares.pins))

    def _shrink_locked(self) -> bool:
        """Evict down to the budget asked for, as far as leases allow; whether that has brought it into force."""
        if self._shares.in_force:
            return False
        self._drop_locked(self._shares.shrink())
        self._resident.show()
        self._changed.notify_all()
        return self._shares.in_force

    def _fit_locked(self) -> None:
        """Bring the memory of the tier to the budget, as far as leases and the device allow.

        Where the device has no more, the budget falls to what there is; raises ConfigError if that is no expert.
        """
        if self._tier is None:
            return
        pins, wanted = self._shares.pins, self._shares.slots()
        fitted = self._tier.fit(wanted, {key: slot for key, slot in self._slots.items() if key not in pins})
        for key in fitted.lost:
            self._shares.policy_of(key[0]).discard(key)
        self._drop_locked(fitted.lost)
        # More than the budget holds may be leased, until it comes into force.
        self._is_fitted = fitted.whole and self._shares.in_force
        share = min(fitted.slots[size] / count for size, count in wanted.items())
        if share < 1.0:
            experts = zip(self.source.num_experts, self.source.expert_bytes, strict=True)
            asked_bytes = min(self._shares.asked_bytes, sum(count * size for count, size in experts))
            self._is_fitted = False
            self._shares.ask(int(asked_bytes * share))
            self._is_fitted = True
            self._shrink_locked()
            say_once(
                f"the device has no memory for {size_text(asked_bytes)} of experts beside what it holds now: the "
                f"budget of the expert cache is {size_text(self._shares.asked_bytes)} from now on."
            )
        self._resident.show()

    def _cancel_locked(self, keys: list[Key]) -> bool:
        """Call off read-aheads that have not begun; whether there were any."""
        for key in keys:
            self._changed.notify_all()
            self._ahead.forget(key)
            self._shares.unpin((key,))
            del self._loading[key]
            self._shares.policy_of(key[0]).discard(key)
        return bool(keys)

    def _drop_locked(self, keys: Iterable[Key]) -> None:
        """Drop the slots of experts that have left their policy."""
        for key in keys:
            if self._slots.pop(key, None) is not None:
                self._resident.write(*key, False)
                self._ahead.unused.discard(key)

    def _read_ahead(self, key: Key) -> None:
        """Read an expert that was predicted, once no lease waits for a read. Runs in a thread of the second pool."""
        with self._changed:
            while self._waiting and key in self._ahead.queued:
                self._changed.wait()
            if key not in self._ahead.queued:
                return
            self._ahead.begin(key)
            arrival = self._loading[key]
        self._fetch(key, arrival, ahead=True)

    def _fetch(self, key: Key, arrival: Arrival, *, ahead: bool = False) -> None:
        """Read an expert, unless another thread does: see Arrival for the states that it goes through."""
        if arrival.done() or not arrival.claim():
            return
        while True:
            result: Slot | BaseException
            try:
                result = self.source.read(*key)
            except Exception as error:
                result = error
            except BaseException:  # an interrupt is this thread's alone: leases that wait read it themselves
                self._end_read(key, arrival, AbandonedError(), ahead)
                raise
            if self._end_read(key, arrival, result, ahead):
                return
            ahead = False

    def _fetch_many(self, source: BatchSource, layer: int, begun: dict[Key, Arrival]) -> None:
        """Read these experts in one call, but for those that other threads read."""
        mine = {key: arrival for key, arrival in begun.items() if not arrival.done() and arrival.claim()}
        if not mine:
            return
        try:
            found = source.read_many(layer, [expert for _, expert in mine])
            results: dict[Key, Slot | BaseException] = {key: found[key[1]] for key in mine}
        except Exception:
            # Which expert it was, only reads of one each can tell; in this thread, which has claimed them.
            for key, arrival in mine.items():
                self._fetch(key, arrival)
            if all(arrival.exception() is None for arrival in mine.values()):
                # It was no expert's: a time limit, perhaps, whose handler has raised in a tier below.
                raise
            return
        except BaseException:  # an interrupt is this thread's alone: leases that wait read them themselves
            self._end_reads(mine, dict.fromkeys(mine, AbandonedError()))
            raise
        self._end_reads(mine, results)

    def _end_reads(self, arrivals: Mapping[Key, Arrival], results: Mapping[Key, Slot | BaseException]) -> None:
        with self._changed:
            for key, arrival in arrivals.items():
                self._arrive_locked(key, arrival, results[key])
            self._shrink_locked()

    def _end_read(self, key: Key, arrival: Arrival, result: Slot | BaseException, ahead: bool) -> bool:
        """Keep what a read has brought, or hand on why it failed.

        False when it must be made again: it was ahead and has failed, but a lease waits for it by now, and is owed a
        read that was made for it.
        """
        failed = isinstance(result, BaseException)
        with self._changed:
            # One pin is the read-ahead's; any other is a lease's.
            is_awaited = ahead and self._shares.pins.get(key, 0) > 1
            if ahead:
                self._ahead.end(key, came=not failed)
                self._shares.unpin((key,))
                self._counters[key[0]].prefetched += not failed
            is_over = not (failed and is_awaited) or isinstance(result, AbandonedError)
            if is_over:
                self._arrive_locked(key, arrival, result)
            if ahead:
                self._resident.show()
            self._shrink_locked()
        return is_over

    def _arrive_locked(self, key: Key, arrival: Arrival, result: Slot | BaseException) -> None:
        # Another read of this expert may have begun after this one was taken back: then its entries stay.
        is_current, policy = self._loading.get(key) is arrival, self._shares.policy_of(key[0])
        if isinstance(result, BaseException):
            if is_current:
                policy.discard(key)
                self._drop_locked([key])
            arrival.set_exception(result)
        else:
            if key in policy:  # else the lease that asked for it was interrupted, and took it back
                self._slots[key] = result
                self._resident.write(*key, True)
                self._counters[key[0]].bytes += self.source.expert_bytes[key[0]]
            arrival.set_result(result)
        if is_current:
            del self._loading[key]
        self._changed.notify_all()
