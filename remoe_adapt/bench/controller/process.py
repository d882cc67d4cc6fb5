"""One arm of `remoe bench controller` from its owner's side: a memory group, a decoder in it, and a squeezer beside."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remoe_adapt.bench.controller.arms import Kind, bench_profile
from remoe_adapt.bench.harness import MemoryGroup, WorkerProcess, memory_group
from remoe_adapt.errors import RemoeError

_WORKER = (sys.executable, "-m", "remoe_adapt.bench.controller.worker")
# -S: without site-packages, whose start-up files may import much.
_SQUEEZER = (sys.executable, "-S", str(Path(__file__).with_name("squeezer.py")))
# Beside the reserve and what the cache needs spare to grow: activations, and a longer document's KV cache.
_SLACK_BYTES = 48 << 20


@dataclass(frozen=True)
class Setup:
    """The same for all arms. share, squeezed: of all experts' bytes, in calm and in a squeeze; take_bytes_per_s: the
    squeezer's pace; options: of `arms.Arm`."""

    folder: Path
    documents: list[list[int]]
    warm: int
    threads: int
    squeezed: float
    take_bytes_per_s: float
    options: Mapping[str, Any]


class ArmProcess:
    """Started by `start`, after a kill again. `DiedError` is raised when the kernel killed a member of its group."""

    def __init__(self, name: str, kind: Kind, setup: Setup, undo: ExitStack) -> None:
        self.name, self.kind, self._setup = name, kind, setup
        self._profile = bench_profile(setup.options["gain"])
        self.group: MemoryGroup = undo.enter_context(memory_group(name.replace("_", "-")))
        undo.callback(self.close)
        self._worker: WorkerProcess | None = None
        self._squeezer: WorkerProcess | None = None
        self.facts: dict[str, Any] = {}
        self.limit_bytes: int | None = None
        self._kills = 0

    def spawn(self) -> None:
        """Begin both processes, without waiting for them."""
        self.close()
        # The group's counter goes on over restarts, so a death is a count above this one.
        self._kills = self.group.kills()
        self._squeezer = WorkerProcess(f"{self.name}, squeezer", self.group, _SQUEEZER)
        self._worker = WorkerProcess(self.name, self.group, _WORKER)

    def start(self) -> None:
        """Load and rehearse; then its group may take what it takes now, the reserve, and a little more."""
        if self._worker is None or self._squeezer is None:
            self.spawn()
        setup = self._setup
        assert self._worker is not None and self._squeezer is not None
        self.facts = self._worker.ask(
            "load",
            kind=asdict(self.kind),
            folder=str(setup.folder),
            documents=setup.documents,
            warm=setup.warm,
            threads=setup.threads,
            options=dict(setup.options),
        )
        self._squeezer.ask("held")
        # Only once: after a kill the arm starts again under the limit that killed it.
        if self.limit_bytes is None:
            self.limit_bytes = self.group.needed_bytes() + self.headroom_bytes
            self.group.limit(self.limit_bytes)

    @property
    def headroom_bytes(self) -> int:
        """Free in calm."""
        return self._profile.memory.reserve_bytes * 5 // 4 + _SLACK_BYTES

    @property
    def take_bytes(self) -> int:
        """What must be taken until `squeezed` of the experts is left."""
        setup, profile = self._setup, self._profile
        lost = (setup.options["share"] - setup.squeezed) * self.facts["experts_bytes"]
        # The mover keeps a tenth of the reserve beyond it, and expects the pace to last for another sample.
        beyond = profile.memory.reserve_bytes / 10 + setup.take_bytes_per_s / profile.controller.sample_hz / 2
        return int(lost + self.headroom_bytes - profile.memory.reserve_bytes - beyond)

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The decoder's answer. Raises DiedError, or RemoeError for other failures."""
        assert self._worker is not None
        return self._ask(self._worker, op, request)

    def squeeze(self) -> None:
        """The squeezer begins to take memory."""
        assert self._squeezer is not None
        self._ask(self._squeezer, "take", {"size_bytes": self.take_bytes, "bytes_per_s": self._setup.take_bytes_per_s})

    def relax(self) -> int:
        """It gives everything back; how much that was."""
        assert self._squeezer is not None
        return int(self._ask(self._squeezer, "give_back", {})["held_bytes"])

    def _ask(self, process: WorkerProcess, op: str, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return process.ask(op, **request)
        except RemoeError as error:
            if self.group.kills() > self._kills:  # of either process, now or while the other one was asked
                self.close()
                raise DiedError(str(error)) from error
            raise

    def close(self) -> None:
        """Both processes have ended; the group stays."""
        for process in (self._worker, self._squeezer):
            if process is not None:
                process.close()
        self._worker = self._squeezer = None


class DiedError(RemoeError):
    """The kernel killed a member of an arm's group for memory."""
