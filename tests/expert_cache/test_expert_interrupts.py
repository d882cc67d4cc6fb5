"""Ctrl-C, by real signals, at any moment of decoding with an expert cache: nothing of it may stay broken."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import pytest
import torch
from expert_support import EXPERTS, LAYERS, Source
from fake_streams import tier_over
from kv import kv
from tiny_checkpoints import save_tiny, stock
from torch import Tensor, nn
from transformers import DynamicCache
from waiting import HANGS_S, in_thread, until

from remoe_adapt._support import interrupts
from remoe_adapt._support.interrupts import held_back, let_through
from remoe_adapt.errors import ExpertReadError
from remoe_adapt.expert_cache.cache import ExpertCache
from remoe_adapt.expert_cache.load import load_with_expert_cache

IDS = torch.randint(3, 96, (1, 2), generator=torch.Generator().manual_seed(0))


@contextmanager
def handler(number: int, handle: Any) -> Iterator[None]:
    before = signal.signal(number, handle)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupted(work: Callable[[], object], after_s: float, signals: int = 1) -> int:
    """Repeats `work` until another thread has sent this many SIGINT, the first after a while; how many were raised."""
    ready, sent, working, raised = threading.Event(), threading.Event(), False, 0

    def send() -> None:
        assert ready.wait(HANGS_S)
        time.sleep(after_s)
        for _ in range(signals):
            os.kill(os.getpid(), signal.SIGINT)
        sent.set()

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal raised
        if working:
            raised += 1
            raise KeyboardInterrupt

    with handler(signal.SIGINT, interrupt):
        thread = in_thread(send)
        ready.set()
        while not sent.is_set():
            try:
                try:
                    working = True
                    work()
                finally:
                    working = False
            except KeyboardInterrupt:
                pass
        thread.join()
        assert signal.getsignal(signal.SIGINT) is interrupt
    return raised


def ends(work: Callable[[], object]) -> bool:
    """Whether it comes to its end in another thread: nobody holds what it needs."""
    thread = in_thread(work)
    thread.join(HANGS_S)
    return not thread.is_alive()


def check(cache: ExpertCache) -> None:
    until(lambda: not cache._loading)
    with cache._changed:
        assert not cache._shares.pins and cache._waiting == 0
        assert not cache._ahead.reading
        keys = {key for policy in cache._shares.policies for key in policy}
        assert keys == set(cache._slots)
        assert cache.resident_bytes == sum(cache.source.expert_bytes[layer] for layer, _ in keys) <= cache.budget_bytes
        for layer, count in enumerate(cache.source.num_experts):
            assert cache.is_whole(layer) == (sum(at == layer for at, _ in keys) == count)


def decode(model: nn.Module) -> Tensor:
    """Logits of one token after the other, with the KV cache."""
    past, found = DynamicCache(), []
    with torch.no_grad():
        for at in range(IDS.shape[1]):
            found.append(model(input_ids=IDS[:, at : at + 1], **kv(past), use_cache=True).logits)
    return torch.cat(found)


@pytest.mark.parametrize(("rounds", "prefetch", "signals"), [(200, False, 1), (100, True, 1), (100, False, 4)])
def test_decoding_goes_on_as_if_nothing_had_been_after_hundreds_of_interrupts(
    rounds: int, prefetch: bool, signals: int, tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    expected = decode(stock(folder))
    model: Any = load_with_expert_cache(folder, 0.2, prefetch=prefetch, threads=2)
    cache: ExpertCache = model.expert_cache
    whole, raised = cache.budget_bytes, 0
    assert torch.equal(decode(model), expected)
    cache.reset_stats()
    decode(model)
    look_ups = cache.stats()["hits"] + cache.stats()["misses"]
    chance = random.Random(0)
    for number in range(rounds):
        raised += interrupted(lambda: decode(model), chance.uniform(0.0, 0.02), signals)
        check(cache)
        cache.reset_stats()
        assert torch.equal(decode(model), expected)
        assert cache.stats()["hits"] + cache.stats()["misses"] == look_ups
        if number % 20 == 0:
            assert ends(lambda: cache.lease(0, [1]).release()) and ends(cache.clear) and not cache.resident()
            assert ends(lambda: cache.resize(whole // 2)) and cache.budget_bytes == whole // 2
            cache.resize(whole)
    assert raised > rounds / 2, "else hardly one came while it decoded"


def test_a_budget_that_moves_and_other_threads_stand_interrupts_too(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    expected = decode(stock(folder))
    model: Any = load_with_expert_cache(folder, 0.2, prefetch=True)
    cache: ExpertCache = model.expert_cache
    whole, over, wrong = cache.budget_bytes, threading.Event(), []
    chance = random.Random(1)

    def other() -> None:
        while not over.is_set():
            if not torch.equal(decode(model), expected):
                wrong.append(1)

    def move() -> None:
        decode(model)
        cache.resize(chance.choice((whole, whole // 2, whole // 3)))
        cache.clear()

    thread = in_thread(other)
    for _ in range(50):
        interrupted(move, chance.uniform(0.0, 0.03), 2)
    over.set()
    thread.join(HANGS_S)
    assert not thread.is_alive() and not wrong
    check(cache)
    assert torch.equal(decode(model), expected)


@pytest.mark.parametrize("tiers", [1, 2])
def test_leases_of_a_hand_are_given_back_when_a_timer_raises(tiers: int) -> None:
    source = Source(delay_s=0.0001)
    below = ExpertCache(source, source.total // 3, threads=2)
    cache = below if tiers == 1 else tier_over(below, source.total // 4)
    chance, lease = random.Random(2), cache.lease(0, [0])

    class TimeLimitError(Exception):
        pass

    def over(number: int, frame: FrameType | None) -> None:
        raise TimeLimitError

    with handler(signal.SIGALRM, over):
        for _ in range(200):
            signal.setitimer(signal.ITIMER_REAL, chance.uniform(0.0001, 0.005))
            try:
                while True:
                    layer = chance.randrange(LAYERS)
                    with cache.lease(layer, range(EXPERTS)) as lease:
                        assert {float(slot["w"][0]) - 10 * layer for slot in lease.slots.values()} <= set(
                            range(EXPERTS)
                        )
            except TimeLimitError:
                pass
            lease.release()  # what an interrupt between two instructions of ours leaves is the user's own again
            for one in (cache, below):
                until(lambda one=one: not one._loading)  # type: ignore[misc]
                assert ends(lambda one=one: one.lease(0, [0]).release())  # type: ignore[misc]
                check(one)
    assert below.stats()["bytes"] == sum(source.expert_bytes[layer] for layer, _ in source.reads)


def test_a_read_that_fails_or_raises_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "qwen2_moe")
    expected, faults = decode(stock(folder)), [KeyboardInterrupt(), OSError(5, "I/O"), MemoryError(), SystemExit()]
    chance, left = random.Random(3), [0]

    def read(fd: int, buffers: Any, offset: int) -> int:
        left[0] -= 1
        if left[0] == 0:
            raise chance.choice(faults)
        return os.preadv(fd, buffers, offset)

    model: Any = load_with_expert_cache(folder, 0.2, reader=read, threads=2)
    for _ in range(20):
        left[0] = chance.randrange(1, 14)
        with suppress(KeyboardInterrupt, MemoryError, SystemExit, ExpertReadError):
            decode(model)
        left[0] = 0
        check(model.expert_cache)
        assert torch.equal(decode(model), expected)


def test_a_thread_that_waits_for_its_own_lost_lease_gets_it_back() -> None:
    source = Source()
    cache = ExpertCache(source, 2 * source.expert_bytes[2])
    kept = cache.lease(2, [0, 1])  # as if an interrupt had come before its `with`
    with cache.lease(2, [2, 3]) as lease:
        assert sorted(lease.slots) == [2, 3]
    cache.resize(source.expert_bytes[2])
    kept.release()
    check(cache)
    cache.lease(2, [4])  # nobody has it: another thread need not wait for it
    assert ends(lambda: cache.lease(2, [5]).release())
    check(cache)


def test_an_interrupt_reaches_a_lease_that_waits_for_others() -> None:
    source = Source()
    cache, go = ExpertCache(source, source.expert_bytes[2]), threading.Event()

    def hold() -> None:
        with cache.lease(2, [0]):
            assert go.wait(HANGS_S)

    thread = in_thread(hold)
    until(lambda: bool(cache._shares.pins))
    assert interrupted(lambda: cache.lease(2, [1]), 0.01) == 1
    go.set()
    thread.join(HANGS_S)
    check(cache)


def test_signals_wait_while_they_are_held_back_and_no_longer() -> None:
    came: list[str] = []
    with handler(signal.SIGINT, lambda *_: came.append("int")), handler(signal.SIGUSR1, lambda *_: came.append("usr")):
        with held_back():
            signal.raise_signal(signal.SIGINT)
            with held_back():
                signal.raise_signal(signal.SIGUSR1)
            assert came == []
            with let_through():
                assert came == ["int", "usr"]
                signal.raise_signal(signal.SIGINT)
                assert came.pop() == "int"
                with held_back():
                    signal.raise_signal(signal.SIGINT)
                    assert came == ["int", "usr"]
                assert came.pop() == "int"
            signal.raise_signal(signal.SIGINT)
        assert came == ["int", "usr", "int"]
        with held_back(), let_through():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN, "what somebody sets meanwhile stays"


def test_a_signal_that_raises_while_handlers_are_replaced_leaves_them_as_they_were(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def replace(number: int, new: Any) -> None:
        signal.signal(number, new)
        if number == signal.SIGUSR1 and new is not interrupt:
            signal.raise_signal(signal.SIGINT)

    with handler(signal.SIGINT, interrupt), handler(signal.SIGUSR1, interrupt):
        with monkeypatch.context() as patched:
            patched.setattr(interrupts, "_signals", SimpleNamespace(getsignal=signal.getsignal, signal=replace))
            with pytest.raises(KeyboardInterrupt):
                interrupts.hold()
        assert signal.getsignal(signal.SIGINT) is interrupt and signal.getsignal(signal.SIGUSR1) is interrupt
