"""A recency prior put into a model: its routers' forwards go through our gate, its forwards know their sequences."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from remoe_adapt._support import held_back, say_once
from remoe_adapt.errors import RouterError
from remoe_adapt.gating import RouterForward, router_forward
from remoe_adapt.libraries import CONTINUOUS_BATCHING, Patches, override, put_on, unknown_cache_argument
from remoe_adapt.recency.prior import RecencyPrior
from remoe_adapt.recency.proof import why_without_effect
from remoe_adapt.recency.sequences import SequenceHooks, text_model
from remoe_adapt.recency_settings import Mode, Recency
from remoe_adapt.routers import RouterRef, Routers, survey_routers

# Where accelerate's hooks keep the forward that they wrap.
_WRAPPED = "_old_forward"


class InstalledPrior:
    """The prior of a model; wrapped routers (RemoeLayer) and bare ones alike. `remove` takes it out again.

    `prior` holds gains and residency of the routers that have it, in model order; `layers` are their places among all
    routers of the model, `own_forward` maps the names of the others to the reason.

    Raises RouterNotFoundError and UnsupportedRouterError as `discover_routers`, ConfigError for bad settings,
    RouterError when the model has a prior already, or when a trial of three tokens shows that the prior does not act
    (`proof.py`). The model is unchanged then. Routers whose gating the op cannot express, and some of several on which
    the prior does not act, keep their own forward, without the prior; that is logged once. With "ema" and "last",
    continuous batching is refused (`generate_batch`): it packs requests into one row, over a cache of its own.
    """

    def __init__(
        self, model: nn.Module, mode: str, decay: float | None = None, routers: Routers | None = None,
        share: float | None = None,
    ) -> None:  # fmt: skip
        """routers: those of `model`, where they are known already. The rest as Recency."""
        settings = Recency.of(mode, 0.0, decay, share)
        kind = settings.kind  # refused before the model is looked at
        refs = (routers or survey_routers(model)).usable()
        owners = [text_model(model, ref.name) for ref in refs]
        self.num_routers = len(refs)
        self.own_forward: dict[str, str] = {}
        self.layers: list[int] = []
        self._acting, self._refusing = Patches(), Patches()
        found: dict[int, RouterForward] = {}
        for place, ref in enumerate(refs):
            attributes = vars(ref.module)
            if isinstance(attributes.get(_WRAPPED, attributes.get("forward")), RouterForward):
                raise RouterError(f"router {ref.name} has a recency prior already: remove that one first.")
            forward = _without_sequences(owners[place], owners, kind) or router_forward(ref)
            if isinstance(forward, RouterForward):
                found[place] = forward
            else:
                self.own_forward[ref.name] = forward
        self._install(refs, owners, found, settings)
        faults = self._faults(refs, owners)
        if faults:
            self.enable(False)
            if len(faults) == len(found):
                place, fault = next(iter(faults.items()))
                raise RouterError(
                    f"a recency prior does not act on {type(model).__name__}: {refs[place].name}: {fault}. "
                    "`remoe doctor --contracts` tells whether the installed libraries are the reason."
                )
            self.own_forward |= {
                refs[place].name: f"the prior would not act: {fault}" for place, fault in faults.items()
            }
            kept = {place: forward for place, forward in found.items() if place not in faults}
            self._install(refs, owners, kept, settings)
        if kind.needs_history and self.layers:
            refuse_continuous_batching(self._refusing, model, mode)
        for reason in sorted(set(self.own_forward.values())):
            names = [name for name, why in self.own_forward.items() if why == reason]
            say_once(
                f"{len(names)} of {len(refs)} routers of {type(model).__name__} keep their own forward, without the "
                f"recency prior (first {names[0]}): {reason}."
            )

    def _install(
        self,
        refs: Sequence[RouterRef],
        owners: Sequence[nn.Module | None],
        found: dict[int, RouterForward],
        settings: Recency,
    ) -> None:
        self.layers, self._forwards = list(found), list(found.values())
        covered = [refs[place] for place in self.layers]
        places = [(ref.weight_ED.device, ref.spec.num_experts) for ref in covered]
        self.prior = RecencyPrior(settings.mode, places, settings.decay, settings.share)
        self._texts = list({id(text): text for place in self.layers if (text := owners[place]) is not None}.values())
        if covered:
            for layer, forward in enumerate(self._forwards):
                forward.steps, forward.layer = self.prior, layer
            self.enable(True)

    def _faults(self, refs: Sequence[RouterRef], owners: Sequence[nn.Module | None]) -> dict[int, str]:
        """Routers on which the prior does not act though it is installed, by place among all, and why."""
        covered = [refs[place] for place in self.layers]
        faults: dict[int, str] = {}
        try:
            for text in self._texts:
                layers = [layer for layer, place in enumerate(self.layers) if owners[place] is text]
                for layer, fault in why_without_effect(text, covered, layers, self.prior).items():
                    faults[self.layers[layer]] = fault
        except BaseException:  # a Ctrl-C
            self.enable(False)
            raise
        return faults

    def set_gains(self, gain: float | Sequence[float]) -> None:
        """One gain for all routers of the model, or one each; those without the prior ignore theirs.

        Raises ConfigError for a wrong number or value.
        """
        per_router = Recency.of(self.prior.mode, gain, self.prior.decay).gains(self.num_routers)
        self.prior.set_gains([per_router[place] for place in self.layers])

    def place_prior(self) -> None:
        """Bring gains and residency to where the routers are, after the model was moved."""
        self.prior.place([forward.weight_device for forward in self._forwards])

    def _place_if_moved(self) -> None:
        if self._forwards[0].weight_device != self.prior.gains[0].device:
            self.place_prior()

    def enable(self, on: bool) -> None:
        """Let the routers run with the prior, or for a while their own forwards: sequences are not followed then."""
        # First, or a second call would take the forward placed by the first one for the router's own.
        self._acting.remove()
        if not on:
            return
        with held_back():  # or a Ctrl-C would leave what is changed and not yet noted
            self._acting.add(*(SequenceHooks(text, self.prior, self._place_if_moved) for text in self._texts))
            for forward in self._forwards:
                name = _WRAPPED if _WRAPPED in vars(forward.module) else "forward"
                self._acting.add(put_on(forward.module, name, forward))

    def remove(self) -> None:
        """Every router runs its class's own forward again, for good."""
        self.enable(False)
        self._refusing.remove()
        self._forwards, self._texts = [], []


@contextmanager
def recency_prior(
    model: nn.Module, mode: str = "ema", gain: float | Sequence[float] = 0.2, decay: float | None = None,
    share: float | None = None,
) -> Iterator[InstalledPrior]:  # fmt: skip
    """A recency prior within the block: `with recency_prior(model, "ema", 0.2): model.generate(...)`.

    Raises as InstalledPrior.
    """
    installed = InstalledPrior(model, mode, decay, share=share)
    try:
        installed.set_gains(gain)
        yield installed
    finally:
        installed.remove()


def refuse_continuous_batching(patches: Patches, model: nn.Module, mode: str) -> None:
    """Until the patches are removed, the ways into continuous batching raise RouterError."""
    for module in model.modules():
        for name in CONTINUOUS_BATCHING:
            if callable(getattr(type(module), name, None)):
                patches.add(override(module, name, _Refused(name, mode)))


class _Refused:
    """Around a method that would run without the prior's memory; picklable, as a copied model takes it along."""

    def __init__(self, name: str, mode: str) -> None:
        self._name, self._mode = name, mode

    def __call__(self, _original: Callable[..., Any], *_args: Any, **_kwargs: Any) -> Any:
        raise RouterError(
            f"{self._name} packs the tokens of all requests into one row over a paged cache, where the recency prior "
            f'{self._mode!r} cannot follow a sequence: use generate, the prior "resident", or take the prior off.'
        )


def _without_sequences(owner: nn.Module | None, owners: Sequence[nn.Module | None], kind: Mode) -> str | None:
    """Why nobody knows the sequences of a router's tokens; `owner` is the module around it that is called with them."""
    if owner is None:
        return "no part of the model around it is called with input_ids or inputs_embeds"
    if kind.needs_history and (name := unknown_cache_argument(owner.forward)) is not None:
        return f"{type(owner).__name__} takes its KV cache as {name!r}, a name that is not known here"
    inner = {id(module) for module in owner.modules() if module is not owner}
    if any(id(other) in inner for other in owners):
        return "it is beside the text model, so the sequences of its tokens are not known"
    return None
