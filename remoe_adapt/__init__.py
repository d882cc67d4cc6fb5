"""A dial between quality and expert reuse for mixture-of-experts models.

A router adapter family stores router deltas for several strengths; the runtime turns the strength while the
model decodes. Importing this package registers the adapter type REMOE with PEFT; public names are imported on first
use.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import PurePath
from typing import Any

__version__ = "0.1.0"

# Public name -> the module that defines it.
_EXPORTS = {
    "Controller": "remoe_adapt.dial.controller",
    "DeviceProfile": "remoe_adapt.device_profile.profile",
    "Family": "remoe_adapt.family.family",
    "FamilyPoint": "remoe_adapt.family.family",
    "RecencyPrior": "remoe_adapt.recency.prior",
    "RemoeConfig": "remoe_adapt.tuner",
    "RemoeError": "remoe_adapt.errors",
    "RemoeLayer": "remoe_adapt.tuner",
    "RemoeModel": "remoe_adapt.tuner",
    "RemoeTrainer": "remoe_adapt.training.trainer",
    "RemoeTrainerMixin": "remoe_adapt.training.trainer",
    "RouterRef": "remoe_adapt.routers.discover",
    "RouterSpec": "remoe_adapt.routers.spec",
    "Trace": "remoe_adapt.traces.trace",
    "discover_routers": "remoe_adapt.routers.discover",
    "get_remoe_model": "remoe_adapt.dial.load",
    "list_profiles": "remoe_adapt.device_profile.profile",
    "load_profile": "remoe_adapt.device_profile.profile",
    "load_with_expert_cache": "remoe_adapt.expert_cache.load",
    "recency_prior": "remoe_adapt.recency.install",
    "release": "remoe_adapt.dial.load",
    "topk_gating": "remoe_adapt.gating.reference",
}

__all__ = ["__version__", *sorted(_EXPORTS)]


def _is_the_command() -> bool:
    """Whether this process is the command line, `remoe` or `python -m remoe_adapt`.

    Help and typing errors must not wait for torch, transformers and PEFT: the modules that need REMOE import it there.
    """
    program, words = (sys.argv or [""])[0], sys.orig_argv
    if program == "-m":  # while Python looks for the module, and only then
        return "-m" in words and words[words.index("-m") + 1 :][:1] == ["remoe_adapt"]
    return PurePath(program).name in ("remoe", "remoe.exe")


if not _is_the_command():
    importlib.import_module("remoe_adapt.tuner")


def __getattr__(name: str) -> Any:
    module = _EXPORTS.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
