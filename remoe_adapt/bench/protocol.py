"""How a worker process of a benchmark speaks with its owner: one line of JSON in, one line of JSON out."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TextIO

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
        os.dup2(2, 1)
        serve_lines(sys.stdin, replies, answer)
