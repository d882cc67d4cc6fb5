"""`remoe eval MODEL.gguf`: what priors and a family cost and save in llama.cpp itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import RenderableType

from remoe_adapt.cli import report, rules
from remoe_adapt.cli.options import CommandResult, budget, numbers, words
from remoe_adapt.cli.rows import arm_rows
from remoe_adapt.errors import ConfigError
from remoe_adapt.recency_settings import DEFAULT_MODE, MODES, Recency

GAINS = "0.1,0.2,0.3"
# Of the command, what concerns models in this process alone, and what GGUF files alone.
_OF_TRANSFORMERS = (
    "tasks", "task_folder", "limit", "certified", "against", "storage", "arithmetic", "device", "dtype",
)  # fmt: skip
_OF_GGUF = ("config", "warm_tokens", "threads")


def check_kind(values: Mapping[str, Any], command: Callable[..., object], gguf: bool) -> None:
    """Raises ConfigError for an option of `remoe eval` that does nothing for this kind of model."""
    rules.check_kind(values, command, _OF_TRANSFORMERS, _OF_GGUF, gguf=gguf, does="runs")


def priors_of(recency: str | None, gains: str | None, decay: float | None, share: float | None) -> list[Recency]:
    """A prior of each mode and gain; none where nobody asked for one. Raises ConfigError for what cannot be."""
    if recency is None and gains is None and decay is None and share is None:
        return []
    modes = words(recency or DEFAULT_MODE) or [recency or ""]
    without = [mode for mode in modes if mode in MODES and not MODES[mode].takes_decay]
    if decay is not None and without:
        raise ConfigError(f"--recency-decay does nothing in the mode {', '.join(without)}: leave one of them out.")
    without = [mode for mode in modes if mode in MODES and not MODES[mode].default_share]
    if share is not None and without:
        raise ConfigError(f"--recency-share does nothing in the mode {', '.join(without)}: leave one of them out.")
    tried = numbers(GAINS if gains is None else gains)
    return [Recency.of(mode, gain, decay, share) for mode in modes for gain in tried]


def eval_gguf(
    model: str,
    *,
    data: list[Path],
    family: str | None,
    max_tokens: int | None,
    policy: list[str],
    cache: list[float],
    window: int | None,
    recency: str | None,
    recency_gain: str | None,
    recency_decay: float | None,
    recency_share: float | None,
    plot: Path | None,
    per_layer: bool,
    force: bool,
    config: str | None,
    warm_tokens: int,
    threads: int | None,
    expert_cache: str | None = None,
) -> CommandResult:
    """The result of `evaluate_gguf`, and its tables; options as the command has them."""
    priors = priors_of(recency, recency_gain, recency_decay, recency_share)
    from remoe_adapt.checkpoints import load_tokenizer, model_config
    from remoe_adapt.cli.plots import plot_frontier
    from remoe_adapt.engines.llamacpp import (
        GgufMeasuring,
        GgufTokenizer,
        LlamaVocabulary,
        evaluate_gguf,
        renormalises,
    )
    from remoe_adapt.evaluation import check_data
    from remoe_adapt.family import Family
    from remoe_adapt.texts import read_shared

    report.quiet_libraries()
    check_data(data, max_tokens)
    with LlamaVocabulary(model) as vocabulary:
        renormalise, note = renormalises(vocabulary.architecture, None if config is None else model_config(config))
        if not vocabulary.has_tokenizer and config is None:
            raise ConfigError(
                f"{Path(model).name} has no tokenizer in it: give the folder or hub id that it was made from, --config."
            )
        tokenizer = GgufTokenizer(vocabulary) if vocabulary.has_tokenizer else load_tokenizer(str(config))
        documents = read_shared(data, tokenizer, max_tokens)
    options = GgufMeasuring(
        priors=priors, family=None if family is None else Family.load(family), renormalise=renormalise, window=window,
        policies=policy, caches=cache, per_layer=per_layer, warm_tokens=warm_tokens, threads=threads, force=force,
        expert_cache=None if expert_cache is None else budget(expert_cache),
    )  # fmt: skip
    arms = 1 + len(priors)
    if options.family is not None:
        arms += len(options.family.points) + (options.family.control is not None)
    with report.progress("decoding in llama.cpp", sum(map(len, documents)) * arms) as (_, advance):
        found = evaluate_gguf(model, documents, options, on_tokens=advance)
    result = {"model": model, "family": family, "against_model": None, **found, "data": [path.name for path in data]}
    result["notes"] += [note] if note else []
    shown: list[RenderableType] = [report.eval_table(result), report.read_table(result)]
    shown += [f"note: {each}" for each in result["notes"]]
    if per_layer:
        shown.append(report.layer_table(arm_rows(result)))
    if plot is not None:
        report.afterwards(result, shown, lambda: plot_frontier(result, plot), f"plot written to {plot}")
    return result, shown
