"""The page at `/` and the status it draws: what is filled has its key there, and nothing comes from outside."""

from __future__ import annotations

import json
import os
import re
from dataclasses import fields
from html.parser import HTMLParser

import pytest

from remoe_adapt.engines.page import (
    PAGE_HEADERS,
    Counters,
    Memory,
    Rates,
    RequestCounts,
    ServerStatus,
    memory_of,
    page_html,
)

PAGE = page_html().decode()


class Elements(HTMLParser):
    """Every start tag with its attributes, and which tags stay open."""

    VOID = ("meta", "link", "input", "br")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def elements() -> list[tuple[str, dict[str, str | None]]]:
    parser = Elements()
    parser.feed(PAGE)
    assert parser.open == []
    return parser.found


def status() -> dict[str, object]:
    return ServerStatus(engine="transformers", model="m", state="ready").to_json()


def test_every_element_that_is_filled_is_a_key_of_the_status(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    keys = [value for _, attributes in elements for name, value in attributes.items() if name == "data-key"]
    keys += [key for _, attributes in elements for key in (attributes.get("data-chart") or "").split()]
    assert len(keys) > 20
    for key in keys:
        found: object = status()
        for part in str(key).split("."):
            assert isinstance(found, dict) and part in found, key
            found = found[part]


def test_what_the_issue_asks_for_is_on_the_page(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    shown = {attributes.get("data-key") for _, attributes in elements}
    assert {"strength", "pressure", "reason", "hit_rate", "tokens_per_s", "memory.process_bytes"} <= shown


def test_formats_of_the_page_are_in_its_script(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    formats = {attributes["data-as"] for _, attributes in elements if attributes.get("data-as")}
    (table,) = re.findall(r"const show = \{(.*?)\n\};", PAGE, re.DOTALL)
    assert formats - {"meter"} <= set(re.findall(r"^  (\w+)[,:]", table, re.MULTILINE))


def test_nothing_comes_from_outside(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    asked = [value for _, a in elements for name, value in a.items() if name in ("src", "href", "action")]
    assert asked == ["data:,"]  # no icon is asked for
    addresses = set(re.findall(r"https?://[^\"'\s)]+|//\w+\.\w+", PAGE))
    assert addresses == {"http://www.w3.org/2000/svg"}  # a name and no address
    assert re.findall(r"fetch\(([^,]+),", PAGE) == ['"remoe/status"']
    assert "@import" not in PAGE and "url(" not in PAGE


def test_only_its_own_script_may_run() -> None:
    policy = PAGE_HEADERS["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and policy.count("sha256-") == 2
    assert "unsafe" not in policy and " onclick=" not in PAGE and "style=" not in PAGE and "innerHTML" not in PAGE


def test_charts_and_inputs_have_names(elements: list[tuple[str, dict[str, str | None]]]) -> None:
    ids = {attributes["id"] for _, attributes in elements if attributes.get("id")}
    assert elements[0][1] == {"lang": "en"}
    for tag, attributes in elements:
        if tag == "svg":
            assert attributes["role"] == "img" and attributes["aria-label"]
        if attributes.get("aria-labelledby"):
            assert attributes["aria-labelledby"] in ids
        if tag == "label":
            assert attributes["for"] in ids


def test_a_status_is_json_and_keeps_its_keys() -> None:
    memory = memory_of([os.getpid(), 1 << 30], 1, 2)
    made = ServerStatus(
        engine="llama.cpp", model="m", state="ready", acts=("dial",), strength=0.5, requests=RequestCounts(running=1),
        memory=memory,
    ).to_json()  # fmt: skip
    assert json.loads(json.dumps(made))["requests"]["running"] == 1
    assert made["version"] == 1 and made["time_s"] > 1e9
    assert set(made) == {field.name for field in fields(ServerStatus)} | {"version", "time_s"}
    assert memory.process_bytes is not None and memory.total_bytes is not None
    assert 1 << 20 < memory.process_bytes < memory.total_bytes
    assert memory_of([1 << 30]) != Memory() and memory_of([1 << 30]).process_bytes is None


def test_rates_look_back_ten_seconds_whoever_asks() -> None:
    rates = Rates(window_s=10.0)
    assert rates.now(Counters(), 0.0) == {"tokens_per_s": None, "hit_rate": None, "read_mib_per_s": None}
    for hasty in range(1, 100):  # a second reader does not push the first one's samples out
        rates.now(Counters(), hasty / 1000)
    found = rates.now(Counters(40, 30, 10, 8 << 20), 4.0)
    assert found == {"tokens_per_s": 10.0, "hit_rate": 0.75, "read_mib_per_s": None}
    found = rates.now(Counters(80, 30, 50, 16 << 20), 8.0)
    assert found["tokens_per_s"] == 10.0 and found["hit_rate"] == 0.375
    rates.now(Counters(80, 30, 50, 16 << 20), 17.0)
    idle = rates.now(Counters(80, 30, 50, 16 << 20), 27.0)  # the window holds nothing but rest
    assert idle == {"tokens_per_s": None, "hit_rate": 0.375, "read_mib_per_s": 0.0}


def test_a_cache_that_never_hits_shows_zero_and_not_its_past() -> None:
    rates = Rates()
    rates.now(Counters(0, 100, 0, 0), 0.0)
    assert rates.now(Counters(5, 100, 50, 0), 5.0)["hit_rate"] == 0.0
