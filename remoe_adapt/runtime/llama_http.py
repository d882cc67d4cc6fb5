"""Small JSON calls to a llama-server: one connection each, so a server that was restarted never meets an old one."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from remoe_adapt.errors import ConfigError, ServerDownError, ServerError
from remoe_adapt.untrusted import parse_json, printable

# The server answers these calls between two decode steps, which may be slow on a thrashing machine.
TIMEOUT_S = 30.0
# /props holds the chat template, /lora-adapters all paths: far less than this.
MAX_ANSWER_BYTES = 16 << 20
_PIECE_BYTES = 64 << 10
_LOADING = 503


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; prefix: its --api-prefix, "" without one."""

    host: str
    port: int
    prefix: str = ""

    @classmethod
    def parse(cls, url: str) -> Address:
        """From "http://host:port" or "host:port". Raises ConfigError for anything else, https included."""
        try:
            parts = urlsplit(url if "//" in url else f"//{url}")
            host, port = parts.hostname, parts.port
            (host or "").encode("idna")
            parts.path.encode("ascii")
        except ValueError as error:
            raise ConfigError(f"{url!r} is not an address ({error}): write http://127.0.0.1:8080.") from error
        odd = parts.query or parts.fragment or parts.username or " " in parts.path or not parts.path.isprintable()
        if parts.scheme not in ("", "http") or not host or not port or odd:
            raise ConfigError(f"{url!r} is not an address: write http://127.0.0.1:8080 (plain http, with the port).")
        return cls(host, port, parts.path.rstrip("/"))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.port}{self.prefix}"


def call(
    address: Address,
    path: str,
    body: Any = None,
    *,
    api_key: str | None = None,
    timeout_s: float = TIMEOUT_S,
) -> Any:
    """The JSON answer of GET `path`, or of POST where there is a body.

    timeout_s: of the whole call, whatever the server does. Raises ServerDownError when the server does not answer in it
    or is loading its model, ServerError when it refuses, or answers more than MAX_ANSWER_BYTES or no JSON; ConfigError
    for a key that no header can hold.
    """
    where = f"{address}{path}"
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    sent = None if body is None else json.dumps(body).encode()
    if sent is not None:
        headers["Content-Type"] = "application/json"
    status, text = _exchange(address, "GET" if sent is None else "POST", path, sent, headers, timeout_s)
    found = parse_json(text, f"what {where} answers, with status {status} (is it a llama-server?),", ServerError)
    if status == _LOADING:
        raise ServerDownError(f"{address}: {_message(found)}")
    if status != http.client.OK:
        hint = " (give its key with --api-key)" if status == http.client.UNAUTHORIZED else ""
        raise ServerError(f"{where} answers {status}: {_message(found)}{hint}")
    return found


def _exchange(
    address: Address, method: str, path: str, body: bytes | None, headers: dict[str, str], timeout_s: float
) -> tuple[int, bytes]:
    """Status and body of the answer."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    late = threading.Event()
    timer = threading.Timer(timeout_s, lambda: _cut(sock, late))
    timer.daemon = True
    try:
        connection.connect()
        sock = connection.sock
        # A time limit of the socket starts again with every byte: a server that drips would never meet it.
        timer.start()
        connection.request(method, address.prefix + path, body, headers)
        text = bytearray()
        with connection.getresponse() as answer:
            while piece := answer.read1(_PIECE_BYTES):
                text += piece
                if len(text) > MAX_ANSWER_BYTES:
                    raise ServerError(
                        f"{address}{path} answers more than {MAX_ANSWER_BYTES >> 20} MiB: is it a llama-server?"
                    )
            if late.is_set() or answer.length or not text:
                raise http.client.IncompleteRead(b"", answer.length)
        return answer.status, bytes(text)
    except (OSError, http.client.HTTPException) as error:
        why = f"not within {timeout_s:g} s" if late.is_set() else printable(error) or type(error).__name__
        raise ServerDownError(f"{address} does not answer ({why})") from error
    except UnicodeError as error:
        raise ConfigError("the --api-key has characters that no header can hold: give the server's key.") from error
    except ValueError as error:
        if str(error).startswith("Invalid header"):
            raise ConfigError("the --api-key has a line break in it: give the server's key.") from error
        raise ServerError(f"{address}{path} answers no HTTP ({printable(error)}): is it a llama-server?") from error
    finally:
        timer.cancel()
        connection.close()


def _cut(sock: socket.socket, late: threading.Event) -> None:
    late.set()
    with suppress(OSError):  # closed just now
        sock.shutdown(socket.SHUT_RDWR)


def _message(found: Any) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    return printable(error.get("message", error) if isinstance(error, dict) else found)
