"""Parts of `remoe watch` that need no engine: scales, addresses, messages, a server that is not there, the command."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from remoe_adapt.engines.llamacpp.client import Address, LoadedLora, ScaleMap, call, loaded_loras
from remoe_adapt.engines.llamacpp.process import ServerProcess, ServerSensors
from remoe_adapt.engines.llamacpp.watch import FamilyPoints
from remoe_adapt.errors import ConfigError, FamilyError, ServerDownError, ServerError
from remoe_adapt.family.family import Family

POINTS = ScaleMap(((0.25, 4), (0.5, 2), (1.0, 7)), others=((9, 0.3),))


@pytest.fixture(scope="module")
def shipped(repo_root: Path) -> Path:
    return repo_root / "examples" / "tiny_moe" / "family" / "trained"


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.22, 0.26, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_scales_add_up_to_what_the_family_interpolates(shipped: Path, strength: float) -> None:
    family = Family.load(shipped)
    scales = ScaleMap(tuple((point.strength, number) for number, point in enumerate(family.points)))
    name = next(iter(family.points[0].deltas))
    total = sum(scale * family.points[number].deltas[name] for number, scale in scales.scales(strength).items())
    assert isinstance(total, torch.Tensor)
    torch.testing.assert_close(total, family.deltas(strength)[name], atol=1e-6, rtol=1e-5)


def test_every_adapter_is_named_and_others_stay() -> None:
    assert POINTS.as_list(0.0) == [{"id": n, "scale": s} for n, s in ((2, 0.0), (4, 0.0), (7, 0.0), (9, 0.3))]
    assert POINTS.scales(0.75) == {2: 0.5, 4: 0.0, 7: 0.5, 9: 0.3}
    # A request may scale what is not the family's; the family's own are not its business.
    assert POINTS.as_list(0.125, {9: 1.0, 2: 5.0}) == [
        {"id": n, "scale": s} for n, s in ((2, 0.0), (4, 0.5), (7, 0.0), (9, 1.0))
    ]


@pytest.mark.parametrize("strength", [0.0, 0.1, 0.25, 0.3, 0.5, 0.9999, 1.0])
def test_a_strength_is_recognised_by_its_scales(strength: float) -> None:
    loras = [LoadedLora(n, "", float(torch.tensor(s))) for n, s in POINTS.scales(strength).items()]
    assert POINTS.strength_of(loras) == pytest.approx(strength, abs=1e-6)
    assert POINTS.matches(loras, strength) and not POINTS.matches(loras, (strength + 0.2) % 1)


def test_scales_of_no_strength_are_not_taken_for_one() -> None:
    at_start = [LoadedLora(number, "", 1.0) for number in (2, 4, 7, 9)]  # what --lora without a scale leaves
    assert POINTS.strength_of(at_start) is None
    assert POINTS.strength_of([LoadedLora(2, "", 0.5), *at_start[1:2], LoadedLora(7, "", 0.5)]) is None


def test_points_that_are_missing_or_twice_are_refused() -> None:
    loras = [LoadedLora(0, "s050.gguf", 0.0), LoadedLora(1, "other.gguf", 0.7), LoadedLora(2, "s100.gguf", 0.0)]
    names = {"s050.gguf": 0.5, "s100.gguf": 1.0}
    assert ScaleMap.of(loras, (0.5, 1.0), names.get) == ScaleMap(((0.5, 0), (1.0, 2)), ((1, 0.7),))
    with pytest.raises(ServerError, match=r"lacks the LoRA of strength 0\.25 .*--lora"):
        ScaleMap.of(loras, (0.25, 0.5, 1.0), names.get)
    with pytest.raises(ServerError, match="loaded twice"):
        ScaleMap.of([*loras, LoadedLora(3, "s050.gguf", 0.0)], (0.5, 1.0), names.get)
    with pytest.raises(ServerError, match="is it a llama-server"):
        loaded_loras({"error": 1})


def test_a_file_without_facts_is_known_by_its_name(shipped: Path, tmp_path: Path) -> None:
    points = FamilyPoints(str(shipped))
    assert points.strengths == (0.22, 0.3, 0.4, 0.7, 1.0)
    assert points.strength_of("/elsewhere/s022.gguf", None) == 0.22
    assert points.strength_of("style.gguf", tmp_path) is None
    with pytest.raises(FamilyError):
        FamilyPoints(str(tmp_path))


def test_a_lora_of_another_family_is_not_taken_for_a_point(shipped: Path, tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="GGUF files (extra: export)")
    points = FamilyPoints(str(shipped))
    for name, fingerprint, strength in (("a", points.fingerprint, 0.7), ("s070", "sha256:other", 0.7)):
        writer = gguf.GGUFWriter(tmp_path / f"{name}.gguf", "any")
        writer.add_string("remoe.fingerprint", fingerprint)
        writer.add_float32("remoe.strength", strength)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.close()
    assert points.strength_of("a.gguf", tmp_path) == 0.7
    assert points.strength_of("s070.gguf", tmp_path) is None


ODD = ["https://h:1", "http://h", "h", "http://u:p@h:1", "http://h:x", "http://h:1?q", "http://h:1/a b", "http://h:1/é"]


@pytest.mark.parametrize("url", [*ODD, "http://" + "h" * 70 + ":1", "http://a..b:1"])
def test_addresses_that_cannot_be_used_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="is not an address"):
        Address.parse(url)


def test_addresses() -> None:
    assert Address.parse("http://[::1]:80/api/") == Address("::1", 80, "/api")
    assert str(Address.parse("127.0.0.1:8080")) == "http://127.0.0.1:8080"


def test_a_server_elsewhere_or_nowhere() -> None:
    with pytest.raises(ConfigError, match="another machine"):
        ServerProcess(Address("192.0.2.1", 80))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        address = Address("127.0.0.1", taken.getsockname()[1])
        with pytest.raises(ServerDownError, match="does not answer"):
            call(address, "/health")
        process = ServerProcess(address)
        assert not process.find() and process.pid is None and "nothing listens" in process.why_unknown
        reading = ServerSensors(process).read(1.0)
        assert "nothing listens" in reading.missing["process"] and reading.value("memory.available")
        taken.listen()
        assert process.find() and process.pid == os.getpid()
        assert ServerSensors(process).read(2.0).value("process.private")


@pytest.mark.parametrize("pid", [-4, 1 << 40, 10**30])
def test_a_number_that_no_process_has_is_said(pid: int) -> None:
    with pytest.raises(ConfigError, match=f"no process {pid} runs here"):
        ServerProcess(Address("127.0.0.1", 80), pid)


def test_the_command_waits_for_its_server_and_ends_at_sigterm(shipped: Path) -> None:
    pytest.importorskip("aiohttp", reason="the proxy (extra: serve)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
        command = [sys.executable, "-m", "remoe_adapt", "watch", "--server", url, "--family", str(shipped)]
        command += ["--json", "--proxy", "127.0.0.1:0"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            first, second = (json.loads(process.stdout.readline()) for _ in range(2))
            process.send_signal(signal.SIGTERM)
            rest = process.stdout.read().splitlines()
        assert (first["event"], second["event"], json.loads(rest[-1])["event"]) == ("start", "down", "end")
        assert process.returncode == 0 and first["proxy_port"] > 0
