"""Which of the two priors a context gets: in C where it can be compiled, else in numpy."""

from __future__ import annotations

from typing import Any

from remoe_adapt._support import say_once
from remoe_adapt.engines.llamacpp.prior.base import EnginePrior
from remoe_adapt.engines.llamacpp.prior.fallback import NumpyPrior
from remoe_adapt.engines.llamacpp.prior.native import NativePrior
from remoe_adapt.errors import MissingDependencyError
from remoe_adapt.recency_settings import Recency


def engine_prior(engine: Any, sequences: int, recency: Recency, *, renormalise: bool = False) -> EnginePrior:
    """The prior of a context of `sequences` sequences in llama.cpp's loaded library `engine`; its gain is 0 until `set`.

    renormalise: divide the weights of the chosen experts by their sum, for a model that does in a file whose
    architecture llama.cpp does not. Without a compiler the prior is computed in numpy, which is said once.
    """
    try:
        return NativePrior(engine, sequences, recency, renormalise=renormalise)
    except MissingDependencyError as error:
        say_once(
            "the recency prior in llama.cpp is computed in numpy, which costs 8 to 16 ms a token in models of 24 to 48 "
            f"layers where C costs 0.1 ms: {error}"
        )
        return NumpyPrior(engine, sequences, recency, renormalise=renormalise, why=str(error))
