"""`remoe watch`: drives a running llama-server from this machine's pressure."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from remoe_adapt.cli import options as opt
from remoe_adapt.cli.app import app, lines
from remoe_adapt.cli.options import CommandLines, size_bytes
from remoe_adapt.errors import ConfigError
from remoe_adapt.recency_settings import Recency

_PROXY_HOLD_S = 30.0


@lines(app, "watch")
def watch(
    family: opt.WatchFamily = None, server: opt.Server = None, live: opt.Live = None, profile: opt.Profile = None,
    proxy: opt.ProxyAt = None, once: opt.Once = False, dry_run: opt.DryRun = False, interval: opt.Interval = None,
    pid: opt.ServerPid = None, hold: opt.Hold = _PROXY_HOLD_S, max_body: opt.MaxBody = None,
    reuse_prompts: opt.ReusePrompts = False, keep: opt.KeepPoint = False, api_key: opt.ApiKey = None,
    base: opt.GgufBase = None, gain: opt.WatchGain = None, recency: opt.Recency = None,
    recency_decay: opt.RecencyDecay = None, recency_share: opt.RecencyShare = None,
    control: opt.PriorFile = None, as_json: opt.JsonLines = False,
) -> CommandLines:  # fmt: skip
    """Turn the dial of a running llama-server by this machine's pressure.

    The server needs --no-cache-prompt and, for each file of `remoe export gguf-lora`, --lora-scaled FILE:0. With
    --proxy clients connect here instead, and prompt caches are no matter: every answer states its strength in the
    header x-remoe-strength. Runs until Ctrl-C or SIGTERM.

    With --live no server is asked: the routers in the first part of a split GGUF (`remoe export gguf --split`) are
    rewritten under whoever has it memory-mapped, which swaps in mid-generation, and put back at the end.

    With --gain the recency prior of a server that our library is preloaded into is turned, from 0 to that gain: with
    a family beside its LoRAs, without one alone. It acts from the server's next batch of tokens on.
    """
    from remoe_adapt.dial import profile_of
    from remoe_adapt.engines.llamacpp import Watch, WatchOptions

    if once and proxy is not None:
        raise ConfigError("--once sets a strength and goes, --proxy has to stay: give one of them.")
    if once and live is not None:
        raise ConfigError("--once goes, --live stays to put routers back: use `remoe export gguf --in-place` instead.")
    if reuse_prompts and proxy is None:
        raise ConfigError("--reuse-prompts is for --proxy; without it the server's prompt caches must be off.")
    if max_body is not None and proxy is None:
        raise ConfigError("--max-body is for --proxy, which takes the requests: give both or none.")
    options = WatchOptions(
        interval_s=interval, pid=pid, proxy=None if proxy is None else _listening(proxy), hold_s=hold,
        max_body_bytes=None if max_body is None else size_bytes(max_body, "--max-body"), reuse_prompts=reuse_prompts,
        dry_run=dry_run, keep=keep, api_key=api_key, live=live, base=base, control=control,
        recency=None if gain is None else Recency.of(recency, gain, recency_decay, recency_share),
    )  # fmt: skip
    watching = Watch(server, family, profile_of(profile), options)
    if once:
        event = watching.once()
        yield event, text_of(event)
        return
    with until_signalled(watching.stop):
        for event in watching.events():
            yield event, text_of(event)


def _listening(text: str) -> tuple[str, int]:
    from remoe_adapt.engines.llamacpp import Address

    host, _, port = text.rpartition(":")
    # Port 0 is the system's choice to listen on, but no address to connect to, so Address refuses it.
    if port == "0" and host:
        return host.strip("[]"), 0
    address = Address.parse(text)
    return address.host, address.port


@contextmanager
def until_signalled(stop: Any) -> Iterator[None]:
    # An exception could come in the middle of a request to the server; a stop is looked at between two samples.
    before = {number: signal.signal(number, lambda *_: stop()) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def text_of(event: Mapping[str, Any]) -> str:
    """An event of a watched server in one line."""
    kind = event["event"]
    if kind == "warning":
        return f"warning: {event['text']}"
    if kind in ("strength", "once"):
        how = "" if event.get("live", True) else " (dry run)"
        gain = f", gain {event['gain']:g}" if isinstance(event.get("gain"), float) else ""
        return f"strength {event['strength']:g}{gain}{how}: {event['reason']}"
    if kind == "died":
        return f"the server died: {event['reason']}; it is started again in {event['again_in_s']:g} s"
    if kind == "started":
        return f"the server runs again (pid {event['pid']}, start {event['starts']})"
    if kind == "blind":
        return f"warning: recency resident does nothing here: {event['reason']}"
    if kind == "uncached":
        return f"experts are not read ahead: {event['reason']}"
    if kind in ("down", "wrong"):
        return f"{kind}: {event['reason']}"
    if kind == "end":
        left = event["left_at"]
        what = "the file" if event["live_file"] else "the server"
        return f"end: {what} could not be asked" if left is None else f"end: {what} is left at strength {left:g}"
    where = f", proxy on port {event['proxy_port']}" if event.get("proxy_port") else ""
    return (
        f"{kind}: {event['live_file'] or event['server']} (pid {event['pid']}) at strength {event['strength']:g}{where}"
    )
