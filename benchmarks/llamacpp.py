"""llama.cpp with a model larger than its memory, at every strength: MiB read, major faults and ms per token.

`python benchmarks/run.py llamacpp` writes results/llamacpp_cpu.csv; this file by itself is the worker process. The
shipped model, its experts widened with zeros (so that its routing is the trained one) to more than 1 GB in F16, lies on
a loop device of 128 KiB read-ahead with a cap on its reads; llama.cpp maps it (no repacking) in a cgroup of less
memory, and reads held-out text token by token. Every strength reads the same text; their order turns round with each
round, so that none is always the first. Strength is set by the family's LoRAs, that of the arm "split" by the first
part of a split file alone. Settings: NAME=VALUE of `Options`, as `tokens=200 read_mib_per_s=300`.

This engine does not renormalise the weights of this architecture's chosen experts, which the shipped model does: its
texts are worse here, its routing is what the engine makes of it.
"""

from __future__ import annotations

import gzip
import importlib
import os
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_adapt.bench.harness import process as protocol
from remoe_adapt.bench.harness.disk import loop_disk, read_cap, why_no_cap, why_no_loop
from remoe_adapt.bench.harness.memory_group import memory_group, why_no_groups
from remoe_adapt.bench.harness.process import WorkerProcess
from remoe_adapt.bench.harness.results import REPO_ROOT
from remoe_adapt.bench.harness.widen import widened
from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.engines.gguf.patch import export_gguf
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.llamacpp.client import ScaleMap
from remoe_adapt.engines.llamacpp.in_process import LlamaModel
from remoe_adapt.family.family import Family

SHIPPED = REPO_ROOT / "examples" / "tiny_moe"
TEXT = REPO_ROOT.parent / "shared" / "data" / "heldout" / "wikitext2_valid.txt.gz"
BAR = 0.75
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Options:
    """memory_share: of the model's size, the cgroup's limit; warm, tokens: of each arm and round, in front of what is
    counted, and counted; read_mib_per_s: of the disk, 0 for no cap."""

    work: str = "/tmp"
    expert_bytes: int = 3_500_000
    memory_share: float = 0.6
    warm: int = 32
    tokens: int = 80
    rounds: int = 2
    read_mib_per_s: int = 300


class Worker:
    """In the cgroup: holds the model, its routers at the base and at the strongest point, and decodes."""

    def answer(self, request: Any) -> dict[str, Any]:
        if request["op"] == "load":
            options: dict[str, Any] = {"context_tokens": 512, "load_mode": "mmap", "repack": False}
            self._base, self._split = (LlamaModel(request[name], **options) for name in ("base", "split"))
            loras = {float(s): self._base.load_lora(path) for s, path in request["loras"]}
            self._scales = ScaleMap(tuple(sorted(loras.items())))
            return {"pid": os.getpid()}
        if request["by"] == "lora":
            self._base.set_loras({lora: s for lora, s in self._scales.scales(request["strength"]).items() if s})
        model = self._base if request["by"] == "lora" else self._split
        model.clear()
        ids, warm = request["ids"], request["warm"]
        for token in ids[:warm]:
            model.decode([token])
        before, begin_s = counters(), time.perf_counter()
        for token in ids[warm:]:
            model.decode([token])
        took_s, after = time.perf_counter() - begin_s, counters()
        return {"s": took_s, **{name: after[name] - before[name] for name in after}}


def counters() -> dict[str, int]:
    """Bytes read from the disk and major faults of this process, so far."""
    io = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    faults = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[9])
    return {"bytes": int(io["read_bytes"]), "faults": faults}


def prepare(options: Options) -> tuple[Path, list[tuple[float, str]]]:
    """The widened model as GGUF and the LoRAs of its family, in the working folder, made once."""
    sys.path.insert(0, str(REPO_ROOT / "tests" / "support"))  # the converter is the tests' own
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
    if why := why_no_groups() or why_no_loop() or (why_no_cap() if options.read_mib_per_s else None):
        return {"skipped": why}
    source, loras = prepare(options)
    size, family = source.stat().st_size, Family.load(SHIPPED / "family")
    arms = [("lora", 0.0), *(("lora", strength) for strength, _ in loras), ("split", loras[-1][0])]
    piece = options.warm + options.tokens
    ids = text_ids(options.rounds * piece)
    sums = {arm: {"s": 0.0, "bytes": 0, "faults": 0} for arm in arms}
    with ExitStack() as ending:
        disk = ending.enter_context(loop_disk(Path(options.work), size + size // 16 + 64 * _MIB))
        base = split_gguf(source, family, 0.0, disk.folder / "base" / "m.gguf")["out"]
        strongest = export_gguf(base, family, loras[-1][0], disk.folder / "strongest" / "m.gguf")["out"]
        disk.forget()
        group = ending.enter_context(memory_group("llamacpp"))
        group.limit(int(options.memory_share * size))
        cap = ending.enter_context(read_cap(disk.device)) if options.read_mib_per_s else None
        if cap:
            cap.hold(options.read_mib_per_s * _MIB)
        worker = WorkerProcess("llama.cpp", group, [sys.executable, __file__], cap)
        ending.callback(worker.close)
        worker.ask("load", base=base, split=strongest, loras=loras)
        for number in range(options.rounds):
            text = ids[number * piece :][:piece]
            for by, strength in arms if number % 2 == 0 else reversed(arms):
                found = worker.ask("decode", by=by, strength=strength, ids=text, warm=options.warm)
                for name in sums[by, strength]:
                    sums[by, strength][name] += found[name]
    rows = [row(arm, sums, options.rounds * options.tokens) for arm in arms]
    return {
        "rows": rows, "bar": BAR, "met": max(line["ratio"] for line in rows[-2:]) <= BAR, "model_bytes": size,
        "limit_bytes": int(options.memory_share * size), **asdict(options),
    }  # fmt: skip


def row(arm: tuple[str, float], sums: dict[tuple[str, float], dict[str, float]], tokens: int) -> dict[str, Any]:
    """One arm's figures per token; ratio: of MiB read, to the base."""
    found = sums[arm]
    return {
        "strength": arm[1],
        "by": arm[0],
        "mib_per_token": found["bytes"] / _MIB / tokens,
        "faults_per_token": found["faults"] / tokens,
        "ms_per_token": found["s"] * 1e3 / tokens,
        "ratio": found["bytes"] / sums["lora", 0.0]["bytes"],
    }


if __name__ == "__main__":
    protocol.speak(Worker().answer)
