"""The dial of a preloaded llama.cpp: strength as the gain of the recency prior, through the control file."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from remoe_adapt.dial import Target
from remoe_adapt.engines.llamacpp.outside import CHECK_S, OutsideEngine
from remoe_adapt.engines.llamacpp.prior import PreloadStatus, PriorControl
from remoe_adapt.engines.llamacpp.process import WatchedProcess
from remoe_adapt.errors import ServerDownError, ServerError
from remoe_adapt.family import Family
from remoe_adapt.recency_settings import Recency


class PriorEngine(OutsideEngine):
    """Holds the prior of a preloaded server at strength * gain, or at the gains that a family has at the strength.

    process: who is watched.
    control: finds the control file of a process (its number; None: not known) and opens it; raises ConfigError.
    recency: mode and decay, and the gain at strength 1.
    expert_cache: (bytes, share of all experts) that are to stay in memory, as of `PriorControl.command`.
    family: whose points' gains are followed instead of the one at strength 1.
    layers: of these gains each is of the layer of that number in the server's file; None: they are of all its layers.
    dry_run: nothing is ever commanded.
    """

    name = "recency prior"
    takes_effect = "at the server's next batch of tokens"

    def __init__(
        self,
        process: WatchedProcess,
        control: Callable[[int | None], PriorControl],
        recency: Recency,
        *,
        expert_cache: tuple[int, float] = (0, 0.0),
        family: Family | None = None,
        layers: Sequence[int] | None = None,
        dry_run: bool = False,
    ) -> None:
        # Without a family the prior is linear in its gain, so that any strength is as good as a trained point.
        super().__init__(process, (1.0,) if family is None else family.strengths, 0.0, dry_run=dry_run)
        self._family, self._layers = family, layers
        self.recency, self.expert_cache = recency, expert_cache
        self._open = control
        self.control: PriorControl | None = None
        self._met_pid: int | None = None
        self._live: float | None = None
        self._check_s = -1.0

    def gain_at(self, strength: float) -> float | tuple[float, ...]:
        """What a strength means: a gain, or that of each router."""
        return self._at(strength).gain

    def sync(self) -> bool:
        """Meet the server (again) where it is another one, and command the gain of the strength wanted.

        Raises ServerDownError while the process does not run, ServerError where its prior stays off or its control file
        is gone.
        """
        if self._closed:
            return False
        self.process.find()
        pid = self.process.pid
        if pid is None:
            with self._lock:
                self._met_pid = None
            raise ServerDownError(self.process.why_unknown or "the server does not run")
        if pid != self._met_pid or self.control is None:
            self._meet(pid)
        wanted = self.target
        if wanted != self._live:
            self._set(wanted)
        if time.monotonic() >= self._check_s:
            self._check_s = time.monotonic() + CHECK_S
            if (found := self.prior()).state == "off":
                raise ServerError(f"the recency prior is off in the server: {found.reason}")
        return True

    def prior(self) -> PreloadStatus:
        """What the server says of itself. Raises ServerError when the control file is damaged, or not known yet."""
        if self.control is None:
            raise ServerError("the server has not been met yet, so nothing is known of its prior.")
        return self.control.status()

    def _by_layer(self, recency: Recency) -> Recency:
        """Gains of routers as those of all layers of the file, where dense ones have none."""
        if self._layers is None or not isinstance(recency.gain, tuple):
            return recency
        of_layer = dict(zip(self._layers, recency.gains(len(self._layers)), strict=True))
        return replace(recency, gain=tuple(of_layer.get(layer, 0.0) for layer in range(max(of_layer) + 1)))

    def _at(self, strength: float) -> Recency:
        if self._family is not None:
            # The base of a family has no prior: that of its points at a gain of 0.
            return self._family.recency(strength) or replace(self.recency, gain=0.0)
        gain = self.recency.gain
        scaled = tuple(strength * one for one in gain) if isinstance(gain, tuple) else strength * gain
        return replace(self.recency, gain=scaled)

    def _meet(self, pid: int) -> None:
        if self.control is not None:
            self.control.close()
        self.control = self._open(pid)
        with self._lock:
            self._met_pid, self._live, self._check_s = pid, None, -1.0
        self.met += 1

    def _set(self, strength: float) -> None:
        if not self.dry_run and self.control is not None:
            began = time.perf_counter()
            held_bytes, share = self.expert_cache
            self.control.command(self._by_layer(self._at(strength)), budget_bytes=held_bytes, budget_share=share)
            self.swap_ms = 1e3 * (time.perf_counter() - began)
            # What a server starts with, or gets again after its restart, is no swap.
            self.swaps += self._live is not None or strength != 0.0
        with self._lock:
            self._live = strength

    def _live_and_ready(self) -> tuple[float | None, bool]:
        with self._lock:
            return (self._live, True) if self._met_pid is not None else (None, False)

    def _leave(self, keep: bool) -> float | None:
        if self.control is None:
            return None
        if not self.dry_run and not keep:
            self.post(Target(0.0))
            try:
                self._set(0.0)
            except ServerError:
                return None
        self.control.close()
        return self._live
