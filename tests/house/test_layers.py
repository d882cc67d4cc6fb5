"""The layer table as a test: who may import whom, and the few things that only one room may do.

`violations` reads source text, so the self-tests at the end show that each rule catches what it forbids.
"""

from __future__ import annotations

import ast
import graphlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from layer_table import LAYERS

ORDER = [name for layer in LAYERS for name in layer]
LAYER_OF = [number for number, layer in enumerate(LAYERS) for _ in layer]
NO_TORCH = set(LAYERS[0] + LAYERS[1])
TORCH_STACK = {"torch", "transformers", "peft", "accelerate", "triton", "safetensors.torch"}
PICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_YAML = {"load", "load_all", "unsafe_load", "unsafe_load_all", "full_load", "full_load_all"}
UNSAFE_YAML |= {"Loader", "FullLoader", "UnsafeLoader", "CLoader", "CFullLoader", "CUnsafeLoader"}
ARCHITECTURES = re.compile(
    r"qwen|mixtral|olmoe|deepseek|llama_?4|gpt_?oss|jamba|granite|jet_?moe|dbrx|switch_?transformers|nllb|phi_?moe|"
    r"minimax|glm_?4|ernie|hunyuan|longcat|kimi|lfm2|afmoe|\bdoge|zaya|gemma|inkling|bailing|dots_?1",
    re.IGNORECASE,
)
MAX_LINES = 400


def position(module: str) -> int | None:
    """Place of `module` (without the package's name) in ORDER; None when the table does not know it."""
    if module in ORDER:
        return ORDER.index(module)
    return next((i for i, name in enumerate(ORDER) if name.endswith(".*") and f"{module}.".startswith(name[:-1])), None)


def for_types_only(tree: ast.AST) -> set[int]:
    """Lines below `if TYPE_CHECKING`: never run, so free within a layer, but no way to know a higher one."""
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


def own_module(dotted: str, modules: set[str]) -> str | None:
    """The module of ours that importing `dotted` runs ("__init__" for the package's root), or None if foreign."""
    if dotted.split(".")[0] != "remoe_adapt" or dotted == "remoe_adapt.__version__":
        return None  # a constant, not a room
    parts = dotted.split(".")[1:]
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


def import_faults(module: str, tree: ast.AST, modules: set[str], is_package: bool) -> Iterator[tuple[int, str]]:
    mine = position(module)
    if mine is None:
        yield 1, f"{module} is not in the layer table of tests/test_layers.py"
        return
    types_only = for_types_only(tree)
    for line, dotted in imports(module, tree, is_package):
        target = own_module(dotted, modules)
        if target is not None and target != module:
            theirs = position(target)
            beside = theirs is not None and LAYER_OF[theirs] == LAYER_OF[mine]
            free = beside and (line in types_only or (theirs == mine and ORDER[mine].endswith(".*")))
            if theirs is None or (theirs >= mine and not free):
                yield line, f"{module} imports {target}, which is listed below it"
        names = {dotted, dotted.split(".")[0], ".".join(dotted.split(".")[:2])}
        if module in NO_TORCH and names & TORCH_STACK:
            yield line, f"{module} is of a layer without torch and imports {dotted}"
        if "triton" in names and not module.startswith("triton_kernels"):
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
        if module != "cli_app":
            if name in {"print", "pprint", "sys.stdout"}:
                yield node.lineno, f"{name}: only cli_app.py prints"
            if name in {"sys.exit", "os._exit", "SystemExit", "exit", "quit", "typer.Exit"}:
                yield node.lineno, f"{name}: only cli_app.py exits"
        if name.startswith("yaml.") and name.split(".")[1] in UNSAFE_YAML:
            yield node.lineno, f"uses {name}: only yaml.safe_load and SafeLoader"
        if not isinstance(node, ast.Call):
            continue
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if isinstance(node.func, ast.Attribute) and node.func.attr in {"item", "cpu"} and room in {"gating", "tuner"}:
            yield node.lineno, f".{node.func.attr}() waits for the device; not in {room}"
        if keywords.get("allow_pickle", "False") != "False":
            yield node.lineno, "allow_pickle must be False: no pickle"
        if ast.unparse(node.func) == "torch.load" and keywords.get("weights_only") != "True":
            yield node.lineno, "torch.load without weights_only=True: no pickle"


def violations(module: str, source: str, modules: set[str], is_package: bool = False) -> list[str]:
    """Every broken rule of one file, as "line: what"; `module` is dotted, without the package's name."""
    tree = ast.parse(source)
    faults = [*import_faults(module, tree, modules, is_package), *call_faults(module, tree)]
    # The contracts need one real model to be checked on.
    if module not in ("routers.families", "libraries.tiny"):
        named = ((line, ARCHITECTURES.search(text)) for line, text in code_words(tree))
        faults += [(line, f"{m[0]!r}: architecture names live in routers/families.py only") for line, m in named if m]
    if module in {"cache", "pressure"} and any(not isinstance(n, ast.Expr) for n in ast.parse(source).body):
        faults.append((1, f"{module}/__init__.py must stay empty"))
    if source.count("\n") > MAX_LINES:
        faults.append((MAX_LINES, f"longer than {MAX_LINES} lines; one room, one idea"))
    return [f"{line}: {what}" for line, what in sorted(set(faults))]


def tree_of(repo_root: Path) -> dict[str, tuple[Path, bool]]:
    """Module -> (file, is a package), as setuptools maps the folders."""
    found = {}
    for folder, prefix in (("remoe_adapt", ()), ("triton_kernels", ("triton_kernels",)), ("profiles", ("profiles",))):
        for path in sorted((repo_root / folder).rglob("*.py")):
            parts = [*prefix, *path.relative_to(repo_root / folder).with_suffix("").parts]
            is_package = parts[-1] == "__init__"
            found[".".join(parts[:-1] if is_package and len(parts) > 1 else parts)] = (path, is_package)
    return found


def test_every_file_keeps_its_layer_and_its_rules(repo_root: Path) -> None:
    tree = tree_of(repo_root)
    assert {"__init__", "errors", "device_profile", "triton_kernels", "profiles", "cache"} <= set(tree)
    faults = [
        f"{path.relative_to(repo_root)}:{fault}"
        for module, (path, is_package) in tree.items()
        for fault in violations(module, path.read_text(encoding="utf-8"), set(tree), is_package)
    ]
    assert not faults, "\n".join(faults)


def targets(module: str, source: str, modules: set[str], is_package: bool = False) -> set[str]:
    """Modules of ours that importing `module` runs."""
    tree = ast.parse(source)
    types_only = for_types_only(tree)
    names = {name for line, name in imports(module, tree, is_package) if line not in types_only}
    return {target for target in (own_module(name, modules) for name in names) if target} - {module}


def test_no_import_cycles(repo_root: Path) -> None:
    tree = tree_of(repo_root)
    graph = {m: targets(m, path.read_text(encoding="utf-8"), set(tree), package) for m, (path, package) in tree.items()}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the cycle
    assert set(order) == set(tree)


def test_other_folders_stay_short_and_name_no_path_of_a_machine(repo_root: Path) -> None:
    folders = ("remoe_adapt", "triton_kernels", "profiles", "tests", "examples", "benchmarks", ".ci")
    files = [
        p for folder in folders for p in (repo_root / folder).rglob("*") if p.suffix in {".py", ".md", ".yaml", ""}
    ]
    files += [*repo_root.glob("*.md"), repo_root / "Makefile", repo_root / "pyproject.toml"]
    machine = re.compile("|".join("/" + name + "/" for name in ("work", "root", "tmp" + "/house", "tmp" + "/venv")))
    faults = []
    for path in (p for p in files if p.is_file() and not p.name.startswith(".")):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".py" and text.count("\n") > MAX_LINES:
            faults.append(f"{path}: longer than {MAX_LINES} lines")
        faults += [f"{path}: names {match[0]}" for match in machine.finditer(text)]
    assert not faults, "\n".join(faults)


KNOWN = {"__init__", "errors", "trace", "metrics", "cache", "cache.policy", "cache.store", "family", "report"}
KNOWN |= {"cli_app"}
KNOWN |= {"tuner", "tuner.layer", "gating", "gating.reference", "gating.dispatch", "export.lora", "export.gguf"}
KNOWN |= {"triton_kernels", "triton_kernels.topk", "routers.families", "routers.discover", "runtime.swap"}
CAUGHT = [
    ("trace", "import remoe_adapt.traces.metrics", "listed below"),
    ("trace", "from remoe_adapt import metrics", "listed below"),
    ("trace", "from . import metrics", "listed below"),
    ("cache.policy", "from ..family import Family", "listed below"),
    ("family", "def f():\n    from remoe_adapt.dial.swap import ResidentRouters", "2: family imports runtime.swap"),
    ("family", "import importlib\nimportlib.import_module('remoe_adapt.dial.swap')", "listed below"),
    ("report", "from remoe_adapt import get_remoe_model", "report imports __init__"),
    ("gating.reference", "from remoe_adapt.recency.layer_gate import gate", "listed below"),
    ("gating.dispatch", "from remoe_adapt.expert_cache.checkpoint_store import Store", "listed below"),
    ("somewhere.new", "x = 1", "not in the layer table"),
    ("trace", "import torch", "layer without torch"),
    ("cache.policy", "from torch import nn", "layer without torch"),
    ("trace", "from safetensors.torch import load_file", "layer without torch"),
    ("gating.dispatch", "import triton", "outside triton_kernels"),
    ("gating.dispatch", "import triton.language as tl", "outside triton_kernels"),
    ("gating.dispatch", "from triton_kernels import topk", "top-level name"),
    ("report", "print('x')", "only cli_app.py prints"),
    ("report", "import sys\nsys.stdout.write('x')", "only cli_app.py prints"),
    ("report", "import sys\nsys.exit(1)", "only cli_app.py exits"),
    ("report", "raise SystemExit(1)", "only cli_app.py exits"),
    ("tuner.layer", "x.sum().item()", "waits for the device"),
    ("gating.reference", "x.cpu()", "waits for the device"),
    ("family", "import pickle", "no pickle"),
    ("family", "from joblib import load", "no pickle"),
    ("family", "np.load(f, allow_pickle=True)", "no pickle"),
    ("family", "torch.load(f)", "no pickle"),
    ("family", "yaml.load(f, Loader=yaml.SafeLoader)", "only yaml.safe_load"),
    ("family", "from yaml import unsafe_load", "only yaml.safe_load"),
    ("family", "x = 'qwen2_moe'", "architecture names"),
    ("family", "from transformers import MixtralForCausalLM", "architecture names"),
    ("family", "def load_deepseek(): ...", "architecture names"),
    ("family", "x = f'{a} olmoe'", "architecture names"),
    ("family", "if TYPE_CHECKING:\n    from remoe_adapt.dial.swap import ResidentRouters", "listed below"),
    ("cache", "from remoe_adapt.errors import RemoeError", "must stay empty"),
    ("family", "x = 1\n" * (MAX_LINES + 1), "longer than"),
]


@pytest.mark.parametrize(("module", "source", "words"), CAUGHT)
def test_rules_catch_what_they_forbid(module: str, source: str, words: str) -> None:
    found = violations(module, source, KNOWN, is_package=module == "cache")
    assert any(words in fault for fault in found), found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("metrics", "from remoe_adapt.traces.trace import Trace\nimport numpy as np\nnp.load(f, allow_pickle=False)"),
        ("tuner", "from .layer import RemoeLayer"),
        ("report", "from remoe_adapt import __version__"),
        ("tuner.layer", "if typing.TYPE_CHECKING:\n    from remoe_adapt.family.family import Family"),
        ("export.lora", "from remoe_adapt.engines.gguf.patch import write"),
        ("triton_kernels.topk", "import triton\nimport triton.language as tl\nfrom remoe_adapt import triton_kernels"),
        ("gating.dispatch", "from remoe_adapt.triton_kernels import topk\nlist(d.items())\nx.cuda()"),
        ("routers.families", "TABLE = {'qwen2_moe': 1}"),
        (
            "family",
            "def f():\n    '''As in Mixtral.'''\n    # qwen2 too\n    return switch_rate, model.eval(), x.item()",
        ),
        ("cli_app", "import sys\nfrom remoe_adapt.cli.report import table\nprint(table)\nsys.exit(1)"),
        ("family", "yaml.safe_load(f)\ntorch.load(f, weights_only=True)\nyaml.SafeLoader(f)"),
    ],
)
def test_rules_let_through_what_they_allow(module: str, source: str) -> None:
    assert violations(module, source, KNOWN, is_package=module == "tuner") == []


def test_a_cycle_inside_one_folder_is_seen() -> None:
    graph = {
        "export.lora": targets("export.lora", "from . import gguf", KNOWN),
        "export.gguf": targets("export.gguf", "from .lora import x", KNOWN),
    }
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(graph).prepare()
    assert targets("export.gguf", "if TYPE_CHECKING:\n    from .lora import x", KNOWN) == set()
