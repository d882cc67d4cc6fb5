"""The main job in one command: decode base and family over the same held-out text, and show what reuse costs."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from remoe_adapt._support import say_once
from remoe_adapt.checkpoints import device_of, load_tokenizer, load_with_tokenizer
from remoe_adapt.errors import ConfigError, UncacheableError
from remoe_adapt.evaluation.arms import Arm, Arms, arms_of
from remoe_adapt.evaluation.evaluate import Tally
from remoe_adapt.evaluation.generation import COUNTED, cache_figures, generate_text, room_for_reads
from remoe_adapt.evaluation.record import Decoder, fit_for_decode, inference, record_forward
from remoe_adapt.evaluation.shipped import example_folder, held_out
from remoe_adapt.expert_cache import ExpertCache, expert_cache_of, load_with_expert_cache
from remoe_adapt.family import Family

CACHES = (0.25,)
# Steps of a document that are not timed: caches and allocator are still warming up.
WARM_STEPS = 3
GETTING_THEM = (
    "clone the repository, which holds a small trained model and its family, or give --model and --family; "
    "`remoe train MODEL --data FILE --out FAMILY` makes a family for a model of yours"
)


def run_demo(
    model: str | Path | None = None,
    family: str | Path | None = None,
    *,
    data: Sequence[str | Path] = (),
    expert_cache: str | float = 0.25,
    tokens: int = 1000,
    new_tokens: int = 60,
    max_seconds: float = 120.0,
    force: bool = False,
    on_start: Callable[[int], object] | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Decodes base, control and every point of the family over the same text, one token per step, with the KV cache,
    behind an expert cache (its budget is `expert_cache`) that reads from storage and is empty when a document begins.

    Returns `base`, `control` and `points` with the keys of `evaluate` and `tpot_ms` (median over steps; arms take
    turns document by document), `hit_rate`, `bytes_per_token` and `stall_share` (of the time, spent waiting for reads)
    of the expert cache, None where the model cannot have one; `samples` (`{strength, prompt, text}` at the base and at
    the strongest point), `model`, `family`, `text` (sources), `tokens`, `tokens_asked` and `stopped_after_s` (None
    where all of the text was decoded), `expert_cache` (its settings) and `seconds`.
    `on_start` hears the number of steps to come, `on_tokens` of steps done. After `max_seconds` of decoding no further
    document is begun: all arms have then seen the same, shorter text.

    Raises:
        ConfigError: the shipped model or its family is not there and none was given; a budget that cannot be.
        DataError: no text.
        FingerprintMismatchError: the family is of another base (unless `force`).
    """
    started = time.perf_counter()
    if tokens < 2:
        raise ConfigError(f"cannot measure on {tokens} token(s): use --tokens 100 or more")
    model_path, family_path = _places(model, family)
    points = Family.load(family_path)
    # After the family: a wrong path should not cost a load.
    loaded, tokenizer = _load(model_path, expert_cache)
    text = held_out(Path(model_path), tokenizer, tokens, data)
    with (
        arms_of(loaded, points, force=force) as arms,
        inference(loaded),
        fit_for_decode(loaded),
        room_for_reads(expert_cache_of(loaded)),
    ):
        if on_start is not None:
            on_start(sum(map(len, text.documents)) * len(list(arms)))
        rows, decoded, stopped = _decode_arms(loaded, arms, text.documents, max_seconds, on_tokens)
        samples = list(_samples(loaded, tokenizer, arms, text.prompts[:2], new_tokens))
    return {
        "model": str(model_path),
        "family": str(family_path),
        "text": text.sources,
        "tokens": decoded,
        "tokens_asked": sum(len(ids) - 1 for ids in text.documents),
        "stopped_after_s": max_seconds if stopped else None,
        "expert_cache": _settings(expert_cache_of(loaded)),
        **arms.by_kind(rows),
        "samples": samples,
        "seconds": round(time.perf_counter() - started, 1),
    }


def _places(model: str | Path | None, family: str | Path | None) -> tuple[str | Path, str | Path]:
    if model is None:
        model = example_folder()
        if not (model / "config.json").is_file():
            raise ConfigError(f"the shipped model is not beside this package ({model}): {GETTING_THEM}")
        family = family or model / "family"
    if family is None:
        family = Path(model) / "family"
    if isinstance(family, Path) and not (family / "family.json").is_file():
        raise ConfigError(f"no family in {family}: {GETTING_THEM}")
    return model, family


def _load(path: str | Path, budget: str | float) -> tuple[Any, Any]:
    try:
        # Past the page cache, because a model that fits into it would show no read.
        model = load_with_expert_cache(path, budget, direct_io=True)
    except UncacheableError as error:
        say_once(f"{error} It is decoded without an expert cache.")
        return load_with_tokenizer(path)
    return model.eval(), load_tokenizer(str(path))


def _settings(cache: ExpertCache | None) -> dict[str, Any] | None:
    if cache is None:
        return None
    share = cache.budget_bytes / sum(
        count * size for count, size in zip(cache.source.num_experts, cache.source.expert_bytes, strict=True)
    )
    return {
        "policy": cache.policy,
        "scope": cache.scope,
        "budget_bytes": cache.budget_bytes,
        "share": share,
        "arithmetic": cache.arithmetic,
    }


@dataclass(slots=True)
class _Decoded:
    """What decoding took in one arm, over its documents."""

    times_s: list[float] = field(default_factory=list)
    total_s: float = 0.0
    tokens: int = 0
    counted: Counter[str] = field(default_factory=Counter)

    def add(self, steps_s: Sequence[float], stats: Mapping[str, Any] | None) -> None:
        """One document: its steps, and what the cache counted meanwhile."""
        # A document shorter than the warm-up counts with its last step rather than not at all.
        self.times_s += steps_s[WARM_STEPS:] or steps_s[-1:]
        self.total_s += sum(steps_s)
        self.tokens += len(steps_s)
        self.counted.update({name: stats[name] for name in COUNTED} if stats else {})

    def row(self) -> dict[str, float | None]:
        return {
            "tpot_ms": 1e3 * statistics.median(self.times_s),
            **cache_figures(self.counted, self.tokens, self.total_s),
        }


def _decode_arms(
    model: nn.Module,
    arms: Arms,
    documents: Sequence[Sequence[int]],
    max_seconds: float,
    on_tokens: Callable[[int], object] | None,
) -> tuple[dict[Arm, dict[str, Any]], int, bool]:
    """(row of each arm, scored tokens, whether time ran out). Arms take turns document by document, so that a busy
    moment hits them all."""
    tallies = {arm: Tally() for arm in arms}
    decoded = {arm: _Decoded() for arm in arms}
    cache = expert_cache_of(model)
    stopped = False
    deadline_s = time.perf_counter() + max_seconds
    with record_forward(model) as recorder:
        for number, ids in enumerate(documents):
            # At least one document is decoded, however slow the model is.
            if stopped := bool(number) and time.perf_counter() > deadline_s:
                break
            base_logits_SV: Tensor | None = None
            for arm, tally in tallies.items():
                arms.use(arm)
                if cache is not None:
                    # Every arm begins with an empty cache: otherwise an arm would profit from what the one before it
                    # read.
                    cache.clear()
                    cache.reset_stats()
                # All arms decode the same text. Left to generate, a small model loops, and a loop reuses experts like
                # no real text.
                logits_SV, steps_s = _teacher_forced(model, ids)
                decoded[arm].add(steps_s, None if cache is None else cache.stats())
                tally.ids[number, 0] = recorder.take().numpy()
                tally.add(logits_SV, torch.tensor(ids[1:], device=logits_SV.device), base_logits_SV)
                base_logits_SV = logits_SV if base_logits_SV is None else base_logits_SV
                if on_tokens is not None:
                    on_tokens(len(ids))
        base, control = tallies[arms.base], None if arms.control is None else tallies[arms.control]
        rows = {}
        for arm, tally in tallies.items():
            trace = tally.trace(recorder.num_experts, phase="decode")
            rows[arm] = tally.row(arm.strength, base, control, trace, caches=CACHES) | decoded[arm].row()
    return rows, tallies[arms.base].tokens, stopped


def _teacher_forced(model: nn.Module, ids: Sequence[int]) -> tuple[Tensor, list[float]]:
    """Logits [S, V] that predict ids[1:], and the seconds of each step; the last token is fed for its routing."""
    decoder, logits, times_s = Decoder(model), [], []
    on_accelerator = device_of(model).type != "cpu"
    for token in ids:
        begin = time.perf_counter()
        logits.append(decoder.feed([token]))
        if on_accelerator:
            # A step ends when the device has computed it, not when it was launched.
            torch.accelerator.synchronize()
        times_s.append(time.perf_counter() - begin)
    return torch.stack(logits[:-1]), times_s


def _samples(
    model: Any, tokenizer: Any, arms: Arms, prompts: Sequence[str], new_tokens: int
) -> Iterator[dict[str, Any]]:
    for prompt in prompts if new_tokens > 0 else ():
        # The two ends of the dial; the points between read alike.
        for arm in (arms.base, *arms.points[-1:]):
            arms.use(arm)
            made = generate_text(model, tokenizer, prompt, new_tokens=new_tokens, temperature=0.7)
            yield {"strength": arm.strength, "prompt": prompt, "text": made["text"]}
