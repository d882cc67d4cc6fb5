"""Benchmarks behind `remoe bench`, each a ratio to a named baseline in one run."""

from remoe_adapt.bench.gating import run_gating
from remoe_adapt.bench.swap import run_swap
