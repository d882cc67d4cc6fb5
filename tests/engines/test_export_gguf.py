"""GGUF by copy, in place and split: only router bytes change, originals come back, kills are survived."""

from __future__ import annotations

import fcntl
import itertools
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_support import Home, changed_only_in_routers, holds
from gguf_writer import gguf, small_model, write_gguf
from killed import killed_at_write
from tiny_checkpoints import save_tiny, stock
from tiny_families import tiny_family

from remoe_adapt.checkpoints.gguf_file import GgufFile
from remoe_adapt.engines.base import BaseFiles, read_tensor
from remoe_adapt.engines.gguf.lora import check_applied, export_gguf_lora, factor
from remoe_adapt.engines.gguf.patch import export_gguf, patch_in_place, undo_in_place
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.gguf.undo import undo_path
from remoe_adapt.errors import ConfigError, ExportError, FamilyError, FingerprintMismatchError, UnsupportedRouterError
from remoe_adapt.family.family import original_weights
from remoe_adapt.routers.table import GGUF_ARCH, GGUF_CORRECTION_BIAS, GGUF_LORA_IGNORED, GGUF_ROUTER_WEIGHT


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(tmp_path_factory.mktemp("gguf"), small_model("qwen2moe"), "qwen2moe")


@pytest.fixture
def copy(home: Home, tmp_path: Path) -> Path:
    return Path(shutil.copy(home.gguf, tmp_path / "copy.gguf"))


def test_the_header_is_read_as_the_gguf_package_reads_it(home: Home) -> None:
    ours, theirs = GgufFile(home.gguf), gguf.GGUFReader(home.gguf)
    assert [(t.name, t.shape, t.type, t.offset) for t in ours.tensors] == [
        (t.name, tuple(int(n) for n in t.shape[::-1]), int(t.tensor_type), t.data_offset) for t in theirs.tensors
    ]
    assert ours.entries.keys() == {name for name in theirs.fields if not name.startswith("GGUF.")}
    for key, value in ours.values.items():
        assert value == pytest.approx(theirs.fields[key].contents())
    assert sum(tensor.span for tensor in ours.tensors) == ours.size - ours.tensors[0].offset


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_copy_differs_in_router_bytes_alone(home: Home, tmp_path: Path, strength: float) -> None:
    result = export_gguf(home.gguf, home.family, strength, tmp_path / "out.gguf", base=home.base)
    assert holds(tmp_path / "out.gguf", home.live(strength))
    assert changed_only_in_routers(home.gguf, tmp_path / "out.gguf")
    assert result["routers"] == 3 and result["router_bytes"] == 3 * 16 * 64 * 4


@pytest.mark.parametrize("router", ["F16", "BF16"])
def test_half_precision_routers_are_checked_and_kept_in_their_type(home: Home, tmp_path: Path, router: str) -> None:
    source = write_gguf(home.model, "qwen2moe", tmp_path / "half.gguf", router=router)
    # bf16 is what fingerprints are made of; F16 rounds before that, so the base has to be seen.
    base = home.base if router == "F16" else None
    if base:
        with pytest.raises(FingerprintMismatchError, match="--base"):
            export_gguf(source, home.family, 1.0, tmp_path / "out.gguf")
    export_gguf(source, home.family, 1.0, tmp_path / "out.gguf", base=base)
    before, after = (list(GgufModel(path).weights_ED().values()) for path in (source, tmp_path / "out.gguf"))
    deltas = home.family.deltas(1.0).values()
    for old_ED, new_ED, delta_ED in zip(before, after, deltas, strict=True):
        assert old_ED.dtype == new_ED.dtype != torch.float32
        assert torch.equal(new_ED, (old_ED.float() + delta_ED).to(old_ED.dtype))


def test_in_place_and_back(home: Home, copy: Path) -> None:
    before = copy.read_bytes()
    for strength in (1.0, 0.25):  # the second one starts from the originals, not from the first
        result = patch_in_place(copy, home.family, strength)
        assert holds(copy, home.live(strength)) and result["undo"] == [str(undo_path(copy))]
    assert changed_only_in_routers(home.gguf, copy)
    assert undo_in_place(copy)["was"] == {"copy.gguf": "patched"}
    assert copy.read_bytes() == before and not undo_path(copy).exists()
    patch_in_place(copy, home.family, 1.0)
    assert patch_in_place(copy, home.family, 0.0)["undo"] == []
    assert copy.read_bytes() == before and not undo_path(copy).exists()
    with pytest.raises(ConfigError, match="no undo file"):
        undo_in_place(copy)


def test_a_patched_model_is_exported_from_its_originals(home: Home, copy: Path, tmp_path: Path) -> None:
    patch_in_place(copy, home.family, 1.0)
    export_gguf(copy, home.family, 0.5, tmp_path / "half.gguf")
    assert holds(tmp_path / "half.gguf", home.live(0.5))
    with pytest.raises(ConfigError, match="patched in place"):
        export_gguf_lora(copy, home.family, tmp_path / "loras")


@pytest.mark.parametrize("write", [0, 1, 2])
@pytest.mark.parametrize("then", ["patch", "undo", "copy"])
def test_a_kill_at_any_write_is_put_right(home: Home, copy: Path, tmp_path: Path, write: int, then: str) -> None:
    before = copy.read_bytes()
    patch_in_place(copy, home.family, 0.5)
    assert killed_at_write(write, lambda: patch_in_place(copy, home.family, 1.0))
    assert not holds(copy, home.live(1.0)) and not holds(copy, home.live(0.0))
    if then == "patch":
        assert patch_in_place(copy, home.family, 1.0)["recovered"]
        assert holds(copy, home.live(1.0))
    elif then == "copy":
        export_gguf(copy, home.family, 0.5, tmp_path / "out.gguf")
        assert holds(tmp_path / "out.gguf", home.live(0.5))
    assert undo_in_place(copy)["was"]["copy.gguf"] == ("patched" if then == "patch" else "torn")
    assert copy.read_bytes() == before


@pytest.mark.parametrize("write", [0, 1, 2])
def test_a_killed_undo_can_be_done_again(home: Home, copy: Path, write: int) -> None:
    before = copy.read_bytes()
    patch_in_place(copy, home.family, 1.0)
    assert killed_at_write(write, lambda: undo_in_place(copy))
    undo_in_place(copy)
    assert copy.read_bytes() == before


def test_originals_are_on_the_disk_before_the_first_change(
    home: Home, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from remoe_adapt.engines.gguf import patch as module

    seen: list[bool] = []
    monkeypatch.setattr(module, "write_at", lambda *_: seen.append(undo_path(copy).exists()))
    patch_in_place(copy, home.family, 1.0)
    assert seen == [True] and not killed_at_write(99, lambda: undo_in_place(copy))


def test_an_undo_file_of_another_model_is_not_used(home: Home, copy: Path, tmp_path: Path) -> None:
    patch_in_place(copy, home.family, 1.0)
    write_gguf(home.model, "qwen2moe", copy, weights="F16")
    for work in (lambda: undo_in_place(copy), lambda: patch_in_place(copy, home.family, 1.0)):
        with pytest.raises(ExportError, match="belongs to another file"):
            work()
    undo_path(copy).write_bytes(b"not safetensors")
    with pytest.raises(ExportError, match="cannot be read"):
        GgufModel(copy)


def test_files_that_others_share_are_not_changed_in_place(home: Home, copy: Path, tmp_path: Path) -> None:
    (tmp_path / "second.gguf").hardlink_to(copy)
    (tmp_path / "third.gguf").symlink_to(copy)
    for path in (copy, tmp_path / "third.gguf"):
        with pytest.raises(ConfigError, match="all of them would change"):
            patch_in_place(path, home.family, 1.0)
    with copy.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="by another process"):
            patch_in_place(copy, home.family, 1.0, force=True)
    patch_in_place(copy, home.family, 1.0, force=True)


def test_split_puts_the_routers_first_and_other_strengths_cost_that_part(home: Home, tmp_path: Path) -> None:
    base = split_gguf(home.gguf, home.family, 0.0, tmp_path / "base" / "m.gguf", base=home.base)
    first = Path(base["out"])
    assert base["files"] == ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]
    assert holds(first, home.live(0.0)) and len(GgufModel(first).files) == 2
    whole = {t.name: np.array(t.data) for t in gguf.GGUFReader(home.gguf).tensors}
    parts = {t.name: np.array(t.data) for path in sorted(first.parent.iterdir()) for t in gguf.GGUFReader(path).tensors}
    assert whole.keys() == parts.keys() and all(np.array_equal(whole[name], parts[name]) for name in whole)
    result = export_gguf(first, home.family, 1.0, tmp_path / "s100" / "m.gguf")
    assert holds(Path(result["out"]), home.live(1.0))
    assert result["files"]["m-00002-of-00002.gguf"] == "linked"
    assert (tmp_path / "s100" / "m-00002-of-00002.gguf").samefile(first.with_name("m-00002-of-00002.gguf"))
    with pytest.raises(ConfigError, match="already"):
        split_gguf(first, home.family, 1.0, tmp_path / "again.gguf")
    with pytest.raises(ExportError, match="give the first"):
        GgufModel(first.with_name("m-00002-of-00002.gguf"))
    first.with_name("m-00002-of-00002.gguf").unlink()
    with pytest.raises(ExportError, match="not beside it"):
        GgufModel(first)


def test_another_base_is_refused_in_every_way(home: Home, tmp_path: Path) -> None:
    other = Home(tmp_path, small_model("qwen2moe", seed=9), "qwen2moe")
    for base in (None, other.base, home.base):
        with pytest.raises(FingerprintMismatchError):
            export_gguf(other.gguf, home.family, 1.0, tmp_path / "out.gguf", base=base)
    export_gguf(other.gguf, home.family, 1.0, tmp_path / "forced.gguf", force=True)
    twin = small_model("qwen3moe")  # the same routers under another architecture's name
    with torch.no_grad():
        for ours, theirs in zip(original_weights(twin).values(), home.live(0.0), strict=True):
            ours.copy_(theirs)
    source = write_gguf(twin, "qwen3moe", tmp_path / "twin.gguf")
    with pytest.raises(FingerprintMismatchError, match="converts to"):
        export_gguf(source, home.family, 1.0, tmp_path / "out.gguf", base=home.base)
    wide = small_model("qwen2moe", hidden=128)
    with pytest.raises(FamilyError, match="changes router"):
        export_gguf(
            write_gguf(wide, "qwen2moe", tmp_path / "w.gguf"), home.family, 1.0, tmp_path / "z.gguf", force=True
        )


def write_routers_alone(path: Path, base: BaseFiles, extra_layers: int = 0, bias_shift: float = 0.0) -> Path:
    """A GGUF of nothing but routers and their selection biases, which is all that checks look at."""
    text = base.config.get_text_config()
    writer = gguf.GGUFWriter(path, GGUF_ARCH[text.model_type])
    writer.add_block_count(text.num_hidden_layers + extra_layers)
    writer.add_nextn_predict_layers(extra_layers)
    writer.add_expert_count(base.routers[0].spec.num_experts)
    writer.add_embedding_length(base.routers[0].spec.hidden_size)
    for router in base.routers:
        layer = router.name.split(".")[2]
        assert router.correction_bias
        bias = read_tensor(router.correction_bias).float() + bias_shift
        writer.add_tensor(GGUF_ROUTER_WEIGHT.format(layer=layer), base.weights[router.name].numpy())
        writer.add_tensor(GGUF_CORRECTION_BIAS.format(layer=layer), bias.numpy())
    for layer in range(text.num_hidden_layers, text.num_hidden_layers + extra_layers):
        last = base.weights[base.routers[-1].name]
        writer.add_tensor(GGUF_ROUTER_WEIGHT.format(layer=layer), torch.randn_like(last).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_selection_biases_are_compared_and_kept_and_layers_that_only_predict_left_alone(tmp_path: Path) -> None:
    save_tiny(tmp_path / "base", "deepseek_v3")
    model = stock(tmp_path / "base")
    family, base = tiny_family(model, tmp_path / "family", (1.0,)), BaseFiles(tmp_path / "base")
    source = write_routers_alone(tmp_path / "m.gguf", base, extra_layers=1)
    export_gguf(source, family, 1.0, tmp_path / "out.gguf", base=tmp_path / "base")
    before, after = (
        {t.name: np.array(t.data) for t in gguf.GGUFReader(path).tensors} for path in (source, tmp_path / "out.gguf")
    )
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {GGUF_ROUTER_WEIGHT.format(layer=layer) for layer in (1, 2, 3)}
    live = family.live(1.0, original_weights(model))
    assert np.array_equal(after["blk.2.ffn_gate_inp.weight"], live["model.layers.2.mlp.gate"].detach().numpy())
    split = split_gguf(source, family, 1.0, tmp_path / "split.gguf")
    first = {t.name for t in gguf.GGUFReader(split["out"]).tensors}
    assert {GGUF_CORRECTION_BIAS.format(layer=layer) for layer in (1, 2, 3)} | changed <= first
    other = write_routers_alone(tmp_path / "other.gguf", base, bias_shift=0.01)
    with pytest.raises(FingerprintMismatchError, match="selection bias of layer 1"):
        export_gguf(other, family, 1.0, tmp_path / "new.gguf", base=tmp_path / "base")


def test_quantised_routers_and_models_without_any_are_refused(home: Home, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp", reason="quantised by llama.cpp (extra: llamacpp)")
    with pytest.raises(UnsupportedRouterError, match="Q8_0"):
        GgufModel(write_gguf(home.model, "qwen2moe", tmp_path / "q.gguf", router="Q8_0"))
    export_gguf_lora(home.gguf, home.family, tmp_path / "loras", strengths=[1.0])
    with pytest.raises(ExportError, match="type adapter"):
        GgufModel(tmp_path / "loras" / "s100.gguf")


def test_damaged_files_are_refused_with_their_fault(home: Home, tmp_path: Path) -> None:
    whole, path, tensors = home.gguf.read_bytes(), tmp_path / "damaged.gguf", GgufFile(home.gguf).tensors
    cuts = [(whole[:cut], "whole GGUF|no GGUF|last tensor") for cut in range(0, tensors[0].offset, 997)]
    cuts += [(whole[: tensors[-1].offset], "before its last tensor"), (b"GGML" + whole[4:], "no GGUF")]
    cuts += [(whole[:4] + b"\0\0\0\3" + whole[8:], "big-endian"), (whole[:4] + b"\x01\0\0\0" + whole[8:], "version 1")]
    for data, words in cuts:
        path.write_bytes(data)
        with pytest.raises(ExportError, match=words):
            GgufModel(path)
    with pytest.raises(ConfigError, match="is no file"):
        GgufModel(tmp_path / "absent.gguf")


def test_existing_files_are_kept(home: Home, tmp_path: Path) -> None:
    (tmp_path / "out.gguf").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        export_gguf(home.gguf, home.family, 1.0, tmp_path / "out.gguf")
    (tmp_path / "m-00002-of-00002.gguf").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="exists already"):
        split_gguf(home.gguf, home.family, 1.0, tmp_path / "m.gguf")
    with pytest.raises(ConfigError, match=r"must end in \.gguf"):
        export_gguf(home.gguf, home.family, 1.0, tmp_path / "out.bin")
    assert {p.name for p in tmp_path.iterdir()} == {"out.gguf", "m-00002-of-00002.gguf"}


@pytest.mark.parametrize(("shape", "rank"), list(itertools.product([(16, 64), (64, 16)], [None, 16, 99, 3])))
def test_factors_are_the_delta_or_the_nearest_of_that_rank(shape: tuple[int, int], rank: int | None) -> None:
    delta_ED = torch.randn(shape)
    a_RD, b_ER = factor(delta_ED, rank)
    if rank != 3:
        assert torch.equal(b_ER @ a_RD, delta_ED) and len(a_RD) == 16
        return
    singular_M = torch.linalg.svdvals(delta_ED.double())
    error = float((delta_ED - b_ER @ a_RD).double().norm())
    assert len(a_RD) == 3 and error == pytest.approx(float(singular_M[3:].norm()), rel=1e-5)


def test_lora_files_hold_what_llama_cpp_reads(home: Home, tmp_path: Path) -> None:
    result = export_gguf_lora(home.gguf, home.family, tmp_path, rank=4)
    assert [row["strength"] for row in result["loras"]] == [0.5, 1.0]
    read = gguf.GGUFReader(result["loras"][1]["file"])
    fields: dict[str, Any] = {name: field.contents() for name, field in read.fields.items()}
    assert (fields["general.type"], fields["adapter.type"], fields["adapter.lora.alpha"]) == ("adapter", "lora", 4.0)
    assert fields["general.architecture"] == "qwen2moe"
    values = {t.name: torch.from_numpy(np.array(t.data)) for t in read.tensors}
    errors = []
    for layer, delta_ED in enumerate(home.family.deltas(1.0).values()):
        name = f"blk.{layer}.ffn_gate_inp.weight"
        product = values[f"{name}.lora_b"] @ values[f"{name}.lora_a"]
        errors.append(float((delta_ED - product).norm() / delta_ED.norm()))
    assert result["loras"][1]["relative_error"] == pytest.approx(max(errors), rel=1e-4) and max(errors) > 0.1
    for bad in ({"rank": 0}, {"strengths": [0.0]}, {"strengths": [0.5, 0.5]}):
        with pytest.raises(ConfigError):
            export_gguf_lora(home.gguf, home.family, tmp_path / "new", **bad)  # type: ignore[arg-type]


def test_architectures_that_ignore_a_router_lora_are_refused() -> None:
    for name in GGUF_ARCH.values():
        check_applied(name)
    for name in GGUF_LORA_IGNORED:
        with pytest.raises(UnsupportedRouterError, match="silently ignored"):
            check_applied(name, force=True)
    with pytest.raises(UnsupportedRouterError, match="not known"):
        check_applied("brand-new-moe")
    check_applied("brand-new-moe", force=True)
