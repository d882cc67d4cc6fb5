"""The routers of a model are looked for once a load, and what is known of them stays right while they are wrapped."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from tiny_models import tiny_model

from remoe_adapt import RemoeConfig, get_remoe_model
from remoe_adapt.dial.load import load_base_under, profile_of
from remoe_adapt.routers import fingerprint
from remoe_adapt.routers.discover import fingerprint_of_weights, survey_routers
from remoe_adapt.tuner.layer import remoe_layers

SHIPPED = Path(__file__).parents[2] / "examples" / "tiny_moe"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often routers are looked for and hashed, by whichever module."""
    counted: Counter[str] = Counter()

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any) -> Any:
            counted[real.__name__] += 1
            return real(*args)

        return count

    for real in (survey_routers, fingerprint_of_weights):
        wrapped = counting(real)
        for name, module in list(sys.modules.items()):
            if name.startswith("remoe_adapt") and vars(module).get(real.__name__) is real:
                monkeypatch.setattr(module, real.__name__, wrapped)
    return counted


@pytest.mark.parametrize("family", [SHIPPED / "family" / "trained", None], ids=["family", "training-free"])
@pytest.mark.parametrize("expert_cache", [0.5, None], ids=["cached", "whole"])
def test_a_load_looks_for_routers_once(calls: Counter[str], family: Path | None, expert_cache: float | None) -> None:
    model = get_remoe_model(SHIPPED, family=family, recency="resident", expert_cache=expert_cache, monitor=False)
    try:
        assert calls == {"survey_routers": 1, "fingerprint_of_weights": 1}
        assert remoe_layers(model)
    finally:
        model.controller.close()


def test_a_model_that_is_there_already_is_looked_at_once(calls: Counter[str]) -> None:
    base = load_base_under(profile_of("server"), SHIPPED)
    calls.clear()
    model = get_remoe_model(base, family=SHIPPED / "family" / "trained", recency="resident", monitor=False)
    assert calls == {"survey_routers": 1, "fingerprint_of_weights": 1}
    model.controller.close()


def test_a_survey_knows_the_original_weights_whatever_happens_to_the_routers() -> None:
    model = tiny_model("qwen3_moe")
    routers = survey_routers(model)
    before = {name: weight_ED.clone() for name, weight_ED in routers.original_weights.items()}
    peft_model = get_peft_model(model, RemoeConfig(init_weights=False))
    peft_model.merge_adapter()
    assert not any(torch.equal(routers.weights[name], before[name]) for name in before)
    for survey in (routers, survey_routers(model), survey_routers(peft_model)):
        assert survey.original_weights.keys() == before.keys()
        assert all(torch.equal(survey.original_weights[name], before[name]) for name in before)
        assert survey.fingerprint == fingerprint(model)
    assert [ref.outermost for ref in routers.refs] == list(remoe_layers(model).values())
