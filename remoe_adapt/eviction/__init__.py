"""Eviction on paper: policies, and exact replays of a trace under them. No torch."""

from remoe_adapt.eviction.policy import ONLINE, POLICIES, Policy, make_policy, register
from remoe_adapt.eviction.replay import check_replay, hit_rates, layer_rows, simulate, summarise
