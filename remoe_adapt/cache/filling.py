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
    """What an expert cache holds and awaits, under one lock, and the threads that read."""

    def __init__(
        self, source: ExpertSource, shares: Shares, threads: int, ahead_threads: int, device: torch.device
    ) -> None:
        self.source = source
        # Seconds that a lease waits for each expert it misses, lately.
        self.miss_s = 0.0
        self._shares = shares
        self._policies, self._pins = shares.policies, shares.pins
        self._counters = [LayerCounters() for _ in source.layers]
        self._slots: dict[Key, Slot] = {}
        self._resident = ResidentMasks(source.num_experts, device)
        # Of each layer [1, E]: 1 where the expert is in its slot, 0 elsewhere; written in place.
        self.resident_masks = self._resident.masks
        self._threads, self._ahead_threads = threads, ahead_threads
        self._nothing_under_way()
        mend_after_fork(self)

    def _nothing_under_way(self) -> None:
        self._changed = HeldCondition()
        self._loading: dict[Key, Arrival] = {}
        self._shares.close_all()
        self._ahead, self._waiting = ReadAheads(), 0
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="expert-read")
        self._ahead_pool = ThreadPoolExecutor(self._ahead_threads, thread_name_prefix="expert-read-ahead")

    def after_fork(self) -> None:
        """In the child: what the parent's threads were reading, computing with or about to change is nobody's."""
        for key in [key for policy in self._policies for key in policy if key not in self._slots]:
            self._shares.policy_of(key[0]).discard(key)
        kept = {key for policy in self._policies for key in policy}
        self._drop([key for key in self._slots if key not in kept])
        self._nothing_under_way()
        self._settle()

    # Under the lock

    def _begin(
        self, layer: int, keys: list[Key], begun: dict[Key, Arrival]
    ) -> tuple[dict[Key, Arrival], dict[int, Slot]]:
        """Of these leased experts: those still to come (`begun` of them are the caller's to read), and the others."""
        policy, size, ahead = self._shares.policy_of(layer), self.source.expert_bytes[layer], self._ahead
        for key in keys:
            if key in ahead.queued:  # has its room, and now the read is this lease's own
                begun[key] = self._loading[key]
                ahead.forget(key)
                self._shares.unpin((key,))
            elif key not in policy:
                self._make_room(policy, size)
                policy.admit(key, size)
                begun[key] = self._loading[key] = Arrival()
        awaited = {key: self._loading[key] for key in keys if key in self._loading} if self._loading else {}
        return awaited, {key[1]: self._slots[key] for key in keys if key not in awaited}

    def _wait_for_room(self) -> None:
        if self._shares.close_lost(own=True):
            self._settle()
            self._changed.notify_all()
        else:
            self._changed.wait()

    def _settle(self) -> bool:
        """Go on to the budget asked for as far as leases allow; whether it has come into force."""
        if self._shares.settled:
            return False
        self._drop(self._shares.settle())
        self._resident.show()
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
                self._resident.write(*key, False)
                self._ahead.unused.discard(key)

    # Without it

    def _await(self, layer: int, awaited: dict[Key, Arrival], begun: dict[Key, Arrival]) -> dict[int, Slot]:
        started, reads, slots = time.perf_counter(), len(begun), dict[int, Slot]()
        try:
            while awaited:
                read_all(self._fetch, list(begun.items()), self._pool)
                failures = {key: outcome(future) for key, future in awaited.items()}  # waits
                lost = [key for key, failure in failures.items() if isinstance(failure, AbandonedError)]
                slots |= {key[1]: awaited[key].result() for key in awaited if key not in lost}
                begun.clear()
                awaited = {}
                if lost:  # whoever read them was interrupted
                    with self._changed:
                        awaited, there = self._begin(layer, lost, begun)
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
                was_ahead = ahead
                if ahead:
                    self._ahead.end(key, came=slot is not None)
                    self._shares.unpin((key,))
                    ahead = False
                    self._counters[key[0]].prefetched += slot is not None
                if not again:
                    self._arrive(key, future, slot, failure)
                if was_ahead:
                    self._resident.show()
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
                self._slots[key] = slot
                self._resident.write(*key, True)
                self._counters[key[0]].bytes += self.source.expert_bytes[key[0]]
            if current:
                del self._loading[key]
            self._changed.notify_all()
        if slot is None:
            future.set_exception(failure)
        else:
            future.set_result(slot)
