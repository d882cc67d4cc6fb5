"""What a report says, as one JSON object: from certificates, which anybody may have written, or measured just now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from remoe_adapt._support import printable
from remoe_adapt.errors import FamilyError
from remoe_adapt.family import Family
from remoe_adapt.recency_settings import Recency, is_number

# The cache whose misses a report shows: of the usual ones the one that points are chosen for.
CACHE = "lru@0.25"
FIGURES = ("ppl_ratio", "ppl_ratio_control", "kl", "top1_agreement", "eor", "load_entropy")
_OF_DOMAIN = ("ppl_ratio", "kl", "top1_agreement", "tokens")
# More cannot be read on a page, and whoever wrote the file may have wanted to use up memory.
_MOST_POINTS, _MOST_LAYERS, _MOST_DOMAINS, _MOST_NAMES = 64, 1024, 64, 16
_MOST = 1e12


def report_facts(
    family: Family,
    *,
    measured: Mapping[str, Any] | None = None,
    frontier: Mapping[str, Any] | None = None,
    environment: Mapping[str, str] | None = None,
    command: str = "",
) -> dict[str, Any]:
    """The numbers of a family's report.

    measured: of `evaluate` with `per_layer`, with `domains` of `evaluate_domains` and names of the `data` where they
        are known; without it figures are those of the certificates.
    frontier: of `read_frontier`.
    environment: machine, versions and commit, by name; command: that makes the report again.

    Returns `family`, `base` (`id`, `fingerprint` and, where known, `eor`, `misses`, `layers`), `points` and `control`
    of `{strength, adapter, recency, source, misses, misses_to_base, tokens, data, commit, version, layers, domains}`
    and FIGURES (None where unknown), `frontier`, `environment` and `command`. `misses`: share of expert look-ups not
    found in CACHE; `misses_to_base`: over the base's. `layers`: `eor` and `misses` of each layer. Text of others is
    printable and short.

    Raises FamilyError for more points or layers than a page can show.
    """
    if len(family.points) > _MOST_POINTS:
        raise FamilyError(
            f"{printable(family.path)} has {len(family.points)} points, a report shows at most {_MOST_POINTS}."
        )
    rows = {row["strength"]: row for row in (measured or {}).get("points", ())}
    base = _base(measured["base"] if measured else _base_of(family))
    points = []
    for point in family.points:
        found = _measured(rows[point.strength], measured) if measured else point.certificate
        adapter = None if point.adapter is None else printable(point.adapter)
        points.append({"strength": point.strength, "adapter": adapter} | _point(point.recency, found, base, measured))
    control = None
    if family.control is not None:
        found = family.control.certificate
        if measured and measured.get("control"):
            found = _measured(measured["control"], measured)
        control = {"strength": None, "adapter": printable(family.control.adapter)} | _point(None, found, base, measured)
    return {
        "family": printable(family.path),
        "base": {"id": printable(family.base_id), "fingerprint": printable(family.fingerprint, 80)} | base,
        "points": points,
        "control": control,
        "frontier": frontier,
        "environment": {printable(key): printable(value) for key, value in (environment or {}).items()},
        "command": printable(command, 2000),
    }


def _base_of(family: Family) -> Mapping[str, Any]:
    """The base's own figures, which a certificate holds."""
    for point in family.points:
        kept = (point.certificate or {}).get("base")
        if isinstance(kept, Mapping):
            return kept
    return {}


def _base(row: Mapping[str, Any]) -> dict[str, Any]:
    hits = _number(row, CACHE)
    return {"eor": _number(row, "eor"), "misses": None if hits is None else 1 - hits, "layers": _layers(row)}


def _measured(row: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `evaluate` as a certificate would hold it."""
    domains = {
        domain["domain"]: {"tokens": domain["tokens"], **each}
        for domain in result.get("domains", ())
        for each in ([domain["control"]] if row["strength"] is None else domain["points"])
        if each["strength"] == row["strength"]
    }
    return {**row, "tokens": result["tokens"], "data": result.get("data", ()), "domains": domains}


def _point(
    recency: Recency | None, found: Mapping[str, Any] | None, base: Mapping[str, Any], measured: object
) -> dict[str, Any]:
    row = found or {}
    hits = _number(row, CACHE)
    misses = None if hits is None else 1 - hits
    data = row.get("data")
    names = list(data)[:_MOST_NAMES] if isinstance(data, Sequence) and not isinstance(data, str) else []
    return {
        "recency": None if recency is None else _recency(recency),
        "source": "measured now" if measured else "certificate" if found is not None else None,
        **{key: _number(row, key) for key in FIGURES},
        "misses": misses,
        "misses_to_base": misses / base["misses"] if misses is not None and base["misses"] else None,
        "tokens": _number(row, "tokens"),
        "data": [printable(name, 60) for name in names],
        "commit": None if measured else _text(row.get("commit")),
        "version": None if measured else _text(row.get("remoe_adapt")),
        "layers": _layers(row),
        "domains": _domains(row.get("domains")),
    }


def _recency(recency: Recency) -> dict[str, Any]:
    gains = recency.gains()
    if len(gains) > _MOST_LAYERS:
        raise FamilyError(f"a point has gains of {len(gains)} layers, a report shows at most {_MOST_LAYERS}.")
    return {"mode": recency.mode, "decay": recency.decay, "share": recency.share, "gain_per_layer": list(gains)}


def _layers(row: Mapping[str, Any]) -> dict[str, list[float]] | None:
    """`eor` and `misses` of each layer; None where they are not all there."""
    rows = row.get("per_layer")
    if not isinstance(rows, Sequence) or isinstance(rows, str) or not rows:
        return None
    if len(rows) > _MOST_LAYERS:
        raise FamilyError(f"a certificate has {len(rows)} layers, a report shows at most {_MOST_LAYERS}.")
    found: dict[str, list[float]] = {"eor": [], "misses": []}
    for layer in rows:
        values = [_number(layer, key) if isinstance(layer, Mapping) else None for key in ("eor", CACHE)]
        if values[0] is None or values[1] is None:
            return None
        found["eor"].append(values[0])
        found["misses"].append(1 - values[1])
    return found


def _domains(entry: Any) -> dict[str, dict[str, float | None]]:
    if not isinstance(entry, Mapping):
        return {}
    return {
        printable(name, 60): {key: _number(row, key) for key in _OF_DOMAIN}
        for name, row in list(entry.items())[:_MOST_DOMAINS]
        if isinstance(row, Mapping)
    }


def _number(row: Mapping[str, Any], key: str) -> float | None:
    value: Any = row.get(key)
    return float(value) if is_number(value) and math.isfinite(value) and abs(value) <= _MOST else None


def _text(value: Any) -> str | None:
    return printable(value, 60) if isinstance(value, str) else None
