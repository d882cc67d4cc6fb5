"""What is changed in objects of others is changed by `libraries/patching`, listed in the table, and undone."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.config import PeftConfigMixin
from peft.utils import PeftType
from tiny_families import tiny_family
from tiny_models import tiny_model
from torch import nn
from transformers import DynamicCache, PreTrainedModel, Trainer
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.peft import PeftAdapterMixin
from watched_decoding import IDS

from remoe_adapt import get_remoe_model, load_with_expert_cache, recency_prior, release
from remoe_adapt.errors import MergeStateError, RemoeError
from remoe_adapt.libraries import contracts, patching
from remoe_adapt.libraries.table import Contract
from remoe_adapt.tuner.config import RemoeConfig

PATCHING = "libraries/patching.py"
FUNCTIONS = {
    "append_entry", "become", "carry", "class_attribute", "enum_member", "hook", "override", "put_on",
    "replace_module", "Snapshot",
}  # fmt: skip
# Objects of our own that look as if they were of others.
OURS = {
    ("tuner/config.py", "setattr"): "fields of a RemoeConfig",
    ("bench/gating_cpu.py", "setattr"): "a configuration that the benchmark has made",
    ("bench/harness/widen.py", "setattr"): "a copy of a configuration",
    ("bench/pool_decode.py", "dict"): "a model that the benchmark has loaded for itself",
    ("engines/llamacpp/prior/native.py", "setattr"): "counters of a control block that is our own",
    ("engines/llamacpp/wheel_server.py", "setattr"): "parameters that are made here for the server",
    ("evaluation/planning/machine.py", "register_forward_pre_hook"): "a tiny model that is made to be timed",
    ("evaluation/planning/machine.py", "register_forward_hook"): "the same",
    ("bench/decode/regimes.py", "setattr"): "the mapped experts of a model that the benchmark has loaded for itself",
}
LIBRARIES = ("transformers", "peft", "accelerate", "torch")
# Methods that are looked up on the instance before the class.
METHODS = {"forward", "generate", "save_pretrained", "__init__", "__call__", "__class__"}
CHANGES = {"append", "clear", "extend", "insert", "pop", "register", "remove", "setdefault", "update"}


def of_others(tree: ast.AST) -> set[str]:
    """Names that a file imports from libraries."""
    return {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in LIBRARIES
    }


def is_dict_of(node: ast.AST) -> bool:
    """`vars(x)` and `x.__dict__`, for any x but `self`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func) == "vars":
        return ast.unparse(node.args[0]) != "self"
    return (
        isinstance(node, ast.Attribute)
        and node.attr in ("__dict__", "_modules")
        and ast.unparse(node) != ("self.__dict__")
    )


def written(node: ast.AST) -> list[ast.expr]:
    """What a statement assigns or deletes, tuples taken apart."""
    if isinstance(node, ast.Assign | ast.Delete):
        found = list(node.targets)
    elif isinstance(node, ast.AugAssign | ast.AnnAssign):
        found = [node.target]
    else:
        return []
    return [part for target in found for part in (target.elts if isinstance(target, ast.Tuple) else [target])]


def changes(source: str) -> Iterator[tuple[int, str]]:
    """(line, kind) of everything that changes an object which may be of others."""
    tree = ast.parse(source)
    foreign = of_others(tree)
    for node in ast.walk(tree):
        for target in written(node):
            owner = ast.unparse(target.value) if isinstance(target, ast.Attribute | ast.Subscript) else "self"
            if isinstance(target, ast.Attribute) and target.attr in METHODS and owner != "self":
                yield node.lineno, target.attr
            elif isinstance(target, ast.Subscript) and is_dict_of(target.value):
                yield node.lineno, "dict"
            elif owner.split(".")[0] in foreign:
                yield node.lineno, "library"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        first = ast.unparse(node.args[0]) if node.args else ""
        if re.search(r"\.register_(\w+_)+hook$", name) or name.endswith((".set_submodule", ".add_module")):
            yield node.lineno, name.rpartition(".")[2]
        elif name.rpartition(".")[2] in ("setattr", "delattr", "__setattr__", "__delattr__") and first != "self":
            if not name.startswith("super()"):
                yield node.lineno, name.rpartition(".")[2]
        elif isinstance(node.func, ast.Attribute) and node.func.attr in CHANGES:
            owner = node.func.value
            if is_dict_of(owner) or ast.unparse(owner).split(".")[0] in foreign - {"torch", "nn"}:
                yield node.lineno, "dict" if is_dict_of(owner) else "library"


def sources(repo_root: Path) -> Iterator[tuple[str, str]]:
    package = repo_root / "remoe_adapt"
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package).as_posix(), path.read_text(encoding="utf-8")


def test_only_patching_changes_objects_of_others(repo_root: Path) -> None:
    found = [(file, line, kind) for file, source in sources(repo_root) for line, kind in changes(source)]
    assert any(file == PATCHING for file, _, _ in found)
    faults = [f"{f}:{line}: {kind}" for f, line, kind in found if f != PATCHING and (f, kind) not in OURS]
    assert not faults, "\n".join(faults)
    assert OURS.keys() <= {(file, kind) for file, _, kind in found}, "an exception that nothing needs any more"


@pytest.mark.parametrize(
    "source",
    [
        "model.__class__ = Other",
        "vars(model)['forward'] = ours",
        "del vars(model)['forward']",
        "vars(module).update(forward=ours)",
        "model.__dict__['controller'] = controller",
        "model.__dict__.pop('controller')",
        "a.b, module.forward = 1, ours",
        "cls.__init__ = patched",
        "del cls.__init__",
        "setattr(parent, name, module)",
        "delattr(module, name)",
        "object.__setattr__(module, name, 1)",
        "type.__setattr__(PeftType, 'REMOE', member)",
        "text.register_forward_pre_hook(before)",
        "text.register_full_backward_hook(after)",
        "layer.register_load_state_dict_pre_hook(keep)",
        "base.set_submodule(name, layer)",
        "parent._modules[name] = layer",
        "from peft import PeftModel\nPeftModel.from_pretrained = ours",
        "from transformers import trainer\ntrainer.DEFAULT_CALLBACKS.append(Callback)",
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS\nALL_EXPERTS_FUNCTIONS.register('x', f)",
        "from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS as F\nF['x'] = f",
        "from peft.utils import PeftType\nPeftType._member_names_.append('REMOE')",
    ],
)
def test_a_change_past_patching_is_caught(source: str) -> None:
    assert list(changes(source))


@pytest.mark.parametrize(
    "source",
    [
        "self.forward = forward",
        "vars(self).update(state)",
        "object.__setattr__(self, 'decay', 0.0)",
        "forward = vars(module)['forward']",
        "loss.register_hook(weigh)",
        "fields = vars(copied)\nfields.update(other)",
        "from torch import nn\nlayers = nn.ModuleList()\nlayers.append(nn.Linear(2, 2))",
        "super().__setattr__(name, value)",
    ],
)
def test_objects_of_our_own_may_be_changed(source: str) -> None:
    assert not list(changes(source))


# The table of interpositions


def called(source: str) -> set[str]:
    """The functions of patching that a file calls."""
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        and node.module in ("remoe_adapt.libraries", "remoe_adapt.libraries.patching")
        for alias in node.names
    }
    names = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    return names & imported & FUNCTIONS


def test_every_function_of_patching_is_known_here() -> None:
    public = {name for name, value in vars(patching).items() if getattr(value, "__module__", "") == patching.__name__}
    public -= {"Handle", "Patches"} | {name for name in public if name.startswith("_")}
    assert public == FUNCTIONS


def test_every_call_of_patching_has_a_row_and_every_row_its_call(repo_root: Path) -> None:
    patches = [patch.partition(":") for row in contracts() for patch in row.patches]
    listed = {f"{file}:{name}" for file, _, names in patches for name in names.split(",")}
    found = {
        f"{file}:{name}"
        for file, source in sources(repo_root)
        if not file.startswith("libraries/")  # rows try on models of their own what they vouch for
        for name in called(source)
    }
    assert listed == found


@pytest.mark.parametrize("row", contracts(), ids=lambda row: row.name)
def test_a_row_that_interposes_says_where_and_how(row: Contract, repo_root: Path) -> None:
    assert bool(row.interposes) == bool(row.patches)
    files = [*row.used_in, *(patch.partition(":")[0] for patch in row.patches)]
    assert not [file for file in files if not (repo_root / "remoe_adapt" / file).is_file()]


# As before


class Picture:
    """What a model and the classes around it hold, by identity. It keeps all of it, so that no id is used twice."""

    def __init__(self, model: nn.Module) -> None:
        self._kept: list[Any] = []
        kinds = {kind for module in model.modules() for kind in type(module).__mro__}
        kinds |= {PreTrainedModel, PeftModel, PeftConfigMixin, PeftAdapterMixin, DynamicCache, Trainer, PeftType}
        self.classes = {f"{kind.__module__}.{kind.__qualname__}": self._of(dict(vars(kind))) for kind in kinds}
        self.modules = {name: (type(module), self._of(vars(module))) for name, module in model.named_modules()}
        self.registries = self._of(dict(ALL_EXPERTS_FUNCTIONS)), list(PeftType), dict(PeftType._member_map_)

    def _of(self, attributes: dict[str, Any]) -> dict[str, Any]:
        self._kept += attributes.values()
        return {name: self._value(value) for name, value in attributes.items()}

    def _value(self, value: Any) -> Any:
        if isinstance(value, dict):  # parameters, children, hooks, and what else torch keeps in dicts
            self._kept += value.values()
            return {key: id(held) for key, held in value.items()}
        return value if isinstance(value, bool | str | int | float | type(None)) else id(value)

    def differences(self, other: Picture) -> list[str]:
        """Where the other one is not the same, in words."""
        found = [] if self.registries == other.registries else ["registries"]
        for what in ("classes", "modules"):
            mine, theirs = getattr(self, what), getattr(other, what)
            for name in mine.keys() | theirs.keys():
                if mine.get(name) != theirs.get(name):
                    found += [f"{what}: {name}: {line}" for line in self._lines(mine.get(name), theirs.get(name))]
        return found

    @staticmethod
    def _lines(mine: Any, theirs: Any) -> list[str]:
        if mine is None or theirs is None:
            return ["only in one of them"]
        own, other = (entry[1] if isinstance(entry, tuple) else entry for entry in (mine, theirs))
        names = [key for key in own.keys() | other.keys() if own.get(key, "no") != other.get(key, "no")]
        return names or [f"{mine[0]} and {theirs[0]}"]


def decode(model: Any) -> None:
    with torch.no_grad():
        model.generate(input_ids=IDS[:1, :6], max_new_tokens=4, do_sample=False, pad_token_id=0)


def test_release_takes_everything_off_a_model_behind_an_expert_cache(saved: Path) -> None:
    base = load_with_expert_cache(saved, 0.5)
    decode(base)
    before = Picture(base)
    model = get_remoe_model(base, family=saved / "family", recency="ema", monitor=False)
    model.controller.set_strength(0.5)
    decode(model)
    assert before.differences(Picture(base))
    release(model)
    assert not before.differences(Picture(base))


def test_close_leaves_the_wrappers_of_routers_alone(saved: Path) -> None:
    base: Any = load_with_expert_cache(saved, 0.5)
    decode(base)
    before = Picture(base)
    model = get_remoe_model(base, family=saved / "family", recency="resident")
    decode(model)
    model.controller.close()
    wrapped = [name.removesuffix(".base_layer") for name, _ in base.named_modules() if name.endswith(".base_layer")]
    left = [line for line in before.differences(Picture(base)) if line.startswith("modules: ")]
    parents = {name.rpartition(".")[0] for name in wrapped}
    expected = {f"modules: {parent}: _modules" for parent in parents} | {"modules: : peft_config"}
    assert {line for line in left if not any(f"modules: {name}" in line for name in wrapped)} == expected
    model.unload()
    assert not before.differences(Picture(base))


def test_a_load_behind_a_cache_leaves_the_classes_as_they_were(saved: Path, tmp_path: Path) -> None:
    plain: Any = tiny_model("qwen2_moe")
    before = Picture(plain)
    model = load_with_expert_cache(saved, 0.5)
    with pytest.raises(MergeStateError):
        model.save_pretrained(tmp_path)
    with pytest.raises(RemoeError):
        load_with_expert_cache(saved, 0.5, storage=tmp_path)
    assert not before.differences(Picture(plain))
    again = type(plain)(plain.config)
    assert sum(value.numel() for value in again.parameters()) == sum(value.numel() for value in plain.parameters())


@pytest.mark.parametrize("mode", ["ema", "resident"])
def test_a_prior_is_taken_out_with_all_it_has_changed(mode: str) -> None:
    model: Any = tiny_model("qwen2_moe")
    decode(model)
    before = Picture(model)
    with recency_prior(model, mode, 0.2):
        decode(model)
        assert before.differences(Picture(model))
    assert not before.differences(Picture(model))


def test_unload_takes_the_objective_of_a_training_off() -> None:
    base: Any = tiny_model("qwen2_moe")
    base(input_ids=IDS, labels=IDS).loss.backward()
    before = Picture(base)
    model = get_peft_model(base, RemoeConfig(init_weights=False, reuse_weight=1.0, kl_weight=0.5))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert before.differences(Picture(base))
    model.unload()
    base.train(before.modules[""][1]["training"])
    assert not before.differences(Picture(base))


def test_one_adapter_per_sample_leaves_no_hook(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("qwen2_moe"), RemoeConfig(init_weights=False)).eval()
    model.add_adapter("other", RemoeConfig(init_weights=False))
    before = Picture(model)
    model(input_ids=IDS[:2], adapter_names=["default", "other"][: len(IDS)])
    assert not before.differences(Picture(model))


def test_a_family_that_does_not_fit_leaves_no_trace(tmp_path: Path) -> None:
    base: Any = tiny_model("qwen2_moe")
    family = tiny_family(tiny_model("mixtral"), tmp_path / "family")
    before = Picture(base)
    with pytest.raises(RemoeError):
        get_remoe_model(base, family=family.path)
    assert not before.differences(Picture(base))
