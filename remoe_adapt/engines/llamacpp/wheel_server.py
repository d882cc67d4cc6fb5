"""The llama.cpp server inside the xllamacpp wheel, as a program: `remoe serve MODEL.gguf` runs it in a child process.

Run by its path, with settings as one line of JSON on standard input: model (path), host, port, api_keys, loras ([path,
scale] each), threads (None: the engine's default) and options (other attributes of CommonParams). Serves, and ends with
its standard input, so that no server outlives whoever started it.

Nothing of remoe is imported, so that a server has no more memory than it needs.
"""

from __future__ import annotations

import importlib
import json
import sys
from typing import Any

# The engine has classes of its own for these, made from numbers.
_ENUMS = ("flash_attn_type", "cache_type_k", "cache_type_v", "load_mode")


def serve(settings: dict[str, Any]) -> Any:
    """The running server; it stops with the last reference to it."""
    xllamacpp: Any = importlib.import_module("xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path, params.hostnames, params.port = settings["model"], [settings["host"]], settings["port"]
    params.api_keys = settings["api_keys"]
    # 0: warnings and errors alone.
    params.verbosity = 0
    if settings["threads"] is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings["threads"]
    for name, value in settings["options"].items():
        setattr(params, name, type(getattr(params, name))(value) if name in _ENUMS else value)
    if settings["loras"]:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(path, scale) for path, scale in settings["loras"]]
    return xllamacpp.Server(params)


def main() -> None:
    server = serve(json.loads(sys.stdin.readline()))
    sys.stdin.read()
    del server


if __name__ == "__main__":
    main()
