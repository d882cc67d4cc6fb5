"""`remoe serve` as it is typed: one line with the address, one for each request, an end at a signal."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cli_support import call, refused
from waiting import in_thread, until

for needed in ("openai", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="a server for OpenAI's clients (extra: serve)")

import httpx  # noqa: E402
from served import PROMPT, TEMPLATE, save_served  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = save_served(tmp_path_factory.mktemp("served") / "tiny")
    (place / "chat.jinja").write_text(TEMPLATE)
    return place


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def answers(url: str) -> dict[str, Any]:
    """Asks a server for its status, then for a chat and a completion."""
    until(lambda: _ready(url))
    chat = httpx.post(
        f"{url}/v1/chat/completions", json={"messages": [{"role": "user", "content": PROMPT}], "max_tokens": 2},
        timeout=60,
    ).json()  # fmt: skip
    pinned = {"prompt": PROMPT, "max_tokens": 3, "remoe": {"strength": 1}}
    completion = httpx.post(f"{url}/v1/completions", json=pinned, timeout=60).json()
    return {"status": httpx.get(f"{url}/remoe/status").json(), "chat": chat, "completion": completion}


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def test_it_serves_until_a_signal_and_tells_of_every_request(folder: Path) -> None:
    port, found = free_port(), {}

    def client() -> None:
        try:
            found.update(answers(f"http://127.0.0.1:{port}"))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    asking = in_thread(client)
    result = call(
        "serve", folder, "--family", folder / "family", "--port", port, "--expert-cache", "0.5", "--strength", "0.5",
        "--recency", "ema", "--recency-gain", "0.1", "--chat-template", folder / "chat.jinja", "--json",
    )  # fmt: skip
    asking.join(60)
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["event"] for line in lines] == ["serving", "request", "request", "end"]
    assert lines[0]["url"] == f"http://127.0.0.1:{port}" and lines[0]["model"] == "tiny"
    assert [what.split()[0] for what in lines[0]["acts"]] == ["dial", "recency", "expert"]
    assert lines[1]["strength"] == 0.5 and lines[2]["strength"] == 1.0 and lines[2]["hit_rate"] is not None
    assert lines[3]["requests"]["answered"] == 2 and lines[3]["tokens"] == 5
    assert found["chat"]["usage"]["remoe"]["tokens_at"] == {"0.5": 2}
    assert found["completion"]["usage"]["remoe"]["strength"] == 1.0
    assert found["status"]["recency"] == "ema" and found["status"]["memory"]["cache_budget_bytes"] > 0
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_what_cannot_be_served_is_refused_before_anything_is_loaded(folder: Path, tmp_path: Path) -> None:
    assert "no request would be taken" in refused("serve", folder, "--max-body", "0B", status=2)
    assert "exclude each other" in refused("serve", folder, "--pressure", "1", "--strength", "1", status=2)
    assert "cannot be read" in refused("serve", folder, "--chat-template", tmp_path / "none", status=2)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert "cannot be read" in refused("serve", folder, "--chat-template", tmp_path / "binary", status=2)
    assert "no tokenizer at" in refused("serve", tmp_path, status=2)


def test_a_port_that_is_taken_is_named(folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = refused("serve", folder, "--family", folder / "family", "--port", port, status=2)
    assert f"cannot listen on 127.0.0.1:{port}" in words and "give another --host or --port" in words


@pytest.mark.slow
def test_the_shipped_model_in_a_process_of_its_own(repo_root: Path, tmp_path: Path) -> None:
    shipped, port = repo_root / "examples" / "tiny_moe", free_port()
    (tmp_path / "chat.jinja").write_text(TEMPLATE)
    command = [
        sys.executable, "-m", "remoe_adapt", "serve", shipped, "--family", shipped / "family", "--port", str(port),
        "--expert-cache", "0.5", "--chat-template", tmp_path / "chat.jinja",
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        found = answers(f"http://127.0.0.1:{port}")
        body = {"prompt": PROMPT, "max_tokens": 40, "stream": True}
        with httpx.stream("POST", f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            next(lines)
            process.send_signal(signal.SIGINT)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        said, _ = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and found["completion"]["usage"]["remoe"]["strength"] == 1.0
    assert said.splitlines()[0].startswith(f"tiny_moe at http://127.0.0.1:{port} (page at /")
    assert "40 tokens at strength 0" in said and said.splitlines()[-1] == "end: 3 requests answered, 45 tokens"
