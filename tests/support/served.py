"""A server over a tiny dialled model in this process, and what its tests ask of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
from tiny_family import EOS, save_base, save_family
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from remoe_adapt import get_remoe_model, release
from remoe_adapt.engines.serving import AppOptions, Server, ServingApp

TEMPLATE = "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}\n{% endfor %}"
PROMPT = "once upon"


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Every character is a token, 256 of them: no token is half a character, which streams leave out at their end."""
    letters = [chr(code) for code in (10, *range(32, 127), *range(0x100, 0x100 + 160))]
    raw = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate([EOS, *letters])}, merges=[]))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS, pad_token=EOS)


def save_served(folder: Path) -> Path:
    """A tiny base whose tokens are characters, and a family beside it, with points at 0.5 and 1."""
    save_family(save_base(folder, positions=1024), folder / "family", control=False)
    letter_tokenizer().save_pretrained(folder)
    return folder


class Served:
    """model, app and server; `events` are the lines that the server says, `client` an OpenAI client of it."""

    def __init__(self, folder: Path, *, template: str | None = TEMPLATE, drain_s: float = 30.0, **options: Any) -> None:
        self.model: Any = get_remoe_model(folder, None, folder / "family", monitor=False)
        # Greedy steps of a random model may end at any token; so many tokens as asked for are easier to count.
        self.model.get_base_model().generation_config.eos_token_id = None
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.chat_template = template
        self.events: list[dict[str, Any]] = []
        self.app = ServingApp(self.model, self.tokenizer, "tiny", AppOptions(**options), self.events.append)
        self.server = Server(self.app, port=0, drain_s=drain_s)
        self.server.start()
        self.url = self.server.url
        key = options.get("api_key") or "none"
        # Without certificates, which every client would read anew; there are none at this address.
        self.http = httpx.Client(verify=False, timeout=60)
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, http_client=self.http)

    def own(self, strength: float, tokens: int, prompt: str = PROMPT) -> str:
        """What our own loop makes of a prompt at a strength, greedily."""
        controller = self.model.controller
        inputs = self.tokenizer(prompt, return_tensors="pt")
        with controller.hold(strength), torch.no_grad():
            ids_BT = self.model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
        text: str = self.tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return text

    def requests(self) -> Any:
        """Counts of the status."""
        return self.app.status().requests

    def close(self) -> None:
        self.client.close()
        self.server.stop(0.0)
        release(self.model)


@contextmanager
def serving(folder: Path, **options: Any) -> Iterator[Served]:
    """A server until the end of the block."""
    served = Served(folder, **options)
    try:
        yield served
    finally:
        served.close()


def streamed(chunks: Any) -> tuple[str, dict[str, Any]]:
    """The text of streamed completions or chats, and the `remoe` of their usage."""
    text, remoe = "", None
    for chunk in chunks:
        choice = chunk.choices[0]
        piece = choice.delta.content if hasattr(choice, "delta") else choice.text
        text += piece or ""
        if chunk.usage is not None:
            assert remoe is None and choice.finish_reason
            remoe = chunk.usage.remoe
    assert remoe is not None
    return text, remoe
