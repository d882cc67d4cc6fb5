"""A llama-server in a process of its own: the one inside the xllamacpp wheel, which runs the same code.

As a program: reads settings as JSON from its first argument, prints its address, ends with its standard input.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

F32 = 0  # ggml's number


class LlamaChild:
    """Starts, kills and starts again, always on the same port. loras: (file, scale) each.

    KV in F32 and no flash attention: answers depend on a batch's neighbours by rounding alone, and hardly by that.
    """

    def __init__(
        self,
        model: Path,
        loras: Sequence[tuple[Path, float]] = (),
        *,
        prefix: Sequence[str] = (),
        **options: Any,
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        exact = {"cache_type_k": F32, "cache_type_v": F32, "flash_attn_type": 0, "kv_unified": False}
        self._settings = {"model": str(model), "port": self.port, "loras": [[str(p), s] for p, s in loras]}
        self._settings["options"] = {**exact, "n_ctx": 2048, **options}
        self._prefix = list(prefix)
        self._process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> LlamaChild:
        command = [*self._prefix, sys.executable, str(Path(__file__).resolve()), json.dumps(self._settings)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "llama-server did not start"
        assert json.loads(line)["port"] == self.port
        return self

    def kill(self) -> None:
        """As the OOM killer does."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> LlamaChild:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.kill()


def _serve(settings: dict[str, Any]) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = settings["model"], ["127.0.0.1"], settings["port"]
    params.n_parallel, params.warmup, params.endpoint_slots, params.verbosity = 1, False, True, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    for name, value in settings["options"].items():
        if name in ("flash_attn_type", "cache_type_k", "cache_type_v"):
            value = type(getattr(params, name))(value)
        setattr(params, name, value)
    if settings["loras"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in settings["loras"]]
    server = xllamacpp.Server(params)
    print(json.dumps({"port": int(server.listening_address.rpartition(":")[2])}), flush=True)  # noqa: T201
    sys.stdin.read()


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
