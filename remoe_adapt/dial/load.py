"""`get_remoe_model`: a model, a profile and a family become a PeftModel with a dial."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from peft import PeftConfig, PeftModel
from torch import nn

from remoe_adapt._support import say_once
from remoe_adapt.checkpoints import (
    CACHE_OPTIONS,
    check_device,
    check_flags,
    check_names,
    check_path,
    load_base,
    names_gguf,
    on_device,
    usable_device,
)
from remoe_adapt.device_profile import DeviceProfile, StrengthProfile, load_profile
from remoe_adapt.dial.controller import Controller
from remoe_adapt.dial.recency import AskedRecency, DialPrior, RecencyPlan, plan_recency, training_free_family
from remoe_adapt.errors import AdapterConflictError, ConfigError, DialError, FamilyError, UncacheableError
from remoe_adapt.expert_cache import (
    OWN_PLACEMENT,
    bind_prefetch,
    check_budget,
    expert_cache_of,
    load_whole_or_cached,
    load_with_expert_cache,
)
from remoe_adapt.family import Family
from remoe_adapt.libraries import replace_module
from remoe_adapt.routers import Routers, survey_routers
from remoe_adapt.tuner import RemoeConfig, plain_base, remoe_layers, wrap_or_inject

_DEFAULT_RESERVE_BYTES = 1 << 30
# By base and not by wrapper: `release` has to work where only the base is at hand, as after `del model`.
_DIALLED: WeakKeyDictionary[nn.Module, _Dialled] = WeakKeyDictionary()
# fmt: off
_OPTIONS = (
    "profile", "family", "recency", "recency_gain", "recency_decay", "recency_share", "expert_cache", "device",
    "monitor",
    "adapter_name", "force", "dtype", *CACHE_OPTIONS,
)
# fmt: on


@dataclass(frozen=True)
class _Dialled:
    """What `get_remoe_model` has put on a base. trained: the parameters that wanted gradients before, others: the
    adapters there were."""

    adapter_name: str
    config: PeftConfig
    trained: frozenset[str]
    others: frozenset[str]


def get_remoe_model(
    base: str | os.PathLike[str] | nn.Module,
    profile: str | os.PathLike[str] | DeviceProfile | None = None,
    family: str | os.PathLike[str] | Family | None = None,
    *,
    recency: str | None = None,
    recency_gain: float | None = None,
    recency_decay: float | None = None,
    recency_share: float | None = None,
    expert_cache: str | int | float | None = None,
    device: str | None = None,
    monitor: bool = True,
    adapter_name: str = "dial",
    force: bool = False,
    **from_pretrained_kwargs: Any,
) -> PeftModel:
    """A PeftModel over the base object with `.controller`, which turns its strength as the sensors say.

    base: a model, a PeftModel (its base object gets the dial, its adapters stay and keep working), a path or a hub id,
        loaded with `from_pretrained_kwargs`: behind an expert cache where the profile has one and the model can, see
        `load_base_under`.
    profile: a name, a path or a DeviceProfile; None: strength equal to pressure, see `profile_of`.
    family: a folder, a hub id or a Family; None: what the profile's `families` name for the base's id, else
        training-free operating points (recency prior only), which is logged once.
    recency: "last", "ema", "resident" or "cost", a prior on top of what the points have.
    recency_gain: of that prior, at every strength (default 0.2).
    recency_decay: of that prior (default: the mode's own, 0.7 for ema).
    recency_share: of that prior in mode cost: of a layer's experts, the part that the cache holds (default 0.25).
    expert_cache: the budget of the cache instead of the profile's.
    device: where a base that is loaded computes; None: where from_pretrained puts it.
    monitor: False leaves the dial to your calls until `controller.resume()`.
    adapter_name: of the adapter that puts the wrappers on the routers.
    force: accept a family of another base, if names and shapes fit.

    Raises FamilyError when the family cannot be used, FingerprintMismatchError for another base's (see `force`),
    DialError when the model has a dial already (see `release`), AdapterConflictError when REMOE adapters or the
    name `adapter_name` are on it, ConfigError for options that cannot work or nobody knows and when the base cannot be
    loaded, ProfileError, RouterNotFoundError and UnsupportedRouterError as their makers. The model is
    unchanged after an error.
    """
    check_names(from_pretrained_kwargs, _OPTIONS)
    check_flags(monitor=monitor, force=force)
    if not isinstance(adapter_name, str):
        raise ConfigError(f"adapter_name {adapter_name!r}: give a name, as text.")
    if not isinstance(base, nn.Module):
        check_path("base", base, "a model, a model folder or a hub id")
    if expert_cache is not None:
        check_budget("expert_cache", expert_cache)
    if device is not None:
        check_device(device)
    chosen = profile_of(profile)
    if isinstance(base, nn.Module):
        given = {"expert_cache": expert_cache, "device": device, **from_pretrained_kwargs}
        options = [name for name, value in given.items() if value is not None]
        if options:
            raise ConfigError(f"{', '.join(options)}: options of loading, but base is a model already.")
        _check_free(base)
    known = _family(family, chosen, _base_id(base))
    asked = AskedRecency(recency, recency_gain, recency_decay, recency_share)
    if known is not None:
        # Loading takes minutes, and what the family cannot do is known before.
        plan_recency(known, chosen, asked)  # refuse before anything is loaded
    if isinstance(base, nn.Module):
        model = plain_base(base)
        routers = survey_routers(model)
    else:
        model, routers = _load_surveyed(chosen, base, expert_cache, device, from_pretrained_kwargs)
    operating = known or training_free_family(routers, _base_id(base), own_gain=asked == AskedRecency())
    plan = plan_recency(operating, chosen, asked)
    # Before the model is wrapped, so that an error leaves it as it was.
    operating.check(model, force=force, routers=routers)
    return _under_dial(model, routers, operating, chosen, plan, adapter_name, force, monitor)


def release(model: nn.Module) -> nn.Module:
    """Take the dial off a model, and return its base: weights bit for bit, forwards and frozen parameters as before
    `get_remoe_model`, which may be called again with it.

    model: the base or a PeftModel over it. It helps where only the base is at hand, as after `del model` in a notebook.
    Adapters that were not put on by the dial stay. A base without a dial is returned as it is.

    Raises DialError inside a forward, and when the weights cannot be written back (offloaded since).
    """
    base = plain_base(model)
    # Through vars: a model's own attribute lookup would find a submodule of that name.
    controller = vars(base).get("controller")
    if controller is not None:
        controller.close()
    put = _DIALLED.pop(base, None)
    configs = _configs(base)
    if put is None or configs.get(put.adapter_name, put.config) is not put.config:  # unloaded since
        return base
    for name, layer in remoe_layers(base).items():
        if put.adapter_name in layer.adapters:
            # Adapters of others on the same routers stay, and so does the wrapper that runs them.
            layer.delete_adapter(put.adapter_name)
            if not layer.adapters:
                replace_module(base, name, layer.base_layer)
    configs.pop(put.adapter_name, None)
    if not configs and hasattr(base, "peft_config"):
        del base.peft_config
    if configs.keys() == put.others:  # else another tuner has frozen since what it does not train
        for name, parameter in base.named_parameters():
            if name in put.trained:
                parameter.requires_grad_(True)
    return base


def load_base_under(
    profile: DeviceProfile,
    base: str | os.PathLike[str],
    expert_cache: str | int | float | None = None,
    *,
    device: str | None = None,
    **kwargs: Any,
) -> nn.Module:
    """The base by path or hub id, behind an expert cache as the profile has it; whole where all of it may be in memory,
    unless it is quantised: then the cache holds the codes of all experts.

    expert_cache: its budget instead of the profile's; with one, or with options of `load_with_expert_cache` among
    `kwargs` (storage, prefetch ...), a cache must be possible. Else models whose experts cannot be cached, and those
    loaded with options that place or quantise weights themselves, are whole, which is logged once.
    device: where it computes; None: where from_pretrained puts it.

    Raises ConfigError when it cannot be loaded, ExpertReadError when its experts cannot be read.
    """
    return _load_surveyed(profile, base, expert_cache, device, kwargs)[0]


def _load_surveyed(
    profile: DeviceProfile, base: str | os.PathLike[str], expert_cache: Any, device: str | None, kwargs: dict[str, Any]
) -> tuple[nn.Module, Routers]:
    if device is not None:
        usable_device(device)
    settings, memory_bytes = profile.expert_cache, profile.memory.budget_bytes
    # Taken out, for what is left goes to from_pretrained, which knows none of these.
    of_cache = {name: kwargs.pop(name) for name in CACHE_OPTIONS if name in kwargs}
    # A GGUF has an expert cache in any case: from_pretrained would make floats of all of it.
    of_gguf = names_gguf(base, kwargs)
    if expert_cache is None and not of_cache and not of_gguf:
        whole = settings.share == 1.0 and memory_bytes is None
        placed = sorted(OWN_PLACEMENT.intersection(kwargs))
        if placed and not whole:
            say_once(f"loaded with {', '.join(placed)}: profile {profile.name} builds no expert cache then.")
        if placed:
            return _whole(base, device, kwargs)
        if whole:
            model = load_whole_or_cached(base, arithmetic="auto", device=device, **kwargs)
            return model, survey_routers(model)
    options: dict[str, Any] = {
        "memory": memory_bytes if expert_cache is None else None,
        "policy": settings.policy,
        "scope": settings.scope,
        "prefetch": settings.prefetch,
        "direct_io": settings.direct_io,
        **of_cache,
        **kwargs,
    }
    share = settings.share if expert_cache is None else expert_cache
    # Bound below, with the routers that the caller gets as well: loading would look for them again.
    prefetch = options.pop("prefetch")
    check_flags(prefetch=prefetch)
    try:
        model = load_with_expert_cache(base, share, device="cpu" if device is None else device, **options)
    except UncacheableError as error:
        if expert_cache is not None or of_cache or of_gguf:
            raise
        say_once(f"{error} It is loaded whole.")
        return _whole(base, device, kwargs)
    routers = survey_routers(model)
    cache = expert_cache_of(model)
    if prefetch and cache is not None:
        bind_prefetch(model, cache, routers)
    return model, routers


def _whole(base: str | os.PathLike[str], device: str | None, kwargs: Mapping[str, Any]) -> tuple[nn.Module, Routers]:
    model = on_device(load_base(base, **kwargs), device)
    return model, survey_routers(model)


def _under_dial(
    model: nn.Module,
    routers: Routers,
    family: Family,
    profile: DeviceProfile,
    plan: RecencyPlan | None,
    adapter_name: str,
    force: bool,
    monitor: bool,
) -> PeftModel:
    names = list(family.points[0].deltas)
    encoder_decoder = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    config = RemoeConfig(
        # The adapter only puts the wrappers in place: zero for ever, so as small as it can be.
        rank=1,
        inference_mode=True,
        target_modules=names if 0 < len(names) < len(routers.refs) else None,
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") and not encoder_decoder else None,
        allow_other_base=force,
    )
    trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
    others = frozenset(_configs(model))
    wrapped = wrap_or_inject(model, config, adapter_name, routers)
    _DIALLED[model] = _Dialled(adapter_name, wrapped.peft_config[adapter_name], trained, others)
    wrapped.train(model.training)  # PEFT's wrapper is born in training mode
    prior: DialPrior | None = None
    try:
        prior = DialPrior(model, family, plan, routers) if plan is not None else None
        Controller(wrapped, family, profile, prior, monitored=monitor)
    except BaseException:
        if prior is not None:
            prior.remove()
        # The adapter is on the model already, and a second try would be refused for it.
        release(model)
        raise
    return wrapped


def profile_of(profile: str | os.PathLike[str] | DeviceProfile | None) -> DeviceProfile:
    """A profile by name or path; None: the server's settings with strength equal to pressure, for any machine.

    So it must not mistake a machine in ordinary use for one in need: 1 GiB stays free, and major faults are no word,
    since a model that was just loaded has many while its mapped weights are touched for the first time.
    """
    if isinstance(profile, DeviceProfile):
        return profile
    if profile is not None:
        check_path("profile", profile, "a name, a file or a DeviceProfile")
        return load_profile(profile if isinstance(profile, str) else Path(profile))
    linear = StrengthProfile(curve=((0.0, 0.0), (1.0, 1.0)), max=1.0)
    server = load_profile("server")
    return replace(
        server,
        name="default",
        description="Strength equals pressure",
        strength=linear,
        memory=replace(server.memory, reserve_bytes=_DEFAULT_RESERVE_BYTES),
        pressure=replace(server.pressure, faults=None),
    )


def _check_free(base: nn.Module) -> None:
    model = plain_base(base)
    # A dial that is closed has removed itself, so that only an open one stands here.
    if "controller" in vars(model):
        raise DialError("this model has a dial already: take it off with remoe_adapt.release(model) first.")
    if layers := remoe_layers(model):
        names = sorted(set().union(*(layer.adapters for layer in layers.values())))
        put = _DIALLED.get(model)
        closed = put is not None and put.adapter_name in names
        way_off = "remoe_adapt.release(model)" if closed else "unload() of the PeftModel that holds them"
        raise AdapterConflictError(
            f"REMOE adapters ({', '.join(names)}) are on this model, and a family replaces them: take them off first, "
            f"with {way_off}."
        )


def _configs(base: nn.Module) -> dict[str, Any]:
    configs: dict[str, Any] = getattr(base, "peft_config", None) or {}
    return configs


def _base_id(base: str | os.PathLike[str] | nn.Module) -> str:
    if not isinstance(base, nn.Module):
        return os.fspath(base)
    return str(
        getattr(getattr(plain_base(base), "config", None), "_name_or_path", "") or type(plain_base(base)).__name__
    )


def _family(family: str | os.PathLike[str] | Family | None, profile: DeviceProfile, base_id: str) -> Family | None:
    if family is None:
        family = profile.families.get(base_id)
    if family is None:
        return None
    if not isinstance(family, Family):
        check_path("family", family, "a folder, a hub id or a Family")
        family = Family.load(family)
    if not family.points:
        raise FamilyError(f"{family} has no points yet: add one with add_point, or train it with `remoe train`.")
    return family
