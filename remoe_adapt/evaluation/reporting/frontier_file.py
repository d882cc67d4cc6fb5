"""The JSON of `benchmarks/frontier.py`, read as if it came from a stranger: arms of other methods for a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from remoe_adapt._support import printable, read_json
from remoe_adapt.errors import DataError
from remoe_adapt.recency_settings import is_number

# A frontier of three bases and three seeds has some 300 points.
_MAX_BYTES, _MOST_CURVES, _MOST_POINTS, _MOST_BUDGETS, _MOST_CHARACTERS = 16 << 20, 32, 1000, 32, 60
# No figure of ours is above it; larger ones would only squeeze a drawing.
_MOST = 1e6


def read_frontier(path: str | Path) -> dict[str, Any]:
    """`{"budgets": [{"ppl_ratio": r, ARM: misses or None, ...}], "curves": {ARM: [{"ppl_ratio", "misses", "label"}]}}`,
    misses relative to the base's; other keys are left out.

    Raises DataError, which names the file and the first fault.
    """
    path = Path(path)
    found = read_json(path, DataError, max_bytes=_MAX_BYTES)
    where = printable(path)
    if not isinstance(found, dict) or not {"budgets", "curves"} & found.keys():
        raise DataError(
            f"{where} is no frontier: it must hold budgets or curves, as `python benchmarks/frontier.py --json` prints."
        )
    budgets, curves = found.get("budgets", []), found.get("curves", {})
    if not isinstance(budgets, list) or len(budgets) > _MOST_BUDGETS:
        raise DataError(f"{where}: budgets must be a list of at most {_MOST_BUDGETS}.")
    if not isinstance(curves, dict) or len(curves) > _MOST_CURVES:
        raise DataError(f"{where}: curves must be an object of at most {_MOST_CURVES} arms.")
    return {
        "budgets": [_budget(row, f"{where}: budget {place}") for place, row in enumerate(budgets, 1)],
        "curves": {_short(name): _curve(points, f"{where}: curve {_short(name)}") for name, points in curves.items()},
    }


def _budget(row: Any, where: str) -> dict[str, float | None]:
    if not isinstance(row, dict) or len(row) > _MOST_CURVES:
        raise DataError(f"{where} must be an object of at most {_MOST_CURVES} keys.")
    # Beside the arms a budget has their spread and whatever else a benchmark may say.
    arms = {_short(name): value for name, value in row.items() if value is None or is_number(value)}
    for name, value in arms.items():
        _check(value, f"{where}, {name}", is_optional=name != "ppl_ratio")
    if "ppl_ratio" not in arms:
        raise DataError(f"{where} lacks ppl_ratio.")
    return {name: None if value is None else float(value) for name, value in arms.items()}


def _curve(points: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(points, list) or len(points) > _MOST_POINTS:
        raise DataError(f"{where} must be a list of at most {_MOST_POINTS} points.")
    rows = []
    for point in points:
        if not isinstance(point, dict):
            raise DataError(f"{where}: a point must be an object with ppl_ratio and misses.")
        for key in ("ppl_ratio", "misses"):
            _check(point.get(key), f"{where}, {key}")
        label = point.get("label")
        label = _short(label) if isinstance(label, str) else ""
        rows.append({"ppl_ratio": float(point["ppl_ratio"]), "misses": float(point["misses"]), "label": label})
    return rows


def _check(value: Any, where: str, *, is_optional: bool = False) -> None:
    if value is None and is_optional:
        return
    if not is_number(value) or not 0 <= value <= _MOST:
        raise DataError(f"{where} is {printable(repr(value))}, no number from 0 to {_MOST:g}.")


def _short(text: str) -> str:
    return printable(text, _MOST_CHARACTERS)
