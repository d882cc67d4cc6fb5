"""Raw and expert reads row by row, kept in results/reading_cpu.csv: `python benchmarks/reading.py MODEL PACK`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from remoe_adapt.bench.reading import run_reading
from remoe_adapt.bench.results import append_row, environment

if __name__ == "__main__":
    for row in run_reading(sys.argv[1], sys.argv[2])["rows"]:
        append_row(Path(__file__).parent / "results" / "reading_cpu.csv", {**environment(), **row})
        print(json.dumps(row), flush=True)
