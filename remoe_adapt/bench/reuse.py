"""How much of a token's experts a cache holds, by its share and the gain of the resident prior, and what that costs.

The shipped model decodes held-out text behind a cache of each share, without the prior and with each gain. `remoe plan`
takes its defaults from these rows (`planning/hit_rates.py`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from remoe_adapt.bench import harness
from remoe_adapt.checkpoints import load_tokenizer
from remoe_adapt.dial import get_remoe_model, release
from remoe_adapt.errors import DataError
from remoe_adapt.evaluation import Decoder, held_out, score
from remoe_adapt.expert_cache import ExpertCache, expert_cache_of, load_with_expert_cache

_PROMPT_TOKENS = 16


@dataclass(frozen=True)
class ReuseOptions:
    """shares: of the experts in the cache. gains: of the resident prior; 0: the base. tokens: decoded by each arm."""

    model: str | None = None
    data: Sequence[str | Path] = ()
    shares: Sequence[float] = (0.05, 0.125, 0.25, 0.5, 0.75)
    gains: Sequence[float] = (0.0, 0.1, 0.2)
    tokens: int = 2000
    document_tokens: int = 250


def run_reuse(options: ReuseOptions) -> list[dict[str, Any]]:
    """A row for each share and gain: `share`, `gain`, `hit_rate`, `miss_ratio` (misses over those without the prior at
    this share), `ppl_ratio` (perplexity over that of the base), `tokens`. Each document begins with an empty cache; its
    first 16 tokens come at once and are not counted.

    Raises ConfigError and DataError for a model or text that cannot be used.
    """
    model = harness.chosen_model(options.model)
    documents = _documents(model, options)
    rows: list[dict[str, Any]] = []
    base_nll = 0.0
    for share in options.shares:
        base = load_with_expert_cache(model, share)
        cache = expert_cache_of(base)
        assert cache is not None
        base_misses = 0.0
        for gain in options.gains:
            if gain:
                get_remoe_model(base, recency="resident", recency_gain=gain, monitor=False)
            hit_rate, nll = _decode(base, cache, documents)
            release(base)
            if not gain:
                base_misses, base_nll = 1 - hit_rate, nll
            rows.append(
                {
                    "share": share,
                    "gain": gain,
                    "hit_rate": hit_rate,
                    "miss_ratio": (1 - hit_rate) / base_misses if base_misses else 1.0,
                    "ppl_ratio": math.exp(nll - base_nll),
                    "tokens": sum(len(ids) - _PROMPT_TOKENS - 1 for ids in documents),
                }
            )
    return rows


def _documents(model: Path | str, options: ReuseOptions) -> list[list[int]]:
    # The prompts of the shipped text are too short to be decoded, but count as tokens there.
    found = held_out(Path(model), load_tokenizer(str(model)), 4 * options.tokens + 1024, options.data).documents
    long = [ids[: options.document_tokens] for ids in found if len(ids) > 2 * _PROMPT_TOKENS]
    random.Random(0).shuffle(long)
    chosen: list[list[int]] = []
    while long and sum(map(len, chosen)) < options.tokens:
        chosen.append(long.pop())
    if not chosen:
        raise DataError(f"no text has more than {2 * _PROMPT_TOKENS} tokens: give --data FILE with longer documents.")
    return chosen


def _decode(model: Any, cache: ExpertCache, documents: Sequence[Sequence[int]]) -> tuple[float, float]:
    """(hit rate, mean negative log-likelihood in nats) of the tokens behind the prompts."""
    hits = misses = 0
    losses: list[float] = []
    with torch.inference_mode():
        for ids in documents:
            cache.clear()
            decoder = Decoder(model)
            decoder.feed(ids[:_PROMPT_TOKENS])
            before = cache.stats()
            for token, target in zip(ids[_PROMPT_TOKENS:-1], ids[_PROMPT_TOKENS + 1 :], strict=True):
                logits_V = decoder.feed([token])
                losses.append(float(score(logits_V[None], torch.tensor([target]))[0]))
            after = cache.stats()
            hits += after["hits"] - before["hits"]
            misses += after["misses"] - before["misses"]
    return hits / (hits + misses), fmean(losses)
