"""`remoe serve MODEL.gguf`: an unmodified llama.cpp server with the recency prior preloaded, under our controller.

The server is that of the pinned wheel, or a program of the user's. No request passes through us: the gain is turned by
a control file that the preloaded library looks at before each batch of tokens, LoRAs of a family (if one is given) by
the server's own calls.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from remoe_adapt._support import check_extra, printable
from remoe_adapt.checkpoints import is_gguf
from remoe_adapt.device_profile import DeviceProfile
from remoe_adapt.engines.gguf import GgufModel, export_gguf_lora
from remoe_adapt.engines.llamacpp.client import Address, call
from remoe_adapt.engines.llamacpp.preloadable import check_preloadable
from remoe_adapt.engines.llamacpp.prior import ENVIRONMENT, NO_FILE, PriorControl, budget_of, compiled
from remoe_adapt.engines.llamacpp.process import FoundProcess
from remoe_adapt.engines.llamacpp.residency import expert_spans, why_blind
from remoe_adapt.engines.llamacpp.shown import Shown
from remoe_adapt.engines.llamacpp.supervised import SupervisedServer, free_port
from remoe_adapt.engines.llamacpp.watch import Watch, WatchOptions
from remoe_adapt.engines.page import ServerStatus, StatusServer
from remoe_adapt.errors import ConfigError, ServerDownError, ServerError
from remoe_adapt.family import Family
from remoe_adapt.recency_settings import Recency

_CHILD = Path(__file__).with_name("wheel_server.py")
_ALL_HOSTS = {"0.0.0.0": "127.0.0.1", "::": "::1"}


@dataclass(frozen=True, kw_only=True)
class GgufServing:
    """How a GGUF model is served.

    recency: the prior, with its gain at strength 1; None: that of the family's points, whose gains are followed; where
        they have none no library is preloaded.
    family: its LoRAs, if it has adapters, are exported and turned beside the gain.
    strength: hold this one, whatever the pressure.
    host, port: where the server listens; port 0: the system's choice.
    api_key: asked of clients.
    context_tokens: of all slots together; None: the engine's default.
    parallel: slots; threads: None: the engine's default.
    llama_server: a program of the user's instead of the wheel's server; arguments: more of its options.
    engine: more attributes of the wheel's parameters (its CommonParams), by name.
    interval_s: between two samples of pressure, None: the profile's.
    expert_cache: experts of the mapped file that stay in memory (a size, bytes, or a share of all), missing ones being
        read as soon as their ids are known; what the machine does not leave is cut from it. None: neither. It needs a
        `recency`, be its gain 0.
    page: (host, port) where the page, the status and the metrics are; port None: one close to the server's. None:
        nowhere.
    log: gains of every sequence are appended here, a JSON object a line.
    """

    recency: Recency | None
    family: str | None = None
    strength: float | None = None
    host: str = "127.0.0.1"
    port: int = 8080
    api_key: str | None = None
    context_tokens: int | None = None
    parallel: int = 1
    threads: int | None = None
    llama_server: Path | None = None
    arguments: tuple[str, ...] = ()
    engine: Mapping[str, Any] = field(default_factory=dict)
    interval_s: float | None = None
    expert_cache: str | int | float | None = 1.0
    page: tuple[str, int | None] | None = ("127.0.0.1", None)
    log: Path | None = None


def preload_library() -> Path:
    """What to have in LD_PRELOAD, compiled at first use. Raises MissingDependencyError without a C compiler."""
    return compiled("preload.c", libraries=("-fvisibility=hidden", "-ldl", "-lm", "-lpthread"))


class ServedGguf:
    """A model that is being served; use `with`. `events` runs the controller meanwhile, and has to be iterated.

    url: where clients connect; page_url: where the page is, None without one.

    Raises ConfigError for a file, program or setting that cannot work, MissingDependencyError without a C compiler or
    the wheel, ServerError when the server does not start.
    """

    def __init__(self, model: str | os.PathLike[str], profile: DeviceProfile, options: GgufServing) -> None:
        self.model, self.options = Path(model).resolve(), options
        if not self.model.is_file() or not is_gguf(self.model):
            raise ConfigError(f"{printable(model)} is no GGUF file: give a model, of a split one its first part.")
        if options.recency is None and options.family is None:
            raise ConfigError("nothing to turn: give --recency with --gain, or --family.")
        self._family = None if options.family is None else Family.load(options.family)
        # A prior that was asked for takes the place of that of the points.
        self._recency = options.recency
        self._follows = options.recency is None and self._family is not None and self._family.recency(1.0) is not None
        if self._follows and self._family is not None:
            self._recency = self._family.recency(1.0)
        elif self._family is not None and not self._family.has_adapters:
            raise ConfigError(
                f"the points of {printable(self._family.path)} are a recency prior alone: leave --recency and "
                "--recency-gain out."
            )
        if options.llama_server is not None:
            check_preloadable(options.llama_server)
        else:
            check_extra("xllamacpp", "llamacpp", "the llama.cpp server is that of xllamacpp")
            if options.arguments:
                raise ConfigError("options for llama-server are for --llama-server, of whose program they are.")
        self._budget = (0, 0.0) if options.expert_cache is None else budget_of(options.expert_cache)
        self._profile = profile
        self._ending = ExitStack()
        self._watch: Watch | None = None
        self._control: PriorControl | None = None
        self._logged = 0
        self._spans = self._expert_spans()
        self._looked_at: int | None = None
        self._uncached: int | None = None
        self._shown: Shown | None = None
        self._page: StatusServer | None = None
        self.port = options.port or free_port(options.host)

    @property
    def page_url(self) -> str | None:
        return None if self._page is None else self._page.url

    @property
    def url(self) -> str:
        return str(Address(_ALL_HOSTS.get(self.options.host, self.options.host), self.port))

    @property
    def pid(self) -> int | None:
        """The server's process now."""
        return self._server.pid

    def __enter__(self) -> ServedGguf:
        options = self.options
        with ExitStack() as ending:
            if options.page is not None:
                # Before the model is loaded, for the port may be taken.
                host, port = options.page
                self._page = StatusServer(
                    self.shown, self._hold, host=host, port=port, near=self.port, api_key=options.api_key
                )
                ending.callback(self._page.close)
            folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="remoe-serve-")))
            environment: dict[str, str] = {}
            control = folder / "control"
            if self._recency is not None:
                self._control = ending.enter_context(PriorControl.create(control))
                # What the server is warmed up with is no text of anybody's, so the gain may wait for the controller.
                preloaded = [str(preload_library()), *filter(None, [os.environ.get("LD_PRELOAD")])]
                environment |= {"LD_PRELOAD": ":".join(preloaded), ENVIRONMENT: str(control)}
            loras = self._loras(folder)
            # Its routers in order are those of the file's layers that have one.
            layers = sorted(GgufModel(self.model).weights) if self._follows else None
            command, told, more = self._command(loras)
            self._server = SupervisedServer(command, environment | more, told, self._is_ready)
            ending.enter_context(self._server)
            watched = WatchOptions(
                interval_s=options.interval_s, api_key=options.api_key, recency=self._recency, control=control,
                strength=options.strength, expert_cache=self._budget, gains=self._family if self._follows else None,
                layers=layers,
            )  # fmt: skip
            process = FoundProcess(lambda: self._server.pid)
            self._watch = Watch(self.url, options.family, self._profile, watched, process)
            self._watch.listeners.append(self._news)
            self._shown = Shown(
                self._watch, lambda: self._server.pid, self.status, model=self.model.name, acts=self.acts(),
                address=Address.parse(self.url), api_key=options.api_key,
            )  # fmt: skip
            if self._page is not None:
                self._page.start()
            self._ending = ending.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._ending.close()

    def stop(self) -> None:
        """End `events` soon; from any thread or a signal handler."""
        assert self._watch is not None
        self._watch.stop()

    def acts(self) -> tuple[str, ...]:
        """What changes the choice of experts, in words."""
        recency, family = self._recency, self.options.family
        found = [] if family is None else [f"dial of {'/'.join(Path(family).parts[-2:])}"]
        return (*found, *([] if recency is None else [f"recency prior ({recency.mode})"]))

    def shown(self) -> ServerStatus:
        """What the page shows. Any thread may ask."""
        assert self._shown is not None
        return self._shown.status()

    def hold(self, *, strength: float | None = None, pressure: float | None = None) -> None:
        """As `Watch.hold`."""
        assert self._watch is not None
        self._watch.hold(strength=strength, pressure=pressure)

    def _hold(self, what: str, value: float | None) -> None:
        self.hold(**{what: value})

    def why_blind(self) -> str | None:
        """Why mode resident does nothing, since it cannot be told which experts are in memory; None: it can be, another
        mode is served, or the server does not run now."""
        pid = self._server.pid
        if self._spans is None or pid is None:
            return None
        if self._is_ahead("on"):
            return None  # what is held is known without the kernel
        with suppress(OSError, ConfigError):  # it ends, or the file was taken away meanwhile
            if (why := why_blind(pid, self._spans)) is not None:
                return why
        if self._control is not None and self._control.status().is_blind:
            return "the kernel does not tell the server which pages of the model are in memory"
        return None

    def _expert_spans(self) -> list[tuple[Path, list[tuple[int, int]]]] | None:
        recency = self._recency
        if recency is None or not recency.kind.needs_expert_cache:
            return None
        try:
            return expert_spans(self.model)
        except ConfigError:  # llama.cpp says better what it cannot load
            return []

    def events(self) -> Iterator[dict[str, Any]]:
        """As `Watch.events`, and "died" (the server: why), "started" (again), "blind" (mode resident does nothing:
        why) and "uncached" (experts are not read ahead: why)."""
        assert self._watch is not None
        yield from self._watch.events()

    def status(self) -> dict[str, Any]:
        """JSON-ready: that of the watch, and what the preloaded library says of itself."""
        assert self._watch is not None
        found = {"url": self.url, "starts": self._server.starts, **self._watch.status()}
        if self._control is not None:
            prior = self._control.status()
            found["prior"] = {
                "state": prior.state, "reason": prior.reason, "gain": prior.gain, "mode": prior.mode,
                "blind": self.why_blind(), "layers": prior.layers, "reuse": prior.reuse,
                "ahead": prior.ahead, **prior.counters,
            }  # fmt: skip
        return found

    def _news(self) -> Iterator[dict[str, Any]]:
        yield from self._server.events()
        pid = self._server.pid
        if pid is not None and pid != self._looked_at and self._has_run(pid):
            self._looked_at = pid
            if (why := self.why_blind()) is not None:
                yield {"event": "blind", "pid": pid, "reason": why}
        # Known at the first text, which may come long after the model was loaded.
        if pid is not None and pid != self._uncached and self._is_ahead("no file"):
            self._uncached = pid
            yield {"event": "uncached", "pid": pid, "reason": NO_FILE}
        if self._control is None or self.options.log is None:
            return
        found = self._control.events(self._logged)
        if not found:
            return
        shift_s = time.time() - time.monotonic()
        with self.options.log.open("a", encoding="utf-8") as log:
            if lost := found[0].number - self._logged - 1:
                log.write(json.dumps({"event": "lost", "lines": lost}) + "\n")
            for one in found:
                line = {
                    "event": one.kind, "time": one.time_s + shift_s, "pid": one.pid, "context": one.context,
                    "slot": one.sequence, "position": one.position, "gain": one.gain,
                }  # fmt: skip
                log.write(json.dumps(line) + "\n")
        self._logged = found[-1].number

    def _is_ahead(self, state: str) -> bool:
        return self._control is not None and self._control.status().ahead == state

    def _has_run(self, pid: int) -> bool:
        """A whole graph has run in this process, so that its model is loaded."""
        if self._control is None:
            return False
        try:
            found = self._control.status()
        except ServerError:  # a file that somebody has damaged ends no server
            return False
        return found.pid == pid and found.state == "on"

    def _loras(self, folder: Path) -> list[str]:
        if self._family is None or not self._family.has_adapters:
            return []
        rows = export_gguf_lora(self.model, self._family, folder / "loras")["loras"]
        return [str(row["file"]) for row in rows]

    def _is_ready(self) -> bool:
        found = call(Address.parse(self.url), "/health", api_key=self.options.api_key, timeout_s=2.0)
        if not isinstance(found, dict) or found.get("status") != "ok":
            raise ServerDownError(f"{self.url} is not ready")
        return True

    def _command(self, loras: list[str]) -> tuple[list[str], str, dict[str, str]]:
        """The command, what it is told on its standard input, and its environment."""
        options = self.options
        # Experts that were copied in another order lie in no page of the file, whose residency says nothing then.
        repack = self._recency is None or not self._recency.kind.needs_expert_cache
        if options.llama_server is None:
            given: dict[str, Any] = {"n_parallel": options.parallel, "endpoint_slots": True, "endpoint_metrics": True}
            given |= {} if options.context_tokens is None else {"n_ctx": options.context_tokens}
            given |= {} if repack else {"no_extra_bufts": True}
            # A prompt that was computed at another strength would be gone on with.
            given |= {"cache_prompt": False, "cache_ram_mib": 0} if loras else {}
            given |= options.engine
            settings = {
                "model": str(self.model), "host": options.host, "port": self.port, "threads": options.threads,
                "api_keys": [options.api_key] if options.api_key else [], "loras": [[path, 0.0] for path in loras],
                "options": given,
            }  # fmt: skip
            return [sys.executable, "-s", str(_CHILD)], json.dumps(settings), {"OMP_WAIT_POLICY": "PASSIVE"}
        assert options.llama_server is not None
        command = [str(options.llama_server.resolve()), "-m", str(self.model)]
        command += ["--host", options.host, "--port", str(self.port), "--parallel", str(options.parallel)]
        command += [] if options.context_tokens is None else ["--ctx-size", str(options.context_tokens)]
        command += [] if options.threads is None else ["--threads", str(options.threads)]
        command += [] if repack else ["--no-repack"]
        command += ["--metrics"] if options.page is not None else []
        command += ["--no-cache-prompt", "--cache-ram", "0"] if loras else []
        for path in loras:
            command += ["--lora-scaled", f"{path}:0"]
        # Others can read a command line, the environment of a process its owner alone.
        return [*command, *options.arguments], "", {"LLAMA_API_KEY": options.api_key} if options.api_key else {}
