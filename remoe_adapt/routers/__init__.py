"""Routers: what they are (`spec`), the facts per architecture (`families`), and how to find them (`discover`)."""

from remoe_adapt.routers.discover import Routers, discover_routers, fingerprint, survey_routers
from remoe_adapt.routers.spec import RouterOutput, RouterRef, RouterSpec

__all__ = ["RouterOutput", "RouterRef", "RouterSpec", "Routers", "discover_routers", "fingerprint", "survey_routers"]
