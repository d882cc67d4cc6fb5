"""`remoe serve MODEL.gguf`: a llama.cpp server with the recency prior in it, under the controller."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from remoe_adapt._support import printable
from remoe_adapt.cli import rules
from remoe_adapt.cli.options import CommandLines
from remoe_adapt.cli.watch import text_of, until_signalled
from remoe_adapt.recency_settings import Recency

_GAIN = 0.2
# Of the command, what concerns models in this process alone, and what GGUF files alone.
_OF_TRANSFORMERS = (
    "alias", "chat_template", "max_waiting", "max_body", "drain", "expert_cache", "storage", "arithmetic", "device",
    "dtype", "force",
)  # fmt: skip
_OF_GGUF = ("llama_server", "llama_options", "context_tokens", "slots", "threads", "interval")


def check_kind(values: Mapping[str, Any], defaults: Mapping[str, Any], gguf: bool) -> None:
    """Raises ConfigError for an option of `remoe serve` that does nothing for this kind of model."""
    rules.check_kind(values, defaults, _OF_TRANSFORMERS, _OF_GGUF, gguf=gguf, does="serves")


def serve_gguf(
    model: str,
    *,
    family: str | None,
    profile: str | None,
    host: str,
    port: int,
    api_key: str | None,
    pressure: float | None,
    strength: float | None,
    recency: str | None,
    recency_gain: float | None,
    recency_decay: float | None,
    log: Path | None,
    llama_server: Path | None,
    llama_options: list[str] | None,
    context_tokens: int | None,
    slots: int,
    threads: int | None,
    interval: float | None,
) -> CommandLines:
    """Events of the server until a signal; see `engines.llamacpp.serve`."""
    from remoe_adapt.dial import profile_of
    from remoe_adapt.engines.llamacpp import GgufServing, ServedGguf

    device = profile_of(profile)
    asked = recency is not None or recency_gain is not None or recency_decay is not None
    prior = Recency.of(recency, _GAIN if recency_gain is None else recency_gain, recency_decay) if asked else None
    options = GgufServing(
        recency=prior or device.recency, family=family, host=host, port=port, api_key=api_key,
        strength=device.strength_at(pressure) if pressure is not None else strength, context_tokens=context_tokens,
        parallel=slots, threads=threads, llama_server=llama_server, arguments=tuple(llama_options or ()),
        interval_s=interval, log=log,
    )  # fmt: skip
    with ServedGguf(model, device, options) as served, until_signalled(served.stop):
        began = {"event": "serving", "url": served.url, "model": Path(model).name, "pid": served.pid}
        yield began, f"{printable(began['model'])} at {served.url} (pid {served.pid}; OpenAI's API at /v1)"
        for event in served.events():
            yield event, text_of(event)
