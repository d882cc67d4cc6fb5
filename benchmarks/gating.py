"""`remoe bench gating` row by row, kept in results/gating_<device>.csv: `python benchmarks/gating.py [--gpu-only]`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from remoe_adapt.bench.gating import gpu_rows, run_gating
from remoe_adapt.bench.results import append_row, environment

RESULTS = Path(__file__).parent / "results"


def keep(row: dict[str, Any]) -> None:
    """Print a row and add it to its device's file."""
    name = re.sub(r"[\s-]\d+gb.*", "", row["device"].lower().removeprefix("nvidia"))
    device = re.sub(r"[^a-z0-9]+", "_", name.strip())
    append_row(RESULTS / f"gating_{device}.csv", {**environment(), **row})
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["--gpu-only"]:
        for row in gpu_rows():
            keep(row)
        sys.exit()
    for what, why in run_gating(on_row=keep)["skipped"].items():
        print(f"no rows for {what}: {why}", file=sys.stderr)
