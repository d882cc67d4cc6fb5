"""Small JSON calls to a llama-server: one connection each, so a server that was restarted never meets an old one."""

from __future__ import annotations

import http.client
import json
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from remoe_adapt.errors import ConfigError, ServerDownError, ServerError

# The server answers these calls between two decode steps, which may be slow on a thrashing machine.
TIMEOUT_S = 30.0
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
        except ValueError as error:
            raise ConfigError(f"{url!r} is not an address ({error}): write http://127.0.0.1:8080.") from error
        if parts.scheme not in ("", "http") or not host or not port or parts.query or parts.fragment or parts.username:
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

    Raises ServerDownError when the server does not answer or is loading its model, ServerError when it refuses.
    """
    connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_s)
    headers = {"Connection": "close"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        if body is None:
            connection.request("GET", address.prefix + path, headers=headers)
        else:
            headers["Content-Type"] = "application/json"
            connection.request("POST", address.prefix + path, json.dumps(body), headers)
        answer = connection.getresponse()
        text = answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise ServerDownError(f"{address} does not answer ({error or type(error).__name__})") from error
    finally:
        connection.close()
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ServerError(f"{address}{path} answers {answer.status} without JSON: is it a llama-server?") from error
    if answer.status == _LOADING:
        raise ServerDownError(f"{address}: {_message(found)}")
    if answer.status != http.client.OK:
        hint = " (give its key with --api-key)" if answer.status == http.client.UNAUTHORIZED else ""
        raise ServerError(f"{address}{path} answers {answer.status}: {_message(found)}{hint}")
    return found


def _message(found: Any) -> str:
    error = found.get("error") if isinstance(found, dict) else None
    return str(error.get("message", error) if isinstance(error, dict) else found)[:200]
