"""Which routers an adapter is for, and whether this model is the one it was made for."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from peft import NoMatchingPeftModuleError
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from remoe_adapt._support import printable
from remoe_adapt.errors import (
    AdapterConflictError,
    ConfigError,
    FingerprintMismatchError,
    RouterError,
    RouterNotFoundError,
    UnsupportedRouterError,
)
from remoe_adapt.routers import RouterRef, Routers
from remoe_adapt.tuner.config import RemoeConfig
from remoe_adapt.tuner.patterns import matching

_SHOWN_DIGITS = 19


class NoRouterMatchedError(RouterNotFoundError, NoMatchingPeftModuleError):
    """`target_modules`, `exclude_modules` or `layers_to_transform` leave no router; the message lists the routers."""


def resolve_targets(config: RemoeConfig, model: nn.Module, survey: Routers) -> tuple[RouterRef, ...]:
    """The usable routers of `model`; writes their names into a configuration that leaves `target_modules` open.

    survey: all routers of `model`.

    Raises RouterNotFoundError or UnsupportedRouterError when the model has no usable router, AdapterConflictError when
    another tuner's layer sits on a targeted one, ConfigError when a targeted module is no router or
    `layers_to_transform` names no layer with one.
    """
    foreign = dict(survey.foreign)
    if config.target_modules is None:
        if foreign:
            raise _foreign(foreign)
        routers = survey.usable()
        chosen = _of_layers(config, routers)
        if isinstance(config.exclude_modules, str):
            _fill_targets(config, chosen - matching("exclude_modules", config.exclude_modules, chosen), routers)
        else:
            config.fill(target_modules=chosen)
        return routers
    if isinstance(config.target_modules, str) and config.target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        raise ConfigError(
            f"target_modules={config.target_modules!r}: REMOE adapts routers only; leave it out for all of them."
        )
    by_name = {router.name: router for router in survey.refs}
    refused = dict(survey.refused)
    # What lies inside a tuner's layer is the base's router again, under a name that no configuration means.
    inside = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    names = [name for name, _ in model.named_modules() if name and not name.startswith(inside)]
    matched = _matched(config, names)
    if taken := {name: foreign[name] for name in matched if name in foreign}:
        raise _foreign(taken)
    if unusable := [name for name in matched if name in refused]:
        raise UnsupportedRouterError(f"router {unusable[0]} cannot be adapted: {refused[unusable[0]]}.")
    if others := [name for name in matched if name not in by_name]:
        raise ConfigError(
            f"target_modules={printable(repr(config.target_modules))} matches {len(others)} module(s) that are not "
            f"routers, first {others[0]!r}. REMOE adapts routers only: leave target_modules out for all of them, or "
            f"choose among {', '.join(by_name) or 'none (this model has no usable router)'}."
        )
    if isinstance(config.target_modules, str) or isinstance(config.exclude_modules, str):
        _fill_targets(config, set(matched), survey.refs)
    return survey.refs


def _matched(config: RemoeConfig, names: list[str]) -> list[str]:
    """PEFT's rules for which modules are targets, with expressions where they can be stopped."""
    probe: Any = copy.copy(config)
    if isinstance(config.exclude_modules, str):
        probe.exclude_modules = matching("exclude_modules", config.exclude_modules, names)
    if isinstance(config.target_modules, str):
        chosen = matching("target_modules", config.target_modules, names)
        probe.target_modules = set(names)
        names = [name for name in names if name in chosen]
    return [name for name in names if check_target_module_exists(probe, name)]


def _fill_targets(config: RemoeConfig, names: set[str], routers: tuple[RouterRef, ...]) -> None:
    """Write the names into a configuration that gave them by expressions: from here on PEFT sees no expression."""
    if not names:
        raise NoRouterMatchedError(
            f"target_modules={printable(repr(config.target_modules))} without exclude_modules="
            f"{printable(repr(config.exclude_modules))} leaves none of the routers of this model, which are: "
            f"{', '.join(router.name for router in routers) or 'none'}."
        )
    config.fill(target_modules=names, exclude_modules=None)


def _of_layers(config: RemoeConfig, routers: tuple[RouterRef, ...]) -> set[str]:
    names = {router.name for router in routers}
    if config.layers_to_transform is None:
        return names
    # PEFT's rule is asked, so that layers mean here what they mean for its other adapters.
    probe = copy.copy(config)
    probe.exclude_modules = probe.modules_to_save = None
    # PEFT asks for the layer only of names matched by suffix.
    probe.target_modules = [name.rpartition(".")[2] for name in names]
    chosen = {name for name in names if check_target_module_exists(probe, name)}
    if not chosen:
        raise ConfigError(
            f"layers_to_transform={config.layers_to_transform!r} names no layer with a router; the routers are "
            f"{', '.join(router.name for router in routers)}."
        )
    return chosen


def check_base(config: RemoeConfig, model: nn.Module, survey: Routers, *, allow_other_base: bool) -> None:
    """Record the base's fingerprint in a new configuration; compare it in one that was made earlier.

    Raises FingerprintMismatchError naming both bases, unless `allow_other_base`.
    """
    try:
        live = survey.fingerprint
    except RouterError:
        # No values (meta device), or routers of which only some are usable: nothing to compare.
        return
    if config.base_fingerprint is None:
        config.fill(base_fingerprint=live)
    elif config.base_fingerprint != live:
        made_for = config.base_model_name_or_path or "an unnamed model"
        this = getattr(model, "name_or_path", None) or f"an unnamed {type(model).__name__}"
        recorded = printable(config.base_fingerprint[:_SHOWN_DIGITS])
        text = (
            f"this adapter was made for the base {made_for!r} (routers {recorded}), "
            f"but it meets {this!r} (routers {live[:_SHOWN_DIGITS]})"
        )
        if not allow_other_base:
            raise FingerprintMismatchError(
                f"{text}. Load the base it was made for; or, if you know that it fits, pass allow_other_base=True to "
                "PeftModel.from_pretrained, load_adapter or RemoeConfig.from_pretrained."
            )
        warnings.warn(f"{text}; loaded because allow_other_base is set.", stacklevel=2)


def _foreign(taken: dict[str, str]) -> AdapterConflictError:
    name, reason = next(iter(taken.items()))
    return AdapterConflictError(
        f"{len(taken)} router(s) carry a layer of another adapter, first {name}: {reason}. A router can have one kind "
        "of adapter: exclude the routers from the other one (its exclude_modules), or merge and unload it first."
    )
