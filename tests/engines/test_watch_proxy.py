"""The proxy of `remoe watch --proxy` before clients and servers that do everything wrong, on real sockets."""

from __future__ import annotations

import http.client
import json
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator

import psutil
import pytest

pytest.importorskip("aiohttp", reason="the proxy (extra: serve)")
from proxied import OK, SETTING, Upstream, connect, error_of, posted, proxied, request, said, until_closed
from waiting import until

from remoe_adapt.engines.llamacpp.proxy import HEADER, Bounds, Proxy
from remoe_adapt.errors import ConfigError

SHORT = Bounds(head_s=0.5, body_s=0.5, stall_s=1.0, body_bytes=1 << 20, held_bytes=3 << 20, connections=300)


@pytest.fixture(scope="module")
def proxy(upstream: Upstream) -> Iterator[Proxy]:
    with proxied(upstream) as found:
        yield found


def test_a_request_is_sent_with_the_scales_of_now(proxy: Proxy, upstream: Upstream) -> None:
    status, headers, text = posted(proxy, {"prompt": "é", "cache_prompt": True, "lora": [{"id": 2, "scale": 1}]})
    assert (status, headers[HEADER], text) == (200, "0.5", OK[-12:])
    assert json.loads(upstream.requests[-1][1]) == {
        "prompt": "é", "cache_prompt": False, "lora": SETTING.scales.as_list(0.5, {2: 1.0}),
    }  # fmt: skip
    assert posted(proxy, b" {} \n")[0] == 200
    assert json.loads(upstream.requests[-1][1]) == {"cache_prompt": False, "lora": SETTING.scales.as_list(0.5)}
    with proxied(upstream, reuse_prompts=True) as reusing:
        assert posted(reusing, {})[0] == 200
        assert json.loads(upstream.requests[-1][1]) == {"lora": SETTING.scales.as_list(0.5)}


BODIES = {
    "deep": b'{"prompt": ' + b"[" * 200_000,
    "deep and closed": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "Infinity as id": b'{"lora": [{"id": Infinity, "scale": 1}]}',
    "NaN": b'{"temperature": NaN}',
    "a float beyond all": b'{"temperature": 1e999}',
    "an id beyond all": b'{"lora": [{"id": 1e999, "scale": 1}]}',
    "a scale beyond all": b'{"lora": [{"id": 2, "scale": -1e999}]}',
    "a key twice": b'{"lora": [], "lora": [{"id": 0, "scale": 1}]}',
    "5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "no object": b"[1]",
    "no JSON": b"{",
    "nothing": b"",
    "no UTF-8": b'{"prompt": "\xff"}',
    "another encoding": '{"prompt": 1}'.encode("utf-16"),
    "a number as lora": b'{"lora": 3}',
    "text as lora": b'{"lora": ["a"]}',
    "an object as lora": b'{"lora": {"id": 0, "scale": 1}}',
    "text as id": b'{"lora": [{"id": "x", "scale": 1}]}',
    "truth as id": b'{"lora": [{"id": true, "scale": 1}]}',
    "no scale": b'{"lora": [{"id": 1}]}',
}


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_bodies_that_cannot_be_meant_are_answered_400(proxy: Proxy, upstream: Upstream, body: bytes) -> None:
    before = len(upstream.requests)
    status, error = error_of(said(proxy, request(body)))
    assert status == 400 and error["type"] == "invalid_request_error" and len(upstream.requests) == before
    assert error["message"].isprintable() and len(error["message"]) < 600


HEADS = {
    "no HTTP": (b"\x16\x03\x01\x02\x00\x01\r\n\r\n", 400),
    "no version": (b"GET /health\r\nHost: x\r\n\r\n", 400),
    "5,000 digits": (b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n", 400),
    "a negative length": (b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    "two lengths": (b"POST /completion HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{} ", 400),
    "no header": (b"GET /health HTTP/1.1\r\nHost x\r\n\r\n", 400),
    "a long header": (b"GET /health HTTP/1.1\r\nHost: x\r\nA: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "no chunks": (
        b"POST /completion HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n0\r\n\r\n",
        400,
    ),
    "another target": (b"GET http://x/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 400),
    "compressed": (request(b"{}", head="Content-Encoding: gzip\r\n"), 415),
    "another route": (request(b"{}", "/v1/messages"), 501),
    "a route around": (request(b"{}", "/v1/../completion"), 501),
    "scales for all": (request(b"{}", "/lora-adapters"), 501),
}


@pytest.mark.parametrize(("head", "status"), HEADS.values(), ids=HEADS)
def test_heads_that_cannot_be_meant_are_answered_by_name(proxy: Proxy, head: bytes, status: int) -> None:
    before = proxy.counts["refused"]
    assert error_of(said(proxy, head))[0] == status
    assert proxy.counts["refused"] == before + 1
    assert posted(proxy, {})[0] == 200


def test_bodies_beyond_the_bounds_are_refused_as_soon_as_that_is_known(upstream: Upstream) -> None:
    with proxied(upstream, bounds=SHORT) as proxy:
        head = b"POST /completion HTTP/1.1\r\nHost: x\r\n"
        announced = head + b"Content-Length: 1048577\r\nExpect: 100-continue\r\n\r\n"
        status, error = error_of(said(proxy, announced))
        assert status == 413 and "1 MiB" in error["message"] and "--max-body" in error["message"]
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        assert error_of(said(proxy, head + b"Transfer-Encoding: chunked\r\n\r\n" + chunk * 17))[0] == 413
        assert posted(proxy, b"{}".ljust(1 << 20))[0] == 200
    with proxied(upstream) as proxy:
        # Cheap to send, dear to read: 3 bytes become 64.
        status, error = error_of(said(proxy, request(b'{"prompt": [' + b"[]," * 1_500_000 + b"0]}")))
        assert status == 413 and "values" in error["message"]


def test_all_bodies_together_are_bounded(upstream: Upstream) -> None:
    with proxied(upstream, bounds=SHORT) as proxy:
        held = [connect(proxy) for _ in range(3)]
        for connection in held:
            connection.sendall(request(b" " * (1 << 20))[:-1])
        until(lambda: proxy._held >= (3 << 20) - 3)
        status, error = error_of(said(proxy, request(b"{}".ljust(1000))))
        assert status == 503 and "at once" in error["message"]
        for connection in held:
            assert error_of(until_closed(connection))[0] == 408
            connection.close()
        assert posted(proxy, b"{}".ljust(1000))[0] == 200
        until(lambda: proxy._held == 0)


STALLS = {
    "nothing said": b"",
    "half a head": b"POST /completion HTTP/1.1\r\nHost: x\r\n",
    "half a body": b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\n{",
    "half a chunk": b"POST /completion HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n{",
    "kept alive": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n",
    "kept alive, then half a head": b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET /hea",
}


def test_200_stalled_connections_are_closed_while_another_client_is_served(upstream: Upstream) -> None:
    with proxied(upstream, bounds=SHORT) as proxy:
        stalled = []
        for number in range(200):
            stalled.append(connect(proxy))
            stalled[-1].sendall(list(STALLS.values())[number % len(STALLS)])
        served = 0
        closed: list[bytes] = []

        def wait_for_them() -> None:
            closed.extend(until_closed(connection) for connection in stalled)

        waiting = threading.Thread(target=wait_for_them)
        waiting.start()
        while waiting.is_alive():
            assert posted(proxy, {"prompt": "a"})[0] == 200
            served += 1
        waiting.join()
        assert len(closed) == 200 and served >= 1
        halves = [text for number, text in enumerate(closed) if number % len(STALLS) in (2, 3)]
        assert all(error_of(text)[0] == 408 for text in halves)
        for connection in stalled:
            connection.close()
        assert proxy.counts["refused"] == len(halves)


def test_a_body_in_drips_is_closed_too(upstream: Upstream) -> None:
    with proxied(upstream, bounds=SHORT) as proxy, connect(proxy) as connection:
        connection.sendall(b"POST /completion HTTP/1.1\r\nHost: x\r\nContent-Length: 10000\r\n\r\n")
        for _ in range(200):
            try:
                connection.sendall(b" ")
            except ConnectionError:
                break
            time.sleep(0.02)
        else:
            pytest.fail("200 drips in 4 s were taken")


def test_connections_are_counted(upstream: Upstream) -> None:
    with proxied(upstream, bounds=Bounds(connections=3)) as proxy:
        held = [connect(proxy) for _ in range(3)]
        until(lambda: error_of(said(proxy, b""))[0] == 503)
        for connection in held:
            connection.close()
        until(lambda: said(proxy, request(b"{}")).startswith(b"HTTP/1.1 200"))


def test_a_large_body_keeps_nobody_waiting(upstream: Upstream) -> None:
    """While one is read and passed on, all others are answered: many, not one at its end."""
    with proxied(upstream) as proxy:
        body = json.dumps({"prompt": ["a" * 1000, 1, 2.5, {"b": None}] * 20_000}).encode()
        answers: list[int] = []
        sending = threading.Thread(target=lambda: answers.append(posted(proxy, body)[0]))
        sending.start()
        served = 0
        while sending.is_alive():
            assert posted(proxy, {"prompt": "a"})[0] == 200
            served += 1
        sending.join()
        assert answers == [200] and served >= 5
        assert max(len(body) for _, body in upstream.requests) > len(body)


def test_headers_of_one_connection_stay_there(proxy: Proxy, upstream: Upstream) -> None:
    head = (
        "Keep-Alive: 5\r\nTE: trailers\r\nX-Mine: 1\r\nConnection: X-Mine\r\nX-Kept: é\r\nAuthorization: Bearer k\r\n"
    )
    text = b"HTTP/1.1 200 Fine\r\nKeep-Alive: timeout=5\r\nConnection: X-Hop\r\nX-Hop: 1\r\nX-Remoe-Strength: 9\r\n"
    upstream.says = text + b"Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nContent-Length: 2\r\n\r\n{}"
    try:
        answer = said(proxy, request(b'{"a": 1}', "/completion?x=%2F&y", head=head))
    finally:
        upstream.says = OK
    sent = upstream.requests[-1][0].lower()
    assert sent.startswith(b"post /completion?x=%2f&y http/1.1\r\n") and b"x-kept: \xc3\xa9" in sent
    assert b"authorization: bearer k" in sent and b"host: 127.0.0.1" in sent
    assert not any(name in sent for name in (b"x-mine", b"\r\nte:", b"keep-alive", b"user-agent", b"accept"))
    assert answer.startswith(b"HTTP/1.1 200 Fine\r\n") and answer.count(b"Set-Cookie") == 2
    assert b"x-hop" not in answer.lower() and b"timeout=5" not in answer
    assert answer.lower().count(b"x-remoe-strength: 0.5") == answer.lower().count(b"x-remoe-strength") == 1


def test_a_connection_serves_one_request_after_the_other(proxy: Proxy) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
    connection.request("GET", "/health")
    assert connection.getresponse().read() == OK[-12:]
    mine = connection.sock.getsockname()
    connection.request("POST", "/completion", "{}")
    assert connection.getresponse().read() == OK[-12:] and connection.sock.getsockname() == mine
    connection.request("HEAD", "/health")
    answer = connection.getresponse()
    assert answer.headers["Content-Length"] == "12" and answer.read() == b""
    connection.close()
    both = said(proxy, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + request(b"{}"))
    assert both.count(b"HTTP/1.1 200") == 2


def test_a_client_that_asks_whether_to_go_on_is_told_so(proxy: Proxy) -> None:
    with connect(proxy) as connection:
        connection.sendall(request(b"{}", head="Expect: 100-continue\r\n")[:-2])
        assert connection.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"{}")
        assert until_closed(connection).startswith(b"HTTP/1.1 200")


def proxy_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name == "remoe-proxy"}


def test_ports_that_cannot_be_had_are_one_error(proxy: Proxy, upstream: Upstream) -> None:
    for host, port in (("127.0.0.1", proxy.port), ("192.0.2.1", 0), ("no such host", 80), ("a" * 70, 80)):
        before = proxy_threads()
        with pytest.raises(ConfigError, match=r"cannot listen on .*: give another --proxy"), \
                proxied(upstream, host=host, port=port):  # fmt: skip
            pytest.fail("it listens")
        assert proxy_threads() == before


def test_nothing_is_left_after_the_end(upstream: Upstream) -> None:
    """Neither of clients that said nothing, nor of answers that nobody takes, nor of a large body being read."""

    def endless(connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            connection.sendall(b"x" * 65536)

    threads, process = set(threading.enumerate()), psutil.Process(os.getpid())
    with Upstream(endless) as server:
        files = process.num_fds()
        for _ in range(3):
            with proxied(server) as proxy:
                clients = [connect(proxy) for _ in range(5)]
                for connection, text in zip(clients, [*STALLS.values()][:4], strict=False):
                    connection.sendall(text)
                clients[4].sendall(request(b'{"prompt": [' + b"0," * 500_000 + b"0]}"))
                until(lambda: proxy.counts or server.requests)
            for connection in clients:
                until_closed(connection)
                connection.close()
        until(lambda: process.num_fds() <= files)
    assert {thread.name for thread in set(threading.enumerate()) - threads} == set()
    proxy.stop()  # a second time


def test_a_reset_connection_is_no_error(upstream: Upstream, caplog: pytest.LogCaptureFixture) -> None:
    with proxied(upstream) as proxy:
        for text in (b"", b"GET", request(b"{}")[:-1], request(b"{}")):
            with connect(proxy) as connection:
                connection.sendall(text)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert posted(proxy, {})[0] == 200
    assert not caplog.records
