"""The proxy of `remoe watch --proxy` before servers whose answers are broken, cut, slow, or whole in an odd form."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("aiohttp", reason="the proxy (extra: serve)")
from proxied import OK, SETTING, Upstream, connect, error_of, posted, proxied, request, said, until_closed
from waiting import until

from remoe_adapt.engines.llamacpp.client import Address
from remoe_adapt.engines.llamacpp.proxy import HEADER, Bounds, Proxy

CHUNKED = b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.fixture
def lost() -> list[int]:
    return []


@pytest.fixture
def proxy(upstream: Upstream, lost: list[int]) -> Iterator[Proxy]:
    with proxied(upstream, lost=lambda: lost.append(1)) as found:
        yield found


def reset(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")


BROKEN = {
    "nothing": b"",
    "no status": b"HTTP/1.1\r\nContent-Length: 0\r\n\r\n",
    "no space": b"HTTP/1.1200OK\r\nContent-Length: 0\r\n\r\n",
    "no number": b"HTTP/1.1 abc OK\r\nContent-Length: 0\r\n\r\n",
    "no HTTP": b"hello\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "a length of text": b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
    "a negative length": b"HTTP/1.1 200 OK\r\nContent-Length: -2\r\n\r\n{}",
    "a length of 5,000 digits": b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n{}",
    "a head without end": b"HTTP/1.1 200 OK\r\nX: " + b"x" * (1 << 20),
    "another protocol": b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
    "a reset": reset,
}


@pytest.mark.parametrize("says", BROKEN.values(), ids=BROKEN)
def test_answers_that_are_none_are_502(proxy: Proxy, upstream: Upstream, lost: list[int], says: Any) -> None:
    upstream.says = says
    for text in (request(b"{}"), b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"):
        status, error = error_of(said(proxy, text))
        assert status == 502 and error["type"] == "server_error" and "lost it" in error["message"]
    assert proxy.counts == Counter(lost=2) and len(lost) == 2
    upstream.says = OK
    assert posted(proxy, {})[0] == 200


def cut(connection: socket.socket) -> None:
    connection.sendall(CHUNKED + b"5\r\nhello\r\n")
    time.sleep(0.1)
    reset(connection)


CUT = {
    "a shorter body": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",
    "no last chunk": CHUNKED + b"5\r\nhello\r\n",
    "half a last chunk": CHUNKED + b"5\r\nhello\r\n0\r\n",
    "half a chunk": CHUNKED + b"9\r\nhello",
    "no chunks": CHUNKED + b"5\r\nhello\r\nzz\r\n",
    "a reset": cut,
}


@pytest.mark.parametrize("says", CUT.values(), ids=CUT)
def test_answers_that_end_early_are_never_taken_for_whole(
    proxy: Proxy, upstream: Upstream, lost: list[int], says: Any
) -> None:
    upstream.says = says
    try:
        status, _, text = posted(proxy, {})
    except (http.client.HTTPException, ConnectionError):
        pass
    else:  # it was seen before anything was passed on
        assert status == 502 and "lost it" in json.loads(text)["error"]["message"]
    assert proxy.counts == Counter(lost=1) and lost == [1]


WHOLE = {
    "trailers": CHUNKED + b"5\r\nhello\r\n0\r\nX-Sum: 1\r\nX-More: 2\r\n\r\n",
    "extensions": CHUNKED + b'5;a=b;c="d"\r\nhello\r\n0;last\r\n\r\n',
    "many noughts": CHUNKED + b"005\r\nhello\r\n000\r\n\r\n",
    "in capitals": CHUNKED.replace(b"chunked", b"Chunked") + b"5\r\nhello\r\n0\r\n\r\n",
    "a length": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "until the end": b"HTTP/1.1 200 OK\r\n\r\nhello",
    "of HTTP/1.0": b"HTTP/1.0 200 OK\r\n\r\nhello",
    "after an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n" + CHUNKED + b"5\r\nhello\r\n0\r\n\r\n",
    "without a reason": b"HTTP/1.1 200 \r\nContent-Length: 5\r\n\r\nhello",
}


@pytest.mark.parametrize("says", WHOLE.values(), ids=WHOLE)
def test_answers_that_are_whole_are_passed_on_whole(
    proxy: Proxy, upstream: Upstream, lost: list[int], says: bytes
) -> None:
    upstream.says = says
    status, headers, text = posted(proxy, {})
    assert (status, headers[HEADER], text) == (200, "0.5", b"hello")
    until(lambda: proxy.counts == Counter(answered=1) and not lost)


def test_what_the_server_refuses_is_passed_on_as_it_is(proxy: Proxy, upstream: Upstream) -> None:
    upstream.says = (
        b"HTTP/1.1 401 Who\r\nContent-Type: a/b\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\n\x1f\x8b\x08"
    )
    status, headers, text = posted(proxy, {})
    assert (status, headers["Content-Encoding"], headers["Content-Type"], text) == (401, "gzip", "a/b", b"\x1f\x8b\x08")
    for says, status in (
        (b"HTTP/1.1 204 No\r\n\r\n", 204),
        (b"HTTP/1.1 302 To\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", 302),
    ):
        upstream.says = says
        assert posted(proxy, {})[::2] == (status, b"")
    until(lambda: proxy.counts == Counter(answered=3))


def test_each_piece_of_a_stream_comes_at_once(proxy: Proxy, upstream: Upstream) -> None:
    """The next is said only when the last has come, and the head before the first."""
    go = threading.Semaphore(0)

    def stream(connection: socket.socket) -> None:
        connection.sendall(CHUNKED.replace(b"plain", b"event-stream"))
        for number in range(5):
            assert go.acquire(timeout=20)
            connection.sendall(b"9\r\ndata: %d\n\n\r\n" % number)
        connection.sendall(b"0\r\n\r\n")

    upstream.says = stream
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    connection.request("POST", "/v1/chat/completions", b'{"stream": true}')
    answer = connection.getresponse()
    assert answer.headers["Content-Type"] == "text/event-stream" and answer.headers[HEADER] == "0.5"
    for number in range(5):
        go.release()
        assert answer.readline() + answer.readline() == b"data: %d\n\n" % number
    assert answer.read() == b""
    connection.close()


def test_a_client_that_leaves_ends_its_request_at_the_server(proxy: Proxy, upstream: Upstream, lost: list[int]) -> None:
    ended: list[bytes] = []

    def wait_for_the_end(connection: socket.socket) -> None:
        connection.settimeout(20)
        ended.append(until_closed(connection))

    def stream(connection: socket.socket) -> None:
        connection.sendall(CHUNKED + b"5\r\nhello\r\n")
        wait_for_the_end(connection)

    for count, says in enumerate((wait_for_the_end, stream), start=1):
        upstream.says = says
        before = len(upstream.requests)
        with connect(proxy) as connection:
            connection.sendall(request(b"{}"))
            until(lambda before=before: len(upstream.requests) > before)
            if says is stream:
                assert connection.recv(1000)
        until(lambda count=count: ended == [b""] * count and proxy.counts["left"] == count)
    assert proxy.counts == Counter(left=2) and not lost


def test_a_client_that_takes_nothing_holds_the_server_back_and_is_given_up(upstream: Upstream) -> None:
    sent: list[int] = [0]

    def endless(connection: socket.socket) -> None:
        connection.settimeout(20)
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            sent[0] += connection.send(b"x" * 65536)

    upstream.says = endless
    with proxied(upstream, bounds=Bounds(stall_s=1.0)) as proxy, connect(proxy) as connection:
        connection.sendall(request(b"{}"))
        until(lambda: proxy.counts["left"] == 1)
        # What the kernel's buffers take, and no more than that in ours.
        assert 0 < sent[0] < 64 << 20


def test_requests_wait_for_a_server_that_is_down_or_not_met(lost: list[int]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        settings: list[Any] = [None]
        with proxied(
            Address("127.0.0.1", port), setting=lambda: settings[0], lost=lambda: lost.append(1), hold_s=0.2
        ) as proxy:
            status, error = error_of(said(proxy, request(b"{}")))
            assert status == 503 and "not known yet" in error["message"] and error["type"] == "unavailable_error"
            settings[0] = SETTING
            answer = said(proxy, request(b"{}"))
            assert error_of(answer)[0] == 503 and b"retry-after: 1" in answer.lower() and lost
            assert error_of(said(proxy, b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"))[0] == 503
            assert proxy.counts == Counter(unavailable=3)
    with Upstream() as server:
        asked: list[int] = []

        def setting() -> Any:
            asked.append(1)
            return SETTING if len(asked) > 3 else None

        with proxied(server, setting=setting) as proxy:
            assert posted(proxy, {})[0] == 200


def test_the_setting_is_that_of_the_moment_of_sending(upstream: Upstream) -> None:
    """It is asked for once more when the connection is there; a server that has just gone is waited for."""
    answers = iter([SETTING, None, SETTING, SETTING])
    upstream.says, before = OK, len(upstream.requests)
    with proxied(upstream, setting=lambda: next(answers)) as proxy:
        status, headers, _ = posted(proxy, {"prompt": "a"})
    assert (status, headers[HEADER]) == (200, "0.5") and proxy.counts == Counter(answered=1)
    whole = [json.loads(body) for _, body in upstream.requests[before:] if body.endswith(b"}")]
    assert [one["prompt"] for one in whole] == ["a"]


def test_the_end_waits_for_answers_that_are_under_way(upstream: Upstream) -> None:
    go = threading.Event()

    def slow(connection: socket.socket) -> None:
        go.wait(20)
        connection.sendall(OK)

    upstream.says = slow
    found: list[int] = []
    with proxied(upstream) as proxy:
        before = len(upstream.requests)
        asking = threading.Thread(target=lambda: found.append(posted(proxy, {})[0]))
        asking.start()
        until(lambda: len(upstream.requests) > before)
        stopping = threading.Thread(target=proxy.stop)
        stopping.start()
        until(lambda: refused(proxy))
        go.set()
        stopping.join()
        asking.join()
    assert found == [200]


def refused(proxy: Proxy) -> bool:
    try:
        connect(proxy).close()
    except ConnectionError:
        return True
    return False
