"""Bases to measure and to train: whole, or behind a cache where one is asked for or their weights are codes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from quantised_checkpoints import reference, save_quantised
from tiny_checkpoints import save_tiny, stock

from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.expert_cache.experts import arithmetic_of, expert_cache_of
from remoe_adapt.expert_cache.whole import load_whole_or_cached

IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize(("architecture", "method"), [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8")])
def test_a_quantised_checkpoint_is_behind_a_cache_of_all_its_codes(
    architecture: str, method: str, tmp_path: Path
) -> None:
    folder = save_quantised(tmp_path / "model", architecture, method)
    model = load_whole_or_cached(folder)
    cache = expert_cache_of(model)
    assert cache is not None and cache.stats()["arithmetic"] == f"{method}, exact"
    assert arithmetic_of(model) == {"name": method, "exact": True}
    expected = reference(folder)
    assert torch.equal(logits(model), logits(expected))
    logits(model)
    stats = cache.stats()
    assert stats["misses"] == len(cache.resident()), "nothing is read twice"
    experts = sum(
        param.nbytes for name, param in expected.named_parameters() if ".experts." in name and param.ndim == 3
    )
    assert cache.budget_bytes < 0.7 * experts, "the codes, not the weights"
    assert load_whole_or_cached(folder, dtype=torch.float32).dtype == torch.float32


def test_plain_checkpoints_are_whole_unless_a_cache_is_asked_for(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    whole = load_whole_or_cached(folder, experts_implementation="eager")
    assert expert_cache_of(whole) is None and arithmetic_of(whole) == {"name": "float", "exact": True}
    cached = load_whole_or_cached(folder, 0.5)
    cache = expert_cache_of(cached)
    assert cache is not None and cache.stats()["arithmetic"] == "float, exact"
    assert torch.equal(logits(cached), logits(whole))


def test_an_adapter_that_names_its_base_is_loaded_whole(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "base", "qwen2_moe")
    tuned = get_peft_model(stock(folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(str(tmp_path / "adapter"))
    assert torch.equal(
        logits(load_whole_or_cached(tmp_path / "adapter", experts_implementation="eager")), logits(tuned)
    )


def test_what_cannot_be_cached_is_whole_and_that_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    # Its experts are not behind transformers' interface, but transformers reads its FP8.
    folder = save_quantised(tmp_path / "model", "jetmoe", "fp8")
    with caplog.at_level(logging.WARNING):
        model = load_whole_or_cached(folder)
    assert expert_cache_of(model) is None and "It is loaded whole." in caplog.text
    assert torch.isfinite(logits(model)).all()
    with pytest.raises(UncacheableError):
        load_whole_or_cached(folder, 0.5)


def test_bad_options_are_one_error(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    with pytest.raises(ConfigError, match="'quick' is not one of auto, fast, exact"):
        load_whole_or_cached(folder, arithmetic="quick")
    with pytest.raises(ConfigError, match="no_such_device"):
        load_whole_or_cached(folder, device="no_such_device")
    with pytest.raises(ConfigError, match="cannot be found"):
        load_whole_or_cached(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="expert_cache"):
        load_whole_or_cached(folder, 1.5)
