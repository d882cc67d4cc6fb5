"""The committed pictures are what docs/pictures/make.py draws from committed data, and load nothing from elsewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

NAMES = ("dial", "token", "squeeze", "demo")


@pytest.fixture(scope="module")
def drawn(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Drawn anew, without torch: all but the recording."""
    folder = tmp_path_factory.mktemp("pictures")
    make = repo_root / "docs" / "pictures" / "make.py"
    for name in NAMES[:3]:
        subprocess.run([sys.executable, make, name, "--folder", folder], check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_committed_picture_is_the_one_that_its_data_make(name: str, drawn: Path, repo_root: Path) -> None:
    committed = repo_root / "docs" / "pictures" / f"{name}.svg"
    assert committed.read_bytes() == (drawn / f"{name}.svg").read_bytes(), (
        f"{committed.name} is stale: python docs/pictures/make.py {name}"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_is_small_has_a_title_and_text_and_loads_nothing(name: str, repo_root: Path) -> None:
    path = repo_root / "docs" / "pictures" / f"{name}.svg"
    text = path.read_text(encoding="utf-8")
    assert len(text.encode()) < 150_000
    kinds = [element.tag.rpartition("}")[2] for element in ElementTree.fromstring(text).iter()]
    assert kinds.count("title") == 1 and "text" in kinds and "image" not in kinds and "script" not in kinds
    addresses = re.findall(r"https?://[^\"') ]+", text)
    assert set(addresses) <= {"http://www.w3.org/2000/svg"} and not re.search(r"url\((?!#)|@import|@font-face", text)


def test_the_recording_shows_what_the_demo_reports(repo_root: Path) -> None:
    path = repo_root / "docs" / "pictures" / "demo.svg"
    words = " ".join("".join(ElementTree.fromstring(path.read_text(encoding="utf-8")).itertext()).split())
    assert "remoe demo" in words and "hit rate" in words and "Traceback" not in words
