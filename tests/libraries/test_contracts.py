"""What we rely on in transformers, PEFT, accelerate and torch holds as installed, and nothing else is used.

`.ci/run` runs this file with the newest and with the lowest admitted versions, `make newest` with what is newer.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from remoe_adapt.libraries import contracts
from remoe_adapt.libraries.table import Contract, versions

INSTALLED = ", ".join(f"{name} {version}" for name, version in versions().items())
# Names that the documentation of these libraries offers to everybody, so that no row must vouch for them.
PUBLIC = {"transformers", "peft", "accelerate", "transformers.utils", "transformers.utils.logging"}


@pytest.mark.parametrize("contract", contracts(), ids=lambda contract: contract.name)
def test_holds(contract: Contract) -> None:
    fault = contract.fault()
    assert fault is None, (
        f"{INSTALLED}: {contract.library} is not what we rely on ({contract.relies_on}): {fault} "
        f"Look at {', '.join(contract.used_in)}."
    )


def test_every_row_says_who_relies_on_it(repo_root: Path) -> None:
    rows = contracts()
    assert len({row.name for row in rows}) == len(rows) >= 15
    missing = [file for row in rows for file in row.used_in if not (repo_root / "remoe_adapt" / file).is_file()]
    assert not missing
    assert sum(bool(row.interposes) for row in rows) >= 8


def deep_imports(source: str) -> set[str]:
    """Names imported from below the face of transformers, peft or accelerate, and private ones."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            module, names = node.module, [alias.name for alias in node.names]
            if module.split(".")[0] in ("transformers", "peft", "accelerate"):
                found |= {f"{module}.{name}" for name in names if module not in PUBLIC or name.startswith("_")}
    return found


def test_what_is_imported_from_within_a_library_has_a_row(repo_root: Path) -> None:
    vouched = {name for row in contracts() for name in row.names}
    assert deep_imports("from peft.utils import x\nfrom peft import y, _z") == {"peft.utils.x", "peft._z"}
    unvouched = {
        f"{path.relative_to(repo_root)}: {name}"
        for path in sorted((repo_root / "remoe_adapt").rglob("*.py"))
        if path.parent.name != "libraries"
        for name in deep_imports(path.read_text(encoding="utf-8"))
        if name not in vouched
    }
    assert not unvouched, "\n".join(sorted(unvouched))


def test_a_broken_assumption_is_told_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """As 5.24 would have been told before it was known here."""
    monkeypatch.setattr("remoe_adapt.libraries.kv_cache.CACHE_NAMES", ("kv_store",))
    row = next(row for row in contracts() if row.name == "kv_cache_names")
    assert "takes its KV cache by none of the names we know" in (row.fault() or "")
