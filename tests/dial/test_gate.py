"""The step lock between forwards and swaps: nothing torn, nothing starved, nothing left hanging."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
from peft import PeftModel
from watched_decoding import Watch, each, generate, run_all

from remoe_adapt.dial.steps import StepLock
from remoe_adapt.family.family import Family
from remoe_adapt.tuner.layer import remoe_layers


def test_ten_thousand_targets_from_another_thread_never_tear_a_forward(model: PeftModel, family: Family) -> None:
    pressures = [0.0, 0.25, 0.4, 0.5, 0.8, 1.0]
    watch = Watch(model, family, pressures)
    done = threading.Event()

    def turn() -> None:
        try:
            for i in range(10_000):
                model.controller.set_pressure(pressures[i % len(pressures)])
                while i % 101 == 0 and len(watch.forwards) < i // 101:
                    time.sleep(0.001)  # no faster than a forward per hundred targets
        finally:
            done.set()

    def decode() -> None:
        while not done.is_set():
            generate(model, 10)

    run_all(turn, decode, decode, seconds=120)
    assert len(watch.check()) >= 3 and len(watch.forwards) > 90
    status = model.controller.status()
    assert status["strength"] == status["target"] == pressures[9_999 % len(pressures)], "the last target wins"
    assert status["swaps"] > 20 and status["running"] == 0 and not status["waiting"]


def test_several_generating_threads_with_exceptions_keep_swapping(model: PeftModel, family: Family) -> None:
    watch = Watch(model, family, [0.0, 0.25, 0.5, 1.0])
    done = threading.Event()

    def fail(step: int) -> None:
        if step == 2:
            raise RuntimeError("a processor broke")

    def failing() -> None:
        for _ in range(6):
            with pytest.raises(RuntimeError, match="broke"):
                generate(model, 5, logits_processor=each(fail))

    def turning() -> None:
        for i in range(12):
            model.controller.set_strength([0.25, 0.5, 1.0][i % 3])
            deadline = time.monotonic() + 20
            while model.controller.status()["waiting"] and time.monotonic() < deadline:
                time.sleep(0.001)
            assert not model.controller.status()["waiting"], "threads that never stop keep the swap out"
            forwards = len(watch.forwards)
            while len(watch.forwards) < forwards + 3:
                time.sleep(0.001)
        done.set()

    def decoding() -> None:
        while not done.is_set():
            generate(model, 5)

    run_all(failing, turning, decoding, decoding)
    assert watch.check() >= {0.25, 0.5, 1.0} and model.controller.status()["running"] == 0
    model.controller.set_strength(0.75)
    assert model.controller.strength == 0.75, "nothing was left open"


def test_a_generate_inside_a_generate(model: PeftModel, family: Family) -> None:
    watch = Watch(model, family, [0.0, 0.5, 1.0])
    inner_strengths = []

    def nest(step: int) -> None:  # between two forwards: the inner steps may swap
        model.controller.set_strength(1.0 if step % 2 == 0 else 0.5)
        generate(model, 2)
        inner_strengths.append(model.controller.strength)

    run_all(lambda: generate(model, 3, logits_processor=each(nest)))
    assert watch.check() == {0.0, 0.5, 1.0} and inner_strengths == [1.0, 0.5, 1.0]

    layer = next(iter(remoe_layers(model).values()))
    depth: list[int] = []

    def inside_forward(*_: Any) -> None:  # inside a forward: the inner steps must not swap
        if not depth:
            depth.append(1)
            before = model.controller.strength
            model.controller.set_strength(0.25)
            generate(model, 2)
            assert model.controller.strength == before, "a swap inside a forward"

    handle = layer.base_layer.register_forward_hook(inside_forward)
    run_all(lambda: generate(model, 2))
    handle.remove()
    assert depth and model.controller.strength == 0.25


class Dial:
    """A step lock whose posted swaps are counted."""

    def __init__(self) -> None:
        self.waiting, self.swaps = False, 0
        self.steps = StepLock(self)

    def swap(self, *, alone: bool) -> None:
        self.waiting, self.swaps = False, self.swaps + 1


def test_a_waiting_thread_lets_one_swap_by_and_goes_on() -> None:
    dial = Dial()
    arrived, release = threading.Event(), threading.Event()
    order: list[str] = []

    def slow() -> None:
        with dial.steps.generating():
            arrived.set()
            assert release.wait(20)
            order.append("slow forward ends")
            dial.steps.begin_step()
            dial.waiting = True  # the next target comes at once

    def fast() -> None:
        with dial.steps.generating():
            arrived.wait(20)
            dial.steps.end_step()
            dial.waiting = True
            threading.Timer(0.2, release.set).start()
            dial.steps.begin_step()
            order.append("fast forward begins")

    run_all(slow, fast, seconds=30)
    assert order == ["slow forward ends", "fast forward begins"] and dial.swaps >= 1


def test_a_forward_that_never_ends_holds_nobody_up_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("remoe_adapt.dial.steps.PATIENCE_S", 0.2)
    dial = Dial()
    stuck, finish = threading.Event(), threading.Event()

    def hanging() -> None:
        with dial.steps.generating():
            stuck.set()
            assert finish.wait(30)

    def decoding() -> None:
        assert stuck.wait(20)
        dial.waiting = True
        waits = []
        with dial.steps.generating():
            for _ in range(5):
                begin = time.monotonic()
                dial.steps.begin_step()
                waits.append(time.monotonic() - begin)
        assert dial.swaps == 0 and sum(waits) < 10, "no wait per step for what is known to be stuck"
        finish.set()

    run_all(hanging, decoding, seconds=40)
    assert dial.swaps == 1 and not dial.waiting, "the last one out makes the swap"


def test_a_dead_loop_thread_gives_its_swaps_back() -> None:
    dial = Dial()
    run_all(dial.steps.step)
    dial.waiting = True
    dial.steps.swap_if_idle()
    assert dial.swaps == 1


def test_a_forward_may_end_in_another_thread_than_it_began() -> None:
    dial = Dial()
    forward = dial.steps.forward()
    run_all(forward.__enter__)
    assert dial.steps.sessions == 1
    forward.__exit__(None, None, None)
    dial.waiting = True
    dial.steps.swap_if_idle()
    assert dial.steps.sessions == 0 and dial.swaps == 1


def test_what_fails_between_boundary_and_forward_leaves_nothing_open(model: PeftModel) -> None:
    base: Any = model.get_base_model()

    def fail(*_: Any) -> None:
        raise SystemExit(3)  # as a thread that ends itself

    handle = base.register_forward_pre_hook(fail)
    with pytest.raises(SystemExit):
        generate(model, 2)
    with pytest.raises(SystemExit), model.controller.step():
        model(input_ids=None)
    handle.remove()
    model.controller.set_strength(0.75)
    status = model.controller.status()
    assert status["running"] == 0 and status["strength"] == 0.75
