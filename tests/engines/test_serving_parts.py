"""Parts of `remoe serve` by themselves: stop texts in pieces, events on their way, the line for the model."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
from typing import Any

import pytest

pytest.importorskip("starlette", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("fastapi", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("uvicorn", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("openai", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("prometheus_client", reason="a server for OpenAI's clients (extra: serve)")

from remoe_adapt.cli.serve import model_name
from remoe_adapt.engines.page import is_loopback
from remoe_adapt.engines.serving.answers import Events, StopCutter, finished
from remoe_adapt.engines.serving.app import AppOptions, ServingApp
from remoe_adapt.engines.serving.errors import RequestError, of_exception
from remoe_adapt.engines.serving.line import Line
from remoe_adapt.errors import ConfigError


def test_a_text_is_cut_alike_in_whatever_pieces_it_comes() -> None:
    drawn = random.Random(0)
    for _ in range(500):
        text = "".join(drawn.choices("ab\n", k=12))
        stops = ["".join(drawn.choices("ab\n", k=drawn.randint(1, 4))) for _ in range(drawn.randint(0, 3))]
        found = [at for at in map(text.find, stops) if at >= 0]
        cuts = sorted(drawn.sample(range(13), drawn.randint(0, 5)))
        pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, 12])]
        cutter, shown = StopCutter(stops), ""
        for piece in pieces:
            shown += cutter.feed(piece)
            assert not any(stop in shown for stop in stops)
        shown += cutter.rest()
        # Where two stops overlap, the one that is complete first ends the text, be it seen a piece earlier.
        assert cutter.cut == bool(found)
        if not found:
            assert shown == text
        else:
            assert text.startswith(shown) and len(shown) >= min(found) - max(map(len, stops))
            assert shown == text[: len(shown)] and not any(stop in shown for stop in stops)


def test_nothing_is_held_back_longer_than_it_could_be_a_stop() -> None:
    cutter = StopCutter(["END"])
    assert [cutter.feed(piece) for piece in ("abcE", "N", "x", "E", "ND", "more")] == ["abc", "", "ENx", "", "", ""]
    assert cutter.cut and cutter.rest() == ""
    assert StopCutter([]).feed("all of it") == "all of it"


def test_whole_answers_get_their_strength_and_lose_their_stop() -> None:
    body: dict[str, Any] = {
        "choices": [{"text": "one STOP two", "finish_reason": "length"}],
        "usage": {"total_tokens": 3},
    }
    assert finished(body, {"strength": 0.5}, ["STOP"])["choices"] == [{"text": "one ", "finish_reason": "stop"}]
    assert body["usage"] == {"total_tokens": 3, "remoe": {"strength": 0.5}}
    tool_call = {"choices": [{"message": {"content": None}, "finish_reason": "tool_calls"}]}
    assert finished(tool_call, {}, ["x"])["choices"][0]["finish_reason"] == "tool_calls"


def test_an_event_that_breaks_a_stream_is_json_whatever_its_message_holds() -> None:
    events = Events(dict, lambda: RequestError('a "b"\n\nc', 500).to_json(), (), done=True)
    told = events.passed_on('data: {"error": "a "b" c"}\n\n')
    assert json.loads(told.removeprefix("data: "))["error"]["message"].startswith('a "b"') and told.endswith("\n\n")
    assert events.end() == ""  # an answer that broke off is not done


def test_errors_of_a_request_and_of_the_model_are_told_apart() -> None:
    assert of_exception(KeyError("role"), begun=False).status == 400
    assert of_exception(KeyError("role"), begun=True).status == 500
    assert of_exception(MemoryError(), begun=False).status == 500
    assert "\x1b" not in json.dumps(of_exception(ValueError("\x1b[2J"), begun=False).to_json(), ensure_ascii=False)


def test_a_line_keeps_its_order_and_gives_up_places() -> None:
    async def stand() -> list[int]:
        line, order = Line(3), []
        forever = [asyncio.get_running_loop().create_future() for _ in range(5)]

        async def come(number: int) -> None:
            await line.join(forever[number])
            order.append(number)

        await come(0)
        waiting = [asyncio.create_task(come(number)) for number in (1, 2, 3)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="3 requests are waiting") as full:
            await come(4)
        assert full.value.status == 503 and (line.running, line.waiting) == (1, 3)
        forever[2].set_result(None)  # its client goes
        with pytest.raises(ConnectionError):
            await waiting[1]
        line.leave()
        await waiting[0]
        waiting[2].cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting[2]
        line.leave()
        assert (line.running, line.waiting) == (0, 0)
        await come(4)
        last = asyncio.create_task(come(3))
        await asyncio.sleep(0)
        line.close()
        with pytest.raises(RequestError, match="ending"):
            await last
        return order

    assert asyncio.run(stand()) == [0, 1, 4]


def test_a_place_that_comes_as_its_waiter_is_cancelled_goes_to_the_next_one() -> None:
    async def stand() -> int:
        line = Line(3)
        forever = asyncio.get_running_loop().create_future()
        await line.join(forever)
        waiting = asyncio.create_task(line.join(forever))
        await asyncio.sleep(0)
        line.leave()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return line.running

    assert asyncio.run(stand()) == 0


def test_names_and_addresses(tmp_path: Any) -> None:
    assert model_name("org/model") == "org/model" and model_name(str(tmp_path)) == tmp_path.name
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "", "example.org")] == [
        True, True, True, False, False, False,
    ]  # fmt: skip


def test_an_empty_key_is_no_key() -> None:
    with pytest.raises(ConfigError, match="the API key is empty"):
        ServingApp(None, None, "m", AppOptions(api_key=""))
