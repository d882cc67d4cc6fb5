"""The order of the rooms as a test: who may import whom, and the few things that only one room may do.

`violations` reads source text, so the self-tests at the end show that each rule catches what it forbids.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

# Bottom up. A file imports the faces of lower rooms, and files of its own room. A room inside a room comes in its own
# right; `errors`, `recency_settings`, `texts`, `__main__` and `__init__` are files at the root.
ROOMS = (
    "errors",
    "_support recency_settings",
    "texts traces profiles",
    "eviction",
    "device_profile",
    "pressure",
    "libraries triton_kernels",
    "routers",
    "gating",
    "recency objective",
    "tuner",
    "checkpoints",
    "expert_cache.encodings",
    "expert_cache.gguf",
    "family expert_cache",
    "dial training",
    "evaluation engines engines.page",
    "evaluation.planning evaluation.reporting",
    "engines.gguf engines.llamacpp.prior",
    "engines.llamacpp",
    "engines.serving",
    "bench.harness",
    "bench.decode bench.controller bench.scale",
    "bench",
    "cli",
    "__main__ __init__",
)
LEVEL = {room: number for number, level in enumerate(ROOMS) for room in level.split()}
# Rooms that a machine without torch, or a command that only prints help, may enter.
NO_TORCH = {room for level in ROOMS[:6] for room in level.split()}
# Kernels are imported by file and where they run, since Triton is not on every machine.
BY_FILE = {"triton_kernels"}
TORCH_STACK = {"torch", "transformers", "peft", "accelerate", "triton", "safetensors.torch"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}
UNSAFE_YAML |= {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}
ARCHITECTURES = re.compile(
    r"qwen|mixtral|olmoe|deepseek|llama_?4|gpt_?oss|jamba|granite|jet_?moe|dbrx|switch_?transformers|nllb|phi_?moe|"
    r"minimax|glm_?4|ernie|hunyuan|longcat|kimi|lfm2|afmoe|\bdoge|zaya|gemma|inkling|bailing|dots_?1",
    re.IGNORECASE,
)
# The tables of router classes and of GGUF layouts; the contracts, which are checked on one real model; a checkpoint of
# one model's shape.
NAMES_ARCHITECTURES = {
    "routers.table", "expert_cache.gguf.architectures", "libraries.tiny", "bench.scale.checkpoint",
}  # fmt: skip
MAX_LINES, MIN_LINES = 600, 30
MAX_ROOMS, MAX_ROOT_FILES, MAX_FACE_LINES = 20, 6, 80


# Every module of ours (dotted, without the package's name); of a face the names that it imports, else None.
Modules = dict[str, set[str] | None]


def room_of(module: str, modules: Modules) -> str:
    """The room of a module (dotted, without the package's name): its folder, or itself at the root."""
    if modules.get(module) is not None or "." not in module:
        return module
    return module.rpartition(".")[0]


def types_only(tree: ast.AST) -> set[int]:
    """Lines below `if TYPE_CHECKING`: never run, so they make no cycle."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and ast.unparse(n.test).endswith("TYPE_CHECKING")]
    return {line for block in blocks for node in block.body for line in range(node.lineno, node.end_lineno + 1)}


def imports(module: str, tree: ast.AST, is_package: bool) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, at any depth, relative names resolved; `from` gives each name."""
    here = ["remoe_adapt", *module.split(".")] if module != "__init__" else ["remoe_adapt"]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parent = here[: len(here) - node.level + is_package] if node.level else []
            source = ".".join([*parent, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def own_module(dotted: str, modules: Modules) -> str | None:
    """The module of ours that importing `dotted` runs ("__init__" for the package's root), or None if foreign."""
    if dotted.split(".")[0] != "remoe_adapt" or dotted == "remoe_adapt.__version__":
        return None  # a constant, not a room
    parts = dotted.split(".")[1:]
    if len(parts) > 1 and parts[-1] in (modules.get(".".join(parts[:-1])) or ()):
        parts.pop()  # a name of the face, be there a file of that name or not
    while parts and ".".join(parts) not in modules:
        parts.pop()
    return ".".join(parts) or "__init__"


def docstring_ids(tree: ast.AST) -> set[int]:
    owners = [n for n in ast.walk(tree) if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)]
    return {id(n.body[0].value) for n in owners if n.body and isinstance(n.body[0], ast.Expr)}


def code_words(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of names and strings in code; docstrings and comments may name any model."""
    prose = docstring_ids(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield node.lineno, ast.unparse(node)


def room_faults(module: str, target: str, modules: Modules) -> Iterator[str]:
    """What is wrong with `module` importing our module `target`."""
    mine, theirs = room_of(module, modules), room_of(target, modules)
    if theirs not in LEVEL:
        yield f"{module} imports {target}, whose room is not in ROOMS"
    elif mine == theirs:
        if target == theirs and module != target and modules[target] is not None:
            yield f"{module} imports the face of its own room; import the file"
    elif LEVEL[theirs] >= LEVEL[mine]:
        yield f"{module} imports {target}, whose room is not below its own"
    elif target != theirs and theirs not in BY_FILE:
        yield f"{module} imports {target}: import the face {theirs}"


def import_faults(module: str, tree: ast.AST, modules: Modules) -> Iterator[tuple[int, str]]:
    room = room_of(module, modules)
    if room not in LEVEL:
        yield 1, f"the room of {module} is not in ROOMS"
        return
    for line, dotted in imports(module, tree, modules.get(module) is not None):
        target = own_module(dotted, modules)
        if target is not None and target != module:
            yield from ((line, fault) for fault in room_faults(module, target, modules))
        names = {dotted, dotted.split(".")[0], ".".join(dotted.split(".")[:2])}
        if room in NO_TORCH and names & TORCH_STACK:
            yield line, f"{module} is of a room without torch and imports {dotted}"
        if "triton" in names and room != "triton_kernels":
            yield line, "imports triton outside triton_kernels"
        if "triton_kernels" in names:
            yield line, "imports triton_kernels by its top-level name, which belongs to the Triton project"
        if names & PICKLERS:
            yield line, f"imports {dotted}: no pickle"
        if dotted.split(".")[0] == "yaml" and dotted.split(".")[-1] in UNSAFE_YAML:
            yield line, f"uses {dotted}: only yaml.safe_load and SafeLoader"


def call_faults(module: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    room = module.split(".")[0]
    for node in ast.walk(tree):
        name = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        if module != "cli.app":
            if name in {"print", "pprint", "sys.stdout"}:
                yield node.lineno, f"{name}: only cli/app.py prints"
            if name in {"sys.exit", "os._exit", "SystemExit", "exit", "quit", "typer.Exit"}:
                yield node.lineno, f"{name}: only cli/app.py exits"
        if name.startswith("yaml.") and name.split(".")[1] in UNSAFE_YAML:
            yield node.lineno, f"uses {name}: only yaml.safe_load and SafeLoader"
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        waits = isinstance(node.func, ast.Attribute) and node.func.attr in {"item", "cpu"}
        if waits and room in {"gating", "recency", "tuner"}:
            yield node.lineno, f".{ast.unparse(node.func).rpartition('.')[2]}() waits for the device; not in {room}"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle must be False: no pickle"
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True: no pickle"


def size_faults(module: str, source: str, is_package: bool) -> Iterator[tuple[int, str]]:
    lines = source.count("\n")
    if lines > (MAX_FACE_LINES if is_package else MAX_LINES):
        yield lines, f"{lines} lines: {'a face says what a room is for' if is_package else 'one file, one idea'}"
    if lines < MIN_LINES and not is_package and "." in module and module.split(".")[0] not in BY_FILE:
        yield 1, f"{lines} lines: no room of its own, merge it"
    if is_package and not ast.get_docstring(ast.parse(source)):
        yield 1, "a face says what its room is for"


def violations(module: str, source: str, modules: Modules) -> list[str]:
    """Every broken rule of one file, as "line: what"."""
    tree = ast.parse(source)
    faults = [*import_faults(module, tree, modules), *call_faults(module, tree)]
    if module not in NAMES_ARCHITECTURES:
        named = ((line, ARCHITECTURES.search(text)) for line, text in code_words(tree))
        faults += [(line, f"{m[0]!r}: architecture names live in routers/table.py only") for line, m in named if m]
    faults += size_faults(module, source, modules.get(module) is not None)
    return [f"{line}: {what}" for line, what in sorted(set(faults))]


def tree_of(repo_root: Path) -> dict[str, tuple[Path, bool]]:
    """Module -> (file, is a package), as setuptools maps the folders."""
    found = {}
    for folder, prefix in (("remoe_adapt", ()), ("triton_kernels", ("triton_kernels",)), ("profiles", ("profiles",))):
        for path in sorted((repo_root / folder).rglob("*.py")):
            parts = [*prefix, *path.relative_to(repo_root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package and len(parts) > 1 else parts)
            found[module] = (path, is_package and module != "__init__")
    return found


def known(tree: dict[str, tuple[Path, bool]]) -> Modules:
    """The modules of a tree, faces with the names that they import."""
    return {
        module: {name.rpartition(".")[2] for _, name in imports(module, ast.parse(path.read_text("utf-8")), True)}
        if is_package
        else None
        for module, (path, is_package) in tree.items()
    }


def test_every_file_keeps_its_room_and_its_rules(repo_root: Path) -> None:
    tree = tree_of(repo_root)
    assert {"__init__", "errors", "gating", "expert_cache.cache", "triton_kernels", "profiles"} <= set(tree)
    modules = known(tree)
    faults = [
        f"{path.relative_to(repo_root)}:{fault}"
        for module, (path, _) in tree.items()
        for fault in violations(module, path.read_text(encoding="utf-8"), modules)
    ]
    assert not faults, "\n".join(faults)


def test_the_house_is_small_and_every_room_has_its_tests(repo_root: Path) -> None:
    package = repo_root / "remoe_adapt"
    rooms = {path.name for path in package.iterdir() if path.is_dir() and any(path.rglob("*.py"))}
    assert rooms <= set(LEVEL) and len(rooms) <= MAX_ROOMS, sorted(rooms)
    assert len([path for path in package.iterdir() if path.is_file()]) <= MAX_ROOT_FILES
    assert rooms <= {path.name for path in (repo_root / "tests").iterdir() if any(path.rglob("test_*.py"))}


def targets(module: str, source: str, modules: Modules) -> set[str]:
    """Modules of ours that importing `module` runs."""
    tree = ast.parse(source)
    unseen = types_only(tree)
    names = {name for line, name in imports(module, tree, modules.get(module) is not None) if line not in unseen}
    return {target for target in (own_module(name, modules) for name in names) if target} - {module}


def test_no_import_cycles(repo_root: Path) -> None:
    tree = tree_of(repo_root)
    modules = known(tree)
    graph = {module: targets(module, path.read_text(encoding="utf-8"), modules) for module, (path, _) in tree.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert set(order) == set(tree)


def test_no_test_imports_a_test(repo_root: Path) -> None:
    found = [
        f"{path}: {name}"
        for path in (repo_root / "tests").rglob("*.py")
        for _, name in imports("x", ast.parse(path.read_text(encoding="utf-8")), False)
        if name.split(".")[0].startswith("test_")
    ]
    assert not found, "\n".join(found)


def test_other_folders_stay_short_and_name_no_path_of_a_machine(repo_root: Path) -> None:
    folders = ("remoe_adapt", "triton_kernels", "profiles", "tests", "examples", "benchmarks", "docs", ".ci")
    kinds = {".py", ".md", ".yaml", ".yml", ".ipynb", ""}
    files = [p for folder in folders for p in (repo_root / folder).rglob("*") if p.suffix in kinds]
    files += [*repo_root.glob("*.md"), repo_root / "Makefile", repo_root / "pyproject.toml"]
    machine = re.compile("|".join("/" + name + "/" for name in ("work", "root", "tmp" + "/house", "tmp" + "/venv")))
    faults = []
    for path in (p for p in files if p.is_file() and not p.name.startswith(".")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py" and text.count("\n") > MAX_LINES:
            faults.append(f"{path}: longer than {MAX_LINES} lines")
        faults += [f"{path}: names {match[0]}" for match in machine.finditer(text)]
    assert not faults, "\n".join(faults)


FACES = [
    "_support",
    "routers",
    "triton_kernels",
    "traces",
    "eviction",
    "cli",
    "family",
    "tuner",
    "gating",
    "engines",
    "engines.gguf",
    "dial",
]
FILES = [
    "__init__",
    "errors",
    "traces.trace",
    "traces.metrics",
    "eviction.policy",
    "cli.app",
    "cli.report",
    "dial.swap",
    "family.family",
    "tuner.layer",
    "gating.reference",
    "gating.ops",
    "engines.files",
    "engines.gguf.lora",
    "engines.gguf.patch",
    "triton_kernels.topk",
    "routers.table",
    "routers.fingerprint",
]
KNOWN: Modules = {**{face: {"fingerprint"} for face in FACES}, **dict.fromkeys(FILES)}
FILLER = "x = 1\n" * MIN_LINES
CAUGHT = [
    ("eviction.policy", "from remoe_adapt.dial import Controller", "not below its own"),
    ("eviction.policy", "from ..family import Family", "not below its own"),
    ("traces.trace", "from remoe_adapt.device_profile import load_profile", "imports __init__"),
    ("family.family", "def f():\n    from remoe_adapt.dial import Controller", "2: family.family imports dial"),
    ("family.family", "import importlib\nimportlib.import_module('remoe_adapt.dial')", "not below its own"),
    ("family.family", "if TYPE_CHECKING:\n    from remoe_adapt.dial import Controller", "not below its own"),
    ("cli.report", "from remoe_adapt import get_remoe_model", "cli.report imports __init__"),
    ("engines.files", "from remoe_adapt.engines.gguf import GgufFile", "not below its own"),
    ("family.family", "from remoe_adapt.tuner.layer import RemoeLayer", "import the face tuner"),
    ("family.family", "import remoe_adapt.tuner.layer", "import the face tuner"),
    ("engines.gguf.lora", "from remoe_adapt.engines.files import sync", "import the face engines"),
    ("family.family", "from remoe_adapt.routers.fingerprint import fingerprint", "import the face routers"),
    ("gating.reference", "from remoe_adapt.gating import topk_gating", "face of its own room"),
    ("gating.reference", "from . import ops\nfrom .. import family", "gating.reference imports family"),
    ("somewhere.new", "x = 1", "not in ROOMS"),
    ("traces.trace", "import torch", "room without torch"),
    ("eviction.policy", "from torch import nn", "room without torch"),
    ("traces.trace", "from safetensors.torch import load_file", "room without torch"),
    ("gating.ops", "import triton", "outside triton_kernels"),
    ("gating.ops", "import triton.language as tl", "outside triton_kernels"),
    ("gating.ops", "from triton_kernels import topk", "top-level name"),
    ("cli.report", "print('x')", "only cli/app.py prints"),
    ("cli.report", "import sys\nsys.stdout.write('x')", "only cli/app.py prints"),
    ("cli.report", "import sys\nsys.exit(1)", "only cli/app.py exits"),
    ("cli.report", "raise SystemExit(1)", "only cli/app.py exits"),
    ("tuner.layer", "x.sum().item()", "waits for the device"),
    ("gating.reference", "x.cpu()", "waits for the device"),
    ("family.family", "import pickle", "no pickle"),
    ("family.family", "from joblib import load", "no pickle"),
    ("family.family", "np.load(f, allow_pickle=True)", "no pickle"),
    ("family.family", "torch.load(f)", "no pickle"),
    ("family.family", "yaml.load(f, Loader=yaml.SafeLoader)", "only yaml.safe_load"),
    ("family.family", "from yaml import unsafe_load", "only yaml.safe_load"),
    ("family.family", "x = 'qwen2_moe'", "architecture names"),
    ("family.family", "from transformers import MixtralForCausalLM", "architecture names"),
    ("family.family", "def load_deepseek(): ...", "architecture names"),
    ("family.family", "x = f'{a} olmoe'", "architecture names"),
    ("family.family", "x = 1\n" * (MAX_LINES + 1), "one file, one idea"),
    ("family.family", "x = 1\n", "merge it"),
    ("family", "x = 1\n", "says what its room is for"),
    ("family", '"""Families."""\n' + "x = 1\n" * MAX_FACE_LINES, "says what a room is for"),
]


@pytest.mark.parametrize(("module", "source", "words"), CAUGHT)
def test_rules_catch_what_they_forbid(module: str, source: str, words: str) -> None:
    found = violations(module, source, KNOWN)
    assert any(words in fault for fault in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("traces.metrics", "from remoe_adapt.traces.trace import Trace\nimport numpy as np\nnp.load(f)"),
        ("cli.report", "from remoe_adapt import __version__"),
        ("cli.app", "from remoe_adapt.cli import report\nfrom remoe_adapt.cli.report import table\nprint(table)"),
        ("family.family", "from remoe_adapt.errors import RemoeError\nfrom remoe_adapt.tuner import RemoeLayer"),
        ("engines.gguf.lora", "from remoe_adapt.engines import sync\nfrom remoe_adapt.engines.gguf.patch import patch"),
        ("gating.reference", "if TYPE_CHECKING:\n    from remoe_adapt.routers import RouterSpec"),
        ("triton_kernels.topk", "import triton\nimport triton.language as tl"),
        ("family.family", "from remoe_adapt.routers import fingerprint"),
        ("gating.ops", "from remoe_adapt.triton_kernels.topk import gate\nlist(d.items())\nx.cuda()"),
        ("routers.table", "TABLE = {'qwen2_moe': 1}"),
        ("family.family", "def f():\n    '''As in Mixtral.'''\n    # qwen2 too\n    return switch_rate, x.item()"),
        ("cli.app", "import sys\nsys.exit(1)"),
        ("family.family", "yaml.safe_load(f)\ntorch.load(f, weights_only=True)\nyaml.SafeLoader(f)"),
        ("tuner", '"""The adapter type."""\nfrom .layer import RemoeLayer\nfrom remoe_adapt.tuner.layer import x'),
    ],
)
def test_rules_let_through_what_they_allow(module: str, source: str) -> None:
    source += "" if KNOWN[module] else "\n" + FILLER
    assert violations(module, source, KNOWN) == []


def test_a_cycle_inside_one_room_is_seen() -> None:
    graph = {
        "engines.gguf.lora": targets("engines.gguf.lora", "from . import patch", KNOWN),
        "engines.gguf.patch": targets("engines.gguf.patch", "from .lora import x", KNOWN),
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
