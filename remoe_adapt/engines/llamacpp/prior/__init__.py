"""The recency prior in llama.cpp's eval callback: in C, compiled at first use, or in numpy."""

from remoe_adapt.engines.llamacpp.prior.base import EnginePrior, PriorStatus
from remoe_adapt.engines.llamacpp.prior.build import compiled
from remoe_adapt.engines.llamacpp.prior.native import Control
from remoe_adapt.engines.llamacpp.prior.opening import engine_prior
