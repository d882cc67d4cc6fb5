"""Servers with the recency prior preloaded, and our own loop at the gains that their logs name."""

from __future__ import annotations

import contextlib
import ctypes as C
import itertools
import math
import os
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from llama_answers import SAME, Answer, posted
from numpy.typing import NDArray
from waiting import run_all, until

from remoe_adapt.dial.load import profile_of
from remoe_adapt.engines.llamacpp.in_process import LlamaModel, _Batch, _Ints
from remoe_adapt.engines.llamacpp.prior.control import GainEvent, PriorControl
from remoe_adapt.engines.llamacpp.serve import GgufServing, ServedGguf
from remoe_adapt.recency_settings import Recency

# KV in F32 and no flash attention, as LlamaModel: answers are then equal but for the rounding of a batch's neighbours.
EXACT = {"cache_type_k": 0, "cache_type_v": 0, "flash_attn_type": 0, "cache_ram_mib": 0}
# The same for a program of the user's.
EXACT_OPTIONS = ("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--cache-ram", "0")
TOKENS = 16
_EOS = 257


def stock_server() -> Path | None:
    """A llama-server that is not the wheel's: `$REMOE_LLAMA_SERVER`."""
    named = os.environ.get("REMOE_LLAMA_SERVER")
    return Path(named) if named else None


@contextlib.contextmanager
def served(model: Path, *, gain: float = 1.0, **options: Any) -> Iterator[ServedGguf]:
    """A served model whose gain nobody turns but the test, by `command`."""
    if "llama_server" in options:
        options["arguments"] = (*EXACT_OPTIONS, *options.get("arguments", ()))
        engine: dict[str, Any] = {}
    else:
        engine = {**EXACT, **options.pop("engine", {})}
    serving = GgufServing(
        recency=Recency.of(options.pop("mode", "ema"), gain), port=0, threads=1, context_tokens=2048, strength=0.0,
        engine=engine, **options,
    )  # fmt: skip
    with ServedGguf(model, profile_of(None), serving) as server:
        yield server


@contextlib.contextmanager
def running(server: ServedGguf) -> Iterator[list[dict[str, Any]]]:
    """Its events, in a thread."""
    events: list[dict[str, Any]] = []

    def run() -> None:
        for event in server.events():
            events.append(event)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        until(lambda: bool(events) or not thread.is_alive())
        yield events
    finally:
        server.stop()
        thread.join(30)
    assert not thread.is_alive()


def control_of_server(server: ServedGguf) -> PriorControl:
    assert server._control is not None
    return server._control


def command(server: ServedGguf, gain: float, mode: str = "ema") -> None:
    control_of_server(server).command(Recency.of(mode, gain))


@dataclass(frozen=True)
class Asked:
    """An answer, when and in which slot."""

    prompt: tuple[int, ...]
    begin_s: float
    end_s: float
    slot: int
    answer: Answer

    def texts(self, events: Sequence[GainEvent]) -> list[list[tuple[int, float]]]:
        """(position, gain from there on) of each text that its slot began while it was asked for, from the server's
        log: one of them is that of this answer. Another may have waited less, or begun before this one had come back.
        """
        found: list[list[tuple[int, float]]] = []
        for event in events:
            if event.sequence != self.slot or not self.begin_s <= event.time_s <= self.end_s:
                continue
            if event.kind == "begin":
                found.append([])
            if found and event.kind != "restart":
                found[-1].append((event.position, event.gain))
        assert found, self
        return found


def asked(port: int, prompt: Sequence[int], **more: Any) -> Asked:
    """Raises as `posted`."""
    begin_s = time.monotonic()
    found, answer = posted(port, prompt, **{"cache_prompt": False, "n_predict": TOKENS} | more)
    return Asked(tuple(prompt), begin_s, time.monotonic(), int(found["id_slot"]), answer)


class OwnLoop:
    """Greedy answers of LlamaModel with its own prior, outputs for the last token of a prompt alone, as a server's."""

    def __init__(self, path: Path, recency: Recency | None = None) -> None:
        self.model = LlamaModel(path, context_tokens=512, recency=recency or Recency.of("ema", 0.0))

    def gap(self, one: Asked, gains: Sequence[tuple[int, float]]) -> float:
        """By how much the logits of the answer's tokens miss the greedy ones, at most; infinite where the log
        probabilities that it states (of some of its tokens) are not ours in their order.

        gains: (position, gain from there on), rising; a prompt is one batch, so it has the gain of its first token.
        """
        self.model.clear()
        self.model.set_gain(gains[0][1])
        logits_V = self._decode(list(one.prompt))
        scored, worst = list(one.answer.scored), 0.0
        assert one.answer.tokens and scored
        for position, token in enumerate(one.answer.tokens, len(one.prompt)):
            top = float(np.delete(logits_V, _EOS).max())  # which is asked to be ignored
            worst = max(worst, top - float(logits_V[token]))
            shifted_V = logits_V.astype(np.float64) - top
            logprob = float(shifted_V[token] - np.log(np.exp(shifted_V).sum()))
            if scored and scored[0][0] == token and abs(scored[0][1] - logprob) < SAME:
                scored.pop(0)
            self.model.set_gain([gain for begin, gain in gains if begin <= position][-1])
            logits_V = self._decode([token])
        return math.inf if scored else worst

    def of_its_log(self, one: Asked, events: Sequence[GainEvent]) -> list[tuple[int, float]]:
        """The gains that the log names for the answer, which is ours at them."""
        texts = one.texts(events)
        gaps = [self.gap(one, gains) for gains in texts]
        assert min(gaps) < SAME, (gaps, one, texts)
        return texts[gaps.index(min(gaps))]

    def _decode(self, ids: list[int]) -> NDArray[np.float32]:
        model, count = self.model, len(ids)
        at = model.positions[0]
        cell = C.cast((C.c_int32 * 1)(0), _Ints)
        batch = _Batch(
            count, (C.c_int32 * count)(*ids), None, (C.c_int32 * count)(*range(at, at + count)),
            (C.c_int32 * count)(*[1] * count), (_Ints * count)(*[cell] * count),
            (C.c_int8 * count)(*[number == count - 1 for number in range(count)]),
        )  # fmt: skip
        assert model._prior is not None
        model._prior.rows([0] * count, list(range(at, at + count)))
        assert model._lib.llama_decode(model._context, batch) == 0
        model.positions[0] += count
        return np.ctypeslib.as_array(model._lib.llama_get_logits(model._context), (model.vocab_size,)).copy()


def prompts(count: int, seed: int = 3) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 250) for _ in range(20 + number % 5)] for number in range(count)]


def turn_and_ask(server: ServedGguf, count: int, at_once: int) -> list[Asked]:
    """`count` answers, so many at once, while the gain is turned."""
    numbers, texts, found, over = itertools.count(), prompts(count), [], threading.Event()

    def client() -> None:
        # On a busy machine the gain is turned less often than it should be.
        while (number := next(numbers)) < count or turns < 6:
            found.append(asked(server.port, texts[number % count], n_predict=3 * TOKENS))

    turns = 0

    def turner() -> None:
        nonlocal turns
        for gain in itertools.cycle([1.5, 0.0, 0.6, 0.3]):
            if over.wait(0.01):
                return
            command(server, gain)
            turns += 1

    turning = threading.Thread(target=turner)
    clients = [threading.Thread(target=client) for _ in range(at_once)]
    run_all(clients, turning, over)
    assert len(found) >= count
    return found
