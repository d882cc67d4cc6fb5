"""What we rely on in transformers' serving handlers, which `remoe serve` gives a loaded model; see `table`.

Without the extra `serve` they cannot be imported, and nothing relies on them.
"""

from __future__ import annotations

import asyncio
import json
from functools import cache
from typing import Any

from remoe_adapt.libraries.table import hold, relied_on
from remoe_adapt.libraries.tiny import IDS, tiny_model

_TOKENS = 3


def _usable() -> bool:
    from transformers.utils.import_utils import is_serve_available

    return bool(is_serve_available())


@cache
def _tokenizer() -> Any:
    """Of words w0 to w95, whose chats are their texts."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(96)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0")
    made.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    return made


class _Asked:
    """A model manager, a generation state and a model in one, as `engines/serving/turn.py` is, with no more to it."""

    force_model = None
    _compile = False

    def __init__(self) -> None:
        from transformers.cli.serving.utils import GenerateManager, Modality

        self._model, self._manager, self._text = tiny_model(), GenerateManager(), Modality.LLM
        self.generation_config, self.config = self._model.generation_config, self._model.config
        self.device = self._model.device
        self.given: list[dict[str, Any]] = []
        self.fails = False

    def process_model_name(self, _name: str) -> str:
        return "the model"

    def load_model_and_processor(self, *_names: Any, **_options: Any) -> tuple[Any, Any]:
        return self, _tokenizer()

    def get_model_modality(self, *_args: Any, **_options: Any) -> Any:
        return self._text

    def use_continuous_batching(self, *_args: Any) -> bool:
        return False

    def get_manager(self, *_args: Any, **_options: Any) -> Any:
        return self._manager

    def generate(self, **inputs: Any) -> Any:
        self.given.append(inputs)
        if self.fails:
            raise ValueError('a "quoted" fault')
        inputs["generation_config"].eos_token_id = None
        return self._model.generate(**inputs)


def _answers(asked: _Asked, kind: Any, body: dict[str, Any]) -> list[str]:
    """Bodies or pieces of one request, asked for whole, then as a stream."""

    async def both() -> list[str]:
        whole = await kind(asked, asked).handle_request({**body, "model": "m", "stream": False}, "r1")
        stream = await kind(asked, asked).handle_request({**body, "model": "m", "stream": True}, "r2")
        return [bytes(whole.body).decode(), "".join([piece async for piece in stream.body_iterator])]

    return asyncio.run(both())


@relied_on(
    "transformers",
    "Its serving handlers ask a model manager and a generation state for the model, the tokenizer and a thread, the "
    "model for device, config, generation_config and generate(input_ids, generation_config, streamer), and read the "
    "settings that generate got for the finish reason.",
    "engines/serving/turn.py",
    names="transformers.cli.serving.chat_completion.ChatCompletionHandler "
    "transformers.cli.serving.completion.CompletionHandler transformers.cli.serving.response.ResponseHandler "
    "transformers.cli.serving.utils.GenerateManager transformers.cli.serving.utils.Modality "
    "transformers.cli.serving.utils.get_response_template",
)
def serving_handlers() -> None:
    """Alike from 5.17 to 5.24; max_completion_tokens, which came with 5.23, is renamed by us."""
    if not _usable():
        return
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.utils import get_response_template

    known = get_response_template(_tokenizer(), tiny_model()) or {}
    hold("start_anchor" in known, "the form of a model's answers has no start_anchor.")
    prompt = " ".join(f"w{number}" for number in IDS)
    chat = [{"role": "user", "content": prompt}]
    asked = _Asked()
    for kind, body in (
        (CompletionHandler, {"prompt": prompt, "max_tokens": _TOKENS}),
        (ChatCompletionHandler, {"messages": chat, "max_tokens": _TOKENS}),
        (ResponseHandler, {"input": prompt, "max_output_tokens": _TOKENS}),
    ):
        asked.given.clear()
        whole, stream = _answers(asked, kind, body)
        for given in asked.given:
            hold(given["input_ids"].tolist() == [list(IDS)], f"{kind.__name__} hands generate other ids than asked.")
            settings = given["generation_config"]
            hold(settings.max_new_tokens == _TOKENS, f"{kind.__name__} hands generate no max_new_tokens.")
            hold(settings is not asked.generation_config, f"{kind.__name__} hands on the model's own settings.")
        hold([("streamer" in given) for given in asked.given] == [False, True], "streams are made otherwise now.")
        usage = json.loads(whole).get("usage", {})
        hold(_TOKENS in usage.values(), f"{kind.__name__} states a usage of {usage}, not of {_TOKENS} tokens.")
        last = [event for event in stream.split("\n\n") if '"usage"' in event]
        hold(len(last) == 1, f"{kind.__name__} states the usage of a stream {len(last)} times.")
        hold('"the model"' in whole and '"the model"' in stream, f"{kind.__name__} answers under another model's name.")


@relied_on(
    "transformers",
    "An exception in generate is the exception of a whole answer, and of a stream an event that begins with an error.",
    "engines/serving/answers.py engines/serving/generate.py",
)
def serving_failures() -> None:
    if not _usable():
        return
    from transformers.cli.serving.completion import CompletionHandler

    asked, body = _Asked(), {"model": "m", "prompt": "w1"}
    asked.fails = True
    handler: Any = CompletionHandler

    async def fail() -> str:
        try:
            await handler(asked, asked).handle_request(dict(body), "r1")
        except ValueError:
            stream = await handler(asked, asked).handle_request({**body, "stream": True}, "r2")
            return "".join([piece async for piece in stream.body_iterator])
        return ""

    found = asyncio.run(fail())
    hold(found.startswith('data: {"error"'), f"a stream whose generation fails says {found[:80]!r}.")
