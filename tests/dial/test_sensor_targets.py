"""Targets of the sensors: they wait for a boundary, and words and events say what is so meanwhile."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from monitor_support import GIB, Machine, live, tick_for, under
from peft import PeftModel
from tiny_models import tiny_model
from waiting import until
from watched_decoding import IDS, Watch, each, generate, run_all

from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.family.family import Family, original_weights
from remoe_adapt.tuner.layer import remoe_layers


@pytest.fixture
def model(family: Family) -> PeftModel:
    model = get_remoe_model(tiny_model("qwen2_moe"), "orin-8gb", family, monitor=False)
    model.generation_config.eos_token_id = None
    return model


def posted(model: PeftModel) -> tuple[Machine, float]:
    """The sensors ask for strength 1, and go on saying so; the test's clock."""
    machine = under(model)
    now_s = tick_for(model, 0.0, 5.0)
    machine.free_bytes = 0.1 * GIB
    return machine, tick_for(model, now_s, 5.0)


def forward(model: PeftModel) -> None:
    with torch.no_grad():
        model(input_ids=IDS)


def test_the_monitor_swaps_nothing_under_a_plain_forward(model: PeftModel, family: Family) -> None:
    machine, controller = under(model), model.controller
    watch = Watch(model, family, [0.0, 1.0])
    first = next(iter(remoe_layers(model).values()))

    def press(*_: Any) -> None:  # between two routers of the forward, in which the monitor's thread posts
        machine.free_bytes = 0.1 * GIB
        until(lambda: controller.target == 1.0 and controller.status()["waiting"])
        time.sleep(0.3)

    handle = first.register_forward_hook(press)
    controller.resume()
    forward(model)
    handle.remove()
    forward(model)
    assert watch.check() == {0.0}, "no boundary came by"
    status = controller.status()
    assert (status["waiting"], status["strength"], status["target"]) == (True, 0.0, 1.0)
    assert status["reason"].endswith("strength 0.00 is live, and the target waits for the next step")
    generate(model, 1)
    assert watch.forwards[-1][0] == 1.0 and len(watch.forwards) == 3, "the first step of generate has it"
    status = controller.status()
    assert not status["waiting"] and "waits" not in status["reason"] and watch.check() == {0.0, 1.0}
    controller.close()


def test_a_swap_made_late_tells_why_it_was_asked_for(model: PeftModel) -> None:
    posted(model)
    assert model.controller.status()["waiting"] and live(model) == 1.0
    swap = model.controller.swaps[-1]
    assert (swap.before, swap.after, swap.by, swap.pressure) == (0.0, 1.0, "sensors", 1.0)
    assert swap.reason.endswith("rises from 0.00 to 1.00")


def test_a_hand_overrules_what_waits_and_gives_it_back(model: PeftModel) -> None:
    controller: Any = model.controller
    machine, now_s = posted(model)
    controller.set_strength(0.0)
    status = controller.status()
    assert not status["waiting"] and status["target"] == 0.0 and status["reason"] == "strength 0 was set by hand"
    assert live(model) == 0.0 and not controller.swaps
    controller.set_pressure(None)
    status = controller.status()
    assert (
        status["strength"] == 1.0 and not status["waiting"] and "maps pressure 1.00 to strength 1" in status["reason"]
    )
    machine.free_bytes = 4 * GIB
    now_s = tick_for(model, now_s, 60.0)
    assert controller.target == 0.0 and controller.strength == 1.0
    machine.free_bytes = 0.1 * GIB
    tick_for(model, now_s, 5.0)
    status = controller.status()
    assert not status["waiting"] and status["target"] == 1.0 and len(controller.swaps) == 1, "withdrawn before a step"


def test_close_drops_what_waits(model: PeftModel) -> None:
    before = [weight.detach().clone() for weight in original_weights(model).values()]
    posted(model)
    controller = model.controller
    controller.close()
    status = controller.status()
    assert not status["waiting"] and status["target"] == status["strength"] == 0.0 and status["reason"] == "closed"
    generate(model, 2)
    assert not controller.swaps
    for weight, kept in zip(original_weights(model).values(), before, strict=True):
        assert torch.equal(weight, kept)


def test_while_a_hand_holds_the_dial_words_say_so(model: PeftModel, tmp_path: Path) -> None:
    controller: Any = model.controller
    machine, now_s = posted(model)
    controller.set_strength(0.4)
    controller.log_to(tmp_path / "log")
    controller.tick(now_s)
    machine.free_bytes = 4 * GIB
    now_s = tick_for(model, now_s + 0.2, 1.0)
    said = controller.status()["sensors"]["reason"]
    assert said == "strength is held at 0.40 by hand; the sensors report pressure 0.00, 1.00 counts (host headroom)"
    tick_for(model, now_s, 60.0)
    said = controller.status()["sensors"]["reason"]
    assert said == "strength is held at 0.40 by hand; all sensors are calm"
    controller.set_pressure(None)
    assert "by hand" not in controller.status()["reason"]
    controller.close()
    lines = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    reasons = [line["reason"] for line in lines if line["event"] == "sample"]
    assert len(reasons) > 300 and all(reason.startswith("strength is held at 0.40 by hand; ") for reason in reasons)


def test_a_posted_target_is_live_at_a_step_of_generate_and_of_a_loop(model: PeftModel, family: Family) -> None:
    machine, controller = under(model), model.controller
    watch = Watch(model, family, [0.0, 1.0])
    clock_s = [tick_for(model, 0.0, 2.0)]

    def press(step: int) -> None:
        machine.free_bytes = (0.1 if step == 1 else 4.0) * GIB if step in (1, 4) else machine.free_bytes
        seconds = 60.0 if step == 4 else 1.0
        run_all(lambda: clock_s.append(tick_for(model, clock_s[-1], seconds)))

    generate(model, 7, logits_processor=each(press))
    assert [seen[0] for seen in watch.forwards] == [0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0]
    machine.free_bytes = 0.1 * GIB
    tick_for(model, clock_s[-1], 5.0)
    with controller.step():
        forward(model)
    assert watch.forwards[-1][0] == 1.0 and watch.check() == {0.0, 1.0}
