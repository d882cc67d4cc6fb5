"""Eviction: policies, which a live expert cache runs too, and exact replays of a trace under them. No torch.

`register` adds a policy; POLICIES has all by name, ONLINE those that need no future.
"""

import importlib
from typing import TYPE_CHECKING, Any

# Registers itself.
from remoe_adapt.eviction.markov import Markov as _Markov
from remoe_adapt.eviction.policy import LRFU, LRFU_DECAY, ONLINE, POLICIES, Policy, make_policy, register

if TYPE_CHECKING:
    from remoe_adapt.eviction.replay import check_replay, hit_rates, layer_rows, simulate, summarise


def __getattr__(name: str) -> Any:
    # Replays need numpy; help texts list the policies, and must come without it.
    return getattr(importlib.import_module("remoe_adapt.eviction.replay"), name)
