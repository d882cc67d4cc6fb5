"""`remoe serve MODEL.gguf` and `remoe watch --gain`: strength as the gain of a prior inside llama.cpp's server."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from llama_answers import SAME
from waiting import until

pytest.importorskip("xllamacpp", reason="llama.cpp in this process (extra: llamacpp)")
pytest.importorskip("gguf", reason="GGUF files (extra: export)")
from gguf_writer import small_model, write_gguf
from preloaded import EXACT, OwnLoop, asked, control_of_server, running, served

from remoe_adapt.cli.serve import serve as serve_command
from remoe_adapt.cli.serve_gguf import check_kind, serve_gguf
from remoe_adapt.dial.events import Target
from remoe_adapt.dial.load import profile_of
from remoe_adapt.engines.gguf.routers import GgufModel
from remoe_adapt.engines.llamacpp.client import Address, call
from remoe_adapt.engines.llamacpp.prior.control import _CHECK, _COMMAND, PriorControl, check_of, control_of
from remoe_adapt.engines.llamacpp.prior_engine import PriorEngine
from remoe_adapt.engines.llamacpp.serve import GgufServing, ServedGguf
from remoe_adapt.engines.llamacpp.watch import Watch, WatchOptions
from remoe_adapt.errors import ConfigError, FamilyError, ServerDownError, ServerError
from remoe_adapt.family.family import Family, FamilyPoint
from remoe_adapt.recency_settings import Recency

PROMPT = list(range(10, 40))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(small_model("qwen3moe"), "qwen3moe", tmp_path_factory.mktemp("serve") / "model.gguf")


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[ServedGguf]:
    with served(model) as found:
        yield found


def test_the_command_serves_at_the_gain_of_its_strength_and_logs_it(model: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    speaking = serve_gguf(
        str(model), family=None, profile=None, host="127.0.0.1", port=0, api_key="secret", pressure=None, strength=0.5,
        recency="cost", recency_gain=1.2, recency_decay=None, recency_share=0.5, log=log, llama_server=None,
        llama_options=None,
        context_tokens=512, slots=2, threads=1, interval=0.01,
    )  # fmt: skip
    began, text = next(speaking)
    start, _ = next(speaking)
    assert began["event"] == "serving" and began["url"] in text
    assert (start["event"], start["mode"], start["gain"], start["strength"]) == ("start", "cost", 0.6, 0.5)
    address = Address.parse(began["url"])
    with pytest.raises(ServerError, match="401"):
        call(address, "/v1/completions", {"prompt": "a"})
    found = call(address, "/v1/completions", {"prompt": "a b", "max_tokens": 3}, api_key="secret")
    assert found["usage"]["completion_tokens"] == 3 and found["object"] == "text_completion"
    os.kill(began["pid"], 9)
    said = list(itertools.takewhile(lambda one: one["event"] != "started", (event for event, _ in speaking)))
    assert "SIGKILL" in next(one["reason"] for one in said if one["event"] == "died")
    call(address, "/v1/completions", {"prompt": "a b", "max_tokens": 2}, api_key="secret")
    speaking.close()
    with pytest.raises(ServerDownError):
        call(address, "/health")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {round(line["gain"], 6) for line in lines} == {0.0, 0.6}  # 0: what it was warmed up with


@pytest.mark.parametrize(
    ("given", "strength"), [({}, 1.0), ({"profile": "server"}, 0.0), ({"pressure": 0.0}, 0.0), ({"strength": 0.5}, 0.5)]
)
def test_a_gain_with_nothing_to_turn_it_by_is_held(model: Path, given: dict[str, Any], strength: float) -> None:
    options: dict[str, Any] = dict.fromkeys(
        ("family", "profile", "api_key", "pressure", "strength", "recency", "recency_decay", "recency_share", "log",
         "llama_server", "llama_options", "interval")
    )  # fmt: skip
    speaking = serve_gguf(
        str(model), **options | {"interval": 5.0} | given, host="127.0.0.1", port=0, recency_gain=1.2,
        context_tokens=512, slots=1, threads=1, page="off",
    )  # fmt: skip
    (began, text), (start, _) = next(speaking), next(speaking)
    speaking.close()
    assert (start["gain"], start["strength"]) == (1.2 * strength, strength)
    assert began["page"] is None and began["acts"] == ["recency prior (ema)"]
    if given:
        assert began["held"] is None
    else:
        assert began["held"].startswith("recency ema at gain 1.2 throughout") and began["held"] in text


def test_what_cannot_be_served_is_one_error(model: Path, tmp_path: Path) -> None:
    def made(path: Path, **options: Any) -> ServedGguf:
        return ServedGguf(path, profile_of(None), GgufServing(**{"recency": Recency.of("ema", 0.1), **options}))

    with pytest.raises(ConfigError, match="no GGUF file"):
        made(tmp_path / "missing.gguf")
    with pytest.raises(ConfigError, match="nothing to turn"):
        made(model, recency=None)
    with pytest.raises(ConfigError, match="are for --llama-server"):
        made(model, arguments=("--verbose",))
    with pytest.raises(ConfigError, match="no program that may be run"):
        made(model, llama_server=Path(os.__file__))
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(model.read_bytes()[:3000])
    with pytest.raises(ServerError, match="could not start"), made(broken, port=0):
        pass


def test_options_of_the_other_kind_of_model_are_refused() -> None:
    import inspect

    usual = {name: one.default for name, one in inspect.signature(serve_command).parameters.items()}
    check_kind(usual, serve_command, True)
    check_kind(usual, serve_command, False)
    with pytest.raises(ConfigError, match="--chat-template does nothing for a GGUF"):
        check_kind({**usual, "chat_template": Path("x")}, serve_command, True)
    with pytest.raises(ConfigError, match="--slots is for a GGUF"):
        check_kind({**usual, "slots": 4}, serve_command, False)


def test_watch_drives_a_running_server_by_its_environment_and_leaves_it_at_the_base(
    model: Path, server: ServedGguf
) -> None:
    assert server.pid is not None
    assert control_of(server.pid) == control_of_server(server).path
    for options in ({"pid": server.pid}, {"control": control_of_server(server).path}):
        watch = Watch(None, None, profile_of(None), WatchOptions(recency=Recency.of("ema", 0.8), **options))
        engine = watch.engine
        assert isinstance(engine, PriorEngine) and engine.sync()
        engine.post(Target(0.5))
        assert engine.sync()
        asked(server.port, PROMPT)
        assert engine.prior().gain == pytest.approx(0.4) and engine.swaps == 1
        assert engine.close() == 0.0
        asked(server.port, PROMPT)
        assert control_of_server(server).status().gain == 0.0
    with pytest.raises(ConfigError, match="was started without"):
        control_of(os.getpid())
    with pytest.raises(ConfigError, match="nothing to drive"):
        Watch(None, None, profile_of(None), WatchOptions())


def test_a_damaged_control_file_is_an_error_and_the_server_keeps_its_gain(model: Path) -> None:
    own = OwnLoop(model)
    with served(model) as server:
        control = control_of_server(server)
        control.command(Recency.of("ema", 1.5))
        one = asked(server.port, PROMPT)
        data = control.path.read_bytes()
        # A command that is torn, and one of nonsense with a good sum, leave the one before in force.
        nonsense = _COMMAND.pack(99, 1e9, 0.0, 0, 1, 1, 0, 0, 0.7, 0.0, *(0.0,) * 512)
        nonsense += _CHECK.pack(check_of(nonsense))
        control.path.write_bytes(data[:4096] + b"\xff" * 4096 + nonsense + data[8192 + len(nonsense) :])
        assert asked(server.port, PROMPT).answer == one.answer
        os.truncate(control.path, 100)
        again = asked(server.port, PROMPT)
        assert again.answer == one.answer and own.gap(again, [(0, 1.5)]) < SAME
        os.truncate(control.path, 100)
        with pytest.raises(ServerError, match="cut short"):
            control.status()
        with pytest.raises(ConfigError, match="cut short"):
            PriorControl(control.path)


def test_a_family_without_adapters_turns_the_gain_of_each_layer(model: Path, tmp_path: Path) -> None:
    own = OwnLoop(model)
    gains = tuple(0.5 * number for number in range(1, len(GgufModel(model).weights) + 1))
    family = Family.create(tmp_path / "family", "tiny", "sha256:0")
    family.add_points([FamilyPoint(1.0, None, {}, Recency.of("ema", gains))])
    options = GgufServing(
        recency=None, family=str(family.path), strength=0.5, port=0, threads=1, engine=EXACT, context_tokens=1024,
        interval_s=0.05,
    )  # fmt: skip
    halves: Any = tuple(gain / 2 for gain in gains)
    with ServedGguf(model, profile_of(None), options) as server, running(server):
        until(lambda: server.status()["gain"] == halves and control_of_server(server).gain() > 0)
        assert server.acts() == ("dial of " + "/".join(family.path.parts[-2:]), "recency prior (ema)")
        assert own.gap(asked(server.port, PROMPT), [(0, halves)]) < SAME
        server.hold(strength=0.0)
        until(lambda: control_of_server(server).gain() == 0)
        assert own.gap(asked(server.port, PROMPT), [(0, 0.0)]) < SAME
    with pytest.raises(ConfigError, match="recency prior alone: leave --recency"):
        ServedGguf(model, profile_of(None), replace(options, recency=Recency.of("ema", 0.1)))
    with pytest.raises(FamilyError, match=r"no LoRAs of it to be turned: `remoe serve MODEL\.gguf --family"):
        Watch("http://127.0.0.1:1", str(family.path), profile_of(None), WatchOptions())


def test_a_family_and_the_gain_are_turned_together(repo_root: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    shipped = repo_root / "examples" / "tiny_moe"
    loaded = AutoModelForCausalLM.from_pretrained(shipped, dtype=torch.float32)
    path = write_gguf(loaded, "qwen2moe", tmp_path / "model.gguf")
    options = GgufServing(
        recency=Recency.of("ema", 0.4), family=str(shipped / "family" / "trained"), strength=1.0, port=0, threads=1,
        engine=EXACT, context_tokens=1024, interval_s=0.05,
    )  # fmt: skip
    with ServedGguf(path, profile_of(None), options) as server, running(server):
        address = Address.parse(server.url)
        until(lambda: [one["scale"] for one in call(address, "/lora-adapters")][-1] == 1.0)
        until(lambda: control_of_server(server).gain() == pytest.approx(0.4))
        status = server.status()
        assert status["strength"] == 1.0 and status["gain"] == 0.4
