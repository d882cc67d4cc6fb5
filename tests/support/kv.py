"""The KV cache of a forward by the name that the installed transformers has for it."""

from __future__ import annotations

from typing import Any

from transformers import Qwen2MoeModel

from remoe_adapt.libraries.kv_cache import cache_argument, returned_cache

__all__ = ["kv", "returned_cache"]
_NAME = cache_argument(Qwen2MoeModel.forward)


def kv(cache: Any) -> dict[str, Any]:
    """The keyword that hands a model this cache: `model(ids, **kv(cache))`."""
    assert _NAME is not None
    return {_NAME: cache}
