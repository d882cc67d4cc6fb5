"""Results as tables and sentences (callers get renderables), and as `plots`. Progress bars go to standard error."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from remoe_adapt._support import flatten, printable, size_text
from remoe_adapt.cli.rows import arm_rows
from remoe_adapt.errors import RemoeError

Row = Mapping[str, Any]

KL_MEANING = "KL: mean over tokens of KL({compared} || point) of the next-token distributions, in nats."
TOP1_MEANING = "Top-1: share of tokens for which it holds the same token for the likeliest as the {compared}."
HIT_RATE_MEANING = (
    "policy@c: share of expert look-ups found in a per-layer cache of max(K, floor(c * E)) experts, emptied where a "
    "document begins; all look-ups of a token see the cache as the previous token left it. policy@c/lookup: each "
    "look-up sees it as the look-up before left it, the figure that others publish."
)


def hit_keys(row: Row) -> list[str]:
    """The `policy@cache` keys of a row, in order."""
    return [key for key in row if "@" in key]


def eval_table(result: Mapping[str, Any]) -> Table:
    """The rows of `evaluate` as a table."""
    compared = "against" if result.get("against") else "base"
    found = table(
        f"{result['tokens']} tokens of {', '.join(result.get('data', ())) or 'the given text'}, "
        f"windows of {result['window']}; experts: {_arithmetic(result['arithmetic'])}",
        "strength", "CE", "ppl", f"ratio to {compared}", "to control", "KL", "top-1", "EOR", *hit_keys(result["base"]),
        "load entropy",
    )  # fmt: skip
    for label, row in arm_rows(result):
        found.add_row(
            label, f"{row['ce']:.4f}", *_perplexity(row), f"{row['kl']:.4f}", percent(row["top1_agreement"]),
            _change(row["eor"], result["base"]["eor"]), *(percent(row[key]) for key in hit_keys(result["base"])),
            f"{row['load_entropy']:.3f}",
        )  # fmt: skip
    found.caption = (
        f"{KL_MEANING.format(compared=compared)} {TOP1_MEANING.format(compared=compared)} {HIT_RATE_MEANING}"
    )
    return found


def domain_table(result: Mapping[str, Any]) -> Table:
    """What `evaluate_domains` found, which is the result's `domains`."""
    compared = "against" if result.get("against") else "base"
    keys = [key for key in hit_keys(result["domains"][0]["base"]) if not key.endswith("/lookup")]
    found = table(
        "by domain, decoded token by token", "domain", "tokens", "strength", f"ratio to {compared}", "KL", "top-1",
        "EOR", *keys,
    )  # fmt: skip
    for domain in result["domains"]:
        name, tokens = Text(domain["domain"]), str(domain["tokens"])
        for label, row in arm_rows(domain):
            found.add_row(
                name, tokens, label, f"{row['ppl_ratio']:.4f}", f"{row['kl']:.4f}", percent(row["top1_agreement"]),
                _change(row["eor"], domain["base"]["eor"]), *(percent(row[key]) for key in keys),
            )  # fmt: skip
            name, tokens = Text(""), ""
        found.add_section()
    return found


def points_table(facts: Row) -> Table:
    """The points of `report_facts`."""
    found = table(
        printable(facts["family"]),
        "strength",
        "ratio to base",
        "KL",
        "top-1",
        "EOR",
        "misses",
        "to base",
        "tokens",
        "from",
    )
    for point in facts["points"]:
        found.add_row(
            f"{point['strength']:g}", optional(point["ppl_ratio"], ".4f"), optional(point["kl"], ".4f"),
            *(percent(point[key]) for key in ("top1_agreement", "eor", "misses", "misses_to_base")),
            optional(point["tokens"], ".0f"), point["source"] or "not measured",
        )  # fmt: skip
    found.caption = "Misses: share of expert look-ups not found in an LRU cache for 25 % of each layer's experts."
    return found


def afterwards(result: dict[str, Any], shown: list[Any], action: Callable[[], object], done: str) -> None:
    """Do what comes after the work, and say that it is done; what was found is shown all the same when it fails."""
    try:
        action()
        shown.append(done)
    except RemoeError as error:
        result.update(ok=False, error=str(error))
        shown.append(f"error: {error}")


def read_table(result: Mapping[str, Any]) -> Table:
    """What decoding a memory-mapped file took, of the rows of `evaluate_gguf`; empty where the system does not tell."""
    read_mib = result["base"]["mib_per_token"]
    cache = result["expert_cache"]
    how = "memory-mapped" if cache is None else f"memory-mapped, read ahead into an expert cache of {cache}"
    found = table(
        f"read from storage, token by token ({size_text(result['file_bytes'])}, {how})",
        "strength", "MiB/token", "to base", "major faults/token", "swapped experts", "file in memory",
    )  # fmt: skip
    for label, row in arm_rows(result):
        found.add_row(
            label, optional(row["mib_per_token"], ".2f"),
            f"{row['mib_per_token'] / read_mib:.3f}" if read_mib else "",
            optional(row["major_faults_per_token"], ".1f"), percent(row.get("swapped_share")),
            percent(row["in_memory"]),
        )  # fmt: skip
    found.caption = (
        "Swapped: of the chosen experts those that the prior put in another one's place. In memory: when the arm ended."
    )
    return found


def _arithmetic(arithmetic: Row) -> str:
    return f"{arithmetic['name']}, {'exact' if arithmetic['exact'] else 'fast'}"


def layer_table(rows: Sequence[tuple[str, Row]]) -> Table:
    """The `per_layer` of (label, row) pairs."""
    keys = [key for key in rows[0][1]["per_layer"][0] if key != "layer"]
    found = table("layers", "of", "layer", *(key.replace("_", " ") for key in keys))
    for label, row in rows:
        for layer in row["per_layer"]:
            found.add_row(Text(label), str(layer["layer"]), *(f"{layer[key]:.3f}" for key in keys))
    return found


def weight_error_table(result: Row) -> Table:
    """What quantising cost, of a pack."""
    layers, dense = result["weight_error"], result["dense_weight_error"]
    params = list(dict.fromkeys(param for row in layers.values() for param in row))
    found = table("relative error of the weights", "layer", *params)
    for name, row in layers.items():
        found.add_row(Text(printable(name)), *(optional(row.get(param), ".4f") for param in params))
    if dense:
        worst = max(dense, key=lambda name: dense[name])
        found.caption = f"Dense part: {len(dense)} weights, at most {dense[worst]:.4f} ({printable(worst)})."
    return found


def simulate_table(title: str, result: Row) -> Table:
    """What `summarise` says."""
    table = figures_table(title, {key: value for key, value in result.items() if key != "per_layer"})
    table.caption = HIT_RATE_MEANING
    return table


def task_table(result: Mapping[str, Any]) -> Table:
    """Task scores of `evaluate_tasks`, one column per arm."""
    arms = arm_rows(result)
    found = table("task scores (lm-eval)", "task", "metric", *(label for label, _ in arms))
    for task, metrics in result["base"]["tasks"].items():
        for metric in metrics:
            found.add_row(task, metric, *(optional(row["tasks"][task].get(metric), ".4f") for _, row in arms))
    return found


def demo_table(result: Mapping[str, Any]) -> Table:
    """The rows of the demo: what a newcomer should see first."""
    asked, stopped_s = result["tokens_asked"], result["stopped_after_s"]
    stopped = "" if stopped_s is None else f" (of {asked}: stopped after {stopped_s:g} s, see --max-seconds)"
    found = table(
        f"{result['tokens']} tokens of held-out text{stopped}, decoded one at a time, at every strength",
        "strength", "EOR", "ppl", "ratio to base", "to control", "hit rate", "KiB read/token", "stall", "TPOT, ms",
        "load entropy",
    )  # fmt: skip
    for label, row in arm_rows(result):
        read = row["bytes_per_token"]
        found.add_row(
            label, _change(row["eor"], result["base"]["eor"]), *_perplexity(row), percent(_hit_rate(row)),
            "" if read is None else f"{read / 1024:.0f}", percent(row["stall_share"]), optional(row["tpot_ms"], ".2f"),
            f"{row['load_entropy']:.3f}",
        )  # fmt: skip
    cache = result["expert_cache"]
    measured = (
        "replayed LRU cache of 25 % of experts, recorded decode"
        if cache is None
        else f"expert cache of {cache['share']:.0%} of the experts ({cache['policy']}; {cache['arithmetic']}), empty "
        "when a document begins, reads past the page cache. Stall: share of the time spent waiting for reads"
    )
    found.caption = f"EOR: expert overlap of neighbouring tokens. Hit rate: {measured}. TPOT: median time per token."
    return found


def _perplexity(row: Row) -> tuple[str, str, str]:
    """Perplexity, its ratio to the base's, and to the control's."""
    return f"{row['ppl']:.3f}", f"{row['ppl_ratio']:.4f}", optional(row["ppl_ratio_control"], ".4f")


def _hit_rate(row: Row) -> float:
    # A model that cannot have an expert cache is replayed instead, as the table's caption says.
    rate: float = row["lru@0.25"] if row["hit_rate"] is None else row["hit_rate"]
    return rate


def figures_table(title: str, result: Row) -> Table:
    """A result's figures, one per line; nested ones are flattened with dots."""
    found = table(title, "figure", "value")
    for key, value in flatten(result):
        found.add_row(key, _plain(value))
    return found


def doctor_table(rows: Sequence[Row]) -> Table:
    """The probes of `doctor`."""
    table = _texts("what is usable here", "", "check", "found", "what to do")
    for row in rows:
        # Text objects throughout: rich would read brackets in a path or a message as markup.
        mark = Text("ok", "green") if row["ok"] else Text("missing", "red" if row["required"] else "yellow")
        table.add_row(mark, Text(row["name"]), Text(row["value"]), Text(row["remedy"]))
    return table


def contracts_table(result: Row) -> Table:
    """What we rely on in other libraries, and whether it is so in the installed ones."""
    installed = ", ".join(f"{library} {version}" for library, version in result["versions"].items())
    table = _texts(
        f"what we rely on in {installed}", "", "library", "what must be so", "what we put there", "why it is not so"
    )
    for row in result["rows"]:
        mark = Text("ok", "green") if row["ok"] else Text("broken", "red")
        fault = f"{row['fault']} Look at {', '.join(row['used_in'])}." if row["fault"] else ""
        table.add_row(mark, row["library"], Text(row["relies_on"]), Text(row["interposes"]), Text(printable(fault)))
    return table


def profile_table(profiles: Mapping[str, Row]) -> Table:
    """Known profiles, what they promise, and where they come from."""
    table = _texts("device profiles", "name", "description", "memory", "experts kept", "file")
    for name, facts in profiles.items():
        if facts["faults"]:
            cells = (f"{facts['faults']} fault(s): see `remoe profiles check {name}`", "", "")
        else:
            budget_bytes = facts["memory"]["budget_bytes"]
            memory = "all there is" if budget_bytes is None else size_text(budget_bytes)
            cells = (facts["description"], memory, f"{facts['expert_cache']['share']:.0%}")
        table.add_row(Text(name), *map(Text, (*cells, facts["file"])))
    return table


def status_line(status: Row) -> str:
    """The controller's state in one line."""
    experts = status["expert_cache"]
    read = ""
    if experts is not None:
        found = f"hit rate with the prompt {experts['hit_rate']:.1%}, {_read(experts)}"
        read = f"experts {experts['arithmetic']}: {found} | "
    return f"strength {status['strength']:.2f} | {status['swaps']} swap(s) | {read}{status['reason']}"


def _read(experts: Row) -> str:
    ahead = f" ({experts['prefetch_hits']} read ahead)" if experts.get("prefetch_hits") else ""
    return f"{experts['bytes'] / (1 << 20):.1f} MiB read{ahead}, {experts['stall_s']:.1f} s stalled"


def run_summary(result: Row) -> Table:
    """What a `remoe run` did."""
    keys = ("prompt_tokens", "tokens", "ttft_ms", "tpot_ms", "eor")
    status = result["status"]
    figures = {key: result[key] for key in keys} | {key: status[key] for key in ("strength", "swaps", "reason")}
    if status["expert_cache"] is not None:
        read = result["bytes_per_token"]
        figures |= {
            "arithmetic": status["expert_cache"]["arithmetic"],
            "hit_rate": result["hit_rate"],
            "read per token": None if read is None else size_text(read),
            "stall_share": result["stall_share"],
        }
    table = figures_table("summary", figures)
    if status["expert_cache"] is not None:
        table.caption = (
            "hit_rate, read per token and stall_share are of the decode steps after the first token; the line above "
            "counts from the start, the prompt included."
        )
    return table


def demo_samples(result: Mapping[str, Any]) -> list[Text]:
    """Prompts with what the model wrote at each strength."""
    texts = []
    for sample in result["samples"]:
        text = Text(f"\nstrength {sample['strength']:g}: ", "bold")
        texts.append(text.append(sample["prompt"], "dim").append(sample["text"], "default"))
    return texts


@contextmanager
def progress(title: str, total: int | None = None) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of tokens on standard error: (set the total, advance)."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("tokens"))
    with _bar(title, total, *columns, TimeElapsedColumn(), TimeRemainingColumn()) as both:
        yield both


@contextmanager
def byte_progress(title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes on standard error: (set the total, advance)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with _bar(title, None, *columns, TimeRemainingColumn()) as both:
        yield both


@contextmanager
def counting(title: str) -> Iterator[Callable[[], None]]:
    """A count on standard error of things whose number is not known."""
    with _bar(title, None, TextColumn("{task.completed} {task.description}"), TimeElapsedColumn()) as (_, advance):
        yield lambda: advance(1)


@contextmanager
def _bar(
    title: str, total: int | None, *columns: ProgressColumn
) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Shown from the first advance on: work that fails before it leaves its error alone on the screen."""
    # On standard error, so that --json leaves one object alone on standard output.
    bar = Progress(*columns, console=Console(stderr=True))
    task = bar.add_task(title, total=total)

    def advance(count: int) -> None:
        if not bar.live.is_started:
            # Time that passed before the first advance (loading, mostly) would spoil the estimate of what is left.
            bar.reset(task)
            bar.start()
        bar.advance(task, count)

    try:
        yield (lambda count: bar.update(task, total=count)), advance
    finally:
        if bar.live.is_started:
            bar.stop()


def quiet_libraries() -> None:
    """For a command that loads a model: transformers' own bars and warnings off; bars of downloads stay.

    TRANSFORMERS_VERBOSITY, when it asks for more than errors, says otherwise.
    """
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    if os.environ.get("TRANSFORMERS_VERBOSITY", "error") != "error":
        return
    # transformers switches the hub's bars off together with its own, and a download without a bar looks like a hang.
    downloads = not are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if downloads:
        enable_progress_bars()


def gating_table(result: Mapping[str, Any]) -> Table:
    """The rows of `run_gating`."""
    names = ("what", "device", "family", "type", "T", "E", "K", "D", "prior", "us", "baseline", "ratio", "bar")
    found = table("gates: median time, and its ratio to the baseline's in the same run", *names)
    for row in result["rows"]:
        bar = "" if row["bar"] is None else f"{row['bar_of']} <= {row['bar']:.3g}: {'met' if row['met'] else 'missed'}"
        found.add_row(
            row["what"], row["device"], row["family"], row["dtype"], str(row["T"]), str(row["E"]), str(row["K"]),
            optional(row["D"], "d"), row["prior"] or "", f"{row['us']:.2f}",
            "" if row["baseline"] is None else f"{row['baseline']} ({row['baseline_us']:.2f})",
            optional(row["ratio"], ".2f"), bar,
        )  # fmt: skip
    if result["skipped"]:
        found.caption = "; ".join(f"{what}: {why}" for what, why in result["skipped"].items())
    return found


def demo_meaning(result: Mapping[str, Any]) -> str:
    """One sentence that says what the demo's table means, from its own figures."""
    base = result["base"]
    if not result["points"]:
        return "This family holds no point above strength 0: nothing to compare."
    best = max(result["points"], key=_hit_rate)
    before, after = _hit_rate(base), _hit_rate(best)
    # Fetches are misses, so their ratio is what a reader saves; hit rates would understate it.
    fewer = 1 - (1 - after) / (1 - before) if before < 1 else 0.0
    price = best["ppl_ratio"] - 1
    share = 0.25 if result["expert_cache"] is None else result["expert_cache"]["share"]
    return (
        f"With a cache for {share:.0%} of the experts, the base finds {before:.1%} of the experts it needs; at "
        f"strength {best['strength']:g} it finds {after:.1%}: {fewer:.0%} fewer to fetch from storage, for "
        f"{abs(price):.1%} {'higher' if price >= 0 else 'lower'} perplexity and the same work per token."
    )


def table(title: str, *columns: str) -> Table:
    """For figures: the first column names what a row is of."""
    made = Table(title=title)
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    return made


def _texts(title: str, *columns: str) -> Table:
    """For sentences: cells of several lines, because a reason or a path cut short is none."""
    made = Table(title=title)
    for column in columns:
        made.add_column(column, overflow="fold")
    return made


def _plain(value: Any) -> Text:
    return Text("" if value is None else printable(_rounded(value)))


def _rounded(value: Any) -> str:
    """Numbers as a reader wants them, wherever they stand."""
    if isinstance(value, float):
        return f"{value:.4f}" if abs(value) < 10 else f"{value:.1f}"
    if isinstance(value, list | tuple):
        return ", ".join(f"({_rounded(item)})" if isinstance(item, list | tuple) else _rounded(item) for item in value)
    return str(value)


def optional(value: float | None, form: str, without: str = "") -> str:
    """A number by its format specification; `without` where there is none."""
    return without if value is None else format(value, form)


def percent(value: float | None) -> str:
    """A share of 1; empty where there is none."""
    return "" if value is None else f"{100 * value:.1f} %"


def _change(value: float, base: float) -> str:
    """A share, and its change relative to the base's."""
    # Relative to 0 there is no change to tell.
    return percent(value) if value == base or not base else f"{percent(value)} ({value / base - 1:+.0%})"
