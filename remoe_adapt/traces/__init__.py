"""Traces of routing, and the metrics of reuse that are read off them. No torch."""

from remoe_adapt.traces.metrics import (
    eor,
    eor_L,
    load_entropy,
    load_entropy_L,
    reuse_distance,
    switch_rate,
    switch_rate_L,
)
from remoe_adapt.traces.trace import PHASES, Trace
