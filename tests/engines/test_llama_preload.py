"""The recency prior preloaded into the wheel's server: answers are those of our own loop at the gains its log names."""

from __future__ import annotations

import http.client
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import small_model, write_gguf
from llama_answers import SAME
from llama_child import LlamaChild
from preloaded import TOKENS, Asked, OwnLoop, asked, command, control_of_server, prompts, served, turn_and_ask
from waiting import until

from remoe_adapt.engines.llamacpp.prior.control import GainEvent
from remoe_adapt.engines.llamacpp.serve import ServedGguf
from remoe_adapt.recency_settings import Recency

GAINS = (0.3, 0.6, 1.5)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(small_model("qwen3moe"), "qwen3moe", tmp_path_factory.mktemp("preload") / "model.gguf")


@pytest.fixture(scope="module")
def own(model: Path) -> OwnLoop:
    return OwnLoop(model)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedGguf]:
    with served(model, parallel=3) as found:
        yield found


def checked(one: Asked, server: ServedGguf, own: OwnLoop) -> list[tuple[int, float]]:
    """The gains that the log names for the answer, which is that of our own loop at them."""
    return own.of_its_log(one, control_of_server(server).events())


def test_gain_0_is_the_server_without_us_and_other_gains_are_our_own_loop(
    model: Path, server: ServedGguf, own: OwnLoop
) -> None:
    prompt = prompts(1)[0]
    with LlamaChild(model, n_parallel=3) as stock:
        base = asked(stock.port, prompt)
    found = asked(server.port, prompt)
    assert found.answer == base.answer and checked(found, server, own) == [(0, 0.0)]
    answers = set()
    for gain in GAINS:
        command(server, gain)
        one = asked(server.port, prompt)
        assert checked(one, server, own) == [(0, pytest.approx(gain))]
        answers.add(one.answer.tokens)
    status = control_of_server(server).status()
    assert (status.state, status.reason, status.layers, status.mode) == ("on", "", 3, "ema")
    assert len(answers) > 1 and status.counters["swapped"] > 0 and status.counters["refused_rows"] == 0
    command(server, 0.0)
    assert asked(server.port, prompt).answer == base.answer


@pytest.mark.parametrize("unified", [True, False])
def test_slots_side_by_side_while_the_gain_is_turned(
    model: Path, server: ServedGguf, own: OwnLoop, unified: bool
) -> None:
    with served(model, parallel=3, engine={"kv_unified": True}) if unified else nullcontext(server) as found:
        turned = turn_and_ask(found, 9, 3)
        logged = [checked(one, found, own) for one in turned]
        assert control_of_server(found).status().counters["lost_rows"] == 0
        # The gain was turned in the midst of some answers, and no token is of two gains.
        assert any(len(gains) > 1 for gains in logged) and len({gain for gains in logged for _, gain in gains}) > 2


def test_a_reused_prompt_goes_on_from_its_prefix(server: ServedGguf, own: OwnLoop) -> None:
    command(server, 1.5)
    first, second = prompts(2, seed=8)
    before = control_of_server(server).status().counters
    asked(server.port, first, id_slot=1, cache_prompt=True)
    mixed = [*first[:12], *second]
    one = asked(server.port, mixed, id_slot=1, cache_prompt=True)
    assert one.texts(control_of_server(server).events()) == [[(12, 1.5)]]
    assert own.gap(one, [(0, 1.5)]) < SAME < own.gap(one, [(0, 0.6)])
    after = control_of_server(server).status().counters
    assert after["rewinds"] > before["rewinds"] and after["restarts"] == before["restarts"]


def test_another_mode_is_commanded_while_it_runs(model: Path, server: ServedGguf) -> None:
    """Mode cost, whose share is a part of the command."""
    answers = []
    for share in (0.25, 0.6):
        own = OwnLoop(model, Recency.of("cost", 0.0, share=share))
        control_of_server(server).command(Recency.of("cost", 0.3, share=share))
        one = asked(server.port, prompts(1, seed=9)[0], n_predict=3 * TOKENS)
        assert checked(one, server, own) == [(0, pytest.approx(0.3))]
        answers.append(one.answer.tokens)
    status = control_of_server(server).status()
    assert answers[0] != answers[1]
    assert (status.state, status.mode, status.gain) == ("on", "cost", pytest.approx(0.3))
    command(server, 0.0)


def test_a_server_that_was_killed_comes_back_at_its_gain(model: Path, server: ServedGguf, own: OwnLoop) -> None:
    command(server, 0.6)
    pid, prompt = server.pid, prompts(1)[0]
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    events: list[dict[str, Any]] = []
    until(lambda: bool(events.extend(server._server.events()) or (events and events[-1]["event"] == "started")))
    assert "SIGKILL" in events[0]["reason"] and events[-1]["pid"] == server.pid != pid
    one = asked(server.port, prompt)
    assert checked(one, server, own) == [(0, pytest.approx(0.6))]


@pytest.mark.slow
def test_a_thousand_requests_while_the_gain_is_turned_and_the_server_killed_twice(model: Path, own: OwnLoop) -> None:
    """Every answer is that of our own loop at the gains that its log names."""
    count, texts, numbers, over = 1000, prompts(8), itertools.count(), threading.Event()
    found: list[Asked] = []
    failed: list[tuple[float, float, str]] = []
    events: list[GainEvent] = []
    news: list[dict[str, Any]] = []
    kills: list[float] = []
    turns = 0
    with served(model, parallel=4) as server:
        control = control_of_server(server)

        def client() -> None:
            while (number := next(numbers)) < count:
                while True:
                    begin_s = time.monotonic()
                    try:
                        found.append(asked(server.port, texts[number % len(texts)]))
                        break
                    except (OSError, http.client.HTTPException, RuntimeError) as error:
                        failed.append((begin_s, time.monotonic(), repr(error)))
                        time.sleep(0.05)

        def turner() -> None:
            nonlocal turns
            draw = random.Random(1)
            while not over.wait(0.02):
                command(server, draw.choice([0.0, *GAINS]))
                turns += 1
                events.extend(control.events(events[-1].number if events else 0))
                news.extend(server._server.events())

        threads = [threading.Thread(target=client) for _ in range(4)]
        turning = threading.Thread(target=turner)
        for thread in (turning, *threads):
            thread.start()
        for kill in (1, 2):
            until(lambda kill=kill: len(found) >= kill * count // 3, 300)  # type: ignore[misc]
            assert server.pid is not None
            kills.append(time.monotonic())
            os.kill(server.pid, signal.SIGKILL)
        for thread in threads:
            thread.join()
        over.set()
        turning.join()
        events.extend(control.events(events[-1].number))
        starts, status = server._server.starts, control.status()
    gains = [own.of_its_log(one, events) for one in found]
    # What was under way dies with the server, and until it is back nobody listens.
    excused = [any(kill <= end_s and begin_s <= kill + 10 for kill in kills) for begin_s, end_s, _ in failed]
    print(len(found), turns, len(failed), sum(len(g) > 1 for g in gains), status.counters)  # noqa: T201
    assert len(found) == count and turns >= 200 and starts == 3 and all(excused)
    assert sum(len(named) > 1 for named in gains) > 50
    assert sum(one["event"] == "died" for one in news) == 2 and status.counters["lost_rows"] == 0
