"""The evaluation protocol against naive loops, arms against separately built models, certificates in family.json."""

from __future__ import annotations

import gzip
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny_family import byte_tokenizer, save_base, save_family
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt import Family, RemoeConfig, discover_routers
from remoe_adapt.errors import AdapterConflictError, DataError, FingerprintMismatchError, MissingDependencyError
from remoe_adapt.evaluation.arms import arms_of
from remoe_adapt.evaluation.evaluate import _batches, certify, commit, evaluate, evaluate_tasks, score
from remoe_adapt.evaluation.record import record_prefill, windows
from remoe_adapt.family.family import original_weights
from remoe_adapt.recency_settings import Recency
from remoe_adapt.texts import read_shared
from remoe_adapt.traces.metrics import eor, load_entropy


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_base(tmp_path_factory.mktemp("evaluate") / "base", positions=32)


@pytest.fixture(scope="module")
def family(base: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Family:
    return save_family(base, tmp_path_factory.mktemp("evaluate") / "family")


@pytest.fixture(scope="module")
def documents() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 257, (n,), generator=generator).tolist() for n in (75, 20, 1, 33, 20)]


def log_probabilities(model: PreTrainedModel, ids: list[int]) -> Tensor:
    with torch.no_grad():
        logits_TV: Tensor = model(torch.tensor([ids])).logits[0]
    return logits_TV.double().log_softmax(dim=-1)


def scored_one_by_one(model: PreTrainedModel, documents: list[list[int]], window: int) -> list[Tensor]:
    """Distribution [V] that scores each token, by the protocol's words: one forward per token, nothing batched.

    Tokens of the first window see all that stands before them; later ones see from the start of their own window.
    """
    distributions = []
    for ids in documents:
        for target in range(1, len(ids)):
            # The first window that holds the target; windows start every half window.
            start = next(b for b in range(0, len(ids), window // 2) if target < b + window)
            distributions.append(log_probabilities(model, ids[start:target])[-1])
    return distributions


def targets(documents: list[list[int]]) -> list[int]:
    return [token for ids in documents for token in ids[1:]]


def merged_copy(base: PreTrainedModel, family: Family, strength: float) -> PreTrainedModel:
    """The base with W + delta written in by hand."""
    copy: PreTrainedModel = type(base)(base.config).eval()
    copy.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, delta_ED in family.point(strength).deltas.items():
            copy.get_submodule(name).weight += delta_ED
    return copy


def test_base_and_point_equal_token_by_token_scoring(
    base: PreTrainedModel, family: Family, documents: list[list[int]]
) -> None:
    result = evaluate(base, documents, family=family)
    moved = merged_copy(base, family, 1.0)
    by_base = scored_one_by_one(base, documents, 32)
    by_point = scored_one_by_one(moved, documents, 32)
    nll_base = [-float(logp_V[t]) for logp_V, t in zip(by_base, targets(documents), strict=True)]
    nll_point = [-float(logp_V[t]) for logp_V, t in zip(by_point, targets(documents), strict=True)]
    ce_base, ce_point = (sum(nll) / len(nll) for nll in (nll_base, nll_point))
    kl = sum(float((p.exp() * (p - q)).sum()) for p, q in zip(by_base, by_point, strict=True)) / len(by_base)

    assert result["tokens"] == len(nll_base) == 74 + 19 + 32 + 19
    assert result["documents"] == 4 and result["window"] == 32
    assert [row["strength"] for row in result["points"]] == [0.5, 1.0]
    row = result["points"][1]
    assert result["base"]["ce"] == pytest.approx(ce_base, rel=1e-5)
    assert row["ce"] == pytest.approx(ce_point, rel=1e-5)
    assert row["ppl"] == pytest.approx(math.exp(ce_point), rel=1e-5)
    assert row["ppl_ratio"] == pytest.approx(math.exp(ce_point - ce_base), rel=1e-5)
    assert kl > 1e-3 and row["kl"] == pytest.approx(kl, rel=1e-3)


def test_base_row_is_the_reference(base: PreTrainedModel, family: Family, documents: list[list[int]]) -> None:
    row = evaluate(base, documents, family=family)["base"]
    assert (row["strength"], row["ppl_ratio"], row["kl"]) == (0.0, 1.0, 0.0)


def test_control_is_measured_and_compared_with(
    base: PreTrainedModel, family: Family, documents: list[list[int]]
) -> None:
    result = evaluate(base, documents, family=family)
    control = result["control"]
    assert control["strength"] is None and control["ppl_ratio_control"] == 1.0
    for row in (result["base"], *result["points"]):
        assert row["ppl_ratio_control"] == pytest.approx(row["ppl"] / control["ppl"], rel=1e-9)


def test_without_family_only_the_base_is_measured(base: PreTrainedModel, documents: list[list[int]]) -> None:
    result = evaluate(base, documents)
    assert result["points"] == [] and result["control"] is None
    assert result["base"]["ppl_ratio_control"] is None


def test_routing_figures_are_those_of_a_recorded_trace(
    base: PreTrainedModel, family: Family, documents: list[list[int]]
) -> None:
    row = evaluate(base, documents, family=family, policies=("lru", "belady"), caches=(0.5,))["points"][0]
    trace = record_prefill(merged_copy(base, family, 0.5), documents)
    assert row["eor"] == eor(trace)
    assert row["load_entropy"] == load_entropy(trace)
    assert [key for key in row if "@" in key] == [
        *("lru@0.5", "lru@0.5/lookup", "belady@0.5", "belady@0.5/lookup"),
    ]


def test_weights_are_back_bit_for_bit_even_after_an_error(
    base: PreTrainedModel, family: Family, documents: list[list[int]]
) -> None:
    before = {name: value.clone() for name, value in base.state_dict().items()}
    pointers = [ref.weight_ED.data_ptr() for ref in discover_routers(base)]
    evaluate(base, documents, family=family)
    with pytest.raises(RuntimeError, match="on purpose"), arms_of(base, family) as arms:
        arms.use(arms.points[0])
        assert any(not torch.equal(base.state_dict()[name], value) for name, value in before.items())
        raise RuntimeError("on purpose")
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())
    assert [ref.weight_ED.data_ptr() for ref in discover_routers(base)] == pointers


def test_batching_changes_nothing_but_speed(
    base: PreTrainedModel, documents: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    together = evaluate(base, documents)["base"]
    # By import_module: the face has a function of the name of this file.
    module = importlib.import_module("remoe_adapt.evaluation.evaluate")
    monkeypatch.setattr(module, "_BATCH_VALUES", 1)
    monkeypatch.setattr(module, "_PIECE_VALUES", 1000)
    alone = evaluate(base, documents)["base"]
    assert together["ce"] == pytest.approx(alone["ce"], rel=1e-6)
    assert together["eor"] == alone["eor"]


def test_batches_hold_equal_windows_within_the_memory_bound() -> None:
    plan = windows([100, 40, 40, 40, 100], 32)
    grouped = list(_batches(plan, vocabulary=1 << 20))
    assert sorted((w for batch in grouped for w in batch), key=lambda w: (w.document, w.begin)) == plan
    for batch in grouped:
        assert len({(w.end - w.begin, w.scored) for w in batch}) == 1
        assert len(batch) * (batch[0].scored + 1) <= 32


def test_score_by_hand() -> None:
    logits_NV = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]])) + 3.0
    base_NV = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.1, 0.8]]))
    nll_N, kl_N = score(logits_NV, torch.tensor([0, 2]), base_NV)
    torch.testing.assert_close(nll_N, torch.tensor([math.log(2), -math.log(0.8)]))
    expected = 0.25 * math.log(0.5) + 0.5 * math.log(2)
    torch.testing.assert_close(kl_N, torch.tensor([expected, 0.0]), atol=1e-6, rtol=1e-5)


def test_divergence_of_equal_and_of_masked_logits() -> None:
    logits_NV = torch.randn(50, 300) * 10
    assert torch.equal(score(logits_NV, torch.zeros(50, dtype=torch.long), logits_NV)[1], torch.zeros(50))
    logits_NV[:, 7] = -math.inf
    _, kl_N = score(logits_NV, torch.zeros(50, dtype=torch.long), logits_NV)
    assert torch.equal(kl_N, torch.zeros(50))


def test_another_base_is_refused_unless_forced(family: Family, documents: list[list[int]], tmp_path: Path) -> None:
    other = save_base(tmp_path / "other", seed=5, positions=32)
    with pytest.raises(FingerprintMismatchError, match="tiny/base"):
        evaluate(other, documents, family=family)
    assert len(evaluate(other, documents, family=family, force=True)["points"]) == 2


def test_a_model_that_runs_an_adapter_is_refused(family: Family, documents: list[list[int]], tmp_path: Path) -> None:
    wrapped = get_peft_model(save_base(tmp_path / "base", positions=32), RemoeConfig(init_weights=False))
    with pytest.raises(AdapterConflictError, match="runs the adapter default"):
        evaluate(wrapped, documents, family=family)
    evaluated = evaluate(wrapped, documents)["base"]
    with wrapped.disable_adapter():
        assert evaluate(wrapped, documents, family=family)["base"]["ce"] != evaluated["ce"]
        assert list(original_weights(wrapped)) == list(family.points[0].deltas)


def test_nothing_to_score_is_an_error(base: PreTrainedModel) -> None:
    with pytest.raises(DataError, match="no document has two tokens"):
        evaluate(base, [[1], []])


def test_tokens_are_shared_evenly_among_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" * 500)
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": "b" * 30}) + "\n" for _ in range(9)))
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("c" * 7)
    tokenizer = byte_tokenizer()
    a, b, c = (tokenizer(letter)["input_ids"][0] for letter in "abc")
    rows = read_shared([tmp_path], tokenizer, 300)
    assert [(row[0], len(row)) for row in rows] == [(a, 100), (b, 30), (b, 30), (b, 30), (b, 10), (c, 7)]
    assert sum(len(row) for row in read_shared([tmp_path], tokenizer)) == 500 + 270 + 7
    with pytest.raises(DataError, match="too few for 3"):
        read_shared([tmp_path], tokenizer, 5)


def test_certificates_are_written_and_read_back(
    base: PreTrainedModel, documents: list[list[int]], tmp_path: Path
) -> None:
    family = save_family(base, tmp_path / "family")
    few = evaluate(base, documents[:1], family=family)
    with pytest.raises(
        DataError, match=f"{few['tokens']} scored tokens are too few for a certificate, which needs 1000"
    ):
        certify(family, few)
    assert Family.load(tmp_path / "family").points[0].certificate is None
    many = documents * (1 + 1000 // sum(len(ids) - 1 for ids in documents))
    result = {**evaluate(base, many, family=family), "data": ["some.txt"]}
    certify(family, result)
    again = Family.load(tmp_path / "family")
    for point, row in zip(again.points, result["points"], strict=True):
        assert point.certificate is not None
        assert {k: point.certificate[k] for k in ("ce", "ppl_ratio", "kl", "eor", "lru@0.25")} == {
            k: row[k] for k in ("ce", "ppl_ratio", "kl", "eor", "lru@0.25")
        }
        assert point.certificate["data"] == ["some.txt"]
        assert point.certificate["tokens"] == result["tokens"]
        assert point.certificate["commit"] == commit()
    assert again.control is not None and again.control.certificate is not None
    assert again.control.certificate["ppl_ratio_control"] == 1.0


def test_tasks_without_lm_eval_name_the_extra(base: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependencyError, match=r"remoe-adapt\[eval\]"):
        evaluate_tasks(base, byte_tokenizer(), None, ["arc_easy"])


def test_tasks_are_scored_per_arm_by_the_swapped_model(
    base: PreTrainedModel, family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="the extra `eval` is not installed")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": f"{n} apples"}) + "\n" for n in range(5)))
    (tmp_path / "own.yaml").write_text(
        "task: own_text\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'd.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]\n'
    )
    with pytest.raises(DataError, match="no task 'no_such_task'"):
        evaluate_tasks(base, byte_tokenizer(), family, ["no_such_task"])
    priors = [Recency.of("ema", gain) for gain in (0.0, 0.5)]
    result = evaluate_tasks(base, byte_tokenizer(), family, ["own_text"], folder=tmp_path, limit=3, priors=priors)
    rows = (result["base"], result["control"], *result["points"], *result["priors"])
    assert [row["strength"] for row in rows] == [0.0, None, 0.5, 1.0, 0.0, 0.0]
    assert [row.get("recency_gain") for row in rows] == [None, None, None, None, 0.0, 0.5]
    scores = [row["tasks"]["own_text"]["byte_perplexity,none"] for row in rows]
    # A prior of gain 0 is the base; one of another gain changes what lm-eval sees as well.
    assert scores[4] == scores[0] and len(set(scores)) == 5
