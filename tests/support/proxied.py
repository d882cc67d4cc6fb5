"""A proxy of `remoe watch` before servers that say exactly what a test wants, spoken to in plain bytes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from remoe_adapt.engines.llamacpp.client import Address, ScaleMap
from remoe_adapt.engines.llamacpp.proxy import Proxy
from remoe_adapt.engines.llamacpp.server import Setting

SETTING = Setting(0.5, ScaleMap(((0.5, 0), (1.0, 1)), ((2, 0.25),)))
OK = b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 12\r\n\r\n{"a": "b"}\r\n'
Says = Callable[[socket.socket], None]


class Upstream:
    """Answers every connection: reads one request, keeps it, says what it was told to say, and closes.

    says: bytes, or a function that is given the connection. requests: (head, body) of each.
    """

    def __init__(self, says: bytes | Says = OK) -> None:
        self.says, self.requests = says, list[tuple[bytes, bytes]]()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = Address("127.0.0.1", self._socket.getsockname()[1])
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def __enter__(self) -> Upstream:
        return self

    def __exit__(self, *error: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        for thread in self._threads:
            thread.join(20)
            assert not thread.is_alive()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self._threads.append(threading.Thread(target=self._answer, args=(connection,), daemon=True))
                self._threads[-1].start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            with connection.makefile("rb") as file:
                head = b""
                while (line := file.readline()) != b"\r\n":
                    if not line:
                        return
                    head += line
                self.requests.append((head, _body(head.lower(), file)))
            if callable(self.says):
                self.says(connection)
            elif head.startswith(b"HEAD"):
                connection.sendall(self.says[: self.says.index(b"\r\n\r\n") + 4])
            else:
                connection.sendall(self.says)


def _body(head: bytes, file: Any) -> bytes:
    if b"transfer-encoding: chunked" not in head:
        length = head.partition(b"content-length:")[2].split(b"\r\n")[0]
        return bytes(file.read(int(length or 0)))
    body = bytearray()
    while size := int(file.readline(), 16):
        body += file.read(size)
        file.readline()
    file.readline()
    return bytes(body)


@contextmanager
def proxied(upstream: Upstream | Address, **options: Any) -> Iterator[Proxy]:
    address = upstream if isinstance(upstream, Address) else upstream.address
    options = {"setting": lambda: SETTING, "lost": lambda: None, "host": "127.0.0.1", "port": 0} | options
    proxy = Proxy(address, **options)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop(1.0)


def connect(proxy: Proxy, timeout_s: float = 20.0) -> socket.socket:
    return socket.create_connection(("127.0.0.1", proxy.port), timeout_s)


def until_closed(connection: socket.socket) -> bytes:
    """All that comes; b"" also where the connection was reset."""
    found = b""
    with suppress(ConnectionError):
        while piece := connection.recv(1 << 16):
            found += piece
    return found


def said(proxy: Proxy, request: bytes) -> bytes:
    """What these bytes are answered until the connection is closed."""
    with connect(proxy) as connection:
        with suppress(ConnectionError):
            connection.sendall(request)
        return until_closed(connection)


def request(body: bytes, path: str = "/completion", head: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}Content-Length: {len(body)}\r\n\r\n".encode()
        + body
    )


def error_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    """Status and error of an answer that has to be one of llama-server's form."""
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/") and b"application/json" in head.lower(), answer[:300]
    error = json.loads(body)["error"]
    status = int(head.split()[1])
    assert error["code"] == status and error["message"] and error["type"].endswith("_error"), error
    return status, error


def posted(proxy: Proxy, body: Any, path: str = "/completion") -> tuple[int, Any, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    try:
        connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body))
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()
