"""Text from a prompt, streamed, with what it took: time to the first token, time per token, expert overlap."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import TextStreamer

from remoe_adapt._support import usable_cores
from remoe_adapt.checkpoints import device_of, max_positions
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation.record import check_seed, inference, make_trace, record_forward
from remoe_adapt.expert_cache import ExpertCache, expert_cache_of
from remoe_adapt.traces import eor


@contextmanager
def room_for_reads(cache: ExpertCache | None) -> Iterator[None]:
    """Within, beside an expert cache on a CPU: torch leaves one core to the threads that read experts.

    Its idle threads spin, and took a decoding step from 17 to 70 ms on two cores. OMP_NUM_THREADS says otherwise.
    """
    before = torch.get_num_threads()
    if cache is not None and "OMP_NUM_THREADS" not in os.environ:
        # At least one thread stays for torch, on a machine of one core too.
        torch.set_num_threads(max(1, min(before, usable_cores() - 1)))
    try:
        yield
    finally:
        torch.set_num_threads(before)


COUNTED = ("hits", "misses", "bytes", "stall_s")


def cache_figures(counted: Mapping[str, float], tokens: int, seconds: float) -> dict[str, float | None]:
    """`hit_rate`, `bytes_per_token` and `stall_share` (of the seconds, spent waiting for reads) of an expert cache.

    counted: what its counters COUNTED grew by meanwhile; all None where no expert was asked for.
    """
    uses = counted.get("hits", 0) + counted.get("misses", 0)
    if not uses or not tokens:
        return dict.fromkeys(("hit_rate", "bytes_per_token", "stall_share"))
    return {
        "hit_rate": counted["hits"] / uses,
        "bytes_per_token": counted["bytes"] / tokens,
        "stall_share": min(1.0, counted["stall_s"] / seconds),
    }


class _Stream(TextStreamer):
    """Hands on pieces of text; keeps the time of each token, and the cache's counters after the first and the last."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], object] | None, cache: ExpertCache | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times_s: list[float] = []
        self._on_text, self._cache = on_text, cache
        self._first: dict[str, Any] = {}

    def put(self, value: Tensor) -> None:
        self.times_s.append(time.perf_counter())
        # generate puts the prompt first and then the token that prefill made, so the second call ends prefill.
        if self._cache is not None and len(self.times_s) == 2:
            self._first = self._cache.stats()
        super().put(value)  # type: ignore[no-untyped-call]

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._on_text is not None and text:
            self._on_text(text)

    def cache_figures(self) -> dict[str, float | None]:
        """What the cache did in the steps after the first token."""
        tokens = len(self.times_s) - 2
        if self._cache is None or tokens < 1:
            return cache_figures({}, 0, 0.0)
        last = self._cache.stats()
        grown = {name: last[name] - self._first[name] for name in COUNTED}
        return cache_figures(grown, tokens, self.times_s[-1] - self.times_s[1])


def generate_text(
    model: Any,
    tokenizer: Any,
    prompt: str,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    on_text: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Continues a prompt by `model.generate`; temperature 0 is greedy.

    Returns `text`, `prompt_tokens`, `tokens` (new ones), `ttft_ms`, `tpot_ms` (median after the first; None for one
    token) and `eor` of the decode steps (None below two), and what `cache_figures` says of those steps. `on_text` hears
    pieces of text as they come.

    Raises:
        ConfigError: no new tokens, or a temperature or a seed out of range; a prompt without a token, or too long for
            the model's positions.
    """
    if new_tokens < 1 or not temperature >= 0:
        raise ConfigError(f"cannot generate {new_tokens} tokens at temperature {temperature}: use >= 1 and >= 0")
    check_seed(seed)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False).to(device_of(model))
    # Some tokenizers add it for encoders, and a causal LM refuses an argument that it does not know.
    inputs.pop("token_type_ids", None)
    prompt_tokens = inputs["input_ids"].shape[1]
    if not prompt_tokens:
        raise ConfigError("the prompt has no token: give --prompt some text")
    limit = max_positions(model)
    if limit is not None and prompt_tokens + new_tokens > limit:
        raise ConfigError(
            f"{prompt_tokens} tokens of the prompt and {new_tokens} new ones are more than the {limit} positions of "
            "this model: ask for fewer, or give a shorter prompt"
        )
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 50} if temperature else {"do_sample": False}
    cache = expert_cache_of(model)
    stream = _Stream(tokenizer, on_text, cache)
    with room_for_reads(cache), record_forward(model) as recorder, inference(model), torch.random.fork_rng():
        # Inside fork_rng, so that the caller's random numbers go on as if nothing had been drawn.
        torch.manual_seed(seed)
        started = time.perf_counter()
        ids_BT = model.generate(**inputs, max_new_tokens=new_tokens, streamer=stream, **sampling)
        # The prompt's tokens are prefill; reuse between decode steps is what an expert cache sees.
        routing_LTK = recorder.take()[:, prompt_tokens:]
        steps = [routing_LTK.numpy()]
        # Overlap is between two steps, so a single one has none.
        overlap = eor(make_trace(steps, recorder.num_experts, phase="decode")) if steps[0].shape[1] > 1 else None
    # The first entry is the prompt, which generate hands to the streamer before it computes anything.
    arrivals_s = stream.times_s[1:]
    gaps_s = [after - before for before, after in pairwise(arrivals_s)]
    return {
        "text": tokenizer.decode(ids_BT[0, prompt_tokens:], skip_special_tokens=True),
        "prompt_tokens": prompt_tokens,
        "tokens": ids_BT.shape[1] - prompt_tokens,
        "ttft_ms": 1e3 * (arrivals_s[0] - started) if arrivals_s else None,
        "tpot_ms": 1e3 * median(gaps_s) if gaps_s else None,
        "eor": overlap,
        **stream.cache_figures(),
    }
