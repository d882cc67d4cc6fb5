"""Decoding one token at a time while a predictor reads ahead, and threads that disturb it."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from kv import kv, returned_cache

from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.prefetch import Prefetcher

IDS = torch.randint(3, 96, (1, 12), generator=torch.Generator().manual_seed(0))


@contextmanager
def in_threads(step: Callable[[int, random.Random], None], *, threads: int, steps: int) -> Iterator[None]:
    """Meanwhile `step(number, random numbers)` runs in threads; afterwards none has failed."""
    with ThreadPoolExecutor(threads) as pool:

        def work(seed: int) -> None:
            random_of = random.Random(seed)
            for number in range(steps):
                step(number, random_of)

        running = [pool.submit(work, seed) for seed in range(threads)]
        yield
        for thread in running:
            thread.result(60)


def counted(cache: ExpertCache) -> tuple[int, ...]:
    stats = cache.stats()
    return tuple(stats[name] for name in ("hits", "misses", "prefetch_hits", "prefetched"))


def predictor(model: Any) -> Prefetcher:
    rows: Any = model.get_submodule(model.expert_cache.source.layers[0]).cached_experts
    found: Prefetcher = rows.predictor
    return found


def always(model: Any) -> Any:
    """Let its predictor read ahead whatever it says."""
    for router in predictor(model)._routers.values():
        router.scores = [2.0] * len(router.scores)
        router.score = lambda *_: None  # type: ignore[method-assign]
    return model


@torch.no_grad()
def decoded(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    past, found = None, []
    for step in range(ids.shape[1]):
        output = model(input_ids=ids[:, step : step + 1], **kv(past), use_cache=True)
        past = returned_cache(output)
        found.append(output.logits)
    return torch.cat(found, dim=1)
