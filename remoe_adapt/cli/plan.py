"""`remoe plan`: what fits and how fast it will be, before the download."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from remoe_adapt._support import printable, size_text
from remoe_adapt.cli import options as opt
from remoe_adapt.cli import report
from remoe_adapt.cli.app import app, command
from remoe_adapt.cli.options import CommandResult
from remoe_adapt.cli.report import quiet_libraries


def _csv_rows(result: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield from result["rows"]


@command(app, "plan", _csv_rows)
def plan(
    model: opt.PlannedModel, profile: opt.Profile = None, storage: opt.Storage = None,
    family: opt.FamilyPath = None, trace: opt.PlanTrace = None, config: opt.PlanConfig = None,
    storage_mib: opt.StorageMib = None, ram_mib: opt.RamMib = None, memory: opt.PlanMemory = None,
    share: opt.PlanShare = None, csv: opt.Csv = None, as_json: opt.Json = False,
) -> CommandResult:  # fmt: skip
    """What fits of a model, how much of its experts is hit, and how long a token takes, before its weights are there.

    From a config.json, a safetensors index, headers, or a GGUF header alone; of a hub id its metadata is fetched and
    never weights. Times are of one decoded token on this machine's processor.
    """
    from remoe_adapt.dial import profile_of
    from remoe_adapt.evaluation.planning import PlanOptions, plan_model

    quiet_libraries()
    result = plan_model(
        PlanOptions(
            model, profile_of(profile), profile_name=profile, storage=storage, family=family, trace=trace,
            config=config, storage_mib=storage_mib, ram_mib=ram_mib, memory=memory, share=share,
        )
    )  # fmt: skip
    return result, shown(result)


def shown(result: Mapping[str, Any]) -> list[RenderableType]:
    """A plan for people: what it is, formats, ways to run them, what to type, what is not known."""
    found: list[RenderableType] = [Text(_head(result)), _formats(result)]
    if result["rows"]:
        found += [_ways(result), *_advice(result)]
    else:
        found.append("Nothing fits: give more --memory, or a smaller model.")
    found.append("What this plan does not know:")
    return found + [Text(f"  - {sentence}") for sentence in result["unknown"]]


def _head(result: Mapping[str, Any]) -> str:
    counts, memory = result["parameters"], result["memory"]
    return (
        f"{printable(result['model'])}, from {result['known_from']}: {_billions(counts['total'])} parameters, "
        f"{_billions(counts['active'])} active ({_billions(counts['active'] - counts['embedding'])} without the table "
        f"of embeddings); {counts['layers']} layers, {counts['num_experts']} experts, {counts['top_k']} of a token.\n"
        f"Memory: {size_text(memory['bytes'])} ({memory['source']}), {size_text(memory['kv_bytes'])} of it for the KV "
        "cache."
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.1f}B" if count >= 1e8 else f"{count / 1e6:.1f}M"


def _formats(result: Mapping[str, Any]) -> Table:
    found = report.table("formats", "experts", "to fetch or pack", "dense part", "all experts", "in slots", "share")
    for row in result["formats"]:
        found.add_row(
            Text(row["name"]), size_text(row["stored_bytes"]), size_text(row["dense_bytes"]),
            size_text(row["experts_bytes"]),
            *((size_text(row["budget_bytes"]), report.percent(row["share"])) if row["fits"] else ("does not fit", "")),
        )  # fmt: skip
    return found


def _ways(result: Mapping[str, Any]) -> Table:
    machine = result["machine"]
    storage = machine["storage_bytes_per_s"]
    rate = "unknown" if storage is None else f"{storage / (1 << 20):.0f} MiB/s"
    found = report.table(
        "one token", "experts", "way", "hit rate", "MiB read", "compute ms", "read ms", "TPOT ms", "memory"
    )
    for row in result["rows"]:
        times = (row["compute_ms"], row["read_ms"], row["tpot_ms"])
        found.add_row(
            Text(row["format"]), row["way"], report.percent(row["hit_rate"]),
            f"{row['bytes_per_token'] / (1 << 20):.1f}", *(report.optional(each, ".1f") for each in times),
            size_text(row["memory_bytes"]),
        )  # fmt: skip
    found.caption = (
        f"Hit rates: {printable(result['hit_rates']['source'])}; with the prior (resident, its gain): "
        f"{result['hit_rates']['prior']}. Storage: {rate} ({printable(machine['storage_source'])}). Compute: "
        f"{machine['compute_source']}, {machine['threads']} thread(s)."
    )
    return found


def _advice(result: Mapping[str, Any]) -> list[RenderableType]:
    advice = result["advice"]
    lines = [*advice["commands"], f"or in Python: {advice['python']}"]
    return ["What to type:", *(Text(f"  {line}") for line in lines)]
