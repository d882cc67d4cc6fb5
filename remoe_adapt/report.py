"""Results as tables and sentences (callers get renderables), and as `plots`. Progress bars go to standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from remoe_adapt.plots import plot_frontier as plot_frontier
from remoe_adapt.plots import plot_log as plot_log
from remoe_adapt.untrusted import printable

Row = Mapping[str, Any]


def size_text(size_bytes: float) -> str:
    """Bytes in the largest of B, KiB, MiB and GiB that is not more than they are."""
    for unit, digits, unit_bytes in (("GiB", 2, 1 << 30), ("MiB", 1, 1 << 20), ("KiB", 1, 1 << 10)):
        if size_bytes >= unit_bytes:
            return f"{size_bytes / unit_bytes:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"


def hit_keys(row: Row) -> list[str]:
    """The `policy@cache` keys of a row, in order."""
    return [key for key in row if "@" in key]


def arm_rows(result: Mapping[str, Any]) -> list[tuple[str, Row]]:
    """(label, row) of base, control, points and priors on the base, in that order."""
    rows: list[tuple[str, Row]] = [("base", result["base"])]
    if result.get("control"):
        rows.append(("control", result["control"]))
    rows += [(f"{row['strength']:.2f}", row) for row in result["points"]]
    return rows + [(f"{row['recency']} {row['recency_gain']:g}", row) for row in result.get("priors", ())]


def eval_table(result: Mapping[str, Any]) -> Table:
    """The rows of `evaluate` as a table."""
    table = _table(
        f"{result['tokens']} tokens of {', '.join(result.get('data', ())) or 'the given text'}, "
        f"windows of {result['window']}",
        "strength", "CE", "ppl", "ratio to base", "to control", "KL", "EOR", *hit_keys(result["base"]), "load entropy",
    )  # fmt: skip
    for label, row in arm_rows(result):
        table.add_row(
            label,
            f"{row['ce']:.4f}",
            f"{row['ppl']:.3f}",
            f"{row['ppl_ratio']:.4f}",
            _optional(row["ppl_ratio_control"], ".4f"),
            f"{row['kl']:.4f}",
            _change(row["eor"], result["base"]["eor"]),
            *(_percent(row[key]) for key in hit_keys(result["base"])),
            f"{row['load_entropy']:.3f}",
        )
    return table


def task_table(result: Mapping[str, Any]) -> Table:
    """Task scores of `evaluate_tasks`, one column per arm."""
    arms = [("base", result["base"]), *([("control", result["control"])] if result["control"] else [])]
    arms += [(f"{row['strength']:.2f}", row) for row in result["points"]]
    table = _table("task scores (lm-eval)", "task", "metric", *(label for label, _ in arms))
    for task, metrics in result["base"]["tasks"].items():
        for metric in metrics:
            table.add_row(task, metric, *(_optional(row["tasks"][task].get(metric), ".4f") for _, row in arms))
    return table


def demo_table(result: Mapping[str, Any]) -> Table:
    """The rows of the demo: what a newcomer should see first."""
    table = _table(
        f"{result['tokens']} tokens of held-out text, decoded one at a time, at every strength",
        "strength", "EOR", "ppl", "ratio to base", "to control", "hit rate", "KiB read/token", "stall", "TPOT, ms",
        "load entropy",
    )  # fmt: skip
    for label, row in arm_rows(result):
        read = row["bytes_per_token"]
        table.add_row(
            label,
            _change(row["eor"], result["base"]["eor"]),
            f"{row['ppl']:.3f}",
            f"{row['ppl_ratio']:.4f}",
            _optional(row["ppl_ratio_control"], ".4f"),
            _percent(_hit_rate(row)),
            "" if read is None else f"{read / 1024:.0f}",
            "" if row["stall_share"] is None else _percent(row["stall_share"]),
            _optional(row["tpot_ms"], ".2f"),
            f"{row['load_entropy']:.3f}",
        )
    cache = result["expert_cache"]
    measured = (
        "replayed LRU cache of 25 % of experts, recorded decode"
        if cache is None
        else f"expert cache of {cache['share']:.0%} of the experts ({cache['policy']}), empty when a document begins, "
        "reads past the page cache. Stall: share of the time spent waiting for reads"
    )
    table.caption = f"EOR: expert overlap of neighbouring tokens. Hit rate: {measured}. TPOT: median time per token."
    return table


def _hit_rate(row: Row) -> float:
    measured: float | None = row["hit_rate"]
    return row["lru@0.25"] if measured is None else measured


def figures_table(title: str, result: Row) -> Table:
    """A result's figures, one per line; nested ones are flattened with dots."""
    table = _table(title, "figure", "value")
    for key, value in _flat(result):
        table.add_row(key, _plain(value))
    return table


def doctor_table(rows: Sequence[Row]) -> Table:
    """The probes of `doctor`."""
    table = Table(title="what is usable here", show_lines=False)
    for name in ("", "check", "found", "what to do"):
        table.add_column(name, overflow="fold")
    for row in rows:
        mark = Text("ok", "green") if row["ok"] else Text("missing", "red" if row["required"] else "yellow")
        table.add_row(mark, Text(row["name"]), Text(row["value"]), Text(row["remedy"]))
    return table


def profile_table(profiles: Mapping[str, Row]) -> Table:
    """Known profiles, what they promise, and where they come from."""
    table = Table(title="device profiles")
    for name in ("name", "description", "memory", "experts kept", "file"):
        table.add_column(name, overflow="fold")
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
    read = "" if experts is None else f"hit rate {experts['hit_rate']:.1%}, {_read(experts)} | "
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
        figures |= {key: result[key] for key in ("hit_rate", "bytes_per_token", "stall_share")}
    return figures_table("summary", figures)


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
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield (lambda count: bar.update(task, total=count)), (lambda count: bar.advance(task, count))


@contextmanager
def byte_progress(title: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """A bar of bytes on standard error: (set the total, advance)."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(True), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield (lambda count: bar.update(task, total=count)), (lambda count: bar.advance(task, count))


@contextmanager
def counting(title: str) -> Iterator[Callable[[], None]]:
    """A count on standard error of things whose number is not known."""
    columns = (TextColumn("{task.completed} {task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=None)
        yield lambda: bar.advance(task)


def gating_table(result: Mapping[str, Any]) -> Table:
    """The rows of `run_gating`."""
    names = ("what", "device", "family", "type", "T", "E", "K", "D", "prior", "us", "baseline", "ratio", "bar")
    table = _table("gates: median time, and its ratio to the baseline's in the same run", *names)
    for row in result["rows"]:
        bar = "" if row["bar"] is None else f"{row['bar_of']} <= {row['bar']:.3g}: {'met' if row['met'] else 'missed'}"
        table.add_row(
            row["what"], row["device"], row["family"], row["dtype"], str(row["T"]), str(row["E"]), str(row["K"]),
            _optional(row["D"], "d"), row["prior"] or "", f"{row['us']:.2f}",
            "" if row["baseline"] is None else f"{row['baseline']} ({row['baseline_us']:.2f})",
            _optional(row["ratio"], ".2f"), bar,
        )  # fmt: skip
    if result["skipped"]:
        table.caption = "; ".join(f"{what}: {why}" for what, why in result["skipped"].items())
    return table


def demo_meaning(result: Mapping[str, Any]) -> str:
    """One sentence that says what the demo's table means, from its own figures."""
    base = result["base"]
    if not result["points"]:
        return "This family holds no point above strength 0: nothing to compare."
    best = max(result["points"], key=_hit_rate)
    before, after = _hit_rate(base), _hit_rate(best)
    fewer = 1 - (1 - after) / (1 - before) if before < 1 else 0.0
    price = best["ppl_ratio"] - 1
    share = 0.25 if result["expert_cache"] is None else result["expert_cache"]["share"]
    return (
        f"With a cache for {share:.0%} of the experts, the base finds {before:.1%} of the experts it needs; at "
        f"strength {best['strength']:g} it finds {after:.1%}: {fewer:.0%} fewer to fetch from storage, for "
        f"{abs(price):.1%} {'higher' if price >= 0 else 'lower'} perplexity and the same work per token."
    )


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number == 0 else "right")
    return table


def _flat(row: Row, prefix: str = "") -> list[tuple[str, Any]]:
    flat: list[tuple[str, Any]] = []
    for key, value in row.items():
        flat += _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else [(f"{prefix}{key}", value)]
    return flat


def _plain(value: Any) -> Text:
    if isinstance(value, float):
        return Text(f"{value:.4f}")
    return Text("" if value is None else printable(value))


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _change(value: float, base: float) -> str:
    """A share, and its change relative to the base's."""
    return _percent(value) if value == base else f"{_percent(value)} ({value / base - 1:+.0%})"
