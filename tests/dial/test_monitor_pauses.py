"""Pausing, resuming and closing from many threads, and what a monitor says of a profile that cannot hold here."""

from __future__ import annotations

import logging
import threading
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import psutil
import pytest
from peft import PeftModel
from tiny_models import tiny_model
from watched_decoding import run_all

from remoe_adapt import load_profile
from remoe_adapt._support.process import size_text
from remoe_adapt.device_profile.profile import DeviceProfile
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import DialError
from remoe_adapt.family.family import Family
from remoe_adapt.pressure.decide import DecisionState, decide
from remoe_adapt.pressure.governor import Governor
from remoe_adapt.pressure.reading import Measure, Reading
from remoe_adapt.pressure.sensors import Sensors, os_sensors
from remoe_adapt.pressure.signals import losses, weigh

GIB = 1 << 30


def fast(profile: DeviceProfile) -> DeviceProfile:
    """It samples as often as it can: a sample is nearly always under way."""
    return replace(profile, controller=replace(profile.controller, sample_hz=1000.0, rise_s=0.1))


@pytest.fixture
def model(family: Family) -> PeftModel:
    return get_remoe_model(tiny_model("qwen2_moe"), fast(load_profile("orin-8gb")), family)


def monitors() -> int:
    return sum(thread.name == "remoe-monitor" for thread in threading.enumerate())


def test_pauses_of_four_threads_never_fail_and_end_with_the_last(model: PeftModel) -> None:
    controller: Any = model.controller
    inside = []

    def pause_often() -> None:
        for _ in range(200):
            with controller.pause():
                inside.append(controller.status()["monitored"])

    run_all(*[pause_often] * 4)
    assert inside == [False] * 800 and controller.status()["monitored"]
    controller.close()


def test_any_order_of_pause_resume_and_close_in_any_thread_is_safe(family: Family) -> None:
    before = monitors()
    for seed in range(8):
        model = get_remoe_model(tiny_model("qwen2_moe"), fast(load_profile("orin-8gb")), family)
        controller: Any = model.controller

        def turn(number: int, seed: int = seed, controller: Any = controller) -> None:
            random, open_ones = Random(100 * seed + number), []
            for step in range(60):
                kind = random.randrange(6)
                if kind == 0:
                    open_ones.append(controller.pause())
                elif kind == 1 and open_ones:
                    open_ones.pop(random.randrange(len(open_ones))).__exit__(None, None, None)
                elif kind == 2:
                    with controller.pause():
                        controller.set_strength(random.random()) if number < 2 and step < 20 else None
                elif kind == 3 and number == 3 and step > 40:
                    controller.close()
                else:
                    controller.resume() if random.random() < 0.5 else controller.status()

        def turn_until_closed(number: int, turn: Any = turn) -> None:
            try:
                turn(number)
            except DialError as error:  # another thread has closed it
                assert "closed" in str(error)

        run_all(*[lambda number=number: turn_until_closed(number) for number in range(4)])
        if not controller.status()["closed"]:
            controller.resume()
            assert controller.status()["monitored"], "whatever was open"
            with controller.pause():
                assert not controller.status()["monitored"]
            assert controller.status()["monitored"]
            controller.close()
        with pytest.raises(DialError, match="closed"):
            controller.resume()
        assert not controller.status()["monitored"]
    assert monitors() == before, "no thread is left"


def test_a_pause_holds_while_another_one_is_open(model: PeftModel) -> None:
    controller: Any = model.controller
    first, second = controller.pause(), controller.pause()
    with first:
        pass
    assert not controller.status()["monitored"], "the second is open"
    with second:
        pass
    assert controller.status()["monitored"]
    with first:
        pass
    assert controller.status()["monitored"]
    controller.pause()
    controller.pause()
    controller.resume()
    assert controller.status()["monitored"], "resume ends them all"
    controller.close()


def held(profile: DeviceProfile, budget: int | None, reserve: int) -> DeviceProfile:
    return replace(profile, memory=replace(profile.memory, budget_bytes=budget, reserve_bytes=reserve))


@pytest.mark.parametrize(
    ("budget", "reserve", "words"),
    [
        (None, 1 << 45, "memory.reserve 32768.00 GiB of profile orin-8gb is more than a quarter of the {total}"),
        (1 << 45, 1 << 20, "memory.budget 32768.00 GiB of profile orin-8gb is more than the {total} of memory here"),
        (1 << 20, 1 << 20, "memory.budget 1.0 MiB of profile orin-8gb cannot be met: the model takes"),
    ],
)
def test_what_cannot_hold_here_is_said_at_the_start_and_in_the_status(
    family: Family, caplog: pytest.LogCaptureFixture, budget: int | None, reserve: int, words: str
) -> None:
    total = size_text(psutil.virtual_memory().total)
    profile = held(load_profile("orin-8gb"), budget, reserve)
    with caplog.at_level(logging.WARNING, "remoe_adapt"):
        model: Any = get_remoe_model(tiny_model("qwen2_moe"), profile, family)
    said = [record.message for record in caplog.records]
    expected = words.format(total=total) if "{total}" not in words or total in "".join(said) else words.split("{")[0]
    assert any(message.startswith(expected) for message in said), said
    decision = model.controller.tick()
    status = model.controller.status()
    assert expected in decision.reason and expected in status["reason"]
    assert any(note.startswith(expected) for note in status["sensors"]["notes"])
    model.controller.tick()
    assert [record.message for record in caplog.records if record.message.startswith(expected[:20])] == [
        message for message in said if message.startswith(expected[:20])
    ], "once"
    model.controller.close()


def test_a_profile_that_holds_here_is_no_news(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    total = psutil.virtual_memory().total
    model: Any = get_remoe_model(saved, held(load_profile("orin-8gb"), total // 2, 1 << 20), saved / "family")
    assert not model.controller.tick().notes and "memory." not in caplog.text
    model.controller.close()


def test_a_squeeze_names_the_sizes_it_is_about() -> None:
    sizes = {"cache.budget": 0.4 * (1 << 20), "cache.allowed": 4.0 * (1 << 20), "cache.resident": 4e5}
    sizes |= {"memory.available": 0.3 * (1 << 20), "memory.total": 4.0 * GIB}
    reading = Reading(1.0, {name: Measure(size, "B", 1.0) for name, size in sizes.items()})
    _, decision = decide(DecisionState(), reading, load_profile("orin-8gb"))
    weighed = weigh(reading, load_profile("orin-8gb"))
    said = [signal.words for signal in (*weighed.memory, *losses(weighed, decision.budgets, load_profile("orin-8gb")))]
    assert "307.2 KiB of memory free, reserve 1.00 GiB" in said
    assert any(words.endswith("of its 4.0 MiB") and "keeps 0 " not in words for words in said), said


def test_what_a_cache_cannot_give_back_is_said_of_a_budget(saved: Path) -> None:
    model: Any = get_remoe_model(
        saved, held(load_profile("orin-8gb"), 1 << 20, 1 << 20), saved / "family", monitor=False, expert_cache=1.0
    )
    with_tokens = model.generate(input_ids=model.dummy_inputs["input_ids"], max_new_tokens=4, pad_token_id=0)
    assert with_tokens.numel()
    for second in range(4):
        decision = model.controller.tick(float(second))
    assert "cannot be met" in decision.reason and "its expert cache can give back" in decision.reason
    model.controller.close()


def test_whoever_drives_another_engine_hears_it_too(caplog: pytest.LogCaptureFixture) -> None:
    governor = Governor(Sensors(os_sensors()), held(load_profile("orin-8gb"), None, 1 << 45))
    for second in range(3):
        governor.tick(float(second), 0.0)
    assert caplog.text.count("memory.reserve 32768.00 GiB of profile orin-8gb is more than a quarter") == 1
