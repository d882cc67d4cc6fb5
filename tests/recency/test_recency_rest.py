"""A dial at rest: routers answer for themselves, and what they used is taken in when somebody asks."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from kv import kv
from recency_support import LONGER, PROMPT, chosen, routing_matters
from torch import Tensor
from transformers import DynamicCache

from remoe_adapt.gating.reference import PriorStep, topk_gating
from remoe_adapt.gating.router_forward import RouterForward
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.recency.prior import RecencyPrior
from remoe_adapt.recency.sequences import _STATE
from remoe_adapt.recency.state import RecencyState, _pass_over
from remoe_adapt.routers.discover import discover_routers
from remoe_adapt.routers.spec import RouterSpec


def cpu_prior(mode: str = "ema") -> RecencyPrior:
    return RecencyPrior(mode, [(torch.device("cpu"), 8)] * 3, decay=0.7)


def one_by_one(model: Any, cache: Any, ids: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [model(ids[:, t : t + 1], **kv(cache)).logits for t in range(ids.shape[1])]


def test_at_rest_a_decode_step_is_answered_by_the_class(monkeypatch: pytest.MonkeyPatch) -> None:
    model = routing_matters()
    plain = one_by_one(model, DynamicCache(config=model.config), LONGER)
    router_class, calls = type(discover_routers(model)[0].module), []
    stock = router_class.forward

    def counted(module: Any, *args: Any, **named: Any) -> Any:
        calls.append(module)
        return stock(module, *args, **named)

    with recency_prior(model, "ema", 0.0) as installed:
        forwards = [vars(ref.module)["forward"] for ref in discover_routers(model)]
        for forward in forwards:
            assert isinstance(forward, RouterForward)
            monkeypatch.setattr(forward, "_stock", counted)
        found = one_by_one(model, cache := DynamicCache(config=model.config), LONGER)
        assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))
        assert calls == [forward.module for forward in forwards] * LONGER.shape[1]
        installed.set_gains([0.4, 0.0, 0.0, 0.0])
        one_by_one(model, cache, PROMPT)
        assert len(calls) == len(forwards) * LONGER.shape[1], "one gain above 0 and the gate chooses everywhere"


@pytest.mark.parametrize("mode", ["ema", "last", "cost"])
@pytest.mark.parametrize("gaps", [False, True])
def test_a_long_rest_is_taken_in_as_if_at_once(mode: str, gaps: bool) -> None:
    """More tokens than are kept waiting, and than are remembered."""
    torch.manual_seed(0)
    prior = cpu_prior(mode)
    late, at_once = prior.new_state(1), prior.new_state(1)
    kept: list[Tensor] = []
    for token in range(700):
        layers = (0, 2) if gaps and token % 7 == 3 else (0, 1, 2)
        used = {layer: torch.randperm(8)[None, :2] for layer in layers}
        late.add(used, 1, None)
        at_once.move(used)
        if token == 649:
            kept = [recency_1E.clone() for recency_1E in at_once.recency]
    assert late.length == at_once.length == 700
    assert_alike(late, at_once.recency)
    for state in (late, at_once):
        state.crop(650)
        assert_alike(state, kept)


def assert_alike(state: RecencyState, recency: list[Tensor]) -> None:
    for found_BE, expected_BE in zip(state.recency, recency, strict=True):
        torch.testing.assert_close(found_BE, expected_BE, rtol=1e-6, atol=1e-9)


def test_tokens_that_ran_without_the_prior_leave_a_gap() -> None:
    model = routing_matters()
    with recency_prior(model, "ema", 0.4) as installed:
        whole = chosen(model, LONGER)
        cache = DynamicCache(config=model.config)
        one_by_one(model, cache, LONGER[:, :5])
        before = [recency_1E.clone() for recency_1E in getattr(cache, _STATE).recency]
        installed.enable(False)
        one_by_one(model, cache, PROMPT)
        installed.enable(True)
        one_by_one(model, cache, PROMPT[:, :1])
        state = copy.deepcopy(cache).remoe_recency
        assert state.length == cache.get_seq_length() == 5 + PROMPT.shape[1] + 1
        state.crop(5 + PROMPT.shape[1])
        assert_alike(state, before)
        cache.crop(-1 - PROMPT.shape[1])
        assert torch.equal(chosen(model, LONGER[:, 5:], **kv(cache)), whole[:, 5:])


def test_a_step_that_fails_at_rest_leaves_the_sequence_alone() -> None:
    model = routing_matters()
    whole = chosen(model, LONGER)

    def fail(*_: Any) -> None:
        raise KeyError("out of luck")

    with recency_prior(model, "ema", 0.0) as installed:
        cache = DynamicCache(config=model.config)
        one_by_one(model, cache, LONGER[:, :4])
        handle = model.model.embed_tokens.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="luck"):
            one_by_one(model, cache, LONGER[:, 4:5])
        handle.remove()
        assert torch.equal(chosen(model, LONGER[:, 4:], **kv(cache)), whole[:, 4:])
        assert getattr(cache, _STATE).length == LONGER.shape[1]
        installed.set_gains(0.4)
        expected = chosen(model, LONGER)
        cache.crop(1 - LONGER.shape[1])
        assert torch.equal(chosen(model, LONGER[:, 1:], **kv(cache)), expected[:, 1:])


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copied_prior_reads_its_own_gains(how: str) -> None:
    prior = cpu_prior()
    other = copy.deepcopy(prior) if how == "deepcopy" else pickle.loads(pickle.dumps(prior))  # noqa: S301
    prior.set_gains(0.5)
    assert not prior.is_idle() and prior.gains_read() == [0.5] * 3
    assert other.gains_read() in ([], [0.0] * 3), "nothing is read, or its own"
    other.set_gains(0.25)
    assert not other.is_idle() and other.gains_read() in ([], [0.25] * 3)
    assert prior.gains_read() == [0.5] * 3


def test_gains_are_read_whoever_wrote_them() -> None:
    prior = cpu_prior()
    assert prior.is_idle()
    with torch.inference_mode():
        prior.gains[1].copy_(torch.tensor(0.5))
    assert prior.gains_read() == [0.0, 0.5, 0.0]
    with torch.no_grad():
        torch._foreach_copy_(prior.gains, [torch.tensor(0.125)] * 3)
    assert prior.gains_read() == [0.125] * 3
    prior.place([torch.device("cpu")] * 3)
    prior.gains[2].fill_(0.25)
    assert prior.gains_read() == [0.125, 0.125, 0.25] and not prior.is_idle()
    prior.set_gains(0.0)
    assert prior.is_idle()


def test_gains_that_nobody_wrote_are_not_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """On an accelerator every reading would wait for all that is queued."""
    prior = cpu_prior()
    prior.set_gains([0.0, 0.5, 0.0])

    def fail(_: Any) -> None:
        raise AssertionError("a gain was read back")

    monkeypatch.setattr(Tensor, "__float__", fail)
    monkeypatch.setattr(Tensor, "item", fail)
    assert not prior.is_idle() and prior.gains_read() == [0.0, 0.5, 0.0]
    for gain in prior.gains:
        gain.fill_(0.0)
    prior.know([0.0] * 3)
    assert prior.is_idle()
    prior.gains[0].fill_(1.0)
    with pytest.raises(AssertionError, match="read back"):
        prior.is_idle()


def test_who_asks_between_resting_steps_sees_what_came_before() -> None:
    prior = cpu_prior()
    state = prior.new_state(1)
    ids_1K = torch.tensor([[1, 2]])
    state.add(dict.fromkeys(range(3), ids_1K), 1, None)
    prior.begin(1, 1, None, state)
    assert state.recency[0][0, [1, 2]].tolist() == pytest.approx([0.3, 0.3]) and state.length == 1
    step = prior.step_of(1)
    assert step is not None and step.gate is None
    step.note(0, ids_1K)
    prior.end()
    assert state.length == 2 and state.recency[0][0, 1].item() == pytest.approx(0.51)
    assert state.recency[1][0, 1].item() == pytest.approx(0.3), "this one was not asked"


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_many_tokens_at_once_are_those_one_by_one(decay: float) -> None:
    """With padding, restarts, padding that restarts, and tokens for which a router was not asked."""
    torch.manual_seed(0)
    flags_BS = torch.tensor([[1, 1, 0, 0, 2, 0, 1, 0, 3, 0], [0, 2, 0, 1, 0, 0, 3, 1, 1, 1]], dtype=torch.uint8)
    ids_BSK = torch.stack([torch.stack([torch.randperm(8)[:2] for _ in range(10)]) for _ in range(2)])
    for flagged in (None, flags_BS):
        at_once = torch.rand(2, 8)
        expected = at_once.clone()
        for s in range(10):
            logits_BE = torch.zeros(2, 8).scatter_(-1, ids_BSK[:, s], 1.0)
            flags_B = None if flagged is None else flagged[:, s]
            spec = RouterSpec(scoring="softmax", num_experts=8, top_k=2, hidden_size=1, weight_name="", num_rows=8)
            topk_gating(logits_BE, 2, spec, PriorStep(expected, torch.zeros(()), decay, flags_B))
        _pass_over(at_once, ids_BSK, decay, flagged)
        torch.testing.assert_close(at_once, expected)
    before = torch.rand(2, 8)
    ids_BSK[1] = -1
    after = before.clone()
    _pass_over(after, ids_BSK, decay, None)
    assert torch.equal(after[1], before[1]) and not torch.equal(after[0], before[0])
