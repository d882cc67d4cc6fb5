"""OpenAI's own client against both engines of `remoe serve`: what both do, alike; what one does not do, by name."""

from __future__ import annotations

import abc
import itertools
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
from waiting import until

openai = pytest.importorskip("openai", reason="a server for OpenAI's clients (extra: serve)")
for needed in ("fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="a server for OpenAI's clients (extra: serve)")
pytest.importorskip("xllamacpp", reason="llama.cpp's server (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")

import httpx  # noqa: E402 (after what the servers need)
from gguf_writer import small_model, write_gguf  # noqa: E402
from llama_answers import Answer  # noqa: E402
from preloaded import Asked, OwnLoop, control_of_server, running, served, stock_server  # noqa: E402
from served import Served, save_served, serving  # noqa: E402

from remoe_adapt.engines.llamacpp.serve import ServedGguf  # noqa: E402

PROMPT, TOKENS = "once upon a time", 12
CHAT: Any = [{"role": "user", "content": PROMPT}]
_GREEDY = {"temperature": 0, "logit_bias": {"257": -100}}


@dataclass
class Engine(abc.ABC):
    """client: OpenAI's; dial: URL where the dial is turned; max_tokens, greedy: of requests."""

    client: Any
    http: Any
    dial: str
    name: str
    logprobs: ClassVar[bool] = False

    def complete(self, **options: Any) -> Any:
        return self.client.completions.create(
            **{"model": self.name, "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **options}
        )

    def chat(self, **options: Any) -> Any:
        return self.client.chat.completions.create(
            **{"model": self.name, "messages": CHAT, "max_tokens": TOKENS, "temperature": 0, **options}
        )

    def turn(self, strength: float | None) -> None:
        body = {"pressure": None} if strength is None else {"strength": strength}
        assert self.http.post(f"{self.dial}/remoe/pressure", json=body).status_code == 200

    def running(self) -> int:
        return int(self.http.get(f"{self.dial}/remoe/status").json()["requests"]["running"])

    @abc.abstractmethod
    def untorn(self, strengths: list[float]) -> None:
        """Asks while the dial is turned, and checks each answer against our own loop."""


@dataclass
class OfTransformers(Engine):
    served: Served

    def untorn(self, strengths: list[float]) -> None:
        expected = {strength: self.served.own(strength, TOKENS, PROMPT) for strength in strengths}
        assert len(set(expected.values())) > 1
        seen: set[str] = set()
        for number in range(6):
            with self.turned(strengths):
                pin = {} if number % 2 else {"extra_body": {"remoe": {"strength": strengths[number // 2 % 3]}}}
                answer = self.complete(**pin)
            at = answer.usage.remoe["tokens_at"]
            assert sum(at.values()) == TOKENS == answer.usage.completion_tokens
            seen |= set(at)
            if pin:
                assert len(at) == 1
            if len(at) == 1:
                assert answer.choices[0].text == expected[float(next(iter(at)))]
        assert len(seen) > 1

    @contextmanager
    def turned(self, strengths: list[float]) -> Iterator[None]:
        with _turning(self, strengths):
            yield


@dataclass
class OfLlama(Engine):
    server: ServedGguf
    own: OwnLoop
    logprobs: ClassVar[bool] = True

    def untorn(self, strengths: list[float]) -> None:
        found: list[Asked] = []

        def client(slot: int) -> None:
            for number in range(6):
                prompt = [ord(letter) for letter in PROMPT] + [40 + slot, 50 + number]
                begin_s = time.monotonic()
                answer = self.complete(
                    prompt=prompt, logprobs=1, max_tokens=30,
                    extra_body={"id_slot": slot, "cache_prompt": False, "ignore_eos": True},
                )  # fmt: skip
                scored = list(answer.choices[0].logprobs.content)
                tokens = tuple(int(one["id"]) for one in scored)
                said = Answer(tokens, tuple((int(one["id"]), float(one["logprob"])) for one in scored))
                assert answer.usage.completion_tokens == len(tokens) == 30
                found.append(Asked(tuple(prompt), begin_s, time.monotonic(), slot, said))

        with _turning(self, strengths):
            threads = [threading.Thread(target=client, args=(slot,)) for slot in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert len(found) == 12
        events = control_of_server(self.server).events()
        logged = [self.own.of_its_log(one, events) for one in found]
        assert len({gain for gains in logged for _, gain in gains}) > 1


@contextmanager
def _turning(engine: Engine, strengths: list[float]) -> Iterator[None]:
    """The dial is turned from outside, over HTTP, for as long as the block takes."""
    over = threading.Event()

    def turn() -> None:
        for strength in itertools.cycle(strengths):
            engine.turn(strength)
            if over.wait(0.01):
                return

    thread = threading.Thread(target=turn)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture(scope="module", params=["transformers", "llama.cpp", "stock llama-server"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("engine")
    with httpx.Client(verify=False, timeout=60) as http:

        def client(url: str) -> Any:
            return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, http_client=http)

        if request.param == "transformers":
            with serving(save_served(folder / "tiny")) as found:
                yield OfTransformers(client(found.url), http, found.url, "tiny", found)
            return
        program = {} if request.param == "llama.cpp" else {"llama_server": stock_server()}
        if program == {"llama_server": None}:
            pytest.skip("$REMOE_LLAMA_SERVER names no llama-server with shared libraries")
        made = small_model("qwen3moe")
        made.lm_head.weight.data[127:] = 0  # text alone, and no end of it
        path = write_gguf(made, "qwen3moe", folder / "model.gguf")
        with served(path, gain=1.5, parallel=3, interval_s=0.01, **program) as server, running(server):
            assert server.page_url is not None
            yield OfLlama(client(server.url), http, server.page_url, "model.gguf", server, OwnLoop(path))


@pytest.fixture(autouse=True)
def _at_rest(engine: Engine) -> None:
    engine.turn(0.0)
    until(lambda: engine.http.get(f"{engine.dial}/remoe/status").json()["strength"] == 0.0)


def text_of(choice: Any) -> str:
    if hasattr(choice, "delta"):
        return choice.delta.content or ""
    return (choice.message.content if hasattr(choice, "message") else choice.text) or ""


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_a_stream_is_the_whole_answer_in_pieces(engine: Engine, kind: str) -> None:
    ask = getattr(engine, kind)
    whole = ask()
    assert text_of(whole.choices[0]) and whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == TOKENS
    chunks = list(ask(stream=True, stream_options={"include_usage": True}))
    said = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(map(text_of, said)) == text_of(whole.choices[0])
    assert [choice.finish_reason for choice in said if choice.finish_reason] == ["length"]
    (usage,) = [chunk.usage for chunk in chunks if chunk.usage is not None][-1:]
    assert usage.completion_tokens == TOKENS and usage.prompt_tokens == whole.usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_before_its_stop_text(engine: Engine, stream: bool) -> None:
    whole = text_of(engine.complete(max_tokens=30).choices[0])
    # The last one whose two characters have not been said before: they come in two tokens.
    at = max(at for at in range(1, 28) if whole.index(whole[at : at + 2]) == at)
    answer = engine.complete(max_tokens=30, stop=["never there", whole[at : at + 2]], stream=stream)
    choices = [choice for chunk in answer for choice in chunk.choices] if stream else answer.choices
    assert "".join(map(text_of, choices)) == whole[:at]
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["stop"]


@pytest.mark.parametrize("kind", ["complete", "chat"])
def test_several_choices_of_one_prompt(engine: Engine, kind: str) -> None:
    ask = getattr(engine, kind)
    one = ask()
    greedy = ask(n=3)
    assert [choice.index for choice in greedy.choices] == [0, 1, 2]
    assert {text_of(choice) for choice in greedy.choices} == {text_of(one.choices[0])}
    assert {choice.finish_reason for choice in greedy.choices} == {"length"}
    # llama.cpp counts the first choice alone.
    counted = (1 if engine.logprobs else 3) * TOKENS
    assert greedy.usage.completion_tokens == counted
    assert greedy.usage.total_tokens == greedy.usage.prompt_tokens + counted
    drawn = ask(n=3, temperature=1.5, seed=7)
    assert len({text_of(choice) for choice in drawn.choices}) == 3


def test_log_probabilities_are_given_or_refused_by_name(engine: Engine) -> None:
    if engine.logprobs:
        chat = engine.chat(logprobs=True, top_logprobs=2)
        assert len(chat.choices[0].logprobs.content) == TOKENS
        assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in chat.choices[0].logprobs.content)
        return
    for ask, options in ((engine.complete, {"logprobs": 1}), (engine.chat, {"logprobs": True})):
        with pytest.raises(openai.BadRequestError, match="logprobs is not offered by this server") as refused:
            ask(**options)
        assert refused.value.param == "logprobs" and refused.value.code == "unsupported_value"


def test_errors_are_those_that_the_client_knows(engine: Engine) -> None:
    with pytest.raises(openai.BadRequestError):
        engine.chat(messages="hello")
    with pytest.raises(openai.BadRequestError):
        engine.complete(prompt="x" * 5000)
    with pytest.raises(openai.NotFoundError):
        engine.client.post("/nothing", body={}, cast_to=object)
    with pytest.raises(openai.APIStatusError):
        engine.complete(max_tokens="many")
    assert engine.complete().choices[0].finish_reason == "length"


def test_a_client_that_goes_in_mid_stream_frees_the_engine(engine: Engine) -> None:
    expected = text_of(engine.complete().choices[0])
    for _ in range(3):
        stream = engine.complete(max_tokens=200, stream=True)
        next(iter(stream))
        stream.close()
    until(lambda: engine.running() == 0)
    assert text_of(engine.complete().choices[0]) == expected


def test_no_answer_is_torn_while_the_dial_is_turned_from_outside(engine: Engine) -> None:
    engine.untorn([0.0, 0.5, 1.0])
