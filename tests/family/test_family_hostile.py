"""Families of others, and disks that refuse: one error each, bounded memory, and the family as it was."""

from __future__ import annotations

import ast
import json
import re
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_families import BASE_ID, edit, save_adapter
from tiny_models import HIDDEN, LAYERS, NUM_EXPERTS, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from remoe_adapt.errors import AdapterCorruptError, FamilyError, FingerprintMismatchError
from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers.discover import fingerprint

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
ROUTER = "model.layers.3.mlp.gate"
ESCAPE = "\x1b[31mred\x07"


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return tiny_model("qwen2_moe")


def rewrite(adapter: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    save_file(change(load_file(adapter / WEIGHTS)), adapter / WEIGHTS)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def low(a_shape: tuple[int, int], b_shape: tuple[int, int]) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda _: {
        f"{PREFIX}{ROUTER}.remoe_A": torch.ones(a_shape),
        f"{PREFIX}{ROUTER}.remoe_B": torch.ones(b_shape),
    }


BAD_TENSORS: list[tuple[Callable[[dict[str, Tensor]], dict[str, Tensor]], str]] = [
    (low((1, 40_000), (40_000, 1)), "more than any router has"),
    (low((0, 1_000_000), (1_000_000, 0)), r"not \[experts, hidden\]"),
    (low((2, 32), (8, 3)), "cannot be multiplied"),
    (lambda t: t | {f"{PREFIX}{ROUTER}.remoe_A": torch.ones(2, 32)}, "has remoe_A, remoe_delta"),
    (lambda t: t | {f"{ROUTER}.remoe_delta": torch.ones(NUM_EXPERTS, HIDDEN)}, "twice"),
    (lambda t: {key: value.to(torch.int8) for key, value in t.items()}, "type I8"),
    (lambda t: {key: value.to(torch.float8_e5m2) for key, value in t.items()}, "type F8_E5M2"),
    (lambda t: {key: value > 0 for key, value in t.items()}, "type BOOL"),
    (lambda t: {key: value.double() * 1e300 for key, value in t.items()}, "NaN or Inf"),
]


@pytest.mark.parametrize(("change", "words"), BAD_TENSORS)
def test_bad_deltas_are_refused_when_a_family_is_read(
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], words: str, copied: Path
) -> None:
    rewrite(copied / "s050", change)
    with pytest.raises((FamilyError, AdapterCorruptError), match=words):
        Family.load(copied)


def test_low_rank_deltas_take_no_memory_before_they_are_compared_with_a_model(
    base: PreTrainedModel, tmp_path: Path
) -> None:
    family = Family.create(tmp_path / "family", BASE_ID, fingerprint(base))
    folder = save_adapter(base, tmp_path / "plain", seed=0)
    wide = low((1, 8000), (8000, 1))
    many = {f"{PREFIX}model.layers.{i}.mlp.gate.remoe_{k[-1]}": v for i in range(40) for k, v in wide({}).items()}
    save_file(many, folder / WEIGHTS)
    tracemalloc.start()
    family.add_point(1.0, folder)
    loaded = Family.load(family.path)
    with pytest.raises(FamilyError, match=r"changes router .* by \[8000, 8000\], this model has"):
        loaded.check(base)
    with pytest.raises(FamilyError, match="changes router"):
        loaded.live(1.0, original_weights(base))
    tracemalloc.stop()
    assert not loaded.points[0].deltas._products  # type: ignore[attr-defined]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_finite_deltas_that_make_live_weights_or_logits_infinite_are_refused(dtype: torch.dtype, copied: Path) -> None:
    model: Any = tiny_model("qwen2_moe").to(dtype)
    for value in (3e38, -3e38, 6e4 if dtype == torch.float16 else 1e30):
        rewrite(copied / "s050", lambda t, value=value: {k: torch.full_like(v, value) for k, v in t.items()})  # type: ignore[misc]
        family = Family.load(copied)
        with pytest.raises(FamilyError, match="infinite or NaN"):
            family.check(model, force=True)
        for strength in (0.3, 0.5, 0.75):
            with pytest.raises(FamilyError, match="infinite or NaN"):
                family.live(strength, original_weights(model))
        assert all(
            torch.equal(w, v)
            for w, v in zip(
                family.live(0.0, original_weights(model)).values(), original_weights(model).values(), strict=True
            )
        )


BAD_JSON = [
    "[" * 100_000,
    '{"format": 1, "base": {"id": "x", "fingerprint": "y"}, "points": ' + "[" * 5000 + "]" * 5000 + "}",
    '{"format": ' + "1" * 400 + "}",
    '{"format": 1, "format": 1}',
    '{"format": Infinity}',
    "\ud800",
]


@pytest.mark.parametrize("text", BAD_JSON)
@pytest.mark.parametrize("name", ["family.json", "s050/adapter_config.json"])
def test_json_of_any_kind_is_one_error(name: str, text: str, copied: Path) -> None:
    (copied / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(FamilyError, match=Path(name).name):
        Family.load(copied)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": ["REMOE"]},
        {"peft_type": ESCAPE},
        {"base_fingerprint": 5},
        {"base_fingerprint": [ESCAPE]},
        {"base_fingerprint": ESCAPE, "base_model_name_or_path": ESCAPE},
        {"base_fingerprint": "sha256:0", "allow_other_base": True},
        {"base_fingerprint": "sha256:0", "force": True},
    ],
)
def test_a_point_s_configuration_is_checked_and_switches_nothing_off(changes: dict[str, Any], copied: Path) -> None:
    edit(copied / "s050" / CONFIG, **changes)
    with pytest.raises((FamilyError, FingerprintMismatchError)) as caught:
        Family.load(copied)
    assert "\x1b" not in str(caught.value) and "s050" in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": ESCAPE},
        {"base": {"id": [ESCAPE], "fingerprint": "x"}},
        {"points": [{"strength": ESCAPE, "adapter": "s050"}]},
        {"points": [{"strength": 0.5, "adapter": ESCAPE}]},
        {"points": [{"strength": 0.5, "adapter": "a\0b"}]},
        {"points": [{"strength": 0.5, "adapter": "n" * 300}]},
        {"points": [{"strength": 0.5, "adapter": "s050", ESCAPE: 1}]},
        {"points": [{"strength": 0.5, "adapter": "s050", "certificate": ESCAPE}]},
        {"points": [{"strength": 0.5, "adapter": "s050", "recency": ESCAPE}]},
        {ESCAPE: 1},
    ],
)
def test_errors_about_family_files_hold_no_escapes_and_have_an_end(changes: dict[str, Any], copied: Path) -> None:
    edit(copied / "family.json", **changes)
    with pytest.raises(FamilyError) as caught:
        Family.load(copied)
    assert "\x1b" not in str(caught.value) and "\x07" not in str(caught.value) and len(str(caught.value)) < 2000


def test_the_id_of_a_base_is_printed_without_escapes(copied: Path) -> None:
    known = json.loads((copied / "family.json").read_text())["base"]["fingerprint"]
    edit(copied / "family.json", base={"id": ESCAPE, "fingerprint": known})
    family = Family.load(copied)
    with pytest.raises(FingerprintMismatchError) as mismatch:
        family.check(tiny_model("qwen2_moe", seed=1))
    with pytest.raises(FamilyError) as shapes:
        family.check(tiny_model("qwen2_moe", num_experts=4), force=True)
    family.set_certificate(0.5, {"ce": 1.0})
    for text in (str(mismatch.value), str(shapes.value), (copied / "README.md").read_text(), repr(family)):
        assert "\x1b" not in text and "\x07" not in text


# Disks


class Fault:
    """Lets a number of calls pass, then raises."""

    def __init__(self, call: Callable[..., Any], passes: int, fault: BaseException) -> None:
        self.call, self.passes, self.fault = call, passes, fault

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.passes == 0:
            raise self.fault
        self.passes -= 1
        return self.call(*args, **kwargs)


FAULTS: list[BaseException] = [
    OSError(28, "No space left on device"),
    OSError(30, "Read-only file system"),
    KeyboardInterrupt(),
]
STEPS = [
    ("shutil.copytree", 0),
    ("shutil.copytree", 1),
    ("shutil.copyfile", 1),
    *((f"pathlib.Path.{name}", passes) for name, passes in (("write_text", 0), ("write_text", 1), ("replace", 0))),
    *((f"pathlib.Path.{name}", 0) for name in ("rename", "mkdir")),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault) or "interrupt")
@pytest.mark.parametrize(("step", "passes"), STEPS)
def test_a_failed_save_leaves_nothing_behind(
    step: str, passes: int, fault: BaseException, copied: Path, tmp_path: Path
) -> None:
    family = Family.load(copied)
    before = files(copied)
    target = tmp_path / "new" / "place"
    expected = KeyboardInterrupt if isinstance(fault, KeyboardInterrupt) else FamilyError
    owner, _, name = step.rpartition(".")
    with pytest.MonkeyPatch.context() as patch:
        where: Any = shutil if owner == "shutil" else Path
        held = getattr(where, name)
        state = Fault(held, passes, fault)
        patch.setattr(where, name, state if where is shutil else lambda *args, **kwargs: state(*args, **kwargs))
        with pytest.raises(expected, match=None if expected is KeyboardInterrupt else "cannot be written"):
            family.save(target)
    assert not (tmp_path / "new").exists() and files(copied) == before
    assert Family.load(family.save(target)).strengths == family.strengths


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: str(fault) or "interrupt")
@pytest.mark.parametrize(("step", "passes"), STEPS)
@pytest.mark.parametrize("kept", [False, True])
def test_a_failed_point_leaves_the_family_as_it_was(
    step: str, passes: int, fault: BaseException, kept: bool, copied: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    family = Family.load(copied)
    new = save_adapter(base, tmp_path / "new", seed=7)
    if kept:  # something of somebody lies where the copy goes
        shutil.copytree(copied / "s025", copied / "s075")
    before = files(copied)
    owner, _, name = step.rpartition(".")
    where: Any = shutil if owner == "shutil" else Path
    with pytest.MonkeyPatch.context() as patch:
        state = Fault(getattr(where, name), passes, fault)
        patch.setattr(where, name, state if where is shutil else lambda *args, **kwargs: state(*args, **kwargs))
        try:
            family.add_point(0.75, new)
            reached = False
        except (FamilyError, KeyboardInterrupt):
            reached = True
    if reached:
        assert files(copied) == before and family.strengths == (0.25, 0.5, 1.0)
        assert Family.load(copied).strengths == (0.25, 0.5, 1.0)
        family.add_point(0.75, new)
    again = Family.load(copied)
    assert again.strengths == (0.25, 0.5, 0.75, 1.0) and not list(copied.glob(".*"))
    name = f"model.layers.{LAYERS - 1}.mlp.gate"
    stored = load_file(new / WEIGHTS)[f"{PREFIX}{name}.remoe_delta"]
    assert torch.equal(again.point(0.75).deltas[name], stored)


def test_a_refused_point_does_not_replace_the_one_that_is_there(
    copied: Path, base: PreTrainedModel, tmp_path: Path
) -> None:
    family = Family.load(copied)
    before = files(copied)
    with pytest.raises(FamilyError, match="already"):
        family.add_point(0.5, save_adapter(base, tmp_path / "other", seed=8))
    with pytest.raises(FamilyError, match="share or layers"):
        family.add_point(0.75, tmp_path / "other", Recency("ema", (0.1,), 0.5))
        family.add_point(0.8, tmp_path / "other", Recency("last", (0.1,), 0.5))
    family = Family.load(copied)
    assert family.strengths == (0.25, 0.5, 0.75, 1.0)
    assert {name: data for name, data in files(copied).items() if name in before and "/" in name} == {
        name: data for name, data in before.items() if "/" in name
    }


def test_a_read_only_folder_is_one_error(copied: Path, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(FamilyError, match=r"cannot be written|exists already"):
        Family.load(copied).save(blocked / "below")


@pytest.mark.parametrize("path", ["a\0b", "x" * 5000, 3, None])
def test_a_path_that_can_be_none_is_one_error(path: Any, copied: Path) -> None:
    works: list[Callable[[], object]] = [lambda: Family.load(path), lambda: Family.create(path, "base", "sha256:0")]
    if path is not None:
        works.append(lambda: Family.load(copied).save(path))
    for work in works:
        with pytest.raises(FamilyError, match="no folder of a family"):
            work()


@pytest.mark.parametrize("strength", ["0.3", None])
def test_a_strength_that_is_no_number_is_one_error(strength: Any, copied: Path) -> None:
    family = Family.load(copied)
    for work in (lambda: family.add_point(strength, copied / "s050"), lambda: family.deltas(strength)):
        with pytest.raises(FamilyError, match="strength"):
            work()


# Cards


def test_a_card_says_how_experts_were_computed_where_they_were_codes(copied: Path) -> None:
    family = Family.load(copied)
    for arithmetic, words in (
        ({"name": "float", "exact": True}, None),
        ({"name": "mxfp4", "exact": True}, "The experts were computed as `mxfp4, exact`."),
        ({"name": "ggml q4_0", "exact": False}, "The experts were computed as `ggml q4_0, fast`."),
        ({"name": ["q"], "exact": "yes"}, None), ("exact", None), (None, None),
    ):  # fmt: skip
        family.set_certificate(0.5, {"arithmetic": arithmetic})
        text = (copied / "README.md").read_text()
        assert (words in text) if words else ("The experts were" not in text)


def test_a_family_has_a_card_which_nobody_s_own_text_is_lost_to(copied: Path) -> None:
    family = Family.load(copied)
    family.set_certificate(0.5, {"ppl_ratio": 1.01234, "eor": 0.4, "tokens": 5000, "kl": "<script>"})
    text = (copied / "README.md").read_text()
    assert "| 0.5 | `s050` | none | 1.012 |  | 0.4 |  | 5000 |" in text and "get_remoe_model" in text
    assert f"`{BASE_ID}`" in text and "<script>" not in text and f"base_model: {BASE_ID}\n" in text
    (copied / "README.md").write_text("my own words")
    family.set_certificate(0.5, {"eor": 0.5})
    assert (copied / "README.md").read_text() == "my own words"


@pytest.mark.parametrize(
    "base_id", ["a/b\n---\nlicense: evil", "x` <img src=x> `", "| a | b |", '"); import os; ("', ""]
)
def test_a_card_cannot_be_written_by_the_id_of_a_base(base_id: str, copied: Path) -> None:
    family = Family.load(copied)
    family.base_id = base_id
    family.set_certificate(0.5, {"eor": 0.5})
    text = (copied / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    keys = {line.partition(":")[0] for line in head.splitlines() if ":" in line}
    assert keys <= {"library_name", "base_model", "tags"} and "license: evil" not in text.splitlines()
    for line in body.splitlines():
        assert line.count("`") % 2 == 0 or line.startswith("```")
        assert "<img" not in line or "`x' <img src=x> '`" in line or line.startswith("model = ")
    (program,) = re.findall(r"```python\n(.*?)```", body, re.DOTALL)
    assert len(ast.parse(program).body) == 3
