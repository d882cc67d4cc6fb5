"""`remoe serve` on transformers, asked by OpenAI's own client: answers, strengths, errors, and clients that go."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from waiting import in_thread, until
from watched_decoding import Watch, run_all

openai = pytest.importorskip("openai", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("uvicorn", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("fastapi", reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("prometheus_client", reason="a server for OpenAI's clients (extra: serve)")

import httpx  # noqa: E402
import torch  # noqa: E402
from served import PROMPT, Served, save_served, serving, streamed  # noqa: E402

TOKENS = 6
CHAT = [{"role": "user", "content": PROMPT}]
CHAT_PROMPT = f"<user>{PROMPT}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_served(tmp_path_factory.mktemp("served") / "tiny")


@pytest.fixture(scope="module")
def served(folder: Path) -> Iterator[Served]:
    with serving(folder, max_waiting=2, max_body_bytes=20_000) as made:
        yield made


@pytest.fixture(autouse=True)
def _dial_at_rest(request: pytest.FixtureRequest) -> None:
    if "served" in request.fixturenames:
        request.getfixturevalue("served").model.controller.set_pressure(None)


def completion(served: Served, **options: Any) -> Any:
    given = {"model": "tiny", "prompt": PROMPT, "max_tokens": TOKENS, **options}
    return served.client.completions.create(**given)


def post(served: Served, body: Any, route: str = "/v1/completions", **options: Any) -> httpx.Response:
    return served.http.post(served.url + route, json=body, **options)


def error_of(answer: httpx.Response) -> dict[str, Any]:
    found = answer.json()["error"]
    assert set(found) == {"message", "type", "param", "code"} and found["message"]
    return dict(found)


# Answers


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_pinned_answer_is_our_own_loop_s_at_that_strength(served: Served, strength: float) -> None:
    expected = served.own(strength, TOKENS)
    raw = served.client.completions.with_raw_response.create(
        model="tiny", prompt=PROMPT, max_tokens=TOKENS, extra_body={"remoe": {"strength": strength}}
    )
    answer = raw.parse()
    assert answer.choices[0].text == expected and raw.headers["x-remoe-strength"] == f"{strength:g}"
    assert answer.usage.completion_tokens == TOKENS and answer.choices[0].finish_reason == "length"
    found = answer.usage.remoe
    assert found["strength"] == found["strength_min"] == found["strength_max"] == strength and found["pinned"]
    assert found["tokens_at"] == {f"{strength:g}": TOKENS}
    by_header = completion(served, extra_headers={"X-Remoe-Strength": str(strength)})
    assert by_header.choices[0].text == expected
    assert served.model.controller.strength == 0.0 and not served.model.controller.pinned


def test_strengths_matter_to_the_answers_of_these_tests(served: Served) -> None:
    assert len({served.own(strength, TOKENS) for strength in (0.0, 0.5, 1.0)}) == 3


def test_chats_and_responses_answer_alike_whole_and_streamed(served: Served) -> None:
    expected = served.own(0.5, TOKENS, CHAT_PROMPT)
    pin = {"extra_body": {"remoe": {"strength": 0.5}}}
    chat: Any = {"model": "tiny", "messages": CHAT, "max_completion_tokens": TOKENS, **pin}
    whole = served.client.chat.completions.create(**chat)
    assert whole.choices[0].message.content == expected and whole.usage.remoe["strength"] == 0.5
    text, remoe = streamed(served.client.chat.completions.create(**chat, stream=True))
    assert text == expected and remoe["tokens_at"] == {"0.5": TOKENS}
    asked: Any = {"model": "tiny", "input": PROMPT, "max_output_tokens": TOKENS, **pin}
    answer = served.client.responses.create(**asked)
    assert answer.output_text == expected and answer.usage.remoe["pinned"]
    last = list(served.client.responses.create(**asked, stream=True))[-1]
    assert last.type == "response.completed" and last.response.usage.remoe["strength"] == 0.5
    assert last.response.output_text == expected


def test_a_stream_says_its_strength_before_it_says_a_word_and_ends_as_clients_expect(served: Served) -> None:
    served.model.controller.set_strength(1.0)
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "stream": True, "stream_options": {"include_usage": True}}
    with served.http.stream("POST", served.url + "/v1/completions", json=body) as answer:
        assert answer.headers["x-remoe-strength"] == "1" and "text/event-stream" in answer.headers["content-type"]
        lines = [line for line in answer.iter_lines() if line]
    assert lines[-1] == "data: [DONE]" and json.loads(lines[-2][6:])["usage"]["remoe"]["strength"] == 1.0
    text, _ = streamed(completion(served, stream=True))
    assert text == served.own(1.0, TOKENS)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_its_stop_text(served: Served, stream: bool) -> None:
    whole = served.own(0.0, 20)
    # Of two characters in the midst: it comes in two tokens, so the first must have been held back.
    stop = whole[12:14]
    answer = completion(served, max_tokens=20, stop=["never there", stop], stream=stream)
    text = streamed(answer)[0] if stream else answer.choices[0].text
    assert text == whole[: whole.index(stop)]
    if not stream:
        assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens < 20


def test_seeds_repeat_a_sampled_answer_and_touch_nobody_else_s_numbers(served: Served) -> None:
    def sampled(seed: int) -> str:
        return str(completion(served, max_tokens=8, temperature=1.5, seed=seed).choices[0].text)

    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    assert sampled(1) == sampled(1) != sampled(2)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert completion(served, max_tokens=8, temperature=0).choices[0].text == served.own(0.0, 8)


def test_a_chat_template_of_the_model_s_own_form_is_parsed_and_another_one_is_left_alone(folder: Path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    begun = template + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    prompt = f"<|im_start|>user\n{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    with serving(folder, template=begun) as served:
        answer: Any = served.client.chat.completions.create(model="tiny", messages=CHAT, max_tokens=TOKENS)  # type: ignore[call-overload]
        assert answer.choices[0].message.content == served.own(0.0, TOKENS, prompt)


# Strengths


def test_two_clients_at_once_never_mix_strengths(served: Served, folder: Path) -> None:
    expected = {strength: served.own(strength, 8) for strength in (0.0, 0.5, 1.0)}

    def client(strength: float) -> None:
        for _ in range(2):
            text, remoe = streamed(
                completion(served, max_tokens=8, stream=True, extra_body={"remoe": {"strength": strength}})
            )
            assert text == expected[strength] and remoe["tokens_at"] == {f"{strength:g}": 8}

    run_all(*(lambda strength=strength: client(strength) for strength in expected))  # type: ignore[misc]


def test_nothing_is_torn_under_pressure_from_outside(folder: Path) -> None:
    with serving(folder) as served:
        dial = served.model.controller
        strengths = [0.0, 0.25, 0.5, 0.75, 1.0]
        watch = Watch(served.model, dial.family, strengths)
        over = False

        def turn() -> None:
            step = 0
            while not over:
                dial.set_pressure(strengths[step % 5])
                step += 1
                time.sleep(0.002)

        turning = in_thread(turn)
        moved = [completion(served, max_tokens=20).usage for _ in range(2)]
        pinned = completion(served, max_tokens=10, extra_body={"remoe": {"strength": 0.5}}).usage.remoe
        over = True
        turning.join()
        assert watch.check() <= set(strengths) and len(watch.forwards) == 50
        for usage in moved:
            stated = {float(strength): count for strength, count in usage.remoe["tokens_at"].items()}
            assert sum(stated.values()) == 20 and len(stated) > 1 and not usage.remoe["pinned"]
            assert usage.remoe["strength_min"] == min(stated) and usage.remoe["strength_max"] == max(stated)
        assert pinned["tokens_at"] == {"0.5": 10}
        # Every token was stated at the strength that its forward saw.
        seen = [forward[0] for forward in watch.forwards]
        for strength in strengths:
            counted = sum(usage.remoe["tokens_at"].get(f"{strength:g}", 0) for usage in moved)
            assert counted == seen[:40].count(strength), strength
        # What was asked for while the strength was pinned counts now.
        dial.set_pressure(0.75)
        assert completion(served, max_tokens=2).usage.remoe["strength"] == 0.75


def test_pressure_is_set_over_http_and_handed_back(served: Served) -> None:
    answer = post(served, {"pressure": 0.7}, "/remoe/pressure").json()
    assert answer["strength"] == 0.7 and answer["pressure"] == 0.7 and answer["pinned"]
    assert completion(served).usage.remoe["strength"] == 0.7
    assert post(served, {"strength": 0.25}, "/remoe/pressure").json()["strength"] == 0.25
    assert not post(served, {"pressure": None}, "/remoe/pressure").json()["pinned"]
    for wrong in ({"pressure": 2}, {"strength": None}, {}, {"pressure": 0.5, "strength": 1}, {"gain": 1}, []):
        assert post(served, wrong, "/remoe/pressure").status_code == 400
    assert served.model.controller.strength == 0.0


# Errors


@pytest.mark.parametrize(
    ("wrong", "words", "param"),
    [
        ({"n": 9}, "n must be a whole number from 1 to 8", "n"),
        ({"n": 2, "stream": True}, "n is not offered in a stream: only 1", "n"),
        ({"logprobs": 3}, "logprobs is not offered", "logprobs"),
        ({"presence_penalty": 1}, "presence_penalty is not offered", "presence_penalty"),
        ({"max_tokens": 0}, "max_tokens must be a whole number from 1", "max_tokens"),
        ({"temperature": 3}, "temperature must be a number from 0 to 2", "temperature"),
        ({"temperature": True}, "temperature must be a number", "temperature"),
        ({"top_p": 0}, "top_p must be above 0", "top_p"),
        ({"stop": ["a"] * 5}, "up to 4", "stop"),
        ({"stop": [""]}, "each of 1 to 200 characters", "stop"),
        ({"prompt": ""}, "a text that is not empty", "prompt"),
        ({"prompt": [1, 2]}, "a text that is not empty", "prompt"),
        ({"stream": "yes"}, "true or false", "stream"),
        ({"remoe": {"strength": 1.5}}, "strength 1.5 is out of range", "remoe.strength"),
        ({"remoe": {"strength": "high"}}, "strength 'high' is out of range", "remoe.strength"),
        ({"remoe": {"strengh": 1}}, "remoe must be an object as", "remoe"),
        ({"remoe": 1}, "remoe must be an object as", "remoe"),
        ({"generation_config": "{}"}, "generation_config is not offered", "generation_config"),
        ({"no_such_field": 1}, "no_such_field", None),
        ({"prompt": "x" * 2000}, "the prompt has 2000 tokens, the model 1024 positions", None),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_had_is_refused_by_name(served: Served, wrong: Any, words: str, param: str | None) -> None:
    before = served.requests().refused
    for stream in ({}, {"stream": True}) if "stream" not in wrong else ({},):
        answer = post(served, {"prompt": PROMPT, **stream, **wrong})
        found = error_of(answer)
        assert answer.status_code == 400 and words in found["message"] and found["param"] == param
        assert found["type"] == "invalid_request_error"
    assert served.requests().refused > before and served.requests().failed == 0


def test_a_body_that_is_no_request_is_refused(served: Served) -> None:
    def sent(content: bytes, kind: str = "application/json", **headers: str) -> int:
        return served.http.post(
            served.url + "/v1/completions", content=content, headers={"content-type": kind, **headers}
        ).status_code

    assert sent(b"{") == sent(b"[]") == sent(b'{"a": NaN}') == sent(b"[" * 5000) == sent(b'{"n": 1, "n": 2}') == 400
    assert sent(b'{"prompt": "a"}', "text/plain") == 415
    assert sent(b'{"prompt": "' + b"a" * 20_000 + b'"}') == 413
    assert sent(b'{"prompt": "a", "max_tokens": 1}', **{"x-remoe-strength": "nan"}) == 400
    assert sent(b'{"prompt": "a", "remoe": {"strength": 1}}', **{"x-remoe-strength": "0"}) == 400
    chunks = iter([b'{"prompt": "', *[b"a" * 5000] * 5])
    answer = served.http.post(
        served.url + "/v1/completions", content=chunks, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413


@pytest.mark.parametrize(
    "messages",
    [
        [], "hello", [{"content": "a"}], [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
        [{"role": "user", "content": 5}], ["a"], [{"role": "user", "content": "a", "tool_calls": [{"no": 1}]}],
    ],
)  # fmt: skip
def test_chats_that_are_none_are_refused(served: Served, messages: Any) -> None:
    answer = post(served, {"messages": messages}, "/v1/chat/completions")
    assert answer.status_code == 400 and error_of(answer)["type"] == "invalid_request_error"


def test_another_model_and_another_route_are_not_here(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match="this server has the model 'tiny', not 'gpt-4'"):
        completion(served, model="gpt-4")
    assert [model.id for model in served.client.models.list()] == ["tiny"]
    assert served.client.models.retrieve("tiny").object == "model"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("someone/else")
    assert error_of(served.http.get(served.url + "/v1/nothing"))["type"] == "not_found_error"
    assert served.http.get(served.url + "/v1/completions").status_code == 405
    for gone in ("/load_model", "/reset", "/docs", "/openapi.json"):  # of transformers' own app
        assert post(served, {"model": "tiny"}, gone).status_code == 404


def test_without_a_chat_template_completions_still_work_and_a_key_guards_all_but_two(folder: Path) -> None:
    with serving(folder, template=None, api_key="secret", aliases=("other",)) as served:
        with pytest.raises(openai.BadRequestError, match="has no chat template: use /v1/completions"):
            served.client.chat.completions.create(model="tiny", messages=CHAT)  # type: ignore[arg-type]
        assert completion(served, model="other", max_tokens=1).choices[0].finish_reason == "length"
        for route in ("/remoe/status", "/metrics", "/v1/models", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
                answer = served.http.get(served.url + route, headers=headers)
                assert answer.status_code == 401 and error_of(answer)["code"] == "invalid_api_key"
        assert post(served, {"prompt": "a"}).status_code == 401
        assert post(served, {"pressure": 1}, "/remoe/pressure").status_code == 401
        assert served.model.controller.strength == 0.0
        assert served.http.get(served.url + "/health").json() == {"status": "ok"}
        assert served.http.get(served.url + "/").status_code == 200
        key = {"Authorization": "Bearer secret"}
        assert served.http.get(served.url + "/remoe/status", headers=key).json()["state"] == "ready"
        # Whoever has the key may call the server what they like.
        assert served.http.get(served.url + "/v1/models", headers={**key, "Host": "my.name"}).status_code == 200


def test_pages_of_web_sites_cannot_reach_it_by_a_name_of_their_own(served: Served) -> None:
    for host, status in (("evil.example", 403), ("localhost:1", 200), ("[::1]:8000", 200), ("127.0.0.1", 200)):
        assert served.http.get(served.url + "/remoe/status", headers={"Host": host}).status_code == status, host


def test_a_model_that_fails_says_so_and_the_next_answer_is_whole(served: Served) -> None:
    module = next(layer for layer in served.model.modules() if type(layer).__name__.endswith("DecoderLayer"))
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls in (1, 4):
            raise RuntimeError('a "broken"\nlayer')

    hook = module.register_forward_pre_hook(fail)
    try:
        with pytest.raises(openai.InternalServerError, match='RuntimeError: a "broken"'):  # before its first token
            completion(served, stream=True)
        with pytest.raises(openai.APIError, match='RuntimeError: a "broken"'):  # in mid-stream
            list(completion(served, stream=True))
    finally:
        hook.remove()
    assert completion(served).choices[0].text == served.own(0.0, TOKENS)
    assert served.requests().failed == 2


def test_several_choices_share_one_turn_and_its_end(served: Served) -> None:
    answer = completion(served, n=3, extra_body={"remoe": {"strength": 0.5}})
    assert {choice.text for choice in answer.choices} == {served.own(0.5, TOKENS)}
    assert answer.usage.remoe["tokens_at"] == {"0.5": 3 * TOKENS} and served.events[-1]["tokens"] == 3 * TOKENS
    drawn = [completion(served, n=2, temperature=1.5, seed=3).choices for _ in range(2)]
    assert drawn[0] == drawn[1] and drawn[0][0].text != drawn[0][1].text
    assert drawn[0][0].text == completion(served, temperature=1.5, seed=3).choices[0].text
    chat: Any = {"model": "tiny", "messages": CHAT, "max_tokens": TOKENS, "n": 2, "temperature": 0}
    assert [one.index for one in served.client.chat.completions.create(**chat).choices] == [0, 1]
    assert error_of(post(served, {"input": PROMPT, "n": 2}, "/v1/responses"))["param"] == "n"
    # One that fails in the midst of the second, and one whose client goes there, leave the model to the next.
    module = next(layer for layer in served.model.modules() if type(layer).__name__.endswith("DecoderLayer"))
    calls = 0

    def fail(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == TOKENS + 2:
            raise RuntimeError("broken")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(openai.InternalServerError, match="broken"):
        completion(served, n=3)
    hook.remove()
    left = served.requests().left
    before = served.app.status().tokens
    connection = raw(served, {"prompt": PROMPT, "max_tokens": 200, "n": 8})
    until(lambda: served.app.status().tokens > before + 210)
    connection.close()
    until(lambda: served.requests().left == left + 1 and served.requests().running == 0)
    assert completion(served).choices[0].text == served.own(0.0, TOKENS)


# Clients that go, and those that wait


def test_a_client_that_goes_in_mid_stream_frees_the_model(served: Served) -> None:
    left = served.requests().left
    stream = completion(served, max_tokens=900, stream=True, extra_body={"remoe": {"strength": 1.0}})
    next(iter(stream))
    stream.close()
    until(lambda: served.requests().left == left + 1)
    until(lambda: served.requests().running == 0)
    assert served.events[-1]["how"] == "left" and served.events[-1]["tokens"] < 900
    assert served.model.controller.strength == 0.0  # its pin is gone with it
    assert completion(served).usage.remoe["strength"] == 0.0


def raw(served: Served, body: dict[str, Any]) -> socket.socket:
    """A request whose connection the test holds."""
    data = json.dumps(body).encode()
    connection = socket.create_connection(("127.0.0.1", served.server.port), timeout=60)
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return connection


def test_a_client_that_goes_while_it_waits_frees_its_place_and_a_line_that_is_full_is_refused(served: Served) -> None:
    left, answered = served.requests().left, served.requests().answered
    first = completion(served, max_tokens=30, stream=True)
    next(iter(first))
    waiting = [raw(served, {"prompt": PROMPT, "max_tokens": 3}) for _ in range(2)]
    until(lambda: served.requests().waiting == 2)
    with pytest.raises(openai.InternalServerError, match="2 requests are waiting"):
        completion(served)
    waiting[0].close()
    until(lambda: served.requests().waiting == 1)
    assert served.requests().left == left + 1
    text, _ = streamed(first)
    assert text in served.own(0.0, 30)
    assert b" 200 OK" in waiting[1].recv(100)
    until(lambda: served.requests().answered == answered + 2)
    waiting[1].close()


def test_a_whole_answer_nobody_waits_for_is_computed_no_further(served: Served) -> None:
    left = served.requests().left
    connection = raw(served, {"prompt": PROMPT, "max_tokens": 900})
    until(lambda: served.app.status().tokens > 0 and served.requests().running == 1)
    connection.close()
    until(lambda: served.requests().left == left + 1)
    assert served.events[-1]["tokens"] < 900
    until(lambda: served.requests().running == 0)


def test_a_server_that_ends_finishes_its_answer_and_refuses_whoever_waits(folder: Path) -> None:
    with serving(folder) as served:
        stream = completion(served, max_tokens=30, stream=True)
        first = next(iter(stream)).choices[0].text
        waiting = raw(served, {"prompt": PROMPT, "max_tokens": 3})
        until(lambda: served.requests().waiting == 1)
        ending = in_thread(served.server.stop)
        # To its end: head and body may come in two pieces.
        answer = b"".join(iter(lambda: waiting.recv(1000), b""))
        assert answer.startswith(b"HTTP/1.1 503") and b"server_ending" in answer
        text, remoe = streamed(stream)
        assert first + text == served.own(0.0, 30) and remoe["tokens_at"] == {"0": 30}
        waiting.close()
        ending.join(60)
        assert not ending.is_alive()
        with pytest.raises(openai.APIConnectionError):
            completion(served)


def test_an_answer_that_takes_too_long_for_the_end_is_no_whole_one(folder: Path) -> None:
    with serving(folder, drain_s=0.0) as served:
        stream = completion(served, max_tokens=900, stream=True)
        next(iter(stream))
        ending = in_thread(served.server.stop)
        with pytest.raises(openai.APIError, match="ended before the answer was done"):
            list(stream)
        ending.join(60)
        assert not ending.is_alive() and served.requests().failed == 1


# What it shows


def test_the_status_the_metrics_and_the_page(served: Served) -> None:
    before = served.http.get(served.url + "/remoe/status").json()
    answer = completion(served, extra_body={"remoe": {"strength": 0.5}})
    found = served.http.get(served.url + "/remoe/status").json()
    assert (found["engine"], found["model"], found["state"]) == ("transformers", "tiny", "ready")
    assert found["tokens"] == before["tokens"] + TOKENS and found["points"] == [0.5, 1.0] and found["strength"] == 0.0
    assert found["last"]["id"] == answer.id and found["last"]["tokens_at"] == {"0.5": TOKENS}
    assert found["memory"]["process_bytes"] > 1 << 20 and found["requests"]["running"] == 0
    assert found["detail"]["engine"] == "transformers" and "dial of" in found["acts"][0]
    text = served.http.get(served.url + "/metrics").text
    assert f"remoe_tokens_total {found['tokens']}" in text and "remoe_strength 0.0" in text
    assert f'remoe_requests_total{{how="answered"}} {found["requests"]["answered"]}' in text
    page = served.http.get(served.url + "/")
    assert page.headers["content-type"] == "text/html; charset=utf-8" and "data-key" in page.text
    assert "default-src 'none'" in page.headers["content-security-policy"]


def test_every_request_is_told_of_in_one_line(served: Served) -> None:
    served.events.clear()
    completion(served, extra_headers={"X-Request-Id": "mine"})
    post(served, {"prompt": 5})
    done, refused = served.events
    assert done["id"] == "mine" and done["how"] == "answered" and done["tokens"] == TOKENS and done["seconds"] > 0
    assert refused["how"] == "refused" and refused["status"] == 400 and "prompt" in refused["error"]
    json.dumps(served.events)
