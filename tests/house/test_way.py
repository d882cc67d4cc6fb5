"""A logit's way from the router to the experts' matmul, in a decode step under a dial with an expert cache.

Counted while it runs: the files of ours that are entered between a router's call and the end of its layer's experts.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from watched_decoding import IDS

from remoe_adapt import get_remoe_model, load_with_expert_cache
from remoe_adapt.libraries import cache_keyword, returned_cache
from remoe_adapt.tuner.layer import remoe_layers

MOST_FILES, MOST_THREAD_LOCALS = 12, 3
# Where a thread keeps something of its own, in the whole package. Each must be known to whoever reads the way.
THREAD_LOCALS = {"dial/steps.py", "expert_cache/prefetch.py", "recency/prior.py"}
ENTRY, EXIT = ("tuner/layer.py", "__call__"), ("expert_cache/experts.py", "remoe_cache")


@contextmanager
def entered(package: Path) -> Iterator[list[list[str]]]:
    """The files of the package that each layer's way enters, in their order."""
    ways: list[list[str]] = []
    is_open = False

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal is_open
        path = Path(frame.f_code.co_filename)
        if event not in ("call", "return") or not path.is_relative_to(package):
            return
        file = path.relative_to(package).as_posix()
        at = (file, frame.f_code.co_name)
        if event == "call" and at == ENTRY:
            is_open = True
            ways.append([])
        if is_open and event == "call" and file not in ways[-1]:
            ways[-1].append(file)
        if event == "return" and at == EXIT:
            is_open = False

    sys.setprofile(note)
    try:
        yield ways
    finally:
        sys.setprofile(None)


def decode_step(model: Any, cache: Any, token: int) -> Any:
    handed = {} if cache is None else {cache_keyword(model): cache}
    with torch.no_grad():
        return returned_cache(model(input_ids=torch.tensor([[token]]), use_cache=True, **handed))


@pytest.mark.parametrize("ties", [False, True])
def test_a_logit_crosses_few_files_to_the_matmul(saved: Path, repo_root: Path, ties: bool) -> None:
    base: Any = load_with_expert_cache(saved, 1.0)
    model = get_remoe_model(base, recency="resident", recency_gain=0.2, monitor=False)
    for layer, count in enumerate(base.expert_cache.source.num_experts):
        base.expert_cache.lease(layer, range(count)).release()
    if ties:
        for layer in remoe_layers(base).values():
            layer.base_weight_ED.data.zero_()
    cache = None
    for token in IDS[0, :3].tolist():
        cache = decode_step(model, cache, token)
    misses = base.expert_cache.stats()["misses"]
    with entered(repo_root / "remoe_adapt") as ways:
        decode_step(model, cache, 5)
    assert base.expert_cache.stats()["misses"] == misses
    assert len(ways) == len(base.expert_cache.source.layers)
    for way in ways:
        assert {"tuner/layer.py", "gating/one_token.py", "expert_cache/cache.py", "eviction/policy.py"} <= set(way)
        assert ("routers/spec.py" in way) == ties  # which orders equal values
        assert len(way) <= MOST_FILES, way


def test_few_places_keep_something_for_each_thread(repo_root: Path) -> None:
    package = repo_root / "remoe_adapt"
    sources = {path.relative_to(package).as_posix(): path.read_text("utf-8") for path in package.rglob("*.py")}
    found = {file: text.count("(threading.local)") + text.count("threading.local()") for file, text in sources.items()}
    assert {file for file, count in found.items() if count} == THREAD_LOCALS
    assert sum(found.values()) <= MOST_THREAD_LOCALS
