"""Reads that are under way, of which one thread makes each and any number wait for it, and those made ahead."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Executor, Future

from remoe_adapt._support import POLL_S, handle_pending
from remoe_adapt.expert_cache.types import Key, Slot


class AbandonedError(Exception):
    """The thread that read was interrupted: whoever still wants the expert asks for it again."""


class Arrival(Future[Slot]):
    """A slot that one thread reads and others wait for.

    Its read goes through these states: WAITING, until a thread claims it; CLAIMED, by the one thread that reads; and
    one of the ends THERE (the result is the slot), FAILED (the exception is the source's) and ABANDONED (the exception
    is AbandonedError: the thread was interrupted). A read-ahead that fails while a lease waits for it stays CLAIMED,
    and is read again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._readers: dict[str, int] = {}

    def claim(self) -> bool:
        """Whether the calling thread is the one to read it: the first that asks."""
        # `setdefault` of a dict is atomic. A lock would do as well, but an interrupt could leave it taken.
        asking = threading.get_ident()
        return self._readers.setdefault("first", asking) == asking


def outcome(arrival: Arrival) -> BaseException | None:
    """Why it failed, once it is over; raises what a signal raises that comes meanwhile."""
    # With a limit: interrupts are held back while a lease is made, and are looked for between two waits.
    while True:
        try:
            return arrival.exception(POLL_S)
        except TimeoutError:
            handle_pending()


def read_all(fetch: Callable[[Key, Arrival], None], arrivals: Sequence[tuple[Key, Arrival]], pool: Executor) -> None:
    """Fetch the first one in this thread, the others in the pool; all in this one if the pool can have no threads."""
    # A single miss, the usual case, needs no other thread.
    mine = arrivals[:1]
    try:
        for key, arrival in arrivals[1:]:
            pool.submit(fetch, key, arrival)
    except RuntimeError:  # some may have been submitted: of two threads that fetch one, the first to claim it reads
        mine = arrivals
    for key, arrival in mine:
        fetch(key, arrival)


class ReadAheads:
    """Bookkeeping of the read-ahead experts of a cache, under its lock.

    queued: posted, the read has not begun. begun: being read. unused: read or being read, not looked up since.
    expected: predicted, there or not, until their layer looks up.
    """

    def __init__(self) -> None:
        self.queued: set[Key] = set()
        self.begun: set[Key] = set()
        self.unused: set[Key] = set()
        self.expected: set[Key] = set()

    @property
    def reading(self) -> set[Key]:
        return self.queued | self.begun

    def queue(self, key: Key) -> None:
        self.queued.add(key)
        self.unused.add(key)

    def begin(self, key: Key) -> None:
        self.queued.discard(key)
        self.begun.add(key)

    def end(self, key: Key, *, came: bool) -> None:
        """The read is over."""
        self.begun.discard(key)
        # An expert that did not come is a miss when it is asked for, and no hit of the prefetch.
        if not came:
            self.unused.discard(key)

    def forget(self, key: Key) -> None:
        """No read-ahead any more: called off before it began, or taken over by a lease."""
        self.queued.discard(key)
        self.unused.discard(key)

    def look_up(self, layer: int, wanted: Collection[int]) -> list[Key]:
        """A layer looks up its experts: no more of them are expected. Returns those queued for it that it does not
        want."""
        self.expected = {key for key in self.expected if key[0] != layer}
        return [key for key in self.queued if key[0] == layer and key[1] not in wanted]

    def use(self, keys: Sequence[Key]) -> int:
        """How many of the keys were read ahead and are looked up for the first time since."""
        used = self.unused.intersection(keys)
        self.unused -= used
        return len(used)
