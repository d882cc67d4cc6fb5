"""Single messages of a proxy in front of a llama-server: bodies within bounds, `lora` in their JSON, the headers that
go on, and errors as that server words them."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Callable, Mapping, Set
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from aiohttp import web
from multidict import CIMultiDict

from remoe_adapt.errors import RemoeError
from remoe_adapt.untrusted import parse_json, printable

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

    head_s: seconds until a head has come, also of a next request on the same connection; body_s: seconds without any
    more of a body, and beyond what it takes at 16 KiB/s; stall_s: seconds in which a client takes nothing of its
    answer; body_bytes: of one request; held_bytes: of all bodies together; connections: open at once.
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


def error_answer(status: int, message: str) -> web.Response:
    """An answer of our own, in the form of llama-server's errors; its connection is closed afterwards."""
    kind = _KINDS.get(status, "invalid_request_error" if status < 500 else "server_error")
    answer = web.json_response({"error": {"code": status, "message": message, "type": kind}}, status=status)
    if status == 503:
        answer.headers["Retry-After"] = "1"
    answer.force_close()
    return answer


def plain_error(status: int, message: str) -> bytes:
    """The same for a connection on which there is no request to answer."""
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
    return b'{"lora": ' + json.dumps(lora).encode() + (b"}" if body == b"{}" else b", "), body[
        1:
    ] if body != b"{}" else b""


async def in_pieces(*parts: bytes) -> AsyncIterator[bytes]:
    """Small enough that sending one holds nobody up."""
    for part in parts:
        for start in range(0, len(part), _PIECE_BYTES):
            yield part[start : start + _PIECE_BYTES]


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
