"""Packs of quantised experts and dense parts hold what their blocks are worth, and say what that cost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_tiny, skeleton, stock
from typer.testing import CliRunner

from remoe_adapt import load_with_expert_cache
from remoe_adapt.cli.app import app
from remoe_adapt.errors import ConfigError, ExpertReadError
from remoe_adapt.expert_cache.checkpoint_store import ALIGNMENT, ExpertStore
from remoe_adapt.expert_cache.direct_io import BLOCK
from remoe_adapt.expert_cache.encodings import KINDS, dequantise, ggml, quantise
from remoe_adapt.expert_cache.load import pack_experts
from remoe_adapt.expert_cache.pack import DENSE, MANIFEST, PackedStore, read_manifest

# Experts in tensors of their own, transposed with biases, interleaved.
LAYOUTS = ("qwen2_moe", "gpt_oss", "inkling2")
IDS = torch.randint(3, 96, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints by name, and packs by name and bits."""
    root = tmp_path_factory.mktemp("packs")
    for name in LAYOUTS:
        save_tiny(root / name, name)
        for bits in (4, 8):
            pack_experts(root / name, root / f"{name}.{bits}", bits=bits)
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def pack(folders: dict[str, Path], tmp_path: Path) -> Path:
    """Which a test may spoil."""
    return shutil.copytree(folders["qwen2_moe.4"], tmp_path / "pack")


def store_of(folder: Path, dtype: torch.dtype = torch.float32) -> ExpertStore:
    return ExpertStore(folder, skeleton(folder, dtype))


def contents(pack: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in pack.iterdir()}


def through_blocks(weight: torch.Tensor, bits: int, transposed: bool = False) -> torch.Tensor:
    matrix = weight.t() if transposed else weight
    values = dequantise(quantise(matrix, KINDS[bits]).blocks_NB, KINDS[bits], matrix.shape[1])
    return values.t() if transposed else values


def through(model: Any, source: ExpertStore, bits: int) -> Any:
    """The model with every matrix of its experts as their blocks are worth."""
    for layer, name in enumerate(source.layers):
        for value in model.get_submodule(name).parameters(recurse=False):
            for expert in range(source.num_experts[layer] if value.ndim == 3 else 0):
                value.data[expert] = through_blocks(value.data[expert], bits, source.plan.transposed[layer])
    return model


def changed(folder: Path, out: Path, ending: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Path:
    """A copy of a checkpoint with another tensor of this name."""
    shutil.copytree(folder, out)
    weights = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
    (name,) = (name for name in weights if name.endswith(ending))
    weights[name] = how(weights[name])
    for file in out.glob("model*"):
        file.unlink()
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pack_holds_what_its_blocks_are_worth(name: str, bits: int, folders: dict[str, Path]) -> None:
    source = store_of(folders[name])
    packed = PackedStore(folders[f"{name}.{bits}"], source)
    for layer, count in enumerate(source.num_experts):
        facts = packed.packed[layer]
        sums: dict[str, list[float]] = {}
        for expert in range(count):
            exact, slot, parts = (
                source.read(layer, expert),
                packed.read(layer, expert),
                packed.read_parts(layer, expert),
            )
            for param, value in exact.items():
                how, found = facts.params[param], packed.layout.weight(layer, slot, param)
                if value.ndim == 1:
                    assert how.codec == "float" and torch.equal(found, value)
                    continue
                assert how.transposed == (name == "gpt_oss")
                (band,) = how.bands
                assert parts[band.name].shape == (how.rows, KINDS[bits].row_bytes(how.cols))
                assert torch.equal(slot[band.name], parts[band.name])
                assert torch.equal(found, through_blocks(value, bits, how.transposed))
                left = (found - value).square().sum(), value.square().sum()
                sums[param] = [one + float(more) for one, more in zip(sums.get(param, [0.0, 0.0]), left, strict=True)]
        entry = json.loads((folders[f"{name}.{bits}"] / MANIFEST).read_text())["layers"][layer]
        expected = {param: (error / norm) ** 0.5 for param, (error, norm) in sums.items()}
        assert entry["weight_error"] == pytest.approx(expected, rel=1e-3)
        assert all(0 < error < (0.1 if bits == 4 else 0.007) for error in expected.values())


def test_one_read_brings_an_expert_to_a_slot(folders: dict[str, Path]) -> None:
    reads: list[int] = []

    def watching(fd: int, buffers: Any, offset: int) -> int:
        reads.append(offset)
        return os.preadv(fd, buffers, offset)

    store = PackedStore(folders["gpt_oss.4"], store_of(folders["gpt_oss"]), reader=watching)
    layout = store.packed[1].slot_parts()
    assert list(layout) == ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
    assert all(offset % ALIGNMENT == 0 for offset, _, _ in layout.values())
    end = max(offset + torch.Size(shape).numel() * dtype.itemsize for offset, shape, dtype in layout.values())
    # Slots may end where the last part does.
    slot = torch.full((end + 64,), 7, dtype=torch.uint8)
    reads.clear()
    store.read_into(1, 2, slot[:end])
    assert len(reads) == 1 and (slot[end:] == 7).all()
    for name, part in store.read_parts(1, 2).items():
        offset, shape, dtype = layout[name]
        assert torch.equal(slot[offset:][: part.nbytes].view(dtype).view(shape), part)


def test_models_decode_from_a_quantised_pack(folders: dict[str, Path]) -> None:
    for name in LAYOUTS:
        model: Any = load_with_expert_cache(folders[name], 0.5, storage=folders[f"{name}.8"], arithmetic="exact")
        expected = through(stock(folders[name]), store_of(folders[name]), 8)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_blocks_serve_every_type_and_floats_beside_them_are_converted(folders: dict[str, Path]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        store = PackedStore(folders["gpt_oss.8"], store_of(folders["gpt_oss"], dtype))
        slot, exact = store.read(0, 1), store_of(folders["gpt_oss"]).read(0, 1)
        assert torch.equal(slot["down_proj_bias"], exact["down_proj_bias"].to(dtype))
        weight = store.layout.weight(0, slot, "down_proj")
        assert torch.equal(weight, through_blocks(exact["down_proj"], 8, transposed=True).to(dtype))


def test_the_command_quantises_and_shows_the_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    run, folder = CliRunner().invoke, str(folders["qwen2_moe"])
    made = run(app, ["pack", folder, str(tmp_path / "a"), "--bits", "4", "--dense-bits", "8", "--json"])
    assert made.exit_code == 0, made.output
    result = json.loads(made.stdout)
    assert result["dtypes"] == ["q4_1"] and result["bytes"] == sum(len(data) for name, data in contents(
        tmp_path / "a").items() if name.endswith(".safetensors"))  # fmt: skip
    manifest = json.loads((tmp_path / "a" / MANIFEST).read_text())
    assert manifest["format"] == 2 and manifest["tool"].startswith("remoe-adapt ")
    assert list(result["weight_error"].values()) == [layer["weight_error"] for layer in manifest["layers"]]
    shown = run(app, ["pack", folder, str(tmp_path / "b"), "--bits", "4", "--dense-bits", "8"])
    assert shown.exit_code == 0 and "relative error of the weights" in shown.output and "Dense part:" in shown.output
    for options, words in (
        (["--bits", "3"], "bits 3: give 4 or 8"),
        (["--dense-bits", "5"], "dense_bits 5: give 4, 8"),
    ):
        refused = run(app, ["pack", folder, str(tmp_path / "c"), *options])
        assert refused.exit_code == 2 and words in refused.output
    with pytest.raises(ConfigError, match="bits True: give 4 or 8"):
        pack_experts(folder, tmp_path / "c", bits=True)


def test_the_dense_part_lies_beside_the_experts(folders: dict[str, Path], tmp_path: Path) -> None:
    result = pack_experts(folders["qwen2_moe"], tmp_path / "pack", bits=8, dense_bits=8)
    manifest = read_manifest(tmp_path / "pack")
    tensors, model = load_file(tmp_path / "pack" / DENSE), stock(folders["qwen2_moe"])
    params = {name: value for name, value in model.state_dict().items() if ".mlp.experts." not in name}
    assert tensors.keys() == params.keys()
    assert result["dense_weight_error"].keys() == manifest["dense"].keys()
    for name, value in params.items():
        if name not in manifest["dense"]:
            assert torch.equal(tensors[name], value)
            continue
        entry = manifest["dense"][name]
        assert (entry["codec"], entry["rows"], entry["cols"]) == ("q8_0", *value.shape)
        values = dequantise(tensors[name], KINDS[8], entry["cols"])
        assert torch.equal(values, through_blocks(value, 8))
        assert entry["weight_error"] == pytest.approx(float((values - value).norm() / value.norm()), rel=1e-3)
    encoded = {name.rpartition(".layers.")[2].partition(".")[2] for name in manifest["dense"]}
    assert {"self_attn.q_proj.weight", "mlp.shared_expert.down_proj.weight", "embed_tokens.weight"} <= encoded
    assert not any(word in name for name in encoded for word in ("norm", "bias", "mlp.gate.", "shared_expert_gate"))
    whole = pack_experts(folders["qwen2_moe"], tmp_path / "16", dense_bits=16)
    assert whole["dense_weight_error"] == {} and torch.equal(load_file(tmp_path / "16" / DENSE)[name], params[name])


def test_a_model_takes_its_dense_part_from_the_pack(folders: dict[str, Path], tmp_path: Path) -> None:
    for name in LAYOUTS:
        pack_experts(folders[name], tmp_path / name, bits=4, dense_bits=8)
        model: Any = load_with_expert_cache(folders[name], 0.5, storage=tmp_path / name, arithmetic="exact")
        expected = through(stock(folders[name]), store_of(folders[name]), 4)
        for param in read_manifest(tmp_path / name)["dense"]:
            weight = expected.get_parameter(param)
            weight.data = through_blocks(weight.data, 8)
        with torch.no_grad():
            assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_a_dense_part_that_was_trained_since_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """As after `remoe export merged`: the experts are the same, and only routers differ."""
    pack_experts(folders["qwen2_moe"], tmp_path / "pack", bits=8, dense_bits=16)
    pack_experts(folders["qwen2_moe"], tmp_path / "experts", bits=8)
    tuned = changed(folders["qwen2_moe"], tmp_path / "tuned", "layers.2.mlp.gate.weight", lambda weight: weight * 1.01)
    with pytest.raises(ConfigError, match=r"has another dense part than .*tuned.*Pack again"):
        load_with_expert_cache(tuned, storage=tmp_path / "pack")
    model: Any = load_with_expert_cache(tuned, 0.5, storage=tmp_path / "experts", arithmetic="exact")
    expected = through(stock(tuned), store_of(tuned), 8)
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_tied_weights_are_packed_once(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe", tie_word_embeddings=True)
    pack_experts(folder, tmp_path / "pack", dense_bits=4)
    assert {name for name in read_manifest(tmp_path / "pack")["dense"] if "layers" not in name} == {
        "model.embed_tokens.weight"
    }
    assert "lm_head.weight" not in load_file(tmp_path / "pack" / DENSE)


def test_packs_of_other_models_are_refused(folders: dict[str, Path], pack: Path, tmp_path: Path) -> None:
    other = save_tiny(tmp_path / "other", "qwen2_moe", moe_intermediate_size=24)
    with pytest.raises(ConfigError, match=r"pack of qwen2_moe .*\[32, 32\].*, not of .*\[48, 32\]"):
        PackedStore(pack, store_of(other))
    # Less than a step of the blocks: the numbers before they were encoded tell.
    tuned = changed(
        folders["qwen2_moe"], tmp_path / "tuned", "layers.2.mlp.experts.7.down_proj.weight", lambda w: w * (1 + 1e-6)
    )
    with pytest.raises(ConfigError, match=r"other numbers than .* in the experts of model\.layers\.2\.mlp\.experts"):
        load_with_expert_cache(tuned, storage=pack)


def spoil(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def changed(manifest: dict[str, Any]) -> dict[str, Any]:
        change(manifest["layers"][0])
        return manifest

    return changed


SPOILED = {
    "a part beyond the piece": spoil(lambda layer: layer["parts"]["down_proj"].update(offset=layer["bytes"])),
    "parts in each other": spoil(lambda layer: layer["parts"]["down_proj"].update(offset=64)),
    "an odd offset": spoil(lambda layer: layer["parts"]["down_proj"].update(offset=8)),
    "a negative offset": spoil(lambda layer: layer["parts"]["gate_up_proj"].update(offset=-64)),
    "blocks of another length": spoil(lambda layer: layer["params"]["down_proj"].update(cols=64)),
    "bands of too few rows": spoil(lambda layer: layer["params"]["down_proj"].update(rows=33)),
    "no bands": spoil(lambda layer: layer["params"]["down_proj"].update(bands=[])),
    "a band of no part": spoil(lambda layer: layer["params"]["down_proj"]["bands"][0].update(part="nothing")),
    "a type that nobody knows": spoil(lambda layer: layer["params"]["down_proj"]["bands"][0].update(type="q9_9")),
    "a codec that nobody knows": spoil(lambda layer: layer["params"]["down_proj"].update(codec="gzip")),
    "a part of an unknown type": spoil(lambda layer: layer["parts"]["down_proj"].update(dtype="complex64")),
    "an order that is no part": spoil(lambda layer: layer["params"]["down_proj"]["bands"][0].update(order="none")),
    "a huge shape": spoil(lambda layer: layer["parts"]["down_proj"].update(shape=[1 << 40, 1 << 40])),
    "a size that is no number": spoil(lambda layer: layer.update(bytes="many")),
    "a size that is no whole number of blocks": spoil(lambda layer: layer.update(bytes=BLOCK + 1)),
    "dense weights of no type": lambda manifest: manifest | {"dense": {"a": {"codec": "q4", "rows": 1, "cols": 1}}},
}


@pytest.mark.parametrize("how", SPOILED)
def test_manifests_that_lie_are_refused(how: str, folders: dict[str, Path], pack: Path) -> None:
    manifest = SPOILED[how](json.loads((pack / MANIFEST).read_text()))
    (pack / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((ConfigError, ExpertReadError), match=r"is not whole|pack again"):
        PackedStore(pack, store_of(folders["qwen2_moe"]))


def test_numbers_that_cannot_be_encoded_are_named(folders: dict[str, Path], tmp_path: Path) -> None:
    def spoiled(weight: torch.Tensor) -> torch.Tensor:
        weight[0, 0] = float("nan")
        return weight

    name = "layers.1.mlp.experts.3.down_proj.weight"
    folder = changed(folders["qwen2_moe"], tmp_path / "model", name, spoiled)
    with pytest.raises(ConfigError, match=r"down_proj of expert 3 of model\.layers\.1\.mlp\.experts holds NaN"):
        pack_experts(folder, tmp_path / "pack", bits=4)
    assert not (tmp_path / "pack").exists()


KILLED = """
import sys, time
from remoe_adapt.expert_cache.load import pack_experts
import remoe_adapt.expert_cache.packing
done = 0
def slowly(count):
    global done
    done += count
    print(done, flush=True)
    time.sleep(0.02)
remoe_adapt.expert_cache.packing.write_pack.__kwdefaults__["shard_bytes"] = 40_000
pack_experts(sys.argv[1], sys.argv[2], bits=4, dense_bits=8, on_bytes=slowly)
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_and_knows_all_errors(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = folders["qwen2_moe"]

    def run(out: Path, kill_at: float) -> None:
        process = subprocess.Popen([sys.executable, "-c", KILLED, folder, out], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process.stdout:
            while kill_at and int(process.stdout.readline() or kill_at) < kill_at:
                pass
            if kill_at:
                os.kill(process.pid, signal.SIGKILL)
            assert process.wait() == (-signal.SIGKILL if kill_at else 0)

    run(tmp_path / "whole", 0)
    expected = contents(tmp_path / "whole")
    run(tmp_path / "out", sum(map(len, expected.values())) // 2)
    draft = tmp_path / ".out.partial"
    finished = {path.name: path.stat().st_mtime_ns for path in draft.glob("*.safetensors")}
    assert finished and not (tmp_path / "out").exists()
    run(tmp_path / "out", 0)
    assert contents(tmp_path / "out") == expected and not draft.exists()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == then for name, then in finished.items())


def test_a_vocabulary_in_codes_is_not_resized(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "m", "qwen2_moe")
    pack_experts(folder, tmp_path / "pack", bits=8, dense_bits=8)
    floats = load_with_expert_cache(folder, 0.5)
    assert floats.resize_token_embeddings(100).num_embeddings == 100
    if ggml() is None:
        pytest.skip("no kernels for codes here (extra: llamacpp)")
    with pytest.raises(ConfigError, match="dense part is in codes"):
        load_with_expert_cache(folder, 0.5, storage=tmp_path / "pack", arithmetic="fast").resize_token_embeddings(100)
