"""Several points under training at once: the base's forward, which all are held to, is run once for them.

Each point has its own adapter, prior and learning state; a step runs the base, then every point's own forward and
backward on the same rows. A point comes out as it would alone: nothing is shared but what does not depend on it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from remoe_adapt._support import read_json
from remoe_adapt.errors import ConfigError
from remoe_adapt.objective import LossWeights, Teacher
from remoe_adapt.recency import InstalledPrior
from remoe_adapt.training.sharding import is_sharded, keep_trained_whole
from remoe_adapt.training.trainer import Mode, RemoeTrainer, without_adapters
from remoe_adapt.tuner import RemoeConfig, RemoeLayer, router_rates, weights_of

_VALUES, _PROGRESS = "points.safetensors", "points.json"
# As transformers' Trainer clips, but each point alone: a joint norm would couple them.
_MAX_GRAD_NORM = 1.0


@dataclass(eq=False)
class Point:
    """One adapter under training.

    name: of the adapter, in the model and in files. gains: of the prior, one for each router of the model; None: it is
    trained without. recovery: the name of the LoRA that learns beside it.
    """

    name: str
    strength: float
    config: RemoeConfig
    mode: Mode = "end-to-end"
    gains: tuple[float, ...] | None = None
    recovery: str | None = None
    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    sums: Tensor | None = None
    # Held-out loss: the best so far, at which step, how many evaluations ago, and the parameters of then.
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)
    has_stopped: bool = False

    def judge(self, loss: float, step: int, patience: int | None) -> None:
        """Take in a held-out loss: keep the parameters when it is the best, stop after `patience` that were not."""
        if loss < self.best_loss:
            self.best_loss, self.best_step, self.worse = loss, step, 0
            self.best = {name: value.detach().clone() for name, value in self.parameters.items()}
            return
        self.worse += 1
        if patience is not None and self.worse >= patience:
            self.stop()

    def stop(self) -> None:
        """It learns no more."""
        self.has_stopped = True
        for parameter in self.parameters.values():
            # Without a gradient the optimizer leaves it alone; with one of zeros its momentum would move it on.
            parameter.requires_grad_(False)
            parameter.grad = None

    def take_best(self) -> None:
        """Back to the parameters of the best held-out loss, where there was one."""
        with torch.no_grad():
            for name, value in self.best.items():
                self.parameters[name].copy_(value)


class PointsTrainer(RemoeTrainer):
    """Trains `points`, whose adapters are on the model already, side by side.

    recovery_lr: the learning rate of recovery LoRAs; `args.learning_rate` is that of routers, relative to their scale.
    """

    # Points that run later would be averaged again with each that ran before them.
    _averages_when_all_ran = True

    def __init__(
        self, *, points: Sequence[Point], recovery_lr: float, prior: InstalledPrior | None = None, **kwargs: Any
    ) -> None:
        """Raises ConfigError as RemoeTrainer, for each point."""
        self.points, self._recovery_lr = list(points), recovery_lr
        self._taught: Teacher | None = None
        self._loras: list[LoraLayer] = [m for m in kwargs["model"].modules() if isinstance(m, LoraLayer)]
        super().__init__(router_relative_lr=True, prior=prior, **kwargs)
        named = dict(self.model.named_parameters())
        for point in self.points:
            marks = {point.name} | ({point.recovery} if point.recovery else set())
            # PEFT and we name an adapter's tensors by the adapter, between dots.
            point.parameters = {name: value for name, value in named.items() if marks & {*name.split(".")}}
            for parameter in point.parameters.values():
                parameter.requires_grad_(True)
            with self.acting(point):
                self.check_terms()
        if is_sharded():
            keep_trained_whole(self.accelerator, self.model)
            # Nothing that Trainer optimises, saves or loads is sharded.
            self.is_fsdp_enabled = False

    @contextmanager
    def acting(self, point: Point) -> Iterator[None]:
        """The model is this point, with its prior, and the objective its."""
        names = [point.name]
        for layer in self.router_layers.values():
            # PEFT's own switch also sets requires_grad, and all points are trained.
            layer._active_adapter = names
        for lora in self._loras:
            lora._active_adapter = [point.recovery] if point.recovery else []
            lora._disable_adapters = point.recovery is None
        self.mode, self._configs = point.mode, {point.name: point.config}
        self.loss_weights: LossWeights = weights_of(self._configs)
        self._sums = point.sums
        if self.prior is not None:
            self.prior.set_gains(0.0 if point.gains is None else point.gains)
        try:
            yield
        finally:
            point.sums, self._sums = self._sums, None
            if self.prior is not None:
                self.prior.set_gains(0.0)

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch for every point; the mean of their losses."""
        self._taught, losses = None, []
        # DistributedDataParallel expects one backward of all parameters, and here each is of one point's.
        with self.accelerator.no_sync(model) if self.accelerator.num_processes > 1 else nullcontext():
            for point in self.points:
                if not point.has_stopped:
                    with self.acting(point):
                        losses.append(super().training_step(model, inputs, num_items_in_batch))
        self._taught = None
        if self.accelerator.sync_gradients:
            for point in self.points:
                self._end_step(point)
        return torch.stack(losses).mean()

    def _end_step(self, point: Point) -> None:
        parameters = [parameter for parameter in point.parameters.values() if parameter.requires_grad]
        self._average_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)

    def _teacher(self, model: nn.Module, inputs: dict[str, Any]) -> Teacher:
        """The base's predictions for this micro-batch, made for the first point that asks."""
        if self._taught is None:
            with without_adapters(self._loras):
                self._taught = super()._teacher(model, inputs)
        return self._taught

    def forget_teacher(self) -> None:
        """The next micro-batch is another one."""
        self._taught = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW: routers at their relative rates, recovery LoRAs at theirs, without weight decay."""
        if self.optimizer is None:
            rates = router_rates(self.router_layers.values())
            groups = [{"params": [p], "lr": self.args.learning_rate * rate} for p, rate in rates]
            ours = {id(p) for p, _ in rates}
            others = [p for point in self.points for p in point.parameters.values() if id(p) not in ours]
            if others:
                groups.append({"params": others, "lr": self._recovery_lr})
            betas = (self.args.adam_beta1, self.args.adam_beta2)
            # A router's gradients are small, and Trainer's default epsilon would swallow them.
            self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=1e-12, weight_decay=0.0)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log with what each point's steps were since the last one, by name, as `points`."""
        if "loss" in logs:
            found: dict[str, dict[str, float]] = {}
            for point in self.points:
                with self.acting(point):
                    if means := self._taken_sums():
                        found[point.name] = means
            logs["points"] = found  # type: ignore[assignment]
        super().log(logs, *args, **kwargs)

    # Checkpoints: what is trained, by name, and no more

    def _tensors(self) -> dict[str, Tensor]:
        now = {name: value.detach() for point in self.points for name, value in point.parameters.items()}
        kept = {f"best.{name}": value for point in self.points for name, value in point.best.items()}
        return {name: value.cpu().contiguous() for name, value in {**now, **kept}.items()}

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        save_file(self._tensors(), folder / _VALUES)
        progress = {
            point.name: {
                "best_loss": None if math.isinf(point.best_loss) else point.best_loss,
                "best_step": point.best_step, "worse": point.worse, "has_stopped": point.has_stopped,
            }
            for point in self.points
        }  # fmt: skip
        (folder / _PROGRESS).write_text(json.dumps(progress), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        tensors: Mapping[str, Tensor] = load_file(folder / _VALUES)
        progress = read_json(folder / _PROGRESS)
        for point in self.points:
            if not point.parameters.keys() <= tensors.keys() or point.name not in progress:
                raise ConfigError(f"{folder} is no checkpoint of {point.name}: delete that folder, or train anew.")
            with torch.no_grad():
                for name, parameter in point.parameters.items():
                    parameter.copy_(tensors[name])
            point.best = {
                name: tensors[f"best.{name}"] for name in point.parameters if f"best.{name}" in tensors
            }  # fmt: skip
            known = progress[point.name]
            point.best_loss = math.inf if known["best_loss"] is None else float(known["best_loss"])
            point.best_step, point.worse = int(known["best_step"]), int(known["worse"])
            if known["has_stopped"]:
                point.stop()


def add_adapters(layers: Sequence[RemoeLayer], points: Sequence[Point]) -> None:
    """Let every point's delta learn: PEFT makes trainable the first adapter of a model alone."""
    for layer in layers:
        for name, parameter in layer.named_parameters():
            if {point.name for point in points} & {*name.split(".")}:
                parameter.requires_grad_(True)
