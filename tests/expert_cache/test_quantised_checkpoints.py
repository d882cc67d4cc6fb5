"""Quantised checkpoints behind an expert cache: exact to the bit, fast within the tolerance, trained and packed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from quantised_checkpoints import reference, save_quantised
from torch import Tensor

from remoe_adapt import get_remoe_model, load_with_expert_cache
from remoe_adapt.errors import ConfigError, ExpertReadError, UncacheableError
from remoe_adapt.expert_cache.encodings import ggml
from remoe_adapt.expert_cache.load import pack_experts

IDS = torch.randint(3, 90, (2, 40), generator=torch.Generator().manual_seed(0))
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt-oss": ("gpt_oss", "mxfp4", {}),
    "qwen3-fp8": ("qwen3_moe", "fp8", {}),
    "deepseek-fp8": ("deepseek_v3", "fp8", {}),
    "qwen2-fp8-ue8m0": ("qwen2_moe", "fp8", {"scales": "ue8m0"}),
    "qwen3-ct": ("qwen3_moe", "compressed-tensors", {}),
    "olmoe-ct-asymmetric": ("olmoe", "compressed-tensors", {"symmetric": False}),
    "mixtral-gptq": ("mixtral", "gptq", {}),
    "qwen3-gptq-act-order": ("qwen3_moe", "gptq", {"desc_act": True}),
    "qwen2-awq": ("qwen2_moe", "awq", {}),
}
fast_here = pytest.mark.skipif(ggml() is None, reason="no kernels for codes here (extra: llamacpp)")


@pytest.fixture(scope="module", params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    architecture, method, settings = KINDS[request.param]
    if method == "compressed-tensors":
        pytest.importorskip("compressed_tensors", reason="transformers reads this format with compressed-tensors")
    return save_quantised(tmp_path_factory.mktemp("quantised") / "q", architecture, method, shards=3, **settings)


def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return found.float()


def test_exact_is_the_dequantised_model_to_the_bit(checkpoint: Path) -> None:
    whole = reference(checkpoint)
    expected = logits(whole)
    model = load_with_expert_cache(checkpoint, 0.5, arithmetic="exact")
    cache = model.expert_cache
    assert not getattr(model, "is_quantized", False) and not hasattr(model.config, "quantization_config")
    experts = [module for name, module in whole.named_modules() if name in cache.source.layers]
    floats = sum(param.nbytes for module in experts for param in module.parameters(recurse=False))
    assert cache.source.total_bytes < 0.6 * floats, "slots hold codes"
    for budget in (cache.budget_bytes, max(cache.source.expert_bytes), cache.source.total_bytes):
        cache.resize(budget)
        assert torch.equal(logits(model), expected)
        assert cache.stats()["resident_bytes"] <= budget


def close(found: Tensor, expected: Tensor) -> bool:
    """Nearly all tokens within what activations of 8 bits cost. The weights are random here, so that now and then a
    token's choice between two experts that score nearly alike falls otherwise, which changes all that follows. The bar
    for a trained model is in test_fast_arithmetic.py."""
    near = (found - expected).norm(dim=-1) <= 2e-2 * expected.norm(dim=-1)
    return bool(near.float().mean() >= 0.9)


@fast_here
def test_fast_is_within_the_tolerance(checkpoint: Path) -> None:
    # In float32, so that what is measured is the arithmetic on codes, and not how bf16 rounds between the layers.
    expected = logits(load_with_expert_cache(checkpoint, 1.0, arithmetic="exact", dtype="float32"))
    model = load_with_expert_cache(checkpoint, 0.5, arithmetic="fast", dtype="float32")
    cache = model.expert_cache
    for budget in (cache.budget_bytes, max(cache.source.expert_bytes), cache.source.total_bytes):
        cache.resize(budget)
        assert close(logits(model), expected)
    tokens = torch.cat([logits(model, IDS[:1, : at + 1])[:, -1:] for at in range(6)], dim=1)
    assert close(tokens, expected[:1, :6])


def gradients(model: Any) -> list[Tensor]:
    model.train()
    routers = [p for name, p in model.named_parameters() if name.endswith(("gate.weight", "router.weight"))]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for router in routers:
        router.requires_grad_(True)
    model(input_ids=IDS, labels=IDS).loss.backward()
    return [router.grad for router in routers]


def test_gradients_of_routers_are_those_of_the_dequantised_model(checkpoint: Path) -> None:
    expected = gradients(reference(checkpoint))
    model = load_with_expert_cache(checkpoint, 0.3, arithmetic="exact")
    found = gradients(model)
    assert expected and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_pack_of_codes_reads_as_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    result = pack_experts(checkpoint, tmp_path / "pack")
    plain = load_with_expert_cache(checkpoint, 0.5, arithmetic="exact")
    model = load_with_expert_cache(checkpoint, 0.5, arithmetic="exact", storage=tmp_path / "pack")
    expected, found = logits(plain), logits(model)
    errors = [error for layer in json.loads((tmp_path / "pack" / "experts.json").read_text())["layers"]
              for error in layer["weight_error"].values()]  # fmt: skip
    assert result["bytes"] > 0 and len(errors) >= 2
    if max(errors) == 0.0:
        assert torch.equal(found, expected)
    else:
        assert (found - expected).norm() <= 2e-2 * expected.norm()
        assert max(errors) < 1e-2


def test_memory_counts_codes_and_the_weights_of_one_expert(checkpoint: Path) -> None:
    whole = load_with_expert_cache(checkpoint, 1.0, arithmetic="exact").expert_cache
    with pytest.raises(ConfigError, match="the dense part alone takes"):
        load_with_expert_cache(checkpoint, 1.0, memory=100, arithmetic="exact")
    least = load_with_expert_cache(checkpoint, 1.0, memory="1GiB", arithmetic="exact").expert_cache
    assert least.budget_bytes == whole.budget_bytes


def test_a_dial_on_a_quantised_checkpoint(checkpoint: Path) -> None:
    model = get_remoe_model(checkpoint, expert_cache=0.5, arithmetic="exact", monitor=False)
    expected = logits(reference(checkpoint))
    model.controller.set_strength(0.0)
    status = model.controller.status()["expert_cache"]
    assert status["arithmetic"]
    assert torch.allclose(logits(model), expected, atol=1e-5)


def test_an_unknown_arithmetic_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="arithmetic 'quick' is not one of auto, fast, exact"):
        load_with_expert_cache(tmp_path, arithmetic="quick")


def test_damaged_codes_are_one_clear_error(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    folder = tmp_path / "cut"
    folder.mkdir()
    for file in checkpoint.iterdir():
        data = file.read_bytes()
        (folder / file.name).write_bytes(data[:-64] if file.suffix == ".safetensors" else data)
    assert config["quantization_config"]
    with pytest.raises((ExpertReadError, UncacheableError)):
        load_with_expert_cache(folder, 0.5)
