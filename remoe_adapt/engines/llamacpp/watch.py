"""`remoe watch`: the controller's policy at the dial of an engine that somebody else runs."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from remoe_adapt._support import check_extra
from remoe_adapt.checkpoints import GgufFile
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.dial import Engine, Target, turn, unit
from remoe_adapt.engines.gguf import FINGERPRINT_KEY, STRENGTH_KEY, LiveRouters
from remoe_adapt.engines.llamacpp.client import Address
from remoe_adapt.engines.llamacpp.live import LlamaFile
from remoe_adapt.engines.llamacpp.prior import PriorControl, control_of
from remoe_adapt.engines.llamacpp.prior_engine import PriorEngine
from remoe_adapt.engines.llamacpp.process import (
    FoundProcess,
    MappingProcess,
    ServerProcess,
    ServerSensors,
    WatchedProcess,
)
from remoe_adapt.engines.llamacpp.server import HOLD_S, LlamaServer
from remoe_adapt.errors import ConfigError, ExportError, FamilyError, ServerDownError, ServerError
from remoe_adapt.family import Family, family_folder, read_family_json
from remoe_adapt.pressure import Decision, Governor
from remoe_adapt.recency_settings import Recency

if TYPE_CHECKING:
    from remoe_adapt.engines.llamacpp.proxy import Proxy

_SAME_STRENGTH = 1e-5
_BY_HAND = "set by hand"
# Of a decision, what concerns no server.
_INSIDE = ("budgets", "moves", "why", "calm", "floors")


@dataclass(frozen=True, kw_only=True)
class WatchOptions:
    """How a server is watched.

    interval_s: between two samples, None: the profile's sample_hz.
    pid: of the process, None: it is looked for.
    proxy: (host, port) to listen on, None: the server's own scales are set.
    hold_s: how long the proxy holds a request while the server is down.
    max_body_bytes: of a request there, None: the proxy's own bound.
    reuse_prompts: clients of the proxy may use the server's prompt cache.
    dry_run: nothing is set.
    keep: leave the strength as it is at the end, instead of going back to the base.
    api_key: the server's.
    live: the split GGUF to rewrite instead of asking a server.
    base: what to compare its routers with.
    recency: the prior of a preloaded server is driven, with this gain at strength 1; None: it is left alone.
    control: the preloaded server's control file, None: that of its environment.
    strength: hold this one, whatever the pressure.
    expert_cache: experts that a preloaded server is to keep in memory, as of `PriorEngine`.
    gains: a family whose points' gains the prior follows, and `layers` the numbers of its routers in the server's file.
    """

    interval_s: float | None = None
    pid: int | None = None
    proxy: tuple[str, int] | None = None
    hold_s: float = HOLD_S
    max_body_bytes: int | None = None
    reuse_prompts: bool = False
    dry_run: bool = False
    keep: bool = False
    api_key: str | None = None
    live: Path | None = None
    base: str | None = None
    recency: Recency | None = None
    control: Path | None = None
    strength: float | None = None
    expert_cache: tuple[int, float] = (0, 0.0)
    gains: Family | None = None
    layers: Sequence[int] | None = None


class Watch:
    """One server (None: `options.live` without one), one family, one profile. `events` runs it.

    family: None where `options.recency` is driven alone.
    process: of the server, where somebody knows it; None: it is looked for.

    Raises FamilyError for the family, ConfigError for an address whose pressure cannot be seen from here, and for a
    live file as `LiveRouters`; MissingDependencyError for a proxy without aiohttp.
    """

    def __init__(
        self,
        server: str | None,
        family: str | None,
        profile: DeviceProfile,
        options: WatchOptions,
        process: WatchedProcess | None = None,
    ) -> None:
        self.options, self.profile = options, profile
        self._interval_s = options.interval_s or 1 / profile.controller.sample_hz
        self._awake, self._ended = threading.Event(), False
        self.address = None if server is None else Address.parse(server)
        self.live: LlamaFile | None = None
        self.proxy: Proxy | None = None
        self.prior: PriorEngine | None = None
        # Asked between two samples for what else there is to say.
        self.listeners: list[Callable[[], Iterable[dict[str, Any]]]] = []
        self.engine: Engine
        if options.recency is not None:
            if options.live is not None or options.proxy is not None:
                raise ConfigError("--gain drives a prior inside the server: leave --live and --proxy out.")
            self.process = self._named() if process is None else process
            self.prior = PriorEngine(
                self.process, self._control, options.recency, expert_cache=options.expert_cache, family=options.gains,
                layers=options.layers, dry_run=options.dry_run,
            )  # fmt: skip
        if family is not None and (options.gains is None or options.gains.has_adapters):
            self.engine = (
                self._at_a_server(family, process) if options.live is None else self._at_a_file(options.live, family)
            )
        elif self.prior is not None:
            self.engine = self.prior
        else:
            raise ConfigError("nothing to drive: give --family, or --gain for a preloaded server.")
        self.governor = Governor(ServerSensors(self.process), profile)
        # What was decided last, and what a hand holds instead: the pressure that it named, or that it named none.
        self.decision: Decision | None = None
        self._held: tuple[float | None] | None = None
        self._turned = False
        self.down = ""
        if options.strength is not None:
            self.hold(strength=options.strength)
            self._turned = False

    def _named(self) -> WatchedProcess:
        """The process of a preloaded server, by its address, its number or the control file that is given."""
        if self.address is not None:
            return ServerProcess(self.address, self.options.pid)
        if self.options.pid is not None:
            return FoundProcess(pid=self.options.pid)
        if self.options.control is None:
            raise ConfigError("nothing to drive: give --server URL, --pid or --control of a preloaded server.")
        path = self.options.control

        def stated() -> int | None:
            with PriorControl(path) as control:
                pid = control.status().pid
            return pid if pid and psutil.pid_exists(pid) else None

        return FoundProcess(stated)

    def _control(self, pid: int | None) -> PriorControl:
        if self.options.control is not None:
            return PriorControl(self.options.control)
        if pid is None:
            raise ConfigError("the server's process is not known: give --control.")
        return PriorControl(control_of(pid))

    def _at_a_file(self, path: Path, family: str) -> Engine:
        options = self.options
        if options.proxy is not None:
            raise ConfigError("--live swaps for whoever maps the file, --proxy sets single requests: give one of them.")
        if self.address is not None:
            self.process = ServerProcess(self.address, options.pid)
        else:
            self.process = MappingProcess(path, options.pid)
        loaded = Family.load(family)
        routers = LiveRouters(path, loaded, base=options.base, read_only=options.dry_run)
        named = self.address is not None or options.pid is not None
        self.live = LlamaFile(routers, self.process, loaded.strengths, required=named, dry_run=options.dry_run)
        return self.live

    def _at_a_server(self, family: str, process: WatchedProcess | None) -> LlamaServer:
        options = self.options
        if self.address is None:
            raise ConfigError("nothing to drive: give --server URL, or --live FILE of a split GGUF.")
        found = ServerProcess(self.address, options.pid) if process is None else process
        self.process = found
        points = FamilyPoints(family)
        server = LlamaServer(
            self.address, found, points.strengths, lambda path: points.strength_of(path, self.process.folder),
            per_request=options.proxy is not None, reuse_prompts=options.reuse_prompts, dry_run=options.dry_run,
            api_key=options.api_key,
        )  # fmt: skip
        if options.proxy is not None and not options.dry_run:
            self.proxy = self._proxy(server, self.address, *options.proxy)
        return server

    def _proxy(self, server: LlamaServer, address: Address, host: str, port: int) -> Proxy:
        check_extra("aiohttp", "serve", "--proxy needs aiohttp")
        from remoe_adapt.engines.llamacpp.proxy import Bounds, Proxy

        options, bounds = self.options, Bounds()
        if (body_bytes := options.max_body_bytes) is not None:
            # All bodies together must have room for one.
            bounds = Bounds(body_bytes=body_bytes, held_bytes=max(bounds.held_bytes, body_bytes))
        return Proxy(
            address, server.setting, lambda: self._lost(server), host=host, port=port, hold_s=options.hold_s,
            reuse_prompts=options.reuse_prompts, bounds=bounds,
        )  # fmt: skip

    def stop(self) -> None:
        """End `events` soon; from any thread or a signal handler."""
        self._ended = True
        self._awake.set()

    def hold(self, *, strength: float | None = None, pressure: float | None = None) -> None:
        """Hold this strength, or what the profile has at this pressure, whatever the sensors say; neither: hand the
        dial back to them. From any thread; it is brought about soon. Raises ConfigError for what is no number in
        [0, 1], DialError once the engine was let go."""
        if strength is None and pressure is None:
            self._held = None
        else:
            found = self.profile.strength_at(unit("pressure", pressure)) if strength is None else strength
            self.engine.post(Target(unit("strength", found), pressure, _BY_HAND))
            self._held = (pressure,)
        self._turned = True
        self._awake.set()

    @property
    def pinned(self) -> bool:
        """Held by a hand."""
        return self._held is not None

    def once(self) -> dict[str, Any]:
        """Look for as long as pressure needs to count, set what follows, and go. Raises as `LlamaServer.sync`."""
        self._bring_about()
        for _ in range(math.ceil(self.profile.controller.rise_s / self._interval_s) + 2):
            event = self._tick()
            self._pause()
        self._bring_about()
        return {**event, "event": "once", "live": not self.options.dry_run}

    def _bring_about(self) -> bool:
        """Bring the server, and the prior in it, to the strength that is wanted."""
        there = self.engine.sync()
        if self.prior is not None and self.prior is not self.engine:
            self.prior.post(Target(self.engine.target))
            there = self.prior.sync() and there
        return there

    def events(self) -> Iterator[dict[str, Any]]:
        """Runs until `stop`; yields what happens, JSON-ready: "warning" (of a live file), "start", then "strength",
        "up", "down" and "wrong" (the server cannot be driven: why), then "end". The first sync raises ServerError where
        it finds a server that it cannot drive; one that is down may come later."""
        down = ""
        if self.live and not self.options.dry_run:
            yield {"event": "warning", "text": self.live.hazard()}
        with ExitStack() as ending:
            port = None
            if self.proxy:
                # Before the server is touched: the port may be taken. Requests wait until the server is met.
                port = self.proxy.start()
                ending.callback(self.proxy.stop)
            # The first look raises what cannot be driven; a server that is down may come later.
            try:
                self._bring_about()
            except ServerDownError as error:
                down = str(error)
            try:
                yield {"event": "start", **self.status(), "proxy_port": port}
                if down:
                    yield {"event": "down", "reason": down}
                while not self._ended:
                    event = self._tick()
                    if event["changed"]:
                        yield event
                    self.down = down = yield from self._sync(down)
                    for listen in self.listeners:
                        yield from listen()
                    self._pause()
            finally:
                ending.close()
                kept = self.engine.close(self.options.keep)
                if self.prior is not None:
                    self.prior.close(self.options.keep)
        yield {"event": "end", **self.status(), "left_at": kept}

    def status(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "server": None if self.address is None else str(self.address),
            "live_file": str(self.live.routers.path) if self.live else None,
            "pid": self.process.pid,
            "strength": self.engine.target,
            "profile": self.profile.name,
            "per_request": self.options.proxy is not None,
            "dry_run": self.options.dry_run,
            "met": self.engine.met,
            "posts": self.engine.swaps,
            "swap_ms": self.engine.status()["swap_ms"],
            "requests": dict(self.proxy.counts) if self.proxy else None,
            **self._of_prior(self.engine.target),
        }

    def _of_prior(self, strength: float) -> dict[str, Any]:
        prior = self.prior
        return {} if prior is None else {"mode": prior.recency.mode, "gain": prior.gain_at(strength)}

    def _tick(self) -> dict[str, Any]:
        decision = self.governor.tick(None, self.engine.target)
        turned, self._turned = self._turned, False
        if (held := self._held) is not None:
            found = decision.pressure if held[0] is None else held[0]
            decision = replace(
                decision, changed=turned, strength=self.engine.target, pressure=found, why=_BY_HAND, moves=(), notes={}
            )
        else:
            turn(self.engine, decision)
        self.decision = decision
        said = {k: v for k, v in decision.as_dict().items() if k not in _INSIDE}
        return {"event": "strength", **said, **self._of_prior(decision.strength)}

    def _sync(self, down: str) -> Generator[dict[str, Any], None, str]:
        """Yields what has changed; the new reason why the server cannot be driven, "" when it is.

        down: the reason before. One reason after another is said once, for as long as it lasts.
        """
        before, what, reason = self.engine.met, "", ""
        try:
            if not self._bring_about():  # it is not time to try again
                return down
        except ServerDownError as error:
            what, reason = "down", str(error)
        except ServerError as error:
            what, reason = "wrong", str(error)
        if what and not down:
            yield {"event": what, "reason": reason}
        elif not what and (down or self.engine.met > before):
            yield {"event": "up", **self.status()}
        return reason

    def _pause(self) -> None:
        if self._awake.wait(self._interval_s) and not self._ended:
            # It was woken by a lost server and not by the end: the next look comes at once, later ones in time.
            self._awake.clear()

    def _lost(self, server: LlamaServer) -> None:
        server.lost()
        self._awake.set()


class FamilyPoints:
    """A family's strengths, and which of them a LoRA file is. Deltas are not read.

    Raises FamilyError as `Family.load`.
    """

    def __init__(self, family: str) -> None:
        folder = family_folder(family)
        entries = read_family_json(folder)
        self.path, self.fingerprint = folder, entries["base"]["fingerprint"]
        if any(entry["adapter"] is None for entry in entries["points"]):
            raise FamilyError(
                f"{folder} has no adapters, so there are no LoRAs of it to be turned: `remoe serve MODEL.gguf --family "
                f"{folder}` serves a GGUF under its recency prior."
            )
        self._names = {entry["adapter"]: float(entry["strength"]) for entry in entries["points"]}
        if not self._names:
            raise FamilyError(f"{folder} has no points: add one with `remoe train`.")

    @property
    def strengths(self) -> tuple[float, ...]:
        """Rising."""
        return tuple(sorted(self._names.values()))

    def strength_of(self, path: str, folder: Path | None) -> float | None:
        """Strength of a loaded LoRA by what its file says, where it can be read, else by its name (as s050.gguf); None
        when it is not of this family. folder: what `path` is relative to."""
        file = Path(path) if folder is None else folder / path
        values: dict[str, Any] = {}
        with suppress(ExportError, OSError, ValueError):  # the path is whatever a server says
            if file.is_file():
                values = GgufFile(file).values
        if STRENGTH_KEY in values:
            stated = values[STRENGTH_KEY]
            if values.get(FINGERPRINT_KEY) != self.fingerprint or not isinstance(stated, int | float):
                return None
            return next((s for s in self.strengths if abs(s - stated) < _SAME_STRENGTH), None)
        # A file that cannot be read from here (another user's, another container's) is known by the name that the
        # export gave it.
        exported = {Family.adapter_name(strength): strength for strength in self.strengths}
        return exported.get(file.stem)
