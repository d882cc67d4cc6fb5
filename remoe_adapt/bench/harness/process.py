"""Worker processes of benchmarks: one line of JSON in, one line of JSON out, seen from both sides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from remoe_adapt.bench.harness.disk import ReadCap
from remoe_adapt.bench.harness.memory_group import MemoryGroup
from remoe_adapt.errors import RemoeError

DECODE_WORKER = (sys.executable, "-m", "remoe_adapt.bench.decode.worker")


class WorkerProcess:
    """A command that answers a line of JSON with one, asked one thing at a time. `close` ends it, whatever it does."""

    def __init__(
        self,
        name: str,
        group: MemoryGroup | None = None,
        command: Sequence[str] = DECODE_WORKER,
        cap: ReadCap | None = None,
    ) -> None:
        self.name, self.group = name, group
        for each in (group, cap):
            command = command if each is None else each.command(command)
        # A file and not a pipe: nobody reads it while the process runs, and a full pipe would stop it.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  (closed in `close`)
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            # Waiting threads must not take a core from the arm whose turn it is.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "TRANSFORMERS_VERBOSITY": "error"},
            start_new_session=True,  # Ctrl-C is for the owner, who closes all
            text=True,
            encoding="utf-8",
        )

    def ask(self, op: str, **request: Any) -> dict[str, Any]:
        """The answer to one request. Raises RemoeError with the reason when it cannot, or died."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"op": op, **request}) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RemoeError(self._why_dead())
        reply: Mapping[str, Any] = json.loads(line)
        if "error" in reply:
            raise RemoeError(f"{self.name}: {reply['error']}")
        answer: dict[str, Any] = reply["ok"]
        return answer

    def _why_dead(self) -> str:
        status = self._process.wait()
        if status == -signal.SIGKILL and self.group is not None and self.group.kills():
            return f"{self.name}: killed by the kernel, it needs more memory than the limit"
        self._errors.seek(0)
        last = self._errors.read().decode(errors="replace").strip().splitlines()[-1:]
        return f"{self.name}: ended with status {status}" + (f" ({last[0]})" if last else "")

    def close(self) -> None:
        """The process has ended and is forgotten."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()


class Worker:
    """The other side: a request's `op` names a method `do_...`, which takes the rest of it by name."""

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """What a request found; errors are for the owner to report."""
        arguments = dict(request)
        found: dict[str, Any] = getattr(self, f"do_{arguments.pop('op')}")(**arguments)
        return found


Answer = Callable[[Mapping[str, Any]], dict[str, Any]]


def serve_lines(requests: TextIO, replies: TextIO, answer: Answer) -> None:
    """Answer each line of `requests` with one of `replies`: `{"ok": ...}` or `{"error": "..."}`."""
    for line in requests:
        try:
            reply: dict[str, Any] = {"ok": answer(json.loads(line))}
        except Exception as error:  # for the owner to report
            reply = {"error": f"{type(error).__name__}: {str(error).strip() or repr(error)}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def speak(answer: Answer) -> None:
    """Serve stdin until it ends. stdout is the protocol's alone; what libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        # For the descriptor itself, because libraries in C print past sys.stdout.
        os.dup2(2, 1)
        serve_lines(sys.stdin, replies, answer)
