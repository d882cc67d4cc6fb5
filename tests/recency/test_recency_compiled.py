"""The recency prior in traced code: one graph for all steps, and the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kv import kv
from recency_support import LONGER, PROMPT, decode, routing_matters
from transformers import DynamicCache, StaticCache

from remoe_adapt.recency.install import recency_prior


@pytest.fixture(scope="module")
def model() -> Any:
    return routing_matters()


def test_the_compiled_model_chooses_the_same(model: Any) -> None:
    with recency_prior(model, "cost", 0.4):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        with torch.no_grad():
            expected, found = (
                run(LONGER, use_cache=False, attention_mask=torch.ones_like(LONGER)).logits for run in (model, compiled)
            )
        torch._dynamo.reset()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def counting(graphs: list[Any]) -> Any:
    """A compiler backend that changes nothing and keeps what it was given."""

    def backend(graph: Any, _inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return backend


def test_compiled_steps_share_one_graph(model: Any) -> None:
    """A decode loop with a static cache, for two texts and through a change of gain."""
    graphs: list[Any] = []
    torch._dynamo.reset()
    step = torch.compile(model, backend=counting(graphs), fullgraph=True, dynamic=False)
    with recency_prior(model, "cost", 0.0) as installed, torch.no_grad():
        for text, gain in ((PROMPT, 0.4), (PROMPT.flip(1), 0.2)):
            installed.set_gains(gain)
            cache = StaticCache(config=model.config, max_cache_len=32)
            ids = text
            new = model(ids, **kv(cache)).logits[:, -1:].argmax(dim=-1)
            for _ in range(12):
                ids = torch.cat([ids, new], dim=1)
                positions = torch.tensor([[ids.shape[1] - 1]])
                new = step(new, **kv(cache), position_ids=positions).logits.argmax(dim=-1)
            assert torch.equal(ids, decode(model, text, max_new_tokens=12))
    torch._dynamo.reset()
    assert len(graphs) == 1


def test_compiled_steps_grow_a_dynamic_cache(model: Any, caplog: pytest.LogCaptureFixture) -> None:
    graphs: list[Any] = []
    torch._dynamo.reset()
    step = torch.compile(model, backend=counting(graphs), fullgraph=True)
    with recency_prior(model, "ema", 0.4), torch.no_grad():
        cache = DynamicCache(config=model.config)
        ids, new = PROMPT, model(PROMPT, **kv(cache)).logits[:, -1:].argmax(dim=-1)
        for _ in range(12):
            ids = torch.cat([ids, new], dim=1)
            positions = torch.tensor([[ids.shape[1] - 1]])
            new = step(new, **kv(cache), position_ids=positions).logits.argmax(dim=-1)
        torch._dynamo.reset()
        assert torch.equal(ids, decode(model, max_new_tokens=12))
    assert len(graphs) == 2, "one for the first length, one for any"
    cache.crop(-2)
    assert "not kept" in caplog.text and not any(part.any() for part in cache.remoe_recency.recency)  # type: ignore[attr-defined]
