"""`remoe bench controller`, kept in results/controller_cpu.csv (arms) and controller_cpu_bars.csv.

`python benchmarks/controller.py [NAME=VALUE of ControllerOptions ...]`, as `tokens=300`. Text: the shipped model's, and
that of ../shared/data/heldout where it lies beside the clone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from remoe_adapt.bench.controller import ControllerOptions, run_controller
from remoe_adapt.bench.results import REPO_ROOT, append_row, environment

RESULTS = Path(__file__).parent / "results"
TEXTS = ("wikitext2_valid.txt.gz", "gsm8k_test.jsonl.gz", "humaneval.jsonl.gz")
SETTINGS = ("tokens", "cycles", "gain", "squeezed", "take_mib_per_s", "read_mib_per_s", "expert_bytes", "squeezes")


def keep(result: dict[str, Any]) -> None:
    """Adds a run's arms and bars to their files."""
    settings = {key: result["settings"][key] for key in SETTINGS} | {"void": result["void"] or ""}
    for name, row in result["arms"].items():
        append_row(RESULTS / "controller_cpu.csv", {**environment(), "arm": name, **row, **settings})
    for row in result["bars"]:
        append_row(RESULTS / "controller_cpu_bars.csv", {**environment(), **row, **settings})


if __name__ == "__main__":
    heldout = REPO_ROOT.parent / "shared" / "data" / "heldout"
    given = {name: json.loads(value) for name, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    texts = [heldout / name for name in TEXTS if (heldout / name).is_file()]
    result = run_controller(ControllerOptions(**{"data": texts, "keep": True, **given}))
    keep(result)
    print(json.dumps(result))
