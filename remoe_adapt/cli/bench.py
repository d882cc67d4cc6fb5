"""`remoe doctor` and `remoe bench`: what is usable here, and what it costs against named baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report, rows
from remoe_adapt.cli.app import app, bench_app, command
from remoe_adapt.cli.options import CommandResult
from remoe_adapt.cli.report import counting, optional, percent, progress, quiet_libraries


@command(app, "doctor", rows.of_rows)
def doctor(contracts: opt.Contracts = False, csv: opt.Csv = None, as_json: opt.Json = False) -> CommandResult:
    """What is usable here (devices, kernels, sensors, extras) and, where it is not, why."""
    from remoe_adapt.cli.doctor import as_result, examine, examine_contracts

    if contracts:
        quiet_libraries()  # they are tried with what makes them talk
        result = examine_contracts()
        return result, [report.contracts_table(result)]
    result = as_result(examine())
    return result, [report.doctor_table(result["rows"])]


@command(bench_app, "swap", rows.of_figures)
def swap(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, csv: opt.Csv = None, as_json: opt.Json = False
) -> CommandResult:
    """Swapping strength in place, against PEFT's own way; forward time at strength against the base."""
    from remoe_adapt.bench import run_swap

    quiet_libraries()
    result = run_swap(model, family)
    return result, [report.figures_table("swap", result)]


@command(bench_app, "gating", rows.of_rows)
def gating(calls: opt.Calls = 400, csv: opt.Csv = None, as_json: opt.Json = False) -> CommandResult:
    """Routers with a recency prior against stock ones on the CPU; the fused kernels against their bars on a GPU."""
    from remoe_adapt.bench import run_gating

    with counting("rows done") as advance:
        result = run_gating(calls, on_row=lambda _: advance())
    return result, [report.gating_table(result)]


_MIB = 1 << 20


@command(bench_app, "decode", rows.of_named_arms)
def decode(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None,
    tokens: opt.DecodeTokens = 520, quality_tokens: opt.QualityTokens = 900, max_seconds: opt.DecodeSeconds = 400.0,
    work: opt.Work = None, keep: opt.KeepModel = False, quick: opt.Quick = False, threads: opt.Threads = 1,
    direct_io: opt.DirectIo = True, prefetch: opt.Prefetch = False, pack: opt.Pack = True,
    read_mib: opt.ReadRate = 300.0, dtype: opt.BenchDtype = "float32", bits: opt.FewerBits = True,
    csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Decode with experts from storage: time per token against stock, accelerate and memory-mapped weights."""
    from remoe_adapt.bench.decode import DecodeOptions, quickly, run_decode

    options = DecodeOptions(
        model=model, family=family, data=data or (), tokens=tokens, quality_tokens=quality_tokens,
        max_seconds=max_seconds, work=work, keep=keep, threads=threads, direct_io=direct_io, prefetch=prefetch,
        pack=pack, read_mib_per_s=read_mib, dtype=dtype, bits=bits,
    )  # fmt: skip
    quiet_libraries()
    with progress("decoding") as (total, advance):
        result = run_decode(quickly(options) if quick else options, on_start=total, on_tokens=advance)
    return result, [decode_table(result), bars_table(result)]


def decode_table(result: Mapping[str, Any]) -> Table:
    """The arms of `run_decode`."""
    table = report.table(
        f"{result['tokens']} tokens of {result['documents']} document(s), one at a time, {result['dtype']}, "
        f"{result['threads']} thread(s); perplexity of {result['quality_tokens']}",
        "arm", "TPOT, ms", "95 %, ms", "hit rate", "MiB/token", "stalled", "ppl ratio", "anon. memory, MiB",
    )  # fmt: skip
    for name, row in result["arms"].items():
        if "skipped" in row:
            table.add_row(name, f"skipped: {row['skipped']}")
            continue
        table.add_row(
            name, f"{row['tpot_ms']:.1f}", f"{row['tpot_p95_ms']:.1f}", percent(row["hit_rate"]),
            f"{row['bytes_per_token'] / _MIB:.1f}", percent(row["stall_share"]), optional(row["ppl_ratio"], ".4f"),
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
        table.add_row(
            row["bar"], row.get("arm") or "", optional(row["value"], ".3f"), f"{sign} {row['target']:g}", verdict
        )
    return table


@command(bench_app, "scale", rows.of_figures)
def scale(
    layers: opt.Layers = 48, tokens: opt.ScaleTokens = 24, threads: opt.ScaleThreads = None,
    arithmetic: opt.ScaleArithmetic = "auto", direct_io: opt.DirectIo = True, in_ram: opt.InRam = True,
    work: opt.Work = None, keep: opt.KeepFiles = False, csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """A 30B model's shape at 4 bits: load time, memory, time per token, and what a look-up costs."""
    from remoe_adapt.bench.scale import ScaleOptions, run_scale

    options = ScaleOptions(
        layers=layers, tokens=tokens, threads=threads, arithmetic=arithmetic, direct_io=direct_io, in_ram=in_ram,
        work=work, keep=keep,
    )  # fmt: skip
    quiet_libraries()
    with report.byte_progress("writing the model") as (total, advance):
        result = run_scale(options, on_start=total, on_bytes=advance)
    return result, [scale_table(result), bars_table(result)]


def scale_table(result: Mapping[str, Any]) -> Table:
    """The figures of `run_scale`."""
    table = Table(
        title=f"{result['layers']} layers, {result['experts']} experts of {result['expert_bytes'] / _MIB:.1f} MiB, "
        f"{result['threads']} thread(s), {result['arithmetic']}"
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    mib = {
        "file": "file_bytes", "its header": "header_bytes", "dense part": "dense_bytes", "budget": "budget_bytes",
        "anonymous memory": "anon_growth_bytes", "read for a token": "bytes_per_token",
    }  # fmt: skip
    for title, key in mib.items():
        table.add_row(f"{title}, MiB", f"{result[key] / _MIB:,.1f}")
    table.add_row("opened in, s", f"{result['open_s']:.2f}")
    table.add_row("loaded in, s", f"{result['load_s']:.1f}")
    table.add_row("memory mappings", f"{result['maps']:,} of {result['max_map_count']:,}")
    table.add_row("TPOT in the budget, ms", f"{result['tpot_ms']:.1f} ({percent(result['hit_rate'])} hits)")
    table.add_row("TPOT at hits alone, ms", f"{result['hits_tpot_ms']:.1f} ({percent(result['hits_hit_rate'])} hits)")
    table.add_row("the cache's part of a look-up, us", f"{result['look_up_us']:.2f}")
    for row in result["in_ram"]:
        table.add_row(
            f"all in RAM, experts {row['inner']} x {row['hidden']}: 4 bits, stock bf16 ({row['stock']}), ms",
            f"{row['fast_ms']:.1f}, {row['stock_ms']:.1f}",
        )
    return table


@command(bench_app, "controller", rows.of_named_arms)
def controller(
    model: opt.ShippedModel = None, family: opt.FamilyPath = None, data: opt.MoreData = None,
    tokens: opt.PhaseTokens = 600, cycles: opt.Cycles = 3, recency_gain: opt.EmaGain = 0.3,
    squeezed: opt.Squeezed = 0.25, take_mib: opt.TakeRate = 100.0, read_mib: opt.PacedRate = 300.0,
    squeezes: opt.Squeezes = 20, work: opt.Work = None, keep: opt.KeepModel = False, quick: opt.Quick = False,
    csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """The dial while another process takes memory: against every fixed strength, no dial, and a fixed cache."""
    from remoe_adapt.bench.controller import ControllerOptions, quickly, run_controller

    options = ControllerOptions(
        model=model, family=family, data=data or (), tokens=tokens, cycles=cycles, gain=recency_gain, squeezed=squeezed,
        take_mib_per_s=take_mib, read_mib_per_s=read_mib, squeezes=squeezes, work=work, keep=keep,
    )  # fmt: skip
    quiet_libraries()
    with progress("decoding") as (total, advance):
        result = run_controller(quickly(options) if quick else options, on_start=total, on_tokens=advance)
    verdict = [] if result["void"] is None else [f"[void] {result['void']}"]
    return result, [controller_table(result), bars_table(result), *verdict]


def controller_table(result: Mapping[str, Any]) -> Table:
    """The arms of `run_controller`."""
    settings = result["settings"]
    table = report.table(
        f"{settings['cycles']} squeezes, {settings['tokens']} tokens in each phase; room for "
        f"{100 * result['profile']['expert_cache']['share']:.0f} % of all experts in "
        f"calm, for about {100 * settings['squeezed']:.0f} % in a squeeze",
        "arm", "squeeze p95, ms", "squeeze, ms", "cache then, MiB", "calm, ms", "KL, nats", "swaps", "kills",
    )  # fmt: skip
    for name, row in result["arms"].items():
        budget = row["squeeze_budget_bytes"]
        p95, squeeze, calm = (
            optional(row[key], ".1f", "died") for key in ("squeeze_p95_ms", "squeeze_tpot_ms", "calm_tpot_ms")
        )
        table.add_row(
            name, p95, squeeze, "" if budget is None else f"{budget / _MIB:.0f}", calm, optional(row["kl"], ".4f"),
            str(row["swaps"]), str(row["oom_kills"]),
        )  # fmt: skip
    return table
