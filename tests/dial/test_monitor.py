"""The dial by itself: sensors turn it, a hand pins it, swaps are heard and written, and nothing outlives its model."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from monitor_support import GIB, live, tick_for, under
from peft import PeftModel
from tiny_models import tiny_model
from waiting import until
from watched_decoding import Watch, each, generate, run_all, run_alone

from remoe_adapt import load_profile
from remoe_adapt.device_profile.profile import DeviceProfile
from remoe_adapt.dial.events import Swap
from remoe_adapt.dial.load import get_remoe_model
from remoe_adapt.errors import ConfigError, DialError
from remoe_adapt.family.family import Family


@pytest.fixture
def profile() -> DeviceProfile:
    return load_profile("orin-8gb")


@pytest.fixture
def model(saved: Path, profile: DeviceProfile) -> PeftModel:
    """Without its thread: the tests tick."""
    model = get_remoe_model(tiny_model("qwen2_moe"), profile, saved / "family", monitor=False)
    model.generation_config.eos_token_id = None
    return model


def test_sensors_turn_the_dial_up_at_once_and_back_in_the_profile_s_time(
    model: PeftModel, profile: DeviceProfile
) -> None:
    machine, controller = under(model), model.controller
    now_s = tick_for(model, 0.0, 5.0)
    assert controller.strength == 0.0 and controller.status()["reason"].startswith("all sensors are calm")
    machine.free_bytes = 0.2 * GIB
    now_s = tick_for(model, now_s, 3.0)
    assert live(model) == profile.strength_at(1.0) == 1.0
    status = controller.status()
    assert status["pressure"] == 1.0 and not status["pinned"] and "headroom" in status["sensors"]["cause"]
    machine.free_bytes = 4 * GIB
    tick_for(model, now_s, profile.recovery_s)
    assert live(model) == 0.0 and controller.status()["pressure"] == 0.0
    assert {swap.by for swap in controller.swaps} == {"sensors"} and controller.swaps[-1].after == 0.0


def test_a_hand_pins_the_dial_and_gives_it_back(model: PeftModel) -> None:
    machine, controller = under(model), model.controller
    controller.set_pressure(0.5)
    machine.free_bytes = 0.1 * GIB
    now_s = tick_for(model, 0.0, 5.0)
    assert controller.strength == 0.25 and controller.status()["pinned"]
    assert controller.status()["sensors"]["pressure"] == 1.0, "it is measured all the same"
    controller.set_pressure(None)
    assert controller.strength == 1.0 and not controller.status()["pinned"], "at once, by the last word of the sensors"
    controller.set_strength(0.1)
    now_s = tick_for(model, now_s, 2.0)
    assert controller.strength == 0.1 and controller.status()["pressure"] is None
    controller.set_pressure(None)
    machine.free_bytes = 4 * GIB
    tick_for(model, now_s, 60.0)
    assert live(model) == 0.0


def test_the_thread_samples_until_paused_and_again_after(model: PeftModel) -> None:
    machine, controller = under(model), model.controller
    assert not controller.status()["monitored"] and controller.status()["sensors"] is None
    controller.resume()
    until(lambda: controller.status()["sensors"] is not None)
    assert controller.status()["monitored"] and controller.status()["sensors"]["age_s"] < 5
    with controller.pause():
        assert not controller.status()["monitored"]
        machine.free_bytes = 0.1 * GIB
        time.sleep(0.5)
        assert live(model) == 0.0
    until(lambda: live(model) == 1.0)
    controller.close()
    assert not controller.status()["monitored"]
    with pytest.raises(DialError, match="closed"):
        controller.resume()


def test_it_starts_by_itself_and_ends_with_its_model(saved: Path) -> None:
    model: Any = get_remoe_model(saved, "orin-8gb", saved / "family")
    until(lambda model=model: model.controller.status()["sensors"] is not None)
    thread, gone = model.controller._monitor._threads[-1], weakref.ref(model.get_base_model())
    assert thread.daemon and {"memory.available", "cache.budget"} <= set(
        model.controller.status()["sensors"]["measures"]
    )
    del model
    gc.collect()
    assert gone() is None, "the thread keeps no model alive"
    thread.join(10)
    assert not thread.is_alive()


def test_listeners_and_logs_keep_no_model_alive(saved: Path, tmp_path: Path) -> None:
    model: Any = get_remoe_model(saved, "orin-8gb", saved / "family")
    gone, heard = weakref.ref(model.get_base_model()), []
    model.controller.on_swap(lambda swap, model=model: heard.append(model.controller.strength))
    model.controller.log_to(tmp_path / "log")
    model.controller.set_strength(0.5)
    model.controller._events.flush()
    threads = [model.controller._monitor._threads[-1], model.controller._events._thread]
    assert heard == [0.5] and all(thread.is_alive() for thread in threads)
    del model
    until(lambda: not gc.collect() and gone() is None)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


def test_a_pause_ends_only_what_it_stopped(saved: Path, model: PeftModel) -> None:
    controller: Any = model.controller
    with controller.pause():
        pass
    assert not controller.status()["monitored"], "it had no thread"
    controller.resume()
    with controller.pause():
        with controller.pause():
            pass
        assert not controller.status()["monitored"], "the outer block is not over"
    assert controller.status()["monitored"]
    with controller.pause():
        controller.close()
    assert not controller.status()["monitored"]


def test_a_log_that_cannot_be_written_is_said_and_ends_nothing(
    model: PeftModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    controller: Any = model.controller
    for path in (tmp_path, tmp_path / "no" / "log", 5):
        with pytest.raises(ConfigError, match=f"'{path}' cannot be written"):
            controller.log_to(path)
    if not Path("/dev/full").exists():
        return
    controller.log_to("/dev/full")
    for strength in (0.3, 0.6):
        controller.set_strength(strength)
    controller._events.flush()
    assert caplog.text.count("nothing more is written") == 1 and controller.strength == 0.6
    controller.close()


def test_a_sensor_that_breaks_does_not_end_the_thread(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    machine, controller = under(model), model.controller
    broken = threading.Event()

    def fail(now_s: float) -> Any:
        broken.set()
        raise MemoryError("no room to measure")

    controller._monitor._governor.sensors.read, working = fail, controller._monitor._governor.sensors.read
    controller.resume()
    assert broken.wait(10)
    controller._monitor._governor.sensors.read = working
    machine.free_bytes = 0.1 * GIB
    until(lambda: live(model) == 1.0)
    assert "MemoryError: no room to measure" in caplog.text
    controller.close()


def test_the_cache_gives_memory_back_and_has_it_again(saved: Path, profile: DeviceProfile) -> None:
    model: Any = get_remoe_model(saved, profile, saved / "family", expert_cache=1.0, monitor=False)
    generate(model, 6)
    cache = model.get_base_model().expert_cache
    whole, used = cache.budget_bytes, cache.resident_bytes
    machine = under(model)  # what it will lack is far more than this cache
    now_s = tick_for(model, 0.0, 2.0)
    assert cache.budget_bytes == whole
    machine.free_bytes = 0.5 * GIB
    reasons = [model.controller.tick(now_s).reason]
    now_s = tick_for(model, now_s + 0.2, 2.0)
    assert cache.budget_bytes < used and cache.resident_bytes <= cache.budget_bytes
    assert cache.budget_bytes >= profile.expert_cache.floor * whole - 1
    assert "expert cache shrinks" in reasons[0]
    machine.free_bytes = 6 * GIB
    tick_for(model, now_s, 2 * profile.recovery_s)
    assert cache.budget_bytes == whole and live(model) == 0.0


def test_two_models_share_what_is_lacking(saved: Path, profile: DeviceProfile) -> None:
    gc.collect()  # what other tests left shares too
    models: list[Any] = [get_remoe_model(saved, profile, saved / "family", monitor=False) for _ in "12"]
    for model in models:
        model.controller.tick(0.0)
    assert [model.controller._monitor._governor.share for model in models] == [0.5, 0.5]
    models[0].controller.close()
    models[1].controller.tick(1.0)
    assert models[1].controller._monitor._governor.share == 1.0


def test_swaps_are_heard_in_order_and_by_whoever_asked(model: PeftModel, caplog: pytest.LogCaptureFixture) -> None:
    heard: list[Swap] = []

    def break_down(swap: Swap) -> None:
        raise RuntimeError("listener broke")

    def ask(swap: Swap) -> None:  # a listener may use the controller
        heard.append(swap)
        model.controller.status()

    ends = [model.controller.on_swap(break_down), model.controller.on_swap(ask)]
    generate(model, 6, logits_processor=each(lambda step: model.controller.set_strength((step + 1) / 10)))
    model.controller._events.flush()
    assert [swap.after for swap in heard] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6] and heard == model.controller.swaps
    assert heard[0].before == 0.0 and heard[0].by == "hand" and heard[0].swap_ms > 0 and "listener broke" in caplog.text
    for end in ends:
        end()
    model.controller.set_strength(1.0)
    model.controller._events.flush()
    assert len(heard) == 6 and len(model.controller.swaps) == 7
    bad: Any = "no function"
    with pytest.raises(ConfigError, match="no function"):
        model.controller.on_swap(bad)


def test_swaps_and_samples_are_written_as_json_lines(model: PeftModel, tmp_path: Path) -> None:
    machine, controller = under(model), model.controller
    controller.log_to(tmp_path / "log.jsonl")
    now_s = tick_for(model, 0.0, 1.0)
    machine.free_bytes = 0.1 * GIB
    tick_for(model, now_s, 2.0)
    assert live(model) == 1.0
    controller.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    samples = [line for line in lines if line["event"] == "sample"]
    swaps = [line for line in lines if line["event"] == "swap"]
    assert len(samples) >= 14 and {"pressure", "strength", "tpot_ms", "signals"} <= set(samples[0])
    assert swaps[-1]["after"] == 1.0 and swaps[-1]["by"] == "sensors" and "free, reserve" in swaps[-1]["reason"]
    with pytest.raises(ConfigError, match="cannot be written"):
        get_remoe_model(tiny_model("qwen2_moe"), monitor=False).controller.log_to(tmp_path / "none" / "log")


def many_targets(model: PeftModel, family: Family, targets: int) -> None:
    """`targets` calls from 4 threads while another one generates; memory must not grow with them."""
    pressures = [0.0, 0.5, 0.7, 0.9]
    watch = Watch(model, family, [model.controller.profile.strength_at(p) for p in pressures])
    done, finished = threading.Event(), []

    def turn(number: int) -> None:
        for i in range(targets // 4):
            model.controller.set_pressure(pressures[(i + number) % 4])
        finished.append(number)
        if len(finished) == 4:
            done.set()

    def decode() -> None:
        while not done.is_set():
            generate(model, 10)

    turns = [lambda number=number: turn(number) for number in range(4)]
    run_all(*turns, decode, seconds=500)
    watch.check()
    status = model.controller.status()
    assert status["strength"] == status["target"] and status["running"] == 0 and not status["waiting"]
    model.controller.set_pressure(0.9)
    assert model.controller.strength == model.controller.profile.strength_at(0.9), "the last value wins"


def test_targets_from_four_threads_during_generation(model: PeftModel, saved: Path) -> None:
    many_targets(model, Family.load(saved / "family"), 4_000)


@pytest.mark.slow
def test_a_hundred_thousand_targets_leak_nothing(model: PeftModel, saved: Path) -> None:
    family = Family.load(saved / "family")
    many_targets(model, family, 10_000)
    before = psutil.Process().memory_info().rss
    many_targets(model, family, 100_000)
    assert psutil.Process().memory_info().rss - before < 32 << 20


def test_a_forked_child_has_a_dial_of_its_own(saved: Path, tmp_path: Path) -> None:
    """In a process of its own: fork in the middle of everything, then generate and turn the dial in the child."""
    script = f"""
import os, sys, threading, torch
from remoe_adapt import get_remoe_model
torch.set_num_threads(1)
model = get_remoe_model({str(saved)!r}, "orin-8gb", {str(saved / "family")!r}, expert_cache=0.5)
model.generation_config.eos_token_id = None
ids = torch.tensor([[5, 17, 42, 8]])
run = lambda: model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0).tolist()
model.controller.set_strength(1.0)
expected = run()
model.controller.set_strength(0.25)
stop = threading.Event()
def turn():
    while not stop.is_set():
        model.controller.set_strength(0.25)
        model.controller.set_strength(0.5)
busy = [threading.Thread(target=turn), threading.Thread(target=lambda: [run() for _ in iter(stop.is_set, True)])]
for thread in busy:
    thread.start()
for _ in range(5):
    child = os.fork()
    if child == 0:
        model.controller.set_strength(1.0)
        ok = run() == expected and model.controller.strength == 1.0 and not model.controller.status()["monitored"]
        model.controller.resume()
        ok = ok and model.controller.status()["monitored"]
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
stop.set()
for thread in busy:  # torch does not like to be left in the midst of a call
    thread.join()
print("done")
"""
    ended = run_alone(tmp_path, "-W", "ignore", "-c", script)
    assert ended.returncode == 0 and ended.stdout.endswith("done\n"), ended.stderr[-2000:]


def test_the_interpreter_exits_in_order(saved: Path, tmp_path: Path) -> None:
    script = f"""
from remoe_adapt import get_remoe_model
model = get_remoe_model({str(saved)!r}, "orin-8gb", {str(saved / "family")!r})
model.controller.on_swap(print)
model.controller.set_pressure(1.0)
"""
    ended = run_alone(tmp_path, "-c", script)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr and "Fatal" not in ended.stderr, ended.stderr


def test_a_profile_without_rises_never_moves(saved: Path, profile: DeviceProfile) -> None:
    flat = replace(profile, strength=replace(profile.strength, curve=((0.0, 0.0), (1.0, 0.0))))
    model = get_remoe_model(tiny_model("qwen2_moe"), flat, saved / "family", monitor=False)
    under(model).free_bytes = 0.0
    tick_for(model, 0.0, 5.0)
    assert live(model) == 0.0 and model.controller.status()["pressure"] == 1.0
