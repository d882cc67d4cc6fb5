"""What points are held to: the base, or the control, where next-token training alone makes better routers than the
base has.

A base that still learns is a poor target: what holds a point to it (the teacher's share of the target, the trust term)
keeps from the point what training would have given. There the control is trained first, and while the points are
trained the base has the control's routers. Their deltas are then turned into deltas to the base as it is.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor, nn
from transformers import PreTrainedModel

from remoe_adapt._support import parse_json
from remoe_adapt.errors import AdapterCorruptError, DataError
from remoe_adapt.family import write_whole
from remoe_adapt.objective import IGNORED_LABEL, next_token_losses
from remoe_adapt.routers import Routers
from remoe_adapt.training.data import PackedRows
from remoe_adapt.training.trainer import without_adapters
from remoe_adapt.tuner import KINDS, RemoeLayer, by_router, plain_base, read_adapter, remoe_layers

# About five percent of perplexity, in half of all rows: a control learns something of any data, and where that is one
# kind of text among others, or little, points that are held to it are worse on text of other sources.
LEAST_GAIN_NATS = 0.05
# A gain below this many standard errors may be chance.
_LEAST_ERRORS = 2.0
CONTROL = "control"
_KEY = "reference"


@dataclass(frozen=True, slots=True)
class Comparison:
    """Losses of base and control on the same held-out rows, nats a token; `error` is the standard error of their
    difference, `median_gain` that of a row in the middle, `tokens` how many were predicted."""

    base_loss: float
    control_loss: float
    error: float
    median_gain: float
    tokens: int

    @property
    def gain(self) -> float:
        """Nats a token that the control is better by."""
        return self.base_loss - self.control_loss

    @property
    def is_control(self) -> bool:
        """The control is better, by enough, in most rows and beyond chance; False where a loss is not finite."""
        least = LEAST_GAIN_NATS
        return self.gain >= least and self.median_gain >= least and self.gain >= _LEAST_ERRORS * self.error

    @property
    def sentence(self) -> str:
        """The decision and why, for people."""
        held_to, why = ("control", "") if self.is_control else (
            "base", f", and at least {LEAST_GAIN_NATS:g}, in half of the rows too, and {_LEAST_ERRORS:g} standard "
            "errors are needed"
        )  # fmt: skip
        return (
            f"points are held to the {held_to}: on {self.tokens} tokens of held-out text next-token training alone "
            f"lowers the loss by {self.gain:.4f} nats a token, standard error {self.error:.4f}, and by "
            f"{self.median_gain:.4f} in the row in the middle{why}"
        )

    def row(self) -> dict[str, Any]:
        """The decision as it is logged."""
        return {
            "held_to": "control" if self.is_control else "base", "base_loss": round(self.base_loss, 5),
            "control_loss": round(self.control_loss, 5), "gain": round(self.gain, 5), "error": round(self.error, 5),
            "median_gain": round(self.median_gain, 5), "tokens": self.tokens,
        }  # fmt: skip


class Moved:
    """Routers of a base while they have the control's weights: what takes an adapter's delta from these to the base's
    own weights, and back. factors: the control's, by router, (delta [E, D],) or (A [r, D], B [E, r])."""

    def __init__(self, factors: Mapping[str, tuple[Tensor, ...]], weights: Mapping[str, Tensor]) -> None:
        self._factors, self._shifts, self.weights = factors, dict[str, Tensor](), dict[str, Tensor]()
        for name, weight_ED in weights.items():
            exact = torch.promote_types(weight_ED.dtype, torch.float32)
            held = [factor.to(weight_ED.device, exact) for factor in factors[name]]
            delta_ED = held[0] if len(held) == 1 else held[1] @ held[0]
            # As the control computed: the sum is rounded once, to the dtype of the weight.
            self.weights[name] = moved_ED = (weight_ED.to(exact) + delta_ED).to(weight_ED.dtype)
            self._shifts[name] = moved_ED.to(exact) - weight_ED.to(exact)

    def onto_base(self, holder: PeftModel, layers: Mapping[str, RemoeLayer], names: Sequence[str]) -> None:
        """Make the deltas of these adapters relative to the base's own weights.

        Full deltas get what the weights were moved by: exact where the base is bf16, to the last bits of fp32
        otherwise. Low-rank ones get the control's factors behind their own, and so the sum of both ranks; of a bf16
        base the rounding of the moved weights is not in there.
        """
        with torch.no_grad():
            for router, layer in layers.items():
                for name in names:
                    if name in layer.remoe_delta:
                        layer.remoe_delta[name] += self._shifts[router].to(layer.remoe_delta[name])
                        continue
                    for values, place, dim in ((layer.remoe_A, 0, 0), (layer.remoe_B, 1, 1)):
                        own = values[name].detach()
                        values[name] = nn.Parameter(torch.cat([own, self._factors[router][place].to(own)], dim))
        for name in names:
            config: Any = holder.peft_config[name]
            if config.rank is not None:
                config.rank = max(layer.remoe_A[name].shape[0] for layer in layers.values())

    def off_base(self, router: str, kind: str, stored: Tensor, rank: int | None) -> Tensor:
        """A tensor that `onto_base` made, as it was before; `rank` of the adapter then, None: full deltas.

        Raises AdapterCorruptError for factors that it did not make.
        """
        if rank is None:
            return stored - self._shifts[router].to(stored)
        added = self._factors[router][0].shape[0]
        dim = 0 if kind == "remoe_A" else 1
        if stored.shape[dim] != rank + added:
            raise AdapterCorruptError(
                f"the stored adapter has rank {stored.shape[dim]} in router {router}, but points that are held to the "
                f"control have rank {rank} + {added}: train the family anew in another --out"
            )
        return stored.narrow(dim, 0, rank)


@contextmanager
def control_in_place(routers: Routers, folder: Path) -> Iterator[Moved]:
    """Within the block the routers have the weights of the control whose adapter is in `folder`; afterwards their own,
    bit for bit. What is known of `routers` by then, the fingerprint too, is of the base as it is.

    Raises AdapterCorruptError for a folder without a whole adapter of these routers.
    """
    # Hashed when it is first asked for, which must be before the weights change.
    routers.fingerprint  # noqa: B018
    live = routers.weights
    adapter = read_adapter(folder / SAFETENSORS_WEIGHTS_NAME)
    kinds = by_router(adapter.tensors)
    if kinds.keys() != live.keys():
        raise AdapterCorruptError(f"{folder} is not the control of this base: delete it, or train anew")
    with adapter.values() as values:
        # KINDS has A before B, and a router has either the full delta or both.
        factors = {
            router: tuple(values[f"{router}.{kind}"] for kind in KINDS if kind in found)
            for router, found in kinds.items()
        }
    moved = Moved(factors, {name: weight_ED.detach() for name, weight_ED in live.items()})
    kept = {name: weight_ED.detach().clone() for name, weight_ED in live.items()}
    try:
        _write(live, moved.weights)
        yield moved
    finally:
        _write(live, kept)


def _write(live: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight_ED in live.items():
            # In place: prior, wrappers and kernels hold the parameter itself.
            weight_ED.copy_(weights[name])


def compare(
    model: PreTrainedModel, routers: Routers, control: Path, rows: PackedRows, batch: int, *, bf16: bool
) -> Comparison:
    """Base and control on the same rows, `batch` of them in one forward; bf16: under autocast, as a run trains."""
    base: Any = plain_base(model)
    modes = [(module, module.training) for module in base.modules()]
    base.eval()
    try:
        # REMOE adapters that are on the model already have no part in training either.
        with torch.no_grad(), without_adapters(remoe_layers(base).values()):
            base_R, tokens_R = _losses(base, rows, batch, bf16)
            with control_in_place(routers, control):
                control_R, _ = _losses(base, rows, batch, bf16)
    finally:
        for module, training in modes:
            module.training = training
    tokens = int(tokens_R.sum())
    gains_R = base_R - control_R
    # Of a ratio of sums over rows (Cochran, Sampling Techniques, 1977, section 6.4): rows differ in tokens.
    spread_R = gains_R - tokens_R * gains_R.sum() / tokens
    count = len(rows)
    error = math.sqrt(float(spread_R.square().sum()) * count / (count - 1)) / tokens if count > 1 else math.inf
    median = float((gains_R / tokens_R.clamp_min(1.0)).median())
    return Comparison(float(base_R.sum()) / tokens, float(control_R.sum()) / tokens, error, median, tokens)


def _losses(base: Any, rows: PackedRows, batch: int, bf16: bool) -> tuple[Tensor, Tensor]:
    """Sums of the next-token losses, nats, and predicted tokens of each row, both fp64 [R]."""
    losses: list[Tensor] = []
    tokens: list[Tensor] = []
    for first in range(0, len(rows), batch):
        taken = [rows[index] for index in range(first, min(len(rows), first + batch))]
        both = {key: torch.stack([row[key] for row in taken]).to(base.device) for key in ("input_ids", "labels")}
        labels_BT = both["labels"]
        with torch.autocast(base.device.type, torch.bfloat16, enabled=bf16):
            logits_BTV = base(input_ids=both["input_ids"], use_cache=False).logits
        # Row by row, because the copies in full precision are as large as all logits.
        for logits_TV, labels_T in zip(logits_BTV.float().split(1), labels_BT.split(1), strict=True):
            losses.append(next_token_losses(logits_TV, labels_T).sum().double().cpu())
            tokens.append((labels_T[:, 1:] != IGNORED_LABEL).sum().double().cpu())
    return torch.stack(losses), torch.stack(tokens)


# In the training log, so that a run that goes on, or gets more points later, holds them to the same


def decide(
    has_points: bool, log: Path, step: int, measure: Callable[[], Comparison], tell: Callable[[str], None]
) -> bool:
    """Whether points are held to the control: as it was decided before in this run, else as `measure` finds.

    Every process of a distributed run calls this, and all do as the first finds. has_points: some were trained before,
    which were held to the base where nothing else is in the log. step: where the control was measured.
    """
    [decided] = broadcast_object_list([read_decision(log)])
    if decided is not None or has_points:
        tell(f"points are held to the {'control' if decided else 'base'}, as those of this run before")
        return bool(decided)
    found: Comparison
    [found] = broadcast_object_list([measure()])
    processes = PartialState()
    if processes.is_main_process:
        write_decision(log, found, step)
    processes.wait_for_everyone()
    tell(found.sentence)
    return found.is_control


def read_decision(log: Path) -> bool | None:
    """Whether the run that wrote this log decided for the control; None where it has not decided."""
    found: bool | None = None
    for _, row in _rows(log):
        decision = row.get(_KEY)
        held_to = decision.get("held_to") if isinstance(decision, dict) else None
        if held_to in ("base", "control"):
            found = held_to == "control"
    return found


def write_decision(log: Path, comparison: Comparison, step: int) -> None:
    """Add the decision to the log; `step` is where the control was measured."""
    row = {"point": CONTROL, "strength": 0.0, "step": step, _KEY: comparison.row()}
    # The whole file: added behind a line that a kill has cut, it could not be read.
    lines = [*(line for line, _ in _rows(log)), json.dumps(row)]
    write_whole(log, "".join(f"{line}\n" for line in lines))


def _rows(log: Path) -> list[tuple[str, dict[str, Any]]]:
    """The readable lines of a log, and what they say."""
    found: list[tuple[str, dict[str, Any]]] = []
    for line in log.read_text(encoding="utf-8").splitlines() if log.exists() else ():
        try:
            row = parse_json(line, str(log), DataError)
        except DataError:
            continue
        if isinstance(row, dict):
            found.append((line, row))
    return found
