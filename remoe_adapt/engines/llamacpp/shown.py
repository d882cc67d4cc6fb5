"""What a served GGUF shows of itself: the status that the page draws, from the watch, the process and its own counters.

The server is asked for its counters (`/metrics`, `/slots`), which it answers between two batches of tokens, and only
when somebody looks.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from remoe_adapt.engines.llamacpp.client import Address, call, fetched
from remoe_adapt.engines.llamacpp.watch import Watch
from remoe_adapt.engines.page import Counters, Rates, RequestCounts, ServerStatus, memory_of
from remoe_adapt.errors import ServerError

_ASKED_EVERY_S, _ANSWER_S = 0.5, 2.0
_METRIC = re.compile(r"^llamacpp:(\w+) ([0-9.eE+-]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """Of one process since its start: tokens generated, requests now; None where it does not say. ready: it has
    answered, so that its model is loaded."""

    tokens: int | None = None
    running: int | None = None
    waiting: int | None = None
    read_bytes: int | None = None
    ready: bool = False


class Shown:
    """Puts a status together, from any thread.

    watch: of the server. server_pid: its process now. detail: its own status. acts, model: as the status has them.
    address, api_key: of the server.
    """

    def __init__(
        self,
        watch: Watch,
        server_pid: Callable[[], int | None],
        detail: Callable[[], dict[str, Any]],
        *,
        model: str,
        acts: tuple[str, ...],
        address: Address,
        api_key: str | None,
    ) -> None:
        self._watch, self._server_pid, self._detail = watch, server_pid, detail
        self._model, self._acts, self._address, self._api_key = model, acts, address, api_key
        self._began_s, self._rates = time.monotonic(), Rates()
        self._lock = threading.Lock()
        self._pid: int | None = None
        # Sums of the processes before, and what this one said last and when.
        self._before_tokens, self._before_bytes = 0, 0
        self._sums: dict[str, tuple[int, int]] = {}
        self._now, self._asked_s = ServerCounters(), -1.0

    def status(self) -> ServerStatus:
        """What holds now."""
        watch, pid = self._watch, self._server_pid()
        with self._lock:
            found = self._counters(pid)
            tokens = self._before_tokens + (found.tokens or 0)
            read_bytes = None if found.read_bytes is None else self._before_bytes + found.read_bytes
        detail = self._told()
        cache = detail.get("prior", {})
        has_cache = cache.get("ahead") == "on"
        hits, misses = (self._sum(cache, name) if has_cache else None for name in ("ahead_hits", "ahead_misses"))
        engine, decision, prior = watch.engine.status(), watch.decision, watch.prior
        strength = engine["strength"]
        gain = None
        if prior is not None and strength is not None:
            gains = prior.gain_at(strength)
            gain = sum(gains) / len(gains) if isinstance(gains, tuple) else gains
        return ServerStatus(
            engine="llama.cpp",
            model=self._model,
            # A server whose prior is off serves all the same; the reason says what is wrong.
            state="down" if pid is None else "ready" if found.ready else "starting",
            acts=(*self._acts, "expert cache") if has_cache else self._acts,
            uptime_s=time.monotonic() - self._began_s,
            strength=strength,
            target=watch.engine.target,
            pressure=None if decision is None else decision.pressure,
            pinned=watch.pinned,
            reason=watch.down or ("" if decision is None else decision.reason),
            swaps=engine["swaps"],
            points=tuple(engine["points"]),
            recency=None if prior is None else prior.recency.mode,
            gain=gain,
            read_bytes=read_bytes,
            tokens=tokens,
            requests=RequestCounts(found.running, found.waiting, None, None, None, None),
            memory=memory_of([] if pid is None else [pid], cache["held_bytes"] if has_cache else None),
            last=None,
            detail=detail,
            **self._rates.now(Counters(tokens, hits, misses, read_bytes)),
        )

    def _sum(self, found: dict[str, Any], name: str) -> int:
        """A counter that each process begins at 0, over all of them."""
        with self._lock:
            before, last = self._sums.get(name, (0, 0))
            if found[name] < last:
                before += last
            self._sums[name] = before, found[name]
        return before + int(found[name])

    def _told(self) -> dict[str, Any]:
        try:
            return self._detail()
        except ServerError as error:  # a control file that somebody has damaged
            return {"error": str(error)}

    def _counters(self, pid: int | None) -> ServerCounters:
        if pid != self._pid:
            self._before_tokens += self._now.tokens or 0
            self._before_bytes += self._now.read_bytes or 0
            self._pid, self._now, self._asked_s = pid, ServerCounters(), -1.0
        if pid is None:
            return ServerCounters()
        if time.monotonic() - self._asked_s >= _ASKED_EVERY_S:
            self._now = self._asked(pid, self._now)
            self._asked_s = time.monotonic()
        return self._now

    def _asked(self, pid: int, last: ServerCounters) -> ServerCounters:
        tokens, running, waiting, read_bytes = last.tokens, last.running, last.waiting, last.read_bytes
        with suppress(psutil.Error, OSError, AttributeError):  # no such counter on this system, or not for us
            read_bytes = int(psutil.Process(pid).io_counters().read_bytes)
        ready = last.ready
        with suppress(ServerError, KeyError, TypeError):
            ready = (
                ready or call(self._address, "/health", api_key=self._api_key, timeout_s=_ANSWER_S)["status"] == "ok"
            )
        with suppress(ServerError, ValueError, KeyError, TypeError, OverflowError):
            text = fetched(self._address, "/metrics", api_key=self._api_key, timeout_s=_ANSWER_S)
            said = dict(_METRIC.findall(text))
            running, waiting = int(float(said["requests_processing"])), int(float(said["requests_deferred"]))
            done = int(float(said["tokens_predicted_total"]))
            # They are counted when their answer is done; those under way are in the slots.
            slots = call(self._address, "/slots", api_key=self._api_key, timeout_s=_ANSWER_S)
            under_way = sum(_decoded(slot) for slot in slots if slot["is_processing"])
            # Between the two questions an answer may have ended.
            tokens = max(done + under_way, last.tokens or 0)
        return ServerCounters(tokens, running, waiting, read_bytes, ready)


def _decoded(slot: dict[str, Any]) -> int:
    found = slot.get("next_token") or []
    return sum(int(one["n_decoded"]) for one in (found if isinstance(found, list) else [found]))
