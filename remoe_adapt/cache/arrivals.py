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
    """A slot that one thread reads and others wait for."""

    def __init__(self) -> None:
        super().__init__()
        self._readers: dict[str, int] = {}

    def claim(self) -> bool:
        """Whether the calling thread is the one to read it: the first that asks, in one atomic step."""
        here = threading.get_ident()
        return self._readers.setdefault("first", here) == here


def outcome(arrival: Arrival) -> BaseException | None:
    """Why it failed, once it is over; raises what a signal raises that comes meanwhile."""
    while True:
        try:
            return arrival.exception(POLL_S)
        except TimeoutError:
            handle_pending()


def read_all(fetch: Callable[[Key, Arrival], None], arrivals: Sequence[tuple[Key, Arrival]], pool: Executor) -> None:
    """Fetch the first one here and the others in the pool; all of them here when it can have no more threads."""
    here = arrivals[:1]
    try:
        for key, arrival in arrivals[1:]:
            pool.submit(fetch, key, arrival)
    except RuntimeError:  # what was submitted may be begun or not: whoever claims it reads
        here = arrivals
    for key, arrival in here:
        fetch(key, arrival)
