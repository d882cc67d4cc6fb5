"""Recovery: a small LoRA beside a point's routers, which buys back what routing costs.

On what every token runs through: attention, dense layers and shared experts. Never on routed experts, which a cache
holds as they are stored, and never on routers, which the point itself changes. Plain LoRA of stock PEFT.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from remoe_adapt.errors import ConfigError
from remoe_adapt.family import recovery_targets
from remoe_adapt.training.options import TrainOptions
from remoe_adapt.training.points import Point
from remoe_adapt.tuner import RemoeLayer


def add_recovery(base: nn.Module, points: Sequence[Point], options: TrainOptions, undo: ExitStack) -> PeftModel | None:
    """The recovery LoRAs of these points on a base whose routers are wrapped, all trainable; None where there are none.

    They leave the base when `undo` closes, which must be after the routers are unwrapped: PEFT's unload takes off
    whatever is wrapped. Raises ConfigError for a base that carries adapters of other types.
    """
    named = [point.recovery for point in points if point.recovery is not None]
    if not named or options.recovery_rank is None:
        return None
    others = [n for n, m in base.named_modules() if isinstance(m, BaseTunerLayer) and not isinstance(m, RemoeLayer)]
    if others:
        raise ConfigError(
            f"the base carries another adapter, at {others[0]}, and taking a recovery LoRA off would take that off as "
            "well: unload it, or merge it, before training with recovery_rank."
        )
    targets = recovery_targets(base)
    rank = options.recovery_rank
    # From the run's seed alone: an adapter must not depend on what was trained before it.
    with torch.random.fork_rng(), warnings.catch_warnings():
        # Both say that a base gets a second tuner, which is what this function is for.
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
        loras: PeftModel | None = None
        for name in named:
            torch.manual_seed(options.seed)
            # Twice the rank, as is usual: with B at 0 the first steps are small anyway.
            lora = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules=targets)
            if loras is None:
                loras = get_peft_model(base, lora, name)
            else:
                loras.add_adapter(name, lora)
    assert loras is not None
    undo.callback(_leave, loras, base, named)
    return loras


def _leave(loras: PeftModel, base: nn.Module, names: Sequence[str]) -> None:
    loras.unload()
    shared = getattr(base, "peft_config", None)
    if isinstance(shared, dict):
        for name in names:
            shared.pop(name, None)
