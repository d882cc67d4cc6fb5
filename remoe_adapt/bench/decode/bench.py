"""`remoe bench decode`: what a token costs when experts come from storage, against the other ways to get them.

Every way to hold the experts is a process of its own. All live at once and take turns, document by document, in an
order that changes, over the same held-out text: a prompt at once, then one given token per step with the KV cache,
batch 1. Times are medians over turns. Everyone reads from a disk of known read-ahead, no faster than `read_mib_per_s`.

Where memory can be limited, there are two limits, each what our caches named first take: the code of libraries is in
memory before, charged to nobody who is limited, so a limit is anonymous memory, the kernel's own, and page cache of the
weights.

* `memory_limit_bytes`: a quarter of the experts as they are. Ours are `cache25`, with the adapter, the resident prior
  (`cache25_prior`), and as many bytes of experts in 4 and 8 bits; beside them accelerate's disk offload, memory-mapped
  weights and stock llama.cpp on memory-mapped GGUFs, `llamacpp_f16`, `llamacpp_q4` with experts in the four bits of our
  packs, and `llamacpp_q4_resident` with the prior. Nearly all of the 4-bit experts fit in there, whoever holds them.
* `tight_limit_bytes`: a quarter of the 4-bit experts. Ours are `cache7_q4` and `cache7_q4_prior`; beside them
  llama.cpp on the same 4-bit file, `llamacpp_q4_tight` without and `llamacpp_q4_tight_resident` with the prior.

Perplexity ratios of llama.cpp are to its own F16 file, as it may compute something else than transformers does.
Afterwards more text is decoded without the clock, the cap lifted, so that perplexity ratios are of more tokens than fit
into the timed part.
"""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from remoe_adapt.bench import harness
from remoe_adapt.bench.decode.figures import arm_row, bars, coded_bars, limit_ms, llama_bars, miss_bursts, ppl_ratio
from remoe_adapt.bench.decode.gguf_copy import write_gguf_copies
from remoe_adapt.checkpoints import load_with_tokenizer
from remoe_adapt.engines.llamacpp import library as llama_library
from remoe_adapt.errors import ConfigError, DataError, MissingDependencyError, RemoeError, UncacheableError
from remoe_adapt.evaluation import held_out
from remoe_adapt.expert_cache import READ_THREADS, pack_experts

BUDGET = 0.25
PROMPT_TOKENS = 16
# Shorter documents have no step worth timing.
_LEAST_STEPS = 16
_REHEARSAL_STEPS = 16
# Raw reads of a turn: enough for a rate, and short beside the turns of the arms.
_MOST_BURSTS = 100
# Processes of llama.cpp, by name: the file.
_LLAMA = {
    "llamacpp_f16": "f16", "llamacpp_q4": "q4", "llamacpp_q4_resident": "q4", "llamacpp_q4_tight": "q4",
    "llamacpp_q4_tight_resident": "q4",
}  # fmt: skip
# What others offer for the same memory, by process: the regime.
_OTHERS = {
    "accelerate_disk": "accelerate", "transformers_disk": "transformers", "mmap_cgroup": "mapped",
    **dict.fromkeys(_LLAMA, "llamacpp"),
}  # fmt: skip
# Those with a prior, by name: further options of `LlamaModel`, and the gains of their arms.
_RESIDENT = {"recency": "resident", "gain": 0.0, "expert_cache": 1.0}
_ENGINES: dict[str, dict[str, Any]] = {"llamacpp_q4_resident": _RESIDENT, "llamacpp_q4_tight_resident": _RESIDENT}
_LLAMA_GAINS = {"llamacpp_q4_resident": (0.2,), "llamacpp_q4_tight_resident": (0.1, 0.15, 0.2)}
_SCORED = ("stock", "cache25", "cache25_prior", "cache25_q4", "cache25_q8", "cache7_q4_prior", *_LLAMA)
# Processes that hold experts in fewer bits, by name: how many, and the budget as a share of their own bytes; None: as
# many bytes as a quarter of bf16 experts takes.
_CODED = {"cache25_q4": (4, None), "cache25_q8": (8, None), "cache7_q4": (4, 0.25), "cache7_q4_prior": (4, 0.25)}
_CODED_GAINS = (0.1, 0.15, 0.2)
# Limits by name: whose need it is, and whom else it holds.
_TIGHT = ("llamacpp_q4_tight", "llamacpp_q4_tight_resident")
_LIMITS = {
    "memory_limit_bytes": (
        ("cache25", "cache25_prior", "cache25_q4", "cache25_q8"),
        tuple(name for name in _OTHERS if name not in _TIGHT),
    ),
    "tight_limit_bytes": (("cache7_q4", "cache7_q4_prior"), _TIGHT),
}
# Types of weights that all arms compute with.
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# What is on the disk, in sizes of the checkpoint: itself, its packs, what three others make of its experts, the GGUFs.
_DISK_COPIES = 9
# Our total memory is measured with caches full; a longer document needs a little more.
_LIMIT_SLACK_BYTES = 8 << 20
# Options that a result states, beside those that it states in other words.
_SETTINGS = ("threads", "read_threads", "direct_io", "prefetch", "pack", "read_mib_per_s")


@dataclass(frozen=True)
class DecodeOptions:
    """What to decode and how; None means the default that is described at the command line."""

    model: str | Path | None = None
    family: str | Path | None = None
    data: Sequence[str | Path] = ()
    tokens: int = 520
    quality_tokens: int = 900
    strengths: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0)
    gains: Sequence[float] = (0.1, 0.15, 0.2, 0.3)
    work: Path | None = None
    keep: bool = False
    threads: int = 1
    read_threads: int = READ_THREADS
    dtype: str = "float32"
    expert_bytes: int = harness.EXPERT_BYTES
    direct_io: bool = True
    prefetch: bool = False
    pack: bool = True
    limits: bool = True
    bits: bool = True
    read_mib_per_s: float = 300.0
    turn_seconds: float = 3.0
    max_seconds: float = 400.0


@dataclass
class _Arm:
    name: str
    worker: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: dict[tuple[int, int], dict[str, Any]] = field(default_factory=dict)
    nll: dict[tuple[int, int], float] = field(default_factory=dict)


def quickly(options: DecodeOptions) -> DecodeOptions:
    """The same in seconds: small experts, few arms and tokens, no limits; its figures say little."""
    return replace(
        options, tokens=110, quality_tokens=60, strengths=(1.0,), gains=(0.2,), expert_bytes=1 << 18, limits=False
    )


def run_decode(
    options: DecodeOptions,
    *,
    on_start: Callable[[int], object] = lambda total: None,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Key `arms` by name (see `figures.arm_row`, or `{skipped: reason}`), `bars`, `raw_bandwidth_bytes_per_s`,
    `limit_ms`, `memory_limit_bytes`, `tight_limit_bytes` (None without), `workers` (what each process said of itself),
    `storage`, and the settings.

    Raises ConfigError and DataError for a model, family, text or work folder that cannot be used. Disk, groups and
    processes are gone afterwards, whatever happens.
    """
    started_s = time.perf_counter()
    if options.dtype not in _DTYPES:
        raise ConfigError(f"dtype {options.dtype!r}: give {' or '.join(_DTYPES)}.")
    model, work = harness.chosen_model(options.model), harness.work_folder(options.work)
    timed, more = documents_of(model, options)
    family = harness.checked_family(model, options.family)
    bench = _Bench(options, family, (timed, more), on_start, on_tokens)
    wide_model = harness.wide_copy(
        model, work, dtype=_DTYPES[options.dtype], expert_bytes=options.expert_bytes, keep=options.keep
    )
    with wide_model as (wide, _), ExitStack() as undo:
        result = bench.run(wide, work, undo)
    return {
        "model": str(model),
        "family": family,
        "dtype": options.dtype,
        **{name: getattr(options, name) for name in _SETTINGS},
        **result,
        "seconds": round(time.perf_counter() - started_s, 1),
    }


class _Bench:
    """One run: its arms, its worker processes, and what they found."""

    def __init__(
        self,
        options: DecodeOptions,
        family: str | None,
        documents: tuple[list[list[int]], list[list[int]]],
        on_start: Callable[[int], object],
        on_tokens: Callable[[int], object],
    ) -> None:
        self._options, self._family = options, family
        self._documents, self._more = documents
        self._on_start, self._on_tokens = on_start, on_tokens
        self._arms = [_Arm("stock", "stock"), _Arm("cache100_s0", "cache100", {"strength": 0.0})]
        strengths = (0.0, *(options.strengths if family else ()))
        self._arms += [_Arm(f"cache25_s{round(100 * s)}", "cache25", {"strength": s}) for s in strengths]
        top = max(options.gains, default=0.0)
        self._arms += [
            _Arm(f"cache25_prior{round(100 * gain)}", "cache25_prior", {"strength": gain / top})
            for gain in options.gains
        ]
        if options.bits:
            self._arms += [_Arm(f"{name}_s0", name, {"strength": 0.0}) for name in _CODED if not name.endswith("prior")]
            self._arms += [
                _Arm(f"cache7_q4_prior{round(100 * gain)}", "cache7_q4_prior", {"strength": gain / max(_CODED_GAINS)})
                for gain in _CODED_GAINS
            ]
        for name in _OTHERS:
            gains = _LLAMA_GAINS.get(name, ())
            self._arms += [_Arm(f"{name}{round(100 * gain)}", name, {"gain": gain}) for gain in gains]
            if not gains:
                self._arms.append(_Arm(name, name))
        self._decoded = 0
        self._skipped: dict[str, str] = {}
        self._workers: dict[str, harness.WorkerProcess] = {}
        self._facts: dict[str, dict[str, Any]] = {}
        self._raw: dict[str, Any] = {}

    def run(self, wide: Path, work: Path, undo: ExitStack) -> dict[str, Any]:
        left_out = None if self._options.limits else "left out of this run"
        why = left_out or harness.why_no_loop() or harness.why_no_groups()
        folder, storage, cap = _storage(wide, work, undo, why, self._options.read_mib_per_s)
        groups: dict[str, harness.MemoryGroup] = {}
        if why is None:
            # Made before the processes, which must be members from their first instruction on.
            for name in (name for ours, others in _LIMITS.values() for name in (*ours, *others)):
                groups[name] = undo.enter_context(harness.memory_group(name))
        else:
            self._skipped |= dict.fromkeys(_OTHERS, why)
        if not self._options.bits:
            # Nobody is there whose need would be their limit.
            self._skipped |= dict.fromkeys(_TIGHT, "left out of this run with 4-bit experts")
        ggufs = self._ggufs(folder)
        plans = {name: plan for name, plan in self._plans(folder, ggufs).items() if name not in self._skipped}
        for name in (*plans, "raw"):  # all at once: most of a start is imports
            self._workers[name] = harness.WorkerProcess(name, groups.get(name), cap=cap)
            undo.callback(self._workers[name].close)
        raw = self._workers.pop("raw")
        for name, (regime, settings) in plans.items():
            self._load(name, regime, settings, folder)
        limits = self._limit(groups)
        largest = max(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
        reads = {"file": str(largest), "read_bytes": self._facts["cache25"]["expert_bytes"]}
        if cap is not None:
            cap.hold(self._options.read_mib_per_s * (1 << 20))
        self._take_turns(lambda bursts: raw.ask("read", bursts=bursts, threads=self._options.read_threads, **reads))
        if cap is not None:
            cap.hold(0)
        self._decode_more()
        for name, group in groups.items():
            # Others are left out with the reason, and the rest of the run is as good as without them.
            if group.kills() and name not in self._skipped:
                raise RemoeError(f"{group.folder.name}: the kernel killed a process under the memory limit")
        return self._result() | limits | {"storage": {**storage, "direct_io": self._raw["direct"]}}

    def _ggufs(self, folder: Path) -> dict[str, Path]:
        """The file of each process of llama.cpp, or none and the reason."""
        # Each its own: pages of a file that two map are charged to the first alone, whatever the other's limit is. And
        # each in a folder of its own, as all that is put out of the page cache.
        ggufs = {name: folder.parent / f"{folder.name}.{name}" / "model.gguf" for name in _LLAMA}
        if not _LLAMA.keys() <= self._skipped.keys():
            try:
                llama_library()
                for path in ggufs.values():
                    path.parent.mkdir()
                write_gguf_copies(folder, ggufs["llamacpp_f16"], ggufs["llamacpp_q4"])
                for name, kind in _LLAMA.items():
                    if not ggufs[name].exists():
                        shutil.copyfile(ggufs[f"llamacpp_{kind}"], ggufs[name])
            except (MissingDependencyError, UncacheableError) as error:
                self._skipped |= dict.fromkeys(_LLAMA, str(error))
        return ggufs

    def _plans(self, folder: Path, ggufs: Mapping[str, Path]) -> dict[str, tuple[str, dict[str, Any]]]:
        options = self._options
        cache: dict[str, Any] = {"direct_io": options.direct_io, "threads": options.read_threads}
        cache["prefetch"] = options.prefetch
        if options.pack:
            pack = folder.parent / f"{folder.name}.pack"
            if not pack.exists():
                pack_experts(str(folder), pack)
            cache["storage"] = str(pack)
            harness.evict(pack)
        cached = {"cache": cache, "family": self._family, "gain": 0.0, "dial": self._family is not None}
        llama = {
            "threads": options.threads,
            "context_tokens": max(map(len, (*self._documents, *self._more))),
        }
        prior = {"gain": max(options.gains, default=0.0), "dial": True}
        plans: dict[str, tuple[str, dict[str, Any]]] = {
            "stock": ("stock", {"trial_ids": self._documents[0]}),
            "cache100": ("cached", cached | {"budget": 1.0}),
            "cache25": ("cached", cached | {"budget": BUDGET}),
            "cache25_prior": ("cached", cached | prior | {"budget": BUDGET}),
            **self._coded_plans(folder, cached),
            **{name: (regime, {}) for name, regime in _OTHERS.items() if name not in _LLAMA},
            **{
                name: ("llamacpp", llama | {"file": str(ggufs[name]), "engine": _ENGINES.get(name, {})})
                for name in _LLAMA
            },
        }
        return {name: plan for name, plan in plans.items() if any(arm.worker == name for arm in self._arms)}

    def _coded_plans(self, folder: Path, cached: Mapping[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Experts in fewer bits: from packs of their own, computed by the fast arithmetic."""
        plans: dict[str, tuple[str, dict[str, Any]]] = {}
        for name, (bits, budget) in _CODED.items() if self._options.bits else ():
            pack = folder.parent / f"{folder.name}.q{bits}.pack"
            if not pack.exists():
                pack_experts(str(folder), pack, bits=bits)
            harness.evict(pack)
            cache = {**cached["cache"], "storage": str(pack), "arithmetic": "fast"}
            gain = max(_CODED_GAINS) if name.endswith("prior") else 0.0
            plans[name] = ("cached", {**cached, "cache": cache, "budget": budget, "gain": gain, "dial": gain > 0})
        return plans

    def _load(self, name: str, regime: str, settings: dict[str, Any], folder: Path) -> None:
        """Loaded and rehearsed, so that the code it runs is in memory; those we compare with may fail."""
        harness.evict(Path(settings["file"]).parent if "file" in settings else folder)
        if settings.get("budget", 0) is None:
            # What a quarter of the experts would take in bf16, whatever type the arms loaded before this one have.
            itemsize = _DTYPES[self._options.dtype].itemsize
            settings = settings | {"budget": self._facts["cache25"]["budget_bytes"] * 2 // itemsize}
        try:
            self._facts[name] = self._workers[name].ask(
                "load", regime=regime, folder=str(folder), threads=self._options.threads, options=settings
            )
            own = [arm for arm in self._arms if arm.worker == name]
            # The weakest and the strongest: a prior that acts runs code and takes memory that strength 0 does without.
            for arm in (own[0], own[-1])[: len(own)]:
                self._decode(arm, self._documents[0][: PROMPT_TOKENS + _REHEARSAL_STEPS + 1])
        except RemoeError as error:
            self._skip(name, error)

    def _skip(self, name: str, error: RemoeError) -> None:
        if name not in _OTHERS:
            raise error
        self._workers.pop(name, None)
        self._skipped[name] = str(error)

    def _limit(self, groups: Mapping[str, harness.MemoryGroup]) -> dict[str, int | None]:
        """Put everyone under what our caches take; each limit by name, None where nothing is limited.

        Facts of each process then have `needed_bytes`: what of its limit is no page cache.
        """
        limits: dict[str, int | None] = {}
        for title, (ours, others) in _LIMITS.items():
            held = [name for name in (*ours, *others) if groups and name in self._workers]
            needed = {name: groups[name].needed_bytes() for name in held}
            mine = [needed[name] for name in ours if name in needed]
            if not mine:
                limits[title] = None
                continue
            limits[title] = limit = max(mine) + _LIMIT_SLACK_BYTES
            for name in held:
                self._facts[name]["needed_bytes"] = needed[name]
                try:
                    groups[name].limit(limit)
                except RemoeError as error:
                    self._skip(name, error)
        return limits

    def _decode(self, arm: _Arm, ids: Sequence[int], *, is_timed: bool = True) -> list[dict[str, Any]]:
        is_short = is_timed and arm.worker in _OTHERS
        seconds = self._options.turn_seconds if is_short else self._options.max_seconds
        answer = self._workers[arm.worker].ask(
            "decode", arm=arm.settings, ids=list(ids), prompt=PROMPT_TOKENS, max_seconds=seconds
        )
        facts = self._facts[arm.worker]
        facts["anon_growth_bytes"] = max(facts["anon_growth_bytes"], answer["anon_growth_bytes"])
        steps: list[dict[str, Any]] = answer["steps"]
        return steps

    def _take_turns(self, read: Callable[[list[int]], dict[str, Any]]) -> None:
        arms = [arm for arm in self._arms if arm.worker in self._workers]
        timed, more = (sum(map(len, documents)) for documents in (self._documents, self._more))
        self._on_start(len(arms) * timed + len(self._scored()) * more)
        started_s = time.perf_counter()
        for number, ids in enumerate(self._documents):
            # A document that is begun is decoded by all.
            if number and (time.perf_counter() - started_s) * (number + 1) / number > self._options.max_seconds:
                break
            self._decoded = number + 1
            # Who comes first differs from document to document, since the machine's speed drifts.
            at = number * len(arms) // max(1, len(self._documents))
            order = [*arms[at:], *arms[:at]]
            for arm in order if number % 2 == 0 else reversed(order):
                if arm.worker not in self._workers:
                    continue
                try:
                    steps = self._decode(arm, ids)
                except RemoeError as error:
                    self._skip(arm.worker, error)
                    continue
                arm.steps |= {(number, place): step for place, step in enumerate(steps)}
                if arm.name == "cache25_s0":
                    self._raw = read(miss_bursts(steps)[:_MOST_BURSTS])
                self._on_tokens(len(ids))

    def _scored(self) -> list[tuple[_Arm, str]]:
        """Arms that more text is decoded for, each with its process: with all experts in RAM where that is the same."""
        whole = {"cache25": "cache100"}
        return [
            (arm, whole.get(arm.worker, arm.worker))
            for arm in self._arms
            if arm.worker in _SCORED and arm.worker in self._workers
        ]

    def _decode_more(self) -> None:
        for number, ids in enumerate(self._more, start=len(self._documents)):
            for arm, worker in self._scored():
                try:
                    steps = self._decode(replace(arm, worker=worker), ids, is_timed=False)
                except RemoeError as error:
                    self._skip(worker, error)
                    continue
                # Kept apart from the timed steps: these were decoded with other experts in memory, or without the cap.
                arm.nll |= {(number, place): step["nll"] for place, step in enumerate(steps)}
                self._on_tokens(len(ids))

    def _result(self) -> dict[str, Any]:
        arms = {arm.name: arm for arm in self._arms if arm.worker in self._workers and arm.steps}
        steps = {name: arm.steps for name, arm in arms.items()}
        nll = {name: arm.nll | {key: step["nll"] for key, step in arm.steps.items()} for name, arm in arms.items()}
        # llama.cpp is compared with itself, and not at all where its F16 file was not decoded.
        bases = {name: nll.get("llamacpp_f16" if arm.worker in _LLAMA else "stock") for name, arm in arms.items()}
        rows = {
            name: arm_row(steps[name], self._facts[arm.worker])
            | {"ppl_ratio": None if (base := bases[name]) is None else ppl_ratio(nll[name], base)}
            for name, arm in arms.items()
        }
        is_bf16 = self._options.dtype == "bfloat16"
        speed = self._raw["bytes_per_s"]
        limit = limit_ms(rows["cache25_s0"]["bytes_per_token"], speed, rows["cache100_s0"]["tpot_ms"])
        return {
            "tokens": len(steps["stock"]),
            "documents": self._decoded,
            "quality_tokens": len(nll["stock"]),
            "arms": {arm.name: rows.get(arm.name) or {"skipped": self._skipped[arm.worker]} for arm in self._arms},
            "bars": bars(steps, rows, limit, self._facts)
            + (coded_bars(steps, is_bf16=is_bf16) if self._options.bits else [])
            + llama_bars(steps, rows, is_bf16=is_bf16),
            "raw_bandwidth_bytes_per_s": speed,
            "raw_read_bytes": self._raw["read_bytes"],
            "limit_ms": limit,
            "workers": self._facts,
        }


def documents_of(model: str | Path, options: DecodeOptions) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out documents of about `tokens` tokens in all, and others of about `quality_tokens`, in an order that is
    random but the same in every run."""
    _, tokenizer = load_with_tokenizer(model, device="cpu")
    # The prompts of the shipped text are too short to be timed, but count as tokens there.
    wanted = 2 * (options.tokens + options.quality_tokens) + 1024
    found = held_out(Path(model), tokenizer, wanted, options.data).documents
    long = [ids for ids in found if len(ids) > PROMPT_TOKENS + _LEAST_STEPS]
    random.Random(0).shuffle(long)  # whatever is left out for time, all sources have had their turn
    left = iter(long)
    timed, more = _some(left, options.tokens), _some(left, options.quality_tokens)
    if not timed:
        raise DataError(
            f"nothing to decode in {options.tokens} tokens: give --data FILE with documents of more than "
            f"{PROMPT_TOKENS + _LEAST_STEPS} tokens, and a higher --tokens"
        )
    return timed, more


def _some(documents: Iterator[list[int]], tokens: int) -> list[list[int]]:
    chosen: list[list[int]] = []
    while (left := tokens - sum(map(len, chosen))) > PROMPT_TOKENS + _LEAST_STEPS:
        ids = next(documents, None)
        if ids is None:
            break
        chosen.append(ids[:left])
    return chosen


def _storage(
    wide: Path, work: Path, undo: ExitStack, why: str | None, read_mib_per_s: float
) -> tuple[Path, dict[str, Any], harness.ReadCap | None]:
    """The folder that everyone reads from, what it is on, and the group of those whose reads are capped."""
    size = _DISK_COPIES * sum(path.stat().st_size for path in wide.iterdir()) + (128 << 20)
    disk, cap, facts = undo.enter_context(harness.slow_disk(work, size, read_mib_per_s, why))
    if disk is None:
        return wide, facts, None
    folder = disk.folder / wide.name
    shutil.copytree(wide, folder)
    disk.forget()
    return folder, facts, cap
