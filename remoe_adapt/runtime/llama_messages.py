"""HTTP/1.1 as far as a proxy in front of a llama-server needs it: heads, bodies, and errors as that server words them.

Every connection carries one request (`Connection: close` both ways): none is ever lost by meeting a connection that its
other end has just given up.
"""

from __future__ import annotations

import asyncio
import http.client
import json
from dataclasses import dataclass

HEAD_BYTES = 64 << 10
BODY_BYTES = 256 << 20
_LAST_CHUNK = b"\r\n0\r\n\r\n"
# Of one connection, or rewritten here.
_HOP_BY_HOP = {"connection", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
_OURS = {"content-length", "expect", "host"}


class RequestError(Exception):
    """A request that is answered here: status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass(slots=True)
class Request:
    """A request as it came: target with its query, headers in order, body whole."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def path(self) -> str:
        """Without the query."""
        return self.target.partition("?")[0]

    def as_bytes(self, host: str) -> bytes:
        """The request for the server, its connection closed afterwards."""
        kept = [(name, value) for name, value in self.headers if name.lower() not in _HOP_BY_HOP | _OURS]
        kept += [("Host", host), ("Connection", "close")]
        if self.body or self.method not in ("GET", "HEAD", "OPTIONS"):
            kept.append(("Content-Length", str(len(self.body))))
        return _head_bytes(f"{self.method} {self.target} HTTP/1.1", kept) + self.body


class Body:
    """Follows an answer's bytes by the framing that its head announced."""

    def __init__(self, length: int | None, chunked: bool) -> None:
        self._length, self._chunked = length, chunked
        self._count, self._tail = 0, b""

    @classmethod
    def of(cls, method: str, first: str, headers: list[tuple[str, str]]) -> Body:
        """Of the answer with this head to a request of this method."""
        named = {name.lower(): value for name, value in headers}
        if method == "HEAD" or first.split(" ")[1] in ("204", "304"):
            return cls(0, False)
        if "chunked" in named.get("transfer-encoding", "").lower():
            return cls(None, True)
        length = named.get("content-length", "")
        return cls(int(length) if length.isdecimal() else None, False)

    def seen(self, piece: bytes) -> None:
        """So much more of it has come."""
        self._count += len(piece)
        self._tail = (self._tail + piece[-len(_LAST_CHUNK) :])[-len(_LAST_CHUNK) :]

    @property
    def whole(self) -> bool:
        """Whether nothing is missing when the connection ends now."""
        if self._chunked:
            return self._tail.endswith(_LAST_CHUNK)
        return self._length is None or self._count >= self._length


async def read_request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    """The next request, None when the client says nothing. Raises RequestError for what is no HTTP, or too large."""
    head = await _read_head(reader)
    if head is None:
        return None
    first, headers = head
    parts = first.split(" ")
    if len(parts) != 3 or not parts[2].startswith("HTTP/1."):
        raise RequestError(400, f"{first[:60]!r} is no HTTP/1.1 request")
    named = {name.lower(): value for name, value in headers}
    if named.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    if "chunked" in named.get("transfer-encoding", "").lower():
        body = await _read_chunks(reader)
    else:
        length = named.get("content-length", "0")
        if not length.isdecimal():
            raise RequestError(400, f"Content-Length {length[:20]!r} is no number")
        body = await _read_exactly(reader, int(length), 0)
    return Request(parts[0], parts[1], headers, body)


async def read_answer_head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]]:
    """Status line and headers of the server's answer. Raises ConnectionError when it ends before."""
    while True:
        head = await _read_head(reader)
        if head is None:
            raise ConnectionError("the server closed the connection without an answer")
        if not head[0].split(" ")[1].startswith("1"):  # an interim answer is not the answer
            return head


def answer_head(first: str, headers: list[tuple[str, str]], more: list[tuple[str, str]]) -> bytes:
    """The server's head for the client: framing as it is, the connection closed afterwards, `more` headers."""
    ours = {"connection", "keep-alive", *(name.lower() for name, _ in more)}
    kept = [(name, value) for name, value in headers if name.lower() not in ours]
    return _head_bytes(first, [*kept, *more, ("Connection", "close")])


def error_answer(status: int, message: str, more: list[tuple[str, str]] | None = None) -> bytes:
    """An answer of our own, in the form of llama-server's errors."""
    kinds = {400: "invalid_request_error", 501: "not_supported_error", 503: "unavailable_error"}
    error = {"code": status, "message": message, "type": kinds.get(status, "server_error")}
    body = json.dumps({"error": error}).encode()
    headers = [("Content-Type", "application/json; charset=utf-8"), ("Content-Length", str(len(body)))]
    first = f"HTTP/1.1 {status} {http.client.responses.get(status, 'Error')}"
    return _head_bytes(first, [*headers, *(more or []), ("Connection", "close")]) + body


def _head_bytes(first: str, headers: list[tuple[str, str]]) -> bytes:
    lines = [first, *(f"{name}: {value}" for name, value in headers)]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _read_head(reader: asyncio.StreamReader) -> tuple[str, list[tuple[str, str]]] | None:
    try:
        text = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except asyncio.IncompleteReadError as error:
        if not error.partial:
            return None
        raise RequestError(400, "the head of the message ends early") from error
    except asyncio.LimitOverrunError as error:
        raise RequestError(431, f"the head of the message is longer than {HEAD_BYTES} bytes") from error
    first, *lines = text.strip("\r\n").split("\r\n")
    headers = []
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon or not name or name != name.strip():
            raise RequestError(400, f"{line[:60]!r} is no header")
        headers.append((name, value.strip()))
    return first, headers


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    body = bytearray()
    try:
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            body += await _read_exactly(reader, size, len(body))
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
    except (ValueError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        raise RequestError(400, "the chunks of the body are malformed or end early") from error
    return bytes(body)


async def _read_exactly(reader: asyncio.StreamReader, size: int, before: int) -> bytes:
    if size + before > BODY_BYTES:
        raise RequestError(413, f"the body is longer than {BODY_BYTES >> 20} MiB")
    try:
        return await reader.readexactly(size)
    except asyncio.IncompleteReadError as error:
        raise RequestError(400, f"the body ends after {len(error.partial)} of {size} bytes") from error
