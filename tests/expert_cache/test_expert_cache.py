"""Models that decode through an expert cache: what the stock model computes, in less memory, or a clear error."""

from __future__ import annotations

import copy
import logging
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from recency_support import routing_matters
from tiny_checkpoints import Faults, save_tiny, stock
from tiny_families import tiny_family

from remoe_adapt import RemoeConfig, get_remoe_model, load_with_expert_cache
from remoe_adapt.errors import ConfigError, ExpertReadError, MergeStateError

# fmt: off
ARCHITECTURES = (
    "qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3",
    "gpt_oss", "granitemoe", "glm4_moe", "minimax_m2", "phimoe", "ernie4_5_moe",
    "hunyuan_v1_moe", "lfm2_moe", "nemotron_h", "qwen3_next", "inkling2", "gemma4",
)
# fmt: on
WITHOUT_INTERFACE = ("dbrx", "doge", "jetmoe", "llama4", "longcat_flash")
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(root / name, name) for name in ARCHITECTURES}


@pytest.fixture(scope="module")
def folder(folders: dict[str, Path]) -> Path:
    return folders["qwen2_moe"]


def logits(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


def smallest(model: Any) -> int:
    return max(model.expert_cache.source.expert_bytes)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logits_are_the_stock_models(name: str, folders: dict[str, Path]) -> None:
    reference = stock(folders[name])
    expected = logits(reference)
    model = load_with_expert_cache(folders[name], 0.25)
    experts = {f"{layer}.{param}" for layer in model.expert_cache.source.layers for param in ("down_proj", "up_proj")}
    assert not experts.intersection(name for name, _ in model.named_parameters())
    for budget in (model.expert_cache.budget_bytes, smallest(model), model.expert_cache.source.total_bytes):
        model.expert_cache.resize(budget)
        assert torch.equal(logits(model), expected)
        assert model.expert_cache.resident_bytes <= budget
    model.expert_cache.reset_stats()
    assert torch.equal(logits(model), expected)
    assert model.expert_cache.stats()["misses"] == 0


@pytest.mark.parametrize("name", WITHOUT_INTERFACE)
def test_experts_behind_no_interface_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ForCausalLM: its experts cannot be cached"):
        load_with_expert_cache(save_tiny(tmp_path, name))


@pytest.mark.parametrize("policy", ["lru", "lfu", "lrfu", "markov"])
@pytest.mark.parametrize(("scope", "direct_io"), [("global", True), ("layer", False)])
def test_every_setting_computes_the_same_bits(folder: Path, policy: str, scope: str, direct_io: bool) -> None:
    expected = logits(stock(folder))
    model = load_with_expert_cache(folder, 0.4, policy=policy, scope=scope, direct_io=direct_io, threads=2)
    assert torch.equal(logits(model), expected) and torch.equal(logits(model), expected)
    stats = model.expert_cache.stats()
    assert (stats["policy"], stats["scope"]) == (policy, scope) and stats["resident_bytes"] <= stats["budget_bytes"]


def test_bfloat16_checkpoints_and_casts(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "bf16", "qwen3_moe", dtype=torch.bfloat16)
    for dtype in (None, "bfloat16", torch.float32):
        model = load_with_expert_cache(folder, 0.25, dtype=dtype)
        reference = stock(folder, dtype=dtype or torch.bfloat16)
        assert model.dtype == reference.dtype and torch.equal(logits(model), logits(reference))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(logits(model), logits(reference))
    with pytest.raises(ConfigError, match=r"choose dtype= when the model is loaded"):
        logits(model.to(torch.bfloat16))


def test_generation_with_beams_and_batches_is_the_same(folder: Path) -> None:
    reference, model = stock(folder), load_with_expert_cache(folder, 0.25)
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for options in ({"do_sample": False}, {"num_beams": 3}):
        settings = {"attention_mask": mask, "max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": None, **options}
        assert torch.equal(model.generate(IDS, **settings), reference.generate(IDS, **settings))
    copied = copy.deepcopy(model)
    assert copied.expert_cache is model.expert_cache and torch.equal(logits(copied), logits(reference))


def test_a_budget_that_changes_while_decoding_changes_no_logit(folder: Path) -> None:
    reference, model = stock(folder), load_with_expert_cache(folder, 1.0)
    cache = model.expert_cache
    shares = (1.0, 0.5, 0.1, 0.04, 0.7, 0.2)
    for step in range(12):
        cache.resize(max(smallest(model), int(shares[step % len(shares)] * cache.source.total_bytes)))
        ids = IDS[:, : 1 + step % 9]
        assert torch.equal(logits(model, ids), logits(reference, ids))
        assert cache.resident_bytes <= cache.budget_bytes


@pytest.mark.parametrize("checkpointing", [False, True])
def test_router_adapters_train_through_the_cache(folder: Path, checkpointing: bool) -> None:
    gradients = []
    for load in (stock, load_with_expert_cache):
        torch.manual_seed(0)
        base: Any = load(folder)
        if checkpointing:
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable()
        model = get_peft_model(base, RemoeConfig(init_weights=False))
        model.train()
        if load is load_with_expert_cache:
            base.expert_cache.resize(smallest(base))
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 0
    for name, expected in gradients[0].items():
        assert expected.abs().sum() > 0 and torch.equal(gradients[1][name], expected), name


def test_backward_reads_experts_again_instead_of_keeping_them(folder: Path) -> None:
    model = load_with_expert_cache(folder, 0.25)
    model.expert_cache.resize(smallest(model))
    layer = model.expert_cache.source.layers[0]
    ids, weights = torch.arange(8).repeat(10).view(40, 2), torch.full((40, 2), 0.5)
    gradients = []
    for module in (model.get_submodule(layer), stock(folder).get_submodule(layer)):
        hidden = torch.randn(40, 32, generator=torch.Generator().manual_seed(0)).requires_grad_()
        output = module(hidden, ids, weights)
        model.expert_cache.reset_stats()
        output.square().sum().backward()
        gradients.append(hidden.grad)
        if not list(module.parameters()):
            # One fits, and the last is there still.
            assert model.expert_cache.stats()["misses"] == 7
    assert torch.equal(gradients[0], gradients[1])


def test_adapters_are_saved_and_the_model_is_not(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(load_with_expert_cache(folder), RemoeConfig(init_weights=False))
    model.save_pretrained(str(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(load_with_expert_cache(folder), str(tmp_path / "adapter"))
    full = PeftModel.from_pretrained(stock(folder), str(tmp_path / "adapter"))
    assert torch.equal(logits(again), logits(full)) and not torch.equal(logits(again), logits(stock(folder)))
    merged = again.merge_and_unload()
    for whole in (merged, load_with_expert_cache(folder)):
        with pytest.raises(MergeStateError, match="Save adapters with the PeftModel's save_pretrained"):
            whole.save_pretrained(str(tmp_path / "whole"))
    assert not (tmp_path / "whole").exists()


def test_the_resident_prior_reads_the_slots(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = routing_matters()
    source.save_pretrained(tmp_path / "model")
    family = tiny_family(source, tmp_path / "family")

    def misses(gain: float) -> tuple[int, Any]:
        base = load_with_expert_cache(tmp_path / "model", 0.25, policy="lru")
        model = get_remoe_model(base, family=family, recency="resident", recency_gain=gain)
        model.generate(IDS[:1], max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0)
        return base.expert_cache.stats()["misses"], model

    caplog.set_level(logging.WARNING, logger="remoe_adapt")
    without, _ = misses(0.0)
    with_prior, model = misses(1.0)
    assert with_prior < 0.8 * without
    assert "no effect until an expert cache" not in caplog.text
    cache = model.expert_cache
    masks = model.controller._prior.installed.prior.residency  # what its gates read
    held = cache.resident()
    for layer, mask in enumerate(masks):
        assert mask.flatten().nonzero().flatten().tolist() == [expert for at, expert in held if at == layer]
    assert len(held) > 0
    model.controller.close()
    with pytest.raises(MergeStateError, match="experts are in its checkpoint"):
        model.get_base_model().save_pretrained(tmp_path / "whole")
    assert all(mask is own for mask, own in zip(masks, cache.resident_masks, strict=True))


def test_a_model_of_the_hub_cache_is_found_by_its_id(folder: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--somebody--tiny-moe"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    blobs = shutil.copytree(folder, repository / "blobs")
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir()
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    model = load_with_expert_cache("somebody/tiny-moe", cache_dir=tmp_path, local_files_only=True)
    assert torch.equal(logits(model), logits(stock(folder)))
    assert model.name_or_path == model.config._name_or_path == "somebody/tiny-moe"


def test_threads_load_at_once(folder: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        models = list(pool.map(load_with_expert_cache, [folder] * 6))
    expected = stock(folder)
    assert sum("experts" in name for name, _ in expected.named_parameters()) == 8
    for model in models:
        assert torch.equal(logits(model), logits(expected))


def test_threads_decode_at_once_with_room_for_one_expert(folder: Path) -> None:
    expected = logits(stock(folder))
    model = load_with_expert_cache(folder, 0.25)
    model.expert_cache.resize(smallest(model))
    with ThreadPoolExecutor(3) as pool:
        for found in pool.map(logits, [model] * 6):
            assert torch.equal(found, expected)


def test_compiled_models_run_their_experts_outside_the_graph(folder: Path) -> None:
    model = load_with_expert_cache(folder, 0.5)
    compiled = torch.compile(model, backend="eager")
    assert torch.equal(logits(compiled), logits(stock(folder)))


def test_experts_come_in_by_the_registry_of_transformers(folder: Path) -> None:
    model, reference = load_with_expert_cache(folder, 0.5), stock(folder)
    layer = model.expert_cache.source.layers[0]
    assert type(model.get_submodule(layer)) is type(reference.get_submodule(layer))
    for implementation in ("eager", "grouped_mm"):
        with pytest.raises(ConfigError, match="from_pretrained"):
            model.set_experts_implementation(implementation)
    assert torch.equal(logits(model), logits(reference))
    # A stock model of the same configuration has experts of its own.
    other = type(reference)(model.config).eval()
    other.load_state_dict(reference.state_dict())
    assert torch.equal(logits(other), logits(reference))


def test_faults_of_the_disk_give_an_error_or_the_right_logits(folder: Path, tmp_path: Path) -> None:
    expected = logits(stock(folder))
    faults = Faults(os.preadv)
    model = load_with_expert_cache(folder, 0.25, reader=faults)
    faults.plan = {n: ("eio", "short", "end")[n % 3] for n in range(0, 400, 4)}
    assert torch.equal(logits(model), expected)
    faults.always = "eio"
    with pytest.raises(ExpertReadError, match="Input/output error"):
        logits(model)
    faults.always, faults.plan = "", {}
    assert torch.equal(logits(model), expected)

    spoiled = shutil.copytree(folder, tmp_path / "spoiled")
    model = load_with_expert_cache(spoiled, 0.25)
    files = sorted(spoiled.glob("*.safetensors"))
    for file in files:
        file.unlink()
    assert torch.equal(logits(model), expected), "open files outlive their names"
    spoiled = shutil.copytree(folder, tmp_path / "truncated")
    model = load_with_expert_cache(spoiled, 0.25)
    for file in sorted(spoiled.glob("*.safetensors")):
        os.truncate(file, file.stat().st_size // 2)
    with pytest.raises(ExpertReadError, match="the file ends there"):
        logits(model)
    with pytest.raises(ExpertReadError, match="truncated"):
        load_with_expert_cache(spoiled)


def test_the_old_name_of_dtype_counts(folder: Path) -> None:
    found, expected = (load_with_expert_cache(folder, **{name: "bfloat16"}) for name in ("torch_dtype", "dtype"))
    assert found.dtype == torch.bfloat16 and torch.equal(logits(found), logits(expected))


def test_options_that_cannot_work_are_refused(folder: Path, tmp_path: Path) -> None:
    for budget, words in ((1.5, "a share of all experts"), ("25%", "not a size.* as 0.25"), (7, "cannot hold one")):
        with pytest.raises(ConfigError, match=words):
            load_with_expert_cache(folder, budget)
    for option in ("device_map", "variant", "subfolder"):
        with pytest.raises(ConfigError, match=f"{option}: an expert cache"):
            load_with_expert_cache(folder, **{option: "auto"})
    nowhere: Any = None
    with pytest.raises(ConfigError, match="device 'None'"):
        load_with_expert_cache(folder, device=nowhere)
    with pytest.raises(ConfigError, match="no floating type"):
        load_with_expert_cache(folder, dtype="int8")
    with pytest.raises(ConfigError, match="cannot be found"):
        load_with_expert_cache("nobody/no-such-model", local_files_only=True)
    with pytest.raises(ConfigError, match="is no model"):
        load_with_expert_cache(tmp_path)
    # Whatever failed, stock models are made as before.
    assert type(stock(folder)).__name__ == type(load_with_expert_cache(folder, "40KiB")).__name__
    assert any("experts" in name for name, _ in stock(folder).named_parameters())
