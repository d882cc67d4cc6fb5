"""A family's report: numbers of certificates or of a measurement, and a page that hostile files cannot change."""

from __future__ import annotations

import json
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_support import call, found, refused
from tiny_family import save_base, save_family

from remoe_adapt import Family
from remoe_adapt.errors import DataError, FamilyError, MissingDependencyError, WriteError
from remoe_adapt.evaluation.reporting.facts import report_facts
from remoe_adapt.evaluation.reporting.frontier_file import read_frontier
from remoe_adapt.evaluation.reporting.write import write_report
from remoe_adapt.family.family import FamilyPoint
from remoe_adapt.recency_settings import Recency

HOSTILE = "<script>alert(1)</script>\"'&$x_{$\x1b[2J"
LAYERS = [{"layer": n, "eor": 0.2 + 0.1 * n, "lru@0.25": 0.5 + 0.1 * n} for n in range(3)]


def certificate(misses: float, ratio: float, **more: Any) -> dict[str, Any]:
    base = {"eor": 0.25, "lru@0.25": 0.5, "per_layer": LAYERS}
    return {"ppl_ratio": ratio, "kl": 0.01, "eor": 0.4, "lru@0.25": 1 - misses, "tokens": 2000, "base": base, **more}


def training_free(path: Path) -> Family:
    """Points that have no adapter: a recency prior alone, as `remoe tune` makes them."""
    adapter: Any = None
    points = (
        FamilyPoint(0.5, adapter, {}, Recency.of("ema", (0.1, 0.2, 0.0)), certificate(0.4, 1.004, per_layer=LAYERS)),
        FamilyPoint(1.0, adapter, {}, Recency.of("ema", (0.2, 0.4, 0.0)), None),
    )
    return Family(path, "owner/base", "sha256:" + "0" * 64, points)


class Elements(HTMLParser):
    """Every element of a page with its attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.words += data


def test_numbers_are_those_of_the_certificates() -> None:
    facts = report_facts(training_free(Path("made")), environment={"machine": "a"}, command="remoe report made")
    json.dumps(facts, allow_nan=False)
    half, full = facts["points"]
    assert half["misses"] == pytest.approx(0.4) and half["misses_to_base"] == pytest.approx(0.8)
    assert half["layers"] == {"eor": [0.2, pytest.approx(0.3), 0.4], "misses": pytest.approx([0.5, 0.4, 0.3])}
    assert facts["base"]["misses"] == 0.5 and facts["base"]["layers"]["misses"] == pytest.approx([0.5, 0.4, 0.3])
    assert half["recency"]["gain_per_layer"] == [0.1, 0.2, 0.0] and half["adapter"] is None
    assert (full["source"], full["misses"], full["ppl_ratio"], full["layers"]) == (None, None, None, None)


@pytest.mark.parametrize(
    "odd",
    [
        {"lru@0.25": "0.5", "eor": True, "kl": None, "ppl_ratio": [1], "tokens": {}, "data": 7, "per_layer": "abc"},
        {"lru@0.25": 10**18, "data": [[1] * 99] * 99, "per_layer": [1, 2], "domains": [1], "commit": 7},
        {"base": [1], "domains": {"a": 1, "b": {"kl": "x"}}, "per_layer": [{"eor": 1}], "data": "text"},
        {},
    ],
)
def test_certificates_of_anybody_are_no_figures(odd: dict[str, Any]) -> None:
    family = training_free(Path("made"))
    family.points = (FamilyPoint(1.0, "s100", {}, None, odd),)
    facts = report_facts(family)
    json.dumps(facts, allow_nan=False)
    point = facts["points"][0]
    assert point["misses"] is None and point["layers"] is None and facts["base"]["misses"] is None


def test_more_than_a_page_can_show_is_refused() -> None:
    family = training_free(Path("made"))
    one = family.points[0]
    family.points = tuple(FamilyPoint(0.001 * n, one.adapter, {}) for n in range(1, 100))
    with pytest.raises(FamilyError, match="99 points, a report shows at most 64"):
        report_facts(family)
    family.points = (FamilyPoint(1.0, one.adapter, {}, None, {"per_layer": LAYERS * 1000}),)
    with pytest.raises(FamilyError, match="3000 layers"):
        report_facts(family)
    family.points = (FamilyPoint(1.0, one.adapter, {}, Recency.of("ema", (0.1,) * 2000)),)
    with pytest.raises(FamilyError, match="2000 layers"):
        report_facts(family)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[]", "is no frontier"), ('{"budgets": 3}', "budgets must be a list"), ("{", "not valid JSON"),
        ('{"curves": {"a": [{"ppl_ratio": 1}]}}', "curve a, misses is None"),
        ('{"curves": {"a": [{"ppl_ratio": "1", "misses": 1}]}}', "curve a, ppl_ratio is '1'"),
        ('{"curves": {"a": [{"ppl_ratio": 1, "misses": -1}]}}', "no number from 0"),
        ('{"curves": {"a": [3]}}', "a point must be an object"), ('{"curves": {"a": 3}}', "must be a list"),
        ('{"budgets": [{"ours": 0.5}]}', "budget 1 lacks ppl_ratio"), ('{"budgets": [7]}', "must be an object"),
        ('{"budgets": [{"ppl_ratio": null}]}', "budget 1, ppl_ratio is None"),
        ('{"curves": ' + json.dumps({str(n): [] for n in range(99)}) + "}", "at most 32 arms"),
    ],
)  # fmt: skip
def test_what_is_no_frontier_is_one_clear_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "f.json").write_text(text)
    with pytest.raises(DataError, match=said) as caught:
        read_frontier(tmp_path / "f.json")
    assert "f.json" in str(caught.value)


def test_a_page_shows_everything_and_runs_nothing_of_others(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    spread = {"ours": 0.01}
    curve = [{"ppl_ratio": 1.002, "misses": 0.7, "label": HOSTILE}, {"ppl_ratio": 1.3, "misses": 0.5}]
    (tmp_path / "f.json").write_text(
        json.dumps(
            {
                "budgets": [{"ppl_ratio": 1.005, "ours": 0.4, "prior": 0.5, "cecar": None, "spread": spread}],
                "curves": {"ours": curve, HOSTILE: curve[:1], "empty": []},
            }
        )
    )
    family = training_free(tmp_path / HOSTILE.replace("/", "-"))
    family.base_id = HOSTILE
    cert = certificate(0.3, 1.02, data=[HOSTILE], commit=HOSTILE, domains={HOSTILE: {"kl": 0.1, "ppl_ratio": 1.5}})
    family.points = (family.points[0], FamilyPoint(1.0, HOSTILE, {}, None, cert))
    facts = report_facts(
        family, frontier=read_frontier(tmp_path / "f.json"), environment={"machine": HOSTILE}, command=HOSTILE
    )
    written = write_report(facts, tmp_path / "out.html")
    assert [path.name for path in written] == [
        "out.html", "out-frontier.png", "out-gain.png", "out-eor.png", "out-misses.png",
    ]  # fmt: skip
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["f.json", *(path.name for path in written)])
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written[1:])
    page = written[0].read_text(encoding="utf-8")
    parsed = Elements(page)
    assert not {"script", "iframe", "img", "link", "object"} & set(parsed.tags)
    assert not [name for name, _ in parsed.attributes if name.startswith("on")]
    linked = [value for name, value in parsed.attributes if name in ("href", "src", "xlink:href")]
    # To definitions of its own drawings, bars of colour in it, and the files beside it, never to another host.
    own = [value for value in linked if not value.startswith(("#", "data:image/png;base64,"))]
    assert own == [path.name for path in written[1:]]
    assert "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "") and "\x1b" not in page
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids)) and "default-src 'none'" in page and "#0102" not in page
    assert "<script>alert(1)</script>" in parsed.words, "shown as it is written"
    for text in ("≤ 1.005", "40.0 %", "0.80", "ema, gain 0 to 0.2, decay 0.7", "1.5000", "60.0 %", "−20 %"):
        assert text in parsed.words, text


def test_a_disk_that_refuses_leaves_what_was_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    family = training_free(tmp_path)
    family.points = (FamilyPoint(1.0, "s100", {}),)
    (tmp_path / "there.html").mkdir()
    with pytest.raises(WriteError, match="cannot be written"):
        write_report(report_facts(family), tmp_path / "there.html")
    assert [path.name for path in tmp_path.iterdir()] == ["there.html"]


def test_the_command_measures_anew_or_reads_certificates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    base = save_base(tmp_path / "base")
    save_family(base, tmp_path / "family", (1.0,))
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times. " * 4)
    args = ("report", tmp_path / "family", "--out", tmp_path / "r.html")
    unmeasured = found(*args)
    assert unmeasured["figures"] == [] and unmeasured["points"][0]["source"] is None
    measured = found(*args, "--model", tmp_path / "base", "--data", tmp_path / "a.txt", "--max-tokens", 100)
    names = ["r-frontier.png", "r-eor.png", "r-misses.png"]
    assert [Path(path).name for path in measured["figures"]] == names
    point = measured["points"][0]
    assert point["source"] == "measured now" and point["data"] == ["a.txt"] and len(point["layers"]["eor"]) == 4
    assert point["misses_to_base"] == pytest.approx(point["misses"] / measured["base"]["misses"])
    assert measured["control"]["source"] == "measured now" and measured["environment"]["torch"] == torch.__version__
    shown = call(*args)
    assert shown.exit_code == 0 and "not measured" in shown.stdout and "r.html" in shown.stdout


def test_what_cannot_be_is_said_before_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib", reason="the extra `plot` is not installed")
    assert "must end in .html" in refused("report", tmp_path, "--out", tmp_path / "r.txt", status=2)
    assert "--model does nothing without --data" in refused("report", tmp_path, "--model", "m", status=2)
    assert "--decode does nothing without --model" in refused("report", tmp_path, "--decode", 600, status=2)
    assert "is no family" in refused("report", tmp_path, "--out", tmp_path / "r.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "remoe-adapt[plot]" in refused("report", tmp_path, "--out", tmp_path / "r.html")
    with pytest.raises(MissingDependencyError, match=r"remoe-adapt\[plot\]"):
        write_report(report_facts(training_free(tmp_path)), tmp_path / "r.html")
    assert not list(tmp_path.iterdir())
