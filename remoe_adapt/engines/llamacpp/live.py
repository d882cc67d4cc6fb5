"""The dial of `remoe watch --live`: routers in a mapped file, instead of scales over HTTP."""

from __future__ import annotations

import time
from collections.abc import Sequence

from remoe_adapt.dial import Target
from remoe_adapt.engines.gguf import LiveRouters, undo_path
from remoe_adapt.engines.llamacpp.outside import CHECK_S, OutsideEngine
from remoe_adapt.engines.llamacpp.process import WatchedProcess, covers, mapped_by, mapped_spans
from remoe_adapt.errors import ServerDownError, ServerError


class LlamaFile(OutsideEngine):
    """Holds a mapped file at a strength.

    routers: of the file.
    process: who is watched.
    points: the family's strengths, rising.
    required: the process was named (by address or number), so nothing is written while it does not map the routers.
    dry_run: nothing is ever written; the routers may be read-only.
    """

    name = "mapped file"
    takes_effect = "at once, in the midst of a token"

    def __init__(
        self,
        routers: LiveRouters,
        process: WatchedProcess,
        points: Sequence[float],
        *,
        required: bool,
        dry_run: bool = False,
    ) -> None:
        super().__init__(process, points, routers.strength or 0.0, dry_run=dry_run)
        self.routers, self._required = routers, required
        self._met_pid: int | None = None
        self._check_s = -1.0

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
        # The maps of a process are long, so they are read again only now and then.
        elif pid != self._met_pid or time.monotonic() >= self._check_s:
            self._check(pid)
        wanted = self.target
        if wanted != self.routers.strength and not self.dry_run:
            self.routers.write(wanted)
            self.swap_ms = 1e3 * (self.routers.swap_s or 0.0)
            self.swaps += 1
        return True

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

    def _live_and_ready(self) -> tuple[float | None, bool]:
        return self.routers.strength, self._met_pid is not None or not self._required

    def _leave(self, keep: bool) -> float | None:
        if not self.dry_run:
            self.routers.close(keep)
            self.post(Target(self.routers.strength or 0.0))
        return self.routers.strength

    def _check(self, pid: int) -> None:
        """A server that has read the file into memory would go on with the old routers, and nobody would see it."""
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
        self._met_pid, self._check_s = pid, time.monotonic() + CHECK_S
        self.met += before != pid
