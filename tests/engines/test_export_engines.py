"""The exports in the engines that run them: transformers and llama.cpp compute the same logits and choose the same
experts, live, merged, patched and by LoRA."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from export_support import Home, changed_only_in_routers
from gguf_writer import ARCH, small_model, write_gguf
from llama_engine import skip_without_engine
from numpy.typing import NDArray
from peft import PeftModel
from torch import nn
from transformers import AutoModelForCausalLM

from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.engines.gguf.patch import export_gguf
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.merged import export_merged
from remoe_adapt.engines.peft_lora import export_lora
from remoe_adapt.errors import ConfigError, MissingDependencyError, TraceError
from remoe_adapt.evaluation.record import inference, record_forward, record_prefill
from remoe_adapt.family.family import original_weights

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
from remoe_adapt.engines.llamacpp.in_process import VERSION, LlamaModel, library
from remoe_adapt.engines.llamacpp.record import GgufTokenizer, open_gguf, record_gguf

STRENGTHS = (0.3, 0.5, 1.0)  # below the first point, a point, the last one
TOKENS = 96
Run = tuple[NDArray[np.float32], NDArray[np.int32]]


@pytest.fixture(scope="module", autouse=True)
def _right_version() -> None:
    skip_without_engine()


@pytest.fixture(scope="module")
def ids() -> list[int]:
    return torch.randint(0, 256, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def homes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Home]:
    return {kind: Home(tmp_path_factory.mktemp(kind), small_model(kind), kind) for kind in ARCH}


def in_transformers(model: nn.Module, ids: list[int]) -> Run:
    """(logits [T, V], chosen experts [L, T, K])"""
    with record_forward(model) as recorder, inference(model):
        logits = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        return logits, recorder.take().numpy().astype(np.int32)


def in_llama(path: Path, ids: list[int], loras: dict[Path, float] | None = None) -> Run:
    with LlamaModel(path, context_tokens=TOKENS, trace=True) as engine:
        engine.set_loras({engine.load_lora(lora): scale for lora, scale in (loras or {}).items()})
        logits = engine.decode(ids)
        return logits, np.stack([np.concatenate(engine.routes[layer]) for layer in sorted(engine.routes)])


@contextmanager
def live(home: Home, strength: float) -> Iterator[nn.Module]:
    """The base's own model with the family's weights in it."""
    weights = original_weights(home.model)
    before = {name: weight.clone() for name, weight in weights.items()}
    with torch.no_grad():
        for name, value in home.family.live(strength, weights).items():
            weights[name].copy_(value)
        yield home.model
        for name, value in before.items():
            weights[name].copy_(value)


def same_experts(ours: NDArray[np.int32], theirs: NDArray[np.int32]) -> float:
    """Share of (layer, token) with equal sets."""
    return float((np.sort(ours, axis=-1) == np.sort(theirs, axis=-1)).all(axis=-1).mean())


@pytest.mark.parametrize("kind", ARCH)
@pytest.mark.parametrize("strength", STRENGTHS)
def test_every_export_computes_what_the_live_model_computes(
    kind: str, strength: float, homes: dict[str, Home], ids: list[int], tmp_path: Path
) -> None:
    home, family = homes[kind], homes[kind].family
    with live(home, strength) as model:
        logits, experts = in_transformers(model, ids)
    base_logits, base_experts = in_transformers(home.model, ids)
    # Sentinel: what follows compares something only if the adapter changes routing.
    assert same_experts(experts, base_experts) < 0.9 and np.abs(logits - base_logits).max() > 1e-2

    export_merged(home.base, family, strength, tmp_path / "merged")
    export_lora(home.base, family, strength, tmp_path / "peft")
    export_gguf(home.gguf, family, strength, tmp_path / "patched.gguf", base=home.base)
    split_gguf(home.gguf, family, strength, tmp_path / "split.gguf")
    (lora,) = export_gguf_lora(home.gguf, family, tmp_path / "lora", strengths=[strength])["loras"]
    plain = AutoModelForCausalLM.from_pretrained(home.base)
    arms = {
        "merged": in_transformers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), ids),
        "patched": in_llama(tmp_path / "patched.gguf", ids),
        "split": in_llama(tmp_path / "split-00001-of-00002.gguf", ids),
        "gguf-lora": in_llama(home.gguf, ids, {Path(lora["file"]): 1.0}),
    }
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(plain, str(tmp_path / "peft"))
        peft_logits = adapted(input_ids=torch.tensor([ids])).logits[0].numpy()
    for name, (theirs, chosen) in arms.items():
        assert np.abs(theirs - logits).max() <= 1e-4, name
        assert same_experts(chosen, experts) >= 0.999, name
    assert np.abs(peft_logits - logits).max() <= 1e-4
    assert np.array_equal(arms["merged"][0], logits)


def test_scales_of_two_loras_interpolate_like_the_family(
    homes: dict[str, Home], ids: list[int], tmp_path: Path
) -> None:
    home = homes["qwen3moe"]
    half, full = (Path(row["file"]) for row in export_gguf_lora(home.gguf, home.family, tmp_path)["loras"])
    for strength, scales in ((0.2, {half: 0.4}), (0.75, {half: 0.5, full: 0.5}), (0.0, {half: 0.0})):
        with live(home, strength) as model:
            logits, experts = in_transformers(model, ids)
        theirs, chosen = in_llama(home.gguf, ids, scales)
        assert np.abs(theirs - logits).max() <= 1e-4 and same_experts(chosen, experts) >= 0.999


def test_a_lora_of_lower_rank_is_what_its_error_says(homes: dict[str, Home], ids: list[int], tmp_path: Path) -> None:
    home = homes["olmoe"]
    runs, errors = [], []
    for rank in (4, 12, 16):
        (row,) = export_gguf_lora(home.gguf, home.family, tmp_path / str(rank), strengths=[1.0], rank=rank)["loras"]
        runs.append(in_llama(home.gguf, ids, {Path(row["file"]): 1.0})[0])
        errors.append(row["relative_error"])
    with live(home, 1.0) as model:
        logits, _ = in_transformers(model, ids)
    off = [float(np.abs(run - logits).max()) for run in runs]
    assert off[0] > off[1] > off[2] and off[2] <= 1e-4
    assert errors[0] > errors[1] > errors[2] == 0.0


@pytest.mark.parametrize("weights", ["Q8_0", "Q4_K_M", "IQ4_XS"])
def test_quantised_models_reroute_as_the_unquantised_one(weights: str, ids: list[int], tmp_path: Path) -> None:
    home = Home(tmp_path, small_model("qwen2moe", hidden=256, inner=256, layers=2), "qwen2moe")
    source = write_gguf(home.model, "qwen2moe", tmp_path / "quantised.gguf", weights=weights)
    export_gguf(source, home.family, 1.0, tmp_path / "patched.gguf")
    export_gguf(home.gguf, home.family, 1.0, tmp_path / "exact.gguf")
    assert changed_only_in_routers(source, tmp_path / "patched.gguf")
    assert source.stat().st_size < 0.5 * home.gguf.stat().st_size
    (base, patched), (base_exact, patched_exact) = (
        tuple(in_llama(path, ids)[1] for path in pair)
        for pair in ((source, tmp_path / "patched.gguf"), (home.gguf, tmp_path / "exact.gguf"))
    )
    # Quantisation itself moves some choices of a random model; the adapter moves as many as without it, the same way.
    assert abs(same_experts(base, patched) - same_experts(base_exact, patched_exact)) < 0.1
    assert same_experts(base, patched) < 0.7
    assert same_experts(patched, patched_exact) > same_experts(base, base_exact) - 0.1
    assert same_experts(patched, patched_exact) > same_experts(base, patched_exact) + 0.05


def test_a_trace_of_llama_cpp_is_that_of_transformers(homes: dict[str, Home], ids: list[int]) -> None:
    for kind, home in homes.items():
        documents = [ids[:70], ids[70:71], ids[71:]]  # the second is too short to count
        with LlamaModel(home.gguf, context_tokens=64, trace=True) as engine:
            ours = record_gguf(engine, documents, window=64, model_id=kind)
        theirs = record_prefill(home.model, documents)  # in windows of 256
        assert ours.experts.shape == theirs.experts.shape and ours.num_experts == theirs.num_experts == 16
        assert ours.document_starts == theirs.document_starts and ours.meta["model"] == kind
        # Windows of 64 tokens cut the context of the last 6 of the first document alone.
        kept = np.r_[0:64, 70 : ours.num_tokens]
        assert same_experts(ours.experts[:, kept], theirs.experts[:, kept]) >= 0.999
        if kind != "deepseek2":  # which does not sort its choice; llama.cpp does
            assert (ours.experts[:, kept] == theirs.experts[:, kept]).mean() >= 0.999


def test_the_engine_refuses_what_it_cannot_do(homes: dict[str, Home], tmp_path: Path) -> None:
    home = homes["olmoe"]
    engine, window = open_gguf(home.gguf, threads=1)
    with engine:
        assert window == 256 and GgufTokenizer(engine)("her")["input_ids"] == [ord("h"), 258]
        with pytest.raises(ConfigError, match="cannot load the LoRA"):
            engine.load_lora(home.gguf)
        with pytest.raises(TraceError, match="cannot decode"):
            engine.decode([1] * 5000)
        with pytest.raises(TraceError, match="could not decode"):
            engine.decode([100_000])
    (tmp_path / "broken.gguf").write_bytes(home.gguf.read_bytes()[:5000])
    with pytest.raises(ConfigError, match="cannot load"):
        LlamaModel(tmp_path / "broken.gguf")
    with LlamaModel(home.gguf) as silent, pytest.raises(TraceError, match="trace=True"):
        record_gguf(silent, [[1, 2, 3]], window=8)


def test_another_version_of_the_wheel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.metadata

    monkeypatch.setattr(importlib.metadata, "version", lambda _: "2027.1.1")
    with pytest.raises(MissingDependencyError, match=VERSION):
        library.__wrapped__()
