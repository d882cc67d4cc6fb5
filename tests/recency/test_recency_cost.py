"""Recency mode cost in models: decoding is a scan of the same text, and a crop of a long one keeps what is held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from kv import kv
from recency_support import LONGER, chosen, routing_matters
from transformers import AutoModelForCausalLM, DynamicCache

from remoe_adapt.checkpoints.load import load_tokenizer
from remoe_adapt.errors import ConfigError
from remoe_adapt.gating.cost import held
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.recency.prior import RecencyPrior

TEXT = "def main(args):\n    for line in sys.stdin:\n        print(line.strip().split())\n    return 0\n"


def test_a_token_at_a_time_is_one_wide_forward(repo_root: Path) -> None:
    """The shipped model, in fp64: products of one row and of many then differ by less than any choice turns on."""
    folder = repo_root / "examples" / "tiny_moe"
    options: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}  # grouped_mm takes no fp64
    model: Any = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    ids = load_tokenizer(str(folder))(TEXT, return_tensors="pt")["input_ids"]
    plain = chosen(model, ids)
    with recency_prior(model, "cost", 0.1):
        wide = chosen(model, ids)
        cache = DynamicCache(config=model.config)
        steps = [chosen(model, ids[:, t : t + 1], **kv(cache)) for t in range(ids.shape[1])]
    assert torch.equal(torch.cat(steps, dim=1), wide) and not torch.equal(wide, plain)

    def reused(chosen_LTK: torch.Tensor) -> float:
        same = chosen_LTK[:, 1:, :, None] == chosen_LTK[:, :-1, None, :]
        return float(same.any(dim=-1).float().mean())

    assert reused(wide) > 1.2 * reused(plain)


def test_the_share_decides_what_is_preferred() -> None:
    model = routing_matters("qwen2_moe")
    found = {}
    for share in (None, 0.25, 0.5, 1.0):
        with recency_prior(model, "cost", 0.15, share=share) as installed:
            found[share] = chosen(model, LONGER)
            assert installed.prior.share == (share or 0.25)
    assert torch.equal(found[None], found[0.25])
    assert not torch.equal(found[0.5], found[0.25]) and not torch.equal(found[0.5], found[1.0])
    with pytest.raises(ConfigError, match=r"share 1\.5"), recency_prior(model, "cost", 0.15, share=1.5):
        pass


def test_what_is_held_survives_a_crop_of_a_long_text() -> None:
    """An expert unused for hundreds of tokens is held where few others were used; a mean that decays has lost it."""
    torch.manual_seed(0)
    prior = RecencyPrior("cost", [(torch.device("cpu"), 16)] * 2, share=0.75)
    state = prior.new_state(1)
    kept: list[torch.Tensor] = []
    for token in range(1300):
        # Experts 0 to 9 in the first hundred tokens, then 10 and 11 seldom and 12 to 15 often.
        among = torch.arange(10) if token < 100 else torch.tensor([10, 11] if token % 300 == 0 else [12, 13, 14, 15])
        state.move({layer: among[torch.randperm(len(among))[None, :2]] for layer in range(2)})
        if token == 899:
            kept = [held(recency_1E, 0.75, 2) for recency_1E in state.recency]
    state.crop(900)
    for recency_1E, expected_1E in zip(state.recency, kept, strict=True):
        assert int(expected_1E.sum()) == 12
        assert torch.equal(held(recency_1E, 0.75, 2), expected_1E)


def test_a_state_is_not_continued_under_another_share() -> None:
    routers = [(torch.device("cpu"), 8)]
    state = RecencyPrior("cost", routers, share=0.25).new_state(1)
    state.move({0: torch.tensor([[1, 2]])})
    assert not state.bind(RecencyPrior("cost", routers, share=0.5))
    assert state.bind(RecencyPrior("cost", routers, share=0.25)) and state.recency[0].any()
