"""What a Trainer that knows nothing of REMOE adapters tells them: how many micro-batches make a step, and at which rate
routers learn. It joins every Trainer by transformers' list of default callbacks."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from remoe_adapt.notices import say_once
from remoe_adapt.training.rates import slowest_reach
from remoe_adapt.training.terms import ATTACHED
from remoe_adapt.tuner.layer import remoe_layers

# Below this share of their spread no logits change what is chosen: see `warn_if_idle`.
_LEAST_REACH = 1.0


def join_every_trainer() -> None:
    """Trainers made from now on call `ObjectiveCallback`; calling it again changes nothing."""
    defaults: list[Any] = transformers_trainer.DEFAULT_CALLBACKS
    if ObjectiveCallback not in defaults:
        defaults.append(ObjectiveCallback)


class ObjectiveCallback(TrainerCallback):
    """Does nothing for models without an attached objective."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sets the micro-batches of a step and whether a gradient scaler is at work; warns of a rate too low."""
        model, optimizer = kwargs.get("model"), kwargs.get("optimizer")
        for module in model.modules() if isinstance(model, nn.Module) else ():
            objective = vars(module).get(ATTACHED)
            if objective is not None:
                objective.accumulation = args.gradient_accumulation_steps
                objective.loss_is_scaled = args.fp16
                groups = getattr(optimizer, "param_groups", [])
                reach = slowest_reach(remoe_layers(module).values(), groups, state.max_steps)
                if reach is not None and reach < _LEAST_REACH:
                    say_once(
                        f"learning_rate={args.learning_rate:g} for {state.max_steps} steps moves router logits by at "
                        f"most {reach:.2g} of their spread, so they will learn next to nothing: use RemoeTrainer, "
                        f"whose default is right for routers, or about {args.learning_rate * 10 / reach:.1g} here"
                    )
