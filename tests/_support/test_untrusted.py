"""JSON and text of others: every damage is one error of our tree that names where it stands."""

from __future__ import annotations

from pathlib import Path

import pytest

from remoe_adapt._support.untrusted import parse_json, printable, read_json
from remoe_adapt.errors import FamilyError


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ("1" * 400, "400 digits"),
        ("1" * 5000, "5000 digits"),
        ('{"a": 1, "a": 2}', "'a' stands twice"),
        ("NaN", "NaN is no JSON number"),
        ("-Infinity", "Infinity is no JSON number"),
        ("{", "not valid JSON"),
        (b"\xff", "not valid JSON"),
    ],
)
def test_a_bad_document_is_one_error_with_its_place(text: str | bytes, reason: str) -> None:
    with pytest.raises(FamilyError, match=reason) as caught:
        parse_json(text, "family.json", FamilyError)
    assert str(caught.value).startswith("family.json")


def test_a_good_document_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": [1, -2.5, null, 9223372036854775807]}')
    assert read_json(path, FamilyError) == {"a": [1, -2.5, None, 9223372036854775807]}


def test_a_file_is_read_up_to_its_bound_and_not_beyond(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("1" * 100)
    with pytest.raises(FamilyError, match="more than"):
        read_json(path, FamilyError, max_bytes=99)
    with pytest.raises(FamilyError, match="cannot be read"):
        read_json(tmp_path, FamilyError)


def test_escapes_are_shown_and_not_sent_to_the_terminal() -> None:
    assert printable("a\x1b[31mb\nc\u202e") == "a\\x1b[31mb\\x0ac\\u202e"
    assert len(printable("a" * 10_000)) < 300
