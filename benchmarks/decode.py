"""`remoe bench decode`, kept in results/decode_cpu.csv (arms) and decode_cpu_bars.csv: `python benchmarks/decode.py`.

Options: NAME=VALUE of DecodeOptions, as `tokens=300 read_mib_per_s=0`. Text: the shipped model's, and that of
../shared/data/heldout where it lies beside the clone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from remoe_adapt.bench.decode import DecodeOptions, run_decode
from remoe_adapt.bench.results import REPO_ROOT, append_row, environment

RESULTS = Path(__file__).parent / "results"
TEXTS = ("wikitext2_valid.txt.gz", "gsm8k_test.jsonl.gz", "humaneval.jsonl.gz")
COLUMNS = (
    "tpot_ms", "tpot_p95_ms", "tpot_mean_ms", "hit_rate", "bytes_per_token", "io_bytes_per_token", "stall_share",
    "ppl_ratio", "anon_growth_bytes", "steps", "skipped",
)  # fmt: skip
SETTINGS = (
    "tokens", "quality_tokens", "dtype", "direct_io", "prefetch", "pack", "read_mib_per_s",
    "raw_bandwidth_bytes_per_s", "limit_ms",
)  # fmt: skip


def keep(result: dict[str, Any]) -> None:
    """Adds a run's arms and bars to their files."""
    settings = {key: result[key] for key in (*SETTINGS, "memory_limit_bytes")}
    for name, row in result["arms"].items():
        figures = {column: row.get(column, "") for column in COLUMNS}
        append_row(RESULTS / "decode_cpu.csv", {**environment(), "arm": name, **figures, **settings})
    for row in result["bars"]:
        figures = {column: row.get(column, "") for column in ("bar", "arm", "value", "target", "met")}
        append_row(RESULTS / "decode_cpu_bars.csv", {**environment(), **figures, **settings})


if __name__ == "__main__":
    heldout = REPO_ROOT.parent / "shared" / "data" / "heldout"
    given = {name: json.loads(value) for name, _, value in (argument.partition("=") for argument in sys.argv[1:])}
    texts = [heldout / name for name in TEXTS if (heldout / name).is_file()]
    result = run_decode(DecodeOptions(**{"data": texts, **given}))
    keep(result)
    print(json.dumps(result))
