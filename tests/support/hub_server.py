"""A hub of this machine: what huggingface_hub asks of one to fetch a file, over HTTP, and what it was asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves one repository, and what is known about it. `asked`: methods and files, in order."""

    def __init__(self, repository: str, folder: Path) -> None:
        self.asked: list[tuple[str, str]] = []
        asked = self.asked

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._answer(with_body=False)

            def do_GET(self) -> None:
                self._answer(with_body=True)

            def log_message(self, format: str, *args: object) -> None:
                return

            def _answer(self, *, with_body: bool) -> None:
                start, path = f"/{repository}/resolve/", self.path.partition("?")[0]
                name = path.rpartition("/")[2]
                is_about = path == f"/api/models/{repository}"
                if not path.startswith("/api/"):
                    asked.append((self.command, name))
                file = folder / name
                is_there = is_about or (path.startswith(start) and file.is_file())
                body = file.read_bytes() if is_there and not is_about else b""
                if is_about:
                    body = json.dumps({"id": repository, "modelId": repository, "sha": COMMIT}).encode()
                self.send_response(200 if is_there else 404)
                self.send_header("X-Repo-Commit", COMMIT)
                if is_there:
                    self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
                else:
                    self.send_header("X-Error-Code", "EntryNotFound" if path.startswith(start) else "RepoNotFound")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if with_body:
                    self.wfile.write(body)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@contextmanager
def hub_of(repository: str, folder: Path) -> Iterator[Hub]:
    """Until it ends, these files are those of a repository; weights among them have no room here and need none."""
    hub = Hub(repository, folder)
    try:
        yield hub
    finally:
        hub.close()
