"""What others may do with a model under a dial: switch its adapters off, save it, take and load its state dict.

While the dial is on, the router weights in memory are those of a strength, and the recency prior is in the routers'
forwards. Whoever asks for the base, or for what is stored, gets the base.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import torch
from peft import PeftModel
from torch import nn

from remoe_adapt.dial.recency import DialPrior
from remoe_adapt.dial.swap import ResidentRouters
from remoe_adapt.errors import DialError, MergeStateError
from remoe_adapt.libraries import Patches, hook, override
from remoe_adapt.tuner import RemoeLayer


class Guards:
    """On one base and its wrapped routers, by their names in it, until `remove`.

    With adapters disabled, as PEFT's `disable_adapter()` and transformers' `disable_adapters()` do, the model is the
    base bit for bit: the prior is off until they are enabled again. `state_dict` holds the base's router weights
    whatever the strength; `load_state_dict` takes those and no others, and the strength stays. `save_pretrained` is
    refused.
    """

    def __init__(self, model: PeftModel, routers: ResidentRouters, prior: DialPrior | None) -> None:
        base: Any = model.get_base_model()
        self._routers, self._prior, self._layers = routers, prior, routers.layers
        self._patches = Patches(hook(base, "load_state_dict_pre", partial(_keep_live, self._layers)))
        for layer in self._layers.values():
            self._patches.add(
                override(layer, "enable_adapters", self._switch_prior),
                hook(layer, "state_dict_post", _give_base),
                hook(layer, "load_state_dict_pre", partial(_keep_live, {"": layer})),
            )
        # Both have the method, and a checkpoint saved by either would hold a strength instead of the base.
        for owner in (base, model):
            self._patches.add(override(owner, "save_pretrained", self._refuse_to_save))

    @property
    def disabled(self) -> bool:
        """Adapters are disabled: the base runs, whatever the strength."""
        return any(layer.disable_adapters for layer in self._layers.values())

    def but(self) -> str:
        """What keeps the strength from being what runs, in words that end a sentence; "" where nothing does."""
        if self.disabled:
            return "; adapters are disabled, so the base runs until they are enabled"
        if fault := self._routers.fault():
            return f"; but {fault}"
        if self._routers.moved:
            return "; the router weights were moved or replaced since they were written: setting it again writes them"
        return ""

    def remove(self) -> None:
        """Undo all of it."""
        self._patches.remove()

    def check_leaving(self, keep_live: bool) -> None:
        """Raises where leaving would lose something: DialError for the base's weights, MergeStateError with
        `keep_live` for the prior or a recovery adapter."""
        if not keep_live:
            self._routers.check_restorable()
        elif self._routers.has_recovery:
            raise MergeStateError(
                "nothing is merged: the point's recovery adapter is in no router weight, and would be lost; "
                "model.unload() gives the base."
            )
        elif self._prior is not None and self._prior.acts:
            raise MergeStateError(f"nothing is merged: {self._no_weight(self._prior)}; model.unload() gives the base.")

    def _refuse_to_save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> NoReturn:
        keep = "for a checkpoint of this strength call model.merge_and_unload() and save its result"
        if self._prior is not None and self._prior.acts:
            keep = self._no_weight(self._prior)
        strength, family = self._routers.strength, self._routers.family
        where = f" The adapters are in {family.path}." if self._has_deltas else ""
        raise DialError(
            f"the router weights in memory are those of strength {strength:g}, so nothing is saved.{where} To keep "
            f"something: {keep}; for the base call model.unload() and save its result."
        )

    @property
    def _has_deltas(self) -> bool:
        return any(point.deltas for point in self._routers.family.points)

    def _no_weight(self, prior: DialPrior) -> str:
        """Why no checkpoint holds what runs now, and what does."""
        mode, gain, family = prior.plan.always.mode, prior.status()["gain"], self._routers.family
        words = (
            f"the recency prior ({mode}, mean gain {gain:.3g}) that acts at strength {self._routers.strength:g} is no "
            "weight, and a checkpoint would run without it"
        )
        if self._has_deltas:
            words += f"; `remoe export merged` writes the router weights of a strength of {family.path} alone"
        return f"{words}; remoe_adapt.recency_prior puts a prior on a plain model"

    def _switch_prior(self, original: Callable[[bool], None], enabled: bool) -> None:
        original(enabled)
        if self._prior is not None:
            self._prior.switch(not self.disabled)


def _key(prefix: str, name: str, layer: RemoeLayer) -> str:
    return ".".join(part for part in (f"{prefix}{name}".rstrip("."), "base_layer", layer.spec.weight_name) if part)


def _give_base(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    assert isinstance(layer, RemoeLayer)
    key = _key(prefix, "", layer)
    if key in state_dict:
        # A copy: whoever puts it into a model (accelerate's offloading does) would make the kept weight a live one.
        state_dict[key] = layer.original_weight_ED.detach().clone()


def _keep_live(
    layers: dict[str, RemoeLayer], _module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any
) -> None:
    """All routers of a base are looked at before the first tensor of it is loaded."""
    for name, layer in layers.items():
        key, live, original = _key(prefix, name, layer), layer.base_weight_ED, layer.original_weight_ED
        found = state_dict.get(key)
        if found is None or found is live:
            continue
        if found.shape != original.shape or not torch.equal(found.to(original), original):
            raise DialError(
                f"{key} holds other weights than the base that the dial was made for, so the state dict is not loaded: "
                "take the dial off first (remoe_adapt.release(model)), and call get_remoe_model again afterwards."
            )
        state_dict[key] = live
