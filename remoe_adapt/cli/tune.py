"""`remoe tune`: operating points aimed at quality budgets, without training or with a family's adapters."""

from __future__ import annotations

from functools import partial
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report
from remoe_adapt.cli.app import app, command
from remoe_adapt.cli.options import CommandResult, budget, numbers

BUDGETS = "1.002,1.005,1.01,1.02,1.05"


@command(app, "tune")
def tune(
    model: opt.Model, data: opt.Data, out: opt.TuneOut, family: opt.TuneFamily = None, budgets: opt.Budgets = BUDGETS,
    cache: opt.TuneCache = 0.25, recency: opt.TuneRecency = "cost",
    recency_decay: opt.RecencyDecay = None, max_tokens: opt.TuneTokens = 8192, seed: opt.TextSeed = 0,
    expert_cache: opt.ExpertCacheBudget = None, storage: opt.Storage = None, arithmetic: opt.Arithmetic = "exact",
    device: opt.Device = None, dtype: opt.Dtype = "auto", as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """Find, without training, the recency gains of each layer that save the most misses within a quality budget.

    Each layer alone, then the whole model are measured on the data; every budget gets the largest gains whose
    predicted perplexity ratio is within it, and a certificate on text kept apart. The family that is written has no
    adapters: `remoe run`, `remoe serve` and get_remoe_model turn its gains like any other family's strength.

    With --family the whole model runs with each adapter of that family in turn, and every budget gets the one that
    saves most there, with gains of its own: what `remoe train` does when it has trained.
    """
    aims = numbers(budgets)
    from remoe_adapt.checkpoints import load_with_tokenizer
    from remoe_adapt.evaluation import check_budgets, check_data, tune_family
    from remoe_adapt.expert_cache import check_arithmetic, load_whole_or_cached
    from remoe_adapt.family import Family

    report.quiet_libraries()
    # Before the model is loaded, which may take minutes.
    check_budgets(aims)
    check_arithmetic(arithmetic)
    check_data(data, max_tokens)
    Family.create(out, model, "")
    adapters = None if family is None else Family.load(family)
    size = expert_cache and budget(expert_cache)
    load = partial(load_whole_or_cached, expert_cache=size, storage=storage, arithmetic=arithmetic)
    base, tokenizer = load_with_tokenizer(model, device=device, dtype=dtype, load=load)
    with report.progress("measuring layers and points") as (total, advance):
        result = tune_family(
            base, data, out, tokenizer=tokenizer, base_id=model, family=adapters, budgets=aims, cache=cache,
            mode=recency, decay=recency_decay, tokens=max_tokens, seed=seed, on_total=total, on_tokens=advance,
        )  # fmt: skip
    return result, shown_points(result)


def shown_points(result: dict[str, Any]) -> list[RenderableType]:
    """What was found, for people: the points, where they are, and which of them are over their budgets."""
    missed = [f"{row['budget']:g}" for row in result["points"] if not row["met"]]
    shown: list[RenderableType] = [points_table(result), f"family written to {result['family']}"]
    if missed:
        shown.append(f"over its budget however far it was stepped back: {', '.join(missed)}")
    return shown


def points_table(result: dict[str, Any]) -> Table:
    """The points: what each was aimed at, what it costs and saves, and its gains."""
    prior, cache = result["recency"], result["cache"]
    found = report.table(
        f"{result['tokens']} tokens of {', '.join(result['data'])}; recency {prior['mode']}, cache of {cache:.0%}",
        "strength", "budget", "adapter", "ratio", "to best", "KL", "misses/token", "to LRU", "to LRFU", "gains",
    )  # fmt: skip
    base = result["base"]
    found.add_row("0", "", "", "1.0000", "", "0.0000", f"{base['misses_lru']:.3f}", "1.000", "", "")
    lrfu = base["misses_lrfu"]
    found.add_row(
        "0, LRFU", "", "", "1.0000", "", "0.0000", f"{lrfu:.3f}", f"{lrfu / base['misses_lru']:.3f}", "1.000", ""
    )
    for row in result["points"]:
        over = "" if row["met"] else " (over)"
        found.add_row(
            f"{row['strength']:.2f}", f"{row['budget']:g}{over}", Text(row["adapter"] or "none"),
            f"{row['ppl_ratio']:.4f} ± {row['ppl_ratio_error'] or 0.0:.4f}",
            f"{row['ppl_ratio_reference']:.4f}", f"{row['kl']:.4f}", f"{row['misses']:.3f}",
            f"{row['to_lru']:.3f}", f"{row['to_lrfu']:.3f}", gains_text(row["gains"]),
        )  # fmt: skip
    found.caption = (
        f"Misses: expert look-ups not found, of all layers, in caches of {cache:.0%} of a layer's experts under LRFU "
        f"of decay {prior['decay']:g}; to LRU and to LRFU: over those of the base under that policy. ratio: of "
        "perplexity to the base's; to best: to that of the best of the base and adapters without gains, of which the "
        "budget is. " + report.KL_MEANING.format(compared="base")
    )
    return found


def gains_text(gains: list[float]) -> str:
    """The gain of each layer, or of many layers their range."""
    if len(gains) > 12:
        return f"{min(gains):.3f} to {max(gains):.3f}"
    return " ".join(f"{gain:.3f}" for gain in gains)
