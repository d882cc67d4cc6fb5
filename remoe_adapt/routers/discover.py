"""Model -> routers, or a named refusal."""

from __future__ import annotations

from torch import nn

from remoe_adapt.routers.spec import RouterRef, Survey


def discover_routers(model: nn.Module) -> tuple[RouterRef, ...]:
    """The routers of `model` in model order."""
    return survey_routers(model).found


def survey_routers(model: nn.Module) -> Survey:
    """Every router of `model`: usable, refused, or wrapped by foreign layers."""
    raise NotImplementedError
