"""`remoe watch` at a real llama-server: every answer is computed at one stated strength, through kills and pressure."""

from __future__ import annotations

import http.client
import itertools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_answers import Reference, ask, prompts
from llama_child import LlamaChild
from watched_server import Outcome, PlayedSensors, drive, quick

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import write_gguf
from transformers import AutoModelForCausalLM
from waiting import until

from remoe_adapt.bench.harness.memory_group import memory_group, why_no_groups
from remoe_adapt.dial.events import Target
from remoe_adapt.dial.load import profile_of
from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.engines.llamacpp.client import Address, call
from remoe_adapt.engines.llamacpp.proxy import DIALLED
from remoe_adapt.engines.llamacpp.watch import Watch, WatchOptions
from remoe_adapt.errors import ConfigError, ServerError
from remoe_adapt.family.family import Family

NO_CACHES = {"cache_prompt": False, "cache_ram_mib": 0}


class Files:
    """The shipped model as GGUF, its family as LoRAs that start at scale 0."""

    def __init__(self, folder: Path, shipped: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
        self.family_path = shipped / "family" / "trained"
        self.family = Family.load(self.family_path)
        self.model = write_gguf(model, "qwen2moe", folder / "model.gguf")
        rows = export_gguf_lora(self.model, self.family, folder / "loras")["loras"]
        self.loras = [(Path(row["file"]), 0.0) for row in rows]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Files:
    return Files(tmp_path_factory.mktemp("llama"), repo_root / "examples" / "tiny_moe")


@pytest.fixture(scope="module")
def reference(files: Files) -> Iterator[Reference]:
    with LlamaChild(files.model, files.loras, **NO_CACHES) as child:
        yield Reference(child.port, files.family)


@contextmanager
def watching(server: LlamaChild, files: Files, **options: Any) -> Iterator[tuple[Watch, PlayedSensors, list[Any]]]:
    """A watch that runs in a thread, its sensors played; ended, and its server left at the base, afterwards."""
    watch = Watch(server.url, str(files.family_path), quick(profile_of(None)), WatchOptions(**options))
    sensors, events = PlayedSensors(), []
    watch.governor.sensors = sensors

    started = threading.Thread(target=lambda: [events.append((time.monotonic(), e)) for e in watch.events()])
    started.start()
    try:
        until(lambda: bool(events) or not started.is_alive())
        yield watch, sensors, events
    finally:
        watch.stop()
        started.join(30)
    assert not started.is_alive()


def scales_of(server: LlamaChild) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call(Address.parse(server.url), "/lora-adapters")
    return found


def check_stated(outcome: Outcome, reference: Reference) -> set[float]:
    """Every answer is that of its header's strength. Returns the strengths."""
    wrong = [
        (begin, answer)
        for prompt, begin, _, answer in outcome.answers
        if answer.strength is None or not answer.same(reference.answer(prompt, answer.strength))
    ]
    assert not wrong, f"{len(wrong)} of {len(outcome.answers)} answers are not of their strength: {wrong[:3]}"
    return {answer.strength for *_, answer in outcome.answers if answer.strength is not None}


def check_in_force(outcome: Outcome, reference: Reference, set_at: list[tuple[float, float]]) -> int:
    """Every answer is that of one strength in force while it was asked for. Returns how many at another than 0."""
    wrong, dialled = [], 0
    for prompt, begin, end, answer in outcome.answers:
        # A server that was just started is at the base until it is met.
        before = [strength for when, strength in set_at if when <= begin]
        candidates = {0.0, *before[-2:], *(strength for when, strength in set_at if begin <= when <= end)}
        found = {s for s in candidates if answer.same(reference.answer(prompt, s))}
        dialled += bool(found) and 0.0 not in found
        if not found:
            wrong.append((begin, answer))
    assert not wrong, f"{len(wrong)} of {len(outcome.answers)} answers are of no strength in force: {wrong[:3]}"
    return dialled


def test_the_comparison_tells_strengths_apart(reference: Reference) -> None:
    for prompt in prompts(3):
        answers = [reference.answer(prompt, strength) for strength in (0.0, 0.25, 0.5, 1.0)]
        assert sum(a.same(b) for a in answers for b in answers) == len(answers)


def proxied(files: Files, reference: Reference, count: int, kills: int) -> tuple[Outcome, set[float]]:
    server = LlamaChild(files.model, files.loras, n_parallel=4)  # caches as they come
    with server, watching(server, files, proxy=("127.0.0.1", 0)) as (watch, sensors, _):
        assert watch.proxy is not None
        outcome = drive(server, watch.proxy.port, count, kills, met=lambda: watch.engine.met, pressure=sensors)
        assert watch.engine.met == kills + 1
    assert not outcome.unexcused(), outcome.unexcused()[:3]
    return outcome, check_stated(outcome, reference)


def direct(files: Files, reference: Reference, count: int, kills: int) -> tuple[Outcome, int]:
    server = LlamaChild(files.model, files.loras, n_parallel=4, cache_prompt=False)
    set_at: list[tuple[float, float]] = []
    with server, watching(server, files) as (watch, sensors, _):
        engine, post = watch.engine, watch.engine._send

        def noted(path: str, body: Any) -> Any:
            set_at.append((time.monotonic(), engine.target))
            return post(path, body)

        engine._send = noted  # type: ignore[method-assign]
        outcome = drive(server, server.port, count, kills, met=lambda: watch.engine.met, pressure=sensors)
        assert engine.met == kills + 1
    return outcome, check_in_force(outcome, reference, set_at)


def test_through_the_proxy_every_answer_is_of_the_strength_it_states(files: Files, reference: Reference) -> None:
    outcome, strengths = proxied(files, reference, 120, 2)
    assert len(outcome.answers) == 120 and len(strengths) >= 3


def test_without_a_proxy_every_answer_is_of_a_strength_in_force(files: Files, reference: Reference) -> None:
    outcome, dialled = direct(files, reference, 120, 2)
    assert len(outcome.answers) == 120 and dialled >= 10


@pytest.mark.slow
def test_a_thousand_requests_both_ways(files: Files, reference: Reference) -> None:
    outcome, strengths = proxied(files, reference, 1000, 2)
    assert len(outcome.answers) == 1000 and len(strengths) >= 10
    outcome, dialled = direct(files, reference, 1000, 2)
    assert len(outcome.answers) == 1000 and dialled >= 200


SQUEEZE = """name: squeezed
description: follows within tenths of a second
memory: {budget: null, reserve: 256MiB}
expert_cache: {budget: 0.25}
strength: {curve: [[0.0, 0.0], [1.0, 1.0]]}
controller: {sample_hz: 20, rise_s: 0.05, fall_s: 0.4, dwell_s: 0.1, deadband: 0.02, max_swaps_per_s: 10}
"""


@pytest.mark.slow
def test_a_thousand_requests_while_a_cgroup_is_squeezed(files: Files, reference: Reference, tmp_path: Path) -> None:
    """The command itself, its sensors, and memory that is really taken away from the server and given back."""
    if why := why_no_groups():
        pytest.skip(why)
    profile = tmp_path / "squeezed.yaml"
    profile.write_text(SQUEEZE)
    with memory_group("watch") as group, ExitStack() as ending:
        server = LlamaChild(files.model, files.loras, n_parallel=4, prefix=group.command([]))
        ending.enter_context(server)
        # What the server maps may be charged to whoever read it first: a neighbour makes the group worth squeezing.
        taken = "x = b'x' * (256 << 20); print(len(x), flush=True); import time; time.sleep(600)"
        neighbour = group.command([sys.executable, "-c", taken])
        held = ending.enter_context(subprocess.Popen(neighbour, stdout=subprocess.PIPE))
        ending.callback(held.kill)
        assert held.stdout is not None and held.stdout.readline()
        command = [sys.executable, "-m", "remoe_adapt", "watch", "--server", server.url, "--proxy", "127.0.0.1:0"]
        command += ["--family", str(files.family_path), "--profile", str(profile), "--json"]
        watch = ending.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        ending.callback(watch.terminate)
        assert watch.stdout is not None
        port = json.loads(watch.stdout.readline())["proxy_port"]
        over = threading.Event()

        def squeeze() -> None:
            for room in itertools.cycle((20, 1024, 30, 1024, 40)):
                with suppress(ConfigError):
                    group.limit(group.needed_bytes() + room * (1 << 20))
                if over.wait(1.0):
                    return

        squeezing = threading.Thread(target=squeeze)
        squeezing.start()
        try:
            outcome = drive(server, port, 1000, 2)
        finally:
            over.set()
            squeezing.join()
        watch.terminate()
        events = [json.loads(line) for line in watch.stdout]
    strengths = check_stated(outcome, reference)
    causes = {event["cause"] for event in events if event["event"] == "strength"}
    assert len(outcome.answers) == 1000 and not outcome.unexcused(), outcome.unexcused()[:3]
    assert len(strengths) >= 5 and causes - {""}, (strengths, causes)
    assert events[-1]["event"] == "end" and events[-1]["met"] == 3


def test_a_server_that_reuses_prompts_is_refused_with_the_flag(files: Files) -> None:
    with LlamaChild(files.model, files.loras, n_parallel=2) as server:
        watch = Watch(server.url, str(files.family_path), profile_of(None), WatchOptions())
        with pytest.raises(ServerError, match="--no-cache-prompt"):
            watch.once()
        reusing = Watch(
            server.url, str(files.family_path), profile_of(None),
            WatchOptions(proxy=("127.0.0.1", 0), reuse_prompts=True),
        )  # fmt: skip
        with pytest.raises(ServerError, match="--cache-ram 0"):
            reusing.engine.sync()
        assert all(one["scale"] == 0 for one in scales_of(server))
    with LlamaChild(files.model, files.loras, n_parallel=2, cache_ram_mib=0) as server:
        reusing.engine.address = Address.parse(server.url)
        reusing.process._address = reusing.engine.address
        reusing.engine._retry_s = -1.0
        assert reusing.engine.sync()


def test_missing_adapters_are_named(files: Files) -> None:
    with LlamaChild(files.model, files.loras[:2], **NO_CACHES) as server:
        watch = Watch(server.url, str(files.family_path), profile_of(None), WatchOptions())
        with pytest.raises(ServerError, match=r"lacks the LoRA of strength 0\.4, 0\.7, 1 .*--lora"):
            watch.engine.sync()


def test_scales_that_somebody_else_set_are_set_again(files: Files) -> None:
    with LlamaChild(files.model, files.loras, **NO_CACHES) as server:
        watch = Watch(server.url, str(files.family_path), profile_of(None), WatchOptions())
        assert watch.engine.sync() and watch.engine.target == 0.0
        watch.engine.post(Target(0.26))
        watch.engine.sync()
        assert [one["scale"] for one in scales_of(server)] == pytest.approx([0.5, 0.5, 0.0, 0.0, 0.0])
        call(Address.parse(server.url), "/lora-adapters", [{"id": 3, "scale": 1.0}])
        watch.engine._check_s = -1.0
        watch.engine.sync()
        assert [one["scale"] for one in scales_of(server)] == pytest.approx([0.5, 0.5, 0.0, 0.0, 0.0])
        # A watch that is started anew finds the strength where the last one left it.
        other = Watch(server.url, str(files.family_path), profile_of(None), WatchOptions(dry_run=True))
        other.engine.sync()
        assert other.engine.target == pytest.approx(0.26, abs=1e-4)
        other.engine.post(Target(0.9))
        other.engine.sync()
        assert other.engine.swaps == 0 and scales_of(server)[1]["scale"] == pytest.approx(0.5)


def post(port: int, path: str, body: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, json.dumps(body))
    answer = connection.getresponse()
    found = answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
    connection.close()
    return found


def test_routes_streams_and_refusals_of_the_proxy(files: Files) -> None:
    server = LlamaChild(files.model, files.loras, n_parallel=1)
    with server, watching(server, files, proxy=("127.0.0.1", 0), hold_s=0.2) as (watch, sensors, _):
        assert watch.proxy is not None
        port, address = watch.proxy.port, Address.parse(server.url)
        sensors.pressure = 0.61
        until(lambda: watch.engine.target == 0.61)
        # Between 0.4 and 0.7, the third and the fourth.
        wanted = {number: pytest.approx(scale, abs=1e-6) for number, scale in enumerate((0.0, 0.0, 0.3, 0.7, 0.0))}
        body = {"prompt": "a b", "input": "a b", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
        for path in sorted(DIALLED - {"/infill"}):  # this model has no tokens for it
            status, headers, text = post(port, path, {**body, "lora": [{"id": 0, "scale": 9.0}], "cache_prompt": True})
            if status == 404:
                continue  # an engine without this route
            assert status == 200 and headers["x-remoe-strength"] == "0.61", (path, text)
            (slot,) = call(address, "/slots")
            assert {one["id"]: one["scale"] for one in slot["params"]["lora"]} == wanted, path
        assert all(one["scale"] == 0 for one in scales_of(server))

        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        long = {"prompt": "a b", "n_predict": 40, "stream": True, "ignore_eos": True}
        connection.request("POST", "/completion", json.dumps(long))
        answer = connection.getresponse()
        assert answer.headers["x-remoe-strength"] == "0.61"
        pieces = [line for line in answer.read().split(b"\n\n") if line]
        assert len(pieces) > 2 and json.loads(pieces[-1].removeprefix(b"data: "))["stop"] is True
        connection.close()

        assert post(port, "/v1/messages", body)[0] == 501  # the engine drops `lora` there
        assert post(port, "/lora-adapters", {})[0] == 501
        assert post(port, "/tokenize", {"content": "a"})[0] == 200
        assert post(port, "/completion", {"lora": 3})[0] == 400
        assert call(Address("127.0.0.1", port), "/health") == {"status": "ok"}

        server.kill()
        status, headers, text = post(port, "/completion", body)
        assert status == 503 and headers["retry-after"] and "not ready" in json.loads(text)["error"]["message"]
        server.start()
        until(lambda: post(port, "/completion", body)[0] == 200)
        assert ask(port, prompts(1)[0]).strength is not None
