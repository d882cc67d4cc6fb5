"""The server's routes: OpenAI's, served by transformers' handlers, and those that show and turn the dial.

| route | without a key, where one is wanted |
|---|---|
| `POST /v1/chat/completions`, `/v1/completions`, `/v1/responses`; `GET /v1/models` and one of them | no |
| `GET /health`, and the page at `/`, which has no figures in itself | yes |
| `GET /remoe/status`, `POST /remoe/pressure`, `GET /metrics` | no |
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from remoe_adapt._support import size_text
from remoe_adapt.dial import unit
from remoe_adapt.engines.page import (
    PAGE_HEADERS,
    STATUS_ROUTE,
    Counters,
    Rates,
    ServerStatus,
    bears,
    key_digest,
    memory_of,
    names_this_machine,
    page_html,
)
from remoe_adapt.engines.serving.asked import read_body, read_object
from remoe_adapt.engines.serving.errors import RequestError
from remoe_adapt.engines.serving.generate import Desk, GenerateRoute
from remoe_adapt.engines.serving.line import Line
from remoe_adapt.engines.serving.metrics import ServerMetrics
from remoe_adapt.engines.serving.turn import HANDLERS, Loaded
from remoe_adapt.errors import ConfigError

_OPEN = {"/", "/health"}


@dataclass(frozen=True, slots=True, kw_only=True)
class AppOptions:
    """api_key: that requests must bear; None: none is asked for.
    max_body_bytes: of one request.
    max_waiting: requests in line for the model.
    aliases: other ids of the model.
    any_host: requests may name this server by any host; without, only by this machine's own names, so that no page of a
        web site can reach it under a name of its own. A key opens it too.
    """

    api_key: str | None = None
    max_body_bytes: int = 4 << 20
    max_waiting: int = 64
    aliases: tuple[str, ...] = ()
    any_host: bool = False


class ServingApp:
    """An ASGI application over a model that is loaded already.

    model: a PeftModel of `get_remoe_model`, which the app alone generates with; its dial may be turned from anywhere.
    tokenizer: of that model, with a chat template for chats.
    name: the id that requests name.
    on_event: told of every request, as its JSON line, in the event loop.

    Raises ConfigError for a model or tokenizer that transformers' serving cannot use.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        name: str,
        options: AppOptions | None = None,
        on_event: Callable[[dict[str, Any]], object] = lambda _: None,
    ) -> None:
        self._options = options or AppOptions()
        if self._options.api_key == "":
            raise ConfigError("the API key is empty: give one with characters in it, or none.")
        self._loaded = Loaded(model, tokenizer, name)
        self._controller = self._loaded.controller
        self._line = Line(self._options.max_waiting)
        self._desk = Desk(
            self._loaded, self._line, frozenset((name, *self._options.aliases)), self._options.max_body_bytes, on_event
        )
        self._rates, self._began_s, self._draining = Rates(), time.monotonic(), False
        self._created = int(time.time())
        self._metrics = ServerMetrics(self._controller, self.status)
        self._app = self._guarded(Starlette(routes=self._routes(), exception_handlers=_HANDLERS))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one request."""
        await self._app(scope, receive, send)

    def drain(self) -> None:
        """In the event loop: the answer under way is finished, whoever waits or comes is refused."""
        self._draining = True
        self._line.close()

    def cut_off(self) -> None:
        """In the event loop: the answer under way ends with an error."""
        self._desk.cut_off()

    def status(self) -> ServerStatus:
        """What holds now. Any thread may ask."""
        dial = self._controller.status()
        cache = dial["expert_cache"] or {}
        recency = dial["recency"] or {}
        counters = Counters(self._loaded.tokens, cache.get("hits"), cache.get("misses"), cache.get("bytes"))
        return ServerStatus(
            engine=dial["engine"],
            model=self._loaded.name,
            state="draining" if self._draining else "ready",
            acts=self.acts(),
            uptime_s=time.monotonic() - self._began_s,
            strength=dial["strength"],
            target=dial["target"],
            pressure=dial["pressure"],
            pinned=dial["pinned"],
            reason=dial["reason"],
            swaps=dial["swaps"],
            points=tuple(dial["points"]),
            recency=recency.get("mode"),
            gain=recency.get("gain"),
            read_bytes=cache.get("bytes"),
            tokens=self._loaded.tokens,
            requests=self._desk.requests(),
            memory=memory_of([os.getpid()], cache.get("resident_bytes"), cache.get("budget_bytes")),
            last=self._desk.last,
            detail=dial,
            **self._rates.now(counters),
        )

    def acts(self) -> tuple[str, ...]:
        """What changes the choice of experts, or where they lie."""
        dial = self._controller.status()
        # The end of its path is enough to tell families apart, and says nothing of the machine.
        family = "/".join(PurePath(dial["family"]).parts[-2:])
        found = [f"dial of {family} ({'sensors' if dial['monitored'] else 'by hand'})"]
        if dial["recency"]:
            found.append(f"recency prior ({dial['recency']['mode']})")
        if dial["expert_cache"]:
            found.append(f"expert cache of {size_text(dial['expert_cache']['budget_bytes'])}")
        return tuple(found)

    # Routes

    def _routes(self) -> list[Route]:
        generating = [Route(route, GenerateRoute(self._desk, route), methods=["POST"]) for route in HANDLERS]
        return [
            *generating,
            Route("/v1/models", self._list_models),
            Route("/v1/models/{name:path}", self._show_model),
            Route("/health", self._health),
            Route(STATUS_ROUTE, self._show_status),
            Route("/remoe/pressure", self._set_pressure, methods=["POST"]),
            Route("/metrics", self._show_metrics),
            Route("/", self._page),
        ]

    async def _page(self, _request: Request) -> Response:
        return Response(page_html(), headers=PAGE_HEADERS)

    async def _health(self, _request: Request) -> Response:
        if self._draining:
            return JSONResponse({"status": "draining"}, 503)
        return JSONResponse({"status": "ok"})

    async def _show_status(self, _request: Request) -> Response:
        # In a thread, for a dial that is being swapped has its lock, and streams must go on meanwhile.
        found = await asyncio.to_thread(self.status)
        return JSONResponse(found.to_json(), headers={"Cache-Control": "no-store"})

    async def _show_metrics(self, _request: Request) -> Response:
        text, kind = await asyncio.to_thread(self._metrics.text)
        return Response(text, headers={"Content-Type": kind})

    async def _set_pressure(self, request: Request) -> Response:
        fields = read_object(await read_body(request, self._options.max_body_bytes))
        if len(fields) != 1 or not fields.keys() <= {"pressure", "strength"}:
            raise RequestError('send {"pressure": 0.8}, {"strength": 0.5}, or {"pressure": null} for the sensors')
        ((what, value),) = fields.items()
        if what == "strength" and value is None:
            raise RequestError('{"pressure": null} hands the dial back to the sensors', param="strength")
        try:
            number = None if value is None else unit(what, value)
            turn = self._controller.set_pressure if what == "pressure" else self._controller.set_strength
            await asyncio.to_thread(turn, number)
        except ConfigError as error:
            raise RequestError(str(error), param=what) from error
        return await self._show_status(request)

    def _model(self) -> dict[str, Any]:
        return {"id": self._loaded.name, "object": "model", "created": self._created, "owned_by": "remoe-adapt"}

    async def _list_models(self, _request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def _show_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._desk.names:
            raise RequestError(f"this server has no model {name!r}", 404, code="model_not_found")
        return JSONResponse(self._model())

    def _guarded(self, app: ASGIApp) -> ASGIApp:
        key = None if self._options.api_key is None else key_digest(self._options.api_key)

        async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                return
            refused = None
            if key is not None and scope["path"] not in _OPEN and not bears(_header(scope, b"authorization"), key):
                refused = RequestError("this server wants its API key as a bearer token", 401, code="invalid_api_key")
            elif (
                key is None
                and not self._options.any_host
                and not names_this_machine(_header(scope, b"host").decode("latin-1"))
            ):
                refused = RequestError(
                    "this server answers to the names of its own machine: start it with --api-key, or with a --host "
                    "that others may reach",
                    403,
                )
            if refused is not None:
                await refused.response()(scope, receive, send)
                return
            await app(scope, receive, send)

        return guarded


async def _told(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.response()


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = {404: f"{request.url.path} is no route of this server", 405: f"{request.method} is not for this route"}
    return RequestError(what.get(error.status_code, error.detail), error.status_code).response()


_HANDLERS: dict[Any, Any] = {RequestError: _told, HTTPException: _http}


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")
