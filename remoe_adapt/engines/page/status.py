"""`GET /remoe/status`: one JSON object, the same keys for every engine, which the page at `/` draws.

    {"version": 1, "engine": "transformers", "model": "tiny_moe", "state": "ready", "acts": ["dial", "expert cache"],
     "time_s": 1732.5, "uptime_s": 12.5, "strength": 0.3, "target": 0.3, "pressure": 0.4, "pinned": false,
     "reason": "...", "swaps": 3, "points": [0.22, 0.3], "recency": null, "gain": null, "hit_rate": 0.91,
     "read_bytes": 1048576, "read_mib_per_s": 1.5, "tokens": 321, "tokens_per_s": 14.2,
     "requests": {"running": 1, "waiting": 0, "answered": 9, "refused": 1, "failed": 0, "left": 2},
     "memory": {"process_bytes": 1, "available_bytes": 1, "total_bytes": 1, "cache_bytes": 1, "cache_budget_bytes": 1},
     "last": {"id": "...", "strength": 0.3, "tokens": 12, "seconds": 0.8}, "detail": {...}}

Keys are added, never renamed or taken away, while `version` stays. What an engine cannot know is null. `detail` is the
engine's own status and may change with it: nothing on the page is drawn from there.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import psutil

STATUS_ROUTE = "/remoe/status"
VERSION = 1
_WINDOW_S, _LEAST_GAP_S = 10.0, 0.25


@dataclass(frozen=True, slots=True)
class RequestCounts:
    """Requests for tokens since the server began; None for what an engine does not count.

    running: being computed now.
    waiting: in the queue.
    answered: done.
    refused: answered with an error of the client's (4xx), or because the queue was full or the server was ending.
    failed: answered with an error of the server's, or broken off by one.
    left: whose client went first.
    """

    running: int | None = 0
    waiting: int | None = 0
    answered: int | None = 0
    refused: int | None = 0
    failed: int | None = 0
    left: int | None = 0


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes, None where it cannot be known.

    process_bytes: resident in the processes of the engine, mapped files among them.
    available_bytes, total_bytes: of the machine.
    cache_bytes, cache_budget_bytes: what the expert cache holds, and may hold.
    """

    process_bytes: int | None = None
    available_bytes: int | None = None
    total_bytes: int | None = None
    cache_bytes: int | None = None
    cache_budget_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStatus:
    """What `GET /remoe/status` says; see the head of this file.

    engine: "transformers" or "llama.cpp".
    model: the id that requests name.
    state: "starting", "ready", "draining" (ends when the last answer is done) or "down" (its engine is gone).
    acts: what changes the choice of experts or where they lie, in words, as "dial", "recency prior (resident)",
        "expert cache".
    uptime_s: since the server began.
    strength: live now; target: asked for, or None; pressure: what `target` answers, None where a strength was set by
        hand; pinned: held by a hand or a request; reason: in words, why the strength is what it is.
    swaps: how often strength or gain was set.
    points: strengths that were trained, rising.
    recency: the prior's mode, None without one; gain: its mean live gain.
    hit_rate: of expert look-ups over the last seconds, or since the start where nothing ran lately.
    read_bytes: that were read from storage since the start; read_mib_per_s: over the last seconds.
    tokens: generated since the start; tokens_per_s: over the last seconds, None when nothing ran.
    last: of the last answer: id, strength (mean over its tokens), tokens, seconds, and what else the engine knows.
    detail: the engine's own status.
    """

    engine: str
    model: str
    state: str
    acts: tuple[str, ...] = ()
    uptime_s: float = 0.0
    strength: float | None = None
    target: float | None = None
    pressure: float | None = None
    pinned: bool = False
    reason: str = ""
    swaps: int = 0
    points: tuple[float, ...] = ()
    recency: str | None = None
    gain: float | None = None
    hit_rate: float | None = None
    read_bytes: int | None = None
    read_mib_per_s: float | None = None
    tokens: int = 0
    tokens_per_s: float | None = None
    requests: RequestCounts = field(default_factory=RequestCounts)
    memory: Memory = field(default_factory=Memory)
    last: dict[str, Any] | None = None
    detail: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The object, with `version` and `time_s` (seconds since the epoch, of this call)."""
        return {"version": VERSION, "time_s": time.time(), **asdict(self)}


@dataclass(frozen=True, slots=True)
class Counters:
    """Sums since the start, which only rise; None for what the engine does not count."""

    tokens: int = 0
    hits: int | None = None
    misses: int | None = None
    read_bytes: int | None = None


class Rates:
    """Rates over the last seconds from counters that only rise, for any number of readers. Any thread may ask.

    window_s: how long a look back counts.
    """

    def __init__(self, window_s: float = _WINDOW_S) -> None:
        self._window_s = window_s
        self._lock = threading.Lock()
        self._seen: deque[tuple[float, Counters]] = deque()

    def now(self, counters: Counters, now_s: float | None = None) -> dict[str, float | None]:
        """`tokens_per_s`, `hit_rate` and `read_mib_per_s` of a `ServerStatus`, all None before anything rose.

        now_s: of a monotonic clock; None: now.
        """
        now_s = time.monotonic() if now_s is None else now_s
        with self._lock:
            # A sample a call would let one reader who asks often push out what another one measures against.
            if not self._seen or now_s - self._seen[-1][0] >= _LEAST_GAP_S:
                self._seen.append((now_s, counters))
            while len(self._seen) > 1 and now_s - self._seen[0][0] > self._window_s:
                self._seen.popleft()
            then_s, then = self._seen[0]
        seconds = now_s - then_s
        tokens = counters.tokens - then.tokens
        read = _grown(counters.read_bytes, then.read_bytes)
        lately = _share(_grown(counters.hits, then.hits), _grown(counters.misses, then.misses))
        return {
            "tokens_per_s": tokens / seconds if seconds > 0 and tokens > 0 else None,
            "hit_rate": _share(counters.hits, counters.misses) if lately is None else lately,
            "read_mib_per_s": None if read is None or seconds <= 0 else read / seconds / (1 << 20),
        }


def memory_of(pids: Iterable[int], cache_bytes: int | None = None, cache_budget_bytes: int | None = None) -> Memory:
    """Memory of these processes (those that are gone count nothing) and of the machine."""
    resident = 0
    for pid in pids:
        try:
            resident += psutil.Process(pid).memory_info().rss
        except psutil.Error:
            continue
    machine = psutil.virtual_memory()
    return Memory(resident or None, machine.available, machine.total, cache_bytes, cache_budget_bytes)


def _grown(after: int | None, before: int | None) -> int | None:
    return None if after is None or before is None else after - before


def _share(hits: int | None, misses: int | None) -> float | None:
    return None if hits is None or misses is None or hits + misses <= 0 else hits / (hits + misses)
