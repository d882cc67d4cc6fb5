"""RemoeTrainer: transformers' Trainer with the objective of `objective`, end to end or layer by layer."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from remoe_adapt.errors import ConfigError
from remoe_adapt.libraries import Patches, hook
from remoe_adapt.objective import (
    IGNORED_LABEL,
    LossWeights,
    RouterTerms,
    Teacher,
    document_numbers,
    next_token_losses,
    target_losses,
    warm_up,
)
from remoe_adapt.recency import InstalledPrior
from remoe_adapt.tuner import (
    WORKING_RATE,
    ObjectiveCallback,
    RemoeLayer,
    RouterCall,
    active_configs,
    computed_elsewhere,
    relative_rates,
    remoe_layers,
    router_rates,
    row_shares,
    terms_of_call,
    weights_of,
    without_jitter,
)

# To mypy the mixin is a Trainer; when it runs it inherits from none, so that it can stand before any Trainer class.
if TYPE_CHECKING:
    _Mixin = Trainer
else:
    _Mixin = object

Mode = Literal["end-to-end", "local"]
MODES: tuple[Mode, ...] = ("end-to-end", "local")
# What is summed over the micro-batches of a step, in this order, and then divided by their share of it.
_LOGGED = ("loss", "ce", "kl", "eor", "kl_base")


@dataclass(frozen=True, slots=True)
class Measured:
    """The objective on one micro-batch, each part scaled by its share of the step's label tokens.

    loss: with gradient. ce, kl_base: the next-token loss and KL(base || student), None without a teacher. terms: of
    each router, values per row. calls: the routers' calls. outputs: the model's.
    """

    loss: Tensor
    ce: Tensor
    kl_base: Tensor | None
    terms: list[RouterTerms]
    calls: list[RouterCall]
    outputs: Any


class RemoeTrainerMixin(_Mixin):
    """Put before a Trainer class that trains on next tokens: `class MyTrainer(RemoeTrainerMixin, SFTTrainer)`.

    The model holds wrapped routers with an active REMOE adapter, beside other adapters or not; the weights of the terms
    are read from its RemoeConfig. Inputs need `labels`; which document a token belongs to and what is padding is read
    from what packed batches carry (see `document_numbers`), and a row that says nothing is one document. The model's
    own load-balancing loss stays out: it fights reuse. Trainers with another loss (DPO) go without this class: there
    the terms come with the model (tuner/attached.py).

    mode "end-to-end": L_CE + trust + locality, backward through the model.
    mode "local": trust + locality of each router on its detached input, backward inside the router's own hook. No
    activation of the model is kept, so training needs the memory of inference; L_CE has no gradient there.

    With `prior`, a recency prior installed on the same model, the student runs under its gains, restarting where a
    document begins, and the base that it is held to (`distill_share`) without: the routers learn what is best with it.

    The locality and trust terms are means over the wrapped routers.
    """

    model: Any
    loss_is_scaled_for_ga: bool | None
    optimizer: torch.optim.Optimizer | None
    _signature_columns: Any
    _is_at_full_weight = False
    # A subclass averages what processes learnt itself, once a step.
    _averages_when_all_ran = False

    def __init__(
        self,
        *args: Any,
        mode: Mode = "end-to-end",
        locality_warmup_steps: int = 0,
        router_relative_lr: bool | None = None,
        prior: InstalledPrior | None = None,
        **kwargs: Any,
    ) -> None:
        """`locality_warmup_steps` is T_warm. With `router_relative_lr`, `args.learning_rate` is in units of a router's
        own scale (see `router_rates`), so that one step moves logits by a share of their spread in any model; without
        it, it is what Trainer means. None: a learning rate that is still the default of its arguments' class is taken
        as not chosen, and routers learn at the relative rate 0.3 (other parameters at that default); a chosen one is
        Trainer's.

        Raises ConfigError for an unknown mode, a model without an active REMOE adapter, local mode without a term, and
        for arguments that would be without effect (label smoothing, a loss function).
        """
        if mode not in MODES:
            raise ConfigError(f"mode={mode!r}: choose 'end-to-end' or 'local'")
        self.mode, self.prior = mode, prior
        self.locality_warmup_steps = locality_warmup_steps
        self.router_relative_lr = router_relative_lr
        training = kwargs.get("args", args[1] if len(args) > 1 else None)
        if training is not None and training.n_gpu > 1:
            training._n_gpu = 1  # DataParallel would train copies of the routers, which our hooks never see
        super().__init__(*args, **kwargs)
        self.remove_callback(ObjectiveCallback)  # that is for trainers that do not compute the terms themselves
        if self.args.label_smoothing_factor or getattr(self, "compute_loss_func", None) is not None:
            raise ConfigError(
                "label_smoothing_factor and compute_loss_func have no effect on the objective of RemoeTrainer: leave "
                "them out (distill_share in RemoeConfig softens the targets), or use transformers' Trainer"
            )
        # Tells Trainer that the loss is divided by the label tokens of the whole step already; the attribute has
        # another name in older versions.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self.router_layers = {n: r for n, r in remoe_layers(self.model).items() if r.adapters & {*r.active_adapters}}
        self._configs = active_configs(self.model, self.router_layers.values())
        self.loss_weights = weights_of(self._configs)
        self.check_terms()
        self._sums: Tensor | None = None

    def check_terms(self) -> None:
        """Raises ConfigError when local mode has nothing to learn from."""
        if self.mode == "local" and replace(self.loss_weights, distill_share=0.0) == LossWeights():
            raise ConfigError(
                "mode='local' learns from the locality and trust terms alone, and all their weights are 0: "
                "set reuse_weight in RemoeConfig, or choose mode='end-to-end'"
            )

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of one optimizer step, and how many label tokens they predict (on all devices, unless
        `average_tokens_across_devices` is off). A row's first label is never predicted and never counted."""
        # All micro-batches of a step at once, since each is weighted by the label tokens of the whole step.
        batches = list(itertools.islice(epoch_iterator, num_batches))
        if not batches:
            return batches, None
        counts = [(_labels(batch)[:, 1:] != IGNORED_LABEL).sum().to(device) for batch in batches]
        items = torch.stack(counts).sum().reshape(1)
        if self._averages_tokens:
            # Processes hold different texts, and a token must weigh the same in all of them.
            items = self.accelerator.gather(items)
        return batches, items.sum().clamp_min(1)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The objective on one micro-batch, scaled by its share of the optimizer step's label tokens.

        Raises ConfigError when no gradient can reach the routers.
        """
        inputs, labels_BT, documents_BT = _split_inputs(inputs)
        share_B, items = row_shares(labels_BT, num_items_in_batch if model.training else None)
        found = self.measured(model, inputs, labels_BT, documents_BT, share_B, items)
        loss = found.loss
        if model.training:
            self._note(found.loss, found.ce, found.terms, share_B, found.kl_base)
            loss = loss * self._loss_factor
        return (loss, found.outputs) if return_outputs else loss

    def measured(
        self, model: nn.Module, inputs: dict[str, Any], labels_BT: Tensor, documents_BT: Tensor, share_B: Tensor,
        items: Tensor | int,
    ) -> Measured:  # fmt: skip
        """The objective and its parts on one micro-batch; `share_B` and `items` as `row_shares` gives them."""
        calls: list[RouterCall] = []
        share = self.loss_weights.distill_share
        # Before the trained pass, so that no activation of that one is in memory meanwhile.
        teacher = self._teacher(model, inputs) if share else None
        with self._hooks(lambda *call: calls.append(call)):
            outputs = self._student(model, inputs, documents_BT)
        target_BT, ce_BT, kl_BT = target_losses(outputs.logits, labels_BT, teacher, share)
        with self.accelerator.autocast():  # the reference must compute as the model did
            terms = [self._terms(call, call[3], documents_BT) for call in calls]
        loss = target_BT.sum() / items + sum((term.loss * share_B).sum() for term in terms) / len(self.router_layers)
        kl_base = None if kl_BT is None else kl_BT.sum() / items
        return Measured(loss, ce_BT.sum() / items, kl_base, terms, calls, outputs)

    def _teacher(self, model: nn.Module, inputs: dict[str, Any]) -> Teacher:
        """What the base predicts."""
        with torch.no_grad(), without_adapters(self.router_layers.values()), self._without_prior():
            return Teacher.of(model(**inputs).logits)

    def _student(self, model: nn.Module, inputs: dict[str, Any], documents_BT: Tensor) -> Any:
        """The trained model's output; under a prior whose recency begins anew with every document."""
        if self.prior is None:
            return model(**inputs)
        with self.prior.prior.documents(documents_BT):
            return model(**inputs)

    def _without_prior(self) -> AbstractContextManager[None]:
        return nullcontext() if self.prior is None else self.prior.prior.paused()

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """One micro-batch: Trainer's own step end to end; layer-local gradients otherwise."""
        whole = self.mode == "end-to-end"
        step = super().training_step if whole else self._local_step
        loss: Tensor = step(model, inputs, num_items_in_batch)
        for config in self._configs.values():
            config.note_training({*config.loss_weights} - (set() if whole else {"distill_share"}))
        return loss

    def _local_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None) -> Tensor:
        model.train()
        inputs, labels_BT, documents_BT = _split_inputs(self._prepare_inputs(inputs))
        share_B, items = row_shares(labels_BT, num_items_in_batch)
        terms: list[RouterTerms] = []
        loss = torch.zeros((), device=share_B.device)

        def learn(layer: RemoeLayer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            nonlocal loss
            detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
            with torch.enable_grad(), without_jitter(layer):
                # `forward` and not a call: a call would run this very hook again.
                again = layer.forward(*detached, **kwargs)
                term = self._terms((layer, detached, kwargs, output), again, documents_BT)
                mine = (term.loss * share_B).sum() / len(self.router_layers) * self._loss_factor
                self.accelerator.backward(mine)
            loss = loss + mine.detach()
            terms.append(RouterTerms(term.loss.detach(), term.kl, term.eor))

        with torch.no_grad(), self._hooks(learn):
            logits_BTV = self._student(model, inputs, documents_BT).logits
            # Row by row, because the copies in full precision are as large as all logits.
            rows = zip(logits_BTV.split(1), labels_BT.split(1), strict=True)
            ce = torch.stack([next_token_losses(*row).sum() for row in rows]).sum() / items
        if self.accelerator.sync_gradients and not self._averages_when_all_ran:
            # The pass above ran without gradient, so DistributedDataParallel averages nothing.
            self._average_gradients(p for layer in self.router_layers.values() for p in layer.parameters())
        self._note(ce + loss / self._loss_factor, ce, terms, share_B)
        return ce * self._loss_factor + loss

    def _average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """The gradients of these, where they need one, are the means of all processes."""
        if self.accelerator.num_processes == 1:
            return
        for parameter in parameters:
            if parameter.requires_grad:
                gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = self.accelerator.reduce(gradient, reduction="mean")

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """AdamW with the rates of `router_rates`, without weight decay, when they are relative; else Trainer's own.

        Raises ConfigError when no delta is trainable, for another `optim` than AdamW, or as `relative_rates`.
        """
        if not any(p.requires_grad for layer in self.router_layers.values() for p in layer.parameters()):
            raise ConfigError(
                "no router delta requires gradient: load the adapter with is_trainable=True, or set_adapter it"
            )
        unset = self.args.learning_rate == _default(self.args, "learning_rate")
        relative = unset if self.router_relative_lr is None else self.router_relative_lr
        if not relative or self.optimizer is not None:
            return super().create_optimizer(*args, **kwargs)
        if not str(getattr(self.args.optim, "value", self.args.optim)).startswith("adamw_torch"):
            raise ConfigError(
                f"optim={self.args.optim!r}: rates relative to a router are AdamW's; leave it at its default, or "
                "choose a learning_rate with router_relative_lr=False"
            )
        if self.router_relative_lr is None:
            lr, rates = WORKING_RATE, router_rates(self.router_layers.values())
        else:
            lr, rates = self.args.learning_rate, relative_rates(self.model, self.router_layers.values())
        # No weight decay: it would pull deltas towards 0, which is L_Trust's work and has its own weight.
        groups = [{"params": [p], "lr": lr * rate, "weight_decay": 0.0} for p, rate in rates]
        ours, decayed = {id(p) for p, _ in rates}, {*self.get_decay_parameter_names(self.model)}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad and id(parameter) not in ours:
                decay = self.args.weight_decay if name in decayed else 0.0
                groups.append({"params": [parameter], "lr": self.args.learning_rate, "weight_decay": decay})
        betas = (self.args.adam_beta1, self.args.adam_beta2)
        # A router's gradients are small, and Trainer's default epsilon would swallow them.
        chosen = self.args.adam_epsilon != _default(self.args, "adam_epsilon")
        self.optimizer = torch.optim.AdamW(groups, betas=betas, eps=self.args.adam_epsilon if chosen else 1e-12)
        return self.optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's log with `ce`, `kl` (L_Trust, mean over routers), `eor` and, where there is a teacher, `kl_base`
        (KL to the base, nats a token) of the steps since the last one."""
        if "loss" in logs:  # a step's own log, which every process makes
            logs |= {name: value for name, value in self._taken_sums().items() if name != "loss"}
        super().log(logs, *args, **kwargs)

    def _taken_sums(self) -> dict[str, float]:
        """Means of what was summed since the last call, over all processes."""
        if self._sums is None:
            return {}
        *totals, taught, share = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        self._sums = None
        # Without a teacher there is no divergence from one.
        names = _LOGGED if taught else _LOGGED[:-1]
        return dict(zip(names, (total / share for total in totals), strict=False)) if share > 0 else {}

    @property
    def _averages_tokens(self) -> bool:
        return bool(self.accelerator.num_processes > 1 and self.args.average_tokens_across_devices)

    @property
    def _loss_factor(self) -> int:
        # Gradients are averaged over processes, while every process divided by the label tokens of all.
        return self.accelerator.num_processes if self._averages_tokens else 1

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        # Trainer drops the columns that the model's forward does not name, and documents would run into each other.
        columns = [name for name in self._signature_columns or () if name != "document_ids"]
        self._signature_columns = [*columns, "document_ids"]

    @contextmanager
    def _hooks(self, on_call: Callable[..., None]) -> Iterator[None]:
        # Only references are kept here: a checkpointed block must record the same operations when it is recomputed.
        with Patches() as patches, computed_elsewhere():
            patches.add(*(hook(layer, "forward", on_call, with_kwargs=True) for layer in self.router_layers.values()))
            yield

    @contextmanager
    def at_full_weight(self) -> Iterator[None]:
        """Within the block the locality terms have their full weight, so that evaluations of a run can be compared."""
        self._is_at_full_weight = True
        try:
            yield
        finally:
            self._is_at_full_weight = False

    def _terms(self, call: RouterCall, result: Any, documents_BT: Tensor) -> RouterTerms:
        name = next(name for name, layer in self.router_layers.items() if layer is call[0])
        warming = 0 if self._is_at_full_weight else self.locality_warmup_steps
        alpha = warm_up(self.state.global_step + 1, warming)
        return terms_of_call(call, result, name, documents_BT, self.loss_weights, alpha)

    def _note(
        self, loss: Tensor, ce: Tensor, terms: list[RouterTerms], share_B: Tensor, kl_base: Tensor | None = None
    ) -> None:
        """Add to the sums of `_LOGGED`, whether there was a teacher, and shares; on the device, so that a step waits
        for nothing."""
        kl_B, eor_B = (torch.stack([getattr(term, name) for term in terms]).mean(dim=0) for name in ("kl", "eor"))
        taught = torch.zeros_like(ce) if kl_base is None else kl_base
        values = (loss, ce, (kl_B * share_B).sum(), (eor_B * share_B).sum(), taught)
        is_taught = torch.full_like(taught, float(kl_base is not None))
        now = torch.stack([value.detach().float() for value in (*values, is_taught, share_B.sum())])
        self._sums = now if self._sums is None else self._sums + now


class RemoeTrainer(RemoeTrainerMixin, Trainer):
    """transformers' Trainer for REMOE adapters; see RemoeTrainerMixin."""


def _default(args: TrainingArguments, name: str) -> Any:
    """What this option is when nobody chooses it."""
    return next(field.default for field in fields(args) if field.name == name)


def _labels(inputs: dict[str, Any]) -> Tensor:
    if "labels" not in inputs:
        raise ConfigError(f"training inputs have no 'labels' (found {', '.join(inputs)}): add them, -100 where ignored")
    labels_BT: Tensor = inputs["labels"]
    return labels_BT


@contextmanager
def without_adapters(layers: Iterable[BaseTunerLayer]) -> Iterator[None]:
    """These layers compute as the base does; unlike `disable_adapter`, what is trainable stays so."""
    found = [(layer, layer.disable_adapters) for layer in layers]
    try:
        for layer, _ in found:
            # PEFT's own switch also sets requires_grad, which would lose what the user has frozen.
            layer._disable_adapters = True
        yield
    finally:
        for layer, disabled in found:
            layer._disable_adapters = disabled


def _split_inputs(inputs: dict[str, Any]) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Model inputs without labels (the model adds no loss of its own), labels [B, T], document numbers [B, T]."""
    labels_BT = _labels(inputs)
    documents_BT = document_numbers(inputs)
    left = {name: value for name, value in inputs.items() if name not in ("labels", "document_ids")}
    # A KV cache would keep the keys of every layer for nothing: training never continues a text.
    return {"use_cache": False, **left}, labels_BT, documents_BT
