"""Eviction: policies, which a live expert cache runs too, and exact replays of a trace under them. No torch.

`register` adds a policy; POLICIES has all by name, ONLINE those that need no future.
"""

from remoe_adapt.eviction.policy import ONLINE, POLICIES, Policy, make_policy, register
from remoe_adapt.eviction.replay import check_replay, hit_rates, layer_rows, simulate, summarise
