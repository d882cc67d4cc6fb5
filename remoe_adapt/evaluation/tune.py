"""`remoe tune`: operating points, each with the gains of all layers that its quality budget buys: without training, or
with adapters that were trained before.

Calibration and certificate are of different text: `token_rows` keeps documents apart for the latter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from remoe_adapt.errors import ConfigError, DataError, FamilyError
from remoe_adapt.evaluation.evaluate import CACHES, Tally, certificate_of, check_certifiable
from remoe_adapt.evaluation.record import window_tokens
from remoe_adapt.evaluation.sensitivity import (
    Calibration,
    Measurement,
    Outcome,
    Setting,
    Way,
    calibrate,
    measure_settings,
    reference_ce,
)
from remoe_adapt.eviction import check_replay
from remoe_adapt.expert_cache import arithmetic_of
from remoe_adapt.family import Family, FamilyPoint
from remoe_adapt.recency_settings import Recency
from remoe_adapt.routers import survey_routers
from remoe_adapt.texts import data_files
from remoe_adapt.tuner import plain_base

BUDGETS = (1.002, 1.005, 1.01, 1.02, 1.05)
CALIBRATION_TOKENS = 8192
_MODE, _CACHE = "cost", 0.25
# Rows of calibration end at a multiple of this, so that many are equally long and run side by side.
_ROW_STEP = 64
# The fewest calibration tokens: below them the curves of a layer are those of a few sentences.
_LEAST_TOKENS = 1024
# A point over its budget is aimed at this share of what is left of it, and tried so often.
_STEP_BACK, _MOST_STEPS = 0.9, 6
# A rise of the loss, nats, beyond which no ratio of perplexities is told apart from any other.
_LARGEST_CE = 500.0


def tune_family(
    model: PreTrainedModel,
    data: Sequence[str | Path],
    out: str | os.PathLike[str],
    *,
    tokenizer: Any,
    base_id: str | None = None,
    family: Family | None = None,
    budgets: Sequence[float] = BUDGETS,
    cache: float = _CACHE,
    mode: str = _MODE,
    decay: float | None = None,
    tokens: int = CALIBRATION_TOKENS,
    seed: int = 0,
    on_total: Callable[[int], object] | None = None,
    on_tokens: Callable[[int], object] | None = None,
) -> dict[str, Any]:
    """Finds the gains of every layer for each budget, measures them on text kept apart, and writes a family to the
    folder `out`, in one piece at the end.

    family: its adapters (and recovery LoRAs) are what points run with: of each budget the one that saves most, so that
        several points may share one; its own priors are left out, its control is copied. None: the base's own routers,
        and the family that is written has no adapters.
    data: text; a part of each file is kept out of the calibration (`training.token_rows`) for the certificates.
    budgets: perplexity ratios above 1, rising. The point of the i-th of n budgets has the strength i / n.
    cache: share of a layer's experts in the cache that misses are counted for, which is also the share of the prior.
    mode, decay: of the prior; a mode with history.
    tokens: of calibration. seed: of which pieces of the text these are.
    on_total, on_tokens: hear of the tokens that there are to run in all (again where points are stepped back), and of
        those done.

    A budget is a ratio of perplexities to that of the reference: the base, or an adapter with gains of 0 where that is
    better. So what an adapter learnt of the data is not spent: other text lacks it.
    Of each budget the largest gains are taken whose predicted ratio and its standard error are within it. Where the
    ratio measured on the text kept apart is over the budget, the point is stepped back and measured again; its
    certificate is of the last measurement. A point that is over it to the end says so (`met`).

    Returns the keys of `evaluate` (`points` with `budget`, `met`, `steps_back`, `adapter`, `gains`,
    `ppl_ratio_reference`, `misses`: misses a token under LRFU with the prior's decay, `to_lru` and `to_lrfu`: these
    over the base's under LRU and under that LRFU), and `family`, `strengths`, `recency`, `cache`, `calibration`
    (tokens; `reference_ce`: of the reference, over the base's, nats; for each group of layers the gains tried with
    their KL and misses; in `ways` what the whole model did with each adapter, with its `ce_per_kl`).

    Raises:
        FingerprintMismatchError: `family` is of another base.
        ConfigError: budgets that are not above 1 or do not rise, a bad cache share, mode or decay, too few tokens.
        DataError: the text is too short, for the calibration or for certificates.
        FamilyError: `out` holds a family already, or cannot be written.
        RouterError: no router of the model can have a recency prior.
    """
    # The trainer's libraries take seconds to import, and most of what is measured here needs none of them.
    from remoe_adapt.training import token_rows

    aims, out = check_budgets(budgets), Path(out)
    check_replay(("lru",), (cache,))
    kind = Recency.of(mode, 0.0, decay)
    kind = replace(kind, share=cache) if kind.takes_share else kind
    if tokens < _LEAST_TOKENS:
        raise ConfigError(f"{tokens} calibration tokens are too few: use at least {_LEAST_TOKENS}.")
    data_files(data)
    base = plain_base(model)
    routers = survey_routers(base)
    if family is not None and not family.has_adapters:
        raise FamilyError(f"{family.path} has no adapters to tune gains for: leave it out.")
    name = base_id or str(getattr(model.config, "name_or_path", "") or type(model).__name__)
    made = Family.create(out, name, routers.fingerprint)
    # More is asked for than wanted, because the ends of rows are cut.
    drawn, apart = token_rows(data, tokenizer, tokens + tokens // 4, seed)
    rows = _rows(drawn, window_tokens(model), tokens)
    if sum(map(len, rows)) < _LEAST_TOKENS:
        raise DataError(
            f"{sum(map(len, rows))} tokens of text are too few to calibrate by, at least {_LEAST_TOKENS} are needed: "
            "give more --data."
        )
    check_certifiable(sum(len(ids) - 1 for ids in apart))
    total = _Total(on_total)

    def passes(count: int) -> None:
        total.add(count * sum(map(len, rows)))

    found = calibrate(model, rows, kind, cache, aims, family=family, on_tokens=on_tokens, on_passes=passes)
    beside = 1 + int(family is not None and family.control is not None)

    def measured(settings: Sequence[Setting]) -> Measurement:
        total.add(sum(map(len, apart)) * (len(settings) + beside))
        return measure_settings(model, apart, settings, cache, on_tokens, family=family, control=True)

    points, last = _verified(found, aims, measured)
    told = [f"held-out part of {Path(path).name}" for path in data]
    return _written(made, family, model, found, points, last, cache, told)


def check_budgets(budgets: Sequence[float]) -> list[float]:
    """The budgets as they are. Raises ConfigError unless they are finite, above 1 and rise."""
    for budget in budgets:
        if isinstance(budget, bool) or not isinstance(budget, int | float) or not 1.0 < budget < math.inf:
            raise ConfigError(
                f"budget {budget!r}: a perplexity ratio above 1 is meant, as 1.005 for half a percent; 1 is the base."
            )
    listed = [float(budget) for budget in budgets]
    if not listed or listed != sorted(set(listed)):
        raise ConfigError(f"budgets {', '.join(map(str, budgets)) or '(none)'}: give at least one, rising, each once.")
    return listed


class _Total:
    """Tokens to run in all, of which there are more when a point is stepped back."""

    def __init__(self, on_total: Callable[[int], object] | None) -> None:
        self._on_total, self._tokens = on_total, 0

    def add(self, tokens: int) -> None:
        self._tokens += tokens
        if self._on_total is not None:
            self._on_total(self._tokens)


def _rows(documents: Sequence[Sequence[int]], window: int, tokens: int) -> list[list[int]]:
    """Up to `tokens` tokens as rows of at most a window; short ends of documents are left out."""
    rows: list[list[int]] = []
    left = tokens
    for ids in documents:
        for begin in range(0, len(ids), window):
            part = list(ids[begin : begin + min(window, left)])
            length = len(part) // _ROW_STEP * _ROW_STEP or (len(part) if window < _ROW_STEP else 0)
            if length > 1:
                rows.append(part[:length])
                left -= length
    return rows


class _Point:
    """A budget, what it is aimed at, and what it was found to be. reference_ce: of the text that it was measured on."""

    def __init__(self, budget: float, way: Way, kl: float) -> None:
        self.budget, self.way, self.kl, self.steps_back = budget, way, kl, 0
        self.outcome: Outcome | None = None
        self.reference_ce = 0.0

    def step_back(self) -> None:
        """Aim at less, by how far what was measured is over the budget."""
        share = math.log(self.budget) / max(self._ce, 1e-12)
        part = _STEP_BACK * min(1.0, max(share, 0.25))
        self.kl = self.way.rest_kl + part * (self.kl - self.way.rest_kl)
        self.steps_back += 1

    @property
    def _ce(self) -> float:
        return math.nan if self.outcome is None else self.outcome.ce - self.reference_ce

    @property
    def ratio(self) -> float:
        """Perplexity ratio to the reference, measured; infinite for a loss that is no number, or larger than any."""
        return math.exp(self._ce) if self._ce < _LARGEST_CE else math.inf

    @property
    def is_over(self) -> bool:
        return self.ratio > self.budget


def _verified(
    found: Calibration, budgets: Sequence[float], measured: Callable[[Sequence[Setting]], Measurement]
) -> tuple[list[_Point], Measurement]:
    """The point of each budget, and the last measurement (whose base is that of all)."""
    points = [_Point(budget, *found.best_way(budget)) for budget in budgets]
    still = replace(found.kind, gain=(0.0,) * found.routers)
    # Adapters with gains of 0, which budgets may be told from.
    rests = [(still, way.source) for way in {id(p.way): p.way for p in points}.values() if way.rest is not None]
    reference, wrong = 0.0, points
    for _ in range(_MOST_STEPS + 1):
        last = measured([*rests, *((found.prior_at(p.way.price_of(p.kl)), p.way.source) for p in wrong)])
        if rests:
            reference, rests = reference_ce(last.outcomes[: len(rests)]), []
        for point, outcome in zip(wrong, last.outcomes[-len(wrong) :], strict=True):
            point.outcome, point.reference_ce = outcome, reference
        wrong = [point for point in points if point.is_over]
        if not wrong:
            break
        for point in wrong:
            point.step_back()
    # A weaker point that turned out to save more is the better one for both budgets.
    for weaker, stronger in pairwise(points):
        assert weaker.outcome is not None and stronger.outcome is not None
        if weaker.outcome.misses < stronger.outcome.misses or (stronger.is_over and not weaker.is_over):
            stronger.outcome, stronger.way, stronger.kl = weaker.outcome, weaker.way, weaker.kl
    return points, last


def _written(
    family: Family,
    adapters: Family | None,
    model: PreTrainedModel,
    found: Calibration,
    points: Sequence[_Point],
    last: Measurement,
    cache: float,
    data: list[str],
) -> dict[str, Any]:
    caches = sorted({cache, *CACHES})
    lru, lrfu = float(last.lru_L.sum()), float(last.lrfu_L.sum())
    result: dict[str, Any] = {
        "tokens": last.tokens, "documents": last.documents, "window": last.window, "arithmetic": arithmetic_of(model),
        "data": data,
    }  # fmt: skip

    def row(tally: Tally, strength: float | None) -> dict[str, Any]:
        return tally.row(strength, last.base, last.control, tally.trace(last.num_experts), ("lru", "lrfu"), caches)

    result["base"] = row(last.base, 0.0)
    result["control"] = None if last.control is None else row(last.control, None)
    rows, stored = [], []
    for number, point in enumerate(points, 1):
        outcome, strength = point.outcome, number / len(points)
        assert outcome is not None
        gains, source = outcome.prior.gains(), outcome.source or FamilyPoint(strength, None, {})
        found_row = row(outcome.tally, strength) | {
            "recency": outcome.prior.mode, "recency_gain": sum(gains) / len(gains),
            "misses": outcome.misses, "to_lru": outcome.misses / lru, "to_lrfu": outcome.misses / lrfu,
        }  # fmt: skip
        stored.append(
            replace(
                source, strength=strength, recency=outcome.prior, budget=point.budget,
                certificate=certificate_of(found_row, result),
            )
        )  # fmt: skip
        rows.append(
            found_row | {
                "budget": point.budget, "met": not point.is_over, "steps_back": point.steps_back,
                "adapter": source.adapter, "gains": list(gains), "ppl_ratio_reference": point.ratio,
            }
        )  # fmt: skip
    family.add_points(stored, adapters)
    if adapters is not None and adapters.control is not None and result["control"] is not None:
        family.set_control(adapters.path / adapters.control.adapter, certificate_of(result["control"], result))
    return {
        "family": str(family.path), "strengths": list(family.strengths), "against": None,
        **result, "base": result["base"] | {"misses_lru": lru, "misses_lrfu": lrfu}, "points": rows, "priors": [],
        "recency": {"mode": found.kind.mode, "decay": found.kind.decay, "share": found.kind.share}, "cache": cache,
        "calibration": _told(found),
    }  # fmt: skip


def _told(found: Calibration) -> dict[str, Any]:
    """The calibration, JSON-ready."""
    groups = [
        {
            "layers": list(group),
            "gains": found.probe_gains,
            "kl": [outcome.kl for outcome in outcomes],
            "misses": [float(outcome.misses_L[list(group)].sum()) for outcome in outcomes],
        }
        for group, outcomes in zip(found.groups, found.probes, strict=True)
    ]
    ways = [
        {
            "adapter": None if way.source is None else way.source.adapter, "ce_per_kl": way.ce_per_kl,
            "error_scale": way.error_scale, "rest_kl": way.rest_kl, "rest_ce": way.rest_ce,
            "steps": [
                {
                    "price": price, "gains": list(outcome.prior.gains()), "kl": outcome.kl, "ce": outcome.ce,
                    "ce_error": outcome.ce_error, "misses": outcome.misses,
                }
                for price, outcome in way.steps
            ],
        }
        for way in found.ways
    ]  # fmt: skip
    return {
        "tokens": found.tokens, "reference_ce": found.reference_ce, "misses_lru": found.lru, "misses_lrfu": found.lrfu,
        "groups": groups, "ways": ways,
    }  # fmt: skip
