"""Metrics as a Prometheus server would read them, from a real controller over a real cache."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import tiny_family
from tiny_family import save_base, save_family
from tiny_models import tiny_model
from typer.testing import CliRunner

from remoe_adapt import get_remoe_model
from remoe_adapt.cli.app import app
from remoe_adapt.dial.prometheus import ControllerCollector, serve_metrics
from remoe_adapt.errors import ConfigError

client = pytest.importorskip("prometheus_client", reason="the extra `metrics` is not installed")


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def controller(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("metrics") / "base"
    base = tiny_model("qwen2_moe")
    base.save_pretrained(folder)
    model = get_remoe_model(folder, family=tiny_family(base, folder / "family"), expert_cache=0.5)
    model.controller.set_pressure(0.5)
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]))
    return model.controller


def scraped(port: int) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def test_a_scrape_shows_what_the_controller_says(controller: Any, unused_port: int) -> None:
    close = serve_metrics(controller, unused_port)
    try:
        found, status = scraped(unused_port), controller.status()
    finally:
        close()
    assert found["remoe_strength"] == found["remoe_target_strength"] == found["remoe_pressure"] == 0.5
    assert found["remoe_swaps_total"] == status["swaps"] == 1
    cache = status["expert_cache"]
    assert found["remoe_expert_cache_budget_bytes"] == cache["budget_bytes"]
    for number, layer in enumerate(cache["layers"]):
        assert found[f'remoe_expert_cache_misses_total{{layer="{number}"}}'] == layer["misses"] > 0
        assert found[f'remoe_expert_cache_read_bytes_total{{layer="{number}"}}'] == layer["bytes"] > 0
    with pytest.raises(OSError, match="refused"):
        scraped(unused_port)


def test_counters_move_and_a_registry_of_the_users_works(controller: Any) -> None:
    registry = client.CollectorRegistry()
    registry.register(ControllerCollector(controller))
    before = registry.get_sample_value("remoe_expert_cache_hits_total", {"layer": "0"})
    controller.set_pressure(None)
    assert registry.get_sample_value("remoe_expert_cache_hits_total", {"layer": "0"}) == before
    assert registry.get_sample_value("remoe_swaps_total") == 2
    controller.set_pressure(0.5)


def test_a_port_in_use_is_one_clear_error(controller: Any, unused_port: int) -> None:
    close = serve_metrics(controller, unused_port)
    try:
        with pytest.raises(ConfigError, match=f"{unused_port}.*choose another port"):
            serve_metrics(controller, unused_port)
    finally:
        close()
    with pytest.raises(ConfigError, match="choose another port"):
        serve_metrics(controller, 99999)


def test_any_free_port_is_told(controller: Any) -> None:
    first, second = serve_metrics(controller, 0), serve_metrics(controller, 0)
    try:
        assert 0 < first.port != second.port > 0 and str(second.port) in second.url
        with urllib.request.urlopen(second.url, timeout=10) as answer:
            assert b"remoe_strength" in answer.read()
        assert scraped(first.port)["remoe_strength"] == 0.5
    finally:
        first.close()
        second()
    second.close()


def test_remoe_run_says_which_port_it_got(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    save_family(base, tmp_path / "family", (1.0,), control=False)
    options = ["--family", str(tmp_path / "family"), "--prompt", "Once", "--max-new-tokens", "2", "--metrics-port", "0"]
    ended = CliRunner().invoke(app, ["run", str(tmp_path / "base"), *options, "--json"])
    assert ended.exit_code == 0, ended.output
    url = json.loads(ended.stdout)["metrics_url"]
    assert re.fullmatch(r"http://127\.0\.0\.1:[1-9]\d*/metrics", url) and f"metrics: {url}\n" in ended.stderr
