"""What Linux says of a process's memory, in a /proc of our own: names of any form, lines of no form."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remoe_adapt.engines.llamacpp.process import MappingProcess, mapped_by, mapped_spans
from remoe_adapt.errors import ConfigError


def test_lines_of_another_form_hide_no_others(tmp_path: Path) -> None:
    file = tmp_path / "a b (deleted).gguf"
    file.write_bytes(b"x")
    facts = file.stat()
    device = f"{os.major(facts.st_dev):02x}:{os.minor(facts.st_dev):02x}"
    lines = [
        "garbage",
        "",
        "7f00-xyz r--p 0 00:00 0",
        "7f0000000000-7f0000001000 rw-p 00000000 00:00 0 ",
        "7f0000000000-7f0000001000 rw-p 00000000 00:00 0                          [stack]",
        f"7f0000001000-7f0000003000 r--s 00001000 {device} {facts.st_ino}                   /another/name",
        f"7f0000005000-7f0000006000 r--s 00004000 ff:ff 1                          {file}",
        f"7f0000007000-7f0000008000 r--s 00004000 ff:ff 1                          {file}.other",
    ]
    (tmp_path / "17").mkdir()
    (tmp_path / "17" / "maps").write_text("\n".join(lines), encoding="utf-8")
    assert mapped_spans(17, file, tmp_path) == [(0x1000, 0x3000), (0x4000, 0x5000)]


def test_a_file_that_is_gone_is_said_to_be_gone(tmp_path: Path) -> None:
    """Not that the process has ended, which would be waited for."""
    gone = tmp_path / "gone.gguf"
    with pytest.raises(ConfigError, match=r"gone\.gguf cannot be found any more"):
        mapped_spans(os.getpid(), gone)
    with pytest.raises(ConfigError):
        mapped_by(gone)
    process = MappingProcess(gone)
    assert not process.find() and "cannot be found any more" in process.why_unknown
