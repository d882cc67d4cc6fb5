"""What every serving engine owes the dial, asked of each of them: this process, a llama-server, a mapped file."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from llama_child import LlamaChild
from tiny_families import tiny_family
from tiny_models import tiny_model

from remoe_adapt.dial.engine import Engine, turn
from remoe_adapt.dial.events import SENSORS, Events, Target
from remoe_adapt.dial.load import profile_of
from remoe_adapt.dial.staging import Staging, State
from remoe_adapt.dial.swap import ResidentRouters
from remoe_adapt.engines.llamacpp.live import LlamaFile
from remoe_adapt.engines.llamacpp.prior.control import PriorControl
from remoe_adapt.engines.llamacpp.prior_engine import PriorEngine
from remoe_adapt.engines.llamacpp.process import FoundProcess
from remoe_adapt.engines.llamacpp.server import LlamaServer
from remoe_adapt.engines.llamacpp.watch import Watch, WatchOptions
from remoe_adapt.errors import ConfigError, DialError
from remoe_adapt.family.family import Family
from remoe_adapt.pressure.decide import Decision
from remoe_adapt.recency_settings import Recency
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.peft_compat import wrap_or_inject

MEMBERS: tuple[type[Engine], ...] = (Staging, LlamaServer, LlamaFile, PriorEngine)  # that is mypy's to judge


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Any:
    """The shipped model for llama.cpp: whole, split, and its family as LoRAs."""
    pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
    pytest.importorskip("gguf", reason="GGUF files (extra: export)")
    from gguf_writer import write_gguf
    from transformers import AutoModelForCausalLM

    from remoe_adapt.engines.gguf.lora import export_gguf_lora
    from remoe_adapt.engines.gguf.split import split_gguf

    folder, shipped = tmp_path_factory.mktemp("engines"), repo_root / "examples" / "tiny_moe"
    model = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    family = Family.load(shipped / "family" / "trained")
    gguf = write_gguf(model, "qwen2moe", folder / "model.gguf")
    rows = export_gguf_lora(gguf, family, folder / "loras")["loras"]
    first = split_gguf(gguf, family, 0.0, folder / "split" / "m.gguf")["out"]
    return gguf, [(Path(row["file"]), 0.0) for row in rows], Path(first), str(family.path)


@contextmanager
def transformers(request: pytest.FixtureRequest) -> Iterator[Engine]:
    model = tiny_model("qwen2_moe")
    family = Family.load(tiny_family(model, request.getfixturevalue("tmp_path") / "family").path)
    routers = ResidentRouters(wrap_or_inject(model, RemoeConfig(rank=1, inference_mode=True), "dial"), family)
    events = Events()
    yield Staging(routers, events)
    events.close()


@contextmanager
def llama_server(request: pytest.FixtureRequest) -> Iterator[Engine]:
    gguf, loras, _, family = request.getfixturevalue("files")
    with LlamaChild(gguf, loras, cache_prompt=False, cache_ram_mib=0) as child:
        yield Watch(child.url, family, profile_of(None), WatchOptions()).engine


@contextmanager
def mapped_file(request: pytest.FixtureRequest) -> Iterator[Engine]:
    *_, first, family = request.getfixturevalue("files")
    yield Watch(None, family, profile_of(None), WatchOptions(live=first)).engine


@contextmanager
def recency_prior(request: pytest.FixtureRequest) -> Iterator[Engine]:
    path = request.getfixturevalue("tmp_path") / "control"
    PriorControl.create(path).close()
    yield PriorEngine(FoundProcess(os.getpid), lambda pid: PriorControl(path), Recency.of("ema", 0.3))


ENGINES: tuple[Callable[[pytest.FixtureRequest], AbstractContextManager[Engine]], ...] = (
    transformers,
    llama_server,
    mapped_file,
    recency_prior,
)


@pytest.fixture(params=ENGINES, ids=lambda make: make.__name__)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with request.param(request) as made:
        yield made
        made.close()


def decided(strength: float, changed: bool) -> Decision:
    return Decision(
        strength=strength, changed=changed, pressure=strength, present=strength, cause="", why="told so", moves=(),
        budgets={}, signals={}, unusable={}, calm=False, floors={}, notes={},
    )  # fmt: skip


def test_what_is_posted_is_live_after_a_sync_and_stated(engine: Engine) -> None:
    assert engine.sync() and engine.target == 0.0 and engine.points[-1] == 1.0 and engine.takes_effect
    engine.post(Target(0.3))
    engine.post(Target(0.5, 0.6, "the latest wins"))
    assert engine.target == 0.5
    assert engine.sync()
    status = engine.status()
    assert (status["strength"], status["target"], status["ready"], status["closed"]) == (0.5, 0.5, True, False)
    assert status["engine"] == engine.name and status["points"] == list(engine.points)
    assert status["swaps"] == engine.swaps >= 1 and status["met"] == engine.met
    swaps = engine.swaps
    engine.post(Target(0.5, 0.7, "another reason"))
    assert engine.sync() and engine.swaps == swaps


@pytest.mark.parametrize("strength", [-0.1, 1.01, math.nan, math.inf, True, "0.5", None])
def test_a_strength_that_cannot_be_is_one_error_and_changes_nothing(engine: Engine, strength: Any) -> None:
    with pytest.raises(ConfigError, match="is out of range"):
        engine.post(Target(strength))
    assert engine.target == 0.0 and engine.sync() and engine.swaps == 0


def test_closing_puts_the_base_back_once_and_for_all(engine: Engine) -> None:
    engine.sync()
    engine.post(Target(1.0))
    assert engine.sync() and engine.status()["strength"] == 1.0
    assert engine.close() == 0.0
    swaps = engine.swaps
    assert engine.close() == engine.close(keep=True) == 0.0
    with pytest.raises(DialError, match="is closed"):
        engine.post(Target(0.5))
    engine.post(Target(0.5, by=SENSORS))
    engine.sync()
    status = engine.status()
    assert status["closed"] and not status["ready"] and engine.swaps == swaps and engine.target == 0.0


def test_an_engine_is_turned_by_decisions(engine: Engine) -> None:
    if isinstance(engine, Staging):
        engine.post(Target(0.0, by=SENSORS), unpin=True)
    engine.sync()
    turn(engine, decided(0.7, True))
    engine.sync()
    assert engine.target == engine.status()["strength"] == 0.7
    turn(engine, decided(0.2, False))
    assert engine.target == 0.7, "it was decided of another strength, which nobody has any more"


def test_sensors_that_stay_with_the_base_leave_a_server_as_it_is_found(files: Any) -> None:
    gguf, loras, _, family = files
    with LlamaChild(gguf, loras, cache_prompt=False, cache_ram_mib=0) as child:
        first, second = (Watch(child.url, family, profile_of(None), WatchOptions()).engine for _ in "12")
        first.post(Target(0.51))
        assert first.sync() and first.close(keep=True) == 0.51
        turn(second, decided(0.0, False))  # a sample before the server is met
        assert second.sync() and second.swaps == 0 and second.target == pytest.approx(0.51, abs=1e-4)
        turn(second, decided(second.target, False))
        assert second.sync() and second.swaps == 0


def test_a_swap_goes_through_its_states(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    with transformers(request) as engine:
        assert isinstance(engine, Staging) and engine.state is State.IDLE and engine.take() is None
        with engine.steps.forward():
            engine.post(Target(0.5))
            assert engine.state is State.STAGED and engine.strength == 0.0 and engine.status()["waiting"]
        assert engine.state is State.IDLE and engine.strength == 0.5

        def cut_short(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(torch, "_foreach_copy_", cut_short)
        with pytest.raises(KeyboardInterrupt):
            engine.post(Target(1.0))
        monkeypatch.undo()
        assert engine.state is State.SWAPPING
        with engine.steps.forward():
            engine.post(Target(0.5))  # which is said to be live, and may be half of it
            assert engine.state is State.SWAPPING and engine.waiting
        assert engine.state is State.IDLE and engine.swaps == 2
        engine.close()
        assert engine.state is State.CLOSED and not engine.waiting
