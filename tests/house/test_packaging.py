"""What an installed copy looks like: kernels and profiles lie inside the package, never at top level.

Both are installed for real, into bare environments that borrow this one's libraries through a path file.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest

PROFILES = {"orin-8gb", "orin-nx-16gb", "rpi5-8gb", "laptop-16gb", "rtx-8gb", "rtx-24gb", "server"}
# Running the package's root loads torch and peft: once, for the wheel, is enough; elsewhere it is only located.
RUN_ROOT = "import remoe_adapt"
LOCATE_ROOT = """
import importlib.util, sys
sys.modules["remoe_adapt"] = importlib.util.module_from_spec(importlib.util.find_spec("remoe_adapt"))
"""
PROBE = """
import importlib.util, json
import remoe_adapt, remoe_adapt.profiles, remoe_adapt.triton_kernels
from remoe_adapt.device_profile.profile import list_profiles, load_profile

top_level = importlib.util.find_spec("triton_kernels")
print(json.dumps({
    "package": remoe_adapt.__file__,
    "kernels": remoe_adapt.triton_kernels.__file__,
    "profiles": remoe_adapt.profiles.__file__,
    "names": sorted(list_profiles()),
    "strength": load_profile("orin-8gb").strength_at(1.0),
    "top_level": [str(p) for p in top_level.submodule_search_locations or []] if top_level else [],
}))
"""


@pytest.fixture(scope="module")
def pyproject(repo_root: Path) -> dict[str, Any]:
    return tomllib.loads((repo_root / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def sources(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a build reads, so that build folders never appear in the repository."""
    copy = tmp_path_factory.mktemp("sources") / "remoe-adapt"
    copy.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(repo_root / name, copy / name)
    for name in ("remoe_adapt", "triton_kernels", "profiles"):
        shutil.copytree(repo_root / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--quiet")
    run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, sources, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def install(folder: Path, *what: str | Path, root: str) -> dict[str, Any]:
    """Installs into a new environment in `folder` and returns what PROBE finds there, run from yet another folder."""
    builder = venv.EnvBuilder(with_pip=False, symlinks=True)
    builder.create(folder / "env")
    python = folder / "env" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])", cwd=folder).strip())
    # A path entry, unlike a site folder, does not run the .pth files in it: an editable copy of ours stays hidden.
    (site / "borrowed.pth").write_text("\n".join({sysconfig.get_paths()[k] for k in ("purelib", "platlib")}) + "\n")
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", "--quiet")
    run(python, "-m", "pip", "install", *options, *what, cwd=folder)
    assert (folder / "env" / "bin" / "remoe").is_file()
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    found: dict[str, Any] = json.loads(run(python, "-W", "error", "-c", f"{root}\n{PROBE}", cwd=elsewhere))
    return {**found, "site": str(site)}


def test_wheel_holds_kernels_and_profiles_inside_the_package(wheel: Path, repo_root: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"remoe_adapt/profiles/{name}.yaml" for name in PROFILES} <= names
    assert {
        "remoe_adapt/py.typed",
        "remoe_adapt/triton_kernels/__init__.py",
        "remoe_adapt/expert_cache/__init__.py",
        # Sources in C are compiled where they are installed.
        "remoe_adapt/engines/llamacpp/prior/prior.c",
        "remoe_adapt/engines/llamacpp/prior/prior.h",
    } <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"remoe_adapt"}
    for folder, inside in (("remoe_adapt", ""), ("triton_kernels", "triton_kernels/"), ("profiles", "profiles/")):
        for path in (repo_root / folder).rglob("*.py"):
            assert f"remoe_adapt/{inside}{path.relative_to(repo_root / folder).as_posix()}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_installed_wheel_works_from_anywhere(wheel: Path, tmp_path: Path) -> None:
    found = install(tmp_path, wheel, root=RUN_ROOT)
    for key in ("package", "kernels", "profiles"):
        assert Path(found[key]).is_relative_to(Path(found["site"]) / "remoe_adapt"), found
    assert set(found["names"]) >= PROFILES and found["strength"] == 1.0
    assert not [p for p in found["top_level"] if Path(p).is_relative_to(tmp_path)], found


def test_editable_install_works_from_anywhere(sources: Path, tmp_path: Path) -> None:
    found = install(tmp_path, "--editable", sources, root=LOCATE_ROOT)
    assert Path(found["package"]) == sources / "remoe_adapt" / "__init__.py"
    assert Path(found["kernels"]) == sources / "triton_kernels" / "__init__.py"
    assert Path(found["profiles"]) == sources / "profiles" / "__init__.py"
    assert set(found["names"]) >= PROFILES and found["strength"] == 1.0
    assert not [p for p in found["top_level"] if Path(p).is_relative_to(sources)], found


def test_this_run_does_not_see_the_kernels_folder_at_top_level(repo_root: Path) -> None:
    assert str(repo_root) not in sys.path, "run bare pytest; `python -m pytest` puts the root on the path"
    spec = importlib.util.find_spec("triton_kernels")
    locations = [] if spec is None else [Path(p) for p in spec.submodule_search_locations or []]
    assert repo_root / "triton_kernels" not in locations


def test_every_package_folder_is_listed(pyproject: dict[str, Any], repo_root: Path) -> None:
    setuptools = pyproject["tool"]["setuptools"]
    inside = {path.parent for path in (repo_root / "remoe_adapt").rglob("*.py")}
    assert not [f for f in inside if not (f / "__init__.py").is_file()], "a package folder needs an __init__.py"
    folders = {".".join(path.relative_to(repo_root).parts) for path in inside}
    mapped = set(setuptools["package-dir"]) - {"remoe_adapt"}
    assert set(setuptools["packages"]) == folders | mapped, "keep [tool.setuptools] packages complete"
    assert setuptools["packages"] == sorted(setuptools["packages"])


def requirement_names(requirements: list[str]) -> set[str]:
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0].lower().replace("_", "-") for requirement in requirements}


def test_every_third_party_import_is_a_declared_dependency(pyproject: dict[str, Any], repo_root: Path) -> None:
    project = pyproject["project"]
    declared = requirement_names(project["dependencies"])
    for extra in ("export", "eval", "plot", "metrics", "serve"):
        declared |= requirement_names(project["optional-dependencies"][extra])
    owners = {
        k: {d.lower().replace("_", "-") for d in v} for k, v in importlib.metadata.packages_distributions().items()
    }
    missing = set()
    for folder in ("remoe_adapt", "triton_kernels", "profiles"):
        for path in (repo_root / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names = [node.module]
                for top in {name.split(".")[0] for name in names} - set(sys.stdlib_module_names) - {"remoe_adapt"}:
                    if not (owners.get(top, {top.replace("_", "-")}) & declared):
                        missing.add(f"{path.relative_to(repo_root)}: {top}")
    assert not missing, missing


def test_bounds_and_version_agree_everywhere(pyproject: dict[str, Any], repo_root: Path, wheel: Path) -> None:
    dependencies = pyproject["project"]["dependencies"]
    assert "torch>=2.9,<2.14" in dependencies
    # A release that the contracts have not seen must reach no user: `make newest RAISE=1` moves the upper bounds.
    for library in ("transformers", "peft"):
        assert any(re.fullmatch(rf"{library}>=\d+\.\d+,<\d+\.\d+", line) for line in dependencies)
    assert pyproject["project"]["requires-python"] == ">=3.11"
    source = (repo_root / "remoe_adapt" / "__init__.py").read_text(encoding="utf-8")
    version = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    assert version is not None
    assert wheel.name.startswith(f"remoe_adapt-{version[1]}-")
    assert f"## [{version[1]}]" in (repo_root / "CHANGELOG.md").read_text(encoding="utf-8")


def test_readme_marks_the_steps_that_ci_runs(repo_root: Path) -> None:
    readme = (repo_root / "README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"^<!-- ci -->\n```bash\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL))
    for step in ("make demo", "make test", "make check", "pip install ."):
        assert re.search(rf"^{re.escape(step)}\b|^{re.escape(step)}$", blocks, re.MULTILINE), step
    targets = set(re.findall(r"^([a-z]+):", (repo_root / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make ([a-z]+)", blocks, re.MULTILINE)) <= targets
