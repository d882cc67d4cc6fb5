"""The suite under plugins of others: what they warn of at the start is not ours, what a test warns of is an error."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PLUGIN = """
import warnings

def pytest_configure(config):
    warnings.warn("an option of mine is unset", DeprecationWarning)
    warnings.warn("benchmarks are off", UserWarning, stacklevel=2)
"""
WARNS = """
import warnings

def test_warns():
    warnings.warn("ours", UserWarning)
"""


def test_a_plugin_that_warns_at_the_start_stops_nothing(tmp_path: Path, repo_root: Path) -> None:
    (tmp_path / "pytest_noisy.py").write_text(PLUGIN)
    (tmp_path / "test_it.py").write_text(WARNS)
    pytest = Path(sys.executable).with_name("pytest")
    options = ["-q", "-n0", "-p", "pytest_noisy", "-p", "no:cacheprovider", "-c", str(repo_root / "pyproject.toml")]
    done = subprocess.run(
        [pytest, *options, str(tmp_path / "test_it.py"), "tests/_support/test_untrusted.py"],
        cwd=repo_root,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "1 failed, 12 passed" in done.stdout, done.stdout + done.stderr
    assert "UserWarning: ours" in done.stdout
