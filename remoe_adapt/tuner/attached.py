"""The objective in any training loop: the gradient of the trust and locality terms enters where a model is run.

transformers' Trainer takes the loss from the model's output, TRL's trainers compute their own from hidden states or log
probabilities. All of them run backward through the decoder's last hidden state, so the terms are attached there: the
state passes unchanged, and its backward gives the terms their gradient (as Megatron-LM does for load balancing). Where
the model's own `loss` is what the loop trains on, the terms are weighted as that loss is, and their value is added to
it; elsewhere a micro-batch counts for its share of the step.

RemoeTrainer computes the same terms itself and takes them out of here by `computed_elsewhere`. Any other Trainer tells,
by `ObjectiveCallback` among transformers' default callbacks, how many micro-batches make a step and at which rate
routers learn.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.config import PeftConfig
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer as transformers_trainer

from remoe_adapt._support import say_once
from remoe_adapt.errors import ConfigError
from remoe_adapt.libraries import Patches, append_entry, hook, put_on
from remoe_adapt.objective import PADDING, LossWeights, document_numbers
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers
from remoe_adapt.tuner.rates import slowest_reach
from remoe_adapt.tuner.terms import ATTACHED, RouterCall, row_shares, terms_of_call, weights_of

# Below this share of their spread no logits change what is chosen.
_LEAST_REACH = 1.0
# Of the context and not global: a thread that trains by itself may run beside RemoeTrainer.
_elsewhere: ContextVar[bool] = ContextVar("remoe_objective_elsewhere", default=False)


@contextmanager
def computed_elsewhere() -> Iterator[None]:
    """Models run in this block get no terms attached: who runs them adds the objective itself."""
    token = _elsewhere.set(True)
    try:
        yield
    finally:
        _elsewhere.reset(token)


def attach_objective(base: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
    """Give a base model with wrapped routers the objective of its REMOE adapters, whoever trains it.

    base: the model without PEFT's wrappers; configs: its adapters by name, read anew at every step. Nothing happens
    when no adapter has a weight above 0, or when the base has its objective already.
    """
    if ATTACHED in vars(base) or not any(_has_weight(config) for config in configs.values()):
        return
    AttachedObjective(base, configs)
    # Trainers made from now on call it, whoever makes them.
    append_entry(transformers_trainer.DEFAULT_CALLBACKS, ObjectiveCallback)


def detach_objective(model: nn.Module) -> None:
    """Undo `attach_objective` on the base inside `model`."""
    for module in model.modules():
        objective = vars(module).get(ATTACHED)
        if objective is not None:
            objective.close()


def _has_weight(config: PeftConfig) -> bool:
    return isinstance(config, RemoeConfig) and weights_of({"": config}) != LossWeights()


class AttachedObjective:
    """Hooks of one base model; they do nothing unless it runs in training mode, with gradient, for a REMOE adapter that
    is active, trainable and has weights.

    `accumulation` is how many micro-batches make a step, for loops that do not train on the model's own loss;
    `loss_is_scaled` says that a gradient scaler multiplies the loss by a number that is not known here.
    """

    def __init__(self, base: nn.Module, configs: Mapping[str, PeftConfig]) -> None:
        self._configs = configs
        self.accumulation, self.loss_is_scaled = 1, False
        self._labels_BT: Tensor | None = None
        self._num_items: Tensor | int | None = None
        # One for each run of the decoder: a model may run it several times before its one loss.
        self._attached: list[_Attached] = []
        self._calls: list[RouterCall] | None = None
        self._listening = Patches()
        # A causal LM's decoder is its base_model, whose output is the last hidden state; any other model is hooked
        # itself.
        decoder = getattr(base, "base_model", base)
        self._patches = Patches(
            self._listening,
            put_on(base, ATTACHED, self),
            hook(decoder, "forward_pre", self._before_decoder),
            hook(decoder, "forward", self._after_decoder, with_kwargs=True, always_call=True),
        )
        # A model that is its own decoder has no loss of its own to weigh the terms by.
        if decoder is not base:
            self._patches.add(
                hook(base, "forward_pre", self._before_model, with_kwargs=True),
                hook(base, "forward", self._after_model),
            )

    def close(self) -> None:
        """Take it off the model, with every hook."""
        self._patches.remove()

    def trained(self, layers: Mapping[str, RemoeLayer]) -> dict[str, RemoeConfig]:
        """Configurations of the adapters that a backward pass would train now."""
        names = {
            name
            for layer in layers.values()
            if not layer.disable_adapters and not layer.merged
            for name in layer.active_adapters
            if any(values[name].requires_grad for values in (layer.remoe_delta, layer.remoe_B) if name in values)
        }
        found = {name: self._configs[name] for name in sorted(names) if name in self._configs}
        return {name: config for name, config in found.items() if isinstance(config, RemoeConfig)}

    # The model: labels come in, its loss goes out

    def _before_model(self, base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._labels_BT, self._num_items, self._attached = None, None, []
        if torch.is_grad_enabled():
            given = _named(base, args, kwargs)
            self._labels_BT, self._num_items = given.get("labels"), given.get("num_items_in_batch")

    def _after_model(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        attached, self._attached = self._attached, []
        has_loss = self._labels_BT is not None
        self._labels_BT = self._num_items = None
        if not attached:
            return None
        # Asked here and not when training begins, as only the output tells whether that loss is trained.
        _warn_of_balancing(base, output)
        loss = output.get("loss") if isinstance(output, dict) else output[0] if has_loss else None
        if not isinstance(loss, Tensor) or not loss.requires_grad or loss.dim():
            return None
        terms = [one.loss.detach().to(loss) for one in attached if one.loss is not None]
        shown = loss + torch.stack(terms).sum()
        # The hook runs before the decoder's backward, so the terms know their weight when they are asked for it.

        def weigh(gradient: Tensor) -> None:
            # Whatever scales the loss scales the terms: micro-batches, gradient scalers, processes.
            for one in attached:
                assert one.loss is not None
                one.weight = gradient.to(one.loss)

        shown.register_hook(weigh)
        return _with_first(output, "loss", shown)

    # The decoder: routers run, its last hidden state takes the terms along

    def _before_decoder(self, decoder: nn.Module, args: tuple[Any, ...]) -> None:
        # A forward that failed halfway has left its hooks; they would note the routers of this one twice.
        self._stop_listening()
        if not torch.is_grad_enabled() or _elsewhere.get() or not decoder.training:
            return
        layers = remoe_layers(decoder)
        if weights_or_none(self.trained(layers)) is None:
            return
        # Replicas have no parameters, so no gradient of a term would ever reach the adapter.
        if getattr(decoder, "_is_replica", False):
            raise ConfigError(
                "nn.DataParallel trains copies of the routers, which this objective cannot reach: start one process "
                "per GPU (accelerate launch), or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
            )
        self._calls = []
        self._listening.add(*(hook(layer, "forward", self._note, with_kwargs=True) for layer in layers.values()))

    def _note(self, layer: RemoeLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        # Only references are kept: a block under gradient checkpointing must record the same operations when it is
        # recomputed, and a clone here would be one more.
        if self._calls is not None:
            self._calls.append((layer, args, kwargs, output))

    def _stop_listening(self) -> list[RouterCall]:
        self._listening.remove()
        calls, self._calls = self._calls or [], None
        return calls

    def _after_decoder(self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        calls = self._stop_listening()
        if output is None or not torch.is_grad_enabled() or _elsewhere.get():
            return None
        layers = remoe_layers(decoder)
        configs = self.trained(layers)
        weights = weights_or_none(configs)
        key, state = _last_hidden_state(output)
        if weights is None or state is None or not state.requires_grad:
            return None
        attached = _Attached(self, list(configs.values()))
        if calls:
            if weights.distill_share:
                say_once(
                    f"distill_share={weights.distill_share:g} acts in RemoeTrainer only (it runs the base a second "
                    "time): here the target is the text alone, and an adapter saved now says so"
                )
            attached.share, attached.loss = self._loss(
                calls, layers, _named(decoder, args, kwargs), weights, state.device
            )
            self._attached.append(attached)
        passed = _Pass.apply(state, attached.loss, attached)  # type: ignore[no-untyped-call]
        return passed if isinstance(output, Tensor) else _with_first(output, key, passed)

    def _loss(
        self,
        calls: list[RouterCall],
        layers: Mapping[str, RemoeLayer],
        inputs: Mapping[str, Any],
        weights: LossWeights,
        home: torch.device,
    ) -> tuple[Tensor, Tensor]:
        """The micro-batch's share of the step, as far as the model was told, and its terms times that share."""
        names = {layer: name for name, layer in layers.items()}
        documents_BT = document_numbers(inputs).to(home)
        labels_BT = self._labels_BT
        if isinstance(labels_BT, Tensor) and labels_BT.shape == documents_BT.shape:
            items = self._num_items
            share_B, _ = row_shares(labels_BT.to(home), items.to(home) if isinstance(items, Tensor) else items)
        else:
            # Without labels every token that is none of padding is taken for one that is trained on.
            count_B = (documents_BT != PADDING).sum(dim=1)
            share_B = count_B / count_B.sum().clamp_min(1)
        losses = [terms_of_call(call, call[3], names[call[0]], documents_BT, weights, 1.0).loss for call in calls]
        return share_B.sum(), torch.stack([(loss_B * share_B).sum() for loss_B in losses]).sum() / len(layers)


def weights_or_none(configs: Mapping[str, RemoeConfig]) -> LossWeights | None:
    """The weights of the adapters under training; None when there is none to attach."""
    weights = weights_of(configs) if configs else LossWeights()
    return None if weights == LossWeights() else weights


class _Attached:
    """The terms of one run of a decoder, and how much its micro-batch weighs once backward comes by."""

    def __init__(self, objective: AttachedObjective, configs: list[RemoeConfig]) -> None:
        self.loss: Tensor | None = None
        self.share: Tensor | None = None
        self.weight: Tensor | None = None
        self._objective, self._configs = objective, configs

    def gradient(self) -> Tensor | None:
        """d(loss of the loop) / d(terms); notes in the configurations that training came here, and what acted."""
        # Noted in backward and not in forward: an evaluation with gradients on is no training.
        for config in self._configs:
            config.note_training(set() if self.loss is None else {*config.loss_weights} - {"distill_share"})
        if self.loss is None or self.weight is not None:
            return self.weight
        if self._objective.loss_is_scaled:
            raise ConfigError(
                "fp16 scales a loss that this trainer computes itself, and the locality terms cannot know by how much: "
                "use bf16=True, or RemoeTrainer (RemoeTrainerMixin before your trainer's class)"
            )
        assert self.share is not None
        # A micro-batch without label tokens has no share; dividing by it would make NaN of the gradients.
        return torch.where(self.share > 0, 1.0 / (self.share * self._objective.accumulation), 0.0).to(self.loss)


class _Pass(torch.autograd.Function):
    """A hidden state as it is; its backward pass starts that of the terms beside it."""

    @staticmethod
    def forward(ctx: Any, state: Tensor, loss: Tensor | None, attached: _Attached) -> Tensor:
        ctx.attached = attached
        # A clone, because autograd forbids writing in place to a view that a custom function returns.
        return state.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None]:
        return gradient, ctx.attached.gradient(), None


def _with_first(output: Any, key: str, value: Tensor) -> Any:
    """An output of a model with `value` under this key, or in its first place where it is a tuple."""
    if isinstance(output, dict):
        output[key] = value
        return output
    return (value, *output[1:])


def _last_hidden_state(output: Any) -> tuple[str, Tensor | None]:
    """Where in a decoder's output the tensor is that all losses come from, and that tensor."""
    if isinstance(output, dict):
        names = ("last_hidden_state", "logits", *output)
        found = next((n for n in names if isinstance(output.get(n), Tensor) and output[n].requires_grad), "")
        return found, output.get(found)
    first = output[0] if isinstance(output, tuple) and output else output
    return "", first if isinstance(first, Tensor) else None


def _named(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    if not args:
        return kwargs
    names = [name for name in inspect.signature(module.forward).parameters if name not in kwargs]
    return dict(zip(names, args, strict=False)) | kwargs


def _warn_of_balancing(base: nn.Module, output: Any) -> None:
    loss = output.get("aux_loss") if isinstance(output, dict) else None
    config: Any = getattr(base, "config", None)
    weight = getattr(config.get_text_config(), "router_aux_loss_coef", 1.0) if config is not None else 1.0
    if isinstance(loss, Tensor) and loss.requires_grad and weight:
        say_once(
            "the model's own load-balancing loss is trained beside the reuse objective and works against it: set "
            "model.config.output_router_logits = False (for TRL: router_aux_loss_coef=0.0)"
        )


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
