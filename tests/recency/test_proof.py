"""Installing a recency prior proves that it acts, and says by name where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from kv import kv
from recency_support import routing_matters
from torch import Tensor
from transformers import DynamicCache

from remoe_adapt import recency_prior
from remoe_adapt.errors import RouterError
from remoe_adapt.expert_cache.experts import expert_cache_of
from remoe_adapt.expert_cache.load import load_with_expert_cache
from remoe_adapt.libraries import kv_cache

MODES = ("ema", "cost", "resident")
IDS = torch.tensor([[3, 9, 4, 30]])


@contextmanager
def class_method(cls: type, name: str, value: Any) -> Iterator[None]:
    before = getattr(cls, name)
    setattr(cls, name, value)
    try:
        yield
    finally:
        setattr(cls, name, before)


@pytest.fixture
def model() -> Any:
    return routing_matters("qwen3_moe")


@pytest.mark.parametrize("mode", MODES)
def test_a_block_that_ignores_the_ids_of_its_router_is_told(model: Any, mode: str) -> None:
    block = type(model.model.layers[0].mlp)

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        flat_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, weights_TK, ids_TK = self.gate(flat_TD)
        return self.experts(flat_TD, (ids_TK + 1) % 8, weights_TK).reshape(hidden_states.shape)

    with (
        class_method(block, "forward", forward),
        pytest.raises(
            RouterError, match=r"layers\.0\.mlp\.gate: its experts are not asked for the ids that it returns"
        ),
        recency_prior(model, mode, 0.2),
    ):
        pass
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("mode", ["ema", "last"])
def test_a_cache_that_comes_back_under_an_unknown_name_is_told(model: Any, mode: str) -> None:
    text = type(model.model)
    original = text.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        return output.last_hidden_state

    forward.__wrapped__ = original  # type: ignore[attr-defined]
    with (
        class_method(text, "forward", forward),
        pytest.raises(RouterError, match="takes a KV cache and returns none by a name known here"),
        recency_prior(model, mode, 0.2),
    ):
        pass


def test_a_renamed_cache_argument_is_told_by_name(
    model: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What transformers 5.24 did to the versions before it."""
    name = kv_cache.cache_argument(model.model.forward)
    monkeypatch.setattr(kv_cache, "CACHE_NAMES", ("kv_store",))
    with recency_prior(model, "ema", 0.2) as installed:
        assert not installed.layers
        assert all(f"takes its KV cache as {name!r}" in reason for reason in installed.own_forward.values())
    assert "keep their own forward" in caplog.text


def test_a_state_that_is_lost_between_steps_is_told(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remoe_adapt.recency.sequences.attach", lambda cache, state: None)
    with (
        pytest.raises(RouterError, match=r"did not choose expert \d in a decode step"),
        recency_prior(model, "ema", 0.2),
    ):
        pass


def test_a_router_that_runs_several_times_for_a_token_keeps_its_own_forward() -> None:
    try:
        looped = routing_matters(
            "inkling2_loop", loop_layer_index_start=1, loop_layer_index_end=3, n_layers_per_attn_res_block=1
        )
    except ModuleNotFoundError:
        pytest.skip("not in this transformers")
    with recency_prior(looped, "ema", 0.2) as installed:
        assert installed.layers == [0, 3]
        assert all("is asked 6 times" in reason for reason in installed.own_forward.values())
    with recency_prior(looped, "resident", 0.2) as installed:
        assert installed.layers == [0, 1, 2, 3]


@pytest.mark.parametrize("mode", MODES)
def test_the_proof_leaves_everything_as_it_was(model: Any, mode: str) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with recency_prior(model, mode, 0.2) as installed:
        assert torch.equal(torch.rand(3), expected)
        assert [module.training for module in model.modules()] == modes
        assert all(float(gain) == pytest.approx(0.2) for gain in installed.prior.gains)
        assert not any(mask_1E.any() for mask_1E in installed.prior.residency)
        assert installed.prior.running.tokens is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_the_proof_reads_no_expert_from_storage(tmp_path: Any) -> None:
    routing_matters("qwen3_moe").save_pretrained(tmp_path)
    cached = load_with_expert_cache(tmp_path, 0.5)
    with recency_prior(cached, "ema", 0.2):
        cache: Any = expert_cache_of(cached)
        assert cache.resident_bytes == 0
        cached(IDS)
        assert cache.resident_bytes > 0


@pytest.mark.parametrize("mode", ["ema", "last"])
def test_continuous_batching_is_refused_by_name_while_a_prior_needs_sequences(model: Any, mode: str) -> None:
    with recency_prior(model, mode, 0.2):
        for name in kv_cache.CONTINUOUS_BATCHING:
            with pytest.raises(RouterError, match=f"{name} packs the tokens of all requests"):
                getattr(model, name)([[1, 2]])
        with pytest.raises(RouterError, match="generate_batch packs"):
            model.generate(IDS, cache_implementation="paged", max_new_tokens=2)
    assert not any(name in vars(model) for name in kv_cache.CONTINUOUS_BATCHING)


@pytest.mark.slow
def test_continuous_batching_under_the_resident_prior_is_generate(model: Any) -> None:
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    config = type(model.generation_config)(**settings)
    prompts = [[5, 9, 20, 7, 33], [8, 2, 4, 9, 11, 13, 50]]
    with recency_prior(model, "resident", 2.0) as installed:
        for mask_1E in installed.prior.residency:
            mask_1E[:, ::3] = 1.0
        one_by_one = [model.generate(torch.tensor([ids]), config)[0, len(ids) :].tolist() for ids in prompts]
        batch = model.generate_batch(inputs=prompts, generation_config=config, progress_bar=False)
    assert sorted(made.generated_tokens for made in batch.values()) == sorted(one_by_one)


class Tuples(tuple[Any, ...]):
    """As remote code of older transformers hands its keys and values."""


def test_a_cache_that_cannot_be_followed_is_refused_by_type(model: Any) -> None:
    with recency_prior(model, "ema", 0.2), pytest.raises(RouterError, match="cannot follow a KV cache of type Tuples"):
        model.model(IDS, **kv(Tuples()))
    with recency_prior(model, "ema", 0.2):
        assert model(IDS, **kv(DynamicCache())).logits.shape[1] == IDS.shape[1]
