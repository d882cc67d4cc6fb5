"""A route that generates: reads a request, waits in line, answers, and stops where the client has gone."""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from remoe_adapt.engines.page import RequestCounts
from remoe_adapt.engines.serving.answers import Events, finished, joined
from remoe_adapt.engines.serving.asked import HEADER, Asked, read_body, read_object, read_request
from remoe_adapt.engines.serving.errors import RequestError, of_exception
from remoe_adapt.engines.serving.line import Line
from remoe_adapt.engines.serving.turn import Gone, Loaded, Turn

_log = logging.getLogger("remoe_adapt")


@dataclass(slots=True)
class Desk:
    """What all routes that generate share.

    line: for the model.
    names: ids by which requests may name it.
    max_body_bytes: of a request.
    has_chat_template: or chats cannot be turned into prompts.
    on_answer: told of every request that was read, as its JSON line.
    """

    loaded: Loaded
    line: Line
    names: frozenset[str]
    max_body_bytes: int
    on_answer: Callable[[dict[str, Any]], object]
    turn: Turn | None = None
    last: dict[str, Any] | None = None
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("answered", "refused", "failed", "left"), 0))

    def requests(self) -> RequestCounts:
        """As the status has them."""
        return RequestCounts(running=self.line.running, waiting=self.line.waiting, **self.counts)

    def cut_off(self) -> None:
        """End the answer that is being computed: the server cannot wait for it any longer."""
        if self.turn is not None:
            self.turn.stop(RequestError("the server has ended before the answer was done", 503, code="server_ending"))


class GenerateRoute:
    """An ASGI application for one of the routes in `turn.HANDLERS`."""

    def __init__(self, desk: Desk, route: str) -> None:
        self._desk, self._route = desk, route

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request. The id in `x-request-id`, if it is a plain word, is the answer's."""
        answer = _Answer(self._desk, self._route, Request(scope, receive), send)
        try:
            await answer.give()
        except ConnectionError:
            answer.count("left")
        except asyncio.CancelledError:
            answer.count("failed")
            raise


class _Answer:
    """One request on its way."""

    def __init__(self, desk: Desk, route: str, request: Request, send: Send) -> None:
        self._desk, self._route, self._request, self._send = desk, route, request, send
        asked = request.headers.get("x-request-id", "")
        self._id = asked if asked.isascii() and asked.isprintable() and 0 < len(asked) <= 100 else uuid.uuid4().hex
        self._began_s = time.monotonic()
        self._turn: Turn | None = None
        self._status = 0
        self._sent_head = False

    def count(self, how: str, error: RequestError | None = None) -> None:
        """The request has ended this way."""
        desk, turn = self._desk, self._turn
        desk.counts[how] += 1
        line: dict[str, Any] = {
            "event": "request", "id": self._id, "route": self._route, "how": how, "status": self._status or None,
            "seconds": round(time.monotonic() - self._began_s, 4),
        }  # fmt: skip
        if error is not None:
            line["error"] = str(error)
        if turn is not None:
            line |= {"tokens": turn.tokens, "computed_s": round(turn.seconds, 4), **turn.figures()}
            if how == "answered":
                desk.last = line
        desk.on_answer(line)

    async def give(self) -> None:
        """Read, wait, compute, answer. Raises ConnectionError when the client has gone."""
        desk = self._desk
        try:
            asked = self._read(await read_body(self._request, desk.max_body_bytes))
        except RequestError as error:
            await self._refuse(error)
            return
        gone = asyncio.ensure_future(self._gone())
        try:
            await desk.line.join(gone)
        except RequestError as error:
            await self._refuse(error)
            return
        except BaseException:
            gone.cancel()
            raise
        try:
            self._turn = desk.turn = Turn(desk.loaded, asked)
            await self._compute(asked, self._turn, gone)
        finally:
            gone.cancel()

    def _read(self, body: bytes) -> Asked:
        desk = self._desk
        asked = read_request(
            self._route, read_object(body), self._request.headers, desk.names.__contains__, desk.loaded.name
        )
        if self._route != "/v1/completions" and getattr(desk.loaded.tokenizer, "chat_template", None) is None:
            raise RequestError(
                f"{desk.loaded.name} has no chat template: use /v1/completions, or start the server with "
                "--chat-template FILE",
                code="no_chat_template",
            )
        return asked

    async def _gone(self) -> None:
        while (await self._request.receive())["type"] != "http.disconnect":
            pass

    async def _compute(self, asked: Asked, turn: Turn, gone: asyncio.Future[None]) -> None:
        # The next request gets the model when this one's tokens are done, not when its client has read them all.
        ended = asyncio.ensure_future(turn.ended.wait())
        ended.add_done_callback(lambda _: self._desk.line.leave())
        gone.add_done_callback(lambda over: None if over.cancelled() else turn.stop(Gone()))
        try:
            try:
                responses = [await turn.answer(self._id) for _ in range(asked.choices)]
            finally:
                turn.close()
            if isinstance(responses[0], StreamingResponse):
                await self._stream(asked, turn, responses[0].body_iterator)
            else:
                bodies = [json.loads(bytes(response.body)) for response in responses]
                whole = finished(joined(bodies), turn.figures(), asked.stop)
                await self._whole(turn, json.dumps(whole, ensure_ascii=False).encode())
        except asyncio.CancelledError:
            turn.stop(Gone())
            raise
        except Exception as error:
            await self._fail(turn, turn.error or error)
        finally:
            with suppress(asyncio.CancelledError):
                await asyncio.shield(ended)

    async def _stream(self, asked: Asked, turn: Turn, pieces: Any) -> None:
        # A generation that fails before its first token is answered with a status, as if it were no stream.
        await turn.begun.wait()
        if turn.error is not None and not turn.tokens:
            # To its end, or its generator would be closed by the garbage collector, later and elsewhere.
            async for _ in pieces:
                pass
            raise turn.error
        events = Events(turn.figures, lambda: self._failure(turn), asked.stop, self._route != "/v1/responses")
        await self._head(turn, {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-store"})
        async for piece in _texts(pieces):
            await self._body(events.passed_on(piece))
        await turn.ended.wait()
        # Before the last piece: once it is sent, the server says of every client that it has gone.
        self._conclude(turn)
        await self._body(events.end(), more=False)

    async def _whole(self, turn: Turn, body: bytes) -> None:
        strength = turn.figures()["strength"]
        await self._head(turn, {"content-type": "application/json", "content-length": str(len(body))}, strength)
        self._conclude(turn)
        await self._send({"type": "http.response.body", "body": body})

    def _conclude(self, turn: Turn) -> None:
        error = turn.error
        if isinstance(error, Gone):
            self.count("left")
        elif error is not None:
            self.count("failed", of_exception(error, begun=True))
        else:
            self.count("answered")

    def _failure(self, turn: Turn) -> dict[str, Any] | None:
        return None if turn.error is None else of_exception(turn.error, begun=True).to_json()

    async def _fail(self, turn: Turn, error: BaseException) -> None:
        if isinstance(error, Gone | ConnectionError):
            raise ConnectionError("the client has gone") from error
        told = of_exception(error, begun=turn.tokens > 0)
        if told.status >= 500 and not isinstance(error, RequestError):
            _log.error("request %s failed", self._id, exc_info=error)
        if self._sent_head:
            self.count("failed", told)
            raise error
        await self._refuse(told)

    async def _refuse(self, error: RequestError) -> None:
        self._status = error.status
        self.count("refused" if error.status < 500 or error.status == 503 else "failed", error)
        response: Response = error.response()
        response.headers["x-request-id"] = self._id
        await response(self._request.scope, self._request.receive, self._send)

    async def _head(self, turn: Turn, headers: Mapping[str, str], strength: float | None = None) -> None:
        # Of a stream it is the strength of the first token, which is all that is known when the head goes.
        live = turn.first_strength if strength is None else strength
        named = {**headers, "x-request-id": self._id} | ({} if live is None else {HEADER: f"{live:.4g}"})
        self._status, self._sent_head = 200, True
        raw = [(name.encode(), value.encode()) for name, value in named.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def _body(self, text: str, *, more: bool = True) -> None:
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def _texts(pieces: Any) -> AsyncIterator[str]:
    async for piece in pieces:
        yield piece if isinstance(piece, str) else bytes(piece).decode()
