"""A `ServerStatus` in Prometheus' text format, under the names that the transformers engine has for the same things.

Written here rather than by prometheus-client, which is an extra: the format is a few lines of text
(https://prometheus.io/docs/instrumenting/exposition_formats/).
"""

from __future__ import annotations

from dataclasses import asdict

from remoe_adapt.engines.page.status import ServerStatus

METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# Name, kind, what it is, and where it is in the status.
_METRICS = (
    ("remoe_strength", "gauge", "Strength that is live, 0 (the base) to 1.", "strength"),
    ("remoe_target_strength", "gauge", "Strength that is asked for.", "target"),
    ("remoe_pressure", "gauge", "Pressure that the strength answers, 0 to 1.", "pressure"),
    ("remoe_recency_gain", "gauge", "Gain of the recency prior.", "gain"),
    ("remoe_swaps_total", "counter", "Swaps of the strength.", "swaps"),
    ("remoe_tokens_total", "counter", "Tokens generated.", "tokens"),
    ("remoe_read_bytes_total", "counter", "Bytes that the engine read from storage.", "read_bytes"),
    ("remoe_requests_running", "gauge", "Requests running now.", "requests.running"),
    ("remoe_requests_waiting", "gauge", "Requests waiting now.", "requests.waiting"),
    (
        "remoe_process_bytes",
        "gauge",
        "Memory of the engine's processes, mapped files among it.",
        "memory.process_bytes",
    ),
    ("remoe_available_bytes", "gauge", "Memory of the machine that is free.", "memory.available_bytes"),
)


def metrics_text(status: ServerStatus) -> bytes:
    """All that the status knows; what it does not know is left out, as a gauge without a value would be a 0."""
    found = asdict(status)
    lines = [
        "# HELP remoe_up Whether the engine runs.",
        "# TYPE remoe_up gauge",
        f"remoe_up {int(status.state != 'down')}",
    ]
    for name, kind, what, path in _METRICS:
        value = found
        for part in path.split("."):
            value = value[part]
        if value is not None:
            lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}", f"{name} {value}"]
    return ("\n".join(lines) + "\n").encode()
