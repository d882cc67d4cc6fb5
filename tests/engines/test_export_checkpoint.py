"""Merged checkpoints and stock LoRAs: bit-equal to the live model, from files alone, whole or not there at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_at_write, peak_memory
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tiny, stock
from tiny_families import tiny_family
from torch import Tensor

from remoe_adapt import Family
from remoe_adapt.engines import files as export_files
from remoe_adapt.engines.base import BaseFiles
from remoe_adapt.engines.merged import export_merged
from remoe_adapt.engines.peft_lora import export_lora
from remoe_adapt.errors import ConfigError, ExportError, FamilyError, FingerprintMismatchError, UnsupportedRouterError
from remoe_adapt.family.family import original_weights
from remoe_adapt.routers.discover import fingerprint

# Names and layouts of their own: fused experts, a selection bias, a renamed router, one that stays in fp32, a Linear.
ARCHITECTURES = ("qwen2_moe", "deepseek_v3", "granitemoe", "ernie4_5_moe", "longcat_flash")


def family_of(folder: Path, architecture: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Family:
    """A sharded checkpoint in folder/base and a family of it in folder/family."""
    save_tiny(folder / "base", architecture, dtype=dtype, **sizes)
    return tiny_family(stock(folder / "base", dtype="auto"), folder / "family", (0.5, 1.0))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Family]:
    home = tmp_path_factory.mktemp("qwen")
    return home, family_of(home, "qwen2_moe")


def live_weights(base: Path, family: Family, strength: float) -> dict[str, Tensor]:
    return family.live(strength, original_weights(stock(base, dtype="auto")))


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: value for path in folder.glob("*.safetensors") for key, value in load_file(path).items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_checkpoint_loads_as_the_live_model(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family = family_of(tmp_path, architecture, dtype)
    result = export_merged(tmp_path / "base", family, 0.6, tmp_path / "out")
    assert fingerprint(stock(tmp_path / "base", dtype="auto")) == family.fingerprint
    loaded = original_weights(stock(tmp_path / "out", dtype="auto"))
    live = live_weights(tmp_path / "base", family, 0.6)
    assert [torch.equal(live[name], loaded[name]) for name in live] == [True] * result["routers"]
    before, after = tensors(tmp_path / "base"), tensors(tmp_path / "out")
    changed = {key for key in before if before[key].dtype != after[key].dtype or not before[key].equal(after[key])}
    assert before.keys() == after.keys() and len(changed) == result["routers"]


def test_only_shards_with_routers_are_written(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    result = export_merged(home / "base", family, 1.0, tmp_path / "out")
    assert result["linked"] and result["rewritten"] and not result["copied"]
    for name in result["linked"]:
        assert (tmp_path / "out" / name).samefile(home / "base" / name)
    for name in result["rewritten"]:
        ours, theirs = (tmp_path / "out" / name).read_bytes(), (home / "base" / name).read_bytes()
        assert ours != theirs and len(ours) == len(theirs)
    assert {p.name for p in (home / "base").iterdir()} | {"remoe_export.json"} == {
        p.name for p in (tmp_path / "out").iterdir()
    }
    assert json.loads((tmp_path / "out" / "remoe_export.json").read_text())["strength"] == 1.0


def test_strength_zero_is_the_base_byte_for_byte(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    export_merged(home / "base", family, 0.0, tmp_path / "out")
    for path in (home / "base").iterdir():
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_hub_cache_of_links_is_read_and_never_written(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for number, path in enumerate(sorted((home / "base").iterdir())):
        (blobs / str(number)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../blobs/{number}")
    (snapshot / "pytorch_model.bin").write_bytes(b"the base's routers in another format")
    before = {path: path.read_bytes() for path in blobs.iterdir()}
    export_merged(snapshot, family, 1.0, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()
    assert {path: path.read_bytes() for path in blobs.iterdir()} == before
    loaded = original_weights(stock(tmp_path / "out"))
    assert all(torch.equal(loaded[name], live) for name, live in live_weights(home / "base", family, 1.0).items())


def test_a_quantised_base_keeps_its_experts_and_gets_new_routers(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    (tmp_path / "fp8").mkdir()
    for path in (home / "base").iterdir():
        (tmp_path / "fp8" / path.name).write_bytes(path.read_bytes())
        if path.suffix == ".safetensors":
            stored = load_file(path)
            for name in [name for name in stored if ".experts." in name]:
                stored[name] = stored[name].to(torch.float8_e4m3fn)
                stored[f"{name}_scale_inv"] = torch.ones(1, 1)
            save_file(stored, tmp_path / "fp8" / path.name, metadata={"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))
    export_merged(tmp_path / "fp8", family, 1.0, tmp_path / "out")
    live = live_weights(home / "base", family, 1.0)
    assert all(torch.equal(BaseFiles(tmp_path / "out").weights[name], live[name]) for name in live)
    before, after = tensors(tmp_path / "fp8"), tensors(tmp_path / "out")
    assert sum(not before[key].float().equal(after[key].float()) for key in before) == len(live)


def test_files_are_copied_where_linking_fails(
    qwen: tuple[Path, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    home, family = qwen
    monkeypatch.setattr(os, "link", refuse)
    heard: list[int] = []
    result = export_merged(home / "base", family, 1.0, tmp_path / "out", on_bytes=heard.append)
    assert not result["linked"] and result["copied"] + result["cloned"]
    assert sum(heard) == sum(path.stat().st_size for path in (home / "base").glob("*.safetensors"))
    assert tensors(home / "base").keys() == tensors(tmp_path / "out").keys()


def test_nothing_is_left_of_an_export_that_fails(
    qwen: tuple[Path, Family], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, family = qwen
    monkeypatch.setattr(export_files.os, "pwrite", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space"):
        export_merged(home / "base", family, 1.0, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_killed_export_leaves_no_result_and_its_rest_is_removed(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    assert killed_at_write(1, lambda: export_merged(home / "base", family, 1.0, tmp_path / "out"))
    assert not (tmp_path / "out").exists() and list(tmp_path.iterdir())
    export_merged(home / "base", family, 1.0, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks of memory are read as Linux tells them")
def test_memory_stays_with_the_routers_for_a_base_of_16_shards(tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 256, "num_experts": 32, "num_hidden_layers": 6}
    save_tiny(tmp_path / "base", "qwen2_moe", shards="5MB", **sizes)
    family = tiny_family(stock(tmp_path / "base"), tmp_path / "family", (1.0,))
    export_merged(tmp_path / "base", family, 1.0, tmp_path / "warm")  # imports and the like
    shards = list((tmp_path / "base").glob("*.safetensors"))
    assert len(shards) >= 16 and sum(path.stat().st_size for path in shards) > 80e6
    with peak_memory() as peak:
        export_merged(tmp_path / "base", family, 1.0, tmp_path / "out")
        assert peak() < 8e6


@pytest.mark.parametrize("architecture", ["qwen2_moe", "granitemoe", "ernie4_5_moe", "afmoe"])
def test_a_stock_lora_is_the_live_model_in_fp32(architecture: str, tmp_path: Path) -> None:
    family = family_of(tmp_path, architecture)
    result = export_lora(tmp_path / "base", family, 0.6, tmp_path / "lora")
    live = live_weights(tmp_path / "base", family, 0.6)
    adapted = PeftModel.from_pretrained(stock(tmp_path / "base"), str(tmp_path / "lora"))
    export_merged(tmp_path / "base", family, 0.6, tmp_path / "merged")
    ids = torch.randint(0, 90, (2, 12))
    with torch.no_grad():
        logits, plain = adapted(input_ids=ids).logits, stock(tmp_path / "base")(input_ids=ids).logits
        assert torch.equal(logits, stock(tmp_path / "merged")(input_ids=ids).logits)
    assert not torch.allclose(logits, plain, atol=1e-3)
    merged = original_weights(adapted.merge_and_unload())
    assert all(torch.equal(merged[name], live[name]) for name in live)
    assert (result["inexact"], result["max_error"]) == (0, 0.0)


def test_a_stock_lora_for_bf16_hits_every_weight_that_it_can(tmp_path: Path) -> None:
    family = family_of(tmp_path, "qwen2_moe", torch.bfloat16)
    for point in family.points:
        for delta_ED in point.deltas.values():
            delta_ED *= 0.01  # of the size of a trained one, which does not turn weights around
    result = export_lora(tmp_path / "base", family, 1.0, tmp_path / "lora")
    live = live_weights(tmp_path / "base", family, 1.0)
    adapted = PeftModel.from_pretrained(stock(tmp_path / "base", dtype="auto"), str(tmp_path / "lora"))
    base = original_weights(stock(tmp_path / "base", dtype="auto"))
    merged = original_weights(adapted.merge_and_unload())
    missed = sum(int((merged[name] != live[name]).sum()) for name in live)
    # What stock LoRA makes of the delta as it was trained: rounded first, added then.
    naive = sum(
        int((base[name] + family.points[-1].deltas[name].to(torch.bfloat16) != live[name]).sum()) for name in live
    )
    assert missed == result["inexact"] and missed < 0.5 * naive


def test_a_lora_loads_without_this_package(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    export_lora(home / "base", family, 1.0, tmp_path / "lora")
    script = (
        "import sys\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(sys.argv[1]), sys.argv[2])\n"
        "assert not any(name.startswith('remoe_adapt') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, home / "base", tmp_path / "lora"], check=True)


def test_a_router_that_would_ignore_a_lora_is_refused(tmp_path: Path) -> None:
    family = family_of(tmp_path, "longcat_flash")
    with pytest.raises(UnsupportedRouterError, match="silently ignored"):
        export_lora(tmp_path / "base", family, 1.0, tmp_path / "lora")
    assert not (tmp_path / "lora").exists()


def test_refusals_name_what_is_wrong(qwen: tuple[Path, Family], tmp_path: Path) -> None:
    home, family = qwen
    save_tiny(tmp_path / "other", "qwen2_moe", seed=5)
    with pytest.raises(FingerprintMismatchError, match="tests/tiny-base"):
        export_merged(tmp_path / "other", family, 1.0, tmp_path / "out")
    export_merged(tmp_path / "other", family, 1.0, tmp_path / "forced", force=True)
    with pytest.raises(ConfigError, match="exists already"):
        export_merged(home / "base", family, 1.0, tmp_path / "forced")
    with pytest.raises(ConfigError, match="base itself"):
        export_merged(home / "base", family, 1.0, home / "base")
    with pytest.raises(FamilyError, match="out of range"):
        export_merged(home / "base", family, 1.5, tmp_path / "out")
    with pytest.raises(ConfigError, match="bfloat16"):
        export_lora(home / "base", family, 1.0, tmp_path / "out", dtype="int8")
    with pytest.raises(ConfigError, match="no model"):
        BaseFiles(tmp_path)
    save_tiny(tmp_path / "narrow", "qwen2_moe", hidden_size=64)
    with pytest.raises(FamilyError, match="changes router"):
        export_merged(tmp_path / "narrow", family, 1.0, tmp_path / "out", force=True)
    index = tmp_path / "forced" / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    kept = next(name for key, name in entries["weight_map"].items() if not key.endswith("mlp.gate.weight"))
    index.write_text(json.dumps({"weight_map": dict.fromkeys(["x"], kept)}))
    with pytest.raises(ExportError, match="no tensor for"):
        BaseFiles(tmp_path / "forced")
    assert not (tmp_path / "out").exists()
