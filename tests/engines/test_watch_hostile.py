"""`remoe watch` at servers that are none, and options of its command that cannot be meant."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from remoe_adapt.cli.app import app
from remoe_adapt.dial.load import profile_of
from remoe_adapt.engines.llamacpp.client import Address, call, loaded_loras, reuses_prompts
from remoe_adapt.engines.llamacpp.process import ServerProcess
from remoe_adapt.engines.llamacpp.server import LlamaServer
from remoe_adapt.engines.llamacpp.watch import FamilyPoints, Watch, WatchOptions
from remoe_adapt.errors import ConfigError, MissingDependencyError, ServerDownError, ServerError

HEAD = b"HTTP/1.1 200 OK\r\n\r\n"


@contextmanager
def saying(says: bytes | Callable[[socket.socket], None]) -> Iterator[Address]:
    """A server that reads what comes first and says this to everybody."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, suppress(OSError):
                        connection.settimeout(3)
                        connection.recv(1 << 16)
                        if callable(says):
                            says(connection)
                        else:
                            connection.sendall(says)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Address("127.0.0.1", server.getsockname()[1])
        server.shutdown(socket.SHUT_RDWR)
        thread.join(20)
        assert not thread.is_alive()


def drips(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    while True:
        connection.sendall(b"a")
        time.sleep(0.05)


def drips_in_the_body(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    while True:
        connection.sendall(b" ")
        time.sleep(0.05)


def goes_on_for_ever(connection: socket.socket) -> None:
    connection.sendall(HEAD)
    while True:
        connection.sendall(b" " * 65536)


def interim_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 1000)


WRONG = {
    "deep": HEAD + b"[" * 200_000,
    "no JSON": HEAD + b"<html>",
    "NaN": HEAD + b"[NaN]",
    "a key twice": HEAD + b'{"a": 1, "a": 2}',
    "5,000 digits": HEAD + b"9" * 5000,
    "no UTF-8": HEAD + b'"\xff"',
    "a chunk of negative length": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n" + b" " * 100_000,
    "endless": goes_on_for_ever,
    "a refusal with escapes": b'HTTP/1.1 400 No\r\n\r\n{"error": {"message": "\\u001b[31m' + b"x" * 10_000 + b'"}}',
}


@pytest.mark.parametrize("says", WRONG.values(), ids=WRONG)
def test_answers_of_no_llama_server_are_one_error(says: Any) -> None:
    with saying(says) as address, pytest.raises(ServerError) as caught:
        call(address, "/props", timeout_s=20.0)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


SILENT = {
    "nothing": b"",
    "half a head": b"HTTP/1.1 200",
    "no HTTP": b"hello\r\n\r\n",
    "a body cut short": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[]",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\n[]",
    "a head without end": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 1000,
    "silent": lambda connection: connection.recv(1),
    "drips": drips,
    "drips in the body": drips_in_the_body,
    "interim answers": interim_for_ever,
}


@pytest.mark.parametrize("says", SILENT.values(), ids=SILENT)
def test_a_server_without_a_whole_answer_counts_as_down_in_bounded_time(says: Any) -> None:
    with saying(says) as address, pytest.raises(ServerDownError, match="does not answer"):
        call(address, "/props", timeout_s=0.5)


def test_keys_that_no_header_holds_are_refused() -> None:
    with saying(HEAD + b"{}") as address:
        assert call(address, "/props", api_key="é") == {}
        for key in ("a\nb", "€"):
            with pytest.raises(ConfigError, match="--api-key"):
                call(address, "/props", api_key=key)


@pytest.mark.parametrize("slots", [0, -1, 10**12, 1.5, True, "4", None, [4]])
def test_a_number_of_slots_that_cannot_be_is_refused(slots: Any) -> None:
    with saying(HEAD + json.dumps({"total_slots": slots}).encode()) as address:
        engine = LlamaServer(address, ServerProcess(address), (1.0,), lambda path: None)
        with pytest.raises(ServerError, match="number of slots"):
            engine._slots()


def test_numbers_beyond_all_are_refused() -> None:
    for answer in ([{"id": float("inf"), "path": "a", "scale": 1}], [1], 3, [{"id": 1, "path": "a", "scale": [1]}]):
        with pytest.raises(ServerError, match="is it a llama-server"):
            loaded_loras(answer)
    with pytest.raises(ServerError, match="without timings"):
        reuses_prompts(lambda *_: {"tokens_evaluated": float("inf"), "timings": {"prompt_n": 1}}, 1)


def test_paths_that_a_server_makes_up_are_of_no_point(repo_root: Path) -> None:
    points = FamilyPoints(str(repo_root / "examples" / "tiny_moe" / "family" / "trained"))
    for path in ("x" * 100_000, "a\0b", "/dev/zero", "../" * 2000, ""):
        assert points.strength_of(path, Path("/")) is None


def watched(repo_root: Path, address: Address, **options: Any) -> Watch:
    family = str(repo_root / "examples" / "tiny_moe" / "family" / "trained")
    return Watch(str(address), family, profile_of(None), WatchOptions(**options))


def test_a_port_that_is_taken_is_said_before_the_server_is_touched(repo_root: Path) -> None:
    pytest.importorskip("aiohttp", reason="the proxy (extra: serve)")
    asked: list[int] = []
    with saying(lambda connection: asked.append(1)) as address, socket.create_server(("127.0.0.1", 0)) as taken:
        watch = watched(repo_root, address, proxy=taken.getsockname()[:2])
        with pytest.raises(ConfigError, match=r"cannot listen on .*in use.*--proxy"):
            next(watch.events())
        assert not asked


def test_a_server_that_cannot_be_driven_leaves_no_proxy_behind(repo_root: Path) -> None:
    pytest.importorskip("aiohttp", reason="the proxy (extra: serve)")
    with saying(HEAD + b"[]") as address:
        watch = watched(repo_root, address, proxy=("127.0.0.1", 0))
        with pytest.raises(ServerError, match="lacks the LoRA"):
            next(watch.events())
    assert watch.proxy is not None and not any(one.name == "remoe-proxy" for one in threading.enumerate())
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", watch.proxy.port), 5)


def test_without_aiohttp_only_the_proxy_is_missing(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "aiohttp", None)
    monkeypatch.delitem(sys.modules, "remoe_adapt.engines.llamacpp.proxy", raising=False)
    with saying(HEAD + b"[]") as address:
        with pytest.raises(MissingDependencyError, match=r"remoe-adapt\[serve\]"):
            watched(repo_root, address, proxy=("127.0.0.1", 0))
        assert watched(repo_root, address).proxy is None
        assert watched(repo_root, address, proxy=("127.0.0.1", 0), dry_run=True).proxy is None


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--max-body", "1MiB"], "--max-body is for --proxy"),
        (["--proxy", "127.0.0.1:0", "--max-body", "big"], "not a size"),
        (["--proxy", "127.0.0.1:0", "--max-body", "0MiB"], "above 0"),
        (["--proxy", "nowhere"], "is not an address"),
    ],
)
def test_options_that_cannot_be_meant(repo_root: Path, options: list[str], words: str) -> None:
    family = str(repo_root / "examples" / "tiny_moe" / "family" / "trained")
    result = CliRunner().invoke(app, ["watch", "--server", "127.0.0.1:1", "--family", family, *options])
    assert result.exit_code != 0 and words in " ".join(result.output.split())


def test_the_longest_body_is_that_of_the_option(repo_root: Path) -> None:
    pytest.importorskip("aiohttp", reason="the proxy (extra: serve)")
    with saying(HEAD + b"[]") as address:
        proxy = watched(repo_root, address, proxy=("127.0.0.1", 0), max_body_bytes=1 << 30).proxy
    assert proxy is not None and proxy.bounds.body_bytes == proxy.bounds.held_bytes == 1 << 30
