"""What to type next, and what a plan does not know."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe_adapt.evaluation.planning.hit_rates import BASE_SOURCE, HitRates
from remoe_adapt.evaluation.planning.machine import Compute
from remoe_adapt.evaluation.planning.sources import Source
from remoe_adapt.evaluation.planning.storage import Storage
from remoe_adapt.expert_cache import Footprint, Parameters
from remoe_adapt.expert_cache.encodings import ggml

if TYPE_CHECKING:
    from remoe_adapt.evaluation.planning.predict import PlanOptions

# The gain whose measured perplexity ratio is 1.005: see docs/benchmarks.md.
_GAIN = 0.1


def names_of(each: Footprint) -> str:
    """What a format is called: "as stored", or by the bits of experts and dense part."""
    if each.bits is None and each.dense_bits is None:
        return "as stored"
    experts, dense = ("as stored" if bits is None else f"{bits} bits" for bits in (each.bits, each.dense_bits))
    return f"{experts}, dense part {dense}"


def commands(
    source: Source, options: PlanOptions, each: Footprint, row: Mapping[str, Any], budget_bytes: int
) -> dict[str, Any]:
    """`commands`: lines of a shell, in order; `python`: the same as a call. Of the row that is recommended, with the
    recency prior where experts come from storage.

    budget_bytes: of its slots.
    """
    lines = []
    settings: dict[str, Any] = {} if options.profile_name is None else {"profile": options.profile_name}
    if row["format"].startswith("pack "):
        settings["storage"] = str(options.storage)
    elif each.bits is not None or each.dense_bits is not None:
        bits = {"--bits": each.bits, "--dense-bits": each.dense_bits}
        stem = Path(source.name).stem if source.is_gguf else Path(source.name).name
        settings["storage"] = out = f"{stem}-q{each.bits or each.dense_bits}"
        chosen = [word for name, value in bits.items() if value is not None for word in (name, str(value))]
        lines.append(shlex.join(["remoe", "pack", source.name, out, *chosen]))
    if (budget := _budget(options, row, budget_bytes, whole=not settings.get("storage"))) is not None:
        settings["expert_cache"] = budget
    if row["share"] < 1.0:
        settings |= {"recency": "resident", "recency_gain": _GAIN}
    if options.family is not None:
        settings["family"] = options.family
    # A GGUF brings no tokenizer that transformers reads, which `remoe run` needs.
    if not source.is_gguf:
        words = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
        lines.append(shlex.join(["remoe", "run", source.name, *words, "--prompt", "Once upon a time"]))
    given = "".join(f", {name}={value!r}" for name, value in settings.items())
    return {"commands": lines, "python": f"get_remoe_model({source.name!r}{given})"}


def _budget(options: PlanOptions, row: Mapping[str, Any], budget_bytes: int, *, whole: bool) -> str | float | None:
    """What `expert_cache=` must say; None: what the profile makes of it is what was planned."""
    profile = options.profile
    if row["share"] == 1.0:
        return None if whole and profile.expert_cache.share == 1.0 and profile.memory.budget_bytes is None else 1.0
    if options.memory is None and options.share is None and profile.memory.budget_bytes is not None:
        return None
    return f"{budget_bytes >> 20}MiB"


def unknowns(
    source: Source,
    options: PlanOptions,
    storage: Storage,
    compute: Compute,
    hits: HitRates,
    parameters: Parameters,
    rows: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Sentences on what was assumed, or left out."""
    found = []
    if hits.source == BASE_SOURCE:
        found.append(
            "How this model routes: hit rates are those of another model. Record a trace where it runs (remoe trace), "
            "and give --trace."
        )
    found.append(
        "How it routes under the recency prior, and what that costs it in quality: both are from the shipped model."
    )
    if storage.bytes_per_s is None and any(row["share"] < 1.0 for row in rows):
        found.append(f"How fast experts are read ({storage.source}): give --storage-mib.")
    elif storage.source == "given":
        found.append("Whether reads of an expert's size reach the rate that was given.")
    if compute.source == "given":
        found.append("How fast products with codes are: all weights are taken to be read at the rate that was given.")
    else:
        found.append(
            f"How fast another machine computes: times are of this one, with {compute.threads} thread(s) of torch and "
            "its other work."
        )
    found.append("The prompt, of whose tokens nearly all experts are read; and how attention grows with the text.")
    if not source.has_files and source.pack is None:
        found.append("What the files really hold: sizes are from the configuration.")
    if source.pack is not None:
        found.append(
            "Where the model itself lies, which loading compares the pack with: commands name it as the pack does."
        )
    if source.predicting_layers:
        found.append(
            f"{source.predicting_layers} layer(s) of the files predict further tokens: transformers does not load them."
        )
    if ggml() is None:
        found.append(
            "How fast codes are with ggml's kernels, which are not installed here: pip install 'remoe-adapt[llamacpp]'."
        )
    if len(set(parameters.chosen_L)) > 1:
        found.append("Layers choose different numbers of experts: one hit rate stands for all.")
    if options.profile.expert_cache.prefetch:
        found.append("What reading ahead saves: every missing expert is counted as waited for.")
    return found
