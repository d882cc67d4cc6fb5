"""The passes of a run: which adapters are trained when, held to what, and taken into the family when they are done."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from accelerate import PartialState
from tqdm import tqdm
from transformers import PreTrainedModel

from remoe_adapt._support import disk_faults, freed_memory_kept
from remoe_adapt.errors import ConfigError
from remoe_adapt.family import Family
from remoe_adapt.routers import Routers
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.point import (
    ADAPTERS,
    RECOVERY,
    PassLog,
    Plan,
    computes_in_bf16,
    plan_point,
    train_points,
)
from remoe_adapt.training.reference import CONTROL, compare, decide, read_decision
from remoe_adapt.training.sharding import is_sharded
from remoe_adapt.training.validation import Validation
from remoe_adapt.tuner import FAMILY_FILE

WORK_FOLDER = ".train"
LOG_FILE = "training_log.jsonl"
# Said of a disk that is full, or cannot be written.
GOES_ON = (
    "make room or choose another --out; called again with the same options, a run goes on from its last checkpoint"
)


@dataclass(frozen=True)
class Pass:
    """points: names and strengths. start: the folder of the point that they begin as. control: that of the control that
    they are held to; None: they are held to the base, and begin as what they are held to."""

    points: dict[str, float]
    steps: int
    start: str | None = None
    control: Path | None = None


@dataclass(eq=False)
class Run:
    """A run under way. Every process of a distributed one has it; the main one writes.

    names: of the adapters that are wanted, with their strengths; the control's is 0. family: what there is by now, in
    the folder of the run. rows_apart: of text that nobody trains on, for measuring. shown: progress is.
    """

    model: PreTrainedModel
    options: TrainOptions
    routers: Routers
    names: Mapping[str, float]
    family: Family
    rows: PackedRows
    rows_apart: PackedRows | None
    shown: bool
    checkpoint_minutes: float

    def trained(self, on_point: Callable[[str, dict[str, float]], None] | None = None) -> Family:
        """Trains what is missing, pass after pass; on_point: as of `train_family`."""
        # A kill came before the family had all of them; the control is taken in last.
        finished = sorted(self._work.glob(f"*/{ADAPTERS}"), key=lambda path: path == self._control_apart)
        self._take_in(*finished)
        for turn in self._passes():
            log = self._train(turn)
            for name in turn.points if on_point is not None else ():
                on_point(name, log.last.get(name, {}))  # type: ignore[misc]
        if self._processes.is_main_process:
            shutil.rmtree(self._work, ignore_errors=True)
        return Family.load(self._out)

    @property
    def _out(self) -> Path:
        return self.family.path

    @property
    def _work(self) -> Path:
        return self._out / WORK_FOLDER

    @property
    def _processes(self) -> PartialState:
        return PartialState()

    # What is still to be trained

    def _passes(self) -> Iterator[Pass]:
        """Each is told when the one before has ended, as it may begin where that one did."""
        is_held = False
        if self._may_be_held_to_control() and any(self._missing().values()):
            if CONTROL in self._missing():
                yield Pass({CONTROL: 0.0}, self.options.steps)
            is_held = self._is_held_to_control()

        def made(points: dict[str, float], steps: int, start: str | None = None) -> Pass:
            return Pass(points, steps, start, self._control_folder() if is_held else None)

        todo = self._missing()
        if not todo:
            return
        if self.options.next_steps is None:
            yield made(todo, self.options.steps)
            return
        # The weakest is nearest to what they are held to, and every other one is nearer to it than to that.
        first = [] if self.family.points else sorted((s, name) for name, s in todo.items() if s)[:1]
        roots = {name: s for s, name in first} | {name: s for name, s in todo.items() if not s}
        if roots:
            yield made(roots, self.options.steps)
        if left := self._missing():
            yield made(left, self.options.next_steps, self.family.points[0].adapter)

    def _missing(self) -> dict[str, float]:
        # The control comes last, because a family.json with a control and no points is refused when it is loaded.
        return {
            name: strength
            for name, strength in self.names.items()
            if (strength not in self.family.strengths if strength else self._control_folder() is None)
        }

    # What points are held to

    @property
    def _control_apart(self) -> Path:
        # Until a family has points it can hold no control.
        return self._work / CONTROL / ADAPTERS

    def _control_folder(self) -> Path | None:
        """Of the control's adapter; None before it is trained."""
        if self.family.control is not None:
            return self._out / self.family.control.adapter
        return self._control_apart / CONTROL if self._control_apart.is_dir() else None

    def _may_be_held_to_control(self) -> bool:
        """False: points are held to the base, and the control is trained beside them.

        Raises ConfigError where points were held to the control before, and cannot be now.
        """
        family, reference = self.family, self.options.reference
        if reference == "base" or (CONTROL not in self.names and family.control is None):
            return False
        if family.points and family.control is None:
            return False  # there was nothing but the base to hold those to, whatever an earlier try has logged
        if reference == "auto" and is_sharded():
            if read_decision(self._out / LOG_FILE):
                raise ConfigError(
                    f"{self._out} has points that are held to the control, and a sharded run has none: no FSDP"
                )
            self._tell(
                "points are held to the base: FSDP2 shards a base once, and the control would need a pass before theirs"
            )
            return False
        if reference == "auto" and self.rows_apart is None:
            self._tell("points are held to the base: the data leave no text to compare it with the control on")
            return False
        return True

    def _is_held_to_control(self) -> bool:
        """Asked once, when there is a control and points are missing."""
        if self.options.reference == "control":
            return True
        folder, bf16 = self._control_folder(), computes_in_bf16(self.options, self.model.device.type)
        assert folder is not None and self.rows_apart is not None
        measure = partial(compare, self.model, self.routers, folder, self.rows_apart, self.options.batch, bf16=bf16)
        with disk_faults(self._out, ConfigError, GOES_ON, "written"):
            return decide(bool(self.family.points), self._out / LOG_FILE, self.options.steps, measure, self._tell)

    def _tell(self, sentence: str) -> None:
        if self.shown:
            tqdm.write(sentence, file=sys.stderr)

    # One pass

    def _train(self, turn: Pass) -> PassLog:
        options, routers = self.options, len(self.routers.refs)
        points = tuple(plan_point(options, strength, name, routers) for name, strength in turn.points.items())
        validation = None
        if options.evaluate_every is not None and self.rows_apart is not None:
            validation = Validation(self.rows_apart, options.evaluate_every, options.patience, options.batch)
        start = None if turn.start is None else self._out / turn.start
        plan = Plan(points, turn.steps, self.rows, start, validation, turn.control)
        folder = self._work / plan.name
        bar = tqdm(total=plan.steps, desc=plan.name, disable=not self.shown, unit="step")
        log = PassLog(bar, self._out / LOG_FILE, points)
        kept = freed_memory_kept(self.model.device.type)
        with bar, kept, disk_faults(self._out, ConfigError, GOES_ON, "written"):
            train_points(self.model, options, plan, folder, log, self.checkpoint_minutes, self.routers)
        self._take_in(folder / ADAPTERS, self._control_apart)
        return log

    def _take_in(self, *finished: Path) -> None:
        """The family has, in every process, what these passes have made."""
        self._processes.wait_for_everyone()
        if self._processes.is_main_process:
            with disk_faults(self._out, ConfigError, GOES_ON, "written"):
                for adapters in finished:
                    self._take(adapters)
        self._processes.wait_for_everyone()
        if not self._processes.is_main_process and (self._out / FAMILY_FILE).exists():
            self.family = Family.load(self._out)

    def _take(self, adapters: Path) -> None:
        """Put the adapters of a finished pass, where there are any, into the family, as far as they are wanted and not
        there, and remove its folder. A control alone stays where it is until the family has points."""
        family = self.family
        waits = not family.points and not any((adapters / name).is_dir() for name in self.names if name != CONTROL)
        if waits or not adapters.is_dir():
            return
        for name, strength in self.names.items():
            folder = adapters / name
            if not folder.is_dir():
                continue
            if not strength:
                if family.control is None:
                    family.set_control(folder)
            elif strength not in family.strengths:
                recovery = adapters / f"{name}-{RECOVERY}"
                recency = self.options.recency_of(strength, len(self.routers.refs))
                family.add_point(strength, folder, recency, recovery=recovery if recovery.is_dir() else None)
        # Only now: until the family holds the adapters, this folder is the one copy.
        shutil.rmtree(adapters.parent)
