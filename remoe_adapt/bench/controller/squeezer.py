"""The other process of `remoe bench controller`: takes memory at a pace, holds it, gives it back. JSON lines.

Of the standard library alone, and run by its path: it is a member of the memory group that it squeezes, and all that it
takes of it should be what it is told to.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time

_CHUNK_BYTES = 1 << 20


class Squeezer:
    """Holds memory in chunks, each of them touched, so that it is really taken."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self, size_bytes: int, bytes_per_s: float) -> dict[str, int]:
        """Begin to take so much more, evenly; the answer does not wait for it."""
        self.wait()
        self._stop.clear()
        self._thread = threading.Thread(target=self._grow, args=(size_bytes, bytes_per_s), daemon=True)
        self._thread.start()
        return self.held()

    def wait(self) -> dict[str, int]:
        """Wait until what `take` was asked for is taken."""
        if self._thread is not None:
            self._thread.join()
        return self.held()

    def give_back(self) -> dict[str, int]:
        """Everything, at once; the answer is what was held until now."""
        self._stop.set()
        held = self.wait()
        while self._held:
            self._held.pop().close()
        return held

    def held(self) -> dict[str, int]:
        return {"held_bytes": len(self._held) * _CHUNK_BYTES}

    def _grow(self, size_bytes: int, bytes_per_s: float) -> None:
        begin_s, touched = time.monotonic(), b"\1" * _CHUNK_BYTES
        for taken in range(0, size_bytes, _CHUNK_BYTES):
            if self._stop.wait(max(0.0, begin_s + taken / bytes_per_s - time.monotonic())):
                return
            # Each chunk is a map of its own, because memory of a heap stays with the process when it is freed.
            chunk = mmap.mmap(-1, _CHUNK_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            chunk[:] = touched
            self._held.append(chunk)


if __name__ == "__main__":
    squeezer = Squeezer()
    # A copy of the descriptor, so that nothing else that prints can come between answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        for line in sys.stdin:
            request = json.loads(line)
            answer = getattr(squeezer, request.pop("op"))(**request)
            replies.write(json.dumps({"ok": answer}) + "\n")
            replies.flush()
