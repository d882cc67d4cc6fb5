"""RemoeTrainer: transformers' Trainer with the objective of `objective.py`, end to end or layer by layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Trainer

from remoe_adapt.errors import ConfigError
from remoe_adapt.training.objective import (
    IGNORED_LABEL,
    LossWeights,
    RouterTerms,
    next_token_losses,
    router_terms,
    warm_up,
)
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.layer import RemoeLayer, remoe_layers

Mode = Literal["end-to-end", "local"]
RouterCall = tuple[RemoeLayer, tuple[Any, ...], dict[str, Any], Any]


class RemoeTrainerMixin:
    """Put before a Trainer class: `class MyTrainer(RemoeTrainerMixin, Trainer)`.

    The model is a PeftModel with an active REMOE adapter, or holds one; the weights of the terms are read from its
    RemoeConfig. Inputs may carry `document_ids` [B, T] (see `PackedRows`); without them `attention_mask` says what is
    padding and a row is one document. The model's own load-balancing loss stays out: it fights reuse.

    mode "end-to-end": L_CE + trust + locality, backward through the model.
    mode "local": trust + locality of each router on its detached input, backward inside the router's own hook. No
    activation of the model is kept, so training needs the memory of inference; L_CE has no gradient there.
    """

    def __init__(
        self,
        *args: Any,
        mode: Mode = "end-to-end",
        locality_warmup_steps: int = 0,
        router_relative_lr: bool = False,
        **kwargs: Any,
    ) -> None:
        """`locality_warmup_steps` is T_warm. With `router_relative_lr`, `args.learning_rate` is in units of a router's
        own scale: router i learns at `learning_rate * rms(W_i) / sqrt(D)`, so that one step moves its logits by a
        share of their spread whatever the width of the model.

        Raises ConfigError for an unknown mode or a model without an active REMOE adapter.
        """
        if mode not in ("end-to-end", "local"):
            raise ConfigError(f"mode={mode!r}: choose 'end-to-end' or 'local'")
        self.mode = mode
        self.locality_warmup_steps = locality_warmup_steps
        self.router_relative_lr = router_relative_lr
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the Trainer then counts the label tokens of the whole optimizer step
        self.loss_is_scaled_for_ga = True
        self.router_layers = remoe_layers(self.model)
        self.loss_weights = _loss_weights(self.model)
        self._sums: dict[str, float] = {}
        self._calls: list[RouterCall] | None = None
        self._on_call: Callable[[RemoeLayer, tuple[Any, ...], dict[str, Any], Any], None] | None = None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch, scaled by its share of the optimizer step's label tokens."""
        inputs, labels_BT, documents_BT = _split_inputs(inputs)
        share_B, items = _row_shares(labels_BT, num_items_in_batch)
        calls: list[RouterCall] = []
        with self._hooks(lambda *call: calls.append(call)):
            outputs = model(**inputs)
        ce = next_token_losses(outputs.logits, labels_BT).sum() / items
        terms = [self._terms(call, documents_BT) for call in calls]
        loss_B = torch.stack([term.loss for term in terms]).mean(dim=0)
        loss = ce + (loss_B * share_B).sum()
        self._note(ce.detach(), terms, share_B)
        if getattr(self.args, "average_tokens_across_devices", False) and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: Trainer's own step end to end; layer-local gradients otherwise."""
        if self.mode == "end-to-end":
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc,no-any-return]
        model.train()
        inputs, labels_BT, documents_BT = _split_inputs(self._prepare_inputs(inputs))
        share_B, items = _row_shares(labels_BT, num_items_in_batch)
        terms: list[RouterTerms] = []
        count = len(self.router_layers)

        def learn(layer: RemoeLayer, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
            detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            with torch.enable_grad():
                term = self._terms((layer, detached, kwargs, layer.forward(*detached, **kwargs)), documents_BT)
                (term.loss * share_B).sum().div(count).backward()
            terms.append(RouterTerms(term.loss.detach(), term.kl, term.eor))

        with torch.no_grad(), self._hooks(learn):
            logits = model(**inputs).logits
            ce = next_token_losses(logits, labels_BT).sum() / items
        if self.accelerator.sync_gradients and self.accelerator.num_processes > 1:
            for layer in self.router_layers.values():
                for parameter in layer.parameters():
                    if parameter.grad is not None:
                        parameter.grad = self.accelerator.reduce(parameter.grad, reduction="mean")
        self._note(ce, terms, share_B)
        loss_B = torch.stack([term.loss for term in terms]).mean(dim=0)
        return ce + (loss_B * share_B).sum()

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """One parameter group per router when the learning rate is relative; Trainer's own optimizer otherwise."""
        if not self.router_relative_lr or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)  # type: ignore[misc,no-any-return]
        groups = []
        for layer in self.router_layers.values():
            weight_ED = layer.original_weight_ED.detach().float()
            scale = float(weight_ED.square().mean().sqrt()) / math.sqrt(weight_ED.shape[1])
            trained = [p for p in layer.parameters() if p.requires_grad]
            groups.append({"params": trained, "lr": self.args.learning_rate * scale, "weight_decay": 0.0})
        self.optimizer: torch.optim.Optimizer | None = torch.optim.AdamW(
            groups, betas=(self.args.adam_beta1, self.args.adam_beta2), eps=self.args.adam_epsilon
        )
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log with `ce`, `kl` (L_Trust, mean over routers) and `eor` of the steps since the last one."""
        count = self._sums.pop("count", 0.0)
        if "loss" in logs and count:
            logs |= {name: total / count for name, total in self._sums.items()}
            self._sums = {}
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        self._signature_columns = [*(self._signature_columns or []), "document_ids"]

    @contextmanager
    def _hooks(self, on_call: Callable[..., None]) -> Iterator[None]:
        # Only references are kept here: a checkpointed block must record the same operations when it is recomputed.
        def hook(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            on_call(layer, args, kwargs, output)

        handles = [layer.register_forward_hook(hook, with_kwargs=True) for layer in self.router_layers.values()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _terms(self, call: RouterCall, documents_BT: Tensor) -> RouterTerms:
        layer, args, kwargs, output = call
        rows = documents_BT.shape
        read = layer.spec.read(output)
        log_probs_BTE = _log_probabilities(layer, read.logits_TE).view(*rows, -1)
        with torch.no_grad():
            base = layer.base_layer
            training = base.training
            base.eval()  # no jitter in the reference, and none written into the shared input
            reference = layer.spec.read(base(*args, **kwargs))
            base.train(training)
            reference_BTE = _log_probabilities(layer, reference.logits_TE).view(*rows, -1)
        alpha = warm_up(self.state.global_step + 1, self.locality_warmup_steps)
        ids_BTK = read.ids_TK.view(*rows, -1)
        return router_terms(log_probs_BTE, ids_BTK, reference_BTE, documents_BT, self.loss_weights, alpha)

    def _note(self, ce: Tensor, terms: list[RouterTerms], share_B: Tensor) -> None:
        kl = (torch.stack([term.kl for term in terms]).mean(dim=0) * share_B).sum()
        eor = (torch.stack([term.eor for term in terms]).mean(dim=0) * share_B).sum()
        share = float(share_B.sum())
        for name, value in (("ce", ce), ("kl", kl), ("eor", eor)):
            self._sums[name] = self._sums.get(name, 0.0) + value.item()
        self._sums["count"] = self._sums.get("count", 0.0) + share


class RemoeTrainer(RemoeTrainerMixin, Trainer):
    """transformers' Trainer for REMOE adapters; see RemoeTrainerMixin."""


def _split_inputs(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Model inputs without labels (the model adds no loss of its own), labels [B, T], document numbers [B, T]."""
    inputs = dict(inputs)
    if "labels" not in inputs:
        raise ConfigError(f"training inputs have no 'labels' (found {', '.join(inputs)}): add them, -100 where ignored")
    labels_BT = inputs.pop("labels")
    documents_BT = inputs.pop("document_ids", None)
    if documents_BT is None:
        documents_BT = torch.zeros_like(labels_BT)
    if "attention_mask" in inputs:
        documents_BT = documents_BT.masked_fill(inputs["attention_mask"] == 0, -1)
    return {"use_cache": False, **inputs}, labels_BT, documents_BT


def _row_shares(labels_BT: Tensor, num_items: Tensor | int | None) -> tuple[Tensor, Tensor | int]:
    """Each row's share [B] of the optimizer step's label tokens, and their number."""
    count_B = (labels_BT[:, 1:] != IGNORED_LABEL).sum(dim=1)
    items = count_B.sum().clamp_min(1) if num_items is None else num_items
    return count_B / items, items


def _log_probabilities(layer: RemoeLayer, logits_TE: Tensor) -> Tensor:
    if layer.spec.score == "softmax":
        return logits_TE.float().log_softmax(dim=-1)
    return layer.spec.probabilities(logits_TE).clamp_min(torch.finfo(torch.float32).tiny).log()


def _loss_weights(model: nn.Module) -> LossWeights:
    configs = getattr(model, "peft_config", None) or {}
    active = getattr(model, "active_adapters", None)
    names = active() if callable(active) else (active or list(configs))
    for name in names:
        config = configs.get(name)
        if isinstance(config, RemoeConfig):
            return LossWeights(
                reuse=config.reuse_weight,
                smooth=config.smooth_weight,
                lag=config.lag_weight,
                window=config.ws_weight,
                kl=config.kl_weight,
            )
    raise ConfigError(
        "no active REMOE adapter in this model: call get_peft_model(base, RemoeConfig(reuse_weight=...)) first"
    )
