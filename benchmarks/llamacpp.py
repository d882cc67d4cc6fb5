"""llama.cpp with a model larger than its memory: MiB read, faults and ms per token, and perplexity, by arm.

`python benchmarks/run.py llamacpp` writes results/llamacpp_cpu.csv and llamacpp_cpu_bars.csv; this file by itself is
the worker process. The shipped model, its experts widened with zeros (so that its routing is the trained one) to more
than 1 GB in F16, lies on a loop device of 128 KiB read-ahead with a cap on its reads; llama.cpp maps it (no repacking)
in a cgroup of less memory and decodes held-out text token by token, in windows, each from an empty context. What it
computes is the shipped model: the callback of the prior divides the weights of chosen experts by their sum, which this
engine does not.

`ARMS` are the base, the recency prior in the engine, the trained adapter (as LoRAs, or by the first part of a split
file) and both, and base and priors once more with experts read ahead at the stop where their ids are known. Three
parts:

* rounds: every arm decodes the same `warm` and `tokens` tokens of a window; the order turns round with each round.
* the same with the cap lifted, for the arms without an adapter.
* perplexity, over all windows, with the cap lifted: bytes do not depend on it. What an arm of `resident` computes
  depends on the limit, so those are decoded under it, and the base in some of the windows, to compare their bytes. The
  others are decoded without a limit, from the file that is not widened; `nll_gap` says how far that is from what the
  rounds found in the widened file.

Settings: NAME=VALUE of `Options`, as `tokens=200 read_mib_per_s=300`.
"""

from __future__ import annotations

import gzip
import importlib
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from remoe_adapt._support import disk_reads
from remoe_adapt.bench.harness import process as protocol
from remoe_adapt.bench.harness.disk import loop_disk, read_cap, why_no_cap, why_no_loop
from remoe_adapt.bench.harness.memory_group import memory_group, why_no_groups
from remoe_adapt.bench.harness.process import WorkerProcess
from remoe_adapt.bench.harness.results import REPO_ROOT, bar
from remoe_adapt.bench.harness.widen import widened
from remoe_adapt.engines.gguf.lora import export_gguf_lora
from remoe_adapt.engines.gguf.patch import export_gguf
from remoe_adapt.engines.gguf.split import split_gguf
from remoe_adapt.engines.llamacpp.client import ScaleMap
from remoe_adapt.engines.llamacpp.in_process import LlamaModel
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation import score
from remoe_adapt.family import TRAINED, Family

SHIPPED = REPO_ROOT / "examples" / "tiny_moe"
ADAPTERS = SHIPPED / "family" / TRAINED
TEXTS = REPO_ROOT.parent / "shared" / "data" / "heldout"
# Of the widened file against the file as it is: only the order differs in which sums are rounded.
MOST_NLL_GAP = 0.01
_MIB = 1 << 20


@dataclass(frozen=True)
class Arm:
    """recency, gain, share: of the prior in the engine. strength: of the trained adapter, set as `by` says. engine:
    further options of `LlamaModel`; arms that differ in those are processes of their own, and so are modes among those
    that read ahead: pages that two models map in one process cannot be given back."""

    name: str
    recency: str = "ema"
    gain: float = 0.0
    strength: float = 0.0
    by: str = "lora"
    share: float | None = None
    engine: Mapping[str, Any] = field(default_factory=dict)


BASE = Arm("base")
# Experts are read as soon as their ids are known, and as many stay in memory as the limit leaves room for.
_AHEAD = {"expert_cache": 1.0}
# Of a layer's experts, what the limit leaves room for, and a little less: beside them lies the rest of the model.
_SHARE = 0.5
_COST = (0.05, 0.1)
ARMS = (
    BASE,
    Arm("ema 0.3", gain=0.3),
    Arm("resident 0.2", "resident", 0.2),
    *(Arm(f"adapter {strength:g}", strength=strength) for strength in (0.3, 1.0)),
    Arm("adapter 1, split file", strength=1.0, by="split"),
    Arm("adapter 0.3, ema 0.2", gain=0.2, strength=0.3),
    *(Arm(f"cost {gain:g}", "cost", gain, share=_SHARE) for gain in _COST),
    Arm("base, read ahead", "resident", engine=_AHEAD),
    *(Arm(f"resident {gain:g}, read ahead", "resident", gain, engine=_AHEAD) for gain in (0.15, 0.2)),
    *(Arm(f"cost {gain:g}, read ahead", "cost", gain, share=_SHARE, engine=_AHEAD) for gain in _COST),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """memory_share: of the model's size, the cgroup's limit; warm, tokens: of each arm and round, in front of what is
    counted, and counted; read_mib_per_s: of the disk, 0 for no cap; quality_tokens: in all windows of `window` tokens;
    base_every: of their pairs, one of each source, one is decoded by the base under the limit."""

    work: str = "/tmp"
    expert_bytes: int = 3_500_000
    memory_share: float = 0.6
    warm: int = 32
    tokens: int = 80
    rounds: int = 2
    read_mib_per_s: int = 300
    window: int = 256
    quality_tokens: int = 4096
    base_every: int = 3


class Worker:
    """In the cgroup: holds the model once for each kind of prior, its routers at the base, and decodes."""

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        if request["op"] == "load":
            self._models: dict[tuple[str, str, float | None], LlamaModel] = {}
            self._scales: dict[tuple[str, str, float | None], ScaleMap] = {}
            for by, recency, share in request["models"]:
                model = LlamaModel(
                    request["files"][by], context_tokens=512, load_mode="mmap", repack=False, recency=recency, gain=0.0,
                    share=share, renormalise=True, **request["engine"],
                )  # fmt: skip
                found = model.prior_status()
                assert found is not None
                if not found.acts or found.is_blind:
                    raise ConfigError(f"the prior in the engine is off: {found.reason}")
                loras = {float(s): model.load_lora(path) for s, path in request["loras"] if by == "lora"}
                self._models[by, recency, share] = model
                self._scales[by, recency, share] = ScaleMap(tuple(sorted(loras.items())))
            return {}
        arm, warm = Arm(**request["arm"]), request["warm"]
        model = self._models[_model(arm)]
        if arm.by == "lora":
            scales = self._scales[_model(arm)].scales(arm.strength)
            model.set_loras({lora: scale for lora, scale in scales.items() if scale})
        model.set_gain(arm.gain)
        model.clear()
        nll, took_s, before = [], 0.0, counters()
        for place, (token, target) in enumerate(zip(request["ids"], request["ids"][1:], strict=False)):
            if place == warm:
                before, took_s = counters(), 0.0
            begin_s = time.perf_counter()
            logits_TV = model.decode([token])
            took_s += time.perf_counter() - begin_s
            nll.append(float(score(torch.from_numpy(logits_TV), torch.tensor([target]))[0]))
        after = counters()
        counted = {name: after[name] - before[name] for name in after}
        return {"s": took_s, "tokens": len(nll) - warm, "nll": nll, **counted}


def counters() -> dict[str, int]:
    """Bytes read from the disk and major faults of this process, so far."""
    read_bytes, faults = disk_reads()
    # There is no memory group either where nobody tells them.
    assert read_bytes is not None and faults is not None
    return {"bytes": read_bytes, "faults": faults}


def widened_gguf(work: str, expert_bytes: int) -> Path:
    """The widened model as GGUF, in the working folder, made once."""
    folder = widened(SHIPPED, Path(work) / "remoe-llamacpp", dtype=torch.bfloat16, expert_bytes=expert_bytes)
    path = folder / "model.gguf"
    _write(folder, path)
    return path


def prepare(options: Options) -> tuple[Path, Path, list[tuple[float, str]]]:
    """The model as GGUF, widened and as it is, and the LoRAs of its family, in the working folder, made once."""
    model = widened_gguf(options.work, options.expert_bytes)
    plain, loras = model.with_name("plain.gguf"), model.with_name("loras")
    _write(SHIPPED, plain)
    if not loras.exists():
        export_gguf_lora(model, Family.load(ADAPTERS), loras)
    strengths = Family.load(ADAPTERS).strengths
    return model, plain, [(s, str(loras / f"{Family.adapter_name(s)}.gguf")) for s in strengths]


def _write(folder: Path, path: Path) -> None:
    if path.exists():
        return
    sys.path.insert(0, str(REPO_ROOT / "tests" / "support"))  # the converter is the tests' own
    write_gguf = importlib.import_module("gguf_writer").write_gguf
    draft = path.with_suffix(".tmp")
    write_gguf(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16), "qwen2moe", draft, weights="F16")
    draft.replace(path)


def windows_of(options: Options) -> list[list[int]]:
    """Held-out text, windows of its sources in turn; where there is none, of the README."""
    needed = 8 * options.quality_tokens + 4000  # characters; a token has some four
    texts = [(REPO_ROOT / "README.md").read_text(encoding="utf-8")]
    if (TEXTS / "wikitext2_valid.txt.gz").exists():
        with gzip.open(TEXTS / "wikitext2_valid.txt.gz", "rt", encoding="utf-8") as file:
            texts = [file.read(needed)]
        with gzip.open(TEXTS / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        texts.append("\n".join(f"{row['question']}\n{row['answer']}" for row in rows)[:needed])
    tokenizer, size = AutoTokenizer.from_pretrained(SHIPPED), options.window
    sources = [tokenizer(text)["input_ids"] for text in texts]
    each = range(0, min(map(len, sources)) - size + 1, size)
    return [ids[begin:][:size] for begin in each for ids in sources][: options.quality_tokens // size]


class Run:
    """Processes under the limit, one for each set of engine options, and one without a limit; what arms found."""

    def __init__(self, options: Options, windows: Sequence[Sequence[int]], arms: Sequence[Arm]) -> None:
        self._options, self._windows, self._arms = options, windows, arms
        self._workers: dict[str, WorkerProcess] = {}
        self.limit_bytes = 0

    def start(self, ending: ExitStack) -> Any:
        """Disk, groups and processes are there until `ending`; the cap on reads, None without."""
        options = self._options
        source, plain, loras = prepare(options)
        family, size = Family.load(ADAPTERS), source.stat().st_size
        self.model_bytes, self.limit_bytes = size, int(options.memory_share * size)
        engines = {_key(arm): arm.engine for arm in self._arms}
        room = len(engines) * (size + size // 16) + 64 * _MIB
        disk = ending.enter_context(loop_disk(Path(options.work), room))
        files = {}
        for number, key in enumerate(engines):
            # A file of its own for each: pages that two processes map are charged to one, and cannot be put out.
            folder = disk.folder / str(number)
            base = split_gguf(source, family, 0.0, folder / "base" / "m.gguf")["out"]
            files[key] = {"lora": base}
            if any(arm.by == "split" for arm in self._arms if _key(arm) == key):
                files[key]["split"] = export_gguf(base, family, loras[-1][0], folder / "strongest" / "m.gguf")["out"]
        disk.forget()
        cap = ending.enter_context(read_cap(disk.device)) if options.read_mib_per_s else None
        command = [sys.executable, __file__]
        for number, key in enumerate(engines):
            group = ending.enter_context(memory_group(f"llamacpp{number}"))
            group.limit(self.limit_bytes)
            worker = self._workers[key] = WorkerProcess("llama.cpp", group, command, cap)
            ending.callback(worker.close)
            models = sorted({_model(arm) for arm in self._arms if _key(arm) == key}, key=str)
            worker.ask("load", models=models, files=files[key], loras=loras, engine=engines[key])
        self._free = WorkerProcess("llama.cpp without a limit", None, command)
        ending.callback(self._free.close)
        models = sorted({_model(_without_limit(arm)) for arm in self._arms if not needs_limit(arm)}, key=str)
        self._free.ask("load", models=models, files={"lora": str(plain)}, loras=loras, engine={})
        return cap

    def rounds(self, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
        """Arms by turns over the same pieces; sums of what each found, nll by window."""
        options = self._options
        piece = options.warm + options.tokens + 1
        sums: dict[str, dict[str, Any]] = {arm.name: {} for arm in arms}
        for number in range(options.rounds):
            for arm in arms if number % 2 == 0 else reversed(arms):
                window = number % len(self._windows)
                _add(sums[arm.name], self._limited(arm, self._windows[window][:piece], options.warm), window)
        return sums

    def quality(self, arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
        """All windows, for each arm where it must be; nll by window."""
        sums: dict[str, dict[str, Any]] = {arm.name: {} for arm in arms}
        for arm in arms:
            for number, ids in enumerate(self._windows):
                found = self._limited(arm, ids, 0) if needs_limit(arm) else self._unlimited(arm, ids)
                _add(sums[arm.name], found, number)
        return sums

    def base_bytes(self) -> dict[int, float]:
        """Bytes that the base reads under the limit, by window, in some of them."""
        chosen = [n for n in range(len(self._windows)) if n // 2 % self._options.base_every == 0]
        return {n: self._limited(BASE, self._windows[n], 0)["bytes"] for n in chosen}

    def _limited(self, arm: Arm, ids: Sequence[int], warm: int) -> dict[str, Any]:
        return self._workers[_key(arm)].ask("decode", arm=asdict(arm), ids=list(ids), warm=warm)

    def _unlimited(self, arm: Arm, ids: Sequence[int]) -> dict[str, Any]:
        return self._free.ask("decode", arm=asdict(_without_limit(arm)), ids=list(ids), warm=0)


def needs_limit(arm: Arm) -> bool:
    """Whether what it computes depends on what is in memory."""
    return arm.recency == "resident" and arm.gain > 0


def _key(arm: Arm) -> str:
    """Of its process."""
    return json.dumps([dict(arm.engine), arm.recency if arm.engine else ""], sort_keys=True)


def _model(arm: Arm) -> tuple[str, str, float | None]:
    """Of its model in that process."""
    return arm.by, arm.recency, arm.share


def _without_limit(arm: Arm) -> Arm:
    """One that computes the same from a file that is all in memory."""
    prior = (arm.recency, arm.share) if arm.gain else (BASE.recency, BASE.share)
    return replace(arm, engine={}, by="lora", recency=prior[0], share=prior[1])


def _add(sums: dict[str, Any], found: Mapping[str, Any], window: int) -> None:
    for name in ("s", "bytes", "faults", "tokens"):
        sums[name] = sums.get(name, 0) + found[name]
    sums.setdefault("nll", {})[window] = found["nll"]
    sums.setdefault("bytes_in", {})[window] = found["bytes"]


def run(options: Options, arms: Sequence[Arm] = ARMS) -> dict[str, Any]:
    """Key `rows`, one for each arm, `bars`, and the settings."""
    if why := why_no_groups() or why_no_loop() or (why_no_cap() if options.read_mib_per_s else None):
        return {"skipped": why}
    began_s = time.perf_counter()
    windows = windows_of(options)
    bench = Run(options, windows, arms)
    with ExitStack() as ending:
        cap = bench.start(ending)
        if cap:
            cap.hold(options.read_mib_per_s * _MIB)
        capped = bench.rounds(arms)
        if cap:
            cap.hold(0)
        uncapped = bench.rounds([arm for arm in arms if not arm.strength])
        base_bytes = bench.base_bytes()
        quality = bench.quality(arms)
    rows = [row(arm, capped, uncapped, quality, base_bytes) for arm in arms]
    return {
        "rows": rows, "bars": bars(rows, arms), "model_bytes": bench.model_bytes, "limit_bytes": bench.limit_bytes,
        **asdict(options), "seconds": round(time.perf_counter() - began_s, 1),
    }  # fmt: skip


def row(
    arm: Arm,
    capped: Mapping[str, Mapping[str, Any]],
    uncapped: Mapping[str, Mapping[str, Any]],
    quality: Mapping[str, Mapping[str, Any]],
    base_bytes: Mapping[int, float],
) -> dict[str, Any]:
    """One arm's figures per token.

    ratio: of MiB read in the capped rounds, to the base; quality_ratio: the same of windows, under the limit, those
    that the base was decoded in. nll_gap: mean difference of one token between the widened file and the file as it is.
    """
    found, base = capped[arm.name], capped[BASE.name]
    texts, base_texts = quality[arm.name], quality[BASE.name]
    result: dict[str, Any] = {
        "arm": arm.name,
        "strength": arm.strength,
        "by": arm.by,
        "recency": arm.recency if arm.gain else "",
        "gain": arm.gain,
        "mib_per_token": found["bytes"] / _MIB / found["tokens"],
        "faults_per_token": found["faults"] / found["tokens"],
        "ms_per_token": found["s"] * 1e3 / found["tokens"],
        "ratio": found["bytes"] * base["tokens"] / base["bytes"] / found["tokens"],
        "uncapped_ms_per_token": None,
        "quality_mib_per_token": None,
        "quality_ratio": None,
        "ppl_ratio": math.exp(
            fmean(
                mine - theirs
                for n, nll in texts["nll"].items()
                for mine, theirs in zip(nll, base_texts["nll"][n], strict=True)
            )
        ),
        "nll_gap": None,
        "quality_tokens": sum(map(len, texts["nll"].values())),
    }
    if arm.name in uncapped:
        free = uncapped[arm.name]
        result["uncapped_ms_per_token"] = free["s"] * 1e3 / free["tokens"]
    if needs_limit(arm):
        result["quality_mib_per_token"] = texts["bytes"] / _MIB / texts["tokens"]
        result["quality_ratio"] = sum(texts["bytes_in"][n] for n in base_bytes) / sum(base_bytes.values())
    else:
        gaps = [abs(a - b) for n, nll in found["nll"].items() for a, b in zip(nll, texts["nll"][n], strict=False)]
        result["nll_gap"] = fmean(gaps)
    if arm == BASE:
        result["quality_mib_per_token"] = (
            sum(base_bytes.values()) / _MIB / sum(len(texts["nll"][n]) for n in base_bytes)
        )
        result["quality_ratio"] = 1.0
    return result


def bars(rows: Sequence[Mapping[str, Any]], arms: Sequence[Arm]) -> list[dict[str, Any]]:
    """What the arms are held to, each with the arm that did best."""
    by_name = {line["arm"]: line for line in rows}
    adapters = {arm.name: by_name[arm.name]["ratio"] for arm in arms if arm.strength == 1.0 and not arm.gain}
    found = [_best("trained adapter at strength 1: MiB per token / the base's", adapters, 0.75)]
    # Of few tokens a perplexity ratio says little, and the base's must be that of the file that is widened.
    is_known = by_name[BASE.name]["quality_tokens"] >= 4000 and by_name[BASE.name]["nll_gap"] <= MOST_NLL_GAP
    resident = {
        arm.name: by_name[arm.name]["quality_ratio"]
        for arm in arms
        if is_known and needs_limit(arm) and not arm.strength and by_name[arm.name]["ppl_ratio"] <= 1.02
    }
    found.append(_best("resident, ppl ratio <= 1.02 over 4,000 tokens: MiB per token / the base's", resident, 0.25))
    ahead = {
        arm.name: by_name[other.name]["uncapped_ms_per_token"] / by_name[arm.name]["uncapped_ms_per_token"]
        for arm in arms
        for other in arms
        if arm.engine and not arm.strength and _differ_in_engine(arm, other)
    }
    found.append(_best("read-ahead, no cap: times faster than faults", ahead, 1.3, at_most=False))
    return found


def _differ_in_engine(arm: Arm, plain: Arm) -> bool:
    alike = arm.gain == plain.gain and ((arm.recency, arm.share) == (plain.recency, plain.share) or not arm.gain)
    return alike and not plain.engine and arm.strength == plain.strength


def _best(title: str, values: Mapping[str, float], target: float, *, at_most: bool = True) -> dict[str, Any]:
    arm = (min if at_most else max)(values, key=values.__getitem__, default=None)
    return bar(title, values.get(arm or ""), target, at_most=at_most) | {"arm": arm}


if __name__ == "__main__":
    protocol.speak(Worker().answer)
