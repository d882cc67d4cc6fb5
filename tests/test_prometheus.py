"""Metrics as a Prometheus server would read them, from a real controller over a real cache."""

from __future__ import annotations

import socket
import urllib.request
from typing import Any

import pytest
import torch
from tiny_families import tiny_family
from tiny_models import tiny_model

from remoe_adapt import get_remoe_model
from remoe_adapt.errors import ConfigError
from remoe_adapt.runtime.prometheus import ControllerCollector, serve_metrics

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
