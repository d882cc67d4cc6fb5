"""The documentation does what it says: its code runs, its commands parse, its links and pictures are there.

Blocks of a page run in order: `python` in one namespace, `remoe ...` lines of `bash` in this process, both in a folder
that looks like a clone. `<!-- ci -->` before a block leaves it to `.ci/run`; `<!-- not run: reason -->` leaves it to
nobody, and then its `remoe` lines are parsed and its Python is compiled.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from typer.main import get_command
from typer.testing import CliRunner

import remoe_adapt
from remoe_adapt import list_profiles, load_profile
from remoe_adapt.cli.app import app

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
# What a clone has and the pages speak of.
IN_A_CLONE = ("examples", "profiles", "benchmarks", "LICENSE", "README.md")
# Commands beside `remoe` that a page may give to be run.
TOOLS = ("cp", "mkdir", "cat", "head")
LANGUAGES = ("python", "bash", "yaml", "json", "text")
_BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>[^>]*) -->\n+)?^(?P<fence>```+)(?P<language>\w*)[^\n]*\n(?P<code>.*?)^(?P=fence)$", re.M | re.S
)
_LINK = re.compile(r"(?<!`)!?\[[^\]\n]*\]\(([^)\s]+)\)|<(?:img|a)\b[^>]*\b(?:src|href)=\"([^\"]+)\"")


class Block(NamedTuple):
    """mark: of the HTML comment before it, "" without one. line: of its first line of code."""

    mark: str
    language: str
    code: str
    line: int

    @property
    def runs(self) -> bool:
        return self.mark != "ci" and not self.mark.startswith("not run: ")


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [
        Block(found["mark"] or "", found["language"], found["code"], text.count("\n", 0, found.start("code")) + 1)
        for found in _BLOCK.finditer(text)
    ]


def remoe_lines(code: str) -> Iterator[list[str]]:
    """The words of every line of a block, comments and continuations resolved."""
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def parse(words: list[str]) -> None:
    """Fails as the command line would, and runs nothing."""
    command: Any = get_command(app)
    names, rest = ["remoe"], words[1:]
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"no command {' '.join([*names, *rest[:1]])}"
        names.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(" ".join(names), rest)


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scratch folder with what a clone has; the user's own profiles and caches are elsewhere."""
    for name in IN_A_CLONE:
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / ".config"))
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture
def registries() -> Iterator[None]:
    """What a page registers (a policy, a mode, a sensor) is gone after it: other tests count what there is."""
    for name in remoe_adapt.__all__:
        getattr(remoe_adapt, name)  # every room is imported, so that its registries are seen
    modules = [module for name, module in sys.modules.items() if name.startswith("remoe_adapt.")]
    tables = [value for module in modules for name, value in vars(module).items() if name.strip("_").isupper()]
    before = [(table, table.copy()) for table in tables if type(table) in (dict, list)]
    yield
    for table, copied in before:
        table.clear()
        if isinstance(table, dict):
            table.update(copied)
        else:
            table.extend(copied)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
@pytest.mark.usefixtures("registries")
def test_code_of_the_page_runs(page: Path, clone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)  # dataclasses look their module up
    torch.manual_seed(0)
    for block in blocks(page):
        if not block.runs:
            continue
        where = f"{page}:{block.line}"
        match block.language:
            case "python":
                # The line numbers of the page, in tracebacks too.
                code = compile("\n" * (block.line - 1) + block.code, str(page), "exec", dont_inherit=True)
                exec(code, vars(module))
            case "bash":
                for words in remoe_lines(block.code):
                    run(words, where)
            case "yaml":
                load_yaml(block.code, clone)
            case "json":
                json.loads(block.code)


def run(words: list[str], where: str) -> None:
    if words[0] in TOOLS:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
        return
    assert words[0] == "remoe", f"{where}: {words[0]} is run by nobody; mark the block `not run: reason`"
    result = CliRunner().invoke(app, words[1:])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{where}: {shlex.join(words)}\n{result.stderr}"


def load_yaml(code: str, clone: Path) -> None:
    """A whole profile, or sections of one, which are laid over a shipped one."""
    found = yaml.safe_load(code)
    whole = found if "name" in found else yaml.safe_load(list_profiles()["orin-8gb"].read_text()) | found
    file = clone / f"{whole['name']}.yaml"
    file.write_text(yaml.safe_dump(whole))
    load_profile(file)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_blocks_that_do_not_run_would_parse(page: Path) -> None:
    for block in blocks(page):
        where = f"{page}:{block.line}"
        assert block.language in LANGUAGES, f"{where}: a block says its language: {', '.join(LANGUAGES)}"
        if block.runs or block.language not in ("python", "bash"):
            continue
        if block.language == "python":
            compile(block.code, where, "exec", dont_inherit=True)
            continue
        for words in remoe_lines(block.code):
            if words[0] == "remoe":
                parse(words)


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        path, _, anchor = target.partition("#")
        file = page if not path else (page.parent / path).resolve()
        assert file.exists(), f"{page}: {target} is not there"
        if anchor and file.suffix == ".md":
            assert anchor in anchors(file), f"{page}: {file.name} has no heading #{anchor}"
        if path and page.is_relative_to(ROOT / "docs"):
            assert file.is_relative_to(ROOT / "docs"), f"{page}: {target} is not part of the site"


def links(page: Path) -> set[str]:
    """Of Markdown and of HTML, those out of the repository left out."""
    text = re.sub(r"^(```+).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    found = {one or other for one, other in _LINK.findall(re.sub(r"`[^`\n]*`", "", text))}
    return {target for target in found if not re.match(r"[a-z]+:", target)}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub and Markdown's own `toc` make them."""
    text = re.sub(r"^(```+).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title).strip().lower()) for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_a_page_names_are_there(page: Path) -> None:
    for name in re.findall(r"`((?:benchmarks|examples|profiles|docs)/[\w./-]+)`", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists(), f"{page}: {name}"


def missing_files(page: Path) -> list[str]:
    """Source files that a page names, and folders by their path from the root, that are not there.

    A file is written from the root, from `remoe_adapt/`, or by its name alone. NAME stands for any.
    """
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.$~<-])((?:[\w.-]+/)+[\w.-]*\w\.py|\w+\.py)\b", text)
    named += re.findall(r"(?<![\w/.])((?:remoe_adapt|triton_kernels|tests|benchmarks|docs)/[\w./-]*[\w/])", text)
    tops = ("remoe_adapt", "triton_kernels", "tests", "benchmarks", "docs", "examples", ".ci")
    files = {path.name for top in tops for path in (ROOT / top).rglob("*.py")}
    return [
        name
        for name in dict.fromkeys(named)
        if "NAME" not in name
        and not any((place / name).exists() for place in (ROOT, ROOT / "remoe_adapt", page.parent))
        and not ("/" not in name and name in files)
    ]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_source_files_that_a_page_names_are_there(page: Path) -> None:
    assert not missing_files(page), page


def test_the_map_is_the_order_of_the_rooms() -> None:
    """The page that a reader takes for the order and the table that the tests go by."""
    tree = ast.parse((ROOT / "tests" / "house" / "test_rooms.py").read_text(encoding="utf-8"))
    (rooms,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "ROOMS"
    )
    drawn = next(block for block in blocks(ROOT / "docs" / "architecture.md") if block.language == "text")
    assert tuple(line.split("  ")[0] for line in drawn.code.splitlines()) == rooms


def test_every_page_is_in_the_menu() -> None:
    def pages(menu: Any) -> Iterator[str]:
        for entry in menu:
            if isinstance(entry, str):
                yield entry
            else:
                for below in entry.values():
                    yield from pages(below if isinstance(below, list) else [below])

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    there = {str(page.relative_to(ROOT / "docs")) for page in PAGES if page.is_relative_to(ROOT / "docs")}
    assert set(pages(settings["nav"])) == there


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "reference" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: remoe_adapt\.(\w+)$", page, re.M)
    assert {*shown, "RemoeError", "__version__"} == set(remoe_adapt.__all__) and len(shown) == len(set(shown))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120


def test_a_wrong_page_is_caught(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# A title\n\n[x](#no-title) ![p](none.svg)\n\n```bash\nremoe nothing\n```\n\n```\nx\n```\n")
    assert [block.language for block in blocks(page)] == ["bash", ""]
    assert links(page) == {"#no-title", "none.svg"} and anchors(page) == {"a-title"}
    page.write_text(
        page.read_text() + "`cache/slots.py`, `no_such.py`, remoe_adapt/runtime/, `dial/swap.py`, `swap.py`\n"
    )
    assert missing_files(page) == ["cache/slots.py", "no_such.py", "remoe_adapt/runtime/"]
    with pytest.raises(AssertionError, match="no command remoe nothing"):
        parse(["remoe", "nothing"])
    with pytest.raises(Exception, match="No such option"):
        parse(shlex.split("remoe eval M --no-such-option"))
    with pytest.raises(AssertionError, match=r"is not there|has no heading"):
        test_links_lead_somewhere(page)
    with pytest.raises(AssertionError, match="says its language"):
        test_blocks_that_do_not_run_would_parse(page)
