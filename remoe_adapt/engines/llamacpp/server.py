"""The dial of a llama-server that runs somewhere else: strength as LoRA scales over HTTP, through its restarts.

Two ways: the server's own scales (POST /lora-adapters, all in one call, for whatever clients ask), or `lora` in every
request, which a proxy in front adds (`per_request`; the server's own scales are those of strength 0 then).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from remoe_adapt._support import printable
from remoe_adapt.dial import Target
from remoe_adapt.engines.llamacpp.client import (
    Address,
    LoadedLora,
    ScaleMap,
    call,
    loaded_loras,
    restores_other_scales,
    reuses_prompts,
)
from remoe_adapt.engines.llamacpp.outside import CHECK_S, OutsideEngine
from remoe_adapt.engines.llamacpp.process import WatchedProcess
from remoe_adapt.errors import ServerDownError, ServerError

# How long a request waits for a server that is down.
HOLD_S = 30.0
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
# A probe may wait for a slot behind somebody's long answer.
_PROBE_S = 300.0
# Probes try each of them.
_MOST_SLOTS = 1024


@dataclass(frozen=True, slots=True)
class Setting:
    """What a request should be computed at: the strength, and the scales that say so to the server that runs now."""

    strength: float
    scales: ScaleMap


class LlamaServer(OutsideEngine):
    """Holds one server at a strength.

    address: where it listens.
    process: that listens there, whose restarts are seen.
    points: the family's strengths, rising.
    recognise: path of a loaded adapter -> its strength, None: not of the family.
    per_request: a proxy in front sets the scales in every request, and the server's own stay those of strength 0.
    reuse_prompts: per_request alone; clients may use the server's prompt cache.
    dry_run: nothing is ever set.
    api_key: the server's.
    """

    name = "llama-server"

    def __init__(
        self,
        address: Address,
        process: WatchedProcess,
        points: Sequence[float],
        recognise: Callable[[str], float | None],
        *,
        per_request: bool = False,
        reuse_prompts: bool = False,
        dry_run: bool = False,
        api_key: str | None = None,
    ) -> None:
        super().__init__(process, points, dry_run=dry_run)
        self.address, self.per_request, self.reuse_prompts = address, per_request, reuse_prompts
        self._recognise, self._api_key = recognise, api_key
        self._scales: ScaleMap | None = None
        self._live: float | None = None
        self._retry_s, self._pause_s, self._check_s = -1.0, 0.0, -1.0

    @property
    def takes_effect(self) -> str:
        """In words."""
        return "at the next request" if self.per_request else "at the server's next batch of tokens"

    def setting(self) -> Setting | None:
        """What a request should say now; None while the server is down, or another one whose adapters are unknown."""
        with self._lock:
            scales, wanted = self._scales, self._wanted
        if scales is None or wanted is None or (self.process.known and not self.process.alive()):
            return None
        return Setting(wanted, scales)

    def lost(self) -> None:
        """Somebody found the server gone: nothing is known of the next one until `sync` has met it."""
        with self._lock:
            self._scales = self._live = None
            self._retry_s = -1.0

    def sync(self) -> bool:
        """Meet the server (again) and bring it to the strength wanted; True when it is there now.

        Scales are read back after they were set, and every CHECK_S: where they are not those of any call from here, the
        server is met anew, as after a restart. Tries ever less often while it is down.

        Raises ServerError for a server that cannot be driven, ServerDownError where it does not answer.
        """
        now_s = time.monotonic()
        if self._closed:
            return False
        if self.process.find() or (self.process.known and not self.process.alive()):
            self.lost()
        # A server that loads a model for a minute is not asked twenty times a second.
        if self._scales is None and now_s < self._retry_s:
            return False
        try:
            if self._scales is None:
                self._meet()
            # Behind a proxy the server's own scales stay those of strength 0, whatever is wanted.
            elif not self.per_request and self._wanted != self._live:
                self._set(self._scales)
            elif now_s >= self._check_s and not self._unchanged(self._scales):
                self.lost()
                self._meet()
        except ServerError:
            self.lost()
            self._pause_s = min(_LONGEST_PAUSE_S, max(_FIRST_PAUSE_S, 2 * self._pause_s))
            self._retry_s = time.monotonic() + self._pause_s
            raise
        if now_s >= self._check_s:
            self._check_s = time.monotonic() + CHECK_S
        self._pause_s = 0.0
        return True

    def _live_and_ready(self) -> tuple[float | None, bool]:
        with self._lock:
            known, live = self._scales is not None, self._wanted if self.per_request else self._live
        return live if known else None, known

    def _leave(self, keep: bool) -> float | None:
        if self.dry_run or self.per_request or keep:
            return self.target
        self.post(Target(0.0))
        try:
            return 0.0 if self.sync() else None
        except ServerError:
            return None

    def loras(self) -> list[LoadedLora]:
        """The server's adapters now. Raises as `sync`."""
        return loaded_loras(self._get("/lora-adapters"))

    def _meet(self) -> None:
        loras = self.loras()
        scales = ScaleMap.of(loras, self.points, self._recognise)
        self._check_caches(scales)
        found = scales.strength_of(loras)
        with self._lock:
            if self._wanted is None:
                self._wanted = found if found is not None and not self.per_request else 0.0
            self._live = found
        # Requests are let in (`setting`) only when the server is at the strength that they would be told.
        if self._live != self._target():
            self._set(scales)
        with self._lock:
            self._scales = scales
        self.met += 1

    def _target(self) -> float:
        return 0.0 if self.per_request else self.target

    def _set(self, scales: ScaleMap) -> None:
        """One call sets every adapter: no request ever sees a part of it."""
        target = self._target()
        if not self.dry_run:
            self._send("/lora-adapters", scales.as_list(target))
            self.swaps += 1
            loras = self.loras()
            # Another program may set scales too, and neither would notice.
            if not scales.matches(loras, target):
                scales_now = printable([lora.scale for lora in loras])
                raise ServerError(
                    f"{self.address} was set to strength {target:g} and has scales {scales_now}: "
                    "does something else set them too?"
                )
        with self._lock:
            self._live = target

    def _unchanged(self, scales: ScaleMap) -> bool:
        """Whether the server is as it was left: adapters under their numbers, all scales as they were."""
        loras = self.loras()
        # A server restarted between two looks may number its adapters otherwise.
        if ScaleMap.of(loras, self.points, self._recognise) != scales:
            return False
        return self.dry_run or self._live is None or scales.matches(loras, self._live)

    def _check_caches(self, scales: ScaleMap) -> None:
        if self.dry_run or (self.per_request and not self.reuse_prompts):
            return
        slots = self._slots()
        if self.per_request:
            if restores_other_scales(self._probe, slots, scales):
                raise ServerError(
                    f"{self.address} keeps prompts in RAM and restores them at other scales: start it with "
                    "--cache-ram 0, or leave --reuse-prompts out."
                )
        elif reuses_prompts(self._probe, slots):
            raise ServerError(
                f"{self.address} reuses prompts, so that answers would mix strengths: start it with --no-cache-prompt "
                "(and --cache-ram 0, for nothing would come of that memory), or run `remoe watch --proxy`."
            )

    def _slots(self) -> int:
        props = self._get("/props")
        count = props.get("total_slots", 1) if isinstance(props, dict) else None
        if type(count) is not int or not 1 <= count <= _MOST_SLOTS:
            raise ServerError(
                f"{self.address}/props tells no number of slots ({printable(count)}): is it a llama-server?"
            )
        return count

    def _get(self, path: str) -> Any:
        return call(self.address, path, api_key=self._api_key)

    def _send(self, path: str, body: Any) -> Any:
        return call(self.address, path, body, api_key=self._api_key)

    def _probe(self, path: str, body: Any) -> Any:
        try:
            return call(self.address, path, body, api_key=self._api_key, timeout_s=_PROBE_S)
        except ServerDownError as error:
            raise ServerDownError(f"{error}, while it was asked about its prompt caches") from error
