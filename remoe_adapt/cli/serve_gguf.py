"""`remoe serve MODEL.gguf`: a llama.cpp server with the recency prior in it, under the controller."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from remoe_adapt._support import printable
from remoe_adapt.cli import rules
from remoe_adapt.cli.options import CommandLines, budget
from remoe_adapt.cli.watch import text_of, until_signalled
from remoe_adapt.errors import ConfigError
from remoe_adapt.recency_settings import Recency

_GAIN, _PAGE_HOST = 0.2, "127.0.0.1"
_HELD = "recency {mode} at gain {gain} throughout, since neither --profile nor --family says what turns it"
# Of the command, what concerns models in this process alone, and what GGUF files alone.
_OF_TRANSFORMERS = (
    "alias", "chat_template", "max_waiting", "max_body", "drain", "storage", "arithmetic", "device",
    "dtype", "force",
)  # fmt: skip
_OF_GGUF = ("llama_server", "llama_options", "context_tokens", "slots", "threads", "interval", "page")


def check_kind(values: Mapping[str, Any], command: Callable[..., object], gguf: bool) -> None:
    """Raises ConfigError for an option of `remoe serve` that does nothing for this kind of model."""
    rules.check_kind(values, command, _OF_TRANSFORMERS, _OF_GGUF, gguf=gguf, does="serves")


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
    recency_share: float | None,
    log: Path | None,
    llama_server: Path | None,
    llama_options: list[str] | None,
    context_tokens: int | None,
    slots: int,
    threads: int | None,
    interval: float | None,
    page: str | None = None,
    expert_cache: str | None = None,
) -> CommandLines:
    """Events of the server until a signal; see `engines.llamacpp.serve`."""
    from remoe_adapt.dial import profile_of
    from remoe_adapt.engines.llamacpp import GgufServing, ServedGguf

    device = profile_of(profile)
    asked = any(given is not None for given in (recency, recency_gain, recency_decay, recency_share))
    gain = _GAIN if recency_gain is None else recency_gain
    prior = Recency.of(recency, gain, recency_decay, recency_share) if asked else None
    # Whoever types a gain and nothing to turn it by wants that gain, not the none of a calm machine.
    held = prior is not None and profile is None and family is None and pressure is None and strength is None
    if held:
        strength = 1.0
    turned = prior or device.recency
    if turned is None and expert_cache not in (None, "off"):
        turned = Recency.of("ema", 0.0)  # experts are read ahead where the prior ranks them
    options = GgufServing(
        recency=turned, family=family, host=host, port=port, api_key=api_key,
        strength=device.strength_at(pressure) if pressure is not None else strength, context_tokens=context_tokens,
        parallel=slots, threads=threads, llama_server=llama_server, arguments=tuple(llama_options or ()),
        interval_s=interval, expert_cache=cache_of(expert_cache), page=page_at(page), log=log,
    )  # fmt: skip
    with ServedGguf(model, device, options) as served, until_signalled(served.stop):
        began = {
            "event": "serving", "url": served.url, "model": Path(model).name, "pid": served.pid,
            "page": served.page_url, "acts": list(served.acts()),
            "held": _HELD.format(mode=prior.mode, gain=_gains(prior)) if held and prior is not None else None,
        }  # fmt: skip
        where = "" if served.page_url is None else f", page at {served.page_url}"
        text = f"{printable(began['model'])} at {served.url} (pid {served.pid}; OpenAI's API at /v1{where})"
        yield began, text + (f": {began['held']}" if held else "")
        for event in served.events():
            yield event, text_of(event)


def cache_of(given: str | None) -> str | float | None:
    """The budget of `--expert-cache`: without it all experts that the machine leaves room for."""
    return 1.0 if given is None else None if given == "off" else budget(given)


def page_at(text: str | None) -> tuple[str, int | None] | None:
    """(host, port) of `--page`; None: no page. Raises ConfigError."""
    if text is None:
        return _PAGE_HOST, None
    if text == "off":
        return None
    host, colon, port = text.rpartition(":")
    if not (port.isascii() and port.isdecimal() and int(port) <= 65535) or (colon and not host):
        raise ConfigError(
            f"--page {printable(text)}: give a port, as 8001, a host and a port, as 0.0.0.0:8001, or off."
        )
    return host.strip("[]") or _PAGE_HOST, int(port)


def _gains(recency: Recency) -> str:
    listed = recency.gains()
    return f"{listed[0]:g}" if len(set(listed)) == 1 else f"{min(listed):g} to {max(listed):g}"
