"""`remoe bench controller`: the dial under memory pressure, against every fixed strength and against no dial at all.

The widened model decodes held-out text behind the expert cache, one given token per step, in a memory group. A second
process in that group takes memory until the cache must shrink, holds it, and gives it back. Every arm is a process of
its own with its own group and its own second process. A cycle is a calm phase, a squeeze and a calm phase, of as many
tokens each, the same ones for every arm. The arms take turns, in an order that changes: of some 50 tokens in the first
calm phase, so that a machine whose speed changes by the minute is the same one for all; then each its squeeze and what
follows. Who waits for its turn neither decodes nor samples. Quality is measured afterwards, by decoding each arm's
tokens at its strengths with all in RAM, beside the base.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from remoe_adapt.bench import harness
from remoe_adapt.bench.controller import figures
from remoe_adapt.bench.controller.arms import PRIOR_GAIN, SAMPLE_HZ, bench_profile, dialled, kinds
from remoe_adapt.bench.controller.process import ArmProcess, DiedError, Setup
from remoe_adapt.bench.controller.squeezes import count_kills
from remoe_adapt.bench.controller.worker import COLUMNS, Text
from remoe_adapt.checkpoints import load_tokenizer, load_with_tokenizer
from remoe_adapt.errors import ConfigError
from remoe_adapt.evaluation import Decoder, held_out, score
from remoe_adapt.expert_cache import READ_THREADS, pack_experts
from remoe_adapt.recency_settings import Recency

_PHASES = 3
# Of a turn in calm: long enough that its median is of warm caches, short enough that all arms see one machine.
_TURN_TOKENS = 50
_NO_STEPS: dict[str, list[float]] = {column: [] for column in COLUMNS}
# The most that is watched in one turn; others may want the machine in between.
_WATCH_S = 30.0
_MIB = 1 << 20
Turn = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True)
class ControllerOptions:
    """What to decode and how. tokens: of each phase; squeezed: the part of all experts that a squeeze leaves; take: the
    squeezer's pace; read: the storage's, None: as fast as it is; squeezes: in the count of kills; overhead_s: decoding
    under the monitor, nothing else."""

    model: str | Path | None = None
    family: str | Path | None = None
    data: Sequence[str | Path] = ()
    tokens: int = 600
    cycles: int = 3
    strengths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    gain: float = PRIOR_GAIN
    squeezed: float = 0.25
    take_mib_per_s: float = 100.0
    read_mib_per_s: float | None = 300.0
    squeezes: int = 20
    overhead_s: float = 120.0
    expert_bytes: int = 1 << 20
    dtype: torch.dtype = torch.float32
    threads: int = 1
    read_threads: int = READ_THREADS
    work: Path | None = None
    keep: bool = False


def quickly(options: ControllerOptions) -> ControllerOptions:
    """The same in a minute or two: one quick squeeze, few tokens and arms; its figures say little."""
    return replace(
        options, tokens=120, cycles=1, strengths=(0.0, 1.0), squeezes=1, overhead_s=4.0, take_mib_per_s=200.0
    )


def run_controller(
    options: ControllerOptions,
    *,
    turn: Turn = nullcontext,
    on_start: Callable[[int], object] = lambda total: None,
    on_tokens: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Key `arms` by name, each `{squeeze_p95_ms, calm_tpot_ms, kl, swaps, oom_kills}` and more, None where it died;
    `monitor_cpu_share`; `bars`; `void`: why the run proves nothing, or None; `ok`; `squeezes`, and the settings.

    turn: entered around everything that is timed. Raises ConfigError and DataError for a model, family, text or work
    folder that cannot be used, and where memory cannot be limited. Processes and groups are gone afterwards.
    """
    if why := harness.why_no_groups():
        raise ConfigError(f"this benchmark limits memory: {why}")
    # The bars compare with strength 0, and take the last fixed arm for the strongest.
    if min(options.strengths) != 0.0 or list(options.strengths) != sorted(options.strengths):
        raise ConfigError(f"strengths {options.strengths}: begin with 0, and let them rise.")
    Recency.of("ema", options.gain)  # refuses a gain that cannot be
    started_s = time.perf_counter()
    model, work = harness.chosen_model(options.model), harness.work_folder(options.work)
    family = harness.checked_family(model, options.family)
    if family is None:
        raise ConfigError(f"{model} has no family beside it: give --family")
    # So much that no phase repeats another one's text, where there is so much.
    wanted = _PHASES * options.cycles * options.tokens
    documents = held_out(Path(model), load_tokenizer(str(model)), wanted, options.data).documents
    wide_model = harness.wide_copy(
        model, work, dtype=options.dtype, expert_bytes=options.expert_bytes, keep=options.keep
    )
    with wide_model as (wide, pack):
        if not pack.is_dir():
            pack_experts(wide, pack, dtype=options.dtype)
        harness.evict(wide)
        harness.evict(pack)
        run = _Run(options, _setup(options, wide, pack, family, documents), turn, on_start, on_tokens)
        result = run.run(Replay(model, family, options.gain, documents, options.dtype))
    settings = {**asdict(options), "model": str(model), "family": family, "dtype": str(options.dtype)}
    del settings["work"], settings["keep"]
    settings["data"] = [Path(path).name for path in options.data]
    profile = bench_profile(options.gain).as_keys()
    return {**result, "settings": settings, "profile": profile, "seconds": round(time.perf_counter() - started_s, 1)}


def _setup(options: ControllerOptions, wide: Path, pack: Path, family: str, documents: list[list[int]]) -> Setup:
    share = bench_profile(options.gain).expert_cache.share
    if not 0.0 < options.squeezed < share:
        raise ConfigError(f"squeezed {options.squeezed!r}: give a part of the experts below the calm {share:g}.")
    pace = options.read_mib_per_s
    arm = {"family": family, "gain": options.gain, "share": share, "pack": str(pack)}
    arm |= {"read_threads": options.read_threads, "read_bytes_per_s": None if pace is None else pace * _MIB}
    return Setup(
        wide, documents, min(64, options.tokens), options.threads, options.squeezed, options.take_mib_per_s * _MIB, arm
    )


class _Run:
    """One run: its arms, what they recorded, and what follows from it."""

    def __init__(
        self,
        options: ControllerOptions,
        setup: Setup,
        turn: Turn,
        on_start: Callable[[int], object],
        on_tokens: Callable[[int], object],
    ) -> None:
        self._options, self._setup, self._turn = options, setup, turn
        self._on_start, self._on_tokens = on_start, on_tokens
        self._phases: dict[str, list[figures.Phase]] = {}
        self._monitor: dict[str, float] = {"monitor_cpu_s": 0.0, "seconds": 0.0}
        self._swaps: dict[str, int] = {}
        self._dead: dict[str, str] = {}
        self._compared: dict[str, list[float]] = {}

    def run(self, replay: Replay) -> dict[str, Any]:
        options = self._options
        with ExitStack() as undo:
            arms = [ArmProcess(name, kind, self._setup, undo) for name, kind in kinds(options.strengths).items()]
            for arm in arms:  # all at once: most of a start is imports
                arm.spawn()
            for arm in arms:
                arm.start()
            self._phases = {arm.name: [] for arm in arms}
            self._on_start(len(arms) * options.cycles * _PHASES * options.tokens)
            for cycle in range(options.cycles):
                # Another arm is first in each cycle, so that no arm has the best of a drifting machine.
                at = cycle * len(arms) // options.cycles
                order = [*arms[at:], *arms[:at]]
                self._calm(order, cycle)
                for arm in order if cycle % 2 == 0 else reversed(order):
                    self._turn_of(arm, cycle, self._squeeze)
            adaptive = next(arm for arm in arms if arm.name == "adaptive")
            self._turn_of(adaptive, options.cycles - 1, self._compare)
            limits = {arm.name: arm.limit_bytes for arm in arms}
            takes = {arm.name: arm.take_bytes for arm in arms}
            kills = {arm.name: arm.group.kills() for arm in arms}
        overhead = self._overhead() if options.overhead_s else {}
        squeezes = count_kills(self._setup, options.squeezes) if options.squeezes else {}
        return self._result(replay, kills, overhead, squeezes) | {"limit_bytes": limits, "take_bytes": takes}

    def _calm(self, arms: Sequence[ArmProcess], cycle: int) -> None:
        """The first calm phase of all arms, in short turns."""
        for arm in arms:
            self._phases[arm.name].append(figures.Phase(cycle, figures.CALM_BEFORE, _NO_STEPS))
        left, turns = self._options.tokens, max(1, round(self._options.tokens / _TURN_TOKENS))
        for number in range(turns):
            count = left // (turns - number)
            left -= count
            for arm in arms if number % 2 == 0 else reversed(arms):
                self._turn_of(arm, cycle, partial(self._decode, tokens=count))

    def _squeeze(self, arm: ArmProcess, cycle: int) -> None:
        """And the calm after it."""
        for kind, begin in ((figures.SQUEEZE, arm.squeeze), (figures.CALM_AFTER, arm.relax)):
            begin()
            self._phases[arm.name].append(figures.Phase(cycle, kind, _NO_STEPS))
            self._decode(arm, cycle, tokens=self._options.tokens)

    def _turn_of(self, arm: ArmProcess, cycle: int, what: Callable[[ArmProcess, int], None]) -> None:
        """An arm that is killed meanwhile has no further turn."""
        if arm.name in self._dead:
            return
        try:
            with self._turn():
                arm.ask("resume")
                what(arm, cycle)
                self._swaps[arm.name] = arm.ask("pause")["swaps"]
        except DiedError as error:
            self._dead[arm.name] = f"cycle {cycle + 1}: {error}"

    def _decode(self, arm: ArmProcess, cycle: int, *, tokens: int) -> None:
        """So many tokens more of the arm's phase."""
        answer, phases = arm.ask("decode", tokens=tokens), self._phases[arm.name]
        steps = {key: [*before, *answer["steps"][key]] for key, before in phases[-1].steps.items()}
        phases[-1] = replace(phases[-1], steps=steps)
        if arm.name == "adaptive":
            for key in self._monitor:
                self._monitor[key] += answer[key]
        self._on_tokens(tokens)

    def _compare(self, arm: ArmProcess, _cycle: int) -> None:
        """The dial at rest and no dial, in one process and its memory."""
        found = arm.ask("compare", tokens=self._options.cycles * self._options.tokens)
        # Fewer than a turn of tokens say nothing of a difference of one percent.
        self._compared = found if len(found["dial_s"]) >= _TURN_TOKENS else {}

    def _overhead(self) -> dict[str, Any]:
        """The adaptive arm with all experts in RAM and nobody who takes memory, under its monitor."""
        whole = replace(self._setup, options={**self._setup.options, "share": 1.0})
        with ExitStack() as undo:
            arm = ArmProcess("overhead", kinds(())["adaptive"], whole, undo)
            arm.start()
            turns, left_s = list[dict[str, Any]](), self._options.overhead_s
            while left_s > 0:
                with self._turn():
                    turns.append(arm.ask("watch", seconds=min(_WATCH_S, left_s)))
                left_s -= _WATCH_S
        return figures.monitoring(turns, SAMPLE_HZ)

    def _result(
        self, replay: Replay, kills: Mapping[str, int], overhead: dict[str, Any], squeezes: dict[str, Any]
    ) -> dict[str, Any]:
        profile = bench_profile(self._options.gain)
        rows: dict[str, dict[str, Any]] = {}
        for name, phases in self._phases.items():
            row = figures.arm_row(phases, died=name in self._dead)
            recorded = figures.strengths(phases)
            kl = None if name in self._dead else replay.kl(recorded) if any(recorded) else 0.0
            rows[name] = {**row, "kl": kl, "swaps": self._swaps.get(name, 0), "oom_kills": kills[name]}
        strongest = f"fixed_{round(100 * self._options.strengths[-1])}"
        void = figures.why_void(rows, strongest)
        return {
            "ok": void is None,
            "void": void,
            "arms": rows,
            "died": self._dead,
            "bars": figures.bars(rows, self._phases, self._compared, overhead, squeezes, profile.recovery_s),
            "monitor_cpu_share": overhead.get("monitor_cpu_share"),
            "monitor_cpu_share_whole_run": self._monitor["monitor_cpu_s"] / max(self._monitor["seconds"], 1e-9),
            "overhead": overhead,
            "squeezes": squeezes,
            "rise_s": figures.rise_s(self._phases["adaptive"]),
            "settle_s": profile.recovery_s,
            "trace": {name: self._trace(name) for name in ("fixed_0", strongest, "adaptive", "no_controller")},
        }

    def _trace(self, name: str) -> list[dict[str, Any]]:
        """An arm's phases as they were recorded, rounded."""
        digits = {"s": 5, "at_s": 3, "strength": 4, "budget_bytes": 0, "misses": 0}
        return [
            {"cycle": phase.cycle, "phase": phase.kind}
            | {key: [round(value, digits[key]) for value in values] for key, values in phase.steps.items()}
            for phase in self._phases[name]
        ]


class Replay:
    """The model as it is stored, all of it in RAM, with the dial and without; a token at a time, as it was decoded."""

    def __init__(
        self, model: str | Path, family: str, gain: float, documents: Sequence[Sequence[int]], dtype: torch.dtype
    ) -> None:
        self._documents, name = documents, str(dtype).removeprefix("torch.")
        self._base: Any = load_with_tokenizer(model, device="cpu", dtype=name)[0].eval()
        dialled_base: Any = load_with_tokenizer(model, device="cpu", dtype=name)[0].eval()
        self._dialled, self._controller = dialled_base, dialled(dialled_base, family, bench_profile(gain))
        self._base_logits_TV: list[Tensor] = []

    def kl(self, strengths: Sequence[float]) -> float:
        """Mean KL to the base in nats over the text's first tokens, the n-th of them at the n-th strength."""
        with torch.inference_mode():
            if len(self._base_logits_TV) < len(strengths):
                self._base_logits_TV = self._decode(self._base, [None] * len(strengths))
            decoded = self._decode(self._dialled, list(strengths))
            total = 0.0
            for logits_V, base_V in zip(decoded, self._base_logits_TV, strict=False):
                # `score` wants a target; only the divergence is taken from what it returns.
                target_1 = torch.zeros(1, dtype=torch.long)
                total += float(score(logits_V[None], target_1, base_V[None])[1])
        return total / len(strengths)

    def _decode(self, model: Any, strengths: Sequence[float | None]) -> list[Tensor]:
        text, decoder, found = Text(self._documents), Decoder(model), list[Tensor]()
        for strength in strengths:
            token, starts = text.next()
            if starts:
                decoder = Decoder(model)
            with self._step(strength):
                found.append(decoder.feed([token]).clone())
        return found

    def _step(self, strength: float | None) -> AbstractContextManager[None]:
        if strength is None:
            return nullcontext()
        # A swap to the strength that is live would be staged for nothing.
        if self._controller.target != strength:
            self._controller.set_strength(strength)
        return self._controller.step()
