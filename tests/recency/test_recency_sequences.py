"""Recency follows its sequences: every way to decode equals one scan over the same text."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kv import kv, returned_cache
from recency_support import LONGER, PROMPT, chosen, decode, routing_matters
from transformers import DynamicCache

from remoe_adapt.errors import ConfigError, RouterError
from remoe_adapt.gating.router_forward import RouterForward
from remoe_adapt.recency.install import InstalledPrior, recency_prior
from remoe_adapt.recency.prior import RecencyPrior
from remoe_adapt.routers.discover import discover_routers


@pytest.fixture(scope="module")
def model() -> Any:
    return routing_matters()


@pytest.fixture(params=["ema", "cost"])
def primed(model: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    with recency_prior(model, request.param, 0.4):
        yield model


def test_the_prior_changes_the_choice_and_leaves_with_its_block() -> None:
    model = routing_matters()
    before, text = chosen(model, LONGER), decode(model)
    with recency_prior(model, "ema", 0.4):
        with_prior = chosen(model, LONGER)
        assert torch.equal(with_prior[:, 0], before[:, 0]), "the first token has no past"
        assert not torch.equal(with_prior, before)
        assert not torch.equal(decode(model), text)
        with pytest.raises(RouterError, match="already"):
            InstalledPrior(model, "ema")
    assert torch.equal(chosen(model, LONGER), before) and torch.equal(decode(model), text)
    assert not any("forward" in vars(ref.module) for ref in discover_routers(model))


def test_gain_zero_is_no_prior(model: Any) -> None:
    plain = chosen(model, LONGER)
    with recency_prior(model, "ema", 0.0):
        assert torch.equal(chosen(model, LONGER), plain)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"prompt_lookup_num_tokens": 3},
        {"cache_implementation": "static"},
        {"cache_implementation": "offloaded"},
    ],
    ids=str,
)
def test_every_way_to_decode_equals_decoding_without_a_cache(primed: Any, options: dict[str, Any]) -> None:
    plain = {
        key: value for key, value in options.items() if key not in ("prompt_lookup_num_tokens", "cache_implementation")
    }
    if options.get("cache_implementation") == "offloaded" and not torch.cuda.is_available():
        pytest.skip("offloaded caches need a GPU")
    torch.manual_seed(7)
    with_cache = decode(primed, **options)
    torch.manual_seed(7)
    assert torch.equal(with_cache, decode(primed, use_cache=False, **plain))


def test_a_sequence_continues_with_its_cache(primed: Any) -> None:
    whole = chosen(primed, LONGER)
    cache = DynamicCache(config=primed.config)
    parts = [chosen(primed, LONGER[:, begin:end], **kv(cache)) for begin, end in ((0, 4), (4, 5), (5, 11))]
    assert torch.equal(torch.cat(parts, dim=1), whole)
    # A cache that the model itself made carries the state as well.
    with torch.no_grad():
        made = returned_cache(primed(LONGER[:, :4]))
    assert torch.equal(chosen(primed, LONGER[:, 4:], **kv(made)), whole[:, 4:])


def test_copies_of_a_cache_go_their_own_ways(primed: Any) -> None:
    whole = chosen(primed, LONGER)
    cache = DynamicCache(config=primed.config)
    chosen(primed, LONGER[:, :4], **kv(cache))
    copied = copy.deepcopy(cache)
    other = torch.cat([LONGER[:, :4], PROMPT], dim=1)
    assert torch.equal(chosen(primed, PROMPT, **kv(copied)), chosen(primed, other)[:, 4:])
    assert isinstance(cache, DynamicCache) and isinstance(copied, DynamicCache)
    assert torch.equal(chosen(primed, LONGER[:, 4:], **kv(cache)), whole[:, 4:])


@pytest.mark.parametrize("padded", [False, True])
def test_a_cropped_cache_goes_back(primed: Any, padded: bool) -> None:
    mask = torch.ones_like(LONGER)
    mask[0, :2] = 0 if padded else 1
    cache = DynamicCache(config=primed.config)
    for begin, end in ((0, 6), (6, 9), (9, 10), (10, 11)):
        chosen(primed, LONGER[:, begin:end], **kv(cache), attention_mask=mask[:, :end])
    cache.crop(-4)
    kept = cache.get_seq_length()
    other = torch.cat([LONGER[:, :kept], PROMPT], dim=1)
    whole_mask = torch.cat([mask[:, :kept], torch.ones_like(PROMPT)], dim=1)
    again = chosen(primed, PROMPT, **kv(cache), attention_mask=whole_mask)
    assert torch.equal(again, chosen(primed, other, attention_mask=whole_mask)[:, kept:])


def test_a_long_history_is_cropped_to_the_bit() -> None:
    """Beyond what decay remembers, and beyond the joining of single steps."""
    prior = RecencyPrior("ema", [(torch.device("cpu"), 16)], decay=0.7)
    torch.manual_seed(0)
    ids_SBK = torch.stack([torch.stack([torch.randperm(16)[:4] for _ in range(2)]) for _ in range(600)])

    def after(count: int) -> Any:
        state = prior.new_state(2)
        for ids_BK in ids_SBK[:count]:
            state.advance(1, None)[0] = ids_BK[:, None]
            state.recency[0].mul_(0.7).scatter_add_(-1, ids_BK, torch.full((2, 4), 1.0 - 0.7))
        return state

    long, short = after(600), after(333)
    long.crop(333)
    assert long.length == short.length == 333
    torch.testing.assert_close(long.recency[0], short.recency[0], rtol=1e-6, atol=1e-9)


def test_batch_operations_of_the_cache_reach_the_recency(primed: Any) -> None:
    cache = DynamicCache(config=primed.config)
    batch = torch.cat([LONGER[:, :6], PROMPT])
    chosen(primed, batch, **kv(cache))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    found = chosen(primed, PROMPT.expand(2, -1), **kv(cache))
    whole = chosen(primed, torch.cat([batch, PROMPT.expand(2, -1)], dim=1))
    layers, _, k = whole.shape
    rows = whole.reshape(layers, 2, -1, k)[:, :, batch.shape[1] :]
    assert torch.equal(found.reshape(layers, 2, -1, k), rows)


def test_a_reset_cache_starts_anew(primed: Any) -> None:
    cache = DynamicCache(config=primed.config)
    first = chosen(primed, LONGER, **kv(cache))
    cache.reset()
    assert torch.equal(chosen(primed, LONGER, **kv(cache)), first)


def test_gradient_checkpointing_sees_the_same_choice() -> None:
    """Layers run again in backward: after forwards of other texts, and after an evaluation."""
    grads = []
    for checkpointing in (False, True):
        model = routing_matters()
        if checkpointing:
            # The first name since transformers 5.20.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        model.train()
        with recency_prior(model, "ema", 0.4):
            losses = [model(ids, labels=ids, use_cache=False).loss for ids in (LONGER, PROMPT)]
            with torch.no_grad():
                model(LONGER[:, :9])
            sum(losses).backward()
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(grads[0]) == len(grads[1]) > 0
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_a_copied_model_has_its_own_prior(model: Any) -> None:
    with recency_prior(model, "ema", 0.4):
        twin = copy.deepcopy(model)
        expected = chosen(model, LONGER)
    assert torch.equal(chosen(twin, LONGER), expected)
    mine = {ref.module.__dict__["forward"].module for ref in discover_routers(twin)}
    assert mine == {ref.module for ref in discover_routers(twin)}


@pytest.mark.parametrize(
    ("mode", "gain", "decay", "what"),
    [
        ("recent", 0.1, 0.5, "recent"),
        ("ema", -1.0, 0.5, "gain -1"),
        ("ema", 0.1, 1.0, "decay 1"),
        ("ema", [0.1], 0.5, "1 recency gains for 4"),
        ("ema", [0.1, 0.2, 0.3, "x"], 0.5, "gain 'x'"),
        ("ema", None, 0.5, "gain None"),
        ("ema", float("nan"), 0.5, "gain nan"),
    ],
)
def test_bad_values_leave_the_model_alone(model: Any, mode: str, gain: Any, decay: float, what: str) -> None:
    with pytest.raises(ConfigError, match=what), recency_prior(model, mode, gain, decay):
        pass
    assert not any(isinstance(vars(ref.module).get("forward"), RouterForward) for ref in discover_routers(model))


def test_a_forward_that_fails_leaves_the_sequence_alone(primed: Any) -> None:
    whole = chosen(primed, LONGER)
    cache = DynamicCache(config=primed.config)
    chosen(primed, LONGER[:, :4], **kv(cache))
    kept = copy.deepcopy(cache)

    def fail(*_: Any) -> None:
        raise KeyError("out of luck")

    for place, again in (("embed_tokens", cache), ("layers.0.mlp", kept), ("layers.2.mlp", kept)):
        for count in (1, 3):
            failing = cache if place == "embed_tokens" else copy.deepcopy(kept)
            handle = primed.model.get_submodule(place).register_forward_pre_hook(fail)
            with pytest.raises(KeyError, match="luck"), torch.no_grad():
                primed(LONGER[:, 4 : 4 + count], **kv(failing))
            handle.remove()
        assert torch.equal(chosen(primed, LONGER), whole)
        assert torch.equal(chosen(primed, LONGER[:, 4:], **kv(copy.deepcopy(again))), whole[:, 4:])


def test_residency_is_what_a_cache_writes(model: Any) -> None:
    plain = chosen(model, LONGER)
    with recency_prior(model, "resident", 10.0) as installed:
        assert torch.equal(chosen(model, LONGER), plain), "nothing is resident yet"
        for mask_1E in installed.prior.residency:
            mask_1E[0, [1, 6]] = 1.0
        assert set(chosen(model, LONGER).flatten().tolist()) == {1, 6}
        assert set(chosen(model, LONGER).flatten().tolist()) == {1, 6}, "reading it changes nothing"


@pytest.mark.parametrize("kept", [2, 5, 270])
def test_a_router_that_is_not_asked_stands_still(kept: int) -> None:
    """Early exits and experts of another modality leave gaps in the history that `crop` goes back over."""
    prior = RecencyPrior("ema", [(torch.device("cpu"), 8)] * 3, decay=0.7)
    state = prior.new_state(2)
    torch.manual_seed(0)
    for token in range(280):
        if token == kept:
            expected = [recency_BE.clone() for recency_BE in state.recency]
        chosen = state.advance(1, None)
        for layer in (0, 1) if token % 3 else (0,):  # router 2 never, router 1 now and then
            chosen[layer] = ids_BK = torch.stack([torch.randperm(8)[:2] for _ in range(2)])
            state.recency[layer].mul_(0.7).scatter_add_(-1, ids_BK, torch.full((2, 2), 1.0 - 0.7))
    state.crop(kept)
    for found_BE, expected_BE in zip(state.recency, expected, strict=True):
        torch.testing.assert_close(found_BE, expected_BE, rtol=1e-6, atol=1e-9)


def test_an_early_exit_that_drafts_equals_plain_decoding(primed: Any) -> None:
    assert torch.equal(decode(primed, assistant_early_exit=2), decode(primed))
