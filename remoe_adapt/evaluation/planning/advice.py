"""What to type next, and what a plan does not know."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from remoe_adapt.evaluation.planning.hit_rates import BASE_SOURCE, HitRates
from remoe_adapt.evaluation.planning.machine import Compute, Storage
from remoe_adapt.evaluation.planning.sources import Source
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
    dense = "as stored" if each.dense_bits is None else f"{each.dense_bits} bits"
    return f"{each.bits} bits, dense part {dense}"


def commands(source: Source, options: PlanOptions, each: Footprint, row: dict[str, Any]) -> dict[str, Any]:
    """`commands`: lines of a shell, in order; `python`: the same as a call. Of the row that is recommended, with the
    recency prior where experts come from storage."""
    lines, loading = [], [repr(source.name), f"profile={_profile(options)!r}"]
    run = ["remoe", "run", source.name, "--profile", _profile(options)]
    out: Path | str | None = options.storage if row["format"].startswith("pack ") else None
    if each.bits is not None:
        out = f"{Path(source.name).stem if source.is_gguf else Path(source.name).name}-q{each.bits}"
        pack = ["remoe", "pack", source.name, out, "--bits", str(each.bits)]
        lines.append(shlex.join(pack + ([] if each.dense_bits is None else ["--dense-bits", str(each.dense_bits)])))
    if out is not None:
        run += ["--storage", str(out)]
        loading.append(f"storage={str(out)!r}")
    if row["share"] < 1.0:
        run += ["--recency", "resident", "--recency-gain", f"{_GAIN:g}"]
        loading.append(f'recency="resident", recency_gain={_GAIN:g}')
    if options.family is not None:
        run += ["--family", options.family]
        loading.append(f"family={options.family!r}")
    # A GGUF brings no tokenizer that transformers reads, which `remoe run` needs.
    if not source.is_gguf:
        lines.append(shlex.join([*run, "--prompt", "Once upon a time"]))
    return {"commands": lines, "python": f"get_remoe_model({', '.join(loading)})"}


def _profile(options: PlanOptions) -> str:
    return options.profile_name or options.profile.name


def unknowns(
    source: Source,
    options: PlanOptions,
    storage: Storage,
    compute: Compute,
    hits: HitRates,
    parameters: Parameters,
) -> list[str]:
    """Sentences on what was assumed, or left out."""
    found = []
    if hits.source == BASE_SOURCE:
        found.append(
            "How this model routes: hit rates are those of another model. Record a trace where it runs (remoe trace) and "
            "give --trace."
        )
    found.append(
        "How it routes under the recency prior, and what that costs it in quality: both are from the shipped model."
    )
    if storage.bytes_per_s is None:
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
    if not source.has_files:
        found.append("What the files really hold: sizes are from the configuration.")
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
