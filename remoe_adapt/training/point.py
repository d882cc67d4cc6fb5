"""One point: an adapter trained on a base, from its last checkpoint on, and the base as it was afterwards; and, before
any of that, whether a run has the folder, the free space and the ranks that it needs."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from remoe_adapt._support import parse_json, printable
from remoe_adapt.errors import ConfigError, DataError
from remoe_adapt.family import write_whole
from remoe_adapt.routers import Routers
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.trainer import RemoeTrainer
from remoe_adapt.tuner import wrap_or_inject

ADAPTER = "adapter"
CHECKPOINT_MINUTES = 5.0
_STATE = "trainer_state.json"


def train_point(
    model: PreTrainedModel,
    rows: PackedRows,
    options: TrainOptions,
    strength: float,
    folder: Path,
    log: PointLog,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    routers: Routers | None = None,
) -> dict[str, float]:
    """Train one adapter (strength 0: the control) and save it as `folder/adapter`; returns the last log.

    routers: those of `model`, where they are known already.

    Goes on from the last complete checkpoint in `folder`; a finished adapter is left alone. In a distributed run every
    process calls this and the main one writes. The model is as it was, also after an error.
    """
    adapter = folder / ADAPTER
    if adapter.exists():  # a kill came between training and the family's own copy
        return log.last
    with _left_as_it_was(model):
        model.requires_grad_(False)  # adapters of others on this model must not be trained along
        peft_model = wrap_or_inject(model, options.config(strength), routers=routers)
        try:
            trainer = RemoeTrainer(
                model=peft_model,
                args=_arguments(options, folder / "checkpoints", model.device.type),
                train_dataset=rows,
                callbacks=[log, _SaveByTime(checkpoint_minutes)],
                mode=options.mode if strength else "end-to-end",
                locality_warmup_steps=round(options.steps * options.warmup),
                router_relative_lr=True,
            )
            trainer.remove_callback(PrinterCallback)  # it prints to stdout
            trainer.train(resume_from_checkpoint=_last_checkpoint(folder / "checkpoints"))
            if trainer.is_world_process_zero():
                # Under another name first: a kill while it is written must not leave a folder that looks finished.
                saving = folder / f"{ADAPTER}.partial"
                shutil.rmtree(saving, ignore_errors=True)
                peft_model.save_pretrained(str(saving))
                saving.replace(adapter)
        finally:
            peft_model.unload()
    return log.last


def _arguments(options: TrainOptions, checkpoints: Path, device_type: str) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(checkpoints),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        # Falls to 0, so that the last steps are small ones: the last weights are kept, not an average.
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(options.steps * options.warmup)),
        logging_steps=5,
        logging_first_step=True,
        save_steps=max(10, options.steps // 5),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        # Pinning warns where there is no CUDA.
        dataloader_pin_memory=device_type == "cuda",
        use_cpu=device_type == "cpu",
        bf16=_native_bf16(device_type) if options.bf16 is None else options.bf16,
        seed=options.seed,
    )


def _native_bf16(device_type: str) -> bool:
    """Whether fp32 bases gain from autocast here; on a GPU a base has the dtype that it is meant to run in."""
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


class PointLog(TrainerCallback):
    """A progress bar with loss, EOR and KL, and every logged line kept in a file (by the main process)."""

    def __init__(self, bar: tqdm[Any], path: Path, name: str, strength: float) -> None:
        self._bar, self._path, self._name, self._strength = bar, path, name, strength
        self.last: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Forget lines of steps that are taken again."""
        if not state.is_world_process_zero or not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                row = parse_json(line, str(self._path), DataError)
                again = row["point"] == self._name and row["step"] > state.global_step
            except (DataError, TypeError, KeyError):  # the kill came while it was written
                continue
            if not again and line.endswith("\n"):
                # Lines behind the checkpoint that training restarts from would be there twice.
                kept.append(line)
        write_whole(self._path, "".join(kept))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self, args: Any, state: TrainerState, control: Any, logs: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        if not logs or "ce" not in logs:
            return
        self.last = {key: round(float(logs[key]), 5) for key in ("loss", "ce", "eor", "kl") if key in logs}
        self._bar.set_postfix(self.last)
        if state.is_world_process_zero:
            row = {"point": self._name, "strength": self._strength, "step": state.global_step, **self.last}
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
    needed = 4 * values * (points + _ADAPTERS_IN_CHECKPOINTS)
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        raise ConfigError(
            f"{points} adapters and a checkpoint take {needed / 2**20:.1f} MiB, {printable(place)} has "
            f"{free / 2**20:.1f} MiB free: make room, or choose another --out"
        )
