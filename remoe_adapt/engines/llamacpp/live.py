"""The dial of `remoe watch --live`: routers in a mapped file, instead of scales over HTTP."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from remoe_adapt.dial import Target
from remoe_adapt.engines.gguf import LiveRouters, undo_path
from remoe_adapt.engines.llamacpp.client import rounded_strength
from remoe_adapt.engines.llamacpp.process import WatchedProcess, covers, mapped_by, mapped_spans
from remoe_adapt.errors import ServerDownError, ServerError

CHECK_S = 2.0


class LlamaFile:
    """Holds a mapped file at a strength; an `Engine`.

    routers: of the file.
    process: who is watched.
    points: the family's strengths, rising.
    required: the process was named (by address or number), so nothing is written while it does not map the routers.
    dry_run: nothing is ever written; the routers may be read-only.
    clock: seconds, for the pauses between looks.
    """

    name = "mapped file"
    takes_effect = "at once, in the midst of a token"

    def __init__(
        self,
        routers: LiveRouters,
        process: WatchedProcess,
        points: Sequence[float] = (),
        *,
        required: bool,
        dry_run: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.routers, self.process, self.dry_run = routers, process, dry_run
        self.points, self._required, self._clock = tuple(points), required, clock
        self._lock = threading.Lock()
        self._met_pid: int | None = None
        self._check_s = -1.0
        self.met = self.swaps = 0
        self._wanted, self._closed = routers.strength or 0.0, False

    def post(self, target: Target) -> None:
        """Want this strength, in steps of 0.0001; `sync` brings it about. See `Engine.post`."""
        wanted = rounded_strength(target, self.target, self._closed)
        if wanted is not None:
            with self._lock:
                self._wanted = wanted

    @property
    def target(self) -> float:
        """The strength wanted last; before the first, what the file was found at (0 where that is not known)."""
        with self._lock:
            return self._wanted

    def sync(self) -> bool:
        """Look whether the process maps the routers (every CHECK_S), and bring the file to the strength wanted.

        Raises ServerDownError while a required process does not run, ServerError when it does not map them all.
        """
        if self._closed:
            return False
        self.process.find()
        pid = self.process.pid
        if pid is None:
            self._met_pid = None
            if self._required:
                raise ServerDownError(self.process.why_unknown or "the watched process does not run")
        elif pid != self._met_pid or self._clock() >= self._check_s:
            self._check(pid)
        wanted = self.target
        if wanted != self.routers.strength and not self.dry_run:
            self.routers.write(wanted)
            self.swaps += 1
        return True

    def status(self) -> dict[str, Any]:
        """See `Engine.status`."""
        return {
            "engine": self.name,
            "strength": self.routers.strength,
            "target": self.target,
            "ready": not self._closed and (self._met_pid is not None or not self._required),
            "met": self.met,
            "swaps": self.swaps,
            "swap_ms": self.swap_ms,
            "points": list(self.points),
            "closed": self._closed,
        }

    def close(self, keep: bool = False) -> float | None:
        """Originals back and the undo file gone, unless `keep`. See `Engine.close`."""
        if not self._closed:
            if not self.dry_run:
                self.routers.close(keep)
                self.post(Target(self.routers.strength or 0.0))
            self._closed = True
        return self.routers.strength

    @property
    def swap_ms(self) -> float | None:
        """How long the last swap wrote; None before the first."""
        return None if self.routers.swap_s is None else 1e3 * self.routers.swap_s

    def hazard(self) -> str:
        """What a user has to know before the first swap."""
        path = self.routers.path
        pids = ", ".join(map(str, mapped_by(path))) or "none now"
        return (
            f"--live rewrites the routers of {path} under the processes that map it ({pids}), all of which swap. The "
            "token under way at a swap may see layers of two strengths; answers, and prompts that a server remembers, "
            f"go on across swaps. The originals are in {undo_path(path).name} until they are put back at the end; "
            f"after a kill: remoe export gguf {path} --undo"
        )

    # A server that has read the file into memory would go on with the old routers, and nobody would see it.
    def _check(self, pid: int) -> None:
        before, self._met_pid = self._met_pid, None
        path = self.routers.path
        try:
            spans = mapped_spans(pid, path)
        except PermissionError as error:
            raise ServerError(
                f"what process {pid} maps cannot be seen: run `remoe watch` as its user, or root."
            ) from error
        except OSError as error:
            raise ServerDownError(f"process {pid} has ended") from error
        if not covers(spans, self.routers.spans):
            how = "only a part of the routers of" if spans else "nothing of"
            raise ServerError(
                f"process {pid} maps {how} {path}, so it would not see a swap: start llama-server on this file, "
                "without --no-mmap or direct I/O, and with its routers on the CPU."
            )
        self._met_pid, self._check_s = pid, self._clock() + CHECK_S
        self.met += before != pid
