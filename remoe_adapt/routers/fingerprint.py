"""One hash that says which base model an adapter belongs to: all base router weights in model order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

_SMALLEST = 2.0**-16


def fingerprint_of_weights(weights: Iterable[Tensor]) -> str:
    """Hash of base router weights [E, D] in model order, wherever they were read: "sha256:" and 64 hex digits.

    It is the same in whichever dtype the checkpoint is loaded: values are hashed rounded to bf16, which is what loading
    in bf16 does, and magnitudes below 2**-16 as zero, because fp16 cannot hold them all. The one exception is an fp32
    checkpoint loaded in fp16: rounding twice is not rounding once.
    """
    digest = hashlib.sha256()
    for weight_ED in weights:
        digest.update(str(tuple(weight_ED.shape)).encode())
        digest.update(_canonical_bytes(weight_ED.detach()))
    return f"sha256:{digest.hexdigest()}"


def _canonical_bytes(weight_ED: Tensor) -> bytes:
    rounded_ED = weight_ED.to(torch.bfloat16)
    rounded_ED = torch.where(rounded_ED.abs() < _SMALLEST, torch.zeros_like(rounded_ED), rounded_ED)
    return rounded_ED.cpu().contiguous().view(torch.uint8).numpy().tobytes()
