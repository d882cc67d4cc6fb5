"""`remoe bench swap` as JSON, kept in results/swap_cpu.csv: `python benchmarks/swap.py [MODEL [FAMILY]]`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from remoe_adapt.bench.results import append_row, environment
from remoe_adapt.bench.swap import run_swap

if __name__ == "__main__":
    result = run_swap(*sys.argv[1:3])
    append_row(Path(__file__).parent / "results" / "swap_cpu.csv", {**environment(), **result})
    print(json.dumps(result))
