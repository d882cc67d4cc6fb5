"""What others do with a model under a dial: adapters off, merging, saving, release; swaps that reach nothing."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_families import tiny_family
from tiny_models import tiny_model
from torch import Tensor, nn
from torch.nn.utils import parametrize
from watched_decoding import IDS

import remoe_adapt
from remoe_adapt import get_remoe_model, recency_prior, release
from remoe_adapt.errors import AdapterConflictError, DialError, MergeStateError
from remoe_adapt.family.family import Family
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import remoe_layers

LONG = torch.arange(3, 33)[None]


def make(folder: str = "qwen2_moe") -> Any:
    return tiny_model(folder, initializer_range=0.3)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """A family whose points turn the output of `make()`."""
    return Family.load(tiny_family(make(), tmp_path_factory.mktemp("guards") / "family").path)


@pytest.fixture(params=["prior", "deltas", "both"])
def model(request: pytest.FixtureRequest, wide: Family) -> Any:
    """At strength 1 of a prior alone, of deltas alone, of both."""
    options: dict[str, Any] = {"prior": {}, "deltas": {"family": wide}, "both": {"family": wide, "recency_gain": 0.4}}
    model = get_remoe_model(make(), monitor=False, **options[request.param])
    model.controller.set_strength(1.0)
    return model


def logits_of(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=LONG).logits
    return logits


def decoded(model: Any) -> list[int]:
    tokens: list[int] = model.generate(
        input_ids=IDS, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None
    )[0].tolist()
    return tokens


# Adapters disabled


def test_with_adapters_disabled_the_model_is_the_base_bit_for_bit(model: Any) -> None:
    base, strong = logits_of(make()), logits_of(model)
    assert not torch.equal(strong, base)
    with model.disable_adapter():
        assert torch.equal(logits_of(model), base)
        assert decoded(model) == decoded(make())
        with model.disable_adapter():
            assert torch.equal(logits_of(model), base)
        assert torch.equal(logits_of(model), base), "the inner block ends nothing of the outer one"
        assert "adapters are disabled" in model.controller.status()["reason"]
        model.controller.set_strength(0.5)
        assert torch.equal(logits_of(model), base), "the dial may be turned meanwhile"
        model.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), strong)
    with pytest.raises(RuntimeError, match="of a user"), model.disable_adapter():
        raise RuntimeError("of a user")
    assert torch.equal(logits_of(model), strong) and "disabled" not in model.controller.status()["reason"]


def test_every_way_to_switch_adapters_off_takes_the_prior_too(model: Any) -> None:
    base, strong = logits_of(make()), logits_of(model)
    for off, on in (
        (model.base_model.disable_adapter_layers, model.base_model.enable_adapter_layers),
        (
            lambda: [layer.enable_adapters(False) for layer in remoe_layers(model).values()],
            lambda: [layer.enable_adapters(True) for layer in remoe_layers(model).values()],
        ),
    ):
        off()
        off()
        assert torch.equal(logits_of(model), base)
        on()
        assert torch.equal(logits_of(model), strong)


def test_the_dial_s_adapter_is_not_deleted_from_under_it(model: Any) -> None:
    model.add_weighted_adapter(["dial"], [1.0], "other")
    before = logits_of(model)
    for owner in (model, model.base_model):
        with pytest.raises(MergeStateError, match="deleting adapter 'dial'"):
            owner.delete_adapter("dial")
    assert torch.equal(logits_of(model), before)
    model.delete_adapter("other")
    assert torch.equal(logits_of(model), before)


def test_a_dial_that_is_closed_while_adapters_are_disabled_leaves_the_base(model: Any) -> None:
    with model.disable_adapter():
        model.controller.close()
    assert torch.equal(logits_of(model), logits_of(make()))
    assert torch.equal(logits_of(release(model)), logits_of(make()))


# Merging and saving


def test_what_is_merged_is_what_ran_or_nothing(model: Any, tmp_path: Path) -> None:
    base, strong, has_prior = logits_of(make()), logits_of(model), model.controller.status()["recency"] is not None
    with pytest.raises(DialError, match="nothing is saved") as refused:
        model.save_pretrained(tmp_path)
    assert not any(tmp_path.iterdir())
    advises_merging = "merge_and_unload()" in str(refused.value)
    assert advises_merging != has_prior, "the advice is what works"
    if has_prior:
        with pytest.raises(MergeStateError, match=r"recency prior \((ema|cost), mean gain 0\..\).*model\.unload\(\)"):
            model.merge_and_unload()
        assert torch.equal(logits_of(model), strong) and model.controller.strength == 1.0
        merged = model.unload()
        assert torch.equal(logits_of(merged), base)
    else:
        merged = model.merge_and_unload()
        assert torch.equal(logits_of(merged), strong)
    before = logits_of(merged)
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits_of(type(merged).from_pretrained(tmp_path)), before)


def test_a_prior_that_does_not_act_is_no_loss() -> None:
    model = get_remoe_model(make(), monitor=False)
    assert torch.equal(logits_of(model.merge_and_unload()), logits_of(make())), "strength 0 has no gain"


def test_the_prior_can_be_had_without_the_dial_as_the_refusal_says() -> None:
    model: Any = get_remoe_model(make(), monitor=False)
    model.controller.set_strength(1.0)
    strong, plan = logits_of(model), model.controller.status()["recency"]
    base = model.unload()
    with recency_prior(base, plan["mode"], plan["gain"], plan["decay"]):
        torch.testing.assert_close(logits_of(base), strong)


# State dicts


def test_a_state_dict_is_the_base_s_at_every_strength(model: Any, wide: Family) -> None:
    inner = model.get_base_model()
    at_full, router = model.state_dict(), next(iter(remoe_layers(model).values()))
    model.controller.set_strength(0.0)
    at_rest = model.state_dict()
    assert at_full.keys() == at_rest.keys()
    assert all(torch.equal(at_full[key], at_rest[key]) for key in at_full)
    model.controller.set_strength(1.0)
    for part in (inner, router):
        taken = part.state_dict()
        key = next(key for key in taken if key.endswith("base_layer.weight"))
        assert torch.equal(taken[key], at_rest[next(full for full in at_rest if full.endswith(key))])
    other: Any = get_remoe_model(make(), family=wide, monitor=False)
    other.load_state_dict(at_full)
    assert other.controller.strength == 0.0 and torch.equal(logits_of(other), logits_of(make()))


@pytest.mark.parametrize("assign", [False, True])
def test_loading_the_base_s_state_dict_leaves_the_strength(model: Any, assign: bool) -> None:
    strong, stored = logits_of(model), copy.deepcopy(model.state_dict())
    addresses = [layer.base_weight_ED.data_ptr() for layer in remoe_layers(model).values()]
    model.load_state_dict(stored, assign=assign)
    assert torch.equal(logits_of(model), strong)
    model.controller.set_strength(0.5)
    model.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), strong)
    assert [layer.base_weight_ED.data_ptr() for layer in remoe_layers(model).values()] == addresses
    assert torch.equal(logits_of(release(model)), logits_of(make()))


@pytest.mark.parametrize("inner", [False, True])
def test_another_base_s_state_dict_is_refused_before_anything_is_loaded(model: Any, inner: bool) -> None:
    strong, target = logits_of(model), model.get_base_model() if inner else model
    other = {key: value + 1 if value.is_floating_point() else value for key, value in target.state_dict().items()}
    with pytest.raises(DialError, match="other weights than the base"):
        target.load_state_dict(other)
    assert torch.equal(logits_of(model), strong)
    router = next(iter(remoe_layers(model).values()))
    with pytest.raises(DialError, match=r"remoe_adapt\.release"):
        router.load_state_dict({key: value + 1 for key, value in router.state_dict().items()})
    assert torch.equal(logits_of(model), strong)


# The way back


def test_a_notebook_that_lost_its_model_gets_its_base_back(wide: Family) -> None:
    base = make()
    attributes, trained = set(vars(base)), [p.requires_grad for p in base.parameters()]
    names, weights = [name for name, _ in base.named_modules()], copy.deepcopy(base.state_dict())
    for closed in (False, True):
        model: Any = get_remoe_model(base, family=wide, recency_gain=0.3)
        model.controller.set_strength(1.0)
        if closed:
            model.controller.close()
        del model
        with pytest.raises((DialError, AdapterConflictError), match=r"remoe_adapt\.release\(model\)"):
            get_remoe_model(base, family=wide)
        assert release(base) is base is release(base)
        assert set(vars(base)) == attributes and [p.requires_grad for p in base.parameters()] == trained
        assert [name for name, _ in base.named_modules()] == names
        found = base.state_dict()
        assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)
        assert torch.equal(logits_of(base), logits_of(make())) and decoded(base) == decoded(make())
        assert not any("remoe" in type(module).__module__ for module in base.modules())
        assert not any("forward" in vars(module) for module in base.modules())
    assert "release" in remoe_adapt.__all__


def test_a_generate_of_the_user_s_own_is_there_again_after_release(wide: Family) -> None:
    base = make()
    own = base.generate = lambda *args, **kwargs: "mine"
    model = get_remoe_model(base, family=wide, monitor=False)
    assert model.base_model.model.generate() == "mine"
    assert release(base).generate is own


def test_releasing_takes_no_adapter_of_anybody_else(wide: Family) -> None:
    torch.manual_seed(3)
    styled: Any = get_peft_model(make(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False), "style")
    alone, trained = logits_of(styled), {name for name, p in styled.named_parameters() if p.requires_grad}
    model: Any = get_remoe_model(styled, family=wide, monitor=False)
    model.controller.set_strength(1.0)
    assert release(styled) is styled.get_base_model()
    assert torch.equal(logits_of(styled), alone) and set(styled.peft_config) == {"style"}
    assert {name for name, p in styled.named_parameters() if p.requires_grad} == trained
    own: Any = get_peft_model(make(), RemoeConfig(), "dial")
    assert release(own) is own.get_base_model() and len(remoe_layers(own)) == 4, "a user's REMOE adapter is no dial"
    with pytest.raises(AdapterConflictError, match=r"unload\(\) of the PeftModel"):
        get_remoe_model(own, family=wide)


def test_an_adapter_put_on_after_unload_is_not_the_dial_s(wide: Family) -> None:
    base = make()
    get_remoe_model(base, family=wide, monitor=False).unload()
    own: Any = get_peft_model(base, RemoeConfig(init_weights=False), "dial")
    tuned = logits_of(own)
    release(base)
    assert torch.equal(logits_of(own), tuned)


# Swaps reach what the forward reads


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def parametrized(router: Any) -> Callable[[], None]:
    parametrize.register_parametrization(router.base_layer, "weight", Doubled())
    return lambda: parametrize.remove_parametrizations(router.base_layer, "weight", leave_parametrized=False)


def hidden(router: Any) -> Callable[[], None]:
    weight = router.base_layer._parameters.pop("weight")
    router.base_layer.weight = weight * 1
    return lambda: (delattr(router.base_layer, "weight"), router.base_layer.register_parameter("weight", weight))[-1]


@pytest.mark.parametrize("spoil", [parametrized, hidden])
def test_a_swap_that_nothing_reads_is_refused_by_name(wide: Family, spoil: Callable[[Any], Callable[[], None]]) -> None:
    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    model.controller.set_strength(0.5)
    undo = spoil(remoe_layers(model)["model.layers.1.mlp.gate"])
    with pytest.raises(DialError, match=r"router model\.layers\.1\.mlp\.gate cannot be turned: its weight is"):
        model.controller.set_strength(1.0)
    assert model.controller.strength == 0.5 and "could not be staged" in model.controller.status()["reason"]
    with pytest.raises(DialError, match="cannot be given its base weight back"):
        release(model)
    undo()
    model.controller.set_strength(1.0)
    expected: Any = get_remoe_model(make(), family=wide, monitor=False)
    expected.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), logits_of(expected))
    assert torch.equal(logits_of(release(model)), logits_of(make()))


def test_a_model_that_accelerate_offloads_later_is_refused_by_name(wide: Family) -> None:
    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    model.controller.set_strength(0.5)
    half = logits_of(model)
    accelerate.cpu_offload(model.get_base_model(), execution_device=torch.device("cpu"))
    with pytest.raises(DialError, match="offloaded"):
        model.controller.set_strength(1.0)
    assert "offloaded" in model.controller.status()["reason"]
    accelerate.hooks.remove_hook_from_submodules(model.get_base_model())
    assert "moved or replaced" in model.controller.status()["reason"], "what was offloaded was the base's state dict"
    model.controller.set_strength(0.5)
    assert torch.equal(logits_of(model), half) and "replaced" not in model.controller.status()["reason"]
    assert torch.equal(logits_of(release(model)), logits_of(make()))


def test_a_router_that_was_taken_out_is_refused_by_name(wide: Family) -> None:
    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    layer = remoe_layers(model)["model.layers.2.mlp.gate"]
    model.get_base_model().set_submodule("model.layers.2.mlp.gate", copy.deepcopy(layer.base_layer))
    with pytest.raises(DialError, match=r"layers\.2\.mlp\.gate cannot be turned: another module is in its place"):
        model.controller.set_strength(1.0)


def test_a_weight_that_was_replaced_or_cast_is_written_again_at_the_same_strength(wide: Family) -> None:
    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    model.controller.set_strength(1.0)
    strong, layer = logits_of(model), remoe_layers(model)["model.layers.0.mlp.gate"]
    layer.base_layer.weight = nn.Parameter(torch.zeros_like(layer.base_layer.weight), requires_grad=False)
    model.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), strong)
    model.to(torch.bfloat16)
    model.controller.set_strength(1.0)
    other = make().to(torch.bfloat16)
    expected: Any = get_remoe_model(other, family=wide, monitor=False, force=True)
    expected.controller.set_strength(1.0)
    assert torch.equal(logits_of(model), logits_of(expected))


def test_a_model_that_stops_being_reached_while_a_target_waits_is_said_once(
    wide: Family, caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    with model.controller.step():
        model.controller.set_strength(1.0)
        assert model.controller.status()["waiting"]
        model.get_base_model().to("meta")
    model.controller.step()
    assert model.controller.strength == 0.0 and not model.controller.status()["waiting"]
    assert "strength 1 is not live: router" in caplog.text and "offloaded" in model.controller.status()["reason"]


def test_a_compiler_that_bakes_weights_in_is_named(wide: Family, caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as inductor

    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    with caplog.at_level(logging.WARNING, "remoe_adapt"), inductor.patch(freezing=True):
        model.controller.set_strength(1.0)
        model.controller.set_strength(0.5)
    assert caplog.text.count("no swap reaches it") == 1


# What a status and a log show


def test_a_status_and_a_log_are_rounded(wide: Family, tmp_path: Path) -> None:
    model: Any = get_remoe_model(make(), family=wide, monitor=False)
    model.controller.log_to(tmp_path / "log")
    model.controller.set_strength(1 / 3)
    for _ in range(3):
        model.controller.step()
        logits_of(model)
    model.controller.tick()
    status = model.controller.status()
    assert status["strength"] == 1 / 3, "what can be given back is exact"
    model.controller.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    shown = [status["tpot_ms"], status["swap_ms"], status["sensors"]["age_s"], lines[0]["after"], lines[0]["swap_ms"]]
    assert all(len(repr(value)) <= 12 for value in shown), shown
