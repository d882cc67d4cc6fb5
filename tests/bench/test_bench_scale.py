"""`remoe bench scale`: a GGUF of the shape asked for that others read, whole or not at all, and what is measured."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_tiny
from transformers import AutoModelForCausalLM

from remoe_adapt.bench.harness import widen as widening
from remoe_adapt.bench.scale.bench import ScaleOptions, bars, run_scale
from remoe_adapt.bench.scale.checkpoint import Shape, config_of, write_checkpoint
from remoe_adapt.bench.scale.in_ram import run_in_ram
from remoe_adapt.bench.scale.worker import Worker
from remoe_adapt.checkpoints import GgufFile
from remoe_adapt.errors import ConfigError

gguf = pytest.importorskip("gguf", reason="GGUF files are read by the gguf package (extra: export)")

# The inner size of the experts is not among what transformers reads from a GGUF: it stays the real one.
SMALL = Shape(layers=2, experts=16, chosen=4, hidden=64, heads=4, kv_heads=2, head_dim=32, vocabulary=512)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("scale") / "small.gguf", SMALL)


def test_the_default_is_a_30b_model_at_4_bits() -> None:
    shape = Shape()
    assert shape.num_experts == 6144 and shape.expert_bytes == 2_654_208
    assert 16.2e9 < shape.num_experts * shape.expert_bytes < 16.4e9


def test_the_file_is_whole_to_both_readers(checkpoint: Path) -> None:
    ours, theirs = GgufFile(checkpoint), gguf.GGUFReader(checkpoint)
    assert {tensor.name for tensor in ours.tensors} == {tensor.name for tensor in theirs.tensors}
    kinds = {tensor.name.partition(".")[2]: tensor.tensor_type.name for tensor in theirs.tensors}
    assert kinds["0.ffn_up_exps.weight"] == "Q4_0" and kinds["1.attn_q.weight"] == "Q8_0"
    assert kinds["1.ffn_gate_inp.weight"] == "F32"
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, SMALL.layers)
    known = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.QWEN3MOE])
    layer = {gguf.TENSOR_NAMES[kind].format(bid=0) + ".weight" for kind in known}
    assert {t.name for t in theirs.tensors if t.name.startswith("blk.0.")} <= layer and names is not None
    experts = next(tensor for tensor in ours.tensors if tensor.name == "blk.1.ffn_down_exps.weight")
    assert 3 * experts.size == SMALL.experts * SMALL.expert_bytes


def test_transformers_loads_it_and_it_computes(checkpoint: Path) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(
        checkpoint.parent, gguf_file=checkpoint.name, dtype=torch.float32, experts_implementation="eager"
    ).eval()
    config = model.config
    assert (config.num_experts, config.num_experts_per_tok, config.moe_intermediate_size) == (16, 4, 768)
    assert config.norm_topk_prob and config.rope_parameters["rope_theta"] == 1e6
    ids = torch.randint(0, SMALL.vocabulary, (1, 256))
    with torch.no_grad():
        found = model(input_ids=ids, output_router_logits=True)
        embedded = model.get_input_embeddings()(ids)
    assert torch.isfinite(found.logits).all()
    assert embedded.square().mean().sqrt() == pytest.approx(1, abs=0.1) and embedded.mean() == pytest.approx(
        0.5, abs=0.1
    )
    down = model.model.layers[1].mlp.experts.down_proj
    assert down.std().item() == pytest.approx(0.02 / 2, rel=0.1) and model.lm_head.weight.std().item() == pytest.approx(
        0.02, rel=0.1
    )
    for logits in found.router_logits:
        counts = torch.bincount(logits.topk(4).indices.flatten(), minlength=16).float()
        shares = counts / counts.sum()
        # Some experts are chosen far more often than others, and every token still chooses its own.
        assert shares.max() > 2 / 16 and shares.min() < 0.5 / 16
        assert 0.3 < logits.std(dim=0).mean() < 3


def test_it_is_the_same_each_time_and_kept(tmp_path: Path, checkpoint: Path) -> None:
    written: list[int] = []
    again = write_checkpoint(tmp_path / "again.gguf", SMALL, on_start=written.append, on_bytes=written.append)
    total, *pieces = written
    padding = total - sum(pieces)
    assert total == again.stat().st_size and 0 < padding < total / 10, "header and padding are not counted"
    digests = {hashlib.sha256(path.read_bytes()).hexdigest() for path in (again, checkpoint)}
    assert len(digests) == 1
    before = again.stat().st_mtime_ns
    assert write_checkpoint(again, SMALL, on_start=lambda total: pytest.fail("written twice")) == again
    assert again.stat().st_mtime_ns == before
    write_checkpoint(again, SMALL, seed=1)
    assert again.stat().st_mtime_ns != before and [path.name for path in tmp_path.iterdir()] == ["again.gguf"]


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(widening.shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(ConfigError, match=r"1 MiB free, .* needed: give --work"):
        write_checkpoint(tmp_path / "m.gguf", SMALL)
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(count: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_checkpoint(tmp_path / "m.gguf", SMALL, on_bytes=interrupt)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("sizes", [{"hidden": 100}, {"inner": 40}, {"layers": 0}, {"chosen": 200}, {"kv_heads": 5}])
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Shape(**sizes)


def test_the_configuration_is_the_one_that_the_file_says(checkpoint: Path) -> None:
    found = AutoModelForCausalLM.from_pretrained(checkpoint.parent, gguf_file=checkpoint.name).config.to_dict()
    expected = config_of(SMALL).to_dict()
    sizes = {name for name in expected if name.startswith(("num_", "hidden_", "moe_", "head_", "vocab_"))}
    assert {name: found[name] for name in sizes} == {name: expected[name] for name in sizes}


def test_a_look_up_is_timed_on_what_was_decoded(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "tiny", "qwen2_moe")
    worker = Worker()
    loaded = worker.answer(
        {"op": "load", "path": str(folder), "threads": 1, "expert_cache": 0.5, "arithmetic": "exact"}
    )
    assert loaded["experts"] == 4 * 8 and loaded["budget_bytes"] == loaded["experts"] * loaded["expert_bytes"] // 2
    assert loaded["load_s"] > 0 and 0 < loaded["maps_before"] <= loaded["maps"]
    decoded = worker.answer({"op": "decode", "ids": list(range(3, 30)), "warm": 7})
    assert len(decoded["times_ms"]) == 20 and decoded["hits"] + decoded["misses"] == 20 * 4 * 2
    assert decoded["bytes"] == decoded["misses"] * loaded["expert_bytes"]
    same = worker.answer({"op": "decode", "ids": [5] * 12, "warm": 4})
    assert same["misses"] == 0
    looked_up = worker.answer({"op": "look_ups", "ids": [5] * 12, "warm": 4, "rounds": 3})
    assert looked_up["misses"] == 0 and looked_up["look_ups"] == 8 * 4 * 2
    assert len(looked_up["us"]) == 3 and min(looked_up["us"]) > 0
    # The model computes again as before.
    assert worker.answer({"op": "decode", "ids": [5] * 12, "warm": 4})["hits"] == same["hits"]


def test_bars_are_those_of_their_definitions() -> None:
    facts = {
        "load_s": 21.0, "dense_bytes": 100 << 20, "budget_bytes": 100 << 20, "anon_growth_bytes": 284 << 20,
        "look_up_us": 7.0, "look_up_misses": 0, "hits_hit_rate": 1.0, "maps": 700, "max_map_count": 65530,
    }  # fmt: skip
    rows = [{"inner": 768, "hidden": 2048, "ratio": 0.7}]
    assert [row["met"] for row in bars(facts, rows)] == [False, True, True, True, True]
    assert [row["met"] for row in bars(facts | {"anon_growth_bytes": 285 << 20, "load_s": 20})] == [
        True,
        False,
        True,
        True,
    ]
    assert not bars(facts | {"look_up_misses": 1})[2]["met"] and not bars(facts | {"hits_hit_rate": 0.99})[2]["met"]


def test_more_layers_than_the_memory_holds_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="MiB are available: give --layers"):
        run_scale(ScaleOptions(layers=4_800, work=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_run_from_end_to_end(tmp_path: Path) -> None:
    written: list[int] = []
    options = ScaleOptions(tokens=6, threads=1, work=tmp_path, in_ram=False)
    result = run_scale(options, shape=SMALL, on_start=written.append)
    assert written and result["file_bytes"] == written[0] > result["header_bytes"] > 0
    assert result["experts"] == 32 and result["expert_bytes"] >= SMALL.expert_bytes
    assert result["hits_hit_rate"] == 1 and result["look_up_misses"] == 0
    assert 0 < result["hit_rate"] <= 1 and result["look_ups_per_token"] == 2 * 4
    assert result["bars"][0]["bar"] == "seconds to load" and result["bars"][0]["met"]
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_4_bits_are_timed_against_stock(tmp_path: Path) -> None:
    row = run_in_ram(768, work=tmp_path, keep=False, threads=1, shape=SMALL)
    assert row["stock_ms"] > 0 and row["fast_ms"] > 0 and row["ratio"] > 0 and row["inner"] == 768
    assert not list(tmp_path.iterdir())
