"""The KV cache of transformers: by which name a forward takes and returns it, and what can be followed.

Nothing here imports transformers: models of others (remote code) and of versions to come are asked what they have.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard

from torch import Tensor, nn

# The newest name comes first: transformers 5.24 renamed both of the others to it, and warns whoever uses an old one.
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
# The ways into continuous batching, which packs the tokens of all requests into one row over a paged cache. No recency
# can be kept there, so an installed prior refuses them.
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def cache_argument(forward: Callable[..., Any]) -> str | None:
    """The name by which `forward` takes its KV cache; None where its signature shows none that is known."""
    parameters = inspect.signature(forward).parameters
    return next((name for name in CACHE_NAMES if name in parameters), None)


def unknown_cache_argument(forward: Callable[..., Any]) -> str | None:
    """An argument that is annotated as a cache of transformers and has none of the names that are known."""
    if cache_argument(forward) is not None:
        return None
    for name, parameter in inspect.signature(forward).parameters.items():
        annotation = parameter.annotation
        text = annotation if isinstance(annotation, str) else str(annotation)
        # Annotations may be strings or types, so both are compared as text.
        if "cache_utils" in text or "Cache" in text.replace("[", " ").replace("|", " ").split():
            return name
    return None


def cache_keyword(model: nn.Module) -> str:
    """The keyword by which a caller hands this model (or the PeftModel around it) a KV cache."""
    get_base_model = getattr(model, "get_base_model", None)
    # PeftModel's own forward takes any keyword, so its signature tells nothing.
    inner = model if get_base_model is None else get_base_model()
    return cache_argument(inner.forward) or CACHE_NAMES[0]


def handed_cache(kwargs: Mapping[str, Any]) -> Any:
    """The KV cache among the keywords of a forward, by whatever known name."""
    return next((kwargs[name] for name in CACHE_NAMES if name in kwargs), None)


def returned_cache(output: object) -> Any:
    """The KV cache in a forward's output (a ModelOutput, or the tuple of `return_dict=False`); None without one."""
    if isinstance(output, Mapping):
        present = list(output)  # `in` and `[]` warn about an old name
        for name in CACHE_NAMES:
            if name in present:
                return output[name]
        # Remote code may return its cache by a name of its own; what counts tokens is one.
        return next((value for value in output.values() if counts_tokens(value)), None)
    if isinstance(output, tuple):
        return next((value for value in output if counts_tokens(value)), None)
    return None


def counts_tokens(value: object) -> bool:
    """Whether this object says how many tokens it holds, as every Cache of transformers does."""
    return not isinstance(value, Tensor) and callable(getattr(value, "get_seq_length", None))


def can_carry_state(cache: object) -> bool:
    """Whether state can travel with this cache: one object that lasts from step to step and counts its tokens.

    The tuples of older remote code, and the paged cache of continuous batching, are none.
    """
    return counts_tokens(cache) and hasattr(cache, "__dict__")


def cache_length(cache: Any, *, as_number: bool = False) -> int | Tensor | None:
    """Tokens in the cache; a tensor where only the device knows, None where nothing counts them.

    as_number: the cache is known to tell its length as a number.
    """
    if not as_number and getattr(cache, "is_compileable", False):
        for layer in getattr(cache, "layers", ()):
            # Caches for compiled steps keep their length on the device; reading it would wait for all work there.
            if isinstance(found := getattr(layer, "cumulative_length", None), Tensor):
                return found if layer.is_initialized else 0
    try:
        found = cache.get_seq_length()
    except (AttributeError, ValueError):  # only linear-attention layers
        return None
    return found if isinstance(found, Tensor) else int(found)


def is_counted(length: int | Tensor | None, cache: Any) -> TypeGuard[int]:
    """Whether this cache tells its length as a number, as those for compiled steps do not."""
    return isinstance(length, int) and not getattr(cache, "is_compileable", False)
