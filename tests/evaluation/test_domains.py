"""Quality by domain against a naive loop over tokens, and which text is of which domain."""

from __future__ import annotations

import gzip
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from tiny_family import byte_tokenizer, save_base, save_family
from transformers import PreTrainedModel

from remoe_adapt import Family
from remoe_adapt.errors import DataError
from remoe_adapt.evaluation.domains import evaluate_domains
from remoe_adapt.evaluation.evaluate import certify, evaluate
from remoe_adapt.recency_settings import Recency
from remoe_adapt.texts import read_domains

WINDOW = 16


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedModel:
    return save_base(tmp_path_factory.mktemp("domains") / "base", positions=WINDOW)


@pytest.fixture
def family(base: PreTrainedModel, tmp_path: Path) -> Family:
    return save_family(base, tmp_path / "family", (1.0,))


@pytest.fixture(scope="module")
def domains() -> dict[str, list[list[int]]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(1, 257, (n,), generator=generator).tolist() for n in (20, 7, 6)]
    return {"law": ids[:2], "code": ids[2:]}


def test_rows_are_those_of_a_loop_over_tokens(
    base: PreTrainedModel, family: Family, domains: dict[str, list[list[int]]]
) -> None:
    moved: PreTrainedModel = type(base)(base.config).eval()
    moved.load_state_dict(base.state_dict())
    with torch.no_grad():
        for name, delta_ED in family.point(1.0).deltas.items():
            moved.get_submodule(name).weight += delta_ED
    law, code = evaluate_domains(base, domains, family=family, least_tokens=1)
    assert (law["domain"], law["tokens"], law["documents"]) == ("law", 19 + 6, 2)
    assert (code["domain"], code["tokens"], code["documents"]) == ("code", 5, 1)
    for found, documents in ((law, domains["law"]), (code, domains["code"])):
        nll, kl, same = [], [], []
        for ids in documents:
            # The second piece of the long document begins at the first one's last token, with an empty KV cache.
            for target in range(1, len(ids)):
                begin = (target - 1) // (WINDOW - 1) * (WINDOW - 1)
                with torch.no_grad():
                    given = torch.tensor([ids[begin:target]])
                    p_V, q_V = (each(given).logits[0, -1].double().log_softmax(-1) for each in (base, moved))
                nll.append((-float(p_V[ids[target]]), -float(q_V[ids[target]])))
                kl.append(float((p_V.exp() * (p_V - q_V)).sum()))
                same.append(int(p_V.argmax()) == int(q_V.argmax()))
        row, tokens = found["points"][0], len(kl)
        alone = evaluate_domains(moved, {found["domain"]: documents}, least_tokens=1)[0]["base"]
        assert (row["eor"], row["lru@0.25"]) == (alone["eor"], alone["lru@0.25"])
        assert row["kl"] == pytest.approx(sum(kl) / tokens, rel=1e-3)
        assert row["top1_agreement"] == sum(same) / tokens
        assert row["ppl_ratio"] == pytest.approx(math.exp(sum(q - p for p, q in nll) / tokens), rel=1e-4)
        assert (found["base"]["kl"], found["base"]["top1_agreement"], found["base"]["ppl_ratio"]) == (0.0, 1.0, 1.0)
    assert 0 < law["points"][0]["top1_agreement"] < 1 and law["points"][0]["eor"] != law["base"]["eor"]


def test_arms_that_take_turns_within_a_document_change_nothing(
    base: PreTrainedModel, family: Family, domains: dict[str, list[list[int]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    priors = [Recency.of("ema", 0.3)]
    before = {name: value.clone() for name, value in base.state_dict().items()}
    whole = evaluate_domains(base, domains, family=family, priors=priors, least_tokens=1)
    monkeypatch.setattr(importlib.import_module("remoe_adapt.evaluation.domains"), "_CHUNK_VALUES", 257 * 5)
    turns = evaluate_domains(base, domains, family=family, priors=priors, least_tokens=1)
    for found, expected in zip(turns, whole, strict=True):
        for kind in ("base", "points", "priors"):
            mine, its = (each[kind] if kind == "base" else each[kind][0] for each in (found, expected))
            # Sums of other lengths differ in their last digits.
            sums = ("ce", "ppl", "ppl_ratio", "ppl_ratio_control", "kl")
            assert [mine[key] for key in sums] == pytest.approx([its[key] for key in sums], rel=1e-9)
            assert {**mine, **dict.fromkeys(sums)} == {**its, **dict.fromkeys(sums)}
    prior = whole[0]["priors"][0]
    assert prior["recency_gain"] == 0.3 and prior["kl"] > 0 and prior["eor"] > whole[0]["base"]["eor"]
    assert all(torch.equal(base.state_dict()[name], value) for name, value in before.items())


def test_another_model_is_compared_with(
    base: PreTrainedModel, domains: dict[str, list[list[int]]], tmp_path: Path
) -> None:
    other = save_base(tmp_path / "other", seed=1, positions=WINDOW)
    found = evaluate_domains(base, {"code": domains["code"]}, against=other, least_tokens=1)[0]
    alone = evaluate_domains(other, {"code": domains["code"]}, least_tokens=1)[0]["base"]
    assert found["against"]["ce"] == alone["ce"] and found["base"]["kl"] > 0


def test_too_little_text_is_refused_before_anything_is_decoded(
    base: PreTrainedModel, domains: dict[str, list[list[int]]]
) -> None:
    with pytest.raises(DataError, match=r"domain law has 25 token\(s\) to decode, 512 are needed"):
        evaluate_domains(base, domains)


def test_certificates_hold_the_base_and_the_quality_by_domain(
    base: PreTrainedModel, family: Family, domains: dict[str, list[list[int]]]
) -> None:
    result = evaluate(base, domains["law"] * 40, family=family, per_layer=True)
    result["domains"] = evaluate_domains(base, domains, family=family, least_tokens=1)
    certify(family, result)
    for kept, row, found in (
        (family.points[0].certificate, result["points"][0], result["domains"][1]["points"][0]),
        (family.control and family.control.certificate, result["control"], result["domains"][1]["control"]),
    ):
        assert kept is not None
        of_domain = {key: found[key] for key in ("ppl_ratio", "kl", "top1_agreement")}
        assert kept["domains"]["code"] == {"tokens": 5} | of_domain and list(kept["domains"]) == ["law", "code"]
        assert kept["base"]["lru@0.25"] == result["base"]["lru@0.25"] and kept["per_layer"] == row["per_layer"]


def test_domains_are_files_or_what_a_record_says(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    (tmp_path / "more").mkdir()
    (tmp_path / "a.txt").write_text("x" * 30)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as file:
        for domain in ("law", None, "law", " ", 7, "law"):
            file.write(json.dumps({"text": "y" * 9, **({} if domain is None else {"domain": domain})}) + "\n")
    (tmp_path / "more" / "c.txt").write_text("z")
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl.gz", tmp_path / "more"]
    found = read_domains(files, tokenizer, 12)
    # Tokens to predict: 12 of the one document, 8 and 4 of two records; a lone token predicts nothing.
    assert {name: list(map(len, documents)) for name, documents in found.items()} == {
        "a": [13], "law": [9, 5], "b": [9, 5],
    }  # fmt: skip
    (tmp_path / "more" / "a.txt").write_text("w" * 30)
    # Two files are called a.txt, and only their folders tell them apart.
    assert list(read_domains([tmp_path / "a.txt", tmp_path / "more"], tokenizer, 5)) == [
        f"{tmp_path.name}/a.txt", "more/a.txt",
    ]  # fmt: skip


def test_ids_are_no_domains(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "some words", "domain": f"id-{number}"}) + "\n" for number in range(80)]
    (tmp_path / "ids.jsonl").write_text("".join(lines))
    with pytest.raises(DataError, match=r"ids\.jsonl: more than 64 domains"):
        read_domains([tmp_path / "ids.jsonl"], byte_tokenizer(), 5)
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(DataError, match="no document has two tokens"):
        read_domains([tmp_path / "one.txt"], byte_tokenizer(), 5)
