"""`remoe bench decode`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from remoe_adapt import cli_options as opt
from remoe_adapt import rows
from remoe_adapt.cli_app import bench_app, command
from remoe_adapt.cli_options import CommandResult
from remoe_adapt.report import progress, quiet_libraries

_MIB = 1 << 20


@command(bench_app, "decode", rows.of_named_arms)
def decode(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None,
    tokens: opt.DecodeTokens = 520, quality_tokens: opt.QualityTokens = 900, max_seconds: opt.DecodeSeconds = 400.0,
    work: opt.Work = None, keep: opt.KeepModel = False, quick: opt.Quick = False, threads: opt.Threads = 1,
    direct_io: opt.DirectIo = True, prefetch: opt.Prefetch = False, pack: opt.Pack = True,
    read_mib: opt.ReadRate = 300.0, csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
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
