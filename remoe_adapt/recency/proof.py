"""The proof that an installed recency prior acts: three tokens through the real model, once, with idle experts.

What a prior relies on in a model can change without a word: the name of the KV cache, who calls whom, what a block does
with the ids that its router returns. So two tokens run as a prompt and one as a decode step, under a gain that
overrides every logit: each must choose the experts of the one before. Experts behind transformers' interface return
zeros meanwhile (none is read from storage), and what they are asked for is compared with what the router chose.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt._support import first_line, say_once
from remoe_adapt.libraries import Patches, cache_argument, can_carry_state, hook, put_on, returned_cache
from remoe_adapt.recency.prior import RecencyPrior
from remoe_adapt.recency_settings import MAX_GAIN
from remoe_adapt.routers import RouterRef, RouterSpec

# transformers' own names for the inputs of an experts module, from 5.0 on.
_EXPERTS_INPUTS = ("top_k_index", "top_k_weights")
_PROMPT, _STEP = (1, 2), (3,)
# A gain above this, times a large span of choice values, would leave fp32.
_MOST = 1e7


def why_without_effect(
    text: nn.Module, refs: Sequence[RouterRef], places: Sequence[int], prior: RecencyPrior
) -> dict[int, str]:
    """Why the installed prior does not act on some routers of one text model, by place; empty when it does.

    refs: all routers that have the prior, in its order; places: those of this text model. Gains and residency, modes,
    random state and experts are as before afterwards, also after an error. Where the model cannot be run like this
    (weights on the meta device, inputs of a kind of its own) nothing is proven: that is said once by name, and the
    result is empty.
    """
    if any(tensor.is_meta for tensor in text.parameters()):
        return {}
    try:
        with ExitStack() as stack:
            for context in (torch.no_grad(), _same_random_state(text), _evaluating(text), _overriding(prior, refs)):
                stack.enter_context(context)
            stack.callback(setattr, prior.running, "tokens", None)
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            seen = {place: stack.enter_context(_watched(refs[place])) for place in places}
            returns_cache = _run(text, prior.needs_history)
    except Exception as error:  # a forward of anybody may raise anything
        say_once(
            f"the recency prior of {type(text).__name__} could not be tried when it was installed "
            f"({type(error).__name__}: {first_line(error)}): see whether `remoe eval --recency ema` changes its EOR."
        )
        return {}
    if not returns_cache:
        return dict.fromkeys(places, f"{type(text).__name__} takes a KV cache and returns none by a name known here")
    found = {place: fault for place, watch in seen.items() if (fault := watch.fault(prior.needs_history)) is not None}
    if not found:
        # What the sequences of a model do holds for all its routers: some choose as favoured by chance.
        fault = next(
            (fault for watch in seen.values() if (fault := watch.unfavoured(prior.needs_history)) is not None), None
        )
        found = dict.fromkeys(places, fault) if fault is not None else {}
    return found


def _run(text: nn.Module, steps: bool) -> bool:
    """The prompt, and the step on its KV cache; False where the cache it takes is not returned."""
    taken = cache_argument(text.forward)
    parameters = inspect.signature(text.forward).parameters
    cached: dict[str, Any] = {"use_cache": True} if taken is not None and "use_cache" in parameters else {}
    output = text(**_inputs(text, parameters, _PROMPT), **cached)
    if not steps or not cached or taken is None:
        return True
    cache = returned_cache(output)
    if cache is None or not can_carry_state(cache):
        return False
    text(**_inputs(text, parameters, _STEP), **cached, **{taken: cache})
    return True


def _inputs(text: nn.Module, parameters: Any, tokens: tuple[int, ...]) -> dict[str, Tensor]:
    embedding: Any = text.get_input_embeddings()  # type: ignore[operator]
    weight = embedding.weight
    ids_BT = torch.tensor([tokens], device=weight.device) % embedding.num_embeddings
    return {"input_ids": ids_BT} if "input_ids" in parameters else {"inputs_embeds": embedding(ids_BT)}


class _Watch:
    """What one router chose in each forward, and what its experts were asked for."""

    def __init__(self, spec: RouterSpec) -> None:
        self._spec = spec
        self.chosen: list[Tensor] = []
        self.asked: list[Tensor] = []

    def heard(self, _module: nn.Module, _inputs: Any, output: Any) -> None:
        self.chosen.append(self._spec.read(output).ids_TK)

    def fault(self, needs_history: bool) -> str | None:
        """Why the prior cannot act on this router; None also for one that text alone does not ask."""
        if not self.chosen:
            return None
        tokens = [len(ids_TK) for ids_TK in self.chosen]
        if needs_history and tokens not in ([len(_PROMPT)], [len(_PROMPT), len(_STEP)]):
            return f"it is asked {len(tokens)} times, for {tokens} tokens, where a prompt of 2 and a step of 1 have run"
        for chosen_TK, asked_TK in zip(self.chosen, self.asked, strict=False):
            alike = asked_TK.shape == chosen_TK.shape and not self._spec.null_experts
            if alike and not torch.equal(asked_TK.sort(-1).values, chosen_TK.sort(-1).values):
                return "its experts are not asked for the ids that it returns"
        return None

    def unfavoured(self, needs_history: bool) -> str | None:
        """Where a token did not choose what the prior favours above all."""
        if not self.chosen:
            return None
        rows = [frozenset(row.tolist()) for row in torch.cat(self.chosen)]
        resident = frozenset(range(self._spec.top_k))
        for place, row in enumerate(rows):
            favoured = resident if not needs_history else rows[place - 1] if place else row
            groups = {self._group(expert) for expert in row}
            if missing := {expert for expert in favoured if self._group(expert) in groups} - row:
                where = "a decode step" if place == len(_PROMPT) else "a prompt"
                return f"under an overriding gain it did not choose expert {min(missing)} in {where}"
        return None

    def _group(self, expert: int) -> int:
        """Experts outside the groups that a token chooses are out of the prior's reach."""
        return expert * self._spec.n_group // self._spec.num_experts


@contextmanager
def _watched(ref: RouterRef) -> Iterator[_Watch]:
    watch = _Watch(ref.spec)
    with hook(ref.module, "forward", watch.heard), _idle_experts(ref.block, watch.asked):
        yield watch


@contextmanager
def _idle_experts(block: nn.Module, asked: list[Tensor]) -> Iterator[None]:
    """Within, experts behind transformers' interface note the ids they are asked for and return zeros."""
    with Patches() as patches:
        for module in block.children():
            # Whatever forward is there, a cache's too, is left out: no expert is to be read for a trial.
            if signature := _experts_signature(type(module)):
                patches.add(put_on(module, "forward", _idle(signature, asked)))
        yield


def _experts_signature(cls: type) -> inspect.Signature | None:
    """That of an experts module's forward, also under a class that reads its experts from a cache."""
    for base in cls.__mro__:
        forward = vars(base).get("forward")
        if forward is not None:
            signature = inspect.signature(inspect.unwrap(forward))
            if all(name in signature.parameters for name in _EXPERTS_INPUTS):
                return signature
    return None


def _idle(signature: inspect.Signature, asked: list[Tensor]) -> Callable[..., Tensor]:
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(None, *args, **kwargs).arguments
        ids_TK = given[_EXPERTS_INPUTS[0]]
        asked.append(ids_TK.reshape(-1, ids_TK.shape[-1]))
        hidden: Tensor = list(given.values())[1]
        return torch.zeros_like(hidden)

    return forward


@contextmanager
def _overriding(prior: RecencyPrior, refs: Sequence[RouterRef]) -> Iterator[None]:
    """Within, every gain overrides any choice value, and the first K experts of each router are resident."""
    gains, masks = [float(gain) for gain in prior.gains], [mask_1E.clone() for mask_1E in prior.residency]
    share = prior.share
    if share is not None:  # the last K experts alone, or a cache larger than that leaves more than one right answer
        prior.share = 0.0
    # An expert of the last token is ahead of one of the token before by (1 - decay)^2: in slow modes that is so little
    # that the largest gain of users would not override, and the prior would be taken for one that does not act.
    largest = max(MAX_GAIN, min(_MOST, 2.0 / (1.0 - prior.decay) ** 2))
    for gain in prior.gains:
        gain.fill_(largest)
    prior.know([largest] * len(prior.gains))
    for mask_1E, ref in zip(prior.residency, refs, strict=True):
        mask_1E.zero_()[:, : ref.spec.top_k] = 1.0
    try:
        yield
    finally:
        prior.share = share
        prior.set_gains(gains)
        for mask_1E, kept_1E in zip(prior.residency, masks, strict=True):
            mask_1E.copy_(kept_1E)


@contextmanager
def _evaluating(text: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in text.modules()]
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _same_random_state(text: nn.Module) -> Iterator[None]:
    devices = {parameter.device for parameter in text.parameters() if parameter.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)):
        yield
