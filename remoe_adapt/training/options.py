"""What one training run is: its options, and the record beside the family that a resumed run must agree with."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remoe_adapt._support import printable, read_json
from remoe_adapt.errors import ConfigError
from remoe_adapt.recency_settings import Recency
from remoe_adapt.training.trainer import MODES, Mode
from remoe_adapt.tuner import RemoeConfig

# What points may be held to.
REFERENCES = ("auto", "base", "control")
_MAY_BE_NONE = {"next_steps", "recovery_rank", "evaluate_every", "patience"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How each point is trained. A point of strength s has the locality weights below times s.

    lr is relative (see `relative_rates`): a share of the router's own scale. A step takes `batch` rows, times
    `accumulate`, on every device; `length` None: min(max positions, 512) tokens a row. `warmup` is the share of the
    steps over which the learning rate and the locality weight rise. `mode` "local" is for the points; the control has
    nothing but the next-token loss and is always trained end to end. `bf16` is autocast; None: if a CPU has it.
    `checkpointing` runs layers again in backward, which needs less memory and more time.

    `recency` (a mode: "last", "ema", "resident", "cost") gives points a recency prior, under which they are trained
    (but for modes that prefer what an expert cache holds: training has none). Its gain rises with the strength up to
    `recency_gain` at 1; `recency_gains` says it for some strengths themselves, as pairs of a strength and one gain or
    one for each router. `recency_decay`, `recency_share` None: the mode's own.

    `next_steps`: the weakest point alone is trained `steps` from the base, the others this many from where it ended;
    None: all are trained `steps` from the base, side by side.
    `reference`: what points are held to by `distill_share` and `kl_weight`, and begin as: "base"; "control", the
    routers that next-token training alone gives, which are trained first; "auto": the control where it lowers the loss
    of held-out text (about `validation_tokens` of it) by 0.05 nats a token, in half of the rows too, and two standard
    errors, else the base. Without a control, or where the data leave no text to hold out, "auto" is the base.
    `recovery_rank`: beside its routers each point trains a LoRA of this rank on attention, dense and shared layers, at
    the learning rate `recovery_lr`, which is not relative; None: routers alone.
    `evaluate_every`: so many steps apart each point is measured on text that is kept out for it, about
    `validation_tokens` of it, and ends as it was when it did best; after `patience` evaluations that were no better it
    stops. None: the last step is what is kept.
    """

    reuse_weight: float = 1.2
    smooth_weight: float = 0.0
    lag_weight: float = 0.0
    ws_weight: float = 0.0
    kl_weight: float = 0.5
    distill_share: float = 0.35
    steps: int = 200
    batch: int = 8
    accumulate: int = 1
    length: int | None = None
    lr: float = 0.3
    warmup: float = 0.1
    mode: Mode = "end-to-end"
    rank: int | None = None
    recency: str | None = None
    recency_gain: float = 0.3
    recency_decay: float | None = None
    recency_share: float | None = None
    recency_gains: tuple[tuple[float, float | tuple[float, ...]], ...] = ()
    next_steps: int | None = None
    reference: str = "auto"
    recovery_rank: int | None = None
    recovery_lr: float = 1e-3
    evaluate_every: int | None = None
    patience: int | None = 3
    validation_tokens: int = 8192
    checkpointing: bool = False
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError naming the first value that cannot work."""
        for name in (
            "steps", "batch", "accumulate", "next_steps", "recovery_rank", "evaluate_every", "patience",
            "validation_tokens",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in _MAY_BE_NONE:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value}: use a whole number >= 1")
        if self.length is not None and self.length < 2:
            raise ConfigError(f"length={self.length}: a row needs at least 2 tokens")
        for name in ("lr", "recovery_lr"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ConfigError(f"{name}={value}: use a number > 0")
        # numpy's generators, which Trainer seeds too, take 32 bits.
        if not isinstance(self.seed, int) or not 0 <= self.seed < 1 << 32:
            raise ConfigError(f"seed={self.seed}: use a whole number from 0 to {(1 << 32) - 1}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup={self.warmup}: a share of the steps between 0 and 1")
        # Refuses what cannot be.
        prior = Recency.of(self.recency, self.recency_gain, self.recency_decay, self.recency_share)
        # A record of this run must not change with a later version's defaults.
        if self.recency_decay is None:
            object.__setattr__(self, "recency_decay", prior.kind.default_decay)
        object.__setattr__(self, "recency_share", prior.share)
        object.__setattr__(self, "recency_gains", self._checked_gains())
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: choose 'end-to-end' or 'local'")
        if self.reference not in REFERENCES:
            raise ConfigError(f"reference={self.reference!r}: choose 'auto', 'base' or 'control'")
        self.config(1.0)  # checks the weights and the rank

    def recency_of(self, strength: float, routers: int) -> Recency | None:
        """The recency prior of a point; None without one."""
        if self.recency is None:
            return None
        gain = dict(self.recency_gains).get(strength, strength * self.recency_gain)
        gains = Recency.of(self.recency, gain, self.recency_decay, self.recency_share).gains(routers)
        return Recency.of(self.recency, gains, self.recency_decay, self.recency_share)

    def _checked_gains(self) -> tuple[tuple[float, float | tuple[float, ...]], ...]:
        """`recency_gains` in one form, so that equal ones compare equal, also as lists in a record."""
        if self.recency_gains and self.recency is None:
            raise ConfigError("recency_gains are of a recency prior: choose its mode with recency")
        found: dict[float, float | tuple[float, ...]] = {}
        for strength, gain in self.recency_gains:
            recency = Recency.of(self.recency, gain, self.recency_decay, self.recency_share)
            if strength in found or not 0 < strength <= 1:
                raise ConfigError(f"recency_gains: strength {strength!r} must be above 0, at most 1 and there once")
            found[float(strength)] = recency.gain
        return tuple(sorted(found.items()))

    def config(self, strength: float) -> RemoeConfig:
        """The adapter configuration of a point; strength 0 is the control."""
        return RemoeConfig(
            rank=self.rank,
            task_type="CAUSAL_LM",
            reuse_weight=strength * self.reuse_weight,
            smooth_weight=strength * self.smooth_weight,
            lag_weight=strength * self.lag_weight,
            ws_weight=strength * self.ws_weight,
            # The control is what training alone does, so nothing may hold it to the base.
            kl_weight=self.kl_weight if strength else 0.0,
            # Local mode runs no next-token loss backward, so there is no target to share.
            distill_share=self.distill_share if strength and self.mode == "end-to-end" else 0.0,
        )


def check_strengths(strengths: Sequence[float]) -> list[float]:
    """Sorted distinct strengths in (0, 1]. Raises ConfigError otherwise."""
    for strength in strengths:
        if not 0 < strength <= 1:
            raise ConfigError(f"strength {strength}: must be above 0 (0 is the base itself) and at most 1")
    if not strengths or len(set(strengths)) != len(strengths):
        raise ConfigError(f"strengths {list(strengths)}: give at least one, each once")
    return sorted(strengths)


def check_same_run(record: Path, run: dict[str, Any]) -> None:
    """Raises ConfigError when `record` says that another run, or nothing readable, made what is beside it."""
    try:
        earlier: Any = read_json(record)
    except ConfigError as error:
        raise ConfigError(f"{error} It is the record of a run: choose another --out, or delete that folder") from error
    if not isinstance(earlier, dict):
        raise ConfigError(f"{record} is not a record of a run: choose another --out, or train anew")
    # Before options of these names there were, a run was as if they had been left out, with points held to the base.
    before = {"experts": "float", "reference": "base"}
    earlier = json.loads(json.dumps(asdict(TrainOptions()))) | before | earlier
    # The gains of strengths that were not trained then are no other options.
    run = {**run, "recency_gains": _gains_as_before(run.get("recency_gains"), earlier["recency_gains"])}
    changed = [
        f"{key} was {printable(repr(earlier.get(key)))}, now {value!r}"
        for key, value in run.items()
        if earlier.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{record.parent} holds a run with other options ({', '.join(changed)}): choose another --out"
        )


def _gains_as_before(gains: Any, before: Any) -> Any:
    """`before` where the two say nothing different about any strength; otherwise `gains`."""
    pairs = [pair for pair in before if isinstance(pair, list) and len(pair) == 2] if isinstance(before, list) else []
    known = {repr(strength): gain for strength, gain in pairs}
    return before if all(known.get(repr(s), gain) == gain for s, gain in gains or []) else gains
