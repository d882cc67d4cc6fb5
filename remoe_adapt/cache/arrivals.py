"""Reads that are under way: one thread makes each, any number wait for it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future

from remoe_adapt.cache.slots import Key, Slot
from remoe_adapt.interrupts import POLL_S, handle_pending


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
        """Whether the calling thread is the one to read it: the first that asks.

        `setdefault` of a dict is atomic, so that it needs no lock, which an interrupt could leave taken.
        """
        asking = threading.get_ident()
        return self._readers.setdefault("first", asking) == asking


def outcome(arrival: Arrival) -> BaseException | None:
    """Why it failed, once it is over; raises what a signal raises that comes meanwhile."""
    while True:
        try:
            return arrival.exception(POLL_S)
        except TimeoutError:
            handle_pending()


def read_all(fetch: Callable[[Key, Arrival], None], arrivals: Sequence[tuple[Key, Arrival]], pool: Executor) -> None:
    """Fetch the first one in this thread and the others in the pool; all in this one when the pool can have no more
    threads."""
    own = arrivals[:1]
    try:
        for key, arrival in arrivals[1:]:
            pool.submit(fetch, key, arrival)
    except RuntimeError:  # some may have been submitted: of two threads that fetch one, the first to claim it reads
        own = arrivals
    for key, arrival in own:
        fetch(key, arrival)
