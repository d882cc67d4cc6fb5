"""A controller's state as Prometheus metrics, read when a server scrapes them; extra: metrics.

Nothing is counted here: every scrape asks `controller.status()`, so decoding pays nothing between scrapes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any, Protocol

from remoe_adapt._support import check_extra
from remoe_adapt.errors import ConfigError

# Name, what it is, and where it is in the status.
_GAUGES = (
    ("remoe_strength", "Strength that is live, 0 (the base) to 1.", "strength"),
    ("remoe_target_strength", "Strength that is asked for.", "target"),
    ("remoe_pressure", "Pressure that the strength answers, 0 to 1.", "pressure"),
    ("remoe_generating", "Calls of generate that are running.", "running"),
)
_CACHE_GAUGES = (
    ("remoe_expert_cache_budget_bytes", "Bytes that slots may take.", "budget_bytes"),
    ("remoe_expert_cache_resident_bytes", "Bytes that slots take.", "resident_bytes"),
)
_LAYER_COUNTERS = (
    ("remoe_expert_cache_hits", "Look-ups that found their expert in a slot.", "hits"),
    ("remoe_expert_cache_misses", "Look-ups that had to read their expert.", "misses"),
    ("remoe_expert_cache_prefetch_hits", "Those of the hits that had been read ahead.", "prefetch_hits"),
    ("remoe_expert_cache_read_bytes", "Bytes read, those read ahead among them.", "bytes"),
    ("remoe_expert_cache_stall_seconds", "Seconds spent waiting for reads.", "stall_s"),
)


class HasStatus(Protocol):
    """What is shown: a controller."""

    def status(self) -> dict[str, Any]: ...


class ControllerCollector:
    """A collector for a registry of prometheus_client: `REGISTRY.register(ControllerCollector(model.controller))`."""

    def __init__(self, controller: HasStatus) -> None:
        self._core = _library().core
        self._controller = controller

    def collect(self) -> Iterator[Any]:
        """The metric families of one status; called by the registry, at a scrape."""
        status, core = self._controller.status(), self._core
        for name, text, key in _GAUGES:
            if status[key] is not None:
                yield core.GaugeMetricFamily(name, text, value=float(status[key]))
        yield core.CounterMetricFamily("remoe_swaps", "Swaps of the strength.", value=status["swaps"])
        cache = status["expert_cache"]
        if cache is None:
            return
        for name, text, key in _CACHE_GAUGES:
            yield core.GaugeMetricFamily(name, text, value=cache[key])
        for name, text, key in _LAYER_COUNTERS:
            family = core.CounterMetricFamily(name, text, labels=["layer"])
            for number, layer in enumerate(cache["layers"]):
                family.add_metric([str(number)], layer[key])
            yield family

    def describe(self) -> Iterator[Any]:
        """Called once, when registered."""
        # A registry without this method would scrape to learn the names, and ask the controller before it is ready.
        return iter(())


class MetricsServer:
    """Serves the metrics of a controller until it is called, or closed; `port` is the one it has."""

    def __init__(self, server: Any, thread: threading.Thread) -> None:
        self._server, self._thread = server, thread
        address, self.port = server.server_address[:2]
        self.url = f"http://{f'[{address}]' if ':' in address else address}:{self.port}/metrics"

    def close(self) -> None:
        """Serve no more; nothing when it does not."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    __call__ = close


def serve_metrics(controller: HasStatus, port: int = 9400, *, address: str = "127.0.0.1") -> MetricsServer:
    """Serve the controller's metrics at http://address:port/metrics from a daemon thread; calling what it returns ends
    it. port 0: any that is free, which is its `port` then.

    Raises MissingDependencyError without prometheus-client, ConfigError when the port cannot be had.
    """
    client = _library()
    # Not the global registry: two controllers of a process would collide in it.
    registry = client.CollectorRegistry(auto_describe=False)
    registry.register(ControllerCollector(controller))
    try:
        return MetricsServer(*client.start_http_server(port, addr=address, registry=registry))
    except (OSError, OverflowError) as error:
        raise ConfigError(f"metrics cannot be served at {address}:{port} ({error}): choose another port.") from error


def _library() -> Any:
    check_extra("prometheus_client", "metrics", "metrics need prometheus-client")
    import prometheus_client.core

    return prometheus_client
