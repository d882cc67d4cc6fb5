"""The fast path: a router's forward as its class has it, with the choice of experts left to a gate that can be set.

Shapes: T tokens, E choices, K chosen, D columns of the weight; `hidden` comes as [T, D] or with more leading axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt.gating.reference import topk_gating
from remoe_adapt.gating.verify import bare_twin, disagreement, near, perturb, random_hidden
from remoe_adapt.routers import STANDARD_RETURNS, Facts, Refusal, RouterRef, RouterSpec, infer_facts, known_facts

# (layer, logits_TE, k, spec, bias_E) -> fp32 weights and int64 ids [T, K], best first.
Gate = Callable[[int, Tensor, int, RouterSpec, Tensor | None], tuple[Tensor, Tensor]]
# (layer, hidden_TD, weight_ED, linear_bias_E, k, spec, bias_E, linear_fp32) -> (logits, weights, ids).
Launch = Callable[
    [int, Tensor, Tensor, Tensor | None, int, RouterSpec, Tensor | None, bool], tuple[Tensor, Tensor, Tensor]
]


class StepGate(Protocol):
    """How all routers choose for the `count` tokens of one forward."""

    count: int

    @property
    def gate(self) -> Gate | None:
        """None: the routers' classes choose by themselves, and `note` is told what."""

    @property
    def launch(self) -> Launch | None:
        """Product and gate in one, with operands cast to fp32 or not; None where that is not to be had."""

    def note(self, layer: int, ids_TK: Tensor) -> None:
        """Remember what a router's class chose."""


class Steps(Protocol):
    """Who knows which forward a thread runs."""

    def step_of(self, count: int) -> StepGate | None:
        """The gate of the forward under way for a router that sees `count` tokens; None: its class chooses."""


class PlainGate:
    """The definition without a prior, for any tokens: what a forward has as long as nobody gives it more."""

    count, launch = 0, None

    def step_of(self, count: int) -> PlainGate:
        """Itself, always."""
        return self

    def gate(
        self, layer: int, logits_TE: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """As StepGate."""
        return topk_gating(logits_TE, k, spec, bias_E=bias_E)

    def note(self, layer: int, ids_TK: Tensor) -> None:
        """Nothing: the class is never asked."""


def _fp32(hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    if hidden_TD.dtype is torch.float32 and weight_ED.dtype is torch.float32:  # no calls for nothing
        return F.linear(hidden_TD, weight_ED, bias_E)
    return F.linear(hidden_TD.float(), weight_ED.float(), None if bias_E is None else bias_E.float())


def _fp32_result(hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    logits_TE = F.linear(hidden_TD, weight_ED, bias_E)
    return logits_TE if logits_TE.dtype is torch.float32 else logits_TE.float()


def _fp32_output(hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    if hidden_TD.is_cuda and hidden_TD.dtype == weight_ED.dtype and not torch.is_grad_enabled():
        return torch.mm(hidden_TD, weight_ED.t(), out_dtype=torch.float32)
    return _fp32(hidden_TD, weight_ED, bias_E)


def _weight_dtype(hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    return F.linear(hidden_TD.to(weight_ED.dtype), weight_ED, bias_E)


_PRODUCTS: dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]] = {
    "native": F.linear,
    "fp32": _fp32,
    "fp32_result": _fp32_result,
    "fp32_output": _fp32_output,
    "weight_dtype": _weight_dtype,
}
# Products where a Linear inside the router is called, not only its weight used.
_CALLED = ("native", "fp32_result", "weight_dtype")
# Products that one kernel takes together with the gate: are its operands cast to fp32?
_ONE_LAUNCH = {"native": False, "fp32": True}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_WEIGHT_RULES = ("score", "chosen_softmax", "null_is_zero")
_ENTRIES = {"logits", "weights", "ids", "probabilities", "dense_weights"}


class RouterForward:
    """What the forward of `module` returns, by the same operations, with the experts chosen by a gate.

    To be set as the instance attribute `module.forward`. Weights and biases are read from the module in every call, so
    `functional_call`, in-place swaps and `deepcopy` of the model reach it. `steps` is asked once a call for the gate of
    the forward that runs, by which `layer` is this router's place. The gate gets the logits [T, E], k, `gate_spec` and
    the selection bias. Where it has none the class's own forward answers.
    """

    def __init__(self, module: nn.Module, spec: RouterSpec, facts: Facts) -> None:
        self.module, self.spec, self.facts = module, spec, facts
        self.steps: Steps = PlainGate()
        self.layer = 0
        self._stock: Callable[..., tuple[Tensor, ...]] = type(module).forward
        self._ids_place = spec.returns.index("ids") if "ids" in spec.returns else -1
        # The factor of each expert is applied here; to the gate these are plain scores.
        self.gate_spec = replace(spec, weight_rule="score") if facts.expert_factor else spec
        self._k, self._columns = spec.top_k, spec.hidden_size
        owner, _, self._weight_leaf = spec.weight_name.rpartition(".")
        # Whoever swaps a parameter writes into this very dict, and copies of the model copy it with the module.
        self._weights = module.get_submodule(owner)._parameters
        self._product = _PRODUCTS[facts.product]
        # A Linear inside is called, as its class does: it may carry hooks, or a layer of another adapter.
        self._linear = owner if owner and facts.product in _CALLED else None
        self._logit_bias_leaf = spec.logit_bias_name
        self._before = facts.before
        self._cap, self._factor = (_number(module, name) for name in (facts.logit_cap, facts.logit_factor))
        self._shapes_logits = bool(self._cap) or self._factor is not None
        unfused = self._linear is not None or self._shapes_logits
        self.linear_fp32 = None if unfused else _ONE_LAUNCH.get(facts.product)
        self._bias_owner: nn.Module | None = None
        self._bias_leaf = ""
        if spec.correction_bias_name is not None and not spec.correction_bias_in_block:
            bias_owner, _, self._bias_leaf = spec.correction_bias_name.rpartition(".")
            self._bias_owner = module.get_submodule(bias_owner)
        self._casts, self._as_hidden = facts.weights_dtype != "fp32", facts.weights_dtype == "hidden"
        self._is_plain = spec.returns == STANDARD_RETURNS and facts.expert_factor is None
        # The shape of one token that needs nothing but a product and a gate; None: no token is so plain.
        detours = unfused or self._before or not (self._is_plain and facts.autocast)
        self._short: tuple[int, int] | None = None if detours else (1, self._columns)

    def __call__(self, hidden_states: Tensor, bias_E: Tensor | None = None, **named: Tensor) -> tuple[Tensor, ...]:
        """The router's result for hidden states [..., D].

        `bias_E` is the selection bias where the block hands it over; it may go by the name it has in the block.
        """
        if hidden_states.shape == self._short and not named:
            # One token without detours: a decode step on a CPU counts microseconds, and with cold caches every
            # attribute and every call in between takes some.
            step = self.steps.step_of(1)
            if step is not None and (gate := step.gate) is not None and step.launch is None:
                weights, bias_leaf = self._weights, self._logit_bias_leaf
                linear_bias_E = None if bias_leaf is None else weights[bias_leaf]
                logits_TE = self._product(hidden_states, weights[self._weight_leaf], linear_bias_E)  # type: ignore[arg-type]
                if self._bias_owner is not None:
                    bias_E = self._own_bias_E(self._bias_owner)
                weights_TK, ids_TK = gate(self.layer, logits_TE, self._k, self.gate_spec, bias_E)
                if self._casts:
                    dtype = hidden_states.dtype if self._as_hidden else logits_TE.dtype
                    if dtype is not torch.float32:
                        weights_TK = weights_TK.to(dtype)
                return logits_TE, weights_TK, ids_TK
        else:
            step = self.steps.step_of(hidden_states.numel() // self._columns)
        return self._with_detours(step, hidden_states, bias_E, named)

    def _with_detours(
        self, step: StepGate | None, hidden_states: Tensor, bias_E: Tensor | None, named: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The result for any hidden states, by every step that the class takes."""
        gate = None if step is None else step.gate
        if step is None or gate is None:
            return self._by_class(step, hidden_states, bias_E, named)
        if not self.facts.autocast and torch.is_autocast_enabled(hidden_states.device.type):
            with torch.autocast(hidden_states.device.type, enabled=False):  # its class keeps autocast out
                return self._with_detours(step, hidden_states, bias_E, named)
        if named:
            bias_E = self._bias_among(named)
        hidden_TD = self._prepared(hidden_states) if self._before else hidden_states
        if hidden_TD.dim() != 2:
            hidden_TD = hidden_TD.reshape(-1, hidden_TD.shape[-1])
        if self._bias_owner is not None:
            bias_E = self._own_bias_E(self._bias_owner)
        if self._linear is not None:
            logits_TE = self._called(self._linear, hidden_TD)
        else:
            weight_ED: Tensor = self._weights[self._weight_leaf]  # type: ignore[assignment]
            linear_bias_E = None if self._logit_bias_leaf is None else self._weights[self._logit_bias_leaf]
            fp32, launch = self.linear_fp32, step.launch
            if launch is not None and fp32 is not None and not torch.is_autocast_enabled(hidden_TD.device.type):
                return self._returned(
                    hidden_states,
                    *launch(self.layer, hidden_TD, weight_ED, linear_bias_E, self._k, self.gate_spec, bias_E, fp32),
                )
            logits_TE = self._product(hidden_TD, weight_ED, linear_bias_E)
        if self._shapes_logits:
            logits_TE = self._shaped(logits_TE)
        weights_TK, ids_TK = gate(self.layer, logits_TE, self._k, self.gate_spec, bias_E)
        return self._returned(hidden_states, logits_TE, weights_TK, ids_TK)

    def plain(self, *args: Any, **kwargs: Any) -> tuple[Tensor, ...]:
        """What the class itself returns, whichever forward is under way; nobody is told."""
        return self._stock(self.module, *args, **kwargs)

    def _by_class(
        self, step: StepGate | None, hidden_states: Tensor, bias_E: Tensor | None, named: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        handed = () if bias_E is None else (bias_E,)
        returned = self._stock(self.module, hidden_states, *handed, **named)
        if step is not None:
            place = self._ids_place
            step.note(self.layer, returned[place] if place >= 0 else self.spec.read(returned).ids_TK)
        return returned

    def _returned(
        self, hidden_states: Tensor, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor
    ) -> tuple[Tensor, ...]:
        if self._casts:
            dtype = (hidden_states if self._as_hidden else logits_TE).dtype
            if weights_TK.dtype != dtype:
                weights_TK = weights_TK.to(dtype)
        if self._is_plain:
            return logits_TE, weights_TK, ids_TK
        if self.facts.expert_factor is not None:
            weights_TK = weights_TK * getattr(self.module, self.facts.expert_factor)[ids_TK]
        return tuple(self._entry(name, logits_TE, weights_TK, ids_TK) for name in self.spec.returns)

    def _entry(self, name: str, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor) -> Tensor:
        if name == "probabilities":
            return logits_TE.softmax(dim=-1, dtype=torch.float32)
        if name == "dense_weights":
            return torch.zeros_like(logits_TE).scatter(-1, ids_TK, weights_TK)
        return {"logits": logits_TE, "weights": weights_TK, "ids": ids_TK}[name]

    def _called(self, name: str, hidden_TD: Tensor) -> Tensor:
        linear: Any = self.module._modules[name]
        if self.facts.product == "weight_dtype":
            hidden_TD = hidden_TD.to(linear.weight.dtype)
        logits_TE: Tensor = linear(hidden_TD)
        return logits_TE.float() if self.facts.product == "fp32_result" else logits_TE

    def _prepared(self, hidden_states: Tensor) -> Tensor:
        for name in self._before:
            step = getattr(self.module, name)
            hidden_states = step(hidden_states) if isinstance(step, nn.Module) else hidden_states * step
        return hidden_states

    def _shaped(self, logits_TE: Tensor) -> Tensor:
        if self._factor is not None:
            logits_TE = logits_TE * self._factor
        return torch.tanh(logits_TE / self._cap) * self._cap if self._cap else logits_TE

    @property
    def weight_device(self) -> torch.device:
        """Where the live weight is."""
        return self._weights[self._weight_leaf].device  # type: ignore[union-attr]

    @property
    def bias_E(self) -> Tensor | None:
        """The router's own selection bias, live; None where it has none or gets it from its block."""
        return None if self._bias_owner is None else self._own_bias_E(self._bias_owner)

    def _own_bias_E(self, owner: nn.Module) -> Tensor:
        bias_E = owner._parameters.get(self._bias_leaf)
        return owner._buffers[self._bias_leaf] if bias_E is None else bias_E  # type: ignore[return-value]

    def _bias_among(self, named: dict[str, Tensor]) -> Tensor:
        name = self.spec.correction_bias_name or ""
        if not self.spec.correction_bias_in_block or [*named] != [name]:
            raise TypeError(f"{type(self.module).__name__}.forward() got unexpected arguments: {', '.join(named)}")
        return named[name]


def router_forward(ref: RouterRef) -> RouterForward | str:
    """A forward for this router that agrees with its own on random input, or why its own stays.

    Classes that the table of routers does not know are tried with every dtype rule. Changes nothing in the model.
    """
    known = known_facts(ref.module, ref.block)
    facts = known if known is not None else infer_facts(ref.module, ref.block, ref.spec.num_rows)
    if isinstance(facts, Refusal):
        return facts.reason
    reason = _beyond_a_gate(ref.module, ref.spec, facts)
    if reason is not None:
        return reason
    for candidate in [facts] if known is not None else _dtype_rules(facts):
        forward = RouterForward(ref.module, ref.spec, candidate)
        found = verify(forward, ref)
        if found is None:
            return forward
        reason = reason or found
    assert reason is not None
    return reason


def _beyond_a_gate(module: nn.Module, spec: RouterSpec, facts: Facts) -> str | None:
    """Why no gate on logits can stand in for this router's forward."""
    attributes = vars(module)
    # accelerate's hooks keep in `_old_forward` what they wrap.
    installed = attributes.get("_old_forward", attributes.get("forward"))
    is_stock = installed is None or getattr(installed, "__func__", None) is type(module).forward
    if not is_stock and not isinstance(installed, RouterForward):
        return f"its forward is already replaced by {getattr(installed, '__qualname__', type(installed).__name__)}"
    if spec.weight_rule not in _WEIGHT_RULES and spec.weight_rule != facts.expert_factor:
        return f"its weights follow the rule {spec.weight_rule!r}, which the gate does not have"
    others = [name for name in spec.returns if name not in _ENTRIES]
    if others:
        return f"it returns more than a choice: {', '.join(others)}"
    if "ids" not in spec.returns and "dense_weights" not in spec.returns:
        return "its block chooses the experts, from the logits that it returns"
    if "." in spec.weight_name.rpartition(".")[0]:
        return f"its weight {spec.weight_name} lies too deep for its product to be known"
    return None


def _dtype_rules(facts: Facts) -> Iterator[Facts]:
    for product, weights_dtype in itertools.product(_PRODUCTS, ("logits", "hidden", "fp32")):
        yield replace(facts, product=product, weights_dtype=weights_dtype)


_verdicts: dict[tuple[Any, ...], str | None] = {}


def verify(forward: RouterForward, ref: RouterRef) -> str | None:
    """How `forward`, with the plain gate, differs from the class's own on random input; None if it does not.

    Tried once per class, facts and dtypes of a process, on a twin without hooks: the module, its modes and the random
    state are as before.
    """
    weight_ED = ref.weight_ED
    if weight_ED.is_meta:
        return "not verified: its weights are on the meta device"
    hidden_dtype = _hidden_dtype(ref.block, weight_ED)
    stock = type(ref.module).forward
    key = (stock, ref.spec, forward.facts, weight_ED.dtype, hidden_dtype, weight_ED.device.type)
    if key not in _verdicts:
        _verdicts[key] = _tried(forward, ref, stock, hidden_dtype)
    return _verdicts[key]


def _tried(forward: RouterForward, ref: RouterRef, stock: Callable[..., Any], hidden_dtype: torch.dtype) -> str | None:
    generator = torch.Generator().manual_seed(0)
    twin = bare_twin(ref.module)
    perturb(twin, generator)
    hidden_TD = random_hidden(twin, ref.spec.weight_name, hidden_dtype, generator)
    ours = RouterForward(twin, ref.spec, forward.facts)
    bias_E, handed = None, ref.spec.correction_bias_in_block
    if ref.correction_bias_E is not None:
        bias_E = near(ref.correction_bias_E, generator) if handed else ours.bias_E
    failure = ""
    for hidden in (hidden_TD, hidden_TD.unsqueeze(0)):  # some classes take tokens only with their batch
        inputs = (hidden, bias_E) if handed else (hidden,)
        try:
            return disagreement(partial(stock, twin), ours, twin, ref.spec, inputs, bias_E)
        except Exception as error:  # a forward of anybody may raise anything
            failure = failure or f"{type(error).__name__}: {error}"
    return f"trying it on random input failed with {failure}"


def _hidden_dtype(block: nn.Module, weight_ED: Tensor) -> torch.dtype:
    """That of the matrices beside the router: some routers alone are kept in fp32, and so are adapters on them."""
    for child in block.children():
        parameters = tuple(child.parameters())
        if all(p is not weight_ED for p in parameters):
            for p in parameters:
                if p.dim() > 1 and p.dtype in _FLOATS:
                    return p.dtype
    return weight_ED.dtype


def _number(module: nn.Module, name: str | None) -> float | None:
    return None if name is None else float(getattr(module, name))
