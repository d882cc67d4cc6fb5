"""Routers: what they are (`spec`), the facts per architecture (`families`), and how to find them (`discover`)."""

from remoe_adapt.routers.discover import discover_routers, survey_routers
from remoe_adapt.routers.spec import RouterOutput, RouterRef, RouterSpec, Survey

__all__ = ["RouterOutput", "RouterRef", "RouterSpec", "Survey", "discover_routers", "survey_routers"]
