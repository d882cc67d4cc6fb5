"""`remoe bench controller`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from remoe_adapt import cli_options as opt
from remoe_adapt import rows
from remoe_adapt.cli_app import bench_app, command
from remoe_adapt.cli_decode import bars_table
from remoe_adapt.cli_options import CommandResult
from remoe_adapt.report import progress, quiet_libraries

_MIB = 1 << 20


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
    table = Table(
        title=f"{settings['cycles']} squeezes, {settings['tokens']} tokens in each phase; room for "
        f"{100 * result['profile']['expert_cache']['share']:.0f} % of all experts in "
        f"calm, for about {100 * settings['squeezed']:.0f} % in a squeeze"
    )
    columns = ("arm", "squeeze p95, ms", "squeeze, ms", "cache then, MiB", "calm, ms", "KL, nats", "swaps", "kills")
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    for name, row in result["arms"].items():
        budget = row["squeeze_budget_bytes"]
        table.add_row(
            name, _ms(row["squeeze_p95_ms"]), _ms(row["squeeze_tpot_ms"]),
            "" if budget is None else f"{budget / _MIB:.0f}", _ms(row["calm_tpot_ms"]),
            "" if row["kl"] is None else f"{row['kl']:.4f}", str(row["swaps"]), str(row["oom_kills"]),
        )  # fmt: skip
    return table


def _ms(value: float | None) -> str:
    return "died" if value is None else f"{value:.1f}"
