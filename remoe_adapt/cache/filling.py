"""How slots of an expert cache come to be filled: the reads that are under way, those ahead among them."""

from __future__ import annotations

import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from remoe_adapt.cache.ahead import ReadAheads
from remoe_adapt.cache.arrivals import AbandonedError, Arrival, outcome, read_all
from remoe_adapt.cache.policy import Policy
from remoe_adapt.cache.residency import ResidentMasks
from remoe_adapt.cache.shares import Shares
from remoe_adapt.cache.slots import ExpertSource, Key, LayerCounters, Slot
from remoe_adapt.errors import ConfigError
from remoe_adapt.forks import mend_after_fork
from remoe_adapt.interrupts import HeldCondition

_MISS_S_RATE = 0.1


class Filling:
    """What an expert cache holds and awaits, and the threads that read.

    One lock (`_changed`) guards all of it. A method whose name ends in `_locked` is called with the lock held; the
    others take it themselves, and none waits for a read while it has it.
    """

    def __init__(
        self, source: ExpertSource, shares: Shares, threads: int, ahead_threads: int, device: torch.device
    ) -> None:
        self.source = source
        # Seconds that a lease waits for each expert it misses: a mean over the last ten or so.
        self.miss_s = 0.0
        self._shares = shares
        self._counters = [LayerCounters() for _ in source.layers]
        self._slots: dict[Key, Slot] = {}
        self._resident = ResidentMasks(source.num_experts, device)
        self.resident_masks = self._resident.masks
        self._threads, self._ahead_threads = threads, ahead_threads
        self._start()
        mend_after_fork(self)

    def _start(self) -> None:
        """With a new lock and new threads, no leases, and no reads under way."""
        self._changed = HeldCondition()
        self._loading: dict[Key, Arrival] = {}
        self._shares.close_all()
        # _waiting: leases that wait for a read now. Read-aheads begin only while there are none.
        self._ahead, self._waiting = ReadAheads(), 0
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expert-read")
        self._ahead_pool = ThreadPoolExecutor(self._ahead_threads, thread_name_prefix="expert-read-ahead")

    def after_fork(self) -> None:
        """The child has none of its parent's threads: nobody there ends their reads or closes their leases."""
        for key in [key for policy in self._shares.policies for key in policy if key not in self._slots]:
            self._shares.policy_of(key[0]).discard(key)
        # An eviction that was under way has left the policy already, and perhaps not the slots.
        known = {key for policy in self._shares.policies for key in policy}
        self._drop_locked([key for key in self._slots if key not in known])
        self._start()
        self._shrink_locked()

    def _begin_locked(
        self, layer: int, keys: list[Key], begun: dict[Key, Arrival]
    ) -> tuple[dict[Key, Arrival], dict[int, Slot]]:
        """Of these leased experts: those still to come (`begun` of them are the caller's to read), and the others."""
        policy, size, ahead = self._shares.policy_of(layer), self.source.expert_bytes[layer], self._ahead
        for key in keys:
            if key in ahead.queued:  # it has its room already, and this lease makes the read
                begun[key] = self._loading[key]
                ahead.forget(key)
                self._shares.unpin((key,))
            elif key not in policy:
                self._make_room_locked(policy, size)
                policy.admit(key, size)
                begun[key] = self._loading[key] = Arrival()
        awaited = {key: self._loading[key] for key in keys if key in self._loading} if self._loading else {}
        return awaited, {key[1]: self._slots[key] for key in keys if key not in awaited}

    def _wait_for_room_locked(self) -> None:
        if self._shares.close_lost(of_this_thread=True):
            self._shrink_locked()
            self._changed.notify_all()
        else:
            self._changed.wait()

    def _shrink_locked(self) -> bool:
        """Evict down to the budget asked for, as far as leases allow; whether that has brought it into force."""
        if self._shares.in_force:
            return False
        self._drop_locked(self._shares.shrink())
        self._resident.show()
        self._changed.notify_all()
        return self._shares.in_force

    def _make_room_locked(self, policy: Policy[Key], size: int) -> None:
        if self._ahead.expected:
            try:
                self._drop_locked(policy.make_room(size, self._shares.pins.keys() | self._ahead.expected))
                return
            except ConfigError:  # what is predicted yields to what is asked for
                pass
        self._drop_locked(policy.make_room(size, self._shares.pins))

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
        """These have left their policy: their slots go too."""
        for key in keys:
            if self._slots.pop(key, None) is not None:
                self._resident.write(*key, False)
                self._ahead.unused.discard(key)

    def _await(self, layer: int, awaited: dict[Key, Arrival], begun: dict[Key, Arrival]) -> dict[int, Slot]:
        """The slots of these experts once they have come. Raises what the first failed read raises."""
        started, reads, slots = time.perf_counter(), len(begun), dict[int, Slot]()
        try:
            while awaited:
                read_all(self._fetch, list(begun.items()), self._pool)
                failures = {key: outcome(arrival) for key, arrival in awaited.items()}  # waits
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

    def _read_ahead(self, key: Key) -> None:
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

    def _end_read(self, key: Key, arrival: Arrival, result: Slot | BaseException, ahead: bool) -> bool:
        """Keep what a read has brought, or hand on why it failed. False when it must be made again: it was ahead and
        has failed, but a lease waits for it by now, and is owed a read of its own."""
        failed = isinstance(result, BaseException)
        with self._changed:
            is_awaited = ahead and self._shares.pins[key] > 1
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
