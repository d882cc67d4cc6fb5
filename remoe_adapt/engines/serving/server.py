"""A server over a `ServingApp` in a thread of its own: listens from `start` to `stop`, which lets an answer end."""

from __future__ import annotations

import asyncio
import socket
import threading
from contextlib import suppress

import uvicorn

from remoe_adapt.engines.serving.app import ServingApp
from remoe_adapt.errors import ConfigError

# What the server's own ending takes beside the answers, before it is cut off.
_MARGIN_S = 5.0
_BACKLOG = 128


class Server:
    """Listens at `host` and `port` (0: any that is free, which is `port` then) from `start` to `stop`.

    drain_s: that an answer under way may take when the server stops, before it ends with an error.
    """

    def __init__(self, app: ServingApp, *, host: str = "127.0.0.1", port: int = 8000, drain_s: float = 30.0) -> None:
        self._app, self.host, self.port, self._drain_s = app, host, port, drain_s
        self._ready = threading.Event()

    @property
    def url(self) -> str:
        """As http://127.0.0.1:8000; for a server that listens everywhere, this machine's."""
        shown = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(self.host, self.host)
        return f"http://{f'[{shown}]' if ':' in shown else shown}:{self.port}"

    def start(self) -> None:
        """Returns when it listens. Raises ConfigError when the address cannot be had."""
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(
                self.host or None, self.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind(address)
            self._socket.listen(_BACKLOG)
        except (OSError, OverflowError, UnicodeError) as error:
            with suppress(AttributeError):
                self._socket.close()
            why = getattr(error, "strerror", None) or error
            raise ConfigError(
                f"the server cannot listen on {self.host}:{self.port} ({why}): give another --host or --port."
            ) from error
        self.port = int(self._socket.getsockname()[1])
        # h11 and asyncio are always there, and behave alike on every machine.
        config = uvicorn.Config(
            self._app, loop="asyncio", http="h11", ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, timeout_graceful_shutdown=int(self._drain_s + _MARGIN_S) + 1,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        # Outside the main thread, where uvicorn would take signals over, and raise them again at its end.
        self._thread = threading.Thread(target=self._run, name="remoe-serve", daemon=True)
        self._thread.start()
        self._ready.wait()

    def stop(self, drain_s: float | None = None) -> None:
        """Take no more requests, refuse those in line, let the answer under way end. Stopping again does nothing.

        drain_s: instead of the server's own.
        """
        drain_s = self._drain_s if drain_s is None else drain_s

        def end() -> None:
            self._app.drain()
            self._server.should_exit = True
            self._loop.call_later(drain_s, self._app.cut_off)

        with suppress(RuntimeError):  # the loop of an earlier stop
            self._loop.call_soon_threadsafe(end)
        self._thread.join()

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            self._ready.set()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())
