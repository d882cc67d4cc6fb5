"""The page, the status and the metrics on a port of their own, for an engine whose own server is not ours to add to.

| route | without a key, where one is wanted |
|---|---|
| `GET /`, which has no figures in itself, and `/health` | yes |
| `GET /remoe/status`, `GET /metrics`, `POST /remoe/pressure` | no |

No request to the model comes here.
"""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from remoe_adapt._support import parse_json, printable
from remoe_adapt.engines.page.guard import bears, is_loopback, key_digest, names_this_machine
from remoe_adapt.engines.page.metrics import METRICS_TYPE, metrics_text
from remoe_adapt.engines.page.page import PAGE_HEADERS, page_html
from remoe_adapt.engines.page.status import STATUS_ROUTE, ServerStatus
from remoe_adapt.errors import ConfigError, RemoeError

_OPEN = ("/", "/health")
_MAX_BODY_BYTES, _MOST_AT_ONCE, _STALLED_S = 4096, 32, 10.0
# Ports behind the engine's own that are tried before any other.
_NEAR = 10


class StatusServer:
    """Listens from its making on, answers from `start` to `close`.

    status: what holds now; any thread calls it, several at once.
    hold: has the dial held at ("strength" or "pressure", number), or handed back (the number is None); raises
        ConfigError.
    host, port: where it listens; port None: one close behind `near`, or else any.
    api_key: asked of clients, None: none. Without one a server on the loopback address answers to this machine's names
        alone.

    Raises ConfigError when the address cannot be had.
    """

    def __init__(
        self,
        status: Callable[[], ServerStatus],
        hold: Callable[[str, float | None], object],
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        near: int = 0,
        api_key: str | None = None,
    ) -> None:
        if api_key == "":
            raise ConfigError("the API key is empty: give one with characters in it, or none.")
        self.status, self.hold, self.host = status, hold, host
        self.digest = None if api_key is None else key_digest(api_key)
        self.any_host = not is_loopback(host)
        self._server = self._bound([port] if port is not None else [*range(near + 1, near + 1 + _NEAR), 0])
        self.port = int(self._server.server_address[1])
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """As http://127.0.0.1:8001; for a server that listens everywhere, this machine's."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"

    def start(self) -> None:
        """Answer from now on, in threads of its own."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="remoe-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Listen no more; what is being answered is answered."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()

    def _bound(self, ports: list[int]) -> _Server:
        why: Exception | None = None
        for port in ports:
            if port > 65535:
                continue
            try:
                return _Server(self, self.host, port)
            except (OSError, OverflowError, UnicodeError) as error:
                why = error
        told = getattr(why, "strerror", None) or why
        raise ConfigError(
            f"the page cannot be at {self.host}:{ports[-1]} ({told}): give another --page, or --page off."
        )


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, owner: StatusServer, host: str, port: int) -> None:
        self.owner = owner
        self.room = threading.BoundedSemaphore(_MOST_AT_ONCE)
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = found[0]
        super().__init__(found[4], _Handler)  # type: ignore[arg-type]

    def process_request(self, request: Any, client_address: Any) -> None:
        # Whoever opens connections and says nothing must not have a thread for each.
        if not self.room.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes in the midst of its answer is no news."""


class _Refused(Exception):  # noqa: N818 (an answer)
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _Handler(BaseHTTPRequestHandler):
    timeout = _STALLED_S
    server: _Server

    def version_string(self) -> str:
        return "remoe"

    def log_message(self, format: str, *args: Any) -> None:
        """Whoever looks at a page once a second is no news."""

    def do_GET(self) -> None:
        self._answered(self._get)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        self._answered(self._post)

    def _answered(self, answer: Callable[[str], None]) -> None:
        try:
            path = self.path.partition("?")[0]
            self._check(path)
            answer(path)
        except _Refused as refused:
            self._error(refused.status, str(refused), refused.code)
        except RemoeError as error:
            self._error(500, str(error))
        # Or a half-read body would be taken for the next request.
        self.close_connection = True

    def _check(self, path: str) -> None:
        owner = self.server.owner
        if owner.digest is not None:
            given = (self.headers.get("Authorization") or "").encode("latin-1", "replace")
            if path not in _OPEN and not bears(given, owner.digest):
                raise _Refused(401, "this server wants its API key as a bearer token", "invalid_api_key")
        elif not owner.any_host and not names_this_machine(self.headers.get("Host") or ""):
            raise _Refused(
                403,
                "this server answers to the names of its own machine: start it with --api-key, or with a --page that "
                "others may reach",
            )

    def _get(self, path: str) -> None:
        owner = self.server.owner
        if path == "/":
            self._send(200, page_html(), PAGE_HEADERS)
        elif path == "/health":
            self._json(200, {"status": "ok"})
        elif path == STATUS_ROUTE:
            self._json(200, owner.status().to_json())
        elif path == "/metrics":
            self._send(200, metrics_text(owner.status()), {"Content-Type": METRICS_TYPE, "Cache-Control": "no-store"})
        else:
            raise _Refused(
                405 if path == "/remoe/pressure" else 404, f"{printable(path, 200)} is no page of this server"
            )

    def _post(self, path: str) -> None:
        if path != "/remoe/pressure":
            raise _Refused(404, f"{printable(path, 200)} is not here: requests for tokens go to the model's own server")
        if (self.headers.get("Content-Type") or "").partition(";")[0].strip().lower() != "application/json":
            # Also what keeps web pages of others out: a browser asks the server first before it sends this type there.
            raise _Refused(415, "send JSON, with Content-Type: application/json")
        length = self.headers.get("Content-Length") or ""
        if not (length.isascii() and length.isdecimal()) or int(length) > _MAX_BODY_BYTES:
            raise _Refused(413, f"the body is longer than {_MAX_BODY_BYTES} bytes, or does not say how long it is")
        try:
            fields = parse_json(self.rfile.read(int(length)), "the body", ConfigError)
            if not isinstance(fields, dict) or len(fields) != 1 or not fields.keys() <= {"pressure", "strength"}:
                raise ConfigError('send {"pressure": 0.8}, {"strength": 0.5}, or {"pressure": null} for the sensors')
            ((what, value),) = fields.items()
            if what == "strength" and value is None:
                raise ConfigError('{"pressure": null} hands the dial back to the sensors')
            self.server.owner.hold(what, value)
        except ConfigError as error:
            raise _Refused(400, str(error)) from error
        self._json(200, self.server.owner.status().to_json())

    def _json(self, status: int, value: Any) -> None:
        headers = {"Content-Type": "application/json", "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}
        self._send(status, json.dumps(value, ensure_ascii=False).encode(), headers)

    def _error(self, status: int, message: str, code: str | None = None) -> None:
        kinds = {401: "authentication_error", 404: "not_found_error"}
        kind = kinds.get(status, "invalid_request_error" if status < 500 else "server_error")
        with suppress(OSError):
            self._json(
                status, {"error": {"message": printable(message, 2000), "type": kind, "param": None, "code": code}}
            )

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status, HTTPStatus(status).phrase)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        if status == 401:
            self.send_header("WWW-Authenticate", "Bearer")
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
