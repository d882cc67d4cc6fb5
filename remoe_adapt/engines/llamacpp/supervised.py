"""A server in a child process that is started again when it dies, with the reason that can be known."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any

from remoe_adapt._support import printable
from remoe_adapt.errors import ServerDownError, ServerError

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 10.0
# A server that ran for so long is not one that cannot start.
_STEADY_S = 30.0
_LAST_LINES, _LINE_CHARACTERS = 6, 300
_ENDS_S = 10.0


class SupervisedServer:
    """Starts `command`, and starts it again whenever it ends, until `stop`. Use `with`.

    environment: added to ours.
    told: one line for its standard input, which stays open as long as it should run.
    is_ready: called every 50 ms once the process runs; True when it serves.
    start_s: how long a start may take.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str],
        told: str,
        is_ready: Callable[[], bool],
        *,
        start_s: float = 600.0,
    ) -> None:
        self._command, self._environment, self._told = list(command), dict(environment), told
        self._is_ready, self._start_s = is_ready, start_s
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=_LAST_LINES)
        self._ended = threading.Event()
        self._events: deque[dict[str, Any]] = deque(maxlen=1000)
        self._keeper: threading.Thread | None = None
        self.starts = 0

    @property
    def pid(self) -> int | None:
        """Of the process that runs now."""
        process = self._process
        return process.pid if process is not None and process.poll() is None else None

    def events(self) -> list[dict[str, Any]]:
        """What happened since the last call: "died" (reason, starts again in), "started" (pid)."""
        found = []
        while self._events:
            found.append(self._events.popleft())
        return found

    def __enter__(self) -> SupervisedServer:
        self._start()
        try:
            self._wait()
        except BaseException:
            self.stop()
            raise
        self._keeper = threading.Thread(target=self._keep, name="remoe-serve", daemon=True)
        self._keeper.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the server and wait for it; it is not started again."""
        self._ended.set()
        self._end()
        if self._keeper is not None:
            self._keeper.join()
            self._keeper = None
        self._end()

    def _start(self) -> None:
        self._said.clear()
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=os.environ | self._environment, start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise ServerError(f"{self._command[0]} cannot be started ({error.strerror}).") from error
        self.starts += 1
        assert self._process.stdin is not None and self._process.stdout is not None
        threading.Thread(target=self._listen, args=(self._process.stdout,), daemon=True).start()
        with suppress(OSError):  # it died at once, which is seen by whoever waits
            self._process.stdin.write(self._told.encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self, pipe: IO[bytes]) -> None:
        """A pipe that nobody reads would stop the server; its last lines say why it died."""
        with pipe, suppress(OSError, ValueError):
            for line in iter(lambda: pipe.readline(1 << 16), b""):
                if text := line.decode("utf-8", "replace").strip():
                    self._said.append(printable(text)[:_LINE_CHARACTERS])

    def _wait(self) -> None:
        """Until it serves. Raises ServerError when it ends before, or is not ready in time."""
        end = time.monotonic() + self._start_s
        process = self._process
        assert process is not None
        while not self._ended.is_set():
            if process.poll() is not None:
                raise ServerError(f"the server could not start: {self._reason(process.returncode)}")
            with suppress(ServerDownError):
                if self._is_ready():
                    return
            if time.monotonic() > end:
                raise ServerError(f"the server did not begin to serve within {self._start_s:g} s.")
            time.sleep(0.05)

    def _keep(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._ended.is_set():
            began, process = time.monotonic(), self._process
            if process is not None:
                status = process.wait()
                if self._ended.is_set():
                    return
                _close(process)
                pause_s = _FIRST_PAUSE_S if time.monotonic() - began > _STEADY_S else pause_s
                self._events.append({"event": "died", "reason": self._reason(status), "again_in_s": pause_s})
            if self._ended.wait(pause_s):
                return
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)
            try:
                self._start()
                if self._ended.is_set():  # `stop` came between
                    self._end()
                    return
                self._wait()
                self._events.append({"event": "started", "pid": self.pid, "starts": self.starts})
            except ServerError as error:
                self._end()
                self._process = None
                self._events.append({"event": "died", "reason": str(error), "again_in_s": pause_s})

    def _reason(self, status: int) -> str:
        time.sleep(0.05)  # the last lines are on their way
        if status < 0:
            name = signal.Signals(-status).name if -status in set(signal.Signals) else str(-status)
            why = " (by the kernel, if memory is short)" if name == "SIGKILL" else ""
            what = f"killed by {name}{why}"
        else:
            what = f"it ended with status {status}"
        return what + (f": {' | '.join(self._said)}" if self._said else "")

    def _end(self) -> None:
        process = self._process
        if process is None:
            return
        _close(process)
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(_ENDS_S)
            except subprocess.TimeoutExpired:
                process.kill()
        process.wait()


def _close(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        with suppress(OSError):
            process.stdin.close()


def free_port(host: str) -> int:
    """A port of the system's choice; a server keeps it through its restarts."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as taken:
        taken.bind((host, 0))
        return int(taken.getsockname()[1])
