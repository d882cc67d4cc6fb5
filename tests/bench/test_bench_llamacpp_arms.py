"""Stock llama.cpp in the decode benchmark: files of the model itself, decoded as the other arms are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import save_tiny, stock

from remoe_adapt.bench.decode.gguf_copy import write_gguf_copies
from remoe_adapt.bench.decode.worker import Worker
from remoe_adapt.engines.llamacpp import library
from remoe_adapt.errors import ConfigError, MissingDependencyError, UncacheableError
from remoe_adapt.evaluation import score
from remoe_adapt.expert_cache.encodings import KINDS, dequantise, quantise
from remoe_adapt.expert_cache.gguf.tensors import bytes_of, numbers_of, open_gguf

gguf = pytest.importorskip("gguf", reason="GGUF (extra: export)")
pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
IDS = torch.randint(3, 90, (40,), generator=torch.Generator().manual_seed(1)).tolist()
PROMPT = 8
# Rows of whole blocks, and heads that the engine's attention takes.
SIZES = {"moe_intermediate_size": 64, "intermediate_size": 64, "shared_expert_intermediate_size": 64, "hidden_size": 64}


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    try:
        library()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("copies")
    # norm_topk_prob off, as the engine computes this architecture.
    base = save_tiny(home / "base", "qwen2_moe", num_key_value_heads=4, norm_topk_prob=False, **SIZES)
    write_gguf_copies(base, home / "f16.gguf", home / "q4.gguf")
    return {"base": base, "f16": home / "f16.gguf", "q4": home / "q4.gguf"}


def decoded(options: dict[str, Any]) -> list[dict[str, Any]]:
    worker = Worker()
    facts = worker.do_load("llamacpp", ".", 1, {"threads": 1, "context_tokens": len(IDS), **options})
    assert facts["file_bytes"] == Path(options["file"]).stat().st_size
    found = [worker.do_decode({}, IDS, PROMPT, 60.0)["steps"] for _ in range(2)]
    assert [step["nll"] for step in found[0]] == [step["nll"] for step in found[1]], "the second starts anew"
    return found[0]


def test_the_f16_file_is_the_model(copies: dict[str, Path]) -> None:
    steps = decoded({"file": str(copies["f16"])})
    with torch.no_grad():
        logits_TV = stock(copies["base"])(input_ids=torch.tensor([IDS])).logits[0]
    wanted = score(logits_TV[PROMPT:-1], torch.tensor(IDS[PROMPT + 1 :]))[0].tolist()
    assert [step["nll"] for step in steps] == pytest.approx(wanted, abs=5e-3)
    assert all(step["s"] > 0 and {"io_bytes", "major_faults"} <= step.keys() for step in steps)


def test_four_bits_are_those_of_our_packs_and_the_rest_is_as_in_f16(copies: dict[str, Path]) -> None:
    (_, f16), (_, q4) = open_gguf(copies["f16"]), open_gguf(copies["q4"])
    assert f16.keys() == q4.keys()
    experts = {name for name in q4 if "_exps" in name}
    assert len(experts) == 3 * 4 and {q4[name].kind for name in experts} == {KINDS[4]}
    for name in f16.keys() - experts:
        assert q4[name].kind == f16[name].kind and torch.equal(bytes_of(q4[name]), bytes_of(f16[name]))
    weights = stock(copies["base"]).model.layers[1].mlp.experts
    blocks_NB = bytes_of(q4["blk.1.ffn_down_exps.weight"])
    down_NK = weights.down_proj.flatten(0, 1)
    assert torch.equal(blocks_NB, quantise(down_NK, KINDS[4]).blocks_NB)
    up_NK = weights.gate_up_proj.chunk(2, dim=1)[1].flatten(0, 1)
    found_NK = numbers_of(q4["blk.1.ffn_up_exps.weight"], torch.float32).flatten(0, 1)
    assert torch.equal(found_NK, dequantise(quantise(up_NK, KINDS[4]).blocks_NB, KINDS[4], up_NK.shape[1]))
    assert [s["nll"] for s in decoded({"file": str(copies["q4"])})] != [
        s["nll"] for s in decoded({"file": str(copies["f16"])})
    ]


def test_an_arm_with_a_prior_has_it_or_says_why_not(copies: dict[str, Path]) -> None:
    plain = decoded({"file": str(copies["q4"])})
    none = decoded({"file": str(copies["q4"]), "engine": {"recency": "ema", "gain": 0.0}})
    much = decoded({"file": str(copies["q4"]), "engine": {"recency": "ema", "gain": 3.0}})
    assert [s["nll"] for s in none] == [s["nll"] for s in plain] != [s["nll"] for s in much]


def test_arms_of_one_process_differ_in_their_gain(copies: dict[str, Path]) -> None:
    worker = Worker()
    engine = {"recency": "ema", "gain": 0.0}
    worker.do_load(
        "llamacpp", ".", 1, {"threads": 1, "context_tokens": len(IDS), "file": str(copies["q4"]), "engine": engine}
    )
    found = {}
    for gain in (0.0, 3.0):
        steps = worker.do_decode({"gain": gain}, IDS, PROMPT, 60.0)["steps"]
        found[gain] = [step["nll"] for step in steps]
        alone = decoded({"file": str(copies["q4"]), "engine": engine | {"gain": gain}})
        assert found[gain] == [step["nll"] for step in alone]
    assert found[0.0] != found[3.0]


def test_a_cache_of_one_arm_goes_on_with_what_it_has(copies: dict[str, Path]) -> None:
    worker = Worker()
    cached = {"budget": 0.5, "cache": {}, "family": None, "gain": 0.2, "dial": True}
    worker.do_load("cached", str(copies["base"]), 1, cached)

    def prompt_misses(strength: float) -> int:
        cache = worker._regime.cache
        before = cache.stats()["misses"]
        steps = worker.do_decode({"strength": strength}, IDS, PROMPT, 60.0)["steps"]
        return cache.stats()["misses"] - before - sum(sum(step["misses"]) for step in steps)

    cold, warm = prompt_misses(0.0), prompt_misses(0.0)
    assert warm < cold == prompt_misses(1.0)


@pytest.mark.parametrize(("kind", "words"), [("mixtral", "stored otherwise"), ("dbrx", "lacks its entries")])
def test_a_model_that_the_table_does_not_wholly_describe_is_refused(kind: str, words: str, tmp_path: Path) -> None:
    base = save_tiny(tmp_path / "base", kind)
    with pytest.raises(UncacheableError, match=words):
        write_gguf_copies(base, tmp_path / "f16.gguf", tmp_path / "q4.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def test_a_file_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "no.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"llama\.cpp cannot load"):
        Worker().do_load("llamacpp", ".", 1, {"threads": 1, "context_tokens": 8, "file": str(tmp_path / "no.gguf")})
