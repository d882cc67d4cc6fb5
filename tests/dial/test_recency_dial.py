"""The recency prior as part of operating points: families, profiles, the caller's own, and training-free dials."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kv import kv, returned_cache
from recency_support import LONGER, PROMPT, chosen, decode, routing_matters
from tiny_families import tiny_family

from remoe_adapt import load_profile
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation.arms import arms_of
from remoe_adapt.evaluation.evaluate import evaluate
from remoe_adapt.expert_cache import expert_cache_of, load_with_expert_cache
from remoe_adapt.family.family import Family
from remoe_adapt.gating.router_forward import RouterForward
from remoe_adapt.recency.install import recency_prior
from remoe_adapt.recency.sequences import _STATE
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers.discover import discover_routers

GAINS = (0.1, 0.2, 0.3, 0.4)


@pytest.fixture
def family(tmp_path: Path) -> Family:
    """Points 0.25 and 0.5 without a prior, 1.0 with one."""
    return with_recency(tiny_family(routing_matters(), tmp_path / "family"), Recency("ema", GAINS, 0.6))


def with_recency(family: Family, recency: Recency | None) -> Family:
    points = (*family.points[:-1], replace(family.points[-1], recency=recency))
    return Family(family.path, family.base_id, family.fingerprint, points)


def gains_of(model: Any) -> list[float]:
    """Live gains, read off the routers' own gates."""
    forwards: list[Any] = [vars(ref.module)["forward"] for ref in discover_routers(model.get_base_model())]
    return [round(float(forward.steps.gains[forward.layer]), 6) for forward in forwards]


def test_the_gains_of_a_family_turn_with_its_strength(family: Family) -> None:
    model = get_remoe_model(routing_matters(), family=family)
    expected = {0.0: [0.0] * 4, 0.5: [0.0] * 4, 0.75: [gain / 2 for gain in GAINS], 1.0: list(GAINS)}
    for strength, gains in expected.items():
        model.controller.set_strength(strength)
        assert gains_of(model) == pytest.approx(gains)
    assert model.controller.status()["recency"] == {
        "mode": "ema", "decay": 0.6, "routers": 4, "gain": pytest.approx(0.25),
    }  # fmt: skip
    at_full = chosen(model, LONGER)
    model.controller.close()
    assert not any(isinstance(vars(ref.module).get("forward"), RouterForward) for ref in discover_routers(model))
    # The same by hand: the point's weights under a prior with its gains.
    plain = routing_matters()
    with arms_of(plain, with_recency(family, None)) as arms:
        arms.use(arms.points[-1])
        with recency_prior(plain, "ema", GAINS, 0.6):
            assert torch.equal(chosen(plain, LONGER), at_full)


def test_the_caller_s_prior_holds_at_every_strength(family: Family) -> None:
    model = get_remoe_model(routing_matters(), family=family, recency_gain=0.2)
    model.controller.set_strength(1.0)
    assert gains_of(model) == pytest.approx([gain + 0.2 for gain in GAINS])
    model.controller.set_strength(0.0)
    assert gains_of(model) == pytest.approx([0.2] * 4)
    text = decode(model)
    model.controller.close()
    plain = routing_matters()
    assert not torch.equal(decode(plain), text)
    with recency_prior(plain, "ema", 0.2, 0.6):
        assert torch.equal(decode(plain), text)


def test_without_a_family_the_dial_is_training_free(caplog: pytest.LogCaptureFixture) -> None:
    base = routing_matters()
    before = chosen(base, LONGER)
    model = get_remoe_model(base)
    assert "training-free" in caplog.text and "remoe train" in caplog.text
    assert gains_of(model) == [0.0] * 4 and torch.equal(chosen(model, LONGER), before)
    model.controller.set_pressure(1.0)
    assert gains_of(model) == pytest.approx([0.6 / 2] * 4) and not torch.equal(chosen(model, LONGER), before)
    assert model.controller.status()["family"] == "training-free"
    assert model.controller.status()["recency"]["mode"] == "cost"
    model.controller.close()
    assert torch.equal(chosen(base, LONGER), before)


def test_an_own_prior_without_a_family() -> None:
    model = get_remoe_model(routing_matters(), recency="last", recency_gain=0.4)
    assert gains_of(model) == pytest.approx([0.4] * 4)
    found = chosen(model, LONGER)
    with recency_prior(plain := routing_matters(), "last", 0.4):
        assert torch.equal(found, chosen(plain, LONGER))


def test_a_share_comes_from_the_caller_the_points_or_the_profile(family: Family) -> None:
    model = get_remoe_model(routing_matters(), recency="cost", recency_gain=0.1, recency_share=0.5)
    assert model.controller.status()["recency"] == {
        "mode": "cost", "decay": 0.95, "share": 0.5, "routers": 4, "gain": pytest.approx(0.1),
    }  # fmt: skip
    of_points = with_recency(family, Recency("cost", GAINS, 0.95, 0.5))
    model = get_remoe_model(routing_matters(), family=of_points)
    assert model.controller.status()["recency"]["share"] == 0.5
    profile = replace(load_profile("orin-8gb"), recency=Recency.of("cost", 0.2, share=0.75))
    for options in ({}, {"recency_gain": 0.1}):
        model = get_remoe_model(routing_matters(), profile, with_recency(family, None), **options)
        assert model.controller.status()["recency"]["share"] == 0.75


def test_a_decay_alone_asks_for_a_prior() -> None:
    model = get_remoe_model(routing_matters(), recency_decay=0.5)
    assert model.controller.status()["recency"] == {
        "mode": "ema", "decay": 0.5, "routers": 4, "gain": pytest.approx(0.2),
    }  # fmt: skip


def test_a_profile_has_a_gain_at_full_strength(family: Family) -> None:
    profile = replace(load_profile("orin-8gb"), recency=Recency.of("ema", 0.5))
    model = get_remoe_model(routing_matters(), profile, with_recency(family, None))
    model.controller.set_strength(0.5)
    assert gains_of(model) == pytest.approx([0.25] * 4)


def test_swaps_of_gains_reach_a_running_generate(family: Family) -> None:
    model = get_remoe_model(routing_matters(), family=family)
    text: Any = []
    seen: list[float] = []

    class Turn:
        """Called by generate after each token."""

        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            text.append(ids)
            seen.append(gains_of(model)[3])
            model.controller.set_strength(1.0 if len(text) == 4 else model.controller.strength)
            return scores

    model.generate(PROMPT, max_new_tokens=8, do_sample=False, logits_processor=[Turn()])
    assert seen == pytest.approx([0.0] * 4 + [0.4] * 4)


def test_what_contradicts_is_refused_and_leaves_the_model_alone(family: Family) -> None:
    base = routing_matters()
    for options, what in (
        ({"recency": "last"}, "mode 'last'.*have 'ema'"),
        ({"recency_decay": 0.9}, "decay 0.9.*have 0.6"),
        ({"recency_share": 0.5}, r"share 0\.5.*have 0\.0"),
        ({"recency": "often"}, "often"),
        ({"recency": ""}, "recency '' is not one of"),
        ({"recency_gain": -0.1}, "gain -0.1"),
    ):
        with pytest.raises(ConfigError, match=what):
            get_remoe_model(base, family=family, **options)
        assert not hasattr(base, "controller") and not hasattr(base, "peft_config")
    short = with_recency(family, Recency("ema", (0.1, 0.2), 0.6))
    with pytest.raises(ConfigError, match=r"2 recency gains.*4 routers"):
        get_remoe_model(base, family=short)
    assert "forward" not in vars(discover_routers(base)[0].module)


def test_evaluation_measures_points_and_priors(family: Family) -> None:
    base = routing_matters()
    torch.manual_seed(0)
    documents = torch.randint(1, 96, (3, 70)).tolist()
    found = evaluate(base, documents, family=family, priors=[Recency("ema", gain, 0.6) for gain in (0.0, 0.8)])
    assert [row.get("recency_gain") for row in found["points"]] == [None, None, pytest.approx(0.25)]
    still, strong = found["priors"]
    assert (strong["recency"], strong["recency_gain"], strong["strength"]) == ("ema", 0.8, 0.0)
    assert still["eor"] == found["base"]["eor"] and still["ppl_ratio"] == pytest.approx(1.0, abs=1e-5)
    assert strong["eor"] > found["base"]["eor"] + 0.2 and strong["kl"] > 0
    with pytest.raises(ConfigError, match="of one kind"):
        evaluate(base, documents, family=family, priors=[Recency.of("last", 0.1)])
    assert "forward" not in vars(discover_routers(base)[0].module)


def test_a_family_beside_routers_without_the_prior(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base = routing_matters("phimoe")
    model = get_remoe_model(base, family=tiny_family(base, tmp_path / "family"), recency="ema")
    assert "keep their own forward" in caplog.text
    before = chosen(model, LONGER)
    model.controller.set_strength(1.0)
    assert not torch.equal(chosen(model, LONGER), before)
    assert model.controller.status()["recency"]["routers"] == 0


@pytest.mark.parametrize("between", ["nothing", "crop", "copy", "several tokens"])
def test_a_prior_that_was_at_rest_knows_what_was_used(between: str) -> None:
    """At gain 0 nobody asks for the recency, so it is moved late; who looks at every token moves it at once."""
    found = []
    for looks in (False, True):
        model = routing_matters()
        with recency_prior(model, "ema", 0.0) as prior, torch.inference_mode():
            output = model(PROMPT[:, :2], use_cache=True)
            cache = returned_cache(output)
            for place in range(2, 8):
                if between == "crop" and place == 6:
                    cache.crop(-2)
                elif between == "copy" and place == 6:
                    cache = deepcopy(cache)
                elif between == "several tokens" and place == 6:
                    model(LONGER[:, :3], **kv(cache))
                model(LONGER[:, place : place + 1], **kv(cache))
                state = getattr(cache, _STATE)
                if looks:
                    assert all(recency_BE.any() for recency_BE in state.recency)
            prior.set_gains(0.5)
            logits = [model(LONGER[:, place : place + 1], **kv(cache)).logits for place in range(8, 11)]
            found.append((torch.cat(logits), torch.stack(state.recency).clone()))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_an_expert_cache_forgets_as_the_prior_cost_does_while_it_is_on(tmp_path: Path) -> None:
    """Its decay, for what the prior prefers is what a cache of that decay holds; a decay that was given stays."""
    routing_matters().save_pretrained(tmp_path)
    for mode, given, expected in (("cost", None, 0.95), ("ema", None, 0.9), ("cost", 0.8, 0.8)):
        model = get_remoe_model(tmp_path, recency=mode, expert_cache=0.5, policy="lrfu", decay=given, monitor=False)
        cache = expert_cache_of(model)
        assert cache is not None
        assert {policy.decay for policy in cache._shares.policies} == {expected}
        model.controller.release(keep_live=False)
        assert {policy.decay for policy in cache._shares.policies} == {given or 0.9}


def test_an_expert_cache_forgets_as_each_arm_of_an_evaluation_prefers(tmp_path: Path) -> None:
    """The base's own decay while the base runs, the prior's under a prior of mode cost, and as before afterwards."""
    routing_matters().save_pretrained(tmp_path)
    model = load_with_expert_cache(tmp_path, 0.5, policy="lrfu")
    cache = expert_cache_of(model)
    assert cache is not None

    def decays() -> set[float]:
        return {policy.decay for policy in cache._shares.policies}

    with arms_of(model, None, priors=[Recency.of("cost", 0.1)]) as arms:
        for arm, expected in ((arms.priors[0], 0.95), (arms.base, 0.9), (arms.priors[0], 0.95)):
            arms.use(arm)
            assert decays() == {expected}
    assert decays() == {0.9}
