"""`remoe train`: one base, one pass over the data, a family of adapters and the next-token-loss-only control."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from remoe_adapt.errors import ConfigError, DataError
from remoe_adapt.family import Family
from remoe_adapt.routers.fingerprint import fingerprint
from remoe_adapt.training.data import PackedRows, data_files, read_file, tokenize_documents
from remoe_adapt.training.trainer import Mode, RemoeTrainer
from remoe_adapt.tuner.config import RemoeConfig

WORK_FOLDER = ".train"
LOG_FILE = "training_log.jsonl"
_HELD_OUT_EVERY = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How each point is trained. A point of strength s has the locality weights below times s.

    lr is relative (see RemoeTrainerMixin): a share of the router's own scale. `length` None: min(max positions, 512).
    `warmup` is the share of the steps over which the learning rate and the locality weight rise.
    """

    reuse_weight: float = 0.3
    smooth_weight: float = 0.0
    lag_weight: float = 0.0
    ws_weight: float = 0.0
    kl_weight: float = 0.0
    steps: int = 150
    batch: int = 8
    accumulate: int = 1
    length: int | None = None
    lr: float = 0.3
    warmup: float = 0.1
    mode: Mode = "end-to-end"
    rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError naming the first value that cannot work."""
        for name in ("steps", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: use a whole number >= 1")
        if self.length is not None and self.length < 2:
            raise ConfigError(f"length={self.length}: a row needs at least 2 tokens")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr={self.lr}: use a number > 0")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup={self.warmup}: a share of the steps between 0 and 1")

    def config(self, strength: float) -> RemoeConfig:
        """The adapter configuration of a point; strength 0 is the control."""
        return RemoeConfig(
            rank=self.rank,
            task_type="CAUSAL_LM",
            reuse_weight=strength * self.reuse_weight,
            smooth_weight=strength * self.smooth_weight,
            lag_weight=strength * self.lag_weight,
            ws_weight=strength * self.ws_weight,
            kl_weight=self.kl_weight if strength else 0.0,
        )


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Sorted distinct strengths in (0, 1]. Raises ConfigError otherwise."""
    for strength in strengths:
        if not 0 < strength <= 1:
            raise ConfigError(f"strength {strength}: must be above 0 (0 is the base itself) and at most 1")
    if not strengths or len(set(strengths)) != len(strengths):
        raise ConfigError(f"strengths {list(strengths)}: give at least one, each once")
    return sorted(strengths)


def token_rows(
    paths: Sequence[str | Path], tokenizer: Any, tokens: int, seed: int = 0
) -> tuple[list[list[int]], list[list[int]]]:
    """(training, held-out) documents as token ids, about `tokens` of them, in equal parts from each file.

    Every 20th document of a file is held out; of a file of one document its last twentieth.

    Raises DataError when there is no text.
    """
    files = data_files(paths)
    train: list[list[int]] = []
    held_out: list[list[int]] = []
    for file in files:
        documents = list(read_file(file))
        random.Random(seed).shuffle(documents)
        share = math.ceil(tokens / len(files) * (1 + 1 / _HELD_OUT_EVERY))
        ids = tokenize_documents(documents, tokenizer, share)
        if len(ids) >= _HELD_OUT_EVERY:
            held_out += ids[::_HELD_OUT_EVERY]
            train += [row for index, row in enumerate(ids) if index % _HELD_OUT_EVERY]
        else:
            for row in ids:
                cut = len(row) - len(row) // _HELD_OUT_EVERY
                train.append(row[:cut])
                held_out.append(row[cut:])
    if not train:
        raise DataError(f"no text in {', '.join(map(str, files))}")
    return train, [row for row in held_out if len(row) > 1]


def train_family(
    base: str | Path | PreTrainedModel,
    data: Sequence[str | Path],
    strengths: Sequence[float],
    out: str | Path,
    *,
    options: TrainOptions | None = None,
    tokenizer: Any = None,
    resume: bool = True,
    control: bool = True,
    progress: bool = True,
    device: str | None = None,
    dtype: torch.dtype | str | None = None,
    on_point: Callable[[str, dict[str, float]], None] | None = None,
) -> Family:
    """Train a point for each strength, and the control, one after the other from the same base on the same rows.

    A stopped run goes on where it was when called again with the same options: finished points are kept, the point
    under way restarts from its last checkpoint. `base` (a path, hub id or loaded model) is left as it was.
    `on_point(name, last_log)` is called after each.

    Raises:
        ConfigError: bad strengths or options, or `out` holds a run with other options.
        DataError: no usable text.
        FamilyError: `out` holds a finished family of other points, or `resume` is off and it exists.
    """
    options = options or TrainOptions()
    wanted = check_strengths(strengths)
    model, base_id = _load(base, device, dtype)
    tokenizer = tokenizer if tokenizer is not None else AutoTokenizer.from_pretrained(base_id)
    length = options.length or min(getattr(model.config, "max_position_embeddings", 512) or 512, 512)
    out = Path(out)
    work = out / WORK_FOLDER
    if not resume and (out / "family.json").exists():
        Family.create(out, base_id, fingerprint(model))  # raises: it exists
    _check_same_run(work, {**asdict(options), "base": fingerprint(model)}, resume)
    exists = (out / "family.json").exists()
    family = Family.load(out) if exists else Family.create(out, base_id, fingerprint(model))
    family.check(model)

    needed = options.steps * options.batch * options.accumulate * length
    train, _ = token_rows(data, tokenizer, needed, options.seed)
    rows = PackedRows(train, length, getattr(tokenizer, "eos_token_id", None), options.seed)
    todo = [(Family.adapter_name(s), s) for s in wanted if s not in family.strengths]
    if control and family.control is None:
        todo.insert(0, ("control", 0.0))
    for position, (name, strength) in enumerate(todo):
        bar = tqdm(total=options.steps, desc=f"{name} ({position + 1}/{len(todo)})", disable=not progress, unit="step")
        with bar:
            last = _train_point(model, rows, options, strength, work / name, _Log(bar, out / LOG_FILE, name, strength))
        if strength:
            family.add_point(strength, work / name / "adapter")
        else:
            family.set_control(work / name / "adapter")
        if on_point is not None:
            on_point(name, last)
    shutil.rmtree(work, ignore_errors=True)
    return family


def held_out_documents(
    data: Sequence[str | Path], tokenizer: Any, model: PreTrainedModel, options: TrainOptions | None = None
) -> list[list[int]]:
    """The documents that `train_family` with the same arguments kept out of training."""
    options = options or TrainOptions()
    length = options.length or min(getattr(model.config, "max_position_embeddings", 512) or 512, 512)
    needed = options.steps * options.batch * options.accumulate * length
    return token_rows(data, tokenizer, needed, options.seed)[1]


def _train_point(
    model: PreTrainedModel, rows: PackedRows, options: TrainOptions, strength: float, folder: Path, log: _Log
) -> dict[str, float]:
    adapter = folder / "adapter"
    if adapter.exists():  # finished, but not yet in the family
        return {}
    peft_model = get_peft_model(model, options.config(strength))
    arguments = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.lr,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, round(options.steps * options.warmup)),
        adam_beta2=0.95,
        adam_epsilon=1e-12,  # a router's gradients are small: the default would swallow them
        logging_steps=5,
        logging_first_step=True,
        save_steps=max(10, options.steps // 5),
        save_total_limit=1,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=model.device.type == "cuda",
        use_cpu=model.device.type == "cpu",
        seed=options.seed,
    )
    trainer = RemoeTrainer(
        model=peft_model,
        args=arguments,
        train_dataset=rows,
        callbacks=[log],
        mode=options.mode,
        locality_warmup_steps=round(options.steps * options.warmup),
        router_relative_lr=True,
    )
    trainer.remove_callback(_printer())
    checkpoints = folder / "checkpoints"
    last = get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None
    try:
        trainer.train(resume_from_checkpoint=last)
        if trainer.is_world_process_zero():
            saving = folder / "adapter.partial"
            shutil.rmtree(saving, ignore_errors=True)
            peft_model.save_pretrained(str(saving))
            saving.replace(adapter)
    finally:
        peft_model.unload()
        model.requires_grad_(True)
        model.eval()
    return log.last


class _Log(TrainerCallback):
    """A progress bar with loss, EOR and KL, and every logged line kept in a file."""

    def __init__(self, bar: tqdm[Any], path: Path, name: str, strength: float) -> None:
        self._bar, self._path, self._name, self._strength = bar, path, name, strength
        self.last: dict[str, float] = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs or "ce" not in logs:
            return
        self.last = {key: round(float(logs[key]), 5) for key in ("loss", "ce", "eor", "kl") if key in logs}
        self._bar.set_postfix(self.last)
        row = {"point": self._name, "strength": self._strength, "step": state.global_step, **self.last}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def _printer() -> type[TrainerCallback]:
    """The Trainer's fallback reporter, which prints to stdout."""
    from transformers.trainer_callback import PrinterCallback

    return PrinterCallback


def _check_same_run(work: Path, run: dict[str, Any], resume: bool) -> None:
    """Refuse to mix two runs in one folder; record this one's options."""
    record = work / "options.json"
    if record.exists() and resume:
        earlier = json.loads(record.read_text(encoding="utf-8"))
        changed = [key for key in run if earlier.get(key) != run[key]]
        if changed:
            was = ", ".join(f"{key} was {earlier.get(key)!r}, now {run[key]!r}" for key in changed)
            raise ConfigError(f"{work.parent} holds an unfinished run with other options ({was}): choose another --out")
        return
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True, exist_ok=True)
    temporary = record.with_suffix(".tmp")
    temporary.write_text(json.dumps(run), encoding="utf-8")
    temporary.replace(record)


def _load(
    base: str | Path | PreTrainedModel, device: str | None, dtype: torch.dtype | str | None
) -> tuple[PreTrainedModel, str]:
    if isinstance(base, nn.Module):
        return base, str(getattr(base.config, "name_or_path", "") or "unnamed")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    # Half precision is slow on most CPUs, and small bases train there.
    dtype = dtype or (torch.float32 if device == "cpu" else "auto")
    model = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype)
    return model.to(device), str(base)
