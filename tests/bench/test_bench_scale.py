"""The checkpoint of `remoe bench scale`: a GGUF of the shape asked for that others read, whole or not at all."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from remoe_adapt.bench.harness import widen as widening
from remoe_adapt.bench.scale.checkpoint import Shape, write_checkpoint
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
