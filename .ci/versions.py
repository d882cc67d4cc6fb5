"""Tests what we rely on in other libraries on other versions of them than the installed ones.

    python .ci/versions.py lowest                 # the lowest transformers and peft that pyproject.toml admits
    python .ci/versions.py at transformers==5.20.2 peft==0.21.0
    python .ci/versions.py newest [--raise]       # is there a newer release than the tested ones, and does it hold?

Each version is put into a folder of its own in front of the installed packages of this Python, which needs the package
and its extra `test`. `--raise` writes the new upper bound into pyproject.toml where everything passed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
LIBRARIES = ("transformers", "peft")
TESTS = ("tests/libraries/test_contracts.py", "tests/recency/test_proof.py", "tests/recency/test_decode.py")
# What transformers needs in another version than a newer one does; everything else is taken as it is installed.
BESIDE = {"transformers": ("huggingface_hub", "tokenizers")}
_BOUNDS = r'"{library}>=([0-9.]+),<([0-9.]+)"'


def bounds(library: str) -> tuple[str, str]:
    """The lowest version that is admitted, and the first that is not."""
    found = re.search(_BOUNDS.format(library=library), PYPROJECT.read_text(encoding="utf-8"))
    if found is None:
        sys.exit(f"pyproject.toml has no line of the form '{library}>=A,<B'.")
    return found[1], found[2]


def pip(*args: str) -> str:
    """What pip prints; its own words on standard error when it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *args]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def newest_release(library: str) -> str:
    """By the package index, pre-releases left out."""
    versions = re.search(r"Available versions: ([^,\s]+)", pip("index", "versions", library))
    if versions is None:
        sys.exit(f"the package index tells no version of {library}.")
    return versions[1]


def overlay(folder: Path, requirement: str) -> None:
    """This version alone, and what it cannot share with the installed one."""
    library = re.split("[=~<>]", requirement)[0]
    pip("install", "--quiet", "--no-deps", "--target", str(folder), requirement)
    needs = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob(f"{library}-*.dist-info/METADATA"))
    for name in BESIDE.get(library, ()):
        wanted = re.search(rf"^Requires-Dist: {name.replace('_', '[-_]')}\s*\(?([^;)\n]*)\)?\s*$", needs, re.MULTILINE)
        if wanted is not None and not satisfied(name, wanted[1]):
            # With what it needs itself: an older hub client talks through another HTTP library.
            pip("install", "--quiet", "--upgrade", "--target", str(folder), f"{name}{wanted[1]}")


def satisfied(name: str, wanted: str) -> bool:
    """Whether the installed version will do."""
    from importlib.metadata import version

    from packaging.specifiers import SpecifierSet

    return version(name) in SpecifierSet(wanted)


def holds(requirements: list[str], quiet: bool) -> bool:
    """Whether the tests pass on these versions."""
    with tempfile.TemporaryDirectory() as scratch:
        for requirement in requirements:
            overlay(Path(scratch), requirement)
        pytest = Path(sys.executable).with_name("pytest")
        done = subprocess.run(
            [pytest, "-q", "-p", "no:cacheprovider", *TESTS],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": scratch},
            capture_output=quiet,
            text=True,
        )
        if quiet and done.returncode:
            sys.stderr.write(done.stdout[-6000:])
        return done.returncode == 0


def raised(library: str, version: str) -> None:
    """Admit the minor version that `version` belongs to."""
    major, minor = version.split(".")[:2]
    lowest, _ = bounds(library)
    text = PYPROJECT.read_text(encoding="utf-8")
    line = f'"{library}>={lowest},<{major}.{int(minor) + 1}"'
    PYPROJECT.write_text(re.sub(_BOUNDS.format(library=library), line, text), encoding="utf-8")


def newest(write: bool) -> int:
    """One line for each library."""
    status = 0
    for library in LIBRARIES:
        from packaging.version import Version

        _, limit = bounds(library)
        version = newest_release(library)
        if Version(version) < Version(limit):
            print(f"{library}: {version} is the newest release, and admitted (<{limit}).", flush=True)
            continue
        passes = holds([f"{library}=={version}"], quiet=True)
        status |= not passes
        verdict = "the contracts hold on it" if passes else "the contracts do NOT hold on it (above)"
        if passes and write:
            raised(library, version)
            verdict += ": pyproject.toml admits it now"
        print(f"{library}: {version} is newer than what is admitted (<{limit}); {verdict}.", flush=True)
    return status


def main(args: list[str]) -> int:
    """See the module."""
    if args == ["lowest"]:
        return not holds([f"{library}=={bounds(library)[0]}.0" for library in LIBRARIES], quiet=False)
    if args[:1] == ["at"] and len(args) > 1:
        return not holds(args[1:], quiet=False)
    if args in (["newest"], ["newest", "--raise"]):
        return newest("--raise" in args)
    sys.exit(__doc__)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
