"""The fast path: a router's forward as its class has it, with the choice of experts left to a gate that can be set.

Shapes: T tokens, E choices, K chosen, D columns of the weight; `hidden` comes as [T, D] or with more leading axes.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remoe_adapt.gating.reference import topk_gating
from remoe_adapt.gating.trial import bare_twin, disagreement, near, perturb, random_hidden
from remoe_adapt.routers.families import Facts, Refusal, known_facts
from remoe_adapt.routers.infer import infer_facts
from remoe_adapt.routers.spec import STANDARD_RETURNS, RouterRef, RouterSpec

Gate = Callable[[Tensor, int, RouterSpec, Tensor | None], tuple[Tensor, Tensor]]
# (hidden_TD, weight_ED, linear_bias_E, k, spec, bias_E, linear_fp32) -> (logits, weights, ids), or None: not this call.
Route = Callable[
    [Tensor, Tensor, Tensor | None, int, RouterSpec, Tensor | None, bool], tuple[Tensor, Tensor, Tensor] | None
]
# Where to note what the router's class chooses by itself for these hidden states; None: the gate chooses.
Own = Callable[[Tensor], dict[int, Tensor] | None]


def reference_gate(logits_TE: Tensor, k: int, spec: RouterSpec, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """`topk_gating` without a prior: fp32 weights [T, K] and int64 ids [T, K]."""
    return topk_gating(logits_TE, k, spec, bias_E=bias_E)


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
    """What the forward of `module` returns, by the same operations, with the experts chosen by `gate`.

    To be set as the instance attribute `module.forward`. Weights and biases are read from the module in every call, so
    `functional_call`, in-place swaps and `deepcopy` of the model reach it. `gate` gets the logits [T, E], k,
    `gate_spec` and the selection bias, and gives fp32 weights and int64 ids [T, K], best first. Where `linear_fp32` is
    not None, a `route` may take the product and the gate at once, with operands cast to fp32 or not; None from it
    leaves the call to `gate`. Where `own` says so the class's own forward answers, and its ids are noted as those of
    `layer`.
    """

    def __init__(self, module: nn.Module, spec: RouterSpec, facts: Facts) -> None:
        self.module, self.spec, self.facts = module, spec, facts
        self.gate: Gate = reference_gate
        self.route: Route | None = None
        self.own: Own | None = None
        self.layer = 0
        self._stock: Callable[..., tuple[Tensor, ...]] = type(module).forward
        self._ids_place = spec.returns.index("ids") if "ids" in spec.returns else -1
        # The factor of each expert is applied here; to the gate these are plain scores.
        self.gate_spec = replace(spec, weight_rule="score") if facts.expert_factor else spec
        self._k = spec.top_k
        owner, _, self._weight_leaf = spec.weight_name.rpartition(".")
        self._weight_owner = module.get_submodule(owner)
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
        self._is_simple = not (self._before or self._linear or self._shapes_logits) and self._is_plain

    def __call__(self, hidden_states: Tensor, bias_E: Tensor | None = None, **named: Tensor) -> tuple[Tensor, ...]:
        """The router's result for hidden states [..., D].

        `bias_E` is the selection bias where the block hands it over; it may go by the name it has in the block.
        """
        if self.own is not None and (noted := self.own(hidden_states)) is not None:
            handed = () if bias_E is None else (bias_E,)
            returned = self._stock(self.module, hidden_states, *handed, **named)
            place = self._ids_place
            noted[self.layer] = returned[place] if place >= 0 else self.spec.read(returned).ids_TK
            return returned
        if self._is_simple and self.route is None and not named and hidden_states.dim() == 2:
            # The plain case without detours: a decode step on a CPU counts microseconds.
            own, bias_leaf = self._weight_owner._parameters, self._logit_bias_leaf
            weight: Any = own[self._weight_leaf]
            logits_TE = self._product(hidden_states, weight, None if bias_leaf is None else own[bias_leaf])
            if self._bias_owner is not None:
                bias_E = self._own_bias_E(self._bias_owner)
            weights_TK, ids_TK = self.gate(logits_TE, self._k, self.gate_spec, bias_E)
            if self._casts:
                dtype = hidden_states.dtype if self._as_hidden else logits_TE.dtype
                if dtype is not torch.float32:
                    weights_TK = weights_TK.to(dtype)
            return logits_TE, weights_TK, ids_TK
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
            own = self._weight_owner._parameters
            weight_ED: Tensor = own[self._weight_leaf]  # type: ignore[assignment]
            linear_bias_E = None if self._logit_bias_leaf is None else own[self._logit_bias_leaf]
            fp32 = self.linear_fp32
            if self.route is not None and fp32 is not None and not _is_cast(hidden_TD):
                routed = self.route(hidden_TD, weight_ED, linear_bias_E, self._k, self.gate_spec, bias_E, fp32)
                if routed is not None:
                    return self._returned(hidden_states, *routed)
            logits_TE = self._product(hidden_TD, weight_ED, linear_bias_E)
        if self._shapes_logits:
            logits_TE = self._shaped(logits_TE)
        weights_TK, ids_TK = self.gate(logits_TE, self._k, self.gate_spec, bias_E)
        return self._returned(hidden_states, logits_TE, weights_TK, ids_TK)

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

    def watch(self, own: Own, layer: int) -> None:
        """Let the class choose by itself where `own` says so."""
        self.own, self.layer = own, layer

    @property
    def weight_device(self) -> torch.device:
        """Where the live weight is."""
        return self._weight_owner._parameters[self._weight_leaf].device  # type: ignore[union-attr]

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


class UncastRouterForward(RouterForward):
    """For classes that keep autocast out: their result does not depend on it."""

    def __call__(self, hidden_states: Tensor, bias_E: Tensor | None = None, **named: Tensor) -> tuple[Tensor, ...]:
        """As RouterForward."""
        device_type = hidden_states.device.type
        rests = self.own is not None and self.own(hidden_states) is not None
        if rests or not torch.is_autocast_enabled(device_type):
            return super().__call__(hidden_states, bias_E, **named)
        with torch.autocast(device_type, enabled=False):
            return super().__call__(hidden_states, bias_E, **named)


def router_forward(ref: RouterRef) -> RouterForward | str:
    """A forward for this router that agrees with its own on random input, or why its own stays.

    Classes that the table of families does not know are tried with every dtype rule. Changes nothing in the model.
    """
    known = known_facts(ref.module, ref.block)
    facts = known if known is not None else infer_facts(ref.module, ref.block, ref.spec.num_rows)
    if isinstance(facts, Refusal):
        return facts.reason
    reason = _beyond_a_gate(ref.module, ref.spec, facts)
    if reason is not None:
        return reason
    for candidate in [facts] if known is not None else _dtype_rules(facts):
        forward = (RouterForward if candidate.autocast else UncastRouterForward)(ref.module, ref.spec, candidate)
        found = verify(forward, ref)
        if found is None:
            return forward
        reason = reason or found
    assert reason is not None
    return reason


def _beyond_a_gate(module: nn.Module, spec: RouterSpec, facts: Facts) -> str | None:
    """Why no gate on logits can stand in for this router's forward."""
    own = vars(module)
    installed = own.get("_old_forward", own.get("forward"))  # accelerate's hooks keep there what they wrap
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
    own = type(forward)(twin, ref.spec, forward.facts)
    bias_E, handed = None, ref.spec.correction_bias_in_block
    if ref.correction_bias_E is not None:
        bias_E = near(ref.correction_bias_E, generator) if handed else own.bias_E
    failure = ""
    for hidden in (hidden_TD, hidden_TD.unsqueeze(0)):  # some classes take tokens only with their batch
        inputs = (hidden, bias_E) if handed else (hidden,)
        try:
            return disagreement(partial(stock, twin), own, twin, ref.spec, inputs, bias_E)
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


def _is_cast(hidden_TD: Tensor) -> bool:
    return torch.is_autocast_enabled(hidden_TD.device.type)


def _number(module: nn.Module, name: str | None) -> float | None:
    return None if name is None else float(getattr(module, name))
