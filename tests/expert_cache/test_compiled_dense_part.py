"""The dense part may be compiled: graphs end at the experts, and neither tokens nor the dial change them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_tiny
from torch import Tensor
from transformers import StaticCache

from remoe_adapt import load_with_expert_cache

IDS = torch.randint(3, 90, (1, 8), generator=torch.Generator().manual_seed(0))


def decode(model: Any, call: Any) -> Tensor:
    """Logits of each token, one step after another, with a static cache as CUDA graphs need it."""
    # transformers has renamed the parameter in 5.24.
    name = "cache" if "cache" in inspect.signature(type(model).forward).parameters else "past_key_values"
    kept: dict[str, Any] = {name: StaticCache(config=model.config, max_cache_len=16), "use_cache": True}
    with torch.no_grad():
        steps = [call(input_ids=IDS[:, at : at + 1], **kept).logits for at in range(IDS.shape[1])]
    return torch.cat(steps, dim=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("compiled") / "m", "qwen2_moe")


class Graphs:
    """A backend of torch.compile that runs each graph as it is, and counts them."""

    def __init__(self) -> None:
        self.made = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        self.made += 1
        return graph.forward


def test_no_graph_is_made_twice_whatever_the_tokens_the_budget_and_the_routers(folder: Path) -> None:
    model = load_with_expert_cache(folder, 0.3)
    expected = decode(model, model)
    torch._dynamo.reset()
    graphs = Graphs()
    compiled = torch.compile(model, backend=graphs)
    decode(model, compiled)
    made = graphs.made
    assert made > len(model.model.layers), "graphs end at the experts of each layer"
    assert torch.allclose(decode(model, compiled), expected, atol=1e-5)
    model.expert_cache.resize(int(0.6 * model.expert_cache.source.total_bytes))
    assert torch.allclose(decode(model, compiled), expected, atol=1e-5)
    with torch.no_grad():
        # As a swap of strength does it, in place.
        model.model.layers[0].mlp.gate.weight.mul_(0.5)
    assert torch.allclose(decode(model, compiled), decode(model, model), atol=1e-5)
    assert graphs.made == made
