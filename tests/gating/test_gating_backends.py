"""One choice of backend, obeyed everywhere: by name or from outside, at once or in compiled graphs, on any device."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import DEVICE, bias_of, copied, hard_logits, prior_of, spec_of
from torch import Tensor

from remoe_adapt.errors import ConfigError
from remoe_adapt.gating.backend import set_backend
from remoe_adapt.gating.ops import fused_gating, fused_route, gate_of
from remoe_adapt.recency.prior import RecencyPrior
from remoe_adapt.recency.tokens import IdleTokens, SingleToken

# By its full name: the face has the function `backend` under the name of this module.
backends = importlib.import_module("remoe_adapt.gating.backend")

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(backends.ENVIRONMENT, raising=False)
    importlib.reload(backends)
    yield
    monkeypatch.undo()
    importlib.reload(backends)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that ran; without a GPU they run on the CPU, interpreted."""
    from remoe_adapt.triton_kernels import gate, route, scan

    ran: list[str] = []

    def counted(module: Any, name: str) -> None:
        launch = getattr(module, name)

        def run(*args: Any, **named: Any) -> Any:
            ran.append(name)
            return launch(*args, **named)

        monkeypatch.setattr(module, name, run)

    for module, name in ((gate, "launch_gate"), (route, "launch_route"), (scan, "launch_scan")):
        counted(module, name)
    monkeypatch.setattr(backends, "_DEVICES", (DEVICE,))
    return ran


def force(how: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "call":
        set_backend(name)
    else:
        monkeypatch.setenv(backends.ENVIRONMENT, name)
        devices = backends._DEVICES
        importlib.reload(backends)
        monkeypatch.setattr(backends, "_DEVICES", devices)


@pytest.mark.parametrize("how", ["call", "environment"])
@pytest.mark.parametrize("compiled", [False, True])
def test_the_forced_backend_is_obeyed(
    how: str, compiled: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = spec_of("sigmoid_group", 8)
    assert spec is not None
    bias_E = bias_of(spec)
    prior = prior_of("ema", 6, 8, 0, flagged=False, rows=2)
    assert prior is not None
    weight_ED = torch.randint(-2, 3, (8, 16), device=DEVICE).float()

    def run(logits_TE: Tensor, hidden_TD: Tensor) -> tuple[Tensor, ...]:
        one_each = gate_of(logits_TE.device)(logits_TE, 2, spec, None, bias_E=bias_E)
        several = gate_of(logits_TE.device)(logits_TE, 2, spec, prior, bias_E=bias_E)
        routed = fused_route(hidden_TD, weight_ED, 2, spec, None, bias_E=bias_E)
        return *one_each, *several, *routed, *fused_gating(logits_TE, 2, spec, None, bias_E)

    logits_TE, hidden_TD = hard_logits(6, 8, torch.float32, 0), torch.randint(-2, 3, (3, 16), device=DEVICE).float()
    torch._dynamo.reset()
    call = torch.compile(run, backend="eager", fullgraph=True) if compiled else run
    started = prior.recency_BE.clone()
    results = []
    for name, kernels in (("torch", False), ("auto", True), ("triton", True), ("torch", False)):
        force(how, name, monkeypatch)
        prior.recency_BE.copy_(started)
        launches.clear()
        results.append(call(logits_TE, hidden_TD))
        assert set(launches) == ({"launch_gate", "launch_scan", "launch_route"} if kernels else set())
    torch._dynamo.reset()
    for result in results[1:]:
        for found, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("how", ["call", "environment"])
@pytest.mark.parametrize("name", ["auto", "torch"])
def test_a_forced_backend_keeps_the_short_ways(how: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token on a CPU, and routers at rest: both are torch anyway."""
    force(how, name, monkeypatch)
    prior = RecencyPrior("ema", [(torch.device("cpu"), 8)])
    spec = spec_of("softmax", 8)
    assert spec is not None
    prior.begin(1, 1, None, prior.new_state(1))
    assert isinstance(prior.step_of(1), IdleTokens) and prior.step_of(2) is None
    prior.end()
    prior.set_gains(0.3)
    prior.begin(1, 1, None, state := prior.new_state(1))
    step = prior.step_of(1)
    assert isinstance(step, SingleToken)
    ids_TK = step.gate(0, torch.randn(1, 8), 2, spec, None)[1]
    assert not state.recency[0].any(), "the gate of one token leaves the recency to the end of the forward"
    prior.end()
    assert set(state.recency[0].nonzero()[:, 1].tolist()) == set(ids_TK.flatten().tolist())


def test_auto_is_no_force_from_wherever_it_comes(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    expected = backends.explain(device)
    for how in ("call", "environment"):
        for name in ("torch", "auto"):
            force(how, name, monkeypatch)
            assert (backends.explain(device) == expected) == (name == "auto")
    force("environment", "", monkeypatch)
    assert backends.explain(device) == expected


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bad_backend_is_named(compiled: bool, launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"'cuda'.*auto, torch, triton"):
        set_backend("cuda")
    force("environment", "cuda", monkeypatch)
    spec = spec_of("softmax", 8)
    assert spec is not None

    def run(logits_TE: Tensor) -> Tensor:
        return gate_of(logits_TE.device)(logits_TE, 2, spec, copied(None), None)[1]

    torch._dynamo.reset()
    with pytest.raises(ConfigError, match=r"'cuda'.*auto, torch, triton"):
        (torch.compile(run, backend="eager") if compiled else run)(torch.zeros(2, 8))
    torch._dynamo.reset()
    assert not launches
