"""A proxy in front of a llama-server that sets `lora` in every request: each answer is computed at one stated strength.

The answer says which in the header `x-remoe-strength`. Answers are passed on byte by byte as they come, so streams
stream. While the server is down, requests that generate wait for it, then get a 503; one that the server had taken and
lost gets a 502, or ends early where its answer had begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from remoe_adapt.errors import ConfigError
from remoe_adapt.runtime.llama_http import Address
from remoe_adapt.runtime.llama_messages import (
    HEAD_BYTES,
    Body,
    Request,
    RequestError,
    answer_head,
    error_answer,
    read_answer_head,
    read_request,
)
from remoe_adapt.runtime.llama_server import Setting

HEADER = "x-remoe-strength"
HOLD_S = 30.0
_CONNECT_S, _LOOK_S, _DRAIN_S = 5.0, 0.05, 10.0
_PIECE_BYTES = 64 << 10

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


class Proxy:
    """Listens from `start` to `stop`, in a thread of its own.

    setting: what requests should say now, None while there is no server; lost: called when the server did not take or
    finish a request. reuse_prompts: leave a client's `cache_prompt` as it is. counts: requests by how they ended
    ("answered", "refused", "unavailable", "lost", "left": the client went first).
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
    ) -> None:
        self.address, self.host, self.port = address, host, port
        self._setting, self._lost = setting, lost
        self._hold_s, self._reuse_prompts = hold_s, reuse_prompts
        self.counts: Counter[str] = Counter()
        # All connections, and those of them whose request is being answered.
        self._tasks: set[asyncio.Task[None]] = set()
        self._answering: set[asyncio.Task[None]] = set()

    def start(self) -> int:
        """Listen; the port (a free one where it was 0). Raises ConfigError when the address cannot be had."""
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remoe-proxy", daemon=True)
        self._thread.start()
        try:
            self._server = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        except OSError as error:
            self._end_loop()
            raise ConfigError(
                f"the proxy cannot listen on {self.host}:{self.port} ({error.strerror or error}): give another --proxy."
            ) from error
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self.port

    def stop(self, drain_s: float = _DRAIN_S) -> None:
        """Take no more requests, give those that run so many seconds to end, then cut them off."""
        asyncio.run_coroutine_threadsafe(self._close(drain_s), self._loop).result()
        self._end_loop()

    async def _listen(self) -> asyncio.Server:
        return await asyncio.start_server(self._serve, self.host, self.port, limit=HEAD_BYTES)

    async def _close(self, drain_s: float) -> None:
        self._server.close()
        if self._answering:
            await asyncio.wait(list(self._answering), timeout=drain_s)
        ending = list(self._tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            request = await read_request(reader, writer)
            if request is not None:
                self._answering.add(task)
                await self._answer(request, reader, writer)
        except RequestError as error:
            self.counts["unavailable" if error.status == 503 else "lost" if error.status == 502 else "refused"] += 1
            more = [("Retry-After", "1")] if error.status == 503 else []
            writer.write(error_answer(error.status, error.message, more))
        except (ConnectionError, asyncio.CancelledError):
            pass  # the client is gone, or the proxy is
        finally:
            self._answering.discard(task)
            self._tasks.discard(task)
            with contextlib.suppress(Exception):
                writer.close()
                await writer.wait_closed()

    async def _answer(self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One request to its end; given up as soon as the client hangs up, as the server itself does."""
        work = asyncio.ensure_future(self._forward(request, writer))
        gone = asyncio.ensure_future(reader.read(1))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done() and gone.done() and gone.result():
                await work  # a client that sends more than one request at once: the first is answered
            elif not work.done():
                self.counts["left"] += 1
                return
            work.result()
        finally:
            for waiting in (work, gone):
                waiting.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)

    async def _forward(self, request: Request, writer: asyncio.StreamWriter) -> None:
        path = request.path.removeprefix(self.address.prefix)
        dialled = request.method == "POST" and path in DIALLED
        if not dialled:
            _refuse_what_would_go_around(request, path)
        fields = _fields(request) if dialled else {}
        up_reader, up_writer = await self._connect(dialled)
        more: list[tuple[str, str]] = []
        try:
            if dialled:
                # Taken now: what was in force when the request came may be of a server that is gone.
                setting = self._setting()
                if setting is None:
                    raise RequestError(503, f"{self.address} has just gone: try again")
                request.body = json.dumps(self._dialled(fields, setting)).encode()
                more = [(HEADER, f"{setting.strength:.4g}")]
            host = f"{self.address.host}:{self.address.port}"
            try:
                up_writer.write(request.as_bytes(host))
                await up_writer.drain()
                first, headers = await read_answer_head(up_reader)
            except (ConnectionError, RequestError) as error:
                self._lost()
                raise RequestError(502, f"{self.address} took this request and lost it ({error})") from error
            writer.write(answer_head(first, headers, more))
            if await self._relay(up_reader, writer, Body.of(request.method, first, headers)):
                self.counts["answered"] += 1
            else:
                self.counts["lost"] += 1
                self._lost()
                writer.transport.abort()  # the client must not take a part of an answer for the whole
        finally:
            up_writer.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, body: Body) -> bool:
        """Pass the answer on as it comes; False when the server did not finish it."""
        while True:
            try:
                piece = await reader.read(_PIECE_BYTES)
            except ConnectionError:
                return False
            if not piece:
                return body.whole
            body.seen(piece)
            writer.write(piece)
            await writer.drain()

    async def _connect(self, dialled: bool) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the server; requests that generate wait for one that is ready."""
        end_s = self._loop.time() + (self._hold_s if dialled else 0.0)
        why = "its adapters are not known yet"
        while True:
            if not dialled or self._setting() is not None:
                try:
                    opening = asyncio.open_connection(self.address.host, self.address.port, limit=HEAD_BYTES)
                    return await asyncio.wait_for(opening, _CONNECT_S)
                except (OSError, TimeoutError) as error:
                    why = str(error) or type(error).__name__
                    self._lost()
            if self._loop.time() >= end_s:
                raise RequestError(503, f"{self.address} is not ready ({why}): try again later")
            await asyncio.sleep(_LOOK_S)

    def _dialled(self, fields: dict[str, Any], setting: Setting) -> dict[str, Any]:
        others = {}
        try:
            for one in fields.get("lora") or []:
                others[int(one["id"])] = float(one["scale"])
        except (TypeError, KeyError, ValueError) as error:
            raise RequestError(400, "'lora' must be an array of objects with 'id' and 'scale' fields") from error
        caches = {} if self._reuse_prompts else {"cache_prompt": False}
        return {**fields, **caches, "lora": setting.scales.as_list(setting.strength, others)}


def _fields(request: Request) -> dict[str, Any]:
    try:
        fields = json.loads(request.body)
    except ValueError as error:
        raise RequestError(400, f"the body is no JSON ({error})") from error
    if not isinstance(fields, dict):
        raise RequestError(400, "the body is no JSON object")
    return fields


def _refuse_what_would_go_around(request: Request, path: str) -> None:
    """Raises RequestError for what would be computed at a strength that nobody set."""
    if path == "/lora-adapters" and request.method not in _READING:
        raise RequestError(501, "`remoe watch` sets the scales here; other adapters can be named in a request's lora")
    if request.method == "POST" and path not in HARMLESS:
        raise RequestError(
            501,
            f"{path} does not take `lora`, its strength would not be known: use /v1/chat/completions or /completion",
        )
