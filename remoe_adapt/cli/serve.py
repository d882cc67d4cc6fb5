"""`remoe serve`: an OpenAI-compatible server with the dial."""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from remoe_adapt._support import check_appendable, check_extra, printable
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import rules
from remoe_adapt.cli.app import app, lines
from remoe_adapt.cli.options import CommandLines, size_bytes
from remoe_adapt.cli.report import quiet_libraries
from remoe_adapt.cli.run import base_for
from remoe_adapt.cli.serve_gguf import check_kind, serve_gguf
from remoe_adapt.cli.watch import until_signalled
from remoe_adapt.errors import ConfigError

_PORT, _WAITING, _DRAIN_S, _MAX_BODY = 8000, 64, 30.0, "4MiB"
_MAX_TEMPLATE_BYTES = 1 << 20
# What transformers' serving imports, and what the server and its metrics need.
_MODULES = ("fastapi", "openai", "starlette", "uvicorn", "prometheus_client")


@lines(app, "serve")
def serve(
    model: opt.ServeModel, family: opt.FamilyPath = None, profile: opt.Profile = None,
    host: opt.Host = "127.0.0.1", port: opt.Port = _PORT, api_key: opt.ServeKey = None, alias: opt.Alias = None,
    chat_template: opt.ChatTemplate = None, max_waiting: opt.MaxWaiting = _WAITING,
    max_body: opt.ServeBody = _MAX_BODY, drain: opt.Drain = _DRAIN_S,
    pressure: opt.Pressure = None, strength: opt.Strength = None,
    recency: opt.Recency = None, recency_gain: opt.ServeGain = None, recency_decay: opt.RecencyDecay = None,
    recency_share: opt.RecencyShare = None,
    expert_cache: opt.ExpertCacheBudget = None, storage: opt.Storage = None, arithmetic: opt.Arithmetic = "auto",
    llama_server: opt.LlamaServerProgram = None, llama_options: opt.LlamaOptions = None,
    context_tokens: opt.ContextTokens = None, slots: opt.Slots = 1, threads: opt.EngineThreads = None,
    interval: opt.Interval = None, page: opt.PageAt = None,
    log: opt.Log = None, device: opt.Device = None, dtype: opt.Dtype = "auto", force: opt.Force = False,
    as_json: opt.JsonLines = False,
) -> CommandLines:  # fmt: skip
    """Serve a model to OpenAI's clients, with the dial on: chat, completions, responses, streaming.

    Every answer states the strength it was computed at: in the header x-remoe-strength and in usage.remoe. A request
    may pin one: {"remoe": {"strength": 0.5}} in its body, or that header. A page that shows strength, pressure, hit
    rate, speed and memory is at /, the same as JSON at /remoe/status, metrics for Prometheus at /metrics.

    One line for each request; runs until Ctrl-C or SIGTERM, then finishes the answer under way.

    A GGUF file is served by llama.cpp's own server (the pinned wheel's, or --llama-server) with the recency prior
    preloaded: the gain is turned while tokens are computed, no request is touched, and --log says which positions of
    which slot had which gain. Experts are read from the file as soon as their ids are known, and those of most use stay
    in memory (--expert-cache SIZE, SHARE or off; by default as many as the machine leaves room for). The gain is held
    as it is given, unless --profile or --family says what turns it; the page, status and metrics are on a port of their
    own (--page).
    """
    given = dict(locals())
    from remoe_adapt.checkpoints import is_gguf

    gguf = is_gguf(model) or llama_server is not None
    check_kind(given, serve, gguf)
    if gguf:
        if log is not None:
            check_appendable(log, "--log")
        yield from serve_gguf(**rules.passed_on(given, serve_gguf))
        return
    for module in _MODULES:
        check_extra(module, "serve", "remoe serve needs what transformers' own serving needs")
    max_body_bytes, template = size_bytes(max_body, "--max-body"), _template(chat_template)
    if log is not None:
        check_appendable(log, "--log")
    from remoe_adapt.checkpoints import load_tokenizer
    from remoe_adapt.dial import get_remoe_model
    from remoe_adapt.engines.page import is_loopback
    from remoe_adapt.engines.serving import AppOptions, Server, ServingApp

    quiet_libraries()
    name = model_name(model)
    options = AppOptions(
        api_key=api_key, max_body_bytes=max_body_bytes, max_waiting=max_waiting, aliases=(model, *(alias or ())),
        any_host=not is_loopback(host),
    )  # fmt: skip
    tokenizer = load_tokenizer(model)
    if template is not None:
        tokenizer.chat_template = template
    base = base_for(model, profile, expert_cache, storage, arithmetic, device, dtype)
    dialled = get_remoe_model(
        base, profile=profile, family=family, recency=recency, recency_gain=recency_gain, recency_decay=recency_decay,
        recency_share=recency_share, force=force,
    )  # fmt: skip
    controller = dialled.controller
    said: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    try:
        controller.log_to(log)
        if pressure is not None:
            controller.set_pressure(pressure)
        if strength is not None:
            controller.set_strength(strength)
        served = ServingApp(dialled, tokenizer, name, options, said.put)
        server = Server(served, host=host, port=port, drain_s=drain)
        with until_signalled(lambda: said.put(None)):
            server.start()
            began = {"event": "serving", "url": server.url, "model": name, "acts": list(served.acts())}
            try:
                yield began, text_of(began)
                yield from spoken(iter(said.get, None))
            finally:
                server.stop()
            yield from spoken(_rest(said))
        end = {"event": "end", "requests": served.status().to_json()["requests"], "tokens": served.status().tokens}
        yield end, text_of(end)
    finally:
        controller.close()


def model_name(model: str) -> str:
    """The id in requests: a hub id as it is, of a folder or file its name."""
    path = Path(model).expanduser()
    return path.resolve().name or model if path.exists() else model


def spoken(events: Iterator[dict[str, Any] | None]) -> CommandLines:
    """Events with what is said of them."""
    for event in events:
        if event is not None:
            yield event, text_of(event)


def _rest(said: queue.SimpleQueue[dict[str, Any] | None]) -> Iterator[dict[str, Any] | None]:
    """What came while the server ended; several signals may have been among it."""
    while not said.empty():
        yield said.get()


def _template(path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_TEMPLATE_BYTES + 1)
        if len(data) > _MAX_TEMPLATE_BYTES:
            raise ConfigError(f"--chat-template {printable(path)} has more than 1 MiB: it is no template.")
        return data.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {printable(path)} cannot be read ({error}): give a Jinja file.") from error


def text_of(event: Mapping[str, Any]) -> str:
    """An event of a server in one line."""
    kind = event["event"]
    if kind == "serving":
        return f"{event['model']} at {event['url']} (page at /, OpenAI's API at /v1): {'; '.join(event['acts'])}"
    if kind == "end":
        return f"end: {event['requests']['answered']} requests answered, {event['tokens']} tokens"
    what = f"{event['route']} {event['how']}"
    if event.get("tokens"):
        low, high = event["strength_min"], event["strength_max"]
        at = (
            f"strength {low:g}" if low == high else f"strengths {low:g} to {high:g}, {event['strength']:.2f} on average"
        )
        what += f": {event['tokens']} tokens at {at}{' (pinned)' if event['pinned'] else ''}"
        if event["hit_rate"] is not None:
            what += f", hit rate {event['hit_rate']:.1%}"
    if event.get("error"):
        what += f": {printable(event['error'])}"
    return f"{what}, {event['seconds']:.2f} s"
