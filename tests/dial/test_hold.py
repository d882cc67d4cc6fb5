"""A strength that is held for a block: nobody turns it meanwhile, and what was asked for last counts afterwards."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_models import tiny_model
from watched_decoding import Watch, each, generate

from remoe_adapt.dial.load import get_remoe_model, release
from remoe_adapt.errors import ConfigError, DialError
from remoe_adapt.family.family import Family


@pytest.fixture
def model(family: Family) -> Iterator[PeftModel]:
    made = get_remoe_model(tiny_model("qwen2_moe"), None, family, monitor=False)
    yield made
    release(made)


def test_within_the_block_it_is_the_held_one_and_after_it_the_one_before(model: PeftModel) -> None:
    dial = model.controller
    dial.set_pressure(0.3)
    with dial.hold(0.8, "for a test"):
        assert dial.strength == 0.8 and dial.pinned and dial.status()["reason"] == "for a test"
    assert dial.strength == 0.3 and dial.status()["pressure"] == 0.3 and "by hand" in dial.status()["reason"]


def test_what_is_asked_meanwhile_counts_afterwards_the_last_of_it(model: PeftModel) -> None:
    dial = model.controller
    with dial.hold(1.0):
        for pressure in (0.2, 0.9, 0.6):
            other = threading.Thread(target=dial.set_pressure, args=(pressure,))
            other.start()
            other.join()
            assert dial.strength == dial.target == 1.0
    assert dial.strength == 0.6 and dial.status()["pressure"] == 0.6


def test_sensors_have_it_again_if_they_had_it_or_were_handed_it_meanwhile(model: PeftModel) -> None:
    dial = model.controller
    with dial.hold(0.5):
        dial.tick()  # a sample meanwhile moves nothing
        assert dial.strength == 0.5
    assert not dial.pinned and dial.strength == 0.0
    dial.set_strength(0.7)
    with dial.hold(0.5):
        dial.set_pressure(None)
        assert dial.strength == 0.5
    assert not dial.pinned and dial.strength == 0.0


def test_generating_in_it_never_sees_another_strength(model: PeftModel, family: Family) -> None:
    dial, watch = model.controller, Watch(model, family, [0.0, 0.25, 0.5, 0.75, 1.0])
    turned = each(lambda step: threading.Thread(target=dial.set_strength, args=(step % 5 / 4,)).start())
    with dial.hold(0.5):
        generate(model, 12, logits_processor=turned, eos_token_id=None)
    assert watch.check() == {0.5} and len(watch.forwards) == 12


def test_one_at_a_time_and_none_of_a_closed_dial(model: PeftModel) -> None:
    dial = model.controller
    with dial.hold(0.5):
        with pytest.raises(DialError, match="held already"), dial.hold(0.6):
            pass
        assert dial.strength == 0.5
    with pytest.raises(ConfigError, match=r"strength 2 is out of range"), dial.hold(2):
        pass
    with dial.hold(0.5):
        dial.close()
    assert dial.strength == 0.0
    with pytest.raises(DialError, match="closed"), dial.hold(0.5):
        pass


def test_an_error_in_the_block_ends_it(model: PeftModel) -> None:
    dial = model.controller
    with pytest.raises(RuntimeError, match="mine"), dial.hold(1.0):
        raise RuntimeError("mine")
    assert dial.strength == 0.0 and not dial.pinned


def test_a_strength_that_cannot_be_staged_is_not_held(model: PeftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    dial = model.controller
    dial.set_strength(0.4)

    def broken(_strength: float) -> None:
        raise torch.OutOfMemoryError("no room for weights")

    with monkeypatch.context() as patched:
        patched.setattr(dial._routers, "stage", broken)
        with pytest.raises(torch.OutOfMemoryError), dial.hold(0.9):
            pass
    assert dial.strength == 0.4
    with dial.hold(0.9):
        assert dial.strength == 0.9
    assert dial.strength == 0.4


def test_the_log_names_both_swaps(model: PeftModel, tmp_path: Path) -> None:
    dial = model.controller
    dial.log_to(tmp_path / "log.jsonl")
    with dial.hold(0.5, "pinned by a request"):
        pass
    assert [(swap.before, swap.after) for swap in dial.swaps] == [(0.0, 0.5), (0.5, 0.0)]
    assert dial.swaps[0].reason == "pinned by a request"
