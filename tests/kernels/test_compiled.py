"""The experts' kernels compile for GPUs that are not here, and keep what they compute with in registers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")

# Compute capabilities of an A100, an Orin and an H100.
GPUS = (80, 87, 90)
KINDS = ("float", "int4", "int4+minima", "int8", "int8+minima", "mxfp4", "fp8")
QWEN3_30B, DEEPSEEK_LITE, GPT_OSS = "768x2048", "1408x2048", "2880x2880"


def compiled(repo_root: Path, cases: list[str], **environment: str) -> list[dict[str, Any]]:
    """What `tests/support/compiled.py` says of these cases."""
    # Kernels that were jitted under an interpreter do not compile: this is for a process of its own.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, repo_root / "tests" / "support" / "compiled.py", *cases],
        env=inherited | environment, cwd=repo_root, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def assert_no_spills(rows: list[dict[str, Any]]) -> None:
    assert rows
    spilled = [row for row in rows if row["stack_bytes"]]
    assert not spilled, spilled


def test_codes_of_four_bits_compile_without_spills_and_are_read_in_words(repo_root: Path) -> None:
    """Sixteen bytes of codes and of hidden values at a time, and a scale by itself: nothing byte by byte."""
    rows = compiled(repo_root, [f"90:int4:1:8:{QWEN3_30B}:bfloat16"])
    assert [row["kernel"] for row in rows] == ["up_kernel", "down_kernel"]
    assert_no_spills(rows)
    for row in rows:
        assert row["loads"]["128"] >= 8 and "U8" not in row["loads"] and "64" not in row["loads"], row
        # Two rounds over the columns with four rows each, or three with four, and the biases of four rows.
        assert row["loads"]["U16"] <= 16, row


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("shape", [QWEN3_30B, DEEPSEEK_LITE, GPT_OSS])
def test_one_token_compiles_without_spills(repo_root: Path, shape: str, gpu: int) -> None:
    choices = {QWEN3_30B: 8, DEEPSEEK_LITE: 6, GPT_OSS: 4}[shape]
    assert_no_spills(compiled(repo_root, [f"{gpu}:{kind}:1:{choices}:{shape}:bfloat16" for kind in KINDS]))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("tokens", [16, 128, 1024])
def test_many_tokens_compile_without_spills(repo_root: Path, tokens: int, gpu: int) -> None:
    cases = [f"{gpu}:{kind}:{tokens}:8:{QWEN3_30B}:bfloat16" for kind in KINDS]
    assert_no_spills(compiled(repo_root, [*cases, f"{gpu}:float:{tokens}:8:{QWEN3_30B}:float32"]))
