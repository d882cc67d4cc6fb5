"""`remoe report`: what a family is worth, as a page to read and to hand on."""

from __future__ import annotations

import shlex
import sys
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from remoe_adapt._support import check_extra, check_file
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report
from remoe_adapt.cli.app import app, command
from remoe_adapt.cli.options import CommandResult


@command(app, "report")
def family_report(
    family: opt.ExportFamily, out: opt.ReportOut = Path("report.html"), frontier: opt.FrontierFile = None,
    model: opt.ReportModel = None, data: opt.EvalData = None, max_tokens: opt.MaxTokens = None,
    decode: opt.DecodeDomains = None, device: opt.Device = None, dtype: opt.Dtype = "auto", force: opt.Force = False,
    as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Write a page on a family: misses against quality, layer by layer, its certificates, how to make it again.

    One HTML file that needs nothing else (no script, no network), and its pictures as PNG files beside it. Figures are
    those of the certificates; with --model and --data all points are measured anew, each layer too (and with --decode
    each kind of text). --frontier adds the arms of `benchmarks/frontier.py --json`. Needs the extra: plot.
    """
    check_extra("matplotlib", "plot", "a report needs matplotlib")
    check_file(out, "--out", [".html"])
    from remoe_adapt.bench.harness import environment
    from remoe_adapt.checkpoints import load_with_tokenizer
    from remoe_adapt.evaluation import check_data, check_domains, evaluate, evaluate_domains
    from remoe_adapt.evaluation.reporting import CACHE, read_frontier, report_facts, write_report
    from remoe_adapt.expert_cache import load_whole_or_cached
    from remoe_adapt.family import Family
    from remoe_adapt.texts import read_domains, read_shared

    report.quiet_libraries()
    arms = None if frontier is None else read_frontier(frontier)
    points = Family.load(family)
    measured: dict[str, Any] | None = None
    if model is not None and data:
        check_data(data, max_tokens)
        load = partial(load_whole_or_cached, expert_cache=None, storage=None)
        base, tokenizer = load_with_tokenizer(model, device=device, dtype=dtype, load=load)
        documents = read_shared(data, tokenizer, max_tokens)
        domains = {} if decode is None else read_domains(data, tokenizer, decode)
        if decode is not None:
            check_domains(domains)
        runs = 1 + len(points.points) + (points.control is not None)
        caches = [float(CACHE.partition("@")[2])]
        with report.progress("scoring", sum(map(len, documents)) * runs) as (_, advance):
            measured = evaluate(
                base, documents, family=points, caches=caches, force=force, per_layer=True, on_tokens=advance
            )
        if domains:
            decoded = sum(len(ids) - 1 for texts in domains.values() for ids in texts)
            with report.progress("decoding", decoded * runs) as (_, advance):
                measured["domains"] = evaluate_domains(
                    base, domains, family=points, caches=caches, force=force, on_tokens=advance
                )
        measured["data"] = [path.name for path in data]
    words = ["remoe", *sys.argv[1:]] if sys.argv[1:2] == ["report"] else ["remoe", "report", family]
    facts = report_facts(points, measured=measured, frontier=arms, environment=environment(), command=shlex.join(words))
    written = write_report(facts, out)
    result: dict[str, Any] = {"report": str(written[0]), "figures": list(map(str, written[1:])), **facts}
    shown: list[RenderableType] = [report.points_table(facts)]
    return result, [*shown, *(f"written: {path}" for path in written)]
