"""GGUFs as checkpoints: every number that transformers loads, read in place; or one clear error."""

from __future__ import annotations

import copy
import shutil
import sys
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_checkpoints import ARCH, Kinds, Tensors, Type, experts_in, gguf, only, random_model, write_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.integrations.gguf import is_gguf_arch_supported

from remoe_adapt.checkpoints.load import auto_class
from remoe_adapt.errors import ConfigError, ExpertReadError, MissingDependencyError, RemoeError, UncacheableError
from remoe_adapt.expert_cache.encodings.blocks import Q4_0, Q8_0, dequantise
from remoe_adapt.expert_cache.experts import experts_left_out
from remoe_adapt.expert_cache.gguf.checkpoint import GgufCheckpoint, GgufWeights
from remoe_adapt.expert_cache.gguf.experts import ExpertGroup
from remoe_adapt.expert_cache.plan import experts_modules

# Types whose blocks are 32 numbers long, and those with 256.
SHORT, LONG = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"), ("Q4_K", "Q5_K", "Q6_K")
# Of the architectures with experts these are loaded whole by transformers' own loaders (5.24).
THEIRS = ("qwen2_moe", "qwen3_moe", "minimax_m2", "qwen3_5_moe")
# Configurations that are made of the file alone.
OF_ENTRIES = ("gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe")


def skeleton(config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.device("meta"):
        model = auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    assert isinstance(model, PreTrainedModel)
    return model


def opened(path: Path, config: Any = None) -> tuple[GgufWeights, list[str]]:
    """(what its parameters are made of, the names of its experts modules)."""
    checkpoint = GgufCheckpoint(path, config)
    model = skeleton(checkpoint.config)
    modules = experts_modules(model)
    return checkpoint.weights(model, modules), list(modules)


def pieces(group: ExpertGroup, expert: int) -> list[Tensor]:
    found = []
    for extent in group.extents:
        row = extent.row(expert, extent.shape[0])
        with row.path.open("rb") as file:
            file.seek(row.offset)
            found.append(torch.frombuffer(bytearray(file.read(row.size)), dtype=torch.uint8).view(row.shape))
    return found


def every_number(path: Path, dtype: torch.dtype = torch.float32, config: Any = None) -> dict[str, Tensor]:
    """The parameters of all experts together, and the dense ones, by name."""
    weights, modules = opened(path, config)
    found = dict(weights.read_dense(dtype))
    for name, groups in zip(modules, weights.experts, strict=True):
        for group in groups:
            experts = [group.convert(pieces(group, e), dtype) for e in range(group.extents[0].shape[0])]
            assert all(expert.shape == group.shape and expert.is_contiguous() for expert in experts)
            found[f"{name}.{group.param}"] = torch.stack(experts)
    return found


def assert_same(found: dict[str, Tensor], model: PreTrainedModel) -> None:
    expected = {name: value for name, value in model.state_dict().items() if name not in model.all_tied_weights_keys}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


def theirs(path: Path, config: PretrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """What from_pretrained makes of the file.

    transformers' newer loader computes with scales that it has rounded to `dtype`; its older one and this package
    compute in fp32 and round the numbers.
    """
    found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=dtype)
    assert isinstance(found, PreTrainedModel)
    return found


def needs_loader(folder: str) -> None:
    if folder == "qwen3_5_moe" and not is_gguf_arch_supported(ARCH[folder]):
        pytest.skip("this release of transformers does not load it")


def round_as_converted(model: PreTrainedModel, folder: str) -> None:
    """What the converter stores as another number comes back rounded."""
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("A_log"):
                value.copy_(torch.log(torch.exp(value)))
            elif folder == "qwen3_next" and name.endswith("norm.weight") and "linear_attn.norm" not in name:
                value.copy_((value + 1) - 1)


@pytest.mark.parametrize("folder", sorted(ARCH.keys() - {"qwen3_5_moe"}))
def test_every_parameter_of_every_architecture_comes_back(folder: str, tmp_path: Path) -> None:
    model = random_model(folder)
    path = write_checkpoint(model, folder, tmp_path / "m.gguf")
    round_as_converted(model, folder)
    assert_same(every_number(path, config=model.config), model)


def mixed(kinds: Sequence[str]) -> Kinds:
    """Every type in one file, next to each other in each layer."""
    places: dict[str, int] = {}

    def choose(name: str, shape: tuple[int, ...]) -> Any:
        # Of one type for gate and up, since transformers' newer loader reads no others.
        place = places.setdefault(name.replace("_up_exps", "_gate_exps"), len(places))
        return only(kinds[place % len(kinds)])(name, shape)

    return choose


@pytest.mark.parametrize("folder", THEIRS)
def test_numbers_of_every_type_are_those_of_from_pretrained(folder: str, tmp_path: Path) -> None:
    needs_loader(folder)
    model = random_model(folder, moe_intermediate_size=32, shared_expert_intermediate_size=32, intermediate_size=32)
    # transformers' newer loader reads fewer types.
    kinds = [kind for kind in SHORT if folder != "qwen3_5_moe" or kind not in ("Q5_0", "Q5_1", "MXFP4")]
    path = write_checkpoint(model, folder, tmp_path / "m.gguf", mixed(kinds))
    loaded = theirs(path, model.config)
    assert_same(every_number(path, torch.float32, model.config), loaded)
    assert_same(every_number(path, torch.bfloat16, model.config), loaded.to(torch.bfloat16))


@pytest.mark.parametrize("folder", ["qwen3_moe", "qwen3_5_moe"])
def test_numbers_of_long_blocks_are_those_of_from_pretrained(folder: str, tmp_path: Path) -> None:
    needs_loader(folder)
    sizes = dict.fromkeys(("hidden_size", "moe_intermediate_size", "shared_expert_intermediate_size"), 256)
    model = random_model(folder, **sizes, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    path = write_checkpoint(model, folder, tmp_path / "m.gguf", mixed(LONG))
    assert_same(every_number(path, torch.float32, model.config), theirs(path, model.config))


def test_a_half_model_is_read_in_the_dtype_that_from_pretrained_is_given(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", only("Q4_0"))
    loaded = theirs(path, model.config, torch.bfloat16)
    assert_same(every_number(path, torch.bfloat16, model.config), loaded)


@pytest.mark.parametrize("folder", OF_ENTRIES)
def test_the_entries_make_the_configuration_that_the_model_had(folder: str, tmp_path: Path) -> None:
    model = random_model(folder, **({"norm_topk_prob": True} if folder == "qwen3_moe" else {}))
    checkpoint = GgufCheckpoint(write_checkpoint(model, folder, tmp_path / "m.gguf", shard=7))
    # Of these the file says nothing, or something else of its vocabulary.
    own = ("_name_or_path", "architectures", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "use_cache")
    ours, original = checkpoint.config.to_dict(), model.config.to_dict()
    odd = {key: (ours.get(key), original.get(key)) for key in ours.keys() | original.keys() if key not in own}
    assert not {key: pair for key, pair in odd.items() if pair[0] != pair[1]}
    assert (checkpoint.config.bos_token_id, checkpoint.config.eos_token_id) == (1, 2)
    assert_same(every_number(checkpoint.path), model)


def test_embeddings_are_tied_where_the_file_has_no_output(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", tie_word_embeddings=True)
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", shard=10)
    assert GgufCheckpoint(path).config.tie_word_embeddings
    assert_same(every_number(path), model)


def test_a_config_json_beside_the_file_counts_if_it_is_of_this_model(tmp_path: Path) -> None:
    model = random_model("glm4_moe")
    path = write_checkpoint(model, "glm4_moe", tmp_path / "m.gguf")
    with pytest.raises(UncacheableError, match="give config=, the folder or hub id"):
        GgufCheckpoint(path)
    model.config.save_pretrained(tmp_path)
    assert_same(every_number(path), model)
    # Of another architecture, or of other sizes: passed over.
    random_model("qwen3_moe").config.save_pretrained(tmp_path)
    with pytest.raises(UncacheableError, match="give config="):
        GgufCheckpoint(path)
    random_model("glm4_moe", num_hidden_layers=3).config.save_pretrained(tmp_path)
    with pytest.raises(UncacheableError, match="give config="):
        GgufCheckpoint(path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UncacheableError, match="give config="):
        GgufCheckpoint(path)
    # A longer context has another base of its rotations.
    other = random_model("qwen3_moe", rope_parameters={"rope_type": "default", "rope_theta": 5e6})
    other.config.save_pretrained(tmp_path)
    entries = GgufCheckpoint(write_checkpoint(random_model("qwen3_moe"), "qwen3_moe", tmp_path / "q.gguf"))
    assert entries.config.rope_parameters["rope_theta"] == 10000.0
    model.config.save_pretrained(tmp_path / "given")
    assert_same(every_number(path, config=tmp_path / "given"), model)


def test_only_configurations_by_transformers_need_the_gguf_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = write_checkpoint(random_model("qwen3_moe"), "qwen3_moe", tmp_path / "q.gguf")
    model = random_model("minimax_m2")
    path = write_checkpoint(model, "minimax_m2", tmp_path / "m.gguf")
    assert GgufCheckpoint(path).config.num_local_experts == 8
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert every_number(ours) and every_number(path, config=model.config)
    with pytest.raises(MissingDependencyError, match=r"by the gguf package .* or give config="):
        GgufCheckpoint(path)


@pytest.mark.parametrize("folder", ["gpt_oss", "qwen3_moe"])
def test_a_split_model_is_read_like_the_whole(folder: str, tmp_path: Path) -> None:
    model = random_model(folder, norm_topk_prob=True) if folder == "qwen3_moe" else random_model(folder)
    whole = write_checkpoint(model, folder, tmp_path / "whole" / "m.gguf", experts_in("Q4_0", "Q8_0", "Q4_1"))
    first = write_checkpoint(model, folder, tmp_path / "parts" / "m.gguf", experts_in("Q4_0", "Q8_0", "Q4_1"), shard=5)
    assert len(list(first.parent.iterdir())) > 5
    ours, parts = every_number(whole), every_number(first)
    assert ours.keys() == parts.keys() and all(torch.equal(ours[name], parts[name]) for name in ours)


def ggufs_numbers(blocks: Tensor, kind: Any) -> Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), Type(kind.number)))


@pytest.mark.parametrize("kinds", [("Q4_0",), ("Q4_0", "Q4_0", "Q8_0")])
@pytest.mark.parametrize("folder", ["gpt_oss", "qwen2_moe", "mixtral"])
def test_blocks_are_the_rows_of_the_parameter(folder: str, kinds: tuple[str, ...], tmp_path: Path) -> None:
    model = random_model(folder, moe_intermediate_size=32, intermediate_size=64)
    weights, _ = opened(write_checkpoint(model, folder, tmp_path / "m.gguf", experts_in(*kinds)))
    for group in (group for groups in weights.experts for group in groups):
        stored = pieces(group, 3)
        bands = group.blocks(stored)
        numbers = torch.cat([ggufs_numbers(blocks, kind) for kind, blocks in bands])
        expected = group.convert(stored, torch.float32)
        if group.is_bias:
            assert torch.equal(numbers.flatten(), expected)
        else:
            assert torch.equal(numbers, expected.T if group.transposed else expected)
        assert sum(blocks.nbytes for _, blocks in bands) == sum(piece.nbytes for piece in stored)


def test_a_parameter_has_memory_of_its_own(tmp_path: Path) -> None:
    weights, _ = opened(write_checkpoint(random_model("qwen2_moe"), "qwen2_moe", tmp_path / "m.gguf"))
    for group in weights.experts[0]:
        stored = pieces(group, 0)
        value = group.convert(stored, torch.float32)
        kept = value.clone()
        for piece in stored:
            piece.zero_()
        assert torch.equal(value, kept)


def test_rows_of_two_types_that_come_in_turns_have_no_blocks(tmp_path: Path) -> None:
    model = random_model("gpt_oss")
    path = write_checkpoint(model, "gpt_oss", tmp_path / "m.gguf", experts_in("Q4_0", "Q8_0"))
    weights, _ = opened(path)
    group = next(group for group in weights.experts[0] if group.param == "gate_up_proj")
    assert group.kinds == (Q4_0, Q8_0) and not group.has_blocks
    with pytest.raises(UncacheableError, match='come in turns: load it with arithmetic="exact"'):
        group.blocks(pieces(group, 0))
    gate, up = (dequantise(p[0], kind, group.cols) for p, kind in zip(pieces(group, 0), group.kinds, strict=True))
    found = group.convert(pieces(group, 0), torch.float32)
    assert torch.equal(found[:, ::2].T, gate) and torch.equal(found[:, 1::2].T, up)


def fuse_experts(tensors: Tensors) -> None:
    for name in [name for name in tensors if "ffn_gate_exps" in name]:
        (gate, kind), (up, _) = tensors.pop(name), tensors.pop(name.replace("gate", "up"))
        tensors[name.replace("gate", "gate_up")] = (np.concatenate([gate, up], axis=1), kind)


def fuse_attention(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("attn_q.weight")]:
        parts = [tensors.pop(name.replace("attn_q", f"attn_{part}"))[0] for part in "qkv"]
        tensors[name.replace("attn_q", "attn_qkv")] = (np.concatenate(parts), Type.F32)


@pytest.mark.parametrize(
    ("folder", "change"),
    [
        ("qwen3_moe", fuse_experts),
        ("mixtral", fuse_experts),
        ("gpt_oss", fuse_experts),
        ("qwen3_moe", fuse_attention),
        ("mixtral", fuse_attention),
    ],
)
def test_what_converters_may_fuse_is_taken_apart(folder: str, change: Any, tmp_path: Path) -> None:
    model = random_model(folder)
    assert_same(every_number(write_checkpoint(model, folder, tmp_path / "m.gguf", change=change)), model)


def test_latent_attention_of_files_from_before_it_was_split(tmp_path: Path) -> None:
    model = random_model("deepseek_v3")

    def change(tensors: Tensors) -> None:
        for name, value in model.state_dict().items():
            if name.endswith("kv_b_proj.weight"):
                tensors[f"blk.{name.split('.')[2]}.attn_kv_b.weight"] = (value.numpy(), Type.F32)

    path = write_checkpoint(model, "deepseek_v3", tmp_path / "m.gguf", change=change)
    assert_same(every_number(path, config=model.config), model)


def test_which_dense_matrices_are_blocks_as_they_are(tmp_path: Path) -> None:
    model = random_model("mixtral")
    path = write_checkpoint(model, "mixtral", tmp_path / "m.gguf", only("Q8_0"))
    weights, _ = opened(path)
    whole = {name for name, entry in weights.dense.items() if entry.as_blocks and entry.row_order is None}
    turned = {name for name, parameter in weights.dense.items() if parameter.row_order is not None}
    assert whole == {
        "model.embed_tokens.weight",
        "lm_head.weight",
        *(f"model.layers.{n}.{name}.weight" for n in range(4) for name in ("self_attn.v_proj", "self_attn.o_proj")),
        *(f"model.layers.{n}.mlp.gate.weight" for n in range(4)),
    }
    assert turned == {f"model.layers.{n}.self_attn.{name}.weight" for n in range(4) for name in ("q_proj", "k_proj")}
    for parameter in (weights.dense[name] for name in (*whole, *turned)):
        stored = parameter.stored[0]
        with stored.extent.path.open("rb") as file:
            file.seek(stored.extent.offset)
            blocks = torch.frombuffer(bytearray(file.read(stored.extent.size)), dtype=torch.uint8)
        rows = dequantise(blocks.view(stored.extent.shape), stored.kind, stored.shape[-1])
        expected = rows if parameter.row_order is None else rows[parameter.row_order]
        assert torch.equal(parameter.read(torch.float32), expected)
        assert torch.equal(dequantise(parameter.read_blocks(), stored.kind, stored.shape[-1]), expected)


@pytest.mark.parametrize("folder", ["qwen3_moe", "gpt_oss", "minimax_m2", "afmoe", "ernie4_5_moe"])
def test_from_pretrained_takes_the_dense_part_one_tensor_at_a_time(folder: str, tmp_path: Path) -> None:
    model = random_model(folder)
    checkpoint = GgufCheckpoint(write_checkpoint(model, folder, tmp_path / "m.gguf"), model.config)
    meta = skeleton(checkpoint.config)
    modules = experts_modules(meta)
    state = checkpoint.weights(meta, modules).state_dict(torch.float32)
    with experts_left_out({type(module) for module in modules.values()}):
        config = copy.deepcopy(checkpoint.config)
        loaded, info = type(meta).from_pretrained(
            None, config=config, state_dict=state, dtype=torch.float32, output_loading_info=True
        )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    found = {**loaded.state_dict(), **dict(loaded.named_buffers())}
    expected = {**model.state_dict(), **dict(model.named_buffers())}
    experts = {f"{name}.{param}" for name, module in modules.items() for param, _ in module.named_parameters()}
    assert found.keys() == expected.keys() - experts
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def refusal(path: Path, kind: type[RemoeError], config: Any = None) -> str:
    with pytest.raises(kind) as caught:
        opened(path, config)
    message = str(caught.value)
    assert message.isprintable() and str(path.parent) in message
    return message


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def cut(name: str, *rows: slice) -> Any:
    def change(tensors: Tensors) -> None:
        data, kind = tensors[name]
        tensors[name] = (np.ascontiguousarray(data[rows]), kind)

    return change


def more(tensors: Tensors) -> None:
    tensors["blk.1.attn_q.scale"] = (np.ones(4, np.float32), Type.F32)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop("blk.1.ffn_up_exps.weight"), "has no blk.1.ffn_gate_exps.weight"),
        (drop("blk.2.attn_norm.weight"), "has no blk.2.attn_norm.weight"),
        (drop("output_norm.weight"), "has no output_norm.weight"),
        (cut("blk.0.ffn_down_exps.weight", slice(7)), "[7, 32, 16] do not make up"),
        (cut("blk.0.ffn_gate_exps.weight", slice(8), slice(15)), "[8, 15, 32] and"),
        (cut("blk.3.attn_v.weight", slice(8)), "[8, 32] do not make up model.layers.3.self_attn.v_proj.weight"),
        (more, "has no place for blk.1.attn_q.scale"),
    ],
)
def test_tensors_that_are_missing_left_over_or_of_other_sizes_are_refused(
    change: Any, words: str, tmp_path: Path
) -> None:
    model = random_model("qwen3_moe")
    assert words in refusal(write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", change=change), ConfigError)


def test_a_type_without_a_reader_is_refused_by_name(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", hidden_size=256, num_hidden_layers=1)
    for name in ("blk.0.ffn_gate_exps.weight", "blk.0.attn_q.weight"):

        def change(tensors: Tensors, name: str = name) -> None:
            shape = tensors[name][0].shape
            tensors[name] = (np.zeros((*shape[:-1], shape[-1] // 256 * 66), np.uint8), Type.IQ2_XXS)

        path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", change=change)
        assert f"{name} is of ggml type iq2_xxs" in refusal(path, UncacheableError)


@pytest.mark.parametrize(
    ("entries", "kind", "words"),
    [
        ({"expert_count": 9}, ConfigError, "do not make up"),
        ({"expert_count": 0}, UncacheableError, "is a dense qwen3moe model, without experts"),
        ({"expert_count": 1 << 31}, ConfigError, "do not make up"),
        ({"block_count": 1 << 31}, ExpertReadError, "claims 2147483648 layers"),
        ({"block_count": 5}, ConfigError, "has no blk.4."),
        ({"block_count": 3}, ConfigError, "has no place for blk.3."),
        ({"embedding_length": 64}, ConfigError, "do not make up"),
        ({"expert_feed_forward_length": 1 << 30}, ConfigError, "do not make up"),
        ({"attention.head_count": "four"}, ExpertReadError, "attention.head_count is 'four'"),
        ({"attention.head_count": 0}, ExpertReadError, "head_count is 0"),
        ({"attention.head_count_kv": [1, 2]}, UncacheableError, "head_count_kv is a list: give config="),
        ({"rope.freq_base": float("nan")}, ExpertReadError, "rope.freq_base is nan"),
        ({"rope.scaling.type": "longrope"}, UncacheableError, "rope.scaling.type is not known"),
        ({"rope.scaling.type": "yarn", "rope.scaling.odd": 1.0}, UncacheableError, "rope.scaling.odd is not known"),
    ],
)
def test_entries_that_lie_are_refused(
    entries: dict[str, Any], kind: type[RemoeError], words: str, tmp_path: Path
) -> None:
    path = write_checkpoint(random_model("qwen3_moe"), "qwen3_moe", tmp_path / "m.gguf", entries=entries)
    assert words in refusal(path, kind)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["blk.1.attn_q.weight"][0][3, 3] = np.nan

    path = write_checkpoint(random_model("qwen3_moe"), "qwen3_moe", tmp_path / "m.gguf", change=change)
    weights, _ = opened(path)
    with pytest.raises(ExpertReadError, match=r"blk.1.attn_q.weight at byte \d+ has numbers that are not finite"):
        dict(weights.read_dense(torch.float32))


def test_a_file_that_shrinks_or_goes_after_it_was_opened_is_one_error(tmp_path: Path) -> None:
    path = write_checkpoint(random_model("qwen3_moe"), "qwen3_moe", tmp_path / "m.gguf")
    weights, _ = opened(path)
    last = max(weights.dense.values(), key=lambda parameter: parameter.stored[0].extent.offset)
    with path.open("r+b") as file:
        file.truncate(last.stored[0].extent.offset + 4)
    with pytest.raises(ExpertReadError, match="ends inside tensor"):
        last.read(torch.float32)
    path.unlink()
    with pytest.raises(ExpertReadError, match="cannot be read: No such file"):
        last.read(torch.float32)


def test_other_architectures_adapters_and_wrong_configurations_are_refused(tmp_path: Path) -> None:
    model = random_model("qwen3_moe")
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf")
    assert "config is of a qwen2_moe model" in refusal(path, ConfigError, random_model("qwen2_moe").config)
    fewer = random_model("qwen3_moe", num_hidden_layers=3).config
    assert "has 4 layers, of which 0 predict further tokens, its configuration 3" in refusal(path, ConfigError, fewer)
    with pytest.raises(ConfigError, match="cannot be found"):
        GgufCheckpoint(path, tmp_path / "none")
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert f"{path} ends at byte {len(data) - 1}" in refusal(path, ExpertReadError)
    path.write_bytes(b"safe" + data[4:])
    assert "is no GGUF file" in refusal(path, ExpertReadError)
    assert "is no file" in refusal(tmp_path / "none.gguf", ConfigError)
    write_checkpoint(model, "qwen3_moe", path, architecture="qwen9moe")
    assert "transformers makes none of them" in refusal(path, UncacheableError)
    write_checkpoint(model, "qwen3_moe", path, architecture="granitehybrid")
    hybrid = random_model("granitemoehybrid").config
    assert "stores granitemoehybrid models is not known for certain" in refusal(path, UncacheableError, hybrid)


def test_parts_that_are_missing_or_of_two_models_are_refused(tmp_path: Path) -> None:
    first = write_checkpoint(random_model("qwen3_moe"), "qwen3_moe", tmp_path / "m.gguf", shard=20)
    parts = sorted(tmp_path.iterdir())
    assert "is a later part" in refusal(parts[1], ConfigError)
    shutil.copy(parts[0], parts[1])
    assert f"{parts[1].name} is part 1 of 3 by its metadata" in refusal(first, ExpertReadError)
    parts[1].unlink()
    assert "is not beside it" in refusal(first, ConfigError)


def test_reading_takes_no_second_matrix(tmp_path: Path) -> None:
    model = random_model("qwen3_moe", vocab_size=40000, hidden_size=256, num_hidden_layers=1)
    path = write_checkpoint(model, "qwen3_moe", tmp_path / "m.gguf", only("Q8_0"))
    weights, _ = opened(path)
    tracemalloc.start()
    try:
        value = weights.dense["model.embed_tokens.weight"].read(torch.bfloat16)
        # What torch takes is not seen by it: the buffers of a file are.
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()
    assert value.shape == (40000, 256)
