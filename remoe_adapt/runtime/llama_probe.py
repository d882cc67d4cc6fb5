"""Which prompt caches of a llama-server are on, found out by asking it: no call says so.

What was measured (llama.cpp 0.6-dev, random prompts, 4 clients, scales that change): a server that reuses prompts gives
answers of mixed scales after POST /lora-adapters (136 of 160 wrong); with `--no-cache-prompt` none, with any
--cache-ram. With `lora` in every request, its RAM prompt cache still restores another scale's state (18 of 160 wrong);
with `--cache-ram 0`, or `cache_prompt: false` in every request, none.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

from remoe_adapt.errors import ServerError
from remoe_adapt.runtime.llama_scales import ScaleMap
from remoe_adapt.untrusted import printable

# POST with a body -> the JSON answer.
Post = Callable[[str, Any], Any]
_WORDS = 12


def reuses_prompts(post: Post, slots: int) -> bool:
    """Whether a request that says nothing about caches may start from what an earlier one left behind.

    The same prompt once more than there are slots: whichever way slots are chosen, one has seen it. No slot is named:
    with a RAM prompt cache, that spoils what other slots are generating (34 of 200 answers, at constant scales).
    """
    prompt = _prompt()
    return any(_reused(post, prompt, {}) > 0 for _ in range(slots + 1))


def restores_other_scales(post: Post, slots: int, scales: ScaleMap) -> bool:
    """Whether a request may start from a state that was computed at other scales, although it names its own.

    More prompts than slots push each other out of them; where they go on living outside (--cache-ram), the first answer
    at another strength finds some of its prompt known already.
    """
    prompts = [_prompt() for _ in range(slots + 1)]
    for prompt in prompts:
        _reused(post, prompt, {"lora": scales.as_list(0.0), "cache_prompt": True})
    strongest = scales.points[-1][0]
    return any(
        _reused(post, prompt, {"lora": scales.as_list(strongest), "cache_prompt": True}) > 0 for prompt in prompts
    )


def _prompt() -> str:
    """Never seen before, and unlike any other from its first token on."""
    return " ".join(secrets.token_hex(2) for _ in range(_WORDS))


def _reused(post: Post, prompt: str, more: dict[str, Any]) -> int:
    """Tokens of the prompt that the server had not to compute, a common start of text aside."""
    answer = post("/completion", {"prompt": prompt, "n_predict": 1, "temperature": 0, **more})
    try:
        reused = int(answer["tokens_evaluated"]) - int(answer["timings"]["prompt_n"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ServerError(f"/completion answers without timings ({printable(error)}): is it a llama-server?") from error
    return reused if reused > 1 else 0
