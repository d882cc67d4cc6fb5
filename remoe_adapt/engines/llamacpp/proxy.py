"""A proxy in front of a llama-server that sets `lora` in every request: each answer is computed at one stated strength.

The answer says which in the header `x-remoe-strength`. Answers are passed on piece by piece as they come, so streams
stream. While the server is down, requests that generate wait for it, then get a 503; one that the server had taken and
lost gets a 502, or is cut off where its answer had begun. Requests are read whole before the server sees them, so that
a slow client never holds one of its threads. Needs aiohttp (extra: serve).

From the top down: bounds and errors, the proxy, its connections, and single messages (bodies within bounds, `lora` in
their JSON, the headers that go on, errors as llama-server words them).
"""

from __future__ import annotations

import asyncio
import json
import math
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Set
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

import aiohttp
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from multidict import CIMultiDict
from yarl import URL

from remoe_adapt._support import parse_json, printable
from remoe_adapt.engines.llamacpp.client import Address
from remoe_adapt.engines.llamacpp.server import HOLD_S, Setting
from remoe_adapt.errors import ConfigError, RemoeError

HEADER = "x-remoe-strength"
_CONNECT_S, _LOOK_S, _DRAIN_S = 5.0, 0.05, 10.0
# How long what is left of a refused body is read, so that its client sees the answer instead of a reset.
_LINGER_S = 2.0
# Smaller bodies are parsed within a millisecond: no thread for them.
_SMALL_BYTES = 64 << 10

# Routes whose requests take `lora` (llama.cpp 0.6-dev; a test asks the engine).
DIALLED = {
    "/completion", "/completions", "/v1/completions", "/chat/completions", "/v1/chat/completions", "/responses",
    "/v1/responses", "/infill",
}  # fmt: skip
# Routes that take a POST and generate nothing.
HARMLESS = {
    "/tokenize", "/detokenize", "/apply-template", "/embedding", "/embeddings", "/v1/embeddings", "/rerank",
    "/reranking", "/v1/rerank", "/v1/reranking", "/v1/messages/count_tokens", "/chat/completions/input_tokens",
    "/v1/chat/completions/input_tokens", "/v1/responses/input_tokens", "/v1/chat/completions/control",
}  # fmt: skip
_READING = {"GET", "HEAD", "OPTIONS"}
_HOP_BY_HOP = {
    "connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection", "te", "trailer",
    "transfer-encoding", "upgrade",
}  # fmt: skip
# A body that comes more slowly on average is given up.
_SLOWEST_BYTES_PER_S = 16 << 10
# Python's parser holds the interpreter lock while it reads lists and strings, and the collector walks all of the heap
# for so many new ones: 40 MB of `[],` hold up every thread for 15 s, and take 1 GB. So much weight at most, by the
# characters that stand before values: lists and objects weigh four times as much.
_MAX_WEIGHT = 1 << 20
_WEIGHTS = {b",": 1, b"\\": 1, b"[": 4, b"{": 4}
_PIECE_BYTES = 256 << 10
_KINDS = {501: "not_supported_error", 503: "unavailable_error"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """What clients may take.

    head_s: seconds until a head has come, also that of a next request on the same connection.
    body_s: seconds without any more of a body, and beyond what it takes at 16 KiB/s.
    stall_s: seconds in which a client takes nothing of its answer.
    body_bytes: of one request.
    held_bytes: of all bodies together.
    connections: open at once.
    """

    head_s: float = 10.0
    body_s: float = 10.0
    stall_s: float = 60.0
    body_bytes: int = 64 << 20
    held_bytes: int = 256 << 20
    connections: int = 400


class RequestError(RemoeError):
    """A request that is answered here: message and status."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


class _CutOffError(ConnectionError):
    """The client is gone, or must not take what it has for the whole: its connection ends without another word."""


class Proxy:
    """Listens from `start` to `stop`, in a thread of its own.

    address: of the server.
    setting: what requests should say now, None while there is no server.
    lost: called when the server did not take or finish a request.
    host, port: where it listens.
    hold_s: how long a request that generates waits for a server that is down.
    reuse_prompts: leave a client's `cache_prompt` as it is.
    bounds: what clients may take.

    `counts` are requests by how they ended ("answered", "refused", "unavailable", "lost", "left": the client went
    first, or took nothing of its answer).
    """

    def __init__(
        self,
        address: Address,
        setting: Callable[[], Setting | None],
        lost: Callable[[], None],
        *,
        host: str,
        port: int,
        hold_s: float = HOLD_S,
        reuse_prompts: bool = False,
        bounds: Bounds | None = None,
    ) -> None:
        self.address, self.host, self.port = address, host, port
        self._setting, self._lost = setting, lost
        self._hold_s, self._reuse_prompts, self.bounds = hold_s, reuse_prompts, bounds or Bounds()
        self.counts: Counter[str] = Counter()
        # Bytes of bodies that are held now, of all requests.
        self._held, self._drain_s = 0, _DRAIN_S

    def start(self) -> int:
        """Listen; the port (a free one where it was 0). Raises ConfigError when the address cannot be had."""
        listening: Future[int] = Future()
        self._thread = threading.Thread(target=self._run, args=(listening,), name="remoe-proxy", daemon=True)
        self._thread.start()
        try:
            self.port = listening.result()
        except (OSError, OverflowError, UnicodeError) as error:
            self._thread.join()
            raise ConfigError(
                f"the proxy cannot listen on {self.host}:{self.port} ({getattr(error, 'strerror', None) or error}): "
                "give another --proxy."
            ) from error
        return self.port

    def stop(self, drain_s: float = _DRAIN_S) -> None:
        """Take no more requests, give those that run about so many seconds to end, then cut them off."""
        self._drain_s = drain_s
        with suppress(RuntimeError):  # the loop of an earlier stop
            self._loop.call_soon_threadsafe(self._ending.set)
        self._thread.join()

    def _run(self, listening: Future[int]) -> None:
        try:
            asyncio.run(self._serve(listening))
        except Exception as error:
            if listening.done():
                raise
            listening.set_exception(error)

    async def _serve(self, listening: Future[int]) -> None:
        self._loop, self._ending, self._large = asyncio.get_running_loop(), asyncio.Event(), asyncio.Lock()
        # A connection for each request: none is ever lost by meeting one that a server has just given up.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_S)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
        ) as self._session:  # fmt: skip
            # Made inside the loop's thread, for aiohttp binds its server to the loop that runs.
            server = _Server(self)
            sockets = await self._loop.create_server(server, self.host, self.port)
            listening.set_result(int(sockets.sockets[0].getsockname()[1]))
            await self._ending.wait()
            # A connection accepted in this turn of the loop is known in two more; asyncio loses it, open, if its server
            # is closed before.
            for listener in sockets.sockets:
                self._loop.remove_reader(listener.fileno())
            for _ in range(3):
                await asyncio.sleep(0)
            sockets.close()
            server.pre_shutdown()
            # It waits so long twice: for answers, and again for those whose bodies it has given up.
            await server.shutdown(max(self._drain_s / 2, 0.01))
            server.abort()
            await asyncio.sleep(0)  # for the transports' last calls

    async def _handle(self, request: web.BaseRequest) -> web.StreamResponse:
        transport, held = request.transport, 0

        def hold(count: int) -> None:
            nonlocal held
            held += count
            self._held += count
            if self._held > self.bounds.held_bytes:
                raise RequestError("the bodies of all requests together are too large to be taken at once", 503)

        try:
            try:
                return await self._forward(request, await read_body(request, self.bounds, hold))
            except RequestError as error:
                self.counts["unavailable" if error.status == 503 else "lost" if error.status == 502 else "refused"] += 1
                answer = error_answer(error.status, str(error))
                await self._taken(answer.prepare(request))
                await self._taken(answer.write_eof())
                return answer
        except (ConnectionError, asyncio.CancelledError) as error:
            if not isinstance(error, _CutOffError) and not self._ending.is_set():
                self.counts["left"] += 1
            if transport is not None:
                transport.abort()
            raise
        finally:
            self._held -= held

    async def _forward(self, request: web.BaseRequest, body: bytes) -> web.StreamResponse:
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/") or request.version < aiohttp.HttpVersion10:
            raise RequestError(f"{printable(path)} is no path of this server")
        url = URL.build(
            scheme="http", host=self.address.host, port=self.address.port, path=path, query_string=query, encoded=True
        )
        path = path.removeprefix(self.address.prefix)
        scales: dict[int, float] | None = None
        if request.method == "POST" and path in DIALLED:
            body, scales = await self._dialled(request, body)
        else:
            _refuse_what_would_go_around(request.method, path)
        upstream, setting = await self._ask(request, url, body, scales)
        async with upstream:
            return await self._relay(request, upstream, setting)

    async def _dialled(self, request: web.BaseRequest, body: bytes) -> tuple[bytes, dict[int, float]]:
        if "Content-Encoding" in request.headers:
            raise RequestError("the body has a Content-Encoding, and `lora` has to be set in it: send it plain", 415)
        if len(body) <= _SMALL_BYTES:
            return without_lora(body, self._reuse_prompts)
        async with self._large:  # one by one: what they take in memory is many times their length
            return await asyncio.to_thread(without_lora, body, self._reuse_prompts)

    async def _ask(
        self, request: web.BaseRequest, url: URL, body: bytes, scales: dict[int, float] | None
    ) -> tuple[aiohttp.ClientResponse, Setting | None]:
        """The head of the server's answer; requests that generate (scales is not None) wait for one that is ready."""
        headers = passed_on(request.headers, {"content-length", "expect", "host"})
        end_s = self._loop.time() + (self._hold_s if scales is not None else 0.0)
        why = "its adapters are not known yet"
        while True:
            sending = _Sending(self._setting, body, scales)
            if scales is None or self._setting() is not None:
                try:
                    answer = await self._session.request(
                        request.method, url, headers=headers, data=sending.pieces() if body else None,
                        allow_redirects=False,
                    )  # fmt: skip
                except (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError) as error:
                    why = printable(error)
                    self._lost()
                except (aiohttp.ClientError, OSError) as error:
                    if not sending.just_gone:
                        raise self._lost_request(printable(error)) from error
                    why = "it has just gone"
                except ValueError as error:
                    raise RequestError(f"this head cannot be passed on ({printable(error)})") from error
                else:
                    if answer.status >= 200:
                        return answer, sending.setting
                    answer.close()
                    raise self._lost_request(f"it answers {answer.status}")
            if self._loop.time() >= end_s:
                raise RequestError(f"{self.address} is not ready ({why}): try again later", 503)
            await asyncio.sleep(_LOOK_S)

    def _lost_request(self, how: str) -> RequestError:
        self._lost()
        return RequestError(f"{self.address} took this request and lost it ({how})", 502)

    async def _relay(
        self, request: web.BaseRequest, upstream: aiohttp.ClientResponse, setting: Setting | None
    ) -> web.StreamResponse:
        """Pass the answer on as it comes."""
        framing = {"content-length"} if "Transfer-Encoding" in upstream.headers else set()
        headers = passed_on(upstream.headers, {HEADER, *framing})
        if setting is not None:
            headers[HEADER] = f"{setting.strength:.4g}"
        answer = web.StreamResponse(status=upstream.status, reason=upstream.reason or "", headers=headers)
        await self._taken(answer.prepare(request))
        while True:
            try:
                piece = await upstream.content.readany()
            except (aiohttp.ClientError, OSError) as error:
                self.counts["lost"] += 1
                self._lost()
                raise _CutOffError from error
            if not piece:
                break
            await self._taken(answer.write(piece))
        await self._taken(answer.write_eof())
        self.counts["answered"] += 1
        return answer

    async def _taken(self, writing: Awaitable[Any]) -> None:
        """Raises ConnectionError when the client takes nothing for too long."""
        try:
            async with asyncio.timeout(self.bounds.stall_s):
                await writing
        except TimeoutError as error:
            raise ConnectionError("the client takes nothing of its answer") from error


def _refuse_what_would_go_around(method: str, path: str) -> None:
    """Raises RequestError for what would be computed at a strength that nobody set."""
    if path == "/lora-adapters" and method not in _READING:
        raise RequestError("`remoe watch` sets the scales here; other adapters can be named in a request's lora", 501)
    if method == "POST" and path not in HARMLESS:
        raise RequestError(
            f"{printable(path)} does not take `lora`, its strength would not be known: use /v1/chat/completions or "
            "/completion", 501
        )  # fmt: skip


class _Sending:
    """A body on its way, with the scales of the moment at which the server's connection takes it: what was in force
    when the request came may be of a server that is gone. scales: None: a body that goes on as it is."""

    def __init__(self, now: Callable[[], Setting | None], body: bytes, scales: dict[int, float] | None) -> None:
        self._now, self._body, self._scales = now, body, scales
        self.setting: Setting | None = None
        self.just_gone = False

    async def pieces(self) -> AsyncIterator[bytes]:
        parts: tuple[bytes, ...] = (self._body,)
        if self._scales is not None:
            self.setting = self._now()
            if self.setting is None:
                self.just_gone = True
                raise ConnectionError
            # Only here, when the connection takes the body: the strength that the answer states is the one it was asked
            # at.
            parts = with_lora(self._body, self.setting.scales.as_list(self.setting.strength, self._scales))
        # In pieces so small that sending one holds nobody up.
        for part in parts:
            for start in range(0, len(part), _PIECE_BYTES):
                yield part[start : start + _PIECE_BYTES]


class _Server(web.Server):
    """aiohttp's server, its connections bounded and at hand."""

    def __init__(self, proxy: Proxy) -> None:
        super().__init__(proxy._handle, handler_cancellation=True)
        self.proxy, self.transports = proxy, dict[web.RequestHandler, asyncio.Transport]()

    def __call__(self) -> web.RequestHandler:
        return _Connection(self)

    def connection_made(self, handler: web.RequestHandler, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self.transports[handler] = transport
        # An answer counts as written when the system has all of it: none waits here for a client that takes nothing.
        transport.set_write_buffer_limits(0)
        if len(self.transports) > self.proxy.bounds.connections:
            self.proxy.counts["unavailable"] += 1
            transport.write(plain_error(503, "too many connections are open: try again later"))
            transport.close()

    def connection_lost(self, handler: web.RequestHandler, exc: BaseException | None = None) -> None:
        self.transports.pop(handler, None)
        super().connection_lost(handler, exc)

    def abort(self) -> None:
        """Ends whatever is still open."""
        for transport in list(self.transports.values()):
            transport.abort()


class _Connection(web.RequestHandler):
    """The connection of one client. What is no HTTP gets an answer of our form."""

    def __init__(self, server: _Server) -> None:
        # The time of keep-alive also bounds the first head. Bodies go on as they are: nothing is unpacked.
        super().__init__(
            server, loop=asyncio.get_running_loop(), keepalive_timeout=server.proxy.bounds.head_s,
            lingering_time=_LINGER_S, auto_decompress=False, access_log=None,  # type: ignore[arg-type]
        )  # fmt: skip
        self.proxy = server.proxy

    def data_received(self, data: bytes) -> None:
        transport = self.transport
        try:
            super().data_received(data)
        except ValueError:  # aiohttp's parser in Python, where there is none in C, at a length of 5,000 digits
            self.proxy.counts["refused"] += 1
            if transport is not None:
                transport.write(plain_error(400, "this is no HTTP/1.1 request"))
                transport.close()

    def handle_error(
        self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None, message: str | None = None
    ) -> web.StreamResponse:
        if isinstance(exc, ConnectionError):
            raise exc
        if status == 500:
            self.log_exception("the proxy failed at a request", exc_info=exc)
            return error_answer(status, "the proxy failed at this request")
        self.proxy.counts["refused"] += 1
        if isinstance(exc, LineTooLong):
            return error_answer(431, "a line of the head is too long")
        return error_answer(status, f"this is no HTTP/1.1 request ({printable((message or '').partition(chr(10))[0])})")


def error_answer(status: int, message: str) -> web.Response:
    """An answer of our own, in the form of llama-server's errors; its connection is closed afterwards."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    answer = web.json_response({"error": {"code": status, "message": message, "type": kind}}, status=status)
    if status == 503:
        answer.headers["Retry-After"] = "1"
    answer.force_close()
    return answer


def plain_error(status: int, message: str) -> bytes:
    """`error_answer` for a connection on which there is no request to answer."""
    body = error_answer(status, message).body
    assert isinstance(body, bytes)
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\nContent-Type: application/json\r\n"
    return f"{first}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body


async def read_body(request: web.BaseRequest, bounds: Bounds, hold: Callable[[int], None]) -> bytes:
    """The whole body. hold: told of so many bytes more; may raise. Raises RequestError for one beyond the bounds."""
    too_long = RequestError(
        f"the body is longer than {bounds.body_bytes / (1 << 20):g} MiB: send less, or raise --max-body", 413
    )
    if (request.content_length or 0) > bounds.body_bytes:
        raise too_long
    if request.headers.get("Expect", "").lower() == "100-continue":
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        request.writer.output_size = 0  # nothing of the answer itself has been sent
    body = bytearray()
    try:
        async with asyncio.timeout(bounds.body_s) as limit:
            begin_s = asyncio.get_running_loop().time()
            while piece := await request.content.readany():
                body += piece
                if len(body) > bounds.body_bytes:
                    raise too_long
                hold(len(piece))
                now_s = asyncio.get_running_loop().time()
                limit.reschedule(bounds.body_s + min(now_s, begin_s + len(body) / _SLOWEST_BYTES_PER_S))
    except TimeoutError:
        raise RequestError(f"the body did not come in time: {len(body)} bytes of it have", 408) from None
    except web.RequestPayloadError as error:
        raise RequestError(f"the body is malformed ({printable(error)})") from error
    return bytes(body)


def without_lora(body: bytes, reuse_prompts: bool) -> tuple[bytes, dict[int, float]]:
    """A JSON object without its `lora`, and the scales that stood there; reuse_prompts: `cache_prompt` stays as it is,
    instead of being off. Raises RequestError."""
    if sum(weight * body.count(mark) for mark, weight in _WEIGHTS.items()) > _MAX_WEIGHT:
        raise RequestError(
            f"the body has too many values: at most {_MAX_WEIGHT}, or {_MAX_WEIGHT // 4} lists and objects", 413
        )
    fields = parse_json(body, "the body", RequestError)
    if not isinstance(fields, dict):
        raise RequestError("the body is no JSON object")
    scales = _scales(fields.pop("lora", None))
    if not reuse_prompts:
        fields["cache_prompt"] = False
    try:
        return json.dumps(fields, allow_nan=False).encode(), scales
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body cannot be passed on ({printable(error)})") from error


def with_lora(body: bytes, lora: list[dict[str, float]]) -> tuple[bytes, bytes]:
    """What `without_lora` left, with this `lora`, in two parts."""
    first = b'{"lora": ' + json.dumps(lora).encode()
    return first if body == b"{}" else first + b", ", body[1:]


def passed_on(headers: Mapping[str, str], others: Set[str]) -> CIMultiDict[str]:
    """All headers that are not of one connection alone, nor among `others` (lower case)."""
    dropped = _HOP_BY_HOP | others
    for name, value in headers.items():
        if name.lower() == "connection":
            dropped |= {token.strip().lower() for token in value.split(",")}
    return CIMultiDict([(name, value) for name, value in headers.items() if name.lower() not in dropped])


def _scales(lora: Any) -> dict[int, float]:
    if lora is None:
        return {}
    if not isinstance(lora, list) or not all(isinstance(one, dict) for one in lora):
        raise RequestError("'lora' must be an array of objects with 'id' and 'scale' fields")
    found = {}
    for one in lora:
        number, scale = one.get("id"), one.get("scale")
        if type(number) is not int or type(scale) not in (int, float) or not math.isfinite(scale):
            raise RequestError(f"'lora' needs a whole number as 'id' and a finite 'scale', not {printable(one)}")
        found[number] = float(scale)
    return found
