"""Held-out text while a run goes on: each point's objective under its own rule, and when to stop.

The best state is kept and is what a point ends with; a point that has not improved for long stops while others go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from remoe_adapt.errors import TraceError
from remoe_adapt.eviction import simulate
from remoe_adapt.objective import document_numbers
from remoe_adapt.recency_settings import Cost
from remoe_adapt.traces import Trace
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.points import Point, PointsTrainer
from remoe_adapt.tuner import row_shares

# What a prior of mode "cost" is made for, so the cache whose misses are told.
_CACHE = Cost.default_share
_POLICY = "lru"


@dataclass(frozen=True)
class Validation:
    """rows: text that nobody trains on. every: optimizer steps between two evaluations. patience: so many evaluations
    without a better one, and a point stops; None: it never does. batch: rows of one forward."""

    rows: PackedRows
    every: int
    patience: int | None
    batch: int


class ValidationCallback(TrainerCallback):
    """Evaluates every point each `every` steps and after the last one, and hands what was found to `on_found`."""

    def __init__(
        self, trainer: PointsTrainer, validation: Validation, on_found: Callable[[int, dict[str, Any]], None]
    ) -> None:
        self._trainer, self._validation, self._on_found = trainer, validation, on_found

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if step % self._validation.every and step < state.max_steps:
            return
        trained = [point for point in self._trainer.points if not point.has_stopped]
        found = evaluate_points(self._trainer, trained, self._validation)
        for point in trained:
            point.judge(found[point.name]["loss"], step, self._validation.patience)
            found[point.name] |= {"best_step": point.best_step, "stopped": point.has_stopped}
        self._on_found(step, found)
        if all(point.has_stopped for point in self._trainer.points):
            control.should_training_stop = True


def evaluate_points(trainer: PointsTrainer, points: list[Point], validation: Validation) -> dict[str, dict[str, Any]]:
    """`loss` (the objective at full weight), `ce`, `kl_base`, `kl`, `eor` and `misses` of each point, by name.

    kl_base: KL(base || point), nats a token; None for a point that is not held to the base. misses: the share of
    look-ups that an LRU cache of a quarter of the experts, emptied where a document begins, does not have; left out
    where routers differ in size. Every process evaluates the same rows.
    """
    model = trainer.model
    was_training = model.training
    # Backward is never run, so what the last point left is not in the way.
    model.eval()
    sums = {point.name: [0.0] * 6 for point in points}
    chosen: dict[str, list[Tensor]] = {point.name: [] for point in points}
    starts: list[int] = []
    tokens = 0
    try:
        with torch.no_grad():
            for first in range(0, len(validation.rows), validation.batch):
                rows = [validation.rows[i] for i in range(first, min(len(validation.rows), first + validation.batch))]
                inputs = trainer._prepare_inputs({key: torch.stack([row[key] for row in rows]) for key in rows[0]})
                labels_BT, documents_BT = inputs["labels"], document_numbers(inputs)
                shown = {"use_cache": False, "input_ids": inputs["input_ids"]}
                share_B, items = row_shares(labels_BT, None)
                trainer.forget_teacher()
                for point in points:
                    with trainer.acting(point), trainer.at_full_weight():
                        found = trainer.measured(model, shown, labels_BT, documents_BT, share_B, items)
                    weight = float(items)
                    kl, eor = (
                        float((torch.stack([getattr(t, name) for t in found.terms]).mean(0) * share_B).sum())
                        for name in ("kl", "eor")
                    )
                    kl_base = None if found.kl_base is None else float(found.kl_base)
                    values = (float(found.loss), float(found.ce), kl, eor, kl_base or 0.0, 1.0)
                    for place, value in enumerate(values):
                        sums[point.name][place] += weight * value
                    ids = [call[0].spec.read(call[3]).ids_TK.to(torch.int16).cpu() for call in found.calls]
                    if len({part.shape for part in ids}) == 1:
                        chosen[point.name].append(torch.stack(ids))
                starts += _starts(documents_BT, tokens)
                tokens += documents_BT.numel()
    finally:
        trainer.forget_teacher()
        model.train(was_training)
    experts = {call_layer.spec.num_experts for call_layer in trainer.router_layers.values()}
    result: dict[str, dict[str, Any]] = {}
    for point in points:
        *totals, items_seen = sums[point.name]
        means = [round(total / max(items_seen, 1.0), 5) for total in totals]
        row: dict[str, Any] = dict(zip(("loss", "ce", "kl", "eor", "kl_base"), means, strict=True))
        if not point.config.distill_share:
            row["kl_base"] = None
        if chosen[point.name] and len(experts) == 1:
            row |= _misses(torch.cat(chosen[point.name], dim=1), next(iter(experts)), starts)
        result[point.name] = row
    return result


def _starts(documents_BT: Tensor, before: int) -> list[int]:
    """Tokens at which a document begins, of all rows one after the other; every row begins one."""
    begins_BT = torch.ones_like(documents_BT, dtype=torch.bool)
    begins_BT[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    return [before + int(place) for place in begins_BT.flatten().nonzero().flatten()]


def _misses(ids_LTK: Tensor, num_experts: int, starts: list[int]) -> dict[str, float]:
    try:
        trace = Trace(np.asarray(ids_LTK.numpy()), {"num_experts": num_experts, "document_starts": starts})
        hits = simulate(trace, (_POLICY,), (_CACHE,))[f"{_POLICY}@{_CACHE:g}"]
    except TraceError:  # no document has a second token, or a router chose one expert twice
        return {}
    return {"misses": round(1.0 - hits, 5)}
