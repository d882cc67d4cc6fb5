"""The fast path against transformers: every router's own forward and ours, on what the tiny models feed them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from tiny_models import moe_folders, tiny_model
from torch import Tensor
from torch.func import functional_call

from remoe_adapt.gating.router_forward import PlainGate, RouterForward, router_forward
from remoe_adapt.routers.discover import survey_routers
from remoe_adapt.routers.spec import RouterRef, RouterSpec

# Folders whose routers keep their own forward, and a word of the reason; those refused by discovery have no routers.
OWN_FORWARD = {
    "dbrx": "its block chooses",
    "inkling": "joint_shared",
    "jetmoe": "more than a choice: order",
    "phimoe": "sparsemixer",
    "switch_transformers": "capacity",
    "zaya": "more than a choice: masked_ids, state",
}
NO_ROUTERS = {"doge", "nllb_moe"}
# Before this version: a bare Linear whose block chooses, and a router that returns no logits, refused by discovery.
IN_OLDER = {"jamba", "longcat_flash"}
IS_OLDER = Version(transformers.__version__) < Version("5.23")
# Its own forward cannot run with a half-precision weight.
FP32_ONLY = {"inkling2": "same dtype", "inkling2_loop": "same dtype"}


@dataclass
class Architecture:
    """A tiny model with random selection biases, what its routers were called with, and our forward for each."""

    folder: str
    model: torch.nn.Module
    calls: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    covered: list[tuple[RouterRef, RouterForward]] = field(default_factory=list)
    reasons: set[str] = field(default_factory=set)

    def logits(self) -> Tensor:
        tokens = torch.tensor([[5, 17, 3, 44, 60, 9], [71, 12, 33, 8, 28, 90]])
        inputs = {"decoder_input_ids": tokens} if self.model.config.is_encoder_decoder else {}
        return self.model(input_ids=tokens, use_cache=False, **inputs)[0]

    def called(self) -> Iterator[tuple[RouterRef, RouterForward, tuple[Any, ...], dict[str, Any]]]:
        for ref, forward in self.covered:
            if ref.name in self.calls:
                yield ref, forward, *self.calls[ref.name]


@pytest.fixture(scope="module", params=[f for f in moe_folders() if f not in NO_ROUTERS])
def architecture(request: pytest.FixtureRequest) -> Architecture:
    made = Architecture(request.param, tiny_model(request.param))
    handles = []
    for ref in survey_routers(made.model).refs:
        if ref.correction_bias_E is not None:  # zero at initialisation, which would hide a bias that is left out
            ref.correction_bias_E.data.normal_(0, 0.05)

        def record(_module: Any, args: Any, kwargs: Any, name: str = ref.name) -> None:
            made.calls[name] = tuple(x.clone() if isinstance(x, Tensor) else x for x in args), dict(kwargs)

        handles.append(ref.module.register_forward_pre_hook(record, with_kwargs=True))
        own = router_forward(ref)
        if isinstance(own, str):
            made.reasons.add(own)
        else:
            made.covered.append((ref, own))
    with torch.no_grad():
        made.logits()
    for handle in handles:
        handle.remove()
    return made


def by_expert(spec: RouterSpec, output: Any) -> tuple[Tensor, Tensor]:
    """Ids in ascending order and the weights that go with them."""
    out = spec.read(output)
    ids_TK, order_TK = out.ids_TK.sort(dim=-1)
    assert out.weights_TK is not None
    return ids_TK, out.weights_TK.gather(-1, order_TK)


def assert_same(own: tuple[Tensor, Tensor], stock: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(own[0], stock[0])
    torch.testing.assert_close(own[1], stock[1], atol=1e-6, rtol=0)


def test_covers_what_is_listed(architecture: Architecture) -> None:
    if IS_OLDER and architecture.folder in IN_OLDER:
        pytest.skip("another class in this transformers")
    word = OWN_FORWARD.get(architecture.folder)
    if word is None:
        assert not architecture.reasons
        assert architecture.covered
    else:
        assert not architecture.covered
        assert all(word in reason for reason in architecture.reasons)


def test_returns_what_the_stock_forward_returns(architecture: Architecture) -> None:
    for ref, forward, args, kwargs in architecture.called():
        with torch.no_grad():
            stock, own = ref.module(*args, **kwargs), forward(*args, **kwargs)
        assert len(stock) == len(own) == len(ref.spec.returns)
        for name, theirs, ours in zip(ref.spec.returns, stock, own, strict=True):
            assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype), name
            if name not in ("weights", "ids"):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        assert_same(by_expert(ref.spec, own), by_expert(ref.spec, stock))
        if "sorted=False" not in inspect.getsource(type(ref.module)):
            assert torch.equal(ref.spec.read(stock).ids_TK, ref.spec.read(own).ids_TK)


def test_reads_the_live_weight(architecture: Architecture) -> None:
    for ref, forward, args, kwargs in architecture.called():
        other = {ref.spec.weight_name: ref.weight_ED.detach() + 0.3 * torch.randn(ref.weight_ED.shape)}
        with torch.no_grad():
            stock = functional_call(ref.module, other, args, kwargs)
            ref.module.forward = forward
            own = functional_call(ref.module, other, args, kwargs)
            del ref.module.forward
        assert_same(by_expert(ref.spec, own), by_expert(ref.spec, stock))


def test_gradients_are_those_of_the_stock_forward(architecture: Architecture) -> None:
    for ref, forward, args, kwargs in architecture.called():
        grads = []
        for run in (ref.module, forward):
            hidden = args[0].clone().requires_grad_()
            output = run(hidden, *args[1:], **kwargs)
            ids_TK, weights_TK = by_expert(ref.spec, output)
            factors_TK = torch.linspace(-1, 1, ids_TK.numel()).reshape(ids_TK.shape)
            loss = (weights_TK.float() * factors_TK).sum() + 0.1 * ref.spec.read(output).logits_TE.pow(2).sum()
            grads.append(torch.autograd.grad(loss, [hidden, ref.weight_ED]))
        torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


def test_half_precision(architecture: Architecture) -> None:
    """Same dtypes, same logits, and the same experts but where rounding makes scores equal."""
    for ref, _, args, kwargs in architecture.called():
        block = copy.deepcopy(ref.block).to(torch.bfloat16)
        module = block.get_submodule(ref.name.rpartition(".")[2])
        halved = RouterRef(ref.name, module, ref.spec, block)
        forward = router_forward(halved)
        if architecture.folder in FP32_ONLY:
            assert isinstance(forward, str)
            assert FP32_ONLY[architecture.folder] in forward
            continue
        assert isinstance(forward, RouterForward), forward
        args = tuple(x.bfloat16() if isinstance(x, Tensor) else x for x in args)
        with torch.no_grad():
            stock, own = module(*args, **kwargs), forward(*args, **kwargs)
        for name, theirs, ours in zip(ref.spec.returns, stock, own, strict=True):
            assert (theirs.shape, theirs.dtype) == (ours.shape, ours.dtype), name
            if name not in ("weights", "ids", "dense_weights"):
                torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
        (ids_TK, weights_TK), (own_ids_TK, own_weights_TK) = (by_expert(ref.spec, out) for out in (stock, own))
        same_T = (ids_TK == own_ids_TK).all(dim=-1)
        assert same_T.float().mean() >= 0.6
        torch.testing.assert_close(own_weights_TK[same_T], weights_TK[same_T], atol=2e-2, rtol=2e-2)


class CountedGate(PlainGate):
    """The plain gate, counted."""

    calls = 0

    def gate(self, *args: Any) -> tuple[Tensor, Tensor]:
        self.calls += 1
        return super().gate(*args)


def test_the_model_computes_the_same(architecture: Architecture) -> None:
    if not architecture.covered:
        pytest.skip("its routers keep their own forward")
    for training in (False, True):
        architecture.model.train(training)
        results, gates = [], []
        for install in (False, True):
            for ref, forward in architecture.covered:
                if install:
                    gates.append(CountedGate())
                    ref.module.forward, forward.steps = forward, gates[-1]
            torch.manual_seed(3)
            with torch.no_grad():
                results.append(architecture.logits())
        for ref, forward in architecture.covered:
            del ref.module.forward
            forward.steps = PlainGate()
        architecture.model.eval()
        assert sum(gate.calls for gate in gates) == len(architecture.calls)
        torch.testing.assert_close(results[1], results[0], atol=1e-5, rtol=0)
