"""Answers of a llama-server, compared with those of an undisturbed one at a known strength."""

from __future__ import annotations

import http.client
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from remoe_adapt.engines.llamacpp.client import Address, call
from remoe_adapt.family.family import Family

TOKENS = 6
# Between answers at different strengths the first differences are 0.01 to 1; rounding by a batch's neighbours, 1e-4.
SAME = 2e-3


def prompts(count: int, seed: int = 5) -> list[list[int]]:
    """Token ids, all with the same beginning: what a prompt cache is for."""
    draw = random.Random(seed)
    start = [draw.randrange(3, 250) for _ in range(16)]
    return [start + [draw.randrange(3, 250) for _ in range(16)] for _ in range(count)]


@dataclass(frozen=True)
class Answer:
    """Greedy tokens; scored: with log probability, those that do not end in the midst of a character (the server says
    no more); strength: that of the header, None without one."""

    tokens: tuple[int, ...]
    scored: tuple[tuple[int, float], ...]
    strength: float | None = None

    def same(self, other: Answer) -> bool:
        """Up to rounding, which may choose another token only where two were as good."""
        for (token, logprob), (other_token, other_logprob) in zip(self.scored, other.scored, strict=False):
            if abs(logprob - other_logprob) > SAME:
                return False
            if token != other_token:
                return True
        return self.tokens == other.tokens


def posted(port: int, prompt: Sequence[int], **more: Any) -> tuple[dict[str, Any], Answer]:
    """What the server says of a completion, and the answer in it.

    Raises OSError or HTTPException when there is no whole answer, RuntimeError for another status than 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        body = {"prompt": list(prompt), "n_predict": TOKENS, "temperature": 0, "n_probs": 1, "ignore_eos": True}
        connection.request("POST", "/completion", json.dumps(body | {"return_tokens": True} | more))
        answer = connection.getresponse()
        text = answer.read()
    finally:
        connection.close()
    if answer.status != 200:
        raise RuntimeError(f"{answer.status}: {text.decode()}")
    found, stated = json.loads(text), answer.headers["x-remoe-strength"]
    scored = tuple((one["id"], one["logprob"]) for one in found.get("completion_probabilities", []))
    return found, Answer(tuple(found["tokens"]), scored, None if stated is None else float(stated))


def ask(port: int, prompt: Sequence[int], **more: Any) -> Answer:
    """Raises as `posted`."""
    return posted(port, prompt, **more)[1]


class Reference:
    """What an undisturbed server (one slot, no caches, fresh prompts) answers at a strength. Remembers."""

    def __init__(self, port: int, family: Family) -> None:
        self._port, self._family = port, family
        loaded = call(Address("127.0.0.1", port), "/lora-adapters")
        self._ids = {one["path"].rpartition("/")[2].removesuffix(".gguf"): one["id"] for one in loaded}
        self._known: dict[tuple[tuple[int, ...], float], Answer] = {}

    def scales(self, strength: float) -> list[dict[str, float]]:
        """By the family's own interpolation of its deltas, independent of the code under test: two points at most."""
        lower, upper, share = self._family._neighbours(strength)
        scales = dict.fromkeys(self._ids.values(), 0.0)
        if lower is not None:
            scales[self._ids[lower.adapter]] = 1.0 - share
        if upper is not None:
            scales[self._ids[upper.adapter]] = share
        return [{"id": number, "scale": scale} for number, scale in scales.items()]

    def answer(self, prompt: Sequence[int], strength: float) -> Answer:
        key = (tuple(prompt), strength)
        if key not in self._known:
            self._known[key] = ask(self._port, prompt, lora=self.scales(strength), cache_prompt=False)
        return self._known[key]
