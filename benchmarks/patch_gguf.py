"""What another strength costs in a GGUF of 3 GB, kept in results/patch_gguf.csv: `python benchmarks/patch_gguf.py`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from remoe_adapt.bench.patching import run_patching
from remoe_adapt.bench.results import append_row, environment
from remoe_adapt.errors import RemoeError

if __name__ == "__main__":
    try:
        result = run_patching(float(sys.argv[1]) if len(sys.argv) > 1 else 3.0)
    except (RemoeError, ValueError) as error:  # ValueError: no number
        sys.exit(f"error: {error}")
    append_row(Path(__file__).parent / "results" / "patch_gguf.csv", {**environment(), **result})
    print(json.dumps(result))
