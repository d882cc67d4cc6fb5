"""Resident routers: in place, exact at every strength, under compile, inference mode, casts and moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from tiny_families import tiny_family
from tiny_models import LAYERS, tiny_model
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from transformers import PreTrainedModel

from remoe_adapt.dial.swap import ResidentRouters
from remoe_adapt.errors import DialError, FamilyError, MergeStateError, RouterNotFoundError
from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.routers.discover import fingerprint
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers
from remoe_adapt.tuner.peft_compat import wrap_or_inject

STRENGTHS = (0.0, 0.1, 0.25, 0.4, 0.5, 0.6, 0.75, 0.9, 1.0, 0.3)


def make(seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    model: Any = tiny_model("qwen2_moe", seed=seed)
    model.to(dtype)
    assert isinstance(model, PreTrainedModel)
    return model


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return Family.load(tiny_family(make(), tmp_path_factory.mktemp("swap") / "family").path)


def wrapped(model: PreTrainedModel) -> PeftModel:
    return wrap_or_inject(model, RemoeConfig(rank=1, inference_mode=True), "dial")


def bits(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().contiguous().view(torch.uint8) for tensor in tensors]


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(bits(left), bits(right), strict=True))


def test_every_strength_is_the_family_s_live_weight_at_an_address_that_never_moves(family: Family) -> None:
    model = make()
    with torch.no_grad():  # a bit that arithmetic would lose
        next(iter(original_weights(model).values()))[0, 0] = -0.0
    base = {name: weight.detach().clone() for name, weight in original_weights(model).items()}
    parameters = list(original_weights(model).values())
    routers = ResidentRouters(wrapped(model), family)
    addresses = [weight.data_ptr() for weight in routers.weights]
    assert len(addresses) == LAYERS and all(a is b for a, b in zip(routers.weights, parameters, strict=True))
    for strength in (*STRENGTHS, 0.0):
        routers.commit(routers.stage(strength))
        assert routers.strength == strength
        assert same_bits(routers.weights, list(family.live(strength, base).values()))
    assert same_bits(routers.weights, list(base.values())), "strength 0 is the base bit for bit, -0.0 included"
    routers.commit(routers.stage(1.0))
    assert not same_bits(routers.weights, list(base.values()))
    routers.release()
    assert [weight.data_ptr() for weight in original_weights(model).values()] == addresses
    assert same_bits(list(original_weights(model).values()), list(base.values()))


def test_staging_changes_nothing_until_the_commit(family: Family) -> None:
    model = make()
    routers = ResidentRouters(wrapped(model), family)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        before = model(ids).logits
        staged = routers.stage(0.7)
        assert torch.equal(model(ids).logits, before) and routers.strength == 0.0
        routers.commit(staged)
        changed = model(ids).logits
    assert not torch.equal(changed, before)
    expected = wrapped(make())
    for name, layer in remoe_layers(expected).items():
        layer.set_base_weight(family.live(0.7, original_weights(expected))[name])
    with torch.no_grad():
        assert torch.equal(expected(ids).logits, changed)


def test_ten_strengths_are_one_graph_under_fullgraph(family: Family) -> None:
    torch._dynamo.reset()
    model = make(dtype=torch.float32)
    model.set_experts_implementation("batched_mm")  # the default loops over experts, which no graph holds
    peft_model = wrapped(model)
    routers = ResidentRouters(peft_model, family)
    counter = CompileCounter()
    compiled = torch.compile(peft_model, backend=counter, fullgraph=True)
    ids = torch.arange(6)[None]
    seen = []
    with torch.no_grad():
        for strength in STRENGTHS:
            routers.commit(routers.stage(strength))
            logits = compiled(input_ids=ids, use_cache=False).logits
            assert torch.equal(logits, peft_model(input_ids=ids, use_cache=False).logits)
            seen.append(logits)
    assert counter.frame_count == 1
    assert len({tuple(logits.flatten().tolist()) for logits in seen}) == len(STRENGTHS)
    torch._dynamo.reset()


@pytest.mark.parametrize("where", ["weights", "calls", "both", "init"])
def test_inference_mode_anywhere(family: Family, where: str) -> None:
    with torch.inference_mode(where in ("weights", "both")):
        model = make()
    assert next(model.parameters()).is_inference() == (where in ("weights", "both"))
    with torch.inference_mode(where in ("init", "both")):
        routers = ResidentRouters(wrapped(model), family)
    base = bits(routers.weights)
    with torch.inference_mode(where in ("calls", "both")):
        routers.commit(routers.stage(0.3))
        staged = routers.stage(0.6)
    routers.commit(staged)
    with torch.inference_mode():
        assert same_bits(routers.weights, list(routers.stage(0.6).values))
    routers.commit(routers.stage(0.0))
    assert all(torch.equal(a, b) for a, b in zip(bits(routers.weights), base, strict=True))
    routers.release()


def test_a_cast_or_a_move_after_staging_is_followed(family: Family) -> None:
    model = make(dtype=torch.float32)
    base = {name: weight.detach().clone() for name, weight in original_weights(model).items()}
    peft_model = wrapped(model)
    routers = ResidentRouters(peft_model, family)
    routers.commit(routers.stage(1.0))
    staged = routers.stage(0.5)
    peft_model.to(torch.bfloat16)
    routers.commit(staged)
    half = {name: weight.to(torch.bfloat16) for name, weight in base.items()}
    assert same_bits(routers.weights, list(family.live(0.5, half).values()))
    routers.commit(routers.stage(0.0))
    assert same_bits(routers.weights, list(half.values()))


def test_disabling_gives_the_base_and_leaves_the_strength(family: Family) -> None:
    model = make()
    ids = torch.arange(6)[None]
    with torch.no_grad():
        base_logits = model(ids).logits
        peft_model = wrapped(model)
        routers = ResidentRouters(peft_model, family)
        routers.commit(routers.stage(1.0))
        strong = peft_model(input_ids=ids).logits
        with peft_model.disable_adapter():
            assert torch.equal(peft_model(input_ids=ids).logits, base_logits)
        assert torch.equal(peft_model(input_ids=ids).logits, strong) and not torch.equal(strong, base_logits)


def test_the_fingerprint_is_the_base_s_at_every_strength(family: Family) -> None:
    model = make()
    routers = ResidentRouters(wrapped(model), family)
    routers.commit(routers.stage(1.0))
    assert fingerprint(model) == family.fingerprint
    routers.release(keep_live=True)
    assert fingerprint(model) != family.fingerprint


def test_peft_s_own_ways_to_change_weights_are_refused_meanwhile(family: Family) -> None:
    peft_model = wrapped(make())
    peft_model.add_adapter("other", RemoeConfig(init_weights=False))
    routers = ResidentRouters(peft_model, family)
    routers.commit(routers.stage(0.5))
    before = bits(routers.weights)
    for attempt in (
        peft_model.merge_adapter,
        peft_model.unmerge_adapter,
        lambda: peft_model.set_adapter("other"),
        lambda: ResidentRouters(peft_model, family),
        lambda: peft_model(input_ids=torch.arange(4)[None], adapter_names=["other"]),
    ):
        with pytest.raises(MergeStateError, match="dial"):
            attempt()
    assert all(torch.equal(a, b) for a, b in zip(bits(routers.weights), before, strict=True))
    routers.release()
    peft_model.set_adapter("other")
    peft_model.merge_adapter()
    with pytest.raises(MergeStateError, match="merged"):
        ResidentRouters(peft_model, family)
    with pytest.raises(DialError, match="let go"):
        routers.stage(0.5)


def test_a_failed_start_leaves_the_model_as_it_was(family: Family, tmp_path: Path) -> None:
    with pytest.raises(RouterNotFoundError, match="get_remoe_model"):
        ResidentRouters(make(), family)
    small: Any = tiny_model("qwen2_moe", num_hidden_layers=2)
    peft_model = wrapped(small)
    before = bits(list(original_weights(peft_model).values()))
    with pytest.raises(FamilyError, match="no base weight"):
        ResidentRouters(peft_model, family)
    assert not any(layer.resident for layer in remoe_layers(peft_model).values())
    assert all(
        torch.equal(a, b) for a, b in zip(bits(list(original_weights(peft_model).values())), before, strict=True)
    )
