"""One hash that says which base model an adapter belongs to: all base router weights in model order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from remoe_adapt.errors import RouterError
from remoe_adapt.routers.discover import discover_routers

_SMALLEST = 2.0**-16


def fingerprint(model: nn.Module) -> str:
    """Hash of the base router weights of `model`: "sha256:" and 64 hex digits.

    It is the same before and after wrapping, while adapters are merged, under any module prefix (names are not
    hashed, only order, shape and value), and in whichever dtype the checkpoint is loaded: values are hashed rounded to
    bf16, which is what loading in bf16 does, and magnitudes below 2**-16 as zero, because fp16 cannot hold them all.
    The one exception is an fp32 checkpoint loaded in fp16: rounding twice is not rounding once.

    Raises RouterNotFoundError or UnsupportedRouterError as `discover_routers`, RouterError when a weight has no values
    (meta device).
    """
    return fingerprint_of_weights(_base_weights(model))


def fingerprint_of_weights(weights: Iterable[Tensor]) -> str:
    """The same hash of router weights [E, D] in model order, wherever they were read."""
    digest = hashlib.sha256()
    for weight_ED in weights:
        digest.update(str(tuple(weight_ED.shape)).encode())
        digest.update(_canonical_bytes(weight_ED.detach()))
    return f"sha256:{digest.hexdigest()}"


def _base_weights(model: nn.Module) -> Iterator[Tensor]:
    for router in discover_routers(model):
        # A wrapper keeps the true base weight while an adapter is merged into the live one.
        wrapper = model.get_submodule(router.name)
        kept = getattr(wrapper, "original_weight_ED", None)
        weight_ED = kept if isinstance(kept, Tensor) else router.weight_ED
        if weight_ED.device.type == "meta":
            raise RouterError(
                f"router {router.name} is on the meta device and has no values to take a fingerprint of: "
                "load the base model's weights first."
            )
        yield weight_ED


def _canonical_bytes(weight_ED: Tensor) -> bytes:
    rounded_ED = weight_ED.to(torch.bfloat16)
    rounded_ED = torch.where(rounded_ED.abs() < _SMALLEST, torch.zeros_like(rounded_ED), rounded_ED)
    return rounded_ED.cpu().contiguous().view(torch.uint8).numpy().tobytes()
