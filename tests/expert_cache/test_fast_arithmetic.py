"""Experts computed on their codes: within the tolerance of the exact arithmetic, in every case that a layer may be."""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from block_packs import pack_in
from kv import kv
from quantised_checkpoints import save_quantised
from tiny_checkpoints import save_tiny
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, DynamicCache

from remoe_adapt import load_with_expert_cache
from remoe_adapt.errors import ConfigError, MissingDependencyError
from remoe_adapt.evaluation.shipped import example_folder, held_out
from remoe_adapt.expert_cache.encodings import DECODED, Ggml, block_type, ggml, torch_int4
from remoe_adapt.expert_cache.load import pack_experts

# Experts in two halves; transposed, interleaved and with biases; without a gate.
ARCHITECTURES = ("qwen2_moe", "gpt_oss", "nemotron_h")
KINDS = sorted((kind.name for kind in DECODED), key=lambda name: block_type(name).number)
# What rounded activations may cost one layer of random weights, with one product and with two.
ONCE, TWICE, FLOATS = 2e-2, 1e-3, 1e-2
EXPERTS = 8


@pytest.fixture(scope="module")
def kernels() -> Ggml:
    found = ggml()
    if found is None:
        pytest.skip("no kernels for codes here (extra: llamacpp)")
    return found


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("floats")
    return {name: save_tiny(root / name, name, num_hidden_layers=2) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def packs(folders: dict[str, Path], kernels: Ggml, tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("packs")

    def pack(architecture: str, kind: str) -> Path:
        out = root / f"{architecture}.{kind}"
        return out if out.is_dir() else pack_in(block_type(kind), kernels, folders[architecture], out)

    return pack


def experts(model: Any) -> list[Any]:
    """Its experts modules."""
    return [module for module in model.modules() if "cached_experts" in vars(module)]


def tokens(count: int, hidden: int, choices: int = 3, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, distinct experts of each, and their weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, EXPERTS, generator=generator).argsort(1)[:, :choices]
    return torch.randn(count, hidden, generator=generator), ids, torch.rand(count, choices, generator=generator)


def hidden_of(model: Any) -> int:
    return int(model.config.hidden_size)


def off(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def assert_near(fast: Any, exact: Any, tolerance: float, counts: tuple[int, ...] = (1, 7, 200)) -> None:
    """Every layer of the two models computes nearly the same, for so many tokens each."""
    for module, reference in zip(experts(fast), experts(exact), strict=True):
        for count in counts:
            inputs = tokens(count, hidden_of(exact))
            with torch.no_grad():
                found, expected = module(*inputs), reference(*inputs)
            # Many tokens of one expert are computed with its dequantised weights.
            assert off(found, expected) < tolerance, count


def tolerance_of(kind: str) -> float:
    values = block_type(kind).values
    return FLOATS if values == 1 else TWICE if values == 256 else ONCE


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_layers_of_every_block_type(architecture: str, kind: str, folders: dict[str, Path], packs: Any) -> None:
    options: dict[str, Any] = {"storage": packs(architecture, kind), "dtype": torch.float32}
    exact = load_with_expert_cache(folders[architecture], 1.0, arithmetic="exact", **options)
    fast = load_with_expert_cache(folders[architecture], 1.0, arithmetic="fast", **options)
    assert fast.expert_cache.arithmetic == f"{kind} by ggml, fast"
    assert_near(fast, exact, tolerance_of(kind))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_budget_of_one_expert(architecture: str, folders: dict[str, Path], packs: Any) -> None:
    options: dict[str, Any] = {"storage": packs(architecture, "q8_0"), "dtype": torch.float32, "arithmetic": "fast"}
    whole = load_with_expert_cache(folders[architecture], 1.0, **options)
    least = load_with_expert_cache(folders[architecture], 1.0, **options)
    least.expert_cache.resize(max(least.expert_cache.source.expert_bytes))
    # Pairs of a token and an expert are computed alone: the same products, summed in another order.
    assert_near(least, whole, 1e-5, counts=(1, 7))
    assert_near(least, whole, ONCE, counts=(200,))


@pytest.mark.parametrize("count", [1, 7, 200])
def test_null_experts_add_nothing(count: int, folders: dict[str, Path], packs: Any) -> None:
    model = load_with_expert_cache(
        folders["qwen2_moe"], 1.0, storage=packs("qwen2_moe", "q4_1"), dtype=torch.float32, arithmetic="fast"
    )
    hidden, ids, weights = tokens(count, hidden_of(model))
    nulls = torch.rand(ids.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    nulls[0, :2] = torch.tensor([True, False])
    (module, *_) = experts(model)
    with torch.no_grad():
        for null in (EXPERTS, EXPERTS + 5):
            found = module(hidden, ids.masked_fill(nulls, null), weights)
            assert off(found, module(hidden, ids, weights.masked_fill(nulls, 0.0))) < 1e-2
        assert not module(hidden, torch.full_like(ids, EXPERTS), weights).any()


def test_bands_of_two_types(tmp_path: Path, kernels: Ggml) -> None:
    gguf = pytest.importorskip("gguf_checkpoints")
    model = gguf.random_model("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2)
    for kinds in (("Q4_K", "Q6_K", "Q4_0"), ("Q8_0", "Q4_1", "Q5_K")):
        path = gguf.write_checkpoint(model, "qwen3_moe", tmp_path / f"{kinds[0]}.gguf", gguf.experts_in(*kinds))
        exact = load_with_expert_cache(path, 1.0, arithmetic="exact", dtype=torch.float32)
        fast = load_with_expert_cache(path, 1.0, arithmetic="fast", dtype=torch.float32)
        assert fast.expert_cache.arithmetic == f"{', '.join(sorted(map(str.lower, kinds)))} by ggml, fast".replace(
            "_k", "_K"
        )
        assert_near(fast, exact, ONCE)


def test_columns_in_an_order_of_their_own(tmp_path: Path, kernels: Ggml) -> None:
    folder = save_quantised(tmp_path / "gptq", "qwen3_moe", "gptq", desc_act=True)
    exact = load_with_expert_cache(folder, 1.0, arithmetic="exact", dtype=torch.float32)
    fast = load_with_expert_cache(folder, 1.0, arithmetic="fast", dtype=torch.float32)
    assert_near(fast, exact, ONCE)


def loss_and_gradients(model: Any) -> tuple[Tensor, list[Tensor]]:
    ids = torch.randint(3, 90, (1, 12), generator=torch.Generator().manual_seed(3))
    routers = [param for name, param in model.named_parameters() if name.endswith(("mlp.gate.weight", "router.weight"))]
    for param in routers:
        param.requires_grad_(True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [param.grad for param in routers]


@pytest.mark.parametrize("architecture", ["qwen2_moe", "gpt_oss"])
def test_gradients_are_those_of_the_exact_arithmetic(architecture: str, folders: dict[str, Path], packs: Any) -> None:
    options: dict[str, Any] = {"storage": packs(architecture, "q4_1"), "dtype": torch.float32}
    found = loss_and_gradients(load_with_expert_cache(folders[architecture], 0.5, arithmetic="fast", **options))
    expected = loss_and_gradients(load_with_expert_cache(folders[architecture], 0.5, arithmetic="exact", **options))
    assert torch.equal(found[0], expected[0]) and len(found[1]) == 2
    assert all(torch.equal(a, b) for a, b in zip(found[1], expected[1], strict=True))


def test_threads_compute_at_once(folders: dict[str, Path], packs: Any) -> None:
    model = load_with_expert_cache(
        folders["gpt_oss"], 0.4, storage=packs("gpt_oss", "q4_K"), dtype=torch.float32, arithmetic="fast"
    )
    (module, *_) = experts(model)
    cases = [tokens(count, hidden_of(model), seed=count) for count in (1, 7)]
    with torch.no_grad():
        expected = [module(*case) for case in cases]
    faults: list[str] = []

    def run(number: int) -> None:
        with torch.no_grad():
            for _ in range(40):
                if off(module(*cases[number]), expected[number]) > 1e-5:
                    faults.append(f"case {number}")

    threads = [threading.Thread(target=run, args=(number,)) for number in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def trained_logits(model: Any, documents: list[list[int]]) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=torch.tensor([ids])).logits[0].float() for ids in documents])


def assert_within_the_bar(found: Tensor, expected: Tensor, documents: list[list[int]]) -> None:
    """Logits of a trained model: off by a hundredth of their norm, 2e-3 nats, and two tokens of a hundred."""
    assert off(found, expected) < 1e-2
    targets = torch.cat([torch.tensor([*ids[1:], -100]) for ids in documents])
    losses = [F.cross_entropy(logits, targets) for logits in (found, expected)]
    assert abs(float(losses[0] - losses[1])) < 2e-3
    assert float((found.argmax(-1) == expected.argmax(-1)).float().mean()) >= 0.98


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[list[int]], Tensor]:
    """A pack of the shipped model, its dense part in eight bits, documents, and exact logits."""
    pack = tmp_path_factory.mktemp("trained") / "pack"
    pack_experts(example_folder(), pack, bits=4, dense_bits=8)
    documents = held_out(example_folder(), AutoTokenizer.from_pretrained(example_folder()), 1000).documents
    exact = load_with_expert_cache(example_folder(), 1.0, storage=pack, arithmetic="exact", dtype=torch.float32)
    return pack, documents, trained_logits(exact, documents)


def test_a_trained_model_is_within_the_bar(trained: tuple[Path, list[list[int]], Tensor], kernels: Ggml) -> None:
    pack, documents, expected = trained
    model = load_with_expert_cache(example_folder(), 1.0, storage=pack, arithmetic="fast", dtype=torch.float32)
    assert type(model.lm_head).__name__ == "EncodedLinear", "the head is tied to an encoded embedding"
    assert_within_the_bar(trained_logits(model, documents), expected, documents)
    # Token by token the dense part is computed on its codes as well.
    cache, rows = DynamicCache(config=model.config), []
    with torch.inference_mode():
        for token in documents[1]:
            rows.append(model(input_ids=torch.tensor([[token]]), use_cache=True, **kv(cache)).logits[0, 0])
    begin = len(documents[0])
    assert off(torch.stack(rows), expected[begin : begin + len(rows)]) < 1e-2


@pytest.fixture
def no_ggml(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def missing() -> Any:
        raise MissingDependencyError("xllamacpp is needed, found: none")

    monkeypatch.setattr(sys.modules[Ggml.__module__], "load_library", missing)
    ggml.cache_clear()
    yield
    ggml.cache_clear()


@pytest.fixture
def no_int4(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    torch_int4.is_usable.cache_clear()
    yield
    torch_int4.is_usable.cache_clear()


needs_int4 = pytest.mark.skipif(not torch_int4.is_usable(), reason="torch has no quick 4-bit kernels here")


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


@needs_int4
@pytest.mark.usefixtures("no_ggml")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_ggml_torch_computes_4_bits(
    architecture: str, folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack_experts(folders[architecture], tmp_path / "pack", bits=4)
    options: dict[str, Any] = {"storage": tmp_path / "pack", "dtype": torch.float32}
    exact = load_with_expert_cache(folders[architecture], 1.0, arithmetic="exact", **options)
    for budget, arithmetic in ((1.0, "auto"), (0.3, "fast")):
        model = load_with_expert_cache(folders[architecture], budget, arithmetic=arithmetic, **options)
        assert model.expert_cache.arithmetic == "q4_1 by torch int4, fast"
        assert_near(model, exact, ONCE)
        if budget < 1:
            model.expert_cache.resize(max(model.expert_cache.source.expert_bytes))
            assert_near(model, exact, ONCE, counts=(1, 7))
    assert len(said(caplog)) == 2
    assert "xllamacpp is needed" in said(caplog)[0] and "torch's kernels for them instead" in said(caplog)[1]
    if architecture != "nemotron_h":
        found, expected = loss_and_gradients(model), loss_and_gradients(exact)
        # Weights are those of the fast arithmetic, whose scales are rounded to bf16.
        assert abs(float(found[0] - expected[0])) < 1e-2 * float(expected[0])
        assert all(off(a, b) < 0.1 for a, b in zip(found[1], expected[1], strict=True))


@needs_int4
@pytest.mark.usefixtures("no_ggml")
def test_torch_computes_an_order_of_columns_and_null_experts(tmp_path: Path) -> None:
    folder = save_quantised(tmp_path / "gptq", "qwen3_moe", "gptq", desc_act=True, sym=False)
    exact = load_with_expert_cache(folder, 1.0, arithmetic="exact", dtype=torch.float32)
    fast = load_with_expert_cache(folder, 0.5, dtype=torch.float32)
    assert "by torch int4" in fast.expert_cache.arithmetic
    assert_near(fast, exact, ONCE)
    (module, *_) = experts(fast)
    hidden, ids, weights = tokens(5, hidden_of(fast))
    with torch.no_grad():
        assert not module(hidden, torch.full_like(ids, EXPERTS), weights).any()


@needs_int4
@pytest.mark.usefixtures("no_ggml")
def test_torch_computes_a_gguf_of_4_bits(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf_checkpoints")
    model = gguf.random_model("qwen3_moe", hidden_size=256, moe_intermediate_size=256, num_hidden_layers=2)
    path = gguf.write_checkpoint(
        model, "qwen3_moe", tmp_path / "m.gguf", gguf.experts_in("Q4_K", "Q4_K", "Q4_0", dense="Q8_0")
    )
    exact = load_with_expert_cache(path, 1.0, arithmetic="exact", dtype=torch.float32)
    fast = load_with_expert_cache(path, 1.0, arithmetic="fast", dtype=torch.float32)
    assert fast.expert_cache.arithmetic == "q4_0, q4_K by torch int4, fast"
    assert not [name for name, module in fast.named_modules() if type(module).__name__.startswith("Encoded")]
    assert_near(fast, exact, ONCE)


@needs_int4
@pytest.mark.usefixtures("no_ggml")
def test_a_trained_model_by_torch_is_within_the_bar(trained: tuple[Path, list[list[int]], Tensor]) -> None:
    pack, documents, expected = trained
    model = load_with_expert_cache(example_folder(), 1.0, storage=pack, arithmetic="fast", dtype=torch.float32)
    assert model.expert_cache.arithmetic == "q4_1 by torch int4, fast"
    assert_within_the_bar(trained_logits(model, documents), expected, documents)


@needs_int4
@pytest.mark.usefixtures("no_ggml")
def test_codes_that_torch_does_not_know_are_dequantised(
    folders: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pack_experts(folders["qwen2_moe"], tmp_path / "pack", bits=8)
    options: dict[str, Any] = {"storage": tmp_path / "pack", "dtype": torch.float32}
    model = load_with_expert_cache(folders["qwen2_moe"], 1.0, **options)
    assert model.expert_cache.arithmetic == "q8_0, exact"
    assert "experts in q8_0 are dequantised on every use" in said(caplog)[-1]
    with pytest.raises(ConfigError, match="has experts in q8_0, which torch's 4-bit kernels do not compute"):
        load_with_expert_cache(folders["qwen2_moe"], 1.0, arithmetic="fast", **options)


@pytest.mark.usefixtures("no_ggml", "no_int4")
def test_without_any_kernels_all_is_exact(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save_quantised(tmp_path / "gptq", "qwen3_moe", "gptq")
    model = load_with_expert_cache(folder, 1.0)
    assert model.expert_cache.arithmetic == "gptq, exact"
    assert len(said(caplog)) == 2 and "slow on this processor, DEFAULT" in said(caplog)[1]
    with pytest.raises(ConfigError, match='arithmetic "fast": there are no kernels for experts on cpu'):
        load_with_expert_cache(folder, 1.0, arithmetic="fast")


@pytest.mark.usefixtures("no_ggml")
def test_nothing_is_said_of_kernels_that_a_model_of_floats_does_not_need(
    folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    model = load_with_expert_cache(folders["qwen2_moe"], 1.0)
    assert model.expert_cache.arithmetic == "float, exact" and not said(caplog)
