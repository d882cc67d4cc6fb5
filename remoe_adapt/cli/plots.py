"""Plots, by matplotlib; extra: plot. Written whole or not at all; the format is the file's suffix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from numbers import Real
from pathlib import Path
from typing import Any

from remoe_adapt._support import blank_figure, check_file, parse_json, printable
from remoe_adapt.errors import ConfigError, DataError

_MAX_LINE_BYTES = 1 << 20
_ALWAYS = ("time_s", "strength")
# These are null in a sample where there is none: no expert cache, no step so far, sensors without a word.
_AT_TIMES = ("pressure", "hits", "misses", "budget_bytes", "tpot_ms")


def check_plot(path: Path, option: str) -> None:
    """Raises MissingDependencyError without matplotlib, ConfigError for a place or a format that cannot be written."""
    formats = blank_figure(1, 1).canvas.get_supported_filetypes()
    check_file(path, option, [f".{suffix}" for suffix in sorted(formats)])


def plot_frontier(results: Mapping[str, Any], path: str | Path) -> None:
    """EOR against perplexity ratio: a line through the base and the family's points, one through the base and its
    recency priors in order of their gains, and the control.

    Raises MissingDependencyError without matplotlib, ConfigError when the file cannot be written.
    """
    figure = blank_figure(6, 4.5)
    axes = figure.subplots()
    base = results["base"]
    priors = sorted(results.get("priors", ()), key=lambda row: row["recency_gain"])
    curves = [("family", "strength", results["points"])] if results["points"] or not priors else []
    if priors:
        curves.append((f"prior on the base: {priors[0]['recency']}, by gain", "recency_gain", priors))
    for label, key, rows in curves:
        curve = [base, *rows]
        axes.plot([row["eor"] for row in curve], [row["ppl_ratio"] for row in curve], marker="o", label=label)
        for row in curve:
            place = row["eor"], row["ppl_ratio"]
            axes.annotate(f"{row.get(key, 0.0):g}", place, (4, 4), textcoords="offset points")
    if results.get("control"):
        control = results["control"]
        axes.plot(control["eor"], control["ppl_ratio"], "x", color="black", label="control: next-token loss only")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set_xlabel("expert overlap ratio (EOR)")
    compared = "perplexity of the other model" if results.get("against") else "base perplexity"
    axes.set_ylabel(f"perplexity / {compared}")
    axes.legend()
    _write(figure, path)


def plot_log(log: str | Path, path: str | Path) -> None:
    """Pressure and strength, hit rate, cache budget and TPOT over time, from a file of `Controller.log_to`.

    Raises DataError when the log has no samples, MissingDependencyError without matplotlib, ConfigError when the plot
    cannot be written.
    """
    samples = read_samples(log)
    figure = blank_figure(8, 7)
    start_s = samples[0]["time_s"]
    times_s = [sample["time_s"] - start_s for sample in samples]
    top, middle, room, bottom = figure.subplots(4, sharex=True)
    _curve(top, times_s, [sample["pressure"] for sample in samples], "pressure")
    # Strength jumps at a swap; a slope between two samples would show values that never were.
    top.step(times_s, [sample["strength"] for sample in samples], where="post", label="strength")
    top.set_ylim(-0.05, 1.05)
    top.legend(loc="upper right")
    _curve(middle, times_s, hit_rates(samples), "hit rate")
    middle.set_ylim(0, 1.02)
    budgets = [sample["budget_bytes"] for sample in samples]
    _curve(room, times_s, [None if size is None else size / (1 << 20) for size in budgets], "cache budget, MiB")
    room.set_ylim(bottom=0)
    _curve(bottom, times_s, [sample["tpot_ms"] for sample in samples], "TPOT, ms")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("seconds")
    for axes in (middle, room, bottom):
        axes.legend(loc="upper right")
    _write(figure, path)


def read_samples(log: str | Path) -> list[dict[str, Any]]:
    """The samples of a file of `Controller.log_to`, in order. Raises DataError when there is none."""
    samples = []
    try:
        with Path(log).open("rb") as lines:
            number = 0
            # With a limit, because a file of one endless line would be read into memory whole.
            while line := lines.readline(_MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > _MAX_LINE_BYTES:
                    raise DataError(f"line {number} has more than {_MAX_LINE_BYTES} bytes")
                found = parse_json(line, f"line {number}", DataError)
                if not isinstance(found, dict) or not isinstance(found.get("event"), str):
                    raise DataError(f"line {number} is no event")
                if found["event"] == "sample":
                    samples.append(_checked(found, number))
    except (OSError, DataError) as error:
        raise DataError(
            f"{printable(log)} is no log of a controller ({error}): make one with --log, or log_to."
        ) from error
    if not samples:
        raise DataError(f"{log} has no samples: the monitor was paused, or the run was shorter than one.")
    return samples


def _checked(sample: dict[str, Any], number: int) -> dict[str, Any]:
    for key in (*_ALWAYS, *_AT_TIMES):
        value = sample.get(key)
        good = isinstance(value, Real) and not isinstance(value, bool)
        if not good and not (key in _AT_TIMES and value is None and key in sample):
            raise DataError(f"line {number}: {key} is {printable(repr(value))}, not a number")
    return sample


def hit_rates(samples: Sequence[Mapping[str, Any]]) -> list[float | None]:
    """For each sample the share of look-ups since the one before that were hits; None where there were none, or where
    counters began again (a log holds several runs)."""
    rates: list[float | None] = [None]
    for before, after in pairwise(samples):
        hits, misses = ((after[key] or 0) - (before[key] or 0) for key in ("hits", "misses"))
        # A difference below 0 means that another run began, whose counters start at 0.
        counted = hits >= 0 and misses >= 0 and hits + misses > 0
        rates.append(hits / (hits + misses) if counted else None)
    return rates


def _curve(axes: Any, times_s: Sequence[float], values: Sequence[float | None], label: str) -> None:
    # NaN breaks the line where nothing was measured; leaving the point out would draw across the gap.
    axes.plot(times_s, [float("nan") if value is None else value for value in values], label=label)


def _write(figure: Any, path: str | Path) -> None:
    target = Path(path)
    # The suffix stays, since matplotlib takes the format from it.
    scratch = target.with_name(f".tmp-{target.name}")
    try:
        figure.savefig(scratch)
        scratch.replace(target)
    except (OSError, ValueError) as error:  # OSError: no such folder; ValueError: no such format
        raise ConfigError(f"plot {target} cannot be written ({error}): give a .png, .svg or .pdf file.") from error
    finally:
        scratch.unlink(missing_ok=True)
