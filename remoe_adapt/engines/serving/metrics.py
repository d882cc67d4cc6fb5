"""`GET /metrics`: the dial's metrics, and the server's own counts, in Prometheus' text format; read at each scrape."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from remoe_adapt.dial import ControllerCollector, HasStatus
from remoe_adapt.engines.page import ServerStatus

_ENDS = ("answered", "refused", "failed", "left")
_GAUGES = ("running", "waiting")


class ServerMetrics:
    """The metrics of one server, in a registry of its own.

    controller: of its model; status: of the server.

    Raises MissingDependencyError without prometheus-client.
    """

    def __init__(self, controller: HasStatus, status: Callable[[], ServerStatus]) -> None:
        collector = ControllerCollector(controller)
        # After the collector, which says what to install where it is missing.
        from prometheus_client import CollectorRegistry, core

        self._core, self._status = core, status
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(collector)
        self._registry.register(self)

    def text(self) -> tuple[bytes, str]:
        """The metrics now, and their content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    def collect(self) -> Iterator[Any]:
        """Called by the registry at a scrape."""
        status, core = self._status(), self._core
        requests = asdict(status.requests)
        ends = core.CounterMetricFamily("remoe_requests", "Requests for tokens, by how they ended.", labels=["how"])
        for how in _ENDS:
            ends.add_metric([how], requests[how])
        yield ends
        for name in _GAUGES:
            yield core.GaugeMetricFamily(f"remoe_requests_{name}", f"Requests {name} now.", value=requests[name])
        yield core.CounterMetricFamily("remoe_tokens", "Tokens generated.", value=status.tokens)

    def describe(self) -> Iterator[Any]:
        """Called once, when registered; a registry without it would scrape to learn the names."""
        return iter(())
