"""GPU rows of `remoe bench gating`, kept one by one in results/gating_<device>.csv: `python benchmarks/gating.py`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from remoe_adapt.bench.gating import gpu_rows, no_gpu
from remoe_adapt.bench.results import append_row, environment

if __name__ == "__main__":
    why = no_gpu()
    if why is not None:
        print(f"no GPU rows: {why}", file=sys.stderr)
    for row in gpu_rows():
        device = re.sub(r"[^a-z0-9]+", "_", row["device"].lower().removeprefix("nvidia").strip())
        append_row(Path(__file__).parent / "results" / f"gating_{device}.csv", {**environment(), **row})
        print(json.dumps(row), flush=True)
