"""Who may use the model: one request at a time, the others in a line that a client may leave."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress

from remoe_adapt.engines.serving.errors import RequestError


class Line:
    """The model's line. All of it belongs to one event loop.

    most_waiting: longer lines are not joined.
    """

    def __init__(self, most_waiting: int) -> None:
        self._most_waiting = most_waiting
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._taken = self._closed = False

    @property
    def waiting(self) -> int:
        """How many stand in it."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """1 while the model is taken."""
        return int(self._taken)

    async def join(self, gone: asyncio.Future[None]) -> None:
        """Returns when the model is the caller's, who must `leave` it.

        gone: done when the client has left. Raises ConnectionError then, RequestError when the line is too long or
        closed, or closes meanwhile.
        """
        if self._closed:
            raise _ending()
        if self._taken and len(self._waiting) >= self._most_waiting:
            raise RequestError(f"{len(self._waiting)} requests are waiting: try again later", 503, code="queue_full")
        if not self._taken:
            self._taken = True
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(place)
        try:
            await asyncio.wait({place, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not place.done():
                raise ConnectionError("the client left the line")
            place.result()
        except BaseException:
            # The place may have come in the same turn of the loop as the end of this wait: it is not lost.
            if place.done() and not place.cancelled() and place.exception() is None:
                self.leave()
            place.cancel()
            with suppress(ValueError):
                self._waiting.remove(place)
            raise

    def leave(self) -> None:
        """The model is the next one's."""
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_result(None)
                return
        self._taken = False

    def close(self) -> None:
        """Whoever waits is refused, and so is who comes later; who has the model keeps it."""
        self._closed = True
        while self._waiting:
            place = self._waiting.popleft()
            if not place.done():
                place.set_exception(_ending())


def _ending() -> RequestError:
    return RequestError("the server is ending: ask again when it is back", 503, code="server_ending")
