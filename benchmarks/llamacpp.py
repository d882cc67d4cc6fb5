"""llama.cpp with a model larger than its memory, at every strength: MiB read, major faults and ms per token.

`python benchmarks/llamacpp.py` writes results/llamacpp_cpu.csv. The shipped model, its experts widened with zeros (so
that its routing is the trained one) to more than 1 GB in F16, lies on a loop device of 128 KiB read-ahead with a cap on
its reads; llama.cpp maps it (no repacking) in a cgroup of less memory, and reads held-out text token by token. Strength
is set by the family's LoRAs. Options: NAME=VALUE of `Options`, as `tokens=200 read_mib_per_s=300`.

This engine does not renormalise the weights of this architecture's chosen experts, which the shipped model does: its
texts are worse here, its routing is what the engine makes of it.
"""

from __future__ import annotations

import gzip
import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_adapt.bench import protocol
from remoe_adapt.bench.decode_process import WorkerProcess
from remoe_adapt.bench.limits import memory_group, why_no_groups
from remoe_adapt.bench.loop_disk import LoopDisk, loop_disk, why_no_loop
from remoe_adapt.bench.results import REPO_ROOT, append_row, environment
from remoe_adapt.bench.widen import widened
from remoe_adapt.export.gguf_lora import export_gguf_lora
from remoe_adapt.family import Family
from remoe_adapt.llama_engine import LlamaModel
from remoe_adapt.runtime.llama_scales import ScaleMap

RESULTS = Path(__file__).parent / "results" / "llamacpp_cpu.csv"
SHIPPED = REPO_ROOT / "examples" / "tiny_moe"
TEXT = REPO_ROOT.parent / "shared" / "data" / "heldout" / "wikitext2_valid.txt.gz"
BAR = 0.75
_BLKIO = Path("/sys/fs/cgroup/blkio")
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """memory_share: of the model's size, the cgroup's limit; warm, tokens: of each strength and round, in front of what
    is counted, and counted; read_mib_per_s: of the disk, 0 for no cap."""

    work: str = "/tmp"
    expert_bytes: int = 3_500_000
    memory_share: float = 0.6
    warm: int = 48
    tokens: int = 112
    rounds: int = 1
    read_mib_per_s: int = 300


class Worker:
    """In the cgroup: holds the model, decodes at a strength."""

    def answer(self, request: Any) -> dict[str, Any]:
        if request["op"] == "load":
            self._model = LlamaModel(request["model"], context_tokens=512, load_mode="mmap", repack=False)
            loras = {float(s): self._model.load_lora(path) for s, path in request["loras"]}
            self._scales = ScaleMap(tuple(sorted(loras.items())))
            return {"pid": os.getpid()}
        self._model.set_loras({lora: s for lora, s in self._scales.scales(request["strength"]).items() if s})
        self._model.clear()
        ids, warm = request["ids"], request["warm"]
        for token in ids[:warm]:
            self._model.decode([token])
        before, begin_s = counters(), time.perf_counter()
        for token in ids[warm:]:
            self._model.decode([token])
        took_s, after = time.perf_counter() - begin_s, counters()
        return {"s": took_s, **{name: after[name] - before[name] for name in after}}


def counters() -> dict[str, int]:
    """Bytes read from the disk and major faults of this process, so far."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    faults = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])
    return {"bytes": int(io["read_bytes"]), "faults": faults}


@contextmanager
def read_cap(disk: LoopDisk, mib_per_s: int) -> Iterator[Path | None]:
    """A blkio group of cgroup v1 whose members read no faster from the disk; None where there is none, or no cap."""
    folder = _BLKIO / f"remoe-bench-{os.getpid()}"
    if not mib_per_s or not os.access(_BLKIO / "blkio.throttle.read_bps_device", os.W_OK):
        yield None
        return
    number = Path(disk.device).stat().st_rdev
    folder.mkdir()
    try:
        rule = f"{os.major(number)}:{os.minor(number)} {mib_per_s * _MIB}"
        (folder / "blkio.throttle.read_bps_device").write_text(rule)
        yield folder
    finally:
        for _ in range(100):
            try:
                folder.rmdir()
                break
            except OSError:
                time.sleep(0.05)


def prepare(options: Options) -> tuple[Path, list[tuple[float, str]]]:
    """The widened model as GGUF and the LoRAs of its family, in the working folder, made once."""
    sys.path.insert(0, str(REPO_ROOT / "tests"))  # the converter is the tests' own
    write_gguf = importlib.import_module("gguf_writer").write_gguf

    folder = widened(
        SHIPPED, Path(options.work) / "remoe-llamacpp", dtype=torch.bfloat16, expert_bytes=options.expert_bytes
    )
    model, loras = folder / "model.gguf", folder / "loras"
    if not model.exists():
        draft = folder / "model.tmp"
        write_gguf(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), "qwen2moe", draft, weights="F16")
        draft.replace(model)
    if not loras.exists():
        export_gguf_lora(model, Family.load(SHIPPED / "family"), loras)
    strengths = Family.load(SHIPPED / "family").strengths
    return model, [(s, str(loras / f"{Family.adapter_name(s)}.gguf")) for s in strengths]


def text_ids(count: int) -> list[int]:
    """Held-out text, or where there is none the README."""
    text = (REPO_ROOT / "README.md").read_text(encoding="utf-8")
    if TEXT.exists():
        with gzip.open(TEXT, "rt", encoding="utf-8") as file:
            text = file.read(20 * count + 4000)
    ids: list[int] = AutoTokenizer.from_pretrained(SHIPPED)(text)["input_ids"]
    return ids[:count]


def run(options: Options) -> dict[str, Any]:
    if why := why_no_groups() or why_no_loop():
        return {"skipped": why}
    source, loras = prepare(options)
    size = source.stat().st_size
    strengths = [0.0, *(strength for strength, _ in loras)]
    ids = text_ids(options.rounds * (options.warm + options.tokens))
    sums = {strength: {"s": 0.0, "bytes": 0, "faults": 0} for strength in strengths}
    with loop_disk(Path(options.work), size + size // 16 + 64 * _MIB) as disk, memory_group("llamacpp") as group:
        model = disk.folder / source.name
        with source.open("rb") as old, model.open("wb") as new:
            while sent := os.sendfile(new.fileno(), old.fileno(), None, 64 * _MIB):
                assert sent
        disk.forget()
        group.limit(int(options.memory_share * size))
        with read_cap(disk, options.read_mib_per_s) as capped:
            command = [sys.executable, __file__, "worker"]
            if capped is not None:
                join = 'echo $$ > "$0" && exec "$@"'
                command = ["/bin/sh", "-c", join, str(capped / "cgroup.procs"), *command]
            worker = WorkerProcess("llama.cpp", group, command)
            try:
                worker.ask("load", model=str(model), loras=loras)
                for number in range(options.rounds):
                    piece = ids[number * (options.warm + options.tokens) :][: options.warm + options.tokens]
                    for strength in strengths if number % 2 == 0 else reversed(strengths):
                        found = worker.ask("decode", strength=strength, ids=piece, warm=options.warm)
                        for name in sums[strength]:
                            sums[strength][name] += found[name]
            finally:
                worker.close()
        rows = [row(strength, sums, options.rounds * options.tokens) for strength in strengths]
        return {
            "rows": rows, "bar": BAR, "met": rows[-1]["ratio"] <= BAR, "model_bytes": size,
            "limit_bytes": int(options.memory_share * size), "capped": capped is not None, **asdict(options),
        }  # fmt: skip


def row(strength: float, sums: dict[float, dict[str, float]], tokens: int) -> dict[str, float]:
    """One strength's figures per token; ratio: of MiB read, to the base."""
    found = sums[strength]
    return {
        "strength": strength,
        "mib_per_token": found["bytes"] / _MIB / tokens,
        "faults_per_token": found["faults"] / tokens,
        "ms_per_token": found["s"] * 1e3 / tokens,
        "ratio": found["bytes"] / sums[0.0]["bytes"],
    }


def main() -> None:
    if sys.argv[1:] == ["worker"]:
        protocol.speak(Worker().answer)
        return
    given: dict[str, Any] = {
        name: value if name == "work" else json.loads(value)
        for name, _, value in (a.partition("=") for a in sys.argv[1:])
    }
    result = run(Options(**given))
    if "skipped" not in result:
        print(
            f"{'strength':>8} {'MiB/token':>10} {'faults/token':>13} {'ms/token':>9} {'MiB to base':>12}",
            file=sys.stderr,
        )
        for line in result["rows"]:
            values = (line["mib_per_token"], line["faults_per_token"], line["ms_per_token"], line["ratio"])
            print("{:8g} {:10.1f} {:13.1f} {:9.1f} {:12.3f}".format(line["strength"], *values), file=sys.stderr)
            settings = {
                name: result[name]
                for name in ("model_bytes", "limit_bytes", "capped", "read_mib_per_s", "tokens", "rounds")
            }
            append_row(RESULTS, {**environment(), **line, **settings})
    print(json.dumps(result))


if __name__ == "__main__":
    main()
