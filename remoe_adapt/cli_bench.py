"""`remoe doctor` and `remoe bench`: what is usable here, and what it costs against named baselines."""

from __future__ import annotations

from remoe_adapt import cli_options as opt
from remoe_adapt import report, rows
from remoe_adapt.cli_app import app, bench_app, command
from remoe_adapt.cli_options import CommandResult
from remoe_adapt.report import counting, quiet_libraries


@command(app, "doctor", rows.of_rows)
def doctor(contracts: opt.Contracts = False, csv: opt.Csv = None, as_json: opt.Json = False) -> CommandResult:
    """What is usable here (devices, kernels, sensors, extras) and, where it is not, why."""
    from remoe_adapt.doctor import as_result, examine, examine_contracts

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
    from remoe_adapt.bench.swap import run_swap

    quiet_libraries()
    result = run_swap(model, family)
    return result, [report.figures_table("swap", result)]


@command(bench_app, "gating", rows.of_rows)
def gating(calls: opt.Calls = 400, csv: opt.Csv = None, as_json: opt.Json = False) -> CommandResult:
    """Routers with a recency prior against stock ones on the CPU; the fused kernels against their bars on a GPU."""
    from remoe_adapt.bench.gating import run_gating

    with counting("rows done") as advance:
        result = run_gating(calls, on_row=lambda _: advance())
    return result, [report.gating_table(result)]
