"""A recency prior put into a model: its routers' forwards go through our gate, its forwards know their sequences."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from remoe_adapt.errors import RouterError
from remoe_adapt.gating.dispatch import LayerGate, backend
from remoe_adapt.gating.forward import RouterForward, router_forward
from remoe_adapt.gating.prior import DECAY, RecencyPrior, check_prior, checked_gains
from remoe_adapt.gating.sequences import SequenceHooks, text_model
from remoe_adapt.notices import say_once
from remoe_adapt.routers.discover import discover_routers

# Where accelerate's hooks keep the forward that they wrap.
_WRAPPED = "_old_forward"


class InstalledPrior:
    """The prior of a model; wrapped routers (RemoeLayer) and bare ones alike. `remove` takes it out again.

    `prior` holds gains and residency of the routers that have it, in model order; `layers` are their places among all
    routers of the model, `own_forward` maps the names of the others to the reason.

    Raises RouterNotFoundError and UnsupportedRouterError as `discover_routers`, ConfigError for a bad mode or decay,
    RouterError when the model has a prior already. The model is unchanged then. Routers whose gating the op cannot
    express keep their own forward, without the prior; that is logged once.
    """

    def __init__(self, model: nn.Module, mode: str, decay: float = DECAY) -> None:
        check_prior(mode, 0.0, decay)
        refs = discover_routers(model)
        owners = [text_model(model, ref.name) for ref in refs]
        self.num_routers = len(refs)
        self.own_forward: dict[str, str] = {}
        self.layers: list[int] = []
        self._forwards: list[RouterForward] = []
        self._before: list[tuple[nn.Module, str, object]] = []
        for place, ref in enumerate(refs):
            if isinstance(_forward_of(ref.module), RouterForward):
                raise RouterError(f"router {ref.name} has a recency prior already: remove that one first.")
            found = _without_sequences(owners[place], owners) or router_forward(ref)
            if isinstance(found, RouterForward):
                self.layers.append(place)
                self._forwards.append(found)
            else:
                self.own_forward[ref.name] = found
        covered = [refs[place] for place in self.layers]
        self.prior = RecencyPrior(mode, [(ref.weight_ED.device, ref.spec.num_experts) for ref in covered], decay)
        self._hooks: list[SequenceHooks] = []
        self._texts = list({id(text): text for place in self.layers if (text := owners[place]) is not None}.values())
        if covered:
            for layer, forward in enumerate(self._forwards):
                forward.gate = gate = LayerGate(self.prior, layer)
                forward.watch(gate.own, layer)
            self._set_routes()
            self.enable(True)
        for reason in sorted(set(self.own_forward.values())):
            names = [name for name, why in self.own_forward.items() if why == reason]
            say_once(
                f"{len(names)} of {len(refs)} routers of {type(model).__name__} keep their own forward, without the "
                f"recency prior (first {names[0]}): {reason}."
            )

    def set_gains(self, gain: float | Sequence[float]) -> None:
        """One gain for all routers of the model, or one each; those without the prior ignore theirs.

        Raises ConfigError for a wrong number or value.
        """
        per_router = checked_gains(gain, self.num_routers)
        self.prior.set_gains([per_router[place] for place in self.layers])

    def follow(self) -> None:
        """Bring gains and residency to where the routers are, after the model was moved."""
        self.prior.place([forward.weight_device for forward in self._forwards])
        self._set_routes()

    def _set_routes(self) -> None:
        for forward in self._forwards:
            gate = forward.gate
            assert isinstance(gate, LayerGate)
            forward.route = gate.route if backend(forward.weight_device) == "triton" else None

    def _settle(self) -> None:
        if self._forwards[0].weight_device != self.prior.gains[0].device:
            self.follow()

    def enable(self, on: bool) -> None:
        """Let the routers run with the prior, or for a while their own forwards: sequences are not followed then."""
        for hooks in self._hooks:
            hooks.remove()
        self._hooks = [SequenceHooks(text, self.prior, self._settle) for text in self._texts] if on else []
        for module, name, before in self._before:
            if before is None:
                vars(module).pop(name, None)
            else:
                vars(module)[name] = before
        self._before = []
        for forward in self._forwards if on else ():
            own = vars(forward.module)
            name = _WRAPPED if _WRAPPED in own else "forward"
            self._before.append((forward.module, name, own.get(name)))
            own[name] = forward

    def remove(self) -> None:
        """Every router runs its class's own forward again, for good."""
        self.enable(False)
        self._forwards, self._texts = [], []


@contextmanager
def recency_prior(
    model: nn.Module, mode: str = "ema", gain: float | Sequence[float] = 0.2, decay: float = DECAY
) -> Iterator[InstalledPrior]:
    """A recency prior within the block: `with recency_prior(model, "ema", 0.2): model.generate(...)`.

    Raises as InstalledPrior.
    """
    installed = InstalledPrior(model, mode, decay)
    try:
        installed.set_gains(gain)
        yield installed
    finally:
        installed.remove()


def _forward_of(module: nn.Module) -> object:
    own = vars(module)
    return own.get(_WRAPPED, own.get("forward"))


def _without_sequences(owner: nn.Module | None, owners: Sequence[nn.Module | None]) -> str | None:
    """Why nobody knows the sequences of a router's tokens; `owner` is the module around it that is called with them."""
    if owner is None:
        return "no part of the model around it is called with input_ids or inputs_embeds"
    inner = {id(module) for module in owner.modules() if module is not owner}
    if any(id(other) in inner for other in owners):
        return "it is beside the text model, so the sequences of its tokens are not known"
    return None
