"""`remoe bench decode`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from remoe_adapt import cli_options as opt
from remoe_adapt.cli_options import Found
from remoe_adapt.report import progress, quiet_libraries

Tokens = Annotated[int, typer.Option(min=2, help="Tokens of held-out text, decoded by every arm.")]
MaxSeconds = Annotated[float, typer.Option(min=0, help="Begin no further document after so many seconds of decoding.")]
Work = Annotated[Path | None, typer.Option(help="Folder for the widened model and the disk; default: ~/.cache/remoe.")]
Keep = Annotated[bool, typer.Option("--keep", help="Keep the widened model for the next run.")]
Quick = Annotated[bool, typer.Option("--quick", help="Seconds instead of minutes: small experts, no limits, few arms.")]
Threads = Annotated[int, typer.Option(min=1, help="Threads of torch, the same for every arm.")]
DirectIo = Annotated[bool, typer.Option(help="Read experts past the page cache.")]
Prefetch = Annotated[bool, typer.Option(help="Read ahead what the next layer's router will choose.")]
Pack = Annotated[bool, typer.Option(help="Read experts from a pack, not from the checkpoint.")]
ReadRate = Annotated[
    float, typer.Option("--read-mib", min=0, help="Nobody reads faster than so many MiB/s; 0: the disk.")
]
QualityTokens = Annotated[
    int, typer.Option(min=0, help="More tokens, decoded without the clock, for the perplexity ratios.")
]
_MIB = 1 << 20


def decode(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None, tokens: Tokens = 520,
    quality_tokens: QualityTokens = 900, max_seconds: MaxSeconds = 400.0, work: Work = None, keep: Keep = False,
    quick: Quick = False, threads: Threads = 1, direct_io: DirectIo = True, prefetch: Prefetch = False,
    pack: Pack = True, read_mib: ReadRate = 300.0, csv: opt.Csv = None, as_json: opt.Json = False,
) -> Found:  # fmt: skip
    """Decode with experts from storage: time per token against stock, accelerate and memory-mapped weights."""
    from remoe_adapt.bench.decode import DecodeOptions, quickly, run_decode

    options = DecodeOptions(
        model=model, family=family, data=data or (), tokens=tokens, quality_tokens=quality_tokens,
        max_seconds=max_seconds, work=work, keep=keep, threads=threads, direct_io=direct_io, prefetch=prefetch,
        pack=pack, read_mib_per_s=read_mib,
    )  # fmt: skip
    quiet_libraries()
    with progress("decoding") as (total, advance):
        result = run_decode(quickly(options) if quick else options, on_start=total, on_tokens=advance)
    return result, [decode_table(result), bars_table(result)]


def decode_table(result: Mapping[str, Any]) -> Table:
    """The arms of `run_decode`."""
    table = Table(
        title=f"{result['tokens']} tokens of {result['documents']} document(s), one at a time, {result['dtype']}, "
        f"{result['threads']} thread(s); perplexity of {result['quality_tokens']}"
    )
    columns = ("arm", "TPOT, ms", "95 %, ms", "hit rate", "MiB/token", "stalled", "ppl ratio", "anon. memory, MiB")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for name, row in result["arms"].items():
        if "skipped" in row:
            table.add_row(name, f"skipped: {row['skipped']}")
            continue
        table.add_row(
            name, f"{row['tpot_ms']:.1f}", f"{row['tpot_p95_ms']:.1f}", _percent(row["hit_rate"]),
            f"{row['bytes_per_token'] / _MIB:.1f}", _percent(row["stall_share"]), f"{row['ppl_ratio']:.4f}",
            f"+{row['anon_growth_bytes'] / _MIB:.0f}",
        )  # fmt: skip
    table.caption = (
        f"Raw reads of this device: {result['raw_bandwidth_bytes_per_s'] / _MIB:.0f} MiB/s; "
        f"limit at 25 %: {result['limit_ms']:.1f} ms"
    )
    return table


def bars_table(result: Mapping[str, Any]) -> Table:
    """The bars of `run_decode`."""
    table = Table(title="bars")
    for column in ("bar", "arm", "value", "target", ""):
        table.add_column(column)
    for row in result["bars"]:
        verdict = {True: "met", False: "missed", None: "not measured"}[row["met"]]
        sign = "<=" if row["at_most"] else ">="
        value = "" if row["value"] is None else f"{row['value']:.3f}"
        table.add_row(row["bar"], row.get("arm") or "", value, f"{sign} {row['target']:g}", verdict)
    return table


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f} %"
