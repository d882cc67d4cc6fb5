"""Rows compared with another model than the base, and the arithmetic that they were measured under."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from quantised_checkpoints import reference, save_quantised
from tiny_family import save_base, save_family
from tiny_models import tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt import Family, RemoeConfig
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation.evaluate import certify, evaluate
from remoe_adapt.expert_cache.load import load_with_expert_cache
from remoe_adapt.routers.discover import discover_routers

WINDOW = 32
# No longer than a window, so that one forward predicts every token with all that stands before it.
DOCUMENTS = [
    torch.randint(1, 257, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (32, 20, 1, 9, 20)
]
IN_ALL = sum(len(ids) - 1 for ids in DOCUMENTS)
SIZES = {"vocab_size": 257, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_base(tmp_path_factory.mktemp("against") / "base", positions=WINDOW)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_base(tmp_path_factory.mktemp("against") / "other", seed=1, positions=WINDOW)


@pytest.fixture(scope="module")
def family(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return save_family(base, tmp_path_factory.mktemp("against") / "family")


def predictions(model: PreTrainedModel) -> Tensor:
    """log P [scored tokens, V] of all documents, in fp64."""
    with torch.no_grad():
        found = [model(torch.tensor([ids])).logits[0, :-1] for ids in DOCUMENTS if len(ids) > 1]
    return torch.cat(found).double().log_softmax(dim=-1)


def test_every_row_is_compared_with_the_other_model(
    base: PreTrainedModel, other: PreTrainedModel, family: Family
) -> None:
    ticks: list[int] = []
    result = evaluate(base, DOCUMENTS, family=family, against=other, on_tokens=ticks.append)
    alone, of_other = evaluate(base, DOCUMENTS, family=family), evaluate(other, DOCUMENTS)["base"]
    first = result["against"]
    assert (first["strength"], first["ppl_ratio"], first["kl"]) == (None, 1.0, 0.0)
    assert {key: first[key] for key in ("ce", "eor", "lru@0.25")} == {
        key: of_other[key] for key in ("ce", "eor", "lru@0.25")
    }
    assert alone["against"] is None
    pairs = [(result["base"], alone["base"]), *zip(result["points"], alone["points"], strict=True)]
    for row, before in (*pairs, (result["control"], alone["control"])):
        assert row["ppl_ratio"] == pytest.approx(math.exp(before["ce"] - of_other["ce"]), rel=1e-9)
        assert row["ce"] == before["ce"] and row["ppl_ratio_control"] == before["ppl_ratio_control"]
    theirs, ours = predictions(other), predictions(base)
    expected = float((theirs.exp() * (theirs - ours)).sum(dim=-1).mean())
    assert result["base"]["kl"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
    # One pass more than without it.
    assert sum(ticks) == sum(len(ids) for ids in DOCUMENTS if len(ids) > 1) * (2 + len(result["points"]) + 1)


def test_windows_fit_into_the_positions_of_both(base: PreTrainedModel, tmp_path: Path) -> None:
    short = save_base(tmp_path / "short", seed=1, positions=WINDOW // 2)
    assert evaluate(base, DOCUMENTS, against=short)["window"] == WINDOW // 2
    with pytest.raises(ConfigError, match=f"longer than this model's, {WINDOW // 2}"):
        evaluate(base, DOCUMENTS, against=short, window=WINDOW)


def test_what_cannot_be_compared_is_refused_and_the_models_are_as_they_were(base: PreTrainedModel) -> None:
    with pytest.raises(ConfigError, match="is the model itself"):
        evaluate(base, DOCUMENTS, against=base)
    wrapped = get_peft_model(base, RemoeConfig())
    try:
        with pytest.raises(ConfigError, match="is the model itself"):
            evaluate(wrapped, DOCUMENTS, against=base)
    finally:
        wrapped.unload()
    larger = tiny_model("qwen2_moe", vocab_size=300)
    with pytest.raises(ConfigError, match="one of 257 tokens, the one it is to be compared with one of 300"):
        evaluate(base, DOCUMENTS, against=larger)
    assert not any(module._forward_hooks for model in (base, larger) for module in model.modules())


def test_the_other_model_keeps_its_weights_and_its_mode(
    base: PreTrainedModel, other: PreTrainedModel, family: Family
) -> None:
    before = {ref.name: ref.weight_ED.clone() for ref in discover_routers(other)}
    other.train()
    evaluate(base, DOCUMENTS, family=family, against=other)
    assert other.training
    other.eval()
    assert all(torch.equal(ref.weight_ED, before[ref.name]) for ref in discover_routers(other))


@pytest.mark.parametrize(("architecture", "method"), [("gpt_oss", "mxfp4"), ("qwen3_moe", "fp8")])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_experts_in_a_cache_are_those_of_the_dequantised_model(
    architecture: str, method: str, share: float, tmp_path: Path
) -> None:
    folder = save_quantised(tmp_path / "model", architecture, method, sizes=SIZES, dtype=torch.float32)
    cached = load_with_expert_cache(folder, share, arithmetic="exact")
    result = evaluate(cached, DOCUMENTS, against=reference(folder))
    assert (result["base"]["ppl_ratio"], result["base"]["kl"]) == (1.0, 0.0)
    assert result["base"]["eor"] == result["against"]["eor"]
    assert result["arithmetic"] == {"name": method, "exact": True}
    assert evaluate(reference(folder), DOCUMENTS)["arithmetic"] == {"name": "float", "exact": True}


def test_certificates_say_under_which_arithmetic_they_were_measured(
    base: PreTrainedModel, other: PreTrainedModel, tmp_path: Path
) -> None:
    family, many = save_family(base, tmp_path / "family"), DOCUMENTS * (1 + 1000 // IN_ALL)
    certify(family, evaluate(base, many, family=family))
    points = [*Family.load(tmp_path / "family").points, Family.load(tmp_path / "family").control]
    for point in points:
        assert point is not None and point.certificate is not None
        assert point.certificate["arithmetic"] == {"name": "float", "exact": True}
    before = (tmp_path / "family" / "family.json").read_bytes()
    with pytest.raises(ConfigError, match="another model than the base"):
        certify(family, evaluate(base, many, family=family, against=other))
    assert (tmp_path / "family" / "family.json").read_bytes() == before
