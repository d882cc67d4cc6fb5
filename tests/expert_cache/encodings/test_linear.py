"""Dense modules on ggml blocks: exact to the bit, fast within its tolerance, and linear modules to PEFT."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import gguf
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt.errors import MergeStateError, UncacheableError
from remoe_adapt.expert_cache.encodings import linear as dense
from remoe_adapt.expert_cache.encodings.blocks import F16, Q4_0, Q8_0, BlockType, dequantise
from remoe_adapt.expert_cache.encodings.ggml import ggml
from remoe_adapt.expert_cache.encodings.linear import (
    EncodedEmbedding,
    EncodedLinear,
    dense_modules,
    encode_dense,
    load_blocks,
)

SIZES: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16}
IDS = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1))


def blocks_of(weight_NK: Tensor, kind: BlockType) -> Tensor:
    padded_NK = F.pad(weight_NK.detach().float(), (0, -weight_NK.shape[1] % kind.values))
    quantised = gguf.quants.quantize(padded_NK.numpy(), gguf.GGMLQuantizationType(kind.number))
    return torch.from_numpy(quantised).view(torch.uint8)


def left(model: nn.Module) -> list[str]:
    """Routers and experts, as those who encode a model leave them."""
    return [name for name, _ in model.named_modules() if name.endswith(("mlp.gate", "mlp.experts"))]


def pair(
    dtype: torch.dtype = torch.float32, kind: BlockType = Q8_0, *, fast: bool = False, **sizes: Any
) -> tuple[Any, Any]:
    """A tiny model with its dense part in codes, and one whose dense weights are what those stand for."""
    plain: Any = tiny_model("qwen2_moe", **SIZES, **sizes).to(dtype)
    encoded: Any = copy.deepcopy(plain)
    which = {name: (kind, *shape) for name, shape in dense_modules(plain, left(plain)).items()}
    encode_dense(encoded, which, fast=fast)
    for name, module in plain.named_modules():
        if name in which:
            blocks_NB = blocks_of(module.weight, kind)
            load_blocks(encoded, name, blocks_NB)
            module.weight.data = dequantise(blocks_NB, kind, module.weight.shape[1], dtype)
    assert which and not any(each.weight.is_meta for each in encoded.modules() if isinstance(each, EncodedLinear))
    return encoded, plain


@pytest.fixture(scope="module")
def fast_kernels() -> Iterator[Any]:
    if (kernels := ggml()) is None or Q8_0 not in kernels.types:
        pytest.skip("ggml's kernels are not here (extra: llamacpp)")
    yield kernels


def test_all_but_experts_and_routers_is_found_and_encoded() -> None:
    encoded, plain = pair()
    kinds = {name: type(module) for name, module in encoded.named_modules()}
    for name, module in plain.named_modules():
        if type(module) in (nn.Linear, nn.Embedding):
            assert kinds[name] in (EncodedLinear, EncodedEmbedding), name
    assert "lm_head" in kinds and not any("experts." in name for name, kind in kinds.items() if kind is EncodedLinear)
    shapes = dense_modules(plain, left(plain))
    found = sum(tensor.nbytes for tensor in encoded.parameters() if tensor.dtype == torch.uint8)
    assert found == sum(rows * Q8_0.row_bytes(cols) for rows, cols in shapes.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Q8_0, Q4_0, F16], ids=lambda kind: kind.name)
def test_exact_logits_are_those_of_the_dequantised_model(dtype: torch.dtype, kind: BlockType) -> None:
    encoded, plain = pair(dtype, kind)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(encoded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    assert encoded.dtype == dtype
    generated = [m.generate(IDS[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0) for m in (encoded, plain)]
    assert torch.equal(*generated)


def test_tied_embeddings_are_one_tensor_of_codes() -> None:
    encoded, plain = pair(tie_word_embeddings=True)
    assert encoded.lm_head.weight is encoded.model.embed_tokens.weight
    assert isinstance(encoded.model.embed_tokens, EncodedEmbedding)
    with torch.no_grad():
        assert torch.equal(encoded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    encoded.tie_weights()
    copied = copy.deepcopy(encoded).to(torch.float16)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight is not encoded.lm_head.weight
    assert copied.lm_head.weight.dtype == torch.uint8
    names = [name for name, _ in encoded.named_parameters()]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names


def test_a_type_for_the_model_leaves_its_codes_alone() -> None:
    encoded, plain = pair()
    before = {name: p.clone() for name, p in encoded.named_parameters() if p.dtype == torch.uint8}
    for dtype in (torch.float16, torch.bfloat16):
        encoded.to(dtype)
        plain.to(dtype)
        after = dict(encoded.named_parameters())
        assert all(torch.equal(after[name], codes) for name, codes in before.items())
        assert encoded.model.embed_tokens(IDS).dtype == dtype == encoded.dtype
        with torch.no_grad():
            assert encoded(input_ids=IDS).logits.dtype == dtype
    assert encoded.half().model.embed_tokens(IDS).dtype == torch.float16


def test_state_dicts_and_copies_hold_the_codes() -> None:
    encoded, _ = pair()
    with torch.no_grad():
        expected = encoded(input_ids=IDS).logits
        copied = copy.deepcopy(encoded)
        assert torch.equal(copied(input_ids=IDS).logits, expected)
        state = encoded.state_dict()
        name = "model.layers.0.self_attn.q_proj.weight"
        assert state[name].dtype == torch.uint8 and not any("float_like" in key for key in state)
        copied.get_parameter(name).zero_()
        assert not torch.equal(copied(input_ids=IDS).logits, expected)
        copied.load_state_dict(state)
        assert torch.equal(copied(input_ids=IDS).logits, expected)
    assert "q8_0" in repr(encoded)


def trained(model: Any, *, checkpointing: bool = False, **lora: Any) -> tuple[list[float], dict[str, Tensor], Any]:
    """Losses and adapters of some steps with a LoRA on the dense part."""
    torch.manual_seed(3)
    targets = ["q_proj", "o_proj", "embed_tokens", "lm_head"]
    config = LoraConfig(r=4, target_modules=lora.pop("target_modules", targets), init_lora_weights=True, **lora)
    adapted: Any = get_peft_model(model, config).train()
    if checkpointing:
        # Its old name warns in newer versions of transformers.
        name = "activation_checkpointing_enable"
        getattr(adapted, name if hasattr(adapted, name) else "gradient_checkpointing_enable")()
        adapted.enable_input_require_grads()
    optimiser = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(4):
        loss = adapted(input_ids=IDS, labels=IDS).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in adapted.named_parameters() if "lora" in name}, adapted


@pytest.mark.parametrize("options", [{}, {"checkpointing": True}, {"use_dora": True, "target_modules": ["q_proj"]}])
def test_a_lora_on_codes_trains_as_on_the_dequantised_model(options: dict[str, Any]) -> None:
    encoded, plain = pair(fast=True)
    losses, adapter, _ = trained(encoded, **options)
    expected_losses, expected, _ = trained(plain, **options)
    assert losses == expected_losses and losses[-1] < losses[0]
    assert adapter.keys() == expected.keys()
    assert all(torch.equal(adapter[name], expected[name]) for name in adapter)


def test_gradients_reach_biases_and_inputs() -> None:
    plain = nn.Linear(64, 24)
    encoded = EncodedLinear(plain, Q8_0)
    blocks_NB = blocks_of(plain.weight, Q8_0)
    load_blocks(encoded_root := nn.Sequential(encoded), "0", blocks_NB)
    assert encoded_root[0].bias is plain.bias
    weight = dequantise(blocks_NB, Q8_0, 64)
    for shape in ((64,), (5, 64), (2, 3, 64)):
        x, y = (torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True) for _ in range(2))
        found, expected = encoded(x), F.linear(y, weight, plain.bias)
        assert torch.equal(found, expected)
        grads = torch.autograd.grad(found.square().sum(), [x, plain.bias])
        wanted = torch.autograd.grad(expected.square().sum(), [y, plain.bias])
        for one, other in zip(grads, wanted, strict=True):
            torch.testing.assert_close(one, other)
    assert torch.autograd.gradcheck(encoded, [torch.randn(2, 64, dtype=torch.float64, requires_grad=True)])


def test_a_graph_keeps_the_codes_and_not_the_weight() -> None:
    encoded, _ = pair()
    layer = encoded.model.layers[0].self_attn.q_proj
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(3, 64, requires_grad=True))
    assert sum(tensor.nbytes for tensor in kept) == layer.weight.nbytes


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_into_codes_is_refused_and_changes_nothing(merge: str) -> None:
    encoded, _ = pair()
    _, _, adapted = trained(encoded)
    adapted.eval()
    with torch.no_grad():
        before = adapted(input_ids=IDS).logits
        with pytest.raises(MergeStateError, match=r"embed_tokens keeps its weight as q8_0 blocks.*from_pretrained"):
            getattr(adapted, merge)()
        assert torch.equal(adapted(input_ids=IDS).logits, before)
        assert adapted.unload() is encoded


def test_a_lora_beside_the_codes_can_be_merged() -> None:
    plain: Any = tiny_model("qwen2_moe", **SIZES)
    encode_dense(plain, {"lm_head": (Q8_0, 96, 64)})
    load_blocks(plain, "lm_head", blocks_of(torch.randn(96, 64), Q8_0))
    _, _, adapted = trained(plain, target_modules=["q_proj"])
    merged = adapted.eval().merge_and_unload()
    assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", [Q8_0, Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fast_is_within_its_tolerance(
    fast_kernels: Any, kind: BlockType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded, plain = pair(dtype, kind, fast=True)
    with torch.no_grad():
        layer, weight = encoded.model.layers[1].self_attn.q_proj, plain.model.layers[1].self_attn.q_proj
        monkeypatch.setattr(dense, "_PART_VALUES", 20 * 64)
        for tokens in (1, 7, 60):  # of the last, so many that the weight is dequantised part by part
            x = torch.randn(2, tokens, 64).to(dtype)
            found, expected = layer(x), weight(x)
            assert found.dtype == dtype
            assert tokens == 60 or not torch.equal(found, expected), "the codes were not computed on"
            assert relative(found.float(), expected.float()) <= 1e-2
        found, expected = encoded(input_ids=IDS).logits, plain(input_ids=IDS).logits
        assert relative(found.float(), expected.float()) <= 2e-2
        assert layer(torch.empty(0, 64, dtype=dtype)).shape == (0, 64)
    # Where a gradient may be asked for, to the bit.
    assert torch.equal(encoded(input_ids=IDS).logits, plain(input_ids=IDS).logits)
    with torch.no_grad():
        assert torch.equal(encoded.train()(input_ids=IDS).logits, plain.train()(input_ids=IDS).logits)


def test_rows_may_end_within_a_block(fast_kernels: Any) -> None:
    plain = nn.Linear(40, 8).eval()
    encoded = EncodedLinear(plain, Q8_0)
    assert encoded.weight.shape == (8, 2 * 34)
    load_blocks(nn.Sequential(encoded), "0", blocks_NB := blocks_of(plain.weight, Q8_0))
    x = torch.randn(3, 40)
    expected = F.linear(x, dequantise(blocks_NB, Q8_0, 40), plain.bias)
    with torch.no_grad():
        assert torch.equal(encoded(x), expected)
        encoded.fast = True
        assert relative(encoded(x), expected) <= 1e-2


class Reads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cast, self.plain, self.shared = nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        self.other = nn.ModuleList([nn.Bilinear(2, 2, 2), nn.Embedding(4, 32, max_norm=1.0), nn.Linear(32, 32)])
        self.other[2].weight = self.shared.weight
        self.deep = nn.ModuleDict({"inner": nn.ModuleDict({"late": nn.Linear(32, 32), "plain": nn.Linear(32, 32)})})

    def forward(self, x: Tensor) -> Tensor:
        x = self.cast(x.to(self.cast.weight.dtype)) + self.deep["inner"].late.weight.sum()
        return self.plain(x.to(self.plain.weight.device))


def test_modules_whose_weight_is_read_elsewhere_stay() -> None:
    model = Reads()
    assert set(dense_modules(model)) == {"plain", "shared", "other.2", "deep.inner.plain"}
    assert set(dense_modules(model, ["other"])) == {"plain", "deep.inner.plain"}, "shared with one that is left"
    mamba: Any = tiny_model("jamba")
    names = {name.rpartition(".")[2] for name in dense_modules(mamba)}
    assert "dt_proj" not in names and "x_proj" in names


@pytest.mark.parametrize(
    ("which", "words"),
    [
        ({"nowhere.q_proj": (Q8_0, 64, 64)}, "no such module"),
        ({"model.norm": (Q8_0, 64, 64)}, "model.norm is a Qwen2MoeRMSNorm"),
        ({"lm_head": (Q8_0, 96, 32)}, "lm_head.weight is 96 x 32 in the file, and 96 x 64 in the model"),
        ({"lm_head": (Q8_0, 96, 64), "model.embed_tokens": (Q4_0, 96, 64)}, "share one weight"),
    ],
)
def test_what_cannot_be_encoded_is_refused_and_the_model_stays(which: dict[str, Any], words: str) -> None:
    model: Any = tiny_model("qwen2_moe", tie_word_embeddings=True, **SIZES)
    before = dict(model.named_modules())
    with pytest.raises(UncacheableError, match=words):
        encode_dense(model, {"model.layers.0.self_attn.q_proj": (Q8_0, 64, 64)} | which)
    assert dict(model.named_modules()) == before


def test_encoding_can_be_taken_back() -> None:
    model: Any = tiny_model("qwen2_moe", **SIZES)
    before = dict(model.named_modules())
    patches = encode_dense(model, {"lm_head": (Q8_0, 96, 64)})
    assert isinstance(model.lm_head, EncodedLinear)
    patches.undo()
    assert dict(model.named_modules()) == before


@pytest.mark.parametrize(
    "blocks", [torch.zeros(96, 67, dtype=torch.uint8), torch.zeros(95, 68, dtype=torch.uint8), torch.zeros(96, 68)]
)
def test_blocks_that_do_not_fit_are_refused(blocks: Tensor) -> None:
    model: Any = tiny_model("qwen2_moe", **SIZES)
    encode_dense(model, {"lm_head": (Q8_0, 96, 64)})
    with pytest.raises(UncacheableError, match=r"lm_head: .* are no q8_0 blocks"):
        load_blocks(model, "lm_head", blocks)
    with pytest.raises(UncacheableError, match=r"'model\.norm' is no encoded module"):
        load_blocks(model, "model.norm", blocks)
    assert model.lm_head.weight.is_meta


def test_bytes_of_a_skeleton_are_those_of_the_codes() -> None:
    model: Any = tiny_model("qwen2_moe", device="meta", **SIZES)
    floats = sum(tensor.nbytes for tensor in model.parameters())
    shapes = dense_modules(model, left(model))
    encode_dense(model, {name: (Q8_0, *shape) for name, shape in shapes.items()})
    saved = sum(rows * cols * 4 - rows * Q8_0.row_bytes(cols) for rows, cols in shapes.values())
    assert sum(tensor.nbytes for tensor in model.parameters()) == floats - saved
    assert all(tensor.is_meta for tensor in model.parameters())
