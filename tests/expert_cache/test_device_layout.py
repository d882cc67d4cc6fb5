"""The experts' kernels on slots: loaded as for a GPU, on a device that is none, by the kernels' definition."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_streams import FakeStreams, tier_over
from prefetch_support import always, decoded
from quantised_checkpoints import reference, save_quantised
from remoe_adapt.triton_kernels.experts_reference import experts_reference
from remoe_adapt.triton_kernels.slots import Activation
from tiny_checkpoints import save_tiny, stock
from tiny_models import tiny_model
from torch import Tensor, nn

from remoe_adapt import load_with_expert_cache
from remoe_adapt.expert_cache import activations, load, pack_experts
from remoe_adapt.expert_cache.activations import Activations, activation_of
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.device_layout import DeviceLayout, SlotKernels
from remoe_adapt.expert_cache.device_pool import ABSENT, DeviceSlot
from remoe_adapt.expert_cache.experts import arithmetic_of
from remoe_adapt.expert_cache.plan import experts_modules

IDS = torch.randint(3, 96, (1, 10), generator=torch.Generator().manual_seed(0))
Load = Callable[..., Any]


class Counting:
    """The definition of the kernels, and how often it was called."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, *args: Any) -> Tensor | None:
        self.calls += 1
        return experts_reference(*args)


@pytest.fixture
def kernels() -> Counting:
    return Counting()


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch, kernels: Counting) -> Load:
    """Loads as for a GPU; `exact`: with the model's own arithmetic there."""

    def make(store: Any, budget: int, *, device: object, ram_budget_bytes: int | None, **options: Any) -> ExpertCache:
        store.layout.place(None)
        below = ExpertCache(store, ram_budget_bytes or store.total_bytes)
        return tier_over(below, budget, FakeStreams(), **options)

    def load_so(path: Path, budget: float = 0.4, *, exact: bool = False, **options: Any) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(load, "make_cache", make)
            patched.setattr(load, "kernels_for", lambda *_: None if exact else SlotKernels("reference", kernels))
            return load_with_expert_cache(path, budget, **options)

    return load_so


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


@pytest.mark.parametrize("name", ["qwen2_moe", "mixtral", "deepseek_v3", "gpt_oss"])
def test_floats_within_every_budget(name: str, tmp_path: Path, loaded: Load, kernels: Counting) -> None:
    folder = save_tiny(tmp_path / name, name)
    expected = decoded(stock(folder), IDS)
    with torch.no_grad():
        whole = stock(folder)(input_ids=IDS).logits
    model = loaded(folder, ram_budget=0.6, prefetch=True)
    always(model)
    cache = model.expert_cache
    assert arithmetic_of(model) == {"name": "float by reference", "exact": False}
    for share in (0.4, 0.15, 1.0):
        cache.resize(int(share * cache.source.below.source.total_bytes))
        assert error(decoded(model, IDS), expected) < 1e-5
        with torch.inference_mode():
            # Several tokens, whose experts come in groups where the budget does not hold all of them.
            assert error(model(input_ids=IDS).logits, whole) < 1e-5
        assert cache.resident_bytes <= cache.budget_bytes
    assert kernels.calls > 0 and cache.stats()["prefetched"] > 0


def test_hits_are_computed_before_misses_are_waited_for(
    tmp_path: Path, loaded: Load, kernels: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny(tmp_path / "m", "qwen2_moe")
    expected = decoded(stock(folder), IDS)
    model = loaded(folder, 0.4)
    streams = model.expert_cache.source.pools.streams
    turns: list[tuple[int, bool]] = []

    def forward(x_TD: Tensor, slots_TC: Tensor, *args: Any) -> Tensor | None:
        # The last argument of a first turn says so; what is waited for by then are the copies of earlier look-ups.
        turns.append((len(streams.waits), args[-1] is not False))
        if args[-1] is False:
            # A miss is no slot yet; in the second turn a hit is none any more.
            assert (slots_TC >= 0).any() and (slots_TC == ABSENT).any()
        return experts_reference(x_TD, slots_TC, *args)

    monkeypatch.setattr(kernels, "__class__", type("Turns", (Counting,), {"__call__": staticmethod(forward)}))
    assert error(decoded(model, IDS), expected) < 1e-5
    first = [at for at, (_, is_last) in enumerate(turns) if not is_last]
    assert first and all(turns[at + 1] == (turns[at][0] + 1, True) for at in first), "one wait between the turns"


@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_exact_on_slots_is_the_stock_model(name: str, tmp_path: Path, loaded: Load, kernels: Counting) -> None:
    folder = save_tiny(tmp_path / name, name)
    expected = decoded(stock(folder), IDS)
    model = loaded(folder, exact=True)
    for share in (0.4, 0.15):
        model.expert_cache.resize(share)
        assert torch.equal(decoded(model, IDS), expected)
    assert kernels.calls == 0 and arithmetic_of(model)["exact"]
    with model.expert_cache.lease(0, [1]) as lease:
        assert isinstance(lease.slots[1], DeviceSlot)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss"])
def test_gradients_are_the_stock_models(name: str, exact: bool, tmp_path: Path, loaded: Load) -> None:
    folder = save_tiny(tmp_path / name, name)
    gradients = []
    for model in (stock(folder), loaded(folder, 0.15, exact=exact)):
        weight = next(p for n, p in model.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight")))
        weight.requires_grad_()
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append(weight.grad)
    assert gradients[0].abs().sum() > 0
    if name == "qwen2_moe":
        assert torch.equal(*gradients)
    else:  # its matrices lie the other way round for the kernels, and products of such have other last bits
        assert error(gradients[1], gradients[0]) < 1e-4


METHODS = [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8"), ("qwen2_moe", "gptq"), ("qwen2_moe", "awq")]


@pytest.mark.parametrize(("name", "method"), METHODS)
def test_codes_stay_codes(name: str, method: str, tmp_path: Path, loaded: Load, kernels: Counting) -> None:
    folder = save_quantised(tmp_path / "q", name, method)
    whole = reference(folder)
    floats = sum(param.nbytes for m in experts_modules(whole).values() for param in m.parameters(recurse=False))
    model = loaded(folder, dtype="float32")
    expected = decoded(load_with_expert_cache(folder, 1.0, arithmetic="exact", dtype="float32"), IDS)
    cache = model.expert_cache
    for share in (0.4, 1.0):
        cache.resize(int(share * cache.source.below.source.total_bytes))
        assert error(decoded(model, IDS), expected) < 1e-2
    assert kernels.calls > 0 and cache.below.source.total_bytes < 0.7 * floats
    exact = loaded(folder, exact=True)
    assert torch.equal(decoded(exact, IDS), decoded(whole, IDS))


@pytest.mark.parametrize("bits", [None, 4, 8])
def test_packs(bits: int | None, tmp_path: Path, loaded: Load, kernels: Counting) -> None:
    folder = save_tiny(tmp_path / "model", "gpt_oss", hidden_size=64, intermediate_size=32)
    pack_experts(folder, tmp_path / "pack", bits=bits)
    expected = decoded(load_with_expert_cache(folder, 1.0, arithmetic="exact", storage=tmp_path / "pack"), IDS)
    model = loaded(folder, storage=tmp_path / "pack")
    assert error(decoded(model, IDS), expected) < 1e-3 and kernels.calls > 0
    exact = loaded(folder, exact=True, storage=tmp_path / "pack")
    assert error(decoded(exact, IDS), expected) < 1e-6


def test_what_the_kernels_do_not_know_is_computed_by_the_model(
    tmp_path: Path, loaded: Load, kernels: Counting, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, logger="remoe_adapt")
    folder = save_tiny(tmp_path / "model", "qwen2_moe", hidden_act="quick_gelu")
    model = loaded(folder, 0.2)
    assert torch.equal(decoded(model, IDS), decoded(stock(folder), IDS)) and kernels.calls == 0
    assert caplog.text.count("the kernels do not know what its experts compute") == 1
    # Columns in an order of their own.
    ordered = save_quantised(tmp_path / "q", "qwen2_moe", "gptq", desc_act=True)
    model = loaded(ordered, dtype="float32")
    expected = decoded(load_with_expert_cache(ordered, 1.0, arithmetic="exact", dtype="float32"), IDS)
    assert error(decoded(model, IDS), expected) < 1e-2 and kernels.calls == 0
    assert "the kernels do not read the codes of gate_up_proj, down_proj" in caplog.text


def test_ids_that_are_no_experts_count_nothing(tmp_path: Path, loaded: Load) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    model, plain = loaded(folder), stock(folder)
    name = model.expert_cache.source.layers[0]
    rows, expected = model.get_submodule(name), plain.get_submodule(name)
    count = model.expert_cache.source.num_experts[0]
    hidden_TD = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    ids_TK, weights_TK = torch.tensor([[0, count], [count, count], [2, 1]]), torch.rand(3, 2)
    with torch.no_grad():
        assert error(rows(hidden_TD, ids_TK, weights_TK), expected(hidden_TD, ids_TK, weights_TK)) < 1e-5
        assert not rows(hidden_TD, torch.full((3, 2), count), weights_TK).any()


ACTIVATIONS = {
    "qwen2_moe": Activation(),
    "gpt_oss": Activation(alpha=1.702, limit=7.0, shift=1.0, interleaved=True),
}


@pytest.mark.parametrize("name", list(ACTIVATIONS))
def test_activations_are_found(name: str) -> None:
    (module, *_) = experts_modules(tiny_model(name)).values()
    assert activation_of(module) == ACTIVATIONS[name]


def test_layers_that_are_alike_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[nn.Module] = []

    def counted(module: nn.Module) -> Activation | None:
        tried.append(module)
        return activation_of(module)

    monkeypatch.setattr(activations, "activation_of", counted)
    known, modules = Activations(), list(experts_modules(tiny_model("gpt_oss")).values())
    assert len(modules) > 1 and {known.of(module) for module in modules} == {ACTIVATIONS["gpt_oss"]}
    assert len(tried) == 1
    # Another limit, and another class, are another activation.
    other: Any = modules[1]
    other.limit = 3.0
    assert known.of(other) == replace(ACTIVATIONS["gpt_oss"], limit=3.0)
    (plain, *_) = experts_modules(tiny_model("qwen2_moe")).values()
    assert known.of(plain) == Activation() and len(tried) == 3


def test_activations_that_look_alike_are_not_taken_for_one_another() -> None:
    class Experts(nn.Module):
        has_gate, has_post_expert_norm = True, False

        def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.function = function

        def _apply_gate(self, rows: Tensor) -> Tensor:
            gate, up = rows.chunk(2, dim=-1)
            return self.function(gate) * up

    assert activation_of(Experts(nn.functional.gelu)) == Activation(function="gelu")
    tanh: Callable[[Tensor], Tensor] = nn.GELU(approximate="tanh")
    assert activation_of(Experts(tanh)) == Activation(function="gelu_tanh")
    assert activation_of(Experts(torch.relu)) == Activation(function="relu")
    assert activation_of(Experts(lambda gate: torch.relu(gate) ** 2)) is None
    assert activation_of(Experts(torch.sigmoid)) is None
    normed = Experts(nn.functional.silu)
    normed.has_post_expert_norm = True
    assert activation_of(normed) is None


def test_memory_that_is_given_back_reaches_every_pool(tmp_path: Path, loaded: Load) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    model = loaded(folder, 1.0)
    cache = model.expert_cache
    decoded(model, IDS)
    store = cache.below.source
    assert isinstance(store.layout, DeviceLayout) and store.layout.places is not None
    pools = list(store.layout.places.pools.pools.values())
    cache.below.resize(max(store.expert_bytes))
    assert len(cache.below.resident()) <= 1 and all(pool.free_bytes == 0 for pool in pools)
