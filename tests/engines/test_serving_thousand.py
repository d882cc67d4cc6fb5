"""A thousand requests to the transformers engine, four at a time, while its strength is turned all the while."""

from __future__ import annotations

import functools
import itertools
import random
import threading
from pathlib import Path
from typing import Any

import pytest

for needed in ("openai", "fastapi", "uvicorn", "prometheus_client"):
    pytest.importorskip(needed, reason="a server for OpenAI's clients (extra: serve)")

import torch  # noqa: E402 (after what the server needs)
from served import Served, save_served, serving  # noqa: E402
from waiting import run_all  # noqa: E402
from watched_decoding import each  # noqa: E402

STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROMPTS = [f"tale {number} of a" for number in range(6)]
COUNT, AT_ONCE, TOKENS, TURNS = 1000, 4, 3, 200


def own_loop(served: Served, prompt: str, strengths: tuple[float, ...]) -> str:
    """Greedy tokens, each computed at its own strength; the prompt at that of the first."""
    controller = served.model.controller
    inputs = served.tokenizer(prompt, return_tensors="pt")
    controller.set_strength(strengths[0])

    def turn(step: int) -> None:
        if step + 1 < len(strengths):
            controller.set_strength(strengths[step + 1])

    with torch.no_grad():
        ids_BT = served.model.generate(
            **inputs, max_new_tokens=len(strengths), do_sample=False, logits_processor=each(turn)
        )
    text: str = served.tokenizer.decode(ids_BT[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


@pytest.mark.slow
def test_a_thousand_answers_are_those_of_the_strengths_that_they_state(tmp_path: Path) -> None:
    numbers, over, failed = itertools.count(), threading.Event(), []
    found: dict[int, tuple[str, float | None, str, dict[str, Any]]] = {}
    turns = 0
    with serving(save_served(tmp_path / "tiny"), max_waiting=AT_ONCE) as served:
        dial = served.model.controller

        def client() -> None:
            draw = random.Random(threading.get_ident())
            while (number := next(numbers)) < COUNT:
                prompt, pin = PROMPTS[number % len(PROMPTS)], draw.choice(STRENGTHS) if number % 5 == 0 else None
                body = {} if pin is None else {"extra_body": {"remoe": {"strength": pin}}}
                try:
                    answer = served.client.completions.create(
                        model="tiny", prompt=prompt, max_tokens=TOKENS, temperature=0, **body
                    )
                except Exception as error:
                    failed.append(repr(error))
                else:
                    found[number] = (prompt, pin, answer.choices[0].text, answer.usage.remoe)  # type: ignore[union-attr]

        def turner() -> None:
            nonlocal turns
            draw = random.Random(1)
            # Not in step with the requests, or each would have its own strength throughout.
            while not over.wait(draw.uniform(0.005, 0.1)):
                dial.set_pressure(draw.choice(STRENGTHS))
                turns += 1

        clients = [threading.Thread(target=client) for _ in range(AT_ONCE)]
        turning = threading.Thread(target=turner)
        run_all(clients, turning, over)
        requests = served.requests()
        own = functools.cache(lambda prompt, strengths: own_loop(served, prompt, strengths))
        known = {(prompt, s): own(prompt, (s,) * TOKENS) for prompt in PROMPTS for s in STRENGTHS}
        mixed = 0
        for prompt, pin, text, remoe in found.values():
            at = {float(strength): count for strength, count in remoe["tokens_at"].items()}
            assert sum(at.values()) == TOKENS and remoe["pinned"] is (pin is not None)
            assert pin is None or set(at) == {pin}
            if len(at) == 1:
                assert text == known[prompt, next(iter(at))]
                continue
            mixed += 1
            order = [strength for strength, count in at.items() for _ in range(count)]
            assert any(text == own(prompt, one) for one in sorted(set(itertools.permutations(order))))
    print(len(found), turns, mixed, requests)  # noqa: T201
    assert not failed and len(found) == COUNT and turns >= TURNS and mixed > 10
    assert (requests.answered, requests.failed, requests.refused, requests.left) == (COUNT, 0, 0, 0)
    assert len({known[PROMPTS[0], strength] for strength in STRENGTHS}) > 2
