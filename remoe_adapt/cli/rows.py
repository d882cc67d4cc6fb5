"""Results as rows, one per line of a CSV: the keys of the JSON object, and which arm, trace or layer they are of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]


def arm_rows(result: Mapping[str, Any]) -> list[tuple[str, Row]]:
    """(label, row) of another model that is compared with, base, control, points and priors on the base."""
    rows: list[tuple[str, Row]] = [("against", result["against"])] if result.get("against") else []
    rows.append(("base", result["base"]))
    if result.get("control"):
        rows.append(("control", result["control"]))
    rows += [(f"{row['strength']:.2f}", row) for row in result["points"]]
    return rows + [(f"{row['recency']} {row['recency_gain']:g}", row) for row in result.get("priors", ())]


def with_layers(label: Row, row: Row) -> Iterator[Row]:
    """The row itself, and one for each of its layers where it has them."""
    yield {**label, **{key: value for key, value in row.items() if key != "per_layer"}}
    for layer in row.get("per_layer", ()):
        yield {**label, **layer}


def of_arms(result: Mapping[str, Any]) -> Iterator[Row]:
    """For `evaluate` (domains and task scores follow, if there are any) and the demo: a row for each arm and layer."""
    for compared in (result, *result.get("domains", ()), result.get("tasks", {})):
        if "base" in compared:
            domain = {"domain": compared["domain"]} if "domain" in compared else {}
            for label, row in arm_rows(compared):
                yield from with_layers({"arm": label} | domain, row)


def of_trace(result: Mapping[str, Any]) -> Iterator[Row]:
    """For `remoe simulate`: the trace, then its layers."""
    yield from with_layers({}, result)


def of_named_arms(result: Mapping[str, Any]) -> Iterator[Row]:
    """For the benchmarks that decode: a row for each arm."""
    yield from ({"arm": name, **row} for name, row in result["arms"].items())


def of_rows(result: Mapping[str, Any]) -> Iterator[Row]:
    """For results that have rows already."""
    yield from result["rows"]


def of_profiles(result: Mapping[str, Any]) -> Iterator[Row]:
    """For `remoe profiles list`: a row for each profile."""
    yield from ({"profile": name, **row} for name, row in result["profiles"].items())


def of_figures(result: Mapping[str, Any]) -> Iterator[Row]:
    """For a result that is one row itself."""
    yield result
