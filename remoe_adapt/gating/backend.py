"""Which backend computes gates: fused Triton kernels or plain torch. All that could launch a kernel asks here."""

from __future__ import annotations

import importlib.util
import os

import torch

from remoe_adapt.errors import ConfigError

BACKENDS = ("auto", "torch", "triton")
ENVIRONMENT = "REMOE_GATING"
_DEVICES = ("cuda",)
# Whether the package is there; it is imported only when a kernel runs.
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def _forced_by(name: str | None) -> str | None:
    return None if name in (None, "", "auto") else name


_forced = _forced_by(os.environ.get(ENVIRONMENT))


def set_backend(name: str) -> None:
    """Force "torch" or "triton" for this process, as $REMOE_GATING does from outside; "auto" gives the choice back.

    Holds from the next gate on, in compiled graphs too. Raises ConfigError for another name, or for "triton" where it
    cannot run.
    """
    global _forced
    _check(name)
    _forced = _forced_by(name)


def backend(device: torch.device) -> str:
    """ "triton" or "torch": what gates on this device use."""
    return explain(device)[0]


def explain(device: torch.device) -> tuple[str, str]:
    """(backend, why) for tensors on this device. Raises ConfigError for a bad $REMOE_GATING."""
    if _forced is not None:
        _check(_forced)
    if device.type not in _DEVICES:
        return "torch", f"tensors are on {device.type}: Triton needs a GPU"
    if _forced is not None:
        return _forced, f"forced (set_backend or ${ENVIRONMENT})"
    return ("triton", "fused kernels") if _HAS_TRITON else ("torch", "triton is not installed")


def _check(name: str) -> None:
    if name not in BACKENDS:
        raise ConfigError(f"gating backend {name!r}: give one of {', '.join(BACKENDS)}.")
    if name == "triton" and not _HAS_TRITON:
        raise ConfigError("gating backend 'triton': triton is not installed (it is for Linux only); use torch.")
