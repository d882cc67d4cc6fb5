"""The recency prior in llama.cpp's eval callback: in C, compiled at first use, or in numpy."""

from remoe_adapt.engines.llamacpp.prior.base import EngineCacheStatus, EnginePrior, PriorStatus, budget_of
from remoe_adapt.engines.llamacpp.prior.build import compiled
from remoe_adapt.engines.llamacpp.prior.control import (
    ENVIRONMENT,
    NO_FILE,
    GainEvent,
    PreloadStatus,
    PriorControl,
    control_of,
)
from remoe_adapt.engines.llamacpp.prior.fallback import engine_prior
from remoe_adapt.engines.llamacpp.prior.native import Control
