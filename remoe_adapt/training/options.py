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


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """How each point is trained. A point of strength s has the locality weights below times s.

    lr is relative (see `relative_rates`): a share of the router's own scale. A step takes `batch` rows, times
    `accumulate`, on every device; `length` None: min(max positions, 512) tokens a row. `warmup` is the share of the
    steps over which the learning rate and the locality weight rise. `mode` "local" is for the points; the control has
    nothing but the next-token loss and is always trained end to end. `bf16` is autocast; None: if a CPU has it.
    `recency` (a mode: "last", "ema", "resident", "cost") gives points a recency prior, whose gain rises with the
    strength up to `recency_gain` at 1; adapters are trained without it. `recency_decay`, `recency_share` None: the
    mode's own.
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
    bf16: bool | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises ConfigError naming the first value that cannot work."""
        for name in ("steps", "batch", "accumulate"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value}: use a whole number >= 1")
        if self.length is not None and self.length < 2:
            raise ConfigError(f"length={self.length}: a row needs at least 2 tokens")
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ConfigError(f"lr={self.lr}: use a number > 0")
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
        if self.mode not in MODES:
            raise ConfigError(f"mode={self.mode!r}: choose 'end-to-end' or 'local'")
        self.config(1.0)  # checks the weights and the rank

    def recency_of(self, strength: float, routers: int) -> Recency | None:
        """The recency prior of a point; None without one."""
        if self.recency is None:
            return None
        gains = (strength * self.recency_gain,) * routers
        return Recency.of(self.recency, gains, self.recency_decay, self.recency_share)

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
    # Before options of these names there were, a run was as if they had been left out.
    earlier = json.loads(json.dumps(asdict(TrainOptions()))) | {"experts": "float"} | earlier
    changed = [
        f"{key} was {printable(repr(earlier.get(key)))}, now {value!r}"
        for key, value in run.items()
        if earlier.get(key) != value
    ]
    if changed:
        raise ConfigError(
            f"{record.parent} holds a run with other options ({', '.join(changed)}): choose another --out"
        )
