"""The page, the status and the metrics beside a served GGUF, asked by a real client; and the dial turned from there."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import small_model, write_gguf
from http_support import Answer, asked_http
from llama_answers import SAME
from preloaded import OwnLoop, asked, prompts, running, served
from waiting import until

from remoe_adapt.cli.serve_gguf import page_at
from remoe_adapt.engines.llamacpp.serve import ServedGguf
from remoe_adapt.engines.page import PAGE_HEADERS, page_html
from remoe_adapt.errors import ConfigError


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(small_model("qwen3moe"), "qwen3moe", tmp_path_factory.mktemp("page") / "model.gguf")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedGguf]:
    with served(model, gain=1.2, parallel=2, interval_s=0.02) as found, running(found):
        yield found


def get(server: ServedGguf, path: str, **headers: str) -> Answer:
    assert server.page_url is not None
    return asked_http(server.page_url, "GET", path, None, headers)


def post(server: ServedGguf, body: Any, path: str = "/remoe/pressure", **headers: str) -> Answer:
    assert server.page_url is not None
    kind = {"Content-Type": "application/json", **headers}
    return asked_http(server.page_url, "POST", path, json.dumps(body).encode(), kind)


def test_the_page_is_that_of_the_other_engine_on_a_port_next_to_the_server_s(server: ServedGguf) -> None:
    assert server.page_url is not None and server.page_url.startswith("http://127.0.0.1:")
    found = get(server, "/")
    assert found.status == 200 and found.body == page_html()
    assert {name: found.headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
    assert get(server, "/health").json() == {"status": "ok"}
    # Requests for tokens are the model's own server's.
    for path in ("/v1/models", "/v1/completions", "/completion"):
        assert get(server, path).status == 404
        assert post(server, {"prompt": "a"}, path).status == 404
    head = asked_http(server.page_url, "HEAD", "/remoe/status", None, {})
    assert head.status == 200 and head.body == b"" and int(head.headers["Content-Length"]) > 100


def test_the_status_and_the_metrics_move_with_the_server(server: ServedGguf) -> None:
    before = get(server, "/remoe/status").json()
    assert (before["engine"], before["model"], before["state"]) == ("llama.cpp", "model.gguf", "ready")
    assert before["acts"] == ["recency prior (ema)"] and before["recency"] == "ema"
    asked(server.port, prompts(1)[0])
    until(lambda: get(server, "/remoe/status").json()["tokens"] >= before["tokens"] + 16)
    after = get(server, "/remoe/status").json()
    assert after["tokens"] == before["tokens"] + 16 and after["tokens_per_s"] > 0
    assert after["requests"]["running"] == after["requests"]["waiting"] == 0
    # Nobody counts them, which is not the same as none.
    assert after["requests"]["answered"] is None
    assert 0 < after["hit_rate"] <= 1 and after["memory"]["cache_bytes"] > 0 and "expert cache" in after["acts"]
    assert after["memory"]["process_bytes"] > 1 << 20
    assert after["detail"]["prior"]["state"] == "on" and after["detail"]["prior"]["blind"] is None
    parser = pytest.importorskip("prometheus_client.parser", reason="reads metrics (extra: metrics)")
    answer = get(server, "/metrics")
    assert answer.headers["Content-Type"].startswith("text/plain")
    families = parser.text_string_to_metric_families(answer.body.decode())
    values = {sample.name: sample.value for family in families for sample in family.samples}
    assert values["remoe_tokens_total"] == after["tokens"] and values["remoe_up"] == 1
    assert values["remoe_strength"] == after["strength"] and values["remoe_requests_running"] == 0


def test_the_dial_is_held_and_handed_back_over_http(server: ServedGguf, model: Path) -> None:
    def gain() -> Any:
        return server.status()["prior"]["gain"]

    own, prompt = OwnLoop(model), prompts(1)[0]
    answer = post(server, {"strength": 0.5})
    assert answer.status == 200 and answer.json()["target"] == 0.5 and answer.json()["pinned"]
    until(lambda: get(server, "/remoe/status").json()["gain"] == pytest.approx(0.6))
    one = asked(server.port, prompt)
    assert gain() == pytest.approx(0.6) and own.gap(one, [(0, 0.6)]) < SAME < own.gap(one, [(0, 0.0)])
    assert post(server, {"pressure": 1.0}).json()["target"] == 1.0
    until(lambda: get(server, "/remoe/status").json()["strength"] == 1.0)
    shown = get(server, "/remoe/status").json()
    assert shown["pressure"] == 1.0 and shown["reason"] == "set by hand"
    assert not post(server, {"pressure": None}).json()["pinned"]
    until(lambda: "by hand" not in get(server, "/remoe/status").json()["reason"])
    for wrong in ({"pressure": 2}, {"strength": None}, {}, {"pressure": 0.5, "strength": 1}, {"gain": 1}, [], "a"):
        found = post(server, wrong)
        assert found.status == 400 and found.json()["error"]["type"] == "invalid_request_error", wrong
    assert post(server, {"strength": 1}, **{"Content-Type": "text/plain"}).status == 415
    assert post(server, {"strength": "1" * 5000}).status == 413


def test_pages_of_web_sites_cannot_reach_it_by_a_name_of_their_own(server: ServedGguf) -> None:
    hosts = (("evil.example", 403), ("localhost:1", 200), ("[::1]:8000", 200), ("127.0.0.1", 200), ("", 403))
    for host, status in hosts:
        assert get(server, "/remoe/status", Host=host).status == status, host
    assert post(server, {"strength": 1}, Host="evil.example").status == 403


def test_clients_that_say_nothing_or_nonsense_do_not_stop_it(server: ServedGguf) -> None:
    assert server.page_url is not None
    port = int(server.page_url.rpartition(":")[2])
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(20)]
    for data in (b"\r\n\r\n", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\xff" * 70000, b"POST /remoe/pressure"):
        with socket.create_connection(("127.0.0.1", port)) as one:
            one.sendall(data)
    assert get(server, "/health").status == 200
    for one in silent:
        one.close()


def test_a_key_guards_all_but_the_page_itself_and_a_dead_server_is_shown_as_down(model: Path) -> None:
    with served(model, api_key="secret", interval_s=0.02) as server, running(server) as events:
        key = {"Authorization": "Bearer secret"}
        for path in ("/remoe/status", "/metrics", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                found = get(server, path, **headers)
                assert found.status == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert post(server, {"strength": 1}).status == 401
        assert get(server, "/").status == get(server, "/health").status == 200
        # Whoever has the key may call the server what they like, and the server's own counters are asked with it.
        assert get(server, "/remoe/status", Host="my.name", **key).json()["requests"]["running"] == 0
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        until(lambda: get(server, "/remoe/status", **key).json()["state"] == "down")
        until(lambda: any(event["event"] == "started" for event in events))
        until(lambda: get(server, "/remoe/status", **key).json()["state"] == "ready")
    with pytest.raises(OSError):
        get(server, "/health")


def test_it_can_be_elsewhere_or_nowhere(model: Path) -> None:
    assert page_at(None) == ("127.0.0.1", None) and page_at("off") is None
    assert page_at("8001") == ("127.0.0.1", 8001) and page_at("0.0.0.0:81") == ("0.0.0.0", 81)
    assert page_at("[::1]:0") == ("::1", 0)
    for wrong in ("", "here", ":80", "70000", "1.2.3.4", "-1"):
        with pytest.raises(ConfigError, match="--page"):
            page_at(wrong)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with (
            pytest.raises(ConfigError, match="--page off"),
            served(model, page=("127.0.0.1", taken.getsockname()[1])),
        ):
            pass
    with served(model, page=None) as server:
        assert server.page_url is None and server.shown().state == "ready"
