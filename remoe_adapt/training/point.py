"""One pass: adapters trained on a base, from their last checkpoint on, and the base as it was afterwards; and, before
any of that, whether a run has the folder, the free space and the ranks that it needs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from remoe_adapt._support import parse_json, printable
from remoe_adapt.errors import ConfigError, DataError
from remoe_adapt.family import write_whole
from remoe_adapt.recency import InstalledPrior
from remoe_adapt.routers import Routers, survey_routers
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.points import Point, PointsTrainer, add_adapters
from remoe_adapt.training.recovery import add_recovery
from remoe_adapt.training.reference import Moved, control_in_place
from remoe_adapt.training.validation import Validation, ValidationCallback
from remoe_adapt.tuner import KINDS, RemoeLayer, plain_base, read_adapter, remoe_layers, wrap_or_inject

ADAPTERS = "adapters"
RECOVERY = "recovery"
CHECKPOINT_MINUTES = 5.0
_STATE = "trainer_state.json"


@dataclass(frozen=True, eq=False)
class Plan:
    """What a pass trains: `points` side by side, for `steps` steps, on `rows`.

    start: an adapter folder that every point of strength above 0 begins as; None: they begin as what they are held to.
    control: the adapter folder of the control that they are held to; None: they are held to the base.
    """

    points: tuple[Point, ...]
    steps: int
    rows: PackedRows
    start: Path | None = None
    validation: Validation | None = None
    control: Path | None = None

    @property
    def name(self) -> str:
        """A folder name, the same for the same points held to the same: a checkpoint's deltas are relative to that."""
        return "+".join(point.name for point in self.points) + ("" if self.control is None else "@control")


def plan_point(options: TrainOptions, strength: float, name: str, routers: int) -> Point:
    """The point of a strength, or (0) the control, which has no prior and no LoRA and is trained end to end."""
    recency = options.recency_of(strength, routers) if strength else None
    # What an expert cache holds is not known here, so a prior that prefers it would do nothing.
    followed = recency is not None and not recency.kind.needs_expert_cache
    return Point(
        name, strength, options.config(strength), options.mode if strength else "end-to-end",
        gains=recency.gains(routers) if recency is not None and followed else None,
        recovery=f"{name}-{RECOVERY}" if strength and options.recovery_rank is not None else None,
    )  # fmt: skip


def train_points(
    model: PreTrainedModel,
    options: TrainOptions,
    plan: Plan,
    folder: Path,
    log: PassLog,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    routers: Routers | None = None,
) -> None:
    """Train the points of a plan and save each as `folder/adapters/NAME`, and its recovery LoRA beside it.

    routers: those of `model`, where they are known already.

    Goes on from the last complete checkpoint in `folder`; a finished pass is left alone. In a distributed run every
    process calls this and the main one writes. The model is as it was, also after an error.
    """
    if (folder / ADAPTERS).exists():  # a kill came between training and the family's own copies
        return
    with _left_as_it_was(model), ExitStack() as undo:
        if options.checkpointing:
            undo.enter_context(_checkpointing(plain_base(model)))
        routers = routers or survey_routers(plain_base(model))
        moved: Moved | None = None
        if plan.control is not None:
            moved = undo.enter_context(control_in_place(routers, plan.control))
        model.requires_grad_(False)  # adapters of others on this model must not be trained along
        # Left last: see `add_recovery`.
        recovering = undo.enter_context(ExitStack())
        first, *others = plan.points
        with _seeded(options.seed):
            holder = wrap_or_inject(model, first.config, first.name, routers=routers)
        undo.callback(holder.unload)
        for point in others:
            with _seeded(options.seed):
                wrap_or_inject(holder, point.config, point.name, routers=routers)
        layers = remoe_layers(holder)
        add_adapters([*layers.values()], plan.points)
        if plan.start is not None:
            for point in plan.points:
                if point.strength:
                    _begin_as(layers, point, plan.start, moved)
        loras = add_recovery(plain_base(holder), plan.points, options, recovering)
        prior = _prior(holder, options, plan.points)
        if prior is not None:
            undo.callback(prior.remove)
        holder.set_adapter(plan.points[0].name)
        trainer = PointsTrainer(
            model=holder,
            args=_arguments(options, plan.steps, folder / "checkpoints", model.device.type),
            train_dataset=plan.rows,
            callbacks=[log, _SaveByTime(checkpoint_minutes)],
            points=plan.points,
            recovery_lr=options.recovery_lr,
            prior=prior,
            locality_warmup_steps=round(plan.steps * options.warmup),
        )
        trainer.remove_callback(PrinterCallback)  # it prints to stdout
        if plan.validation is not None:
            trainer.add_callback(ValidationCallback(trainer, plan.validation, log.on_found))
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder / "checkpoints"))
        for point in plan.points:
            point.take_best()
        if moved is not None:
            moved.onto_base(holder, layers, [point.name for point in plan.points])
        if trainer.is_world_process_zero():
            _save(holder, loras, plan.points, folder)


def _save(holder: PeftModel, loras: PeftModel | None, points: Sequence[Point], folder: Path) -> None:
    """All adapters of a pass, under another name first: a kill while they are written must not leave a folder that
    looks finished."""
    saving = folder / f"{ADAPTERS}.partial"
    shutil.rmtree(saving, ignore_errors=True)
    for point in points:
        holder.save_pretrained(str(saving), selected_adapters=[point.name])
        if loras is not None and point.recovery is not None:
            loras.save_pretrained(str(saving), selected_adapters=[point.recovery])
    saving.replace(folder / ADAPTERS)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The A of a low-rank adapter is drawn from the run's seed alone, or no run could be had again."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def _begin_as(layers: Mapping[str, RemoeLayer], point: Point, start: Path, moved: Moved | None) -> None:
    """The point's adapter takes the values of a saved adapter of the same shape, which are relative to the base."""
    stored = read_adapter(start / SAFETENSORS_WEIGHTS_NAME)
    with stored.values() as values, torch.no_grad():
        for router, layer in layers.items():
            for kind in KINDS:
                held = getattr(layer, kind)
                if point.name in held:
                    value = values[f"{router}.{kind}"]
                    if moved is not None:
                        value = moved.off_base(router, kind, value, point.config.rank)
                    held[point.name].copy_(value)


def _prior(holder: PeftModel, options: TrainOptions, points: Sequence[Point]) -> InstalledPrior | None:
    """The prior of these points, with gains of 0; None when none of them has one."""
    if options.recency is None or all(point.gains is None for point in points):
        return None
    # Of the wrapped model: the routers' wrappers are in their places by now.
    # A mode that takes no share records 0, which no cache has.
    share = options.recency_share or None
    return InstalledPrior(plain_base(holder), options.recency, options.recency_decay, share=share)


def _arguments(options: TrainOptions, steps: int, checkpoints: Path, device_type: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        # Falls to 0, so that the last steps are small ones: the last weights are kept, not an average.
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(steps * options.warmup)),
        max_grad_norm=0.0,  # each point is clipped alone
        logging_steps=5,
        logging_first_step=True,
        save_steps=max(10, steps // 5),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        # Pinning warns where there is no CUDA.
        dataloader_pin_memory=device_type == "cuda",
        use_cpu=device_type == "cpu",
        bf16=computes_in_bf16(options, device_type),
        seed=options.seed,
    )


@contextmanager
def _checkpointing(base: Any) -> Iterator[None]:
    """Layers are run again in backward. A model whose owner has that on already keeps it."""
    if any(getattr(module, "gradient_checkpointing", False) for module in base.modules()):
        yield
        return
    # Transformers 5.24 renamed it, and warns at the old name.
    kind = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"
    # The re-entrant kind loses the gradient of routers whose inputs need none.
    getattr(base, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    try:
        yield
    finally:
        getattr(base, f"{kind}_checkpointing_disable")()


def computes_in_bf16(options: TrainOptions, device_type: str) -> bool:
    """Whether a run is under autocast: as its options say, else where fp32 bases gain from it; on a GPU a base has the
    dtype that it is meant to run in."""
    if options.bf16 is not None:
        return options.bf16
    known: Any = getattr(torch.cpu, "get_capabilities", dict)  # since torch 2.12
    return device_type == "cpu" and bool(known().get("avx512_bf16"))


def _last_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint; Trainer writes its state last, so one cut short by a kill has none."""
    found: list[tuple[int, Path]] = []
    for state in folder.glob(f"checkpoint-*/{_STATE}"):
        try:
            # By the step inside: names would sort checkpoint-90 behind checkpoint-100.
            found.append((json.loads(state.read_text(encoding="utf-8"))["global_step"], state.parent))
        except (OSError, ValueError, KeyError):
            continue
    return str(max(found)[1]) if found else None


@contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Which parameters train, which modules are in training mode, and where the model lies: restored afterwards."""
    # The base belongs to the caller, who may go on training other parts of it.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    homes = {parameter.device for parameter, _ in trainable}
    try:
        yield
    finally:
        for parameter, flag in trainable:
            parameter.requires_grad_(flag)
        for module, training in modes:
            module.training = training
        if len(homes) == 1 and {parameter.device for parameter in model.parameters()} != homes:
            model.to(homes.pop())  # Trainer moves a model to the process's own device


class _SaveByTime(TrainerCallback):
    """Asks for a checkpoint when the last one is older than so many minutes; of several processes the first decides."""

    def __init__(self, minutes: float) -> None:
        self._seconds, self._last = 60.0 * minutes, time.monotonic()

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Clocks of processes differ, and one that saves alone waits for ever for the others.
        due = [time.monotonic() - self._last >= self._seconds]
        if broadcast_object_list(due)[0]:
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._last = time.monotonic()


class PassLog(TrainerCallback):
    """A progress bar with loss, EOR and KL of the strongest point, and every logged line of every point kept in a file
    (by the main process). `last` has the last line of each."""

    def __init__(self, bar: tqdm[Any], path: Path, points: Sequence[Point]) -> None:
        self._bar, self._path = bar, path
        self._strengths = {point.name: point.strength for point in points}
        self.last: dict[str, dict[str, float]] = {}
        self._writes = True

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget lines of steps that are taken again."""
        self._writes = state.is_world_process_zero
        if not self._writes or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                row = parse_json(line, str(self._path), DataError)
                again = row["point"] in self._strengths and row["step"] > state.global_step
            except (DataError, TypeError, KeyError):  # the kill came while it was written
                continue
            if not again and line.endswith("\n"):
                # Lines behind the checkpoint that training restarts from would be there twice.
                kept.append(line)
        write_whole(self._path, "".join(kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        found = (logs or {}).get("points") or {}
        for name, means in found.items():
            self.last[name] = {key: round(float(value), 5) for key, value in means.items()}
            self._write(name, state.global_step, self.last[name])
        if found:
            strongest = max(found, key=lambda name: self._strengths[name])
            self._bar.set_postfix({k: v for k, v in self.last[strongest].items() if k in ("loss", "ce", "eor", "kl")})

    def on_found(self, step: int, found: dict[str, Any]) -> None:
        """A held-out evaluation: a line with `held_out` for each point."""
        for name, row in found.items():
            self._write(name, step, {"held_out": row})

    def _write(self, name: str, step: int, values: dict[str, Any]) -> None:
        if self._writes:
            row = {"point": name, "strength": self._strengths[name], "step": step, **values}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


# A checkpoint holds the adapter and Adam's two moments, and the one before it is removed only when it is complete:
# three sizes of an adapter, twice.
_ADAPTERS_IN_CHECKPOINTS = 6


def check_writable(out: Path) -> None:
    """Raises ConfigError when the folder, or the nearest one above it that exists, cannot be written."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if place == out and not place.is_dir():
        return  # refused by name later
    if not place.is_dir():
        raise ConfigError(f"{printable(out)} cannot be made: {printable(place)} is a file; choose another --out")
    if not os.access(place, os.W_OK | os.X_OK):
        raise ConfigError(f"{printable(out)} cannot be written: no right to write in {printable(place)}")


def check_fits(routers: Routers, options: TrainOptions, points: int, out: Path) -> None:
    """Raises ConfigError for a rank above that of a router's weight, and for more than the free space of `out`."""
    # The router's weight, not the model's size: nothing else is trained or saved.
    shapes = [(router.name, *router.weight_ED.shape) for router in routers.usable()]
    for name, rows, columns in shapes:
        if options.rank is not None and options.rank > min(rows, columns):
            raise ConfigError(
                f"rank={options.rank}: router {name} has {rows} x {columns} weights, so a delta has rank "
                f"{min(rows, columns)} at most; use less, or no rank for full deltas"
            )
    values = sum(
        rows * columns if options.rank is None else options.rank * (rows + columns) for _, rows, columns in shapes
    )
    # fp32, whatever the base's dtype: adapters are trained and saved in it.
    needed = 4 * values * points * (1 + _ADAPTERS_IN_CHECKPOINTS)
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"{points} adapters and a checkpoint take {needed / 2**20:.1f} MiB, {printable(place)} has "
            f"{free / 2**20:.1f} MiB free: make room, or choose another --out"
        )
